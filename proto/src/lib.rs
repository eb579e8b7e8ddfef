//! The NBD protocol as values, for both ends, without I/O.
//!
//! Bytes go in and bytes come out. [`Negotiation`] takes a client from the greeting to a
//! [`Session`], asking a [`Catalog`] for what exists. Then [`RequestDecoder`] finds the requests,
//! [`Admission`] turns each into a [`Command`] that can only be legal, or into a [`Refusal`], and
//! [`Replies`] writes the answers. The other direction is [`Request::encode`] and
//! [`Reply::decode`]; [`client`] builds on them a client that believes no server.
//!
//! Spoken are the fixed newstyle handshake, the beginning of TLS (which the caller then speaks),
//! structured replies and metadata contexts, as the protocol's reference, `proto.md`, has them; and
//! extended headers, with block status of some contexts only, as its branch `extension-ext-header`
//! has them. [`Headers`] says which form was negotiated. Every other option is declined as
//! unsupported.

pub use admission::{Admission, Command, Refusal};
pub use context_filter::ContextFilter;
pub use errno::Errno;
pub use export::{BlockSize, Catalog, Denied, ExportInfo, Listed, TransmissionFlags};
pub use extents::{
    ContextId, DIRTY, EXTENTS_MAX, Extent, Extents, STATE_HOLE, STATE_ZERO, cover_the_same_length,
};
pub use headers::Headers;
pub use incoming_reply::{CHUNK_MAX, Chunk, Reply};
pub use negotiation::{ANSWERS_MAX, GREETING, Negotiation, OPTIONS_MAX, Session, Step};
pub use option::{OPTION_DATA_MAX, OPTION_SKIPPED_MAX, QUERIES_MAX};
pub use reply::Replies;
pub use request::{
    Cookie, DecodeError, Incoming, Origin, PAYLOAD_MAX, PAYLOAD_SKIPPED_MAX, Request,
    RequestDecoder,
};
pub use string::STRING_MAX;
pub use tls::TlsMode;
pub use violation::Violation;

mod answers;
mod export;
mod negotiation;
mod option;
mod selection;
mod tls;

mod admission;
mod context_filter;
mod extents;
mod incoming_reply;
mod reply;
mod request;

pub mod client;

pub mod command;
mod errno;
mod headers;
mod string;
mod violation;
mod wire;
