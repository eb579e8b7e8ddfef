//! A client talks to a server about what it wants, byte by byte where that matters.
//!
//! The client's side is written out by hand, from `proto.md` and not from the crate.

use stillpoint_proto as proto;

mod bytes_as_they_come;
mod contexts;
mod exports;
mod extended_headers;
mod tls;

mod talk;
mod wire;
