//! TLS: who the server is, as its files say, and who its clients are.
//!
//! The files are laid out as QEMU, libvirt and nbdkit have them. A connection takes what holds when
//! its handshake begins, and keeps it; reading the files anew touches none that is there.

mod client;
mod credentials;
mod files;
mod secured;
mod subject;

use std::io;
use std::path::PathBuf;
use std::sync::Arc;

use proto::TlsMode;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio_rustls::TlsAcceptor;

pub(crate) use client::ClientTls;
pub(crate) use secured::Secured;

use crate::address::Address;
use crate::failure::Failure;
use credentials::Credentials;

/// Where the files are, and on which sockets TLS is to be had, or needed.
#[derive(Clone, Debug)]
pub(crate) struct TlsOptions {
    /// The directory with the files.
    pub(crate) creds: PathBuf,
    /// Clients need certificates.
    pub(crate) verify_peer: bool,
    /// On TCP.
    pub(crate) tcp: TlsMode,
    /// On Unix sockets.
    pub(crate) unix: TlsMode,
}

impl TlsOptions {
    /// Reads the files.
    pub(crate) fn read(&self) -> Result<Terms, Failure> {
        Ok(Terms {
            credentials: Arc::new(Credentials::read(&self.creds, self.verify_peer)?),
            tcp: self.tcp,
            unix: self.unix,
        })
    }
}

/// The same with the files read.
pub(crate) struct Terms {
    credentials: Arc<Credentials>,
    tcp: TlsMode,
    unix: TlsMode,
}

impl Terms {
    /// Reads the files again, for the connections to come. If anything is wrong with them nothing
    /// changes.
    pub(crate) fn read_again(&self) -> Result<(), Failure> {
        self.credentials.read_again()
    }
}

/// What TLS is to the clients of one socket.
#[derive(Clone)]
pub(crate) enum Tls {
    /// There is none.
    Off,
    /// Whoever asks gets it.
    On(Arc<Credentials>),
    /// Nobody is served without.
    Require(Arc<Credentials>),
}

impl Tls {
    /// What it is at this address.
    pub(crate) fn at(address: &Address, terms: Option<&Terms>) -> Self {
        let Some(terms) = terms else { return Self::Off };
        let mode = match address {
            Address::Unix(_) => terms.unix,
            Address::Tcp { .. } => terms.tcp,
        };
        match mode {
            TlsMode::Off => Self::Off,
            TlsMode::On => Self::On(Arc::clone(&terms.credentials)),
            TlsMode::Require => Self::Require(Arc::clone(&terms.credentials)),
        }
    }

    /// What it is in the words of the protocol.
    pub(crate) fn mode(&self) -> TlsMode {
        match self {
            Self::Off => TlsMode::Off,
            Self::On(_) => TlsMode::On,
            Self::Require(_) => TlsMode::Require,
        }
    }

    /// Whether the certificates of clients say who may come in.
    pub(crate) fn verifies_peers(&self) -> bool {
        match self {
            Self::Off => false,
            Self::On(credentials) | Self::Require(credentials) => credentials.verify_peer(),
        }
    }

    /// Shakes hands over a connection whose client has been told to.
    pub(crate) async fn accept<S>(&self, stream: S) -> io::Result<Secured<S>>
    where
        S: AsyncRead + AsyncWrite + Unpin,
    {
        let (Self::On(credentials) | Self::Require(credentials)) = self else {
            return Err(io::Error::other("there is no certificate"));
        };
        let acceptor = TlsAcceptor::from(credentials.current());
        Ok(Secured::new(acceptor.accept(stream).await?))
    }
}
