//! The client's end: from a server's greeting to answers that can be believed.
//!
//! As on the server's side, bytes go in and bytes come out. [`Handshake`] asks one [`Question`]
//! after the other, until a server lets it enter an export; the [`Session`] that this yields turns
//! [`Command`](crate::Command)s into requests and replies into [`Completion`]s.
//!
//! The server is not trusted. Whatever it sends is either what the protocol allows as an answer to
//! what was asked, or a [`ServerViolation`], after which nothing on the connection can be believed.
//! What is kept in memory is bounded by what was asked for, never by what a server announces; and
//! no byte of a read is returned that the server did not send, as data or as a hole.
//!
//! # A client that does I/O
//!
//! With the feature `client` there is one on top: `Haggling` finds an export on any stream that can
//! be read and written, with or without TLS, and `Client` is that export, for many requests at once.
//! It reads no clock and starts no task: timeouts and tasks are the caller's.
#![cfg_attr(feature = "client", doc = include_str!("example.md"))]

pub use answer::{ANSWER_DATA_MAX, ANSWERS_LENGTH_MAX, ANSWERS_MAX, Declined, Reason};
pub use assembly::{FRAGMENT_MIN, FRAGMENTS_FREE, Piece, into_bytes};
pub use dialogue::{Answer, Question, Unaskable};
pub use handshake::Handshake;
pub use session::{Completion, ERROR_CHUNK_MAX, Failure, Outcome, Session, Submitted};
pub use status::{BlockStatus, EXTENTS_ACCEPTED_MAX};
pub use violation::ServerViolation;

mod handshake;

mod dialogue;
mod gathering;

mod answer;
mod description;
mod question;

mod session;

mod assembly;
mod header;
mod pending;
mod status;

mod violation;

#[cfg(feature = "client")]
mod connection;
#[cfg(feature = "client")]
pub use connection::{
    AfterTls, BYTES_MAX, Client, Connection, Durability, Error, Haggling, Map, REQUESTS_MAX,
    Zeroing,
};
