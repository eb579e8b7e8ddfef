//! The way to an export of another server.

use std::io::{self, ErrorKind};
use std::path::PathBuf;
use std::rc::Rc;
use std::time::Duration;

use proto::client::{Client, Connection, Error, Haggling};
use proto::{ExportInfo, TransmissionFlags as Flags};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpStream, UnixStream};
use tokio::sync::Notify;
use tokio::task::JoinHandle;

use crate::address::Address;
use crate::failure::Failure;
use crate::nbd_uri::NbdUri;
use crate::tls::ClientTls;

/// Which export to use, and how.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(crate) struct RemoteSpec {
    /// Where it is.
    pub(crate) uri: NbdUri,
    /// The directory with the certificates, where it is reached with TLS and the URI names none.
    pub(crate) tls_creds: Option<PathBuf>,
    /// How long a request waits for an answer, whatever happens to the connection.
    pub(crate) patience: Duration,
}

impl RemoteSpec {
    /// With everything but the place by default.
    pub(crate) fn new(uri: NbdUri) -> Self {
        Self {
            uri,
            tls_creds: None,
            patience: PATIENCE,
        }
    }
}

/// Makes connections that have entered the export.
pub(super) trait Dial {
    async fn dial(&self) -> Result<Link, Error>;
}

/// What makes them by the URI.
pub(super) struct Dialer {
    uri: NbdUri,
    tls: Option<ClientTls>,
}

/// A connection that has entered the export, carried by a task.
pub(super) struct Link {
    pub(super) client: Client,
    /// Told when the connection has ended.
    pub(super) gone: Rc<Notify>,
    carried: JoinHandle<()>,
}

impl Link {
    /// Has a task carry `connection`.
    pub(super) fn carried<S>(client: Client, connection: Connection<S>) -> Self
    where
        S: AsyncRead + AsyncWrite + Unpin + 'static,
    {
        let gone = Rc::new(Notify::new());
        let ended = Rc::clone(&gone);
        let carried = tokio::task::spawn_local(async move {
            if let Err(error) = connection.await {
                tracing::debug!(%error, "the connection has ended");
            }
            ended.notify_one();
        });
        Self {
            client,
            gone,
            carried,
        }
    }
}

impl Drop for Link {
    fn drop(&mut self) {
        // Whatever is not answered by now is not waited for.
        self.carried.abort();
    }
}

impl Dialer {
    /// Reads the certificates that it takes.
    pub(super) fn new(spec: &RemoteSpec) -> Result<Self, Failure> {
        let creds = spec.uri.tls_creds.as_ref().or(spec.tls_creds.as_ref());
        let tls = match (creds, spec.uri.with_tls) {
            (Some(creds), true) => Some(ClientTls::read(creds)?),
            (None, false) => None,
            (None, true) => {
                let message = format!("'{}' needs certificates", spec.uri);
                return Err(Failure::new("tls-credentials", message)
                    .hint("add ,tls-creds=DIR, with ca-cert.pem in it"));
            }
            (Some(_), false) => {
                let message = format!("'{}' is reached without TLS", spec.uri);
                return Err(Failure::new("tls-credentials", message)
                    .hint("say nbds:// or nbds+unix://, or leave tls-creds out"));
            }
        };
        Ok(Self {
            uri: spec.uri.clone(),
            tls,
        })
    }

    async fn begin<S>(&self, stream: S) -> Result<Haggling<Box<dyn Stream>>, Error>
    where
        S: AsyncRead + AsyncWrite + Unpin + 'static,
    {
        let stream: Box<dyn Stream> = Box::new(stream);
        let haggling = Haggling::begin(stream).await?;
        let Some(tls) = &self.tls else {
            return Ok(haggling);
        };
        let (plain, after) = haggling.start_tls().await?;
        let secure = tls.connect(&self.uri.server_name, plain).await?;
        Ok(after.go_on(Box::new(secure)))
    }
}

impl Dial for Dialer {
    async fn dial(&self) -> Result<Link, Error> {
        let haggling = match &self.uri.address {
            Address::Unix(path) => self.begin(UnixStream::connect(path).await?).await?,
            Address::Tcp { host, port } => {
                let stream = TcpStream::connect((host.as_str(), *port)).await?;
                stream.set_nodelay(true)?;
                self.begin(stream).await?
            }
        };
        let entered = haggling.enter(&self.uri.export, &[BASE_ALLOCATION]);
        let (client, connection) = entered.await?;
        Ok(Link::carried(client, connection))
    }
}

/// What can be talked over.
pub(super) trait Stream: AsyncRead + AsyncWrite + Unpin {}

impl<S: AsyncRead + AsyncWrite + Unpin> Stream for S {}

/// What an export can do, of what it is asked.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
#[expect(
    clippy::struct_excessive_bools,
    reason = "each is a flag that the export has or has not"
)]
pub(super) struct Abilities {
    /// In bytes.
    pub(super) size: u64,
    /// What requests are made of, in bytes.
    pub(super) block: u64,
    pub(super) read_only: bool,
    pub(super) flush: bool,
    pub(super) fua: bool,
    pub(super) zero: bool,
    pub(super) fast_zero: bool,
}

impl Abilities {
    pub(super) fn of(info: &ExportInfo) -> Self {
        let has = |flag| info.flags.contains(flag);
        Self {
            size: info.size,
            block: info.block_size.minimum().into(),
            read_only: has(Flags::READ_ONLY),
            flush: has(Flags::SEND_FLUSH),
            fua: has(Flags::SEND_FUA),
            zero: has(Flags::SEND_WRITE_ZEROES),
            fast_zero: has(Flags::SEND_WRITE_ZEROES) && has(Flags::SEND_FAST_ZERO),
        }
    }

    /// Why what comes back with `other` abilities cannot be gone on with, if so.
    pub(super) fn differ(&self, other: &Self) -> Option<String> {
        if self.size != other.size {
            let (before, now) = (self.size, other.size);
            return Some(format!("it had {before} bytes, and came back with {now}"));
        }
        (self != other).then(|| "it came back with other abilities".to_owned())
    }
}

/// An error with what is behind it.
pub(super) fn told(error: &Error) -> String {
    let mut text = error.to_string();
    let mut source = std::error::Error::source(error);
    while let Some(behind) = source {
        text = format!("{text}: {behind}");
        source = behind.source();
    }
    text
}

/// Whether nobody was met, as far as that can be told: who has just been started may be there soon.
pub(super) fn is_absence(error: &Error) -> bool {
    match error {
        Error::Closed | Error::Leaving => true,
        Error::Io(error) => matches!(
            error.kind(),
            ErrorKind::NotFound
                | ErrorKind::ConnectionRefused
                | ErrorKind::ConnectionReset
                | ErrorKind::ConnectionAborted
                | ErrorKind::BrokenPipe
                | ErrorKind::HostUnreachable
                | ErrorKind::NetworkUnreachable
                | ErrorKind::NetworkDown
        ),
        _ => false,
    }
}

/// What of an error is worth an errno of the system, for those who tell them apart.
pub(super) fn error_of(error: Error) -> io::Error {
    let Error::Failed(failure) = &error else {
        return io::Error::other(error);
    };
    let kind = match failure.errno {
        proto::Errno::NoSpc => io::ErrorKind::StorageFull,
        proto::Errno::NotSup => io::ErrorKind::Unsupported,
        proto::Errno::Perm => io::ErrorKind::PermissionDenied,
        proto::Errno::NoMem => io::ErrorKind::OutOfMemory,
        _ => io::ErrorKind::Other,
    };
    io::Error::new(kind, error)
}

/// How long a request waits for another server: as long as guests wait for a disk, mostly.
const PATIENCE: Duration = Duration::from_secs(30);

/// The metadata context that says what takes space.
pub(super) const BASE_ALLOCATION: &str = "base:allocation";
