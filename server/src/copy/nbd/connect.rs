//! From a URI to an export that has been entered.

use std::io;
use std::time::Duration;

use proto::client::{Client, Connection, Haggling};
use proto::{ExportInfo, TransmissionFlags};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpStream, UnixStream};
use tokio::time::timeout;

use crate::address::Address;
use crate::copy::SourceError;
use crate::failure::Failure;
use crate::nbd_uri::NbdUri;
use crate::tls::ClientTls;

/// A connection of any kind.
trait Stream: AsyncRead + AsyncWrite + Unpin {}

impl<S: AsyncRead + AsyncWrite + Unpin> Stream for S {}

/// Enters an export. What carries its requests is a task of the local set that this runs in.
pub(super) async fn enter(
    uri: &NbdUri,
    tls: Option<&ClientTls>,
    contexts: &[&str],
) -> Result<Client, SourceError> {
    let entered = timeout(PATIENCE, haggle(uri, tls, contexts)).await;
    let (client, connection) = entered.map_err(|_| silent(uri))??;
    // It ends with the last clone of the client, and whoever waits for an answer is told how.
    tokio::task::spawn_local(connection);
    Ok(client)
}

async fn haggle(
    uri: &NbdUri,
    tls: Option<&ClientTls>,
    contexts: &[&str],
) -> Result<(Client, Connection<Box<dyn Stream>>), SourceError> {
    let stream = connect(&uri.address)
        .await
        .map_err(|error| unreachable(uri, &error))?;
    let haggling = Haggling::begin(stream).await?;
    let haggling = match (uri.with_tls, tls) {
        (false, _) => haggling,
        (true, None) => return Err(no_authority(uri).into()),
        (true, Some(tls)) => {
            let (stream, after) = haggling.start_tls().await?;
            let secure = tls.connect(&uri.server_name, stream).await;
            let secure = secure.map_err(|error| untrusted(uri, &error))?;
            after.go_on(Box::new(secure) as Box<dyn Stream>)
        }
    };
    Ok(haggling.enter(&uri.export, contexts).await?)
}

/// Refuses a further connection that leads to something else than the first one did.
pub(super) fn check_same(first: &ExportInfo, another: &ExportInfo) -> Result<(), SourceError> {
    let is_same = first.size == another.size
        && another.flags.contains(TransmissionFlags::CAN_MULTI_CONN)
        && first.flags.contains(TransmissionFlags::READ_ONLY)
            == another.flags.contains(TransmissionFlags::READ_ONLY);
    if is_same {
        return Ok(());
    }
    let message = format!(
        "the export '{}' has changed while it was being opened: it had {} bytes, and has {}",
        first.name, first.size, another.size
    );
    Err(Failure::new("export-changed", message).into())
}

async fn connect(address: &Address) -> io::Result<Box<dyn Stream>> {
    Ok(match address {
        Address::Unix(path) => Box::new(UnixStream::connect(path).await?),
        Address::Tcp { host, port } => {
            let stream = TcpStream::connect((host.as_str(), *port)).await?;
            stream.set_nodelay(true)?;
            Box::new(stream)
        }
    })
}

fn unreachable(uri: &NbdUri, error: &io::Error) -> Failure {
    Failure::new(
        "no-server",
        format!("cannot connect to {}: {error}", uri.address),
    )
}

fn silent(uri: &NbdUri) -> Failure {
    let message = format!(
        "what listens on {} has not let us in within {} s",
        uri.address,
        PATIENCE.as_secs()
    );
    Failure::new("no-server", message)
}

fn no_authority(uri: &NbdUri) -> Failure {
    Failure::new("tls-credentials", format!("{uri} needs TLS"))
        .hint("give the directory with ca-cert.pem, which says whom to believe: --tls-creds DIR")
}

fn untrusted(uri: &NbdUri, error: &io::Error) -> Failure {
    let message = format!("TLS with {} failed: {error}", uri.address);
    Failure::new("tls", message)
}

/// A server that is alive answers at once; one behind a slow network within this.
const PATIENCE: Duration = Duration::from_secs(30);
