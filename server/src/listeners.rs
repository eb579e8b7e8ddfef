//! Everything that listens, and what is served there on which terms.

use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use proto::TlsMode;
use tokio::net::{TcpListener, UnixListener};

use crate::address::Address;
use crate::export::Role;
use crate::failure::Failure;
use crate::handed_over::{HandedOver, Purpose, Socket};
use crate::listen::{self, Group};
use crate::serve::ServeOptions;
use crate::tls::{Terms, Tls};

/// Everything that listens.
pub(crate) struct Listeners {
    /// Where NBD is spoken.
    pub(crate) doors: Vec<Door>,
    /// The control socket.
    pub(crate) control: UnixListener,
    /// Where that is.
    pub(crate) control_path: PathBuf,
    /// The files that go when the server stops: those that it made.
    pub(crate) made: Vec<PathBuf>,
}

/// A socket that clients come in by.
pub(crate) struct Door {
    /// The socket.
    pub(crate) listener: Listener,
    /// What is served behind it.
    pub(crate) role: Role,
    /// Whether clients may, or must, ask for TLS.
    pub(crate) tls: Tls,
    address: Address,
}

/// A listening socket of either kind.
pub(crate) enum Listener {
    /// In the file system.
    Unix(UnixListener),
    /// On a network.
    Tcp(TcpListener),
}

/// What clients are told about a socket.
#[derive(Clone, Debug)]
pub(crate) struct Endpoint {
    /// Where it is.
    pub(crate) address: Address,
    tls: TlsMode,
}

impl Listeners {
    /// Listens at all the places that `options` name, and takes what was handed over. A socket of
    /// the run directory is not made where the service manager has it.
    pub(crate) async fn bind(
        options: &ServeOptions,
        handed_over: Vec<HandedOver>,
        terms: Option<&Terms>,
    ) -> Result<Self, Failure> {
        let group = options
            .socket_group
            .as_deref()
            .map(Group::find)
            .transpose()?;
        let unix = |path: &Path| listen::unix(path, options.socket_mode, group.as_ref());
        let control_path = options.run_dir.join("control.sock");
        let (mut made, mut control) = (Vec::new(), None);
        let (mut doors, mut managed) = (Vec::new(), Vec::<Door>::new());
        for HandedOver {
            socket,
            address,
            purpose,
        } in handed_over
        {
            match (purpose, socket) {
                (Purpose::Data(role), socket) => {
                    let listener = tied(socket).map_err(|error| cannot_use(&address, &error))?;
                    managed.push(Door::new(listener, role, address, terms));
                }
                (Purpose::Control, Socket::Unix(socket)) if is_at(&address, &control_path) => {
                    let listener = tied_unix(socket);
                    control = Some(listener.map_err(|error| cannot_use(&address, &error))?);
                }
                (Purpose::Control, _) => return Err(lost_control(&address, &control_path)),
            }
        }
        let control = if let Some(control) = control {
            control
        } else {
            made.push(control_path.clone());
            unix(&control_path)?
        };
        for (role, file, more) in [
            (Role::Live, "live.sock", &options.live_listen),
            (Role::Backup, "backup.sock", &options.backup_listen),
        ] {
            let own = options.run_dir.join(file);
            let is_there = managed.iter().any(|door| is_at(&door.address, &own));
            let own = (!is_there).then_some(Address::Unix(own));
            for address in own.iter().chain(more) {
                let (listener, address) = match address {
                    Address::Unix(path) => {
                        let listener = unix(path)?;
                        made.push(path.clone());
                        (Listener::Unix(listener), address.clone())
                    }
                    Address::Tcp { host, port } => {
                        let (listener, port) = listen::tcp(host, *port).await?;
                        let host = host.clone();
                        (Listener::Tcp(listener), Address::Tcp { host, port })
                    }
                };
                doors.push(Door::new(listener, role, address, terms));
            }
        }
        doors.extend(managed);
        Ok(Self {
            doors,
            control,
            control_path,
            made,
        })
    }

    /// Where clients find what has this role.
    pub(crate) fn endpoints(&self, role: Role) -> Vec<Endpoint> {
        let doors = self.doors.iter().filter(|door| door.role == role);
        doors
            .map(|door| Endpoint {
                address: door.address.clone(),
                tls: door.tls.mode(),
            })
            .collect()
    }
}

impl Door {
    fn new(listener: Listener, role: Role, address: Address, terms: Option<&Terms>) -> Self {
        let tls = Tls::at(&address, terms);
        // TLS hides what is said; it does not yet say to whom.
        if !address.is_loopback() && tls.mode() != TlsMode::Off && !tls.verifies_peers() {
            tracing::warn!(
                "whoever reaches {address} is served without a certificate: \
                 --tls-verify-peer asks for one"
            );
        }
        Self {
            listener,
            role,
            tls,
            address,
        }
    }
}

impl Endpoint {
    /// What an NBD client is told to connect to, for `export` here. Where TLS is to be had for the
    /// asking, it is asked for on a network; on one machine it would protect nothing.
    pub(crate) fn uri(&self, export: &str) -> String {
        let with_tls = match (&self.address, self.tls) {
            (_, TlsMode::Off) | (Address::Unix(_), TlsMode::On) => false,
            (_, TlsMode::Require) | (Address::Tcp { .. }, TlsMode::On) => true,
        };
        self.address.uri(export, with_tls)
    }
}

/// Refuses to show the disks to a whole network.
pub(crate) fn refuse_plaintext(
    options: &ServeOptions,
    handed_over: &[HandedOver],
    terms: Option<&Terms>,
) -> Result<(), Failure> {
    let ours = options.live_listen.iter().chain(&options.backup_listen);
    let mut all = ours.chain(handed_over.iter().map(|socket| &socket.address));
    let is_open = |address: &&Address| {
        !address.is_loopback() && Tls::at(address, terms).mode() != TlsMode::Require
    };
    let Some(open) = all.find(is_open).filter(|_| !options.allow_plaintext) else {
        return Ok(());
    };
    let message = format!("{open} would carry the disks' contents unencrypted");
    let tls = match terms {
        Some(_) => "let nobody in without TLS: --tls require",
        None => "give --tls-creds DIR with the server's certificate",
    };
    let hint = format!(
        "{tls}, or listen on a loopback address, or say --allow-plaintext if the network is yours"
    );
    Err(Failure::new("plaintext", message).hint(hint))
}

fn tied(socket: Socket) -> io::Result<Listener> {
    match socket {
        Socket::Unix(socket) => tied_unix(socket).map(Listener::Unix),
        Socket::Tcp(socket) => {
            socket.set_nonblocking(true)?;
            TcpListener::from_std(socket).map(Listener::Tcp)
        }
    }
}

fn tied_unix(socket: std::os::unix::net::UnixListener) -> io::Result<UnixListener> {
    socket.set_nonblocking(true)?;
    UnixListener::from_std(socket)
}

/// Whether this is the socket that is found at `path`, by whatever way.
fn is_at(address: &Address, path: &Path) -> bool {
    let file = |path: &Path| path.metadata().map(|found| (found.dev(), found.ino())).ok();
    match address {
        Address::Unix(own) => own == path || file(own).is_some_and(|own| file(path) == Some(own)),
        Address::Tcp { .. } => false,
    }
}

fn cannot_use(address: &Address, error: &io::Error) -> Failure {
    Failure::new("cannot-listen", format!("cannot use {address}: {error}"))
}

fn lost_control(address: &Address, path: &Path) -> Failure {
    let path = path.display();
    let message = format!(
        "the control socket that the service manager hands over is at {address}, not '{path}'"
    );
    Failure::new("handed-over", message)
        .hint(format!("clients look for it there: ListenStream={path}"))
}
