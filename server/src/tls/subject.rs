//! Whom a certificate names, for the log.

use rustls::pki_types::CertificateDer;
use x509_cert::Certificate;
use x509_cert::der::Decode;

/// The distinguished name in a certificate, as RFC 4514 writes it. Where that is empty or cannot be
/// read it says so: it is a text for people, and decides nothing.
pub(super) fn subject(certificate: &CertificateDer<'_>) -> String {
    match Certificate::from_der(certificate) {
        Ok(read) if read.tbs_certificate.subject.is_empty() => {
            "a certificate without a subject".to_owned()
        }
        Ok(read) => read.tbs_certificate.subject.to_string(),
        Err(error) => format!("a certificate that cannot be read: {error}"),
    }
}
