//! The PEM files of a directory, laid out as QEMU, libvirt and nbdkit have them.

use std::fs::{self, File};
use std::io::{self, Read};
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use rustls::pki_types::pem::{self, PemObject};
use rustls::pki_types::{CertificateDer, CertificateRevocationListDer, PrivateKeyDer};

use crate::failure::Failure;

/// The server's certificate, and those that lead from it to the authority.
pub(super) const SERVER_CERT: &str = "server-cert.pem";

/// The key that belongs to it.
pub(super) const SERVER_KEY: &str = "server-key.pem";

/// Whoever signs the certificates of clients.
pub(super) const CA_CERT: &str = "ca-cert.pem";

/// Which certificates are no longer to be believed; need not be there.
pub(super) const CA_CRL: &str = "ca-crl.pem";

/// The certificate that a client shows to whoever asks; need not be there.
pub(super) const CLIENT_CERT: &str = "client-cert.pem";

/// The key that belongs to it.
pub(super) const CLIENT_KEY: &str = "client-key.pem";

/// Who somebody is.
pub(super) struct Identity {
    /// Never empty; its own is the first.
    pub(super) certificates: Vec<CertificateDer<'static>>,
    pub(super) key: PrivateKeyDer<'static>,
}

/// Who says who the others are.
pub(super) struct Authority {
    pub(super) certificates: Vec<CertificateDer<'static>>,
    pub(super) revoked: Vec<CertificateRevocationListDer<'static>>,
}

/// Reads who the server is.
pub(super) fn identity(directory: &Path) -> Result<Identity, Failure> {
    let certificates = some(&directory.join(SERVER_CERT), "certificate")?;
    let key = key(&directory.join(SERVER_KEY))?;
    Ok(Identity { certificates, key })
}

/// Reads who a client is, if it has anything to show.
pub(super) fn client_identity(directory: &Path) -> Result<Option<Identity>, Failure> {
    let certificate = directory.join(CLIENT_CERT);
    let is_there = fs::exists(&certificate).map_err(|error| unreadable(&certificate, &error))?;
    if !is_there {
        return Ok(None);
    }
    let certificates = some(&certificate, "certificate")?;
    let key = key(&directory.join(CLIENT_KEY))?;
    Ok(Some(Identity { certificates, key }))
}

/// Reads who says who the others are.
pub(super) fn authority(directory: &Path) -> Result<Authority, Failure> {
    let certificates = some(&directory.join(CA_CERT), "certificate")?;
    let list = directory.join(CA_CRL);
    let is_there = fs::exists(&list).map_err(|error| unreadable(&list, &error))?;
    let revoked = if is_there {
        some(&list, "revocation list")?
    } else {
        Vec::new()
    };
    Ok(Authority {
        certificates,
        revoked,
    })
}

/// A refusal of what is in the files.
pub(super) fn wrong(message: String) -> Failure {
    Failure::new("tls-credentials", message)
}

fn key(path: &Path) -> Result<PrivateKeyDer<'static>, Failure> {
    let text = read(path)?;
    match PrivateKeyDer::from_pem_slice(&text) {
        Ok(key) => {
            warn_if_open(path);
            Ok(key)
        }
        Err(_) if contains(&text, b"ENCRYPTED") => {
            let path = path.display();
            Err(wrong(format!("the key in '{path}' needs a passphrase"))
                .hint(format!("keep it without one: openssl pkey -in '{path}'")))
        }
        Err(error) => Err(no_pem(path, "private key", &error)),
    }
}

fn some<T: PemObject>(path: &Path, what: &str) -> Result<Vec<T>, Failure> {
    let text = read(path)?;
    let all: Result<Vec<T>, _> = T::pem_slice_iter(&text).collect();
    match all {
        Ok(found) if !found.is_empty() => Ok(found),
        Ok(_) => Err(no_pem(path, what, &pem::Error::NoItemsFound)),
        Err(error) => Err(no_pem(path, what, &error)),
    }
}

fn no_pem(path: &Path, what: &str, error: &pem::Error) -> Failure {
    let path = path.display();
    let message = match error {
        pem::Error::NoItemsFound => format!("there is no {what} in '{path}'"),
        error => format!("the {what} in '{path}' cannot be read: {error}"),
    };
    wrong(message).hint("the files are in PEM form, with lines such as -----BEGIN CERTIFICATE-----")
}

fn read(path: &Path) -> Result<Vec<u8>, Failure> {
    let mut text = Vec::new();
    let file = File::open(path);
    let length = file.and_then(|file| file.take(FILE_MAX + 1).read_to_end(&mut text));
    match length {
        Ok(length) if length as u64 <= FILE_MAX => Ok(text),
        Ok(_) => {
            let path = path.display();
            Err(wrong(format!("'{path}' is larger than {FILE_MAX} bytes")))
        }
        Err(error) => Err(unreadable(path, &error)),
    }
}

fn unreadable(path: &Path, error: &io::Error) -> Failure {
    let hint = format!(
        "the directory of --tls-creds has {SERVER_CERT} and {SERVER_KEY} for a server, and {CA_CERT} \
         for --tls-verify-peer and for clients"
    );
    wrong(format!("cannot read '{}': {error}", path.display())).hint(hint)
}

/// Whoever has the key is the server. A group may read it, as libvirt sets it up.
fn warn_if_open(path: &Path) {
    let mode = fs::metadata(path).map_or(0, |found| found.mode());
    if mode & 0o007 != 0 {
        tracing::warn!(
            "everyone on this machine has access to the key '{}' (mode {:04o}): chmod o= would end that",
            path.display(),
            mode & 0o7777
        );
    }
}

fn contains(text: &[u8], word: &[u8]) -> bool {
    text.windows(word.len()).any(|window| window == word)
}

/// Some times what any chain or revocation list takes.
const FILE_MAX: u64 = 16 << 20;
