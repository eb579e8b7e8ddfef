//! The NBD protocol as values, for both ends, without I/O.
//!
//! Bytes go in and bytes come out. [`RequestDecoder`] finds the requests, [`Admission`] turns each
//! into a [`Command`] that can only be legal, or into a [`Refusal`], and [`Replies`] writes the
//! answers. The other direction is [`Request::encode`] and [`Reply::decode`].

pub use admission::{Admission, Command, Refusal};
pub use errno::Errno;
pub use export::{BlockSize, Catalog, Denied, ExportInfo, Listed, TransmissionFlags};
pub use extents::{
    ContextId, DIRTY, EXTENTS_MAX, Extent, Extents, STATE_HOLE, STATE_ZERO, cover_the_same_length,
};
pub use incoming_reply::{CHUNK_MAX, Chunk, Reply};
pub use reply::Replies;
pub use request::{
    Cookie, DecodeError, Incoming, PAYLOAD_MAX, PAYLOAD_SKIPPED_MAX, Request, RequestDecoder,
};
pub use string::STRING_MAX;
pub use violation::Violation;

mod export;

mod admission;
mod extents;
mod incoming_reply;
mod reply;
mod request;

pub mod command;
mod errno;
mod string;
mod violation;
mod wire;
