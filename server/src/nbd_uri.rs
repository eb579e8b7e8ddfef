//! Where an NBD export is, as the URIs of libnbd, QEMU and nbdkit say it.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

use percent_encoding::percent_decode_str;
use thiserror::Error;

use crate::address::{Address, DEFAULT_PORT, split_port};

/// `nbd://HOST[:PORT]/EXPORT`, `nbd+unix:///EXPORT?socket=PATH`, and both with `nbds` for TLS.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(crate) struct NbdUri {
    /// What to connect to.
    pub(crate) address: Address,
    /// Whether to insist on TLS.
    pub(crate) with_tls: bool,
    /// A directory with what TLS takes, as libnbd has it.
    pub(crate) tls_creds: Option<PathBuf>,
    /// Whom the server's certificate is to name.
    pub(crate) server_name: String,
    /// What to enter there; the empty name is the default export.
    pub(crate) export: String,
    /// As it was given.
    text: String,
}

/// A text that is no such URI.
#[derive(Clone, Debug, Eq, Error, PartialEq)]
#[error("'{text}' {rule}")]
pub(crate) struct NbdUriError {
    text: String,
    rule: String,
}

impl FromStr for NbdUri {
    type Err = NbdUriError;

    fn from_str(text: &str) -> Result<Self, NbdUriError> {
        parse(text).map_err(|rule| NbdUriError {
            text: text.to_owned(),
            rule,
        })
    }
}

impl fmt::Display for NbdUri {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

fn parse(text: &str) -> Result<NbdUri, String> {
    let (scheme, rest) = text.split_once("://").ok_or(NOT_NBD)?;
    let (with_tls, is_unix) = match scheme {
        "nbd" => (false, false),
        "nbds" => (true, false),
        "nbd+unix" => (false, true),
        "nbds+unix" => (true, true),
        _ => return Err(NOT_NBD.to_owned()),
    };
    let (place, query) = rest.split_once('?').unwrap_or((rest, ""));
    let (authority, export) = place.split_once('/').unwrap_or((place, ""));
    if authority.contains('@') {
        return Err("names a user, which NBD does not know".to_owned());
    }
    let export = decode(export)?;

    let (mut socket, mut tls_name, mut tls_creds) = (None, None, None);
    for parameter in query.split('&').filter(|parameter| !parameter.is_empty()) {
        let (name, value) = parameter.split_once('=').unwrap_or((parameter, ""));
        match name {
            "socket" => socket = Some(decode(value)?),
            "tls-hostname" => tls_name = Some(decode(value)?),
            "tls-certificates" => tls_creds = Some(decode(value)?.into()),
            _ => return Err(format!("has a parameter '{name}', which is not known here")),
        }
    }
    let (host, port) = split_port(authority).map_err(str::to_owned)?;
    let address = match (is_unix, socket) {
        (true, Some(path)) if !path.is_empty() => Address::Unix(path.into()),
        (true, _) => return Err("names no socket, as in ?socket=/run/nbd.sock".to_owned()),
        (false, Some(_)) => return Err("names a socket, which takes nbd+unix://".to_owned()),
        (false, None) if host.is_empty() => return Err("names no host".to_owned()),
        (false, None) => Address::Tcp {
            host: host.to_owned(),
            port: match port {
                None => DEFAULT_PORT,
                Some(port) => port.parse().ok().filter(|port| *port > 0).ok_or(NO_PORT)?,
            },
        },
    };
    // Whoever shares a socket's machine is known by that machine's own name.
    let otherwise = if host.is_empty() { "localhost" } else { host };
    Ok(NbdUri {
        address,
        with_tls,
        tls_creds,
        server_name: tls_name.unwrap_or_else(|| otherwise.to_owned()),
        export,
        text: text.to_owned(),
    })
}

fn decode(text: &str) -> Result<String, String> {
    let decoded = percent_decode_str(text).decode_utf8();
    Ok(decoded.map_err(|_| "is not UTF-8")?.into_owned())
}

const NOT_NBD: &str = "is not nbd://, nbds://, nbd+unix:// or nbds+unix://";
const NO_PORT: &str = "has a port that is not a number from 1 to 65535";

#[cfg(test)]
mod tests {
    use super::*;

    fn tcp(host: &str, port: u16) -> Address {
        Address::Tcp {
            host: host.to_owned(),
            port,
        }
    }

    #[test]
    fn uris_are_read_as_libnbd_reads_them() {
        for (text, address, with_tls, export) in [
            ("nbd://localhost", tcp("localhost", 10809), false, ""),
            ("nbd://[::1]:5/vda%40b1", tcp("::1", 5), false, "vda@b1"),
            ("nbds://10.0.0.1:7/a/b", tcp("10.0.0.1", 7), true, "a/b"),
            (
                "nbd+unix:///vda@cp1..b1?socket=/run/still%20point/50%25%2B.sock",
                Address::Unix("/run/still point/50%+.sock".into()),
                false,
                "vda@cp1..b1",
            ),
            (
                "nbds+unix:///?socket=s",
                Address::Unix("s".into()),
                true,
                "",
            ),
        ] {
            let uri: NbdUri = text.parse().unwrap();
            assert_eq!(
                (uri.address, uri.with_tls, uri.export.as_str()),
                (address, with_tls, export),
                "{text}"
            );
        }
        let uri: NbdUri = "nbds+unix:///x?socket=/s&tls-hostname=disks"
            .parse()
            .unwrap();
        assert_eq!(uri.server_name, "disks");
        let uri: NbdUri = "nbds://h/x?tls-certificates=/etc/a%20b".parse().unwrap();
        assert_eq!(uri.tls_creds, Some("/etc/a b".into()));
        let uri: NbdUri = "nbds://example:7".parse().unwrap();
        assert_eq!(uri.server_name, "example");
        let uri: NbdUri = "nbds+unix:///x?socket=/s".parse().unwrap();
        assert_eq!(uri.server_name, "localhost");
    }

    #[test]
    fn what_we_write_is_what_we_read() {
        for (address, export) in [
            (Address::Unix("/run/still point/50%&#?+.sock".into()), "a?b"),
            (tcp("::1", 5), "vda@cp1..b1"),
        ] {
            for with_tls in [false, true] {
                let uri: NbdUri = address.uri(export, with_tls).parse().unwrap();
                assert_eq!((&uri.address, uri.with_tls), (&address, with_tls));
                assert_eq!(uri.export, export);
            }
        }
    }

    #[test]
    fn what_leads_nowhere_is_refused() {
        for text in [
            "",
            "vda",
            "http://host/",
            "nbd+ssh://host/",
            "nbd:///vda",
            "nbd+unix:///vda",
            "nbd+unix:///vda?socket=",
            "nbd://host/?socket=/s",
            "nbd://user@host/",
            "nbd://host:0/",
            "nbd://host:65536/",
            "nbd://::1/",
            "nbd://host/%ff",
            "nbd://host/?tls-verify=no",
        ] {
            assert!(text.parse::<NbdUri>().is_err(), "{text:?}");
        }
    }
}
