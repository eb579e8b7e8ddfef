//! A client talks to servers, of which most lie.
//!
//! What servers send is written out by hand, from `proto.md` and not from the crate; except where
//! both ends of the crate talk to each other.

use stillpoint_proto as proto;

mod both_ends;
mod extended;
mod handshake;
mod information;
mod reads;
mod replies;
mod states;
mod vulnerabilities;

#[cfg(feature = "client")]
mod connection;

mod entered;
mod wire;
