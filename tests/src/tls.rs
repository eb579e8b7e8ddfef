//! Certificates made for a test, and an NBD client that decides for itself when TLS begins.

use std::fs;
use std::io::{self, Read, Write};
use std::net::TcpStream;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use rcgen::{
    BasicConstraints, CertificateParams, CertificateRevocationListParams, CertifiedIssuer, DnType,
    ExtendedKeyUsagePurpose, IsCa, KeyIdMethod, KeyPair, KeyUsagePurpose, RevokedCertParams,
    SerialNumber,
};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use rustls::version::{TLS12, TLS13};
use rustls::{
    ClientConfig, ClientConnection, RootCertStore, StreamOwned, SupportedProtocolVersion,
};

use crate::process::PATIENCE;
use crate::raw_nbd::{OptionReply, option, rep};

/// Somebody who signs certificates.
pub struct Authority(CertifiedIssuer<'static, KeyPair>);

/// What a certificate is for.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Holder {
    /// A server on `localhost`, `127.0.0.1` and `::1`.
    Server,
    /// A client.
    Client,
    /// A client whose certificate is of no use since a day.
    ExpiredClient,
}

impl Authority {
    /// A new one.
    pub fn new(name: &str) -> Self {
        let mut params = CertificateParams::default();
        params.distinguished_name.push(DnType::CommonName, name);
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        let key = KeyPair::generate().expect("a new key");
        Self(CertifiedIssuer::self_signed(params, key).expect("a new authority"))
    }

    /// Its own certificate.
    pub fn pem(&self) -> String {
        self.0.pem()
    }

    /// A certificate for `name`, with its key.
    pub fn sign(&self, holder: Holder, name: &str) -> (String, String) {
        let names = match holder {
            Holder::Server => ["localhost", "127.0.0.1", "::1"]
                .map(str::to_owned)
                .to_vec(),
            _ => Vec::new(),
        };
        let mut params = CertificateParams::new(names).expect("names");
        params.distinguished_name.push(DnType::CommonName, name);
        params.serial_number = Some(SerialNumber::from(serial(name)));
        params.extended_key_usages = vec![match holder {
            Holder::Server => ExtendedKeyUsagePurpose::ServerAuth,
            _ => ExtendedKeyUsagePurpose::ClientAuth,
        }];
        if holder == Holder::ExpiredClient {
            params.not_after = (SystemTime::now() - DAY).into();
        }
        let key = KeyPair::generate().expect("a new key");
        let certificate = params.signed_by(&key, &self.0).expect("a certificate");
        (certificate.pem(), key.serialize_pem())
    }

    /// A list that revokes what was signed for `name`.
    pub fn revoke(&self, name: &str) -> String {
        let now = SystemTime::now();
        let revoked = RevokedCertParams {
            serial_number: SerialNumber::from(serial(name)),
            revocation_time: now.into(),
            reason_code: None,
            invalidity_date: None,
        };
        let list = CertificateRevocationListParams {
            this_update: now.into(),
            next_update: (now + DAY).into(),
            crl_number: SerialNumber::from(1),
            issuing_distribution_point: None,
            revoked_certs: vec![revoked],
            key_identifier_method: KeyIdMethod::Sha256,
        };
        let list = list.signed_by(&self.0).expect("a revocation list");
        list.pem().expect("a list in PEM form")
    }

    /// Fills a directory with what a server, or a client, has there by the names that QEMU, libvirt
    /// and nbdkit gave to these files.
    pub fn outfit(&self, directory: &Path, holder: Holder, name: &str) -> PathBuf {
        let _ = fs::create_dir(directory);
        let file = if holder == Holder::Server {
            "server"
        } else {
            "client"
        };
        let (certificate, key) = self.sign(holder, name);
        for (file, text) in [
            ("ca-cert.pem".to_owned(), self.pem()),
            (format!("{file}-cert.pem"), certificate),
            (format!("{file}-key.pem"), key),
        ] {
            let path = directory.join(file);
            fs::write(&path, text).expect("a file of our own");
            fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).expect("our own");
        }
        directory.to_path_buf()
    }
}

/// Different names have different numbers; the same name has the same.
fn serial(name: &str) -> u64 {
    name.bytes()
        .fold(1, |number, byte| number * 31 % 1_000_003 + u64::from(byte))
}

/// How a client shakes hands, with the files of an outfit.
pub fn client_config(
    directory: &Path,
    version: &'static SupportedProtocolVersion,
) -> Arc<ClientConfig> {
    let mut roots = RootCertStore::empty();
    for certificate in certificates(&directory.join("ca-cert.pem")) {
        roots.add(certificate).expect("an authority");
    }
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let config = ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(&[version])
        .expect("a version that there is")
        .with_root_certificates(roots);
    let key = directory.join("client-key.pem");
    let config = if key.exists() {
        let own = certificates(&directory.join("client-cert.pem"));
        let key = PrivateKeyDer::from_pem_file(key).expect("a key");
        config.with_client_auth_cert(own, key).expect("a pair")
    } else {
        config.with_no_client_auth()
    };
    Arc::new(config)
}

fn certificates(path: &Path) -> Vec<CertificateDer<'static>> {
    CertificateDer::pem_file_iter(path)
        .expect("a file of certificates")
        .collect::<Result<_, _>>()
        .expect("certificates in PEM form")
}

/// Both versions of TLS that the server has.
pub const VERSIONS: [&SupportedProtocolVersion; 2] = [&TLS12, &TLS13];

/// A connection that keeps what came out of it.
#[derive(Debug)]
pub struct Tapped {
    /// The connection.
    pub stream: TcpStream,
    /// What came.
    pub came: Vec<u8>,
}

impl Read for Tapped {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let length = self.stream.read(buffer)?;
        self.came.extend(&buffer[..length]);
        Ok(length)
    }
}

impl Write for Tapped {
    fn write(&mut self, data: &[u8]) -> io::Result<usize> {
        self.stream.write(data)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.stream.flush()
    }
}

/// The types of the TLS records that bytes consist of; nothing else may be among them.
#[track_caller]
pub fn records(mut bytes: &[u8]) -> Vec<u8> {
    let mut types = Vec::new();
    while !bytes.is_empty() {
        assert!(bytes.len() >= 5, "the end is no record: {bytes:?}");
        let length = usize::from(u16::from_be_bytes([bytes[3], bytes[4]]));
        assert!((20..=23).contains(&bytes[0]), "no record: {bytes:?}");
        assert_eq!(bytes[1], 3, "no record: {bytes:?}");
        assert!(bytes.len() >= 5 + length, "a record is cut: {bytes:?}");
        types.push(bytes[0]);
        bytes = &bytes[5 + length..];
    }
    types
}

/// A client in the handshake, in plain text or not.
#[derive(Debug)]
pub struct Wire<S>(pub S);

/// The inside of TLS.
pub type Inside<S> = StreamOwned<ClientConnection, S>;

impl Wire<TcpStream> {
    /// Connects and exchanges the flags of the handshake.
    #[track_caller]
    pub fn connect(port: u16) -> Self {
        let stream = TcpStream::connect(("127.0.0.1", port)).expect("the server listens");
        // A server that does not answer is a failure, not a hang.
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream.set_write_timeout(Some(PATIENCE)).unwrap();
        let mut wire = Self(stream);
        assert_eq!(wire.bytes(18).unwrap(), b"NBDMAGICIHAVEOPT\x00\x03");
        wire.0.write_all(&3u32.to_be_bytes()).unwrap();
        wire
    }
}

impl<S: Read + Write> Wire<S> {
    /// Asks for TLS and begins it.
    #[track_caller]
    pub fn start_tls(mut self, config: &Arc<ClientConfig>) -> Wire<Inside<S>> {
        assert_eq!(self.option(option::STARTTLS, &[]), Ok(Vec::new()));
        self.begin_tls(config)
            .unwrap_or_else(|error| panic!("no TLS: {error}"))
    }

    /// Begins TLS; the server may refuse.
    pub fn begin_tls(mut self, config: &Arc<ClientConfig>) -> io::Result<Wire<Inside<S>>> {
        let name = ServerName::try_from("localhost").expect("a name");
        let mut session = ClientConnection::new(Arc::clone(config), name).expect("a client");
        while session.is_handshaking() {
            session.complete_io(&mut self.0)?;
        }
        Ok(Wire(StreamOwned::new(session, self.0)))
    }

    /// Sends an option.
    pub fn send_option(&mut self, option: u32, data: &[u8]) -> io::Result<()> {
        self.0.write_all(&option_bytes(option, data))?;
        self.0.flush()
    }

    /// Receives a reply to an option.
    pub fn option_reply(&mut self) -> io::Result<OptionReply> {
        assert_eq!(self.number()?, 0x0003_e889, "expected a reply to an option");
        assert_eq!(self.number()?, 0x0455_65a9, "expected a reply to an option");
        let (option, kind, length) = (self.number()?, self.number()?, self.number()?);
        Ok(OptionReply {
            option,
            kind,
            data: self.bytes(length as usize)?,
        })
    }

    /// Sends an option and receives its replies up to the acknowledgement, or the error.
    #[track_caller]
    pub fn option(&mut self, option: u32, data: &[u8]) -> Result<Vec<OptionReply>, u32> {
        self.send_option(option, data)
            .expect("the server reads options");
        let mut replies = Vec::new();
        loop {
            let reply = self.option_reply().expect("a reply to the option");
            assert_eq!(reply.option, option, "a reply to another option");
            match reply.kind {
                rep::ACK => return Ok(replies),
                kind if kind & 1 << 31 != 0 => return Err(kind),
                _ => replies.push(reply),
            }
        }
    }

    /// Opens an export; requests may follow.
    #[track_caller]
    pub fn go(&mut self, name: &str) -> Result<(), u32> {
        self.option(option::GO, &export_named(name)).map(drop)
    }

    /// Sends a request.
    pub fn request(&mut self, command: u16, cookie: u64, offset: u64, length: u32) {
        let mut message = 0x2560_9513_u32.to_be_bytes().to_vec();
        message.extend([0, 0]);
        message.extend(command.to_be_bytes());
        message.extend(cookie.to_be_bytes());
        message.extend(offset.to_be_bytes());
        message.extend(length.to_be_bytes());
        self.0.write_all(&message).expect("the server reads");
        self.0.flush().expect("the server reads");
    }

    /// Receives a simple reply without an error: its cookie, and so many bytes.
    #[track_caller]
    pub fn reply(&mut self, length: usize) -> (u64, Vec<u8>) {
        assert_eq!(self.number().unwrap(), 0x6744_6698, "a simple reply");
        assert_eq!(self.number().unwrap(), 0, "no error");
        let cookie = self.bytes(8).unwrap();
        let cookie = u64::from_be_bytes(cookie.try_into().expect("eight bytes"));
        (cookie, self.bytes(length).unwrap())
    }

    /// Receives so many bytes.
    pub fn bytes(&mut self, length: usize) -> io::Result<Vec<u8>> {
        let mut bytes = vec![0; length];
        self.0.read_exact(&mut bytes)?;
        Ok(bytes)
    }

    /// All that comes until the server hangs up, and how it does: inside TLS, an end that was not
    /// announced is an error.
    pub fn rest(&mut self) -> (Vec<u8>, io::Result<()>) {
        let mut rest = Vec::new();
        let end = self.0.read_to_end(&mut rest).map(drop);
        (rest, end)
    }

    fn number(&mut self) -> io::Result<u32> {
        let bytes = self.bytes(4)?;
        Ok(u32::from_be_bytes(bytes.try_into().expect("four bytes")))
    }
}

/// An option as it is on the wire.
pub fn option_bytes(option: u32, data: &[u8]) -> Vec<u8> {
    let mut message = b"IHAVEOPT".to_vec();
    message.extend(option.to_be_bytes());
    message.extend((data.len() as u32).to_be_bytes());
    message.extend(data);
    message
}

/// The data of GO and INFO: an export, and no wishes.
pub fn export_named(name: &str) -> Vec<u8> {
    let mut data = (name.len() as u32).to_be_bytes().to_vec();
    data.extend(name.as_bytes());
    data.extend([0, 0]);
    data
}

const DAY: Duration = Duration::from_secs(24 * 60 * 60);
