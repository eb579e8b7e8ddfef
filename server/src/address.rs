//! Where a socket is: in the file system or on a network.

use std::fmt;
use std::fmt::Write;
use std::net::{IpAddr, Ipv6Addr};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use thiserror::Error;

/// A place to listen at: `unix:PATH` or `tcp:HOST:PORT`.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(crate) enum Address {
    /// A Unix socket.
    Unix(PathBuf),
    /// A TCP port.
    Tcp {
        /// A name or a number; an IPv6 number without its brackets.
        host: String,
        /// The port; 0 stands for any.
        port: u16,
    },
}

/// A text that is no address.
#[derive(Clone, Debug, Eq, Error, PartialEq)]
#[error("'{text}' {rule}")]
pub(crate) struct AddressError {
    text: String,
    rule: &'static str,
}

impl Address {
    /// Whether only this machine can connect.
    pub(crate) fn is_loopback(&self) -> bool {
        match self {
            Self::Unix(_) => true,
            Self::Tcp { host, .. } => match host.parse::<IpAddr>() {
                Ok(number) => number.to_canonical().is_loopback(),
                Err(_) => host.eq_ignore_ascii_case("localhost"),
            },
        }
    }

    /// What an NBD client is told to connect to, for `export` here; with TLS if it is told so.
    pub(crate) fn uri(&self, export: &str, with_tls: bool) -> String {
        let export = percent_encoded(export.as_bytes());
        let nbd = if with_tls { "nbds" } else { "nbd" };
        match self {
            Self::Unix(path) => {
                let path = percent_encoded(path.as_os_str().as_bytes());
                format!("{nbd}+unix:///{export}?socket={path}")
            }
            Self::Tcp { host, port } => format!("{nbd}://{}:{port}/{export}", Host(host)),
        }
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unix(path) => write!(f, "unix:{}", path.display()),
            Self::Tcp { host, port } => write!(f, "tcp:{}:{port}", Host(host)),
        }
    }
}

impl FromStr for Address {
    type Err = AddressError;

    fn from_str(text: &str) -> Result<Self, AddressError> {
        let wrong = |rule| AddressError {
            text: text.to_owned(),
            rule,
        };
        if let Some(path) = text.strip_prefix("unix:") {
            if path.is_empty() {
                return Err(wrong("names no path"));
            }
            return Ok(Self::Unix(Path::new(path).to_owned()));
        }
        let Some(place) = text.strip_prefix("tcp:") else {
            return Err(wrong("is neither unix:PATH nor tcp:HOST:PORT"));
        };
        let (host, port) = split_port(place).map_err(wrong)?;
        if host.is_empty() {
            return Err(wrong("names no host"));
        }
        let port = match port {
            None => DEFAULT_PORT,
            Some(port) => port
                .parse()
                .map_err(|_| wrong("has a port that is not a number from 0 to 65535"))?,
        };
        Ok(Self::Tcp {
            host: host.to_owned(),
            port,
        })
    }
}

/// A host, without the brackets of an IPv6 number, and what stands for its port.
pub(crate) fn split_port(place: &str) -> Result<(&str, Option<&str>), &'static str> {
    if let Some(rest) = place.strip_prefix('[') {
        let (host, rest) = rest.split_once(']').ok_or("lacks a closing bracket")?;
        if host.parse::<Ipv6Addr>().is_err() {
            return Err("has no IPv6 address in its brackets");
        }
        return match rest.strip_prefix(':') {
            None if !rest.is_empty() => Err("goes on after its bracket"),
            port => Ok((host, port)),
        };
    }
    let (host, port) = match place.split_once(':') {
        Some((host, port)) => (host, Some(port)),
        None => (place, None),
    };
    if port.is_some_and(|port| port.contains(':')) {
        return Err("has an IPv6 address without brackets, as in tcp:[::1]:10809");
    }
    Ok((host, port))
}

/// A host as it stands before a port.
struct Host<'a>(&'a str);

impl fmt::Display for Host<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.0.contains(':') {
            write!(f, "[{}]", self.0)
        } else {
            f.write_str(self.0)
        }
    }
}

/// Encodes what could end a path or a query value, or be lost on the way through a shell.
fn percent_encoded(bytes: &[u8]) -> String {
    let mut text = String::with_capacity(bytes.len());
    for &byte in bytes {
        if byte.is_ascii_alphanumeric() || b"-._~/@:".contains(&byte) {
            text.push(char::from(byte));
        } else {
            write!(text, "%{byte:02X}").expect("a string takes everything");
        }
    }
    text
}

/// What IANA gave to NBD.
pub(crate) const DEFAULT_PORT: u16 = 10809;

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
    fn an_address_is_read_as_it_is_written() {
        for (text, expected) in [
            ("unix:/run/a b.sock", Address::Unix("/run/a b.sock".into())),
            ("tcp:localhost:0", tcp("localhost", 0)),
            ("tcp:[::1]:1234", tcp("::1", 1234)),
        ] {
            let address: Address = text.parse().unwrap();
            assert_eq!(address, expected);
            assert_eq!(address.to_string(), text);
        }
        assert_eq!("tcp:10.0.0.1".parse(), Ok(tcp("10.0.0.1", 10809)));
        assert_eq!("tcp:[::1]".parse(), Ok(tcp("::1", 10809)));
    }

    #[test]
    fn what_is_no_address_is_refused() {
        for text in [
            "",
            "/run/x",
            "unix:",
            "tcp:",
            "tcp::1",
            "tcp:::1",
            "tcp:::1:10809",
            "tcp:[::1",
            "tcp:[::1]x",
            "tcp:[a]:1",
            "tcp:a:65536",
            "tcp:a:",
            "tcp:a:-1",
            "udp:a:1",
        ] {
            assert!(text.parse::<Address>().is_err(), "{text:?}");
        }
    }

    #[test]
    fn only_what_stays_on_the_machine_is_loopback() {
        for text in [
            "unix:/x",
            "tcp:127.0.0.1",
            "tcp:127.9.9.9:1",
            "tcp:[::1]",
            "tcp:localhost",
        ] {
            assert!(text.parse::<Address>().unwrap().is_loopback(), "{text}");
        }
        for text in [
            "tcp:0.0.0.0",
            "tcp:[::]",
            "tcp:10.0.0.1",
            "tcp:localhost.example",
            "tcp:h",
        ] {
            assert!(!text.parse::<Address>().unwrap().is_loopback(), "{text}");
        }
    }

    #[test]
    fn uris_stay_readable_and_survive_odd_paths() {
        let socket = Address::Unix("/run/still point/50%&#?+.sock".into());
        assert_eq!(
            socket.uri("vda@cp1..b1", false),
            "nbd+unix:///vda@cp1..b1?socket=/run/still%20point/50%25%26%23%3F%2B.sock"
        );
        assert_eq!(tcp("::1", 5).uri("vda", false), "nbd://[::1]:5/vda");
        assert_eq!(tcp("host", 10809).uri("", true), "nbds://host:10809/");
        let socket = Address::Unix("/s".into());
        assert_eq!(socket.uri("a", true), "nbds+unix:///a?socket=/s");
    }
}
