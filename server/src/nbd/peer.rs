//! Who is at the other end of a connection.

use std::fmt;
use std::net::{IpAddr, SocketAddr};

/// Who a client is, as far as the system tells.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Peer {
    /// A process, over a Unix socket.
    Process {
        /// Whose it was when it connected.
        uid: u32,
        /// Which, if it is in a namespace that we see.
        pid: Option<i32>,
    },
    /// Someone over TCP.
    Address(SocketAddr),
    /// The system does not tell.
    Unknown,
}

/// Those who share the places of one peer.
#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub(crate) enum Origin {
    User(u32),
    Address(IpAddr),
    /// The first half of an IPv6 address: whoever has one has all that begin with it.
    Network(u64),
    Unknown,
}

impl Peer {
    /// Whom its connection counts against.
    pub(crate) fn origin(&self) -> Origin {
        match self {
            Self::Process { uid, .. } => Origin::User(*uid),
            Self::Address(address) => match address.ip().to_canonical() {
                IpAddr::V6(ip) if !ip.is_loopback() => Origin::Network((ip.to_bits() >> 64) as u64),
                ip => Origin::Address(ip),
            },
            Self::Unknown => Origin::Unknown,
        }
    }
}

impl fmt::Display for Peer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Process {
                uid,
                pid: Some(pid),
            } => write!(f, "uid {uid}, pid {pid}"),
            Self::Process { uid, pid: None } => write!(f, "uid {uid}"),
            Self::Address(address) => address.fmt(f),
            Self::Unknown => f.write_str("unknown"),
        }
    }
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::User(uid) => write!(f, "uid {uid}"),
            Self::Address(ip) => ip.fmt(f),
            Self::Network(half) => {
                let parts = [48, 32, 16, 0].map(|shift| (half >> shift) as u16);
                write!(
                    f,
                    "{:x}:{:x}:{:x}:{:x}::/64",
                    parts[0], parts[1], parts[2], parts[3]
                )
            }
            Self::Unknown => f.write_str("unknown"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn origin(address: &str) -> String {
        Peer::Address(address.parse().unwrap()).origin().to_string()
    }

    #[test]
    fn an_address_is_what_one_host_cannot_change_at_will() {
        assert_eq!(origin("10.0.0.1:5"), origin("10.0.0.1:6"));
        assert_ne!(origin("10.0.0.1:5"), origin("10.0.0.2:5"));
        assert_eq!(origin("[::ffff:10.0.0.1]:5"), "10.0.0.1");
        assert_eq!(origin("[2001:db8::1]:5"), origin("[2001:db8::2:3]:5"));
        assert_eq!(origin("[2001:db8::1]:5"), "2001:db8:0:0::/64");
        assert_eq!(origin("[::1]:5"), "::1");
    }
}
