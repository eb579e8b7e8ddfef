//! The other end of TLS: whom we believe as a client, and what we show.

use std::io;
use std::path::Path;
use std::sync::Arc;

use rustls::client::{Resumption, WebPkiServerVerifier};
use rustls::crypto::ring;
use rustls::pki_types::ServerName;
use rustls::{ClientConfig, RootCertStore};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;

use super::files;
use crate::failure::Failure;

/// Whose certificates a client believes, and what it shows to a server that asks.
#[derive(Clone)]
pub(crate) struct ClientTls(Arc<ClientConfig>);

impl ClientTls {
    /// Reads `ca-cert.pem` of a directory, and what else of a client's is there.
    pub(crate) fn read(directory: &Path) -> Result<Self, Failure> {
        let unusable = |error: &dyn std::error::Error| {
            let directory = directory.display();
            files::wrong(format!(
                "the files in '{directory}' cannot be used: {error}"
            ))
        };
        let provider = Arc::new(ring::default_provider());
        let authority = files::authority(directory)?;
        let mut roots = RootCertStore::empty();
        for certificate in authority.certificates {
            roots.add(certificate).map_err(|error| unusable(&error))?;
        }
        let verifier =
            WebPkiServerVerifier::builder_with_provider(Arc::new(roots), Arc::clone(&provider))
                .with_crls(authority.revoked)
                .build()
                .map_err(|error| unusable(&error))?;
        let config = ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .map_err(|error| unusable(&error))?
            .with_webpki_verifier(verifier);
        let mut config = match files::client_identity(directory)? {
            None => config.with_no_client_auth(),
            Some(own) => config
                .with_client_auth_cert(own.certificates, own.key)
                .map_err(|error| unusable(&error))?,
        };
        // Nothing is gained by resuming a session that lasts for as long as a copy.
        config.resumption = Resumption::disabled();
        Ok(Self(Arc::new(config)))
    }

    /// Shakes hands with a server that has agreed to, and whose certificate has to name `server`.
    pub(crate) async fn connect<S>(&self, server: &str, stream: S) -> io::Result<TlsStream<S>>
    where
        S: AsyncRead + AsyncWrite + Unpin,
    {
        let name = ServerName::try_from(server.to_owned()).map_err(io::Error::other)?;
        let connector = TlsConnector::from(Arc::clone(&self.0));
        connector.connect(name, stream).await
    }
}
