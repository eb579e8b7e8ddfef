//! The certificate that the server shows, and the authority that it believes.

use std::path::{Path, PathBuf};
use std::sync::{Arc, PoisonError, RwLock};

use rustls::crypto::{CryptoProvider, ring};
use rustls::server::danger::ClientCertVerifier;
use rustls::server::{NoServerSessionStorage, WebPkiClientVerifier};
use rustls::{RootCertStore, ServerConfig};

use super::files::{self, Authority, Identity};
use super::subject::subject;
use crate::failure::Failure;

/// Where the credentials come from, and what they were when they were last read whole.
pub(crate) struct Credentials {
    directory: PathBuf,
    verify_peer: bool,
    current: RwLock<Arc<ServerConfig>>,
}

impl Credentials {
    /// Reads the files of `directory`; with `verify_peer` clients need certificates of its authority.
    pub(super) fn read(directory: &Path, verify_peer: bool) -> Result<Self, Failure> {
        let (config, _) = configure(directory, verify_peer)?;
        Ok(Self {
            directory: directory.to_owned(),
            verify_peer,
            current: RwLock::new(Arc::new(config)),
        })
    }

    /// Reads the files again, for the connections to come. If anything is wrong with them nothing
    /// changes.
    pub(super) fn read_again(&self) -> Result<(), Failure> {
        let (config, subject) = configure(&self.directory, self.verify_peer)?;
        tracing::info!(subject, "the TLS certificate has been read again");
        *self.current.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(config);
        Ok(())
    }

    /// Whether clients need certificates.
    pub(super) fn verify_peer(&self) -> bool {
        self.verify_peer
    }

    /// What a handshake goes by.
    pub(super) fn current(&self) -> Arc<ServerConfig> {
        let current = self.current.read().unwrap_or_else(PoisonError::into_inner);
        Arc::clone(&current)
    }
}

/// How to shake hands, and whom the server's certificate names.
fn configure(directory: &Path, verify_peer: bool) -> Result<(ServerConfig, String), Failure> {
    let provider = Arc::new(ring::default_provider());
    let identity = files::identity(directory)?;
    let clients = if verify_peer {
        let authority = files::authority(directory)?;
        verifier(directory, authority, &provider)?
    } else {
        WebPkiClientVerifier::no_client_auth()
    };
    let name = subject(&identity.certificates[0]);

    let mut config = with_identity(directory, identity, clients, provider)?;
    // A connection lasts for hours: nothing is gained by resuming a session, and each that begins
    // is held to the files as they are.
    config.session_storage = Arc::new(NoServerSessionStorage {});
    config.send_tls13_tickets = 0;
    Ok((config, name))
}

fn with_identity(
    directory: &Path,
    identity: Identity,
    clients: Arc<dyn ClientCertVerifier>,
    provider: Arc<CryptoProvider>,
) -> Result<ServerConfig, Failure> {
    let unusable = |error: rustls::Error| match error {
        rustls::Error::InconsistentKeys(_) => {
            let [key, certificate] = [files::SERVER_KEY, files::SERVER_CERT];
            let message = format!(
                "the key in '{}' does not belong to the certificate in '{}'",
                directory.join(key).display(),
                directory.join(certificate).display()
            );
            files::wrong(message).hint("the server's own certificate is the first in its file")
        }
        error => files::wrong(format!(
            "the certificate and key in '{}' cannot be used: {error}",
            directory.display()
        )),
    };
    ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .map_err(unusable)?
        .with_client_cert_verifier(clients)
        .with_single_cert(identity.certificates, identity.key)
        .map_err(unusable)
}

fn verifier(
    directory: &Path,
    authority: Authority,
    provider: &Arc<CryptoProvider>,
) -> Result<Arc<dyn ClientCertVerifier>, Failure> {
    let unusable = |file: &str, error: &dyn std::error::Error| {
        let path = directory.join(file);
        files::wrong(format!("'{}' cannot be used: {error}", path.display()))
    };
    let mut roots = RootCertStore::empty();
    for certificate in authority.certificates {
        roots
            .add(certificate)
            .map_err(|error| unusable(files::CA_CERT, &error))?;
    }
    WebPkiClientVerifier::builder_with_provider(Arc::new(roots), Arc::clone(provider))
        .with_crls(authority.revoked)
        .build()
        .map_err(|error| unusable(files::CA_CRL, &error))
}
