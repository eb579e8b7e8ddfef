//! Everything that listens, and what is served there on which terms.

use std::path::{Path, PathBuf};

use proto::TlsMode;
use tokio::net::{TcpListener, UnixListener};

use crate::address::Address;
use crate::export::Role;
use crate::failure::Failure;
use crate::listen::{self, Group};
use crate::serve::ServeOptions;
use crate::tls::{Terms, Tls};

/// Everything that listens.
pub(crate) struct Listeners {
    /// Where NBD is spoken.
    pub(crate) data: Vec<Door>,
    /// The control socket.
    pub(crate) control: UnixListener,
    /// Where that is.
    pub(crate) control_path: PathBuf,
    /// Where clients find live exports.
    pub(crate) live: Vec<Endpoint>,
    /// Where they find frozen ones.
    pub(crate) backup: Vec<Endpoint>,
}

/// A socket that clients come in by.
pub(crate) struct Door {
    /// The socket.
    pub(crate) listener: Listener,
    /// What is served behind it.
    pub(crate) role: Role,
    /// Whether clients may, or must, ask for TLS.
    pub(crate) tls: Tls,
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
    /// Listens at all the places that `options` name.
    pub(crate) async fn bind(
        options: &ServeOptions,
        terms: Option<&Terms>,
    ) -> Result<Self, Failure> {
        let group = options
            .socket_group
            .as_deref()
            .map(Group::find)
            .transpose()?;
        let unix = |path: &Path| listen::unix(path, options.socket_mode, group);
        let control_path = options.run_dir.join("control.sock");
        let control = unix(&control_path)?;
        let mut data = Vec::new();
        let mut bound = Vec::new();
        for (role, file, more) in [
            (Role::Live, "live.sock", &options.live_listen),
            (Role::Backup, "backup.sock", &options.backup_listen),
        ] {
            let own = Address::Unix(options.run_dir.join(file));
            let mut endpoints = Vec::new();
            for address in std::iter::once(&own).chain(more) {
                let tls = Tls::at(address, terms);
                let (listener, address) = match address {
                    Address::Unix(path) => (Listener::Unix(unix(path)?), address.clone()),
                    Address::Tcp { host, port } => {
                        let (listener, port) = listen::tcp(host, *port).await?;
                        let host = host.clone();
                        (Listener::Tcp(listener), Address::Tcp { host, port })
                    }
                };
                warn_of_strangers(&address, &tls);
                let mode = tls.mode();
                data.push(Door {
                    listener,
                    role,
                    tls,
                });
                endpoints.push(Endpoint { address, tls: mode });
            }
            bound.push(endpoints);
        }
        let backup = bound.pop().unwrap_or_default();
        let live = bound.pop().unwrap_or_default();
        Ok(Self {
            data,
            control,
            control_path,
            live,
            backup,
        })
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

/// TLS hides what is said; it does not yet say to whom.
fn warn_of_strangers(address: &Address, tls: &Tls) {
    if !address.is_loopback() && tls.mode() != TlsMode::Off && !tls.verifies_peers() {
        tracing::warn!(
            "whoever reaches {address} is served without a certificate: --tls-verify-peer asks for one"
        );
    }
}

/// Refuses to show the disks to a whole network.
pub(crate) fn refuse_plaintext(
    options: &ServeOptions,
    terms: Option<&Terms>,
) -> Result<(), Failure> {
    let mut all = options.live_listen.iter().chain(&options.backup_listen);
    let is_open = |address: &&Address| {
        !address.is_loopback() && Tls::at(address, terms).mode() != TlsMode::Require
    };
    let Some(open) = all.find(is_open).filter(|_| !options.allow_plaintext) else {
        return Ok(());
    };
    let message = format!("{open} would carry the disks' contents unencrypted");
    let hint = "give --tls-creds DIR with the server's certificate, or listen on a loopback \
                address, or say --allow-plaintext if the network is yours";
    Err(Failure::new("plaintext", message).hint(hint))
}
