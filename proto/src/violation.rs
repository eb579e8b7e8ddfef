//! What no connection survives.

use thiserror::Error;

/// The peer left the protocol; nothing after this point can be believed.
///
/// The connection must end. There is no reply to send: whatever the peer would make of one is as
/// uncertain as what it meant.
#[derive(Clone, Copy, Debug, Eq, Error, PartialEq)]
#[non_exhaustive]
pub enum Violation {
    /// The client set handshake flags that we did not offer.
    #[error("handshake flags {0:#x} that were not offered")]
    ClientFlags(u32),
    /// An option did not start with the option magic.
    #[error("expected an option, found {0:#018x}")]
    OptionMagic(u64),
    /// A client that did not agree to fixed newstyle used an option that needs it.
    #[error("option {0} without fixed newstyle")]
    NotFixedNewstyle(u32),
    /// An option announced more data than we ever agree to read. That much can be told, as the data
    /// have yet to come.
    #[error("option {option} with {length} bytes of data")]
    OptionLength {
        /// The option's number.
        option: u32,
        /// What its header announced.
        length: u32,
    },
    /// The client goes on asking and never comes to the point.
    #[error("more than {0} options")]
    TooManyOptions(u32),
    /// The name given with the one option that has no error reply cannot be a name.
    #[error("an export name that is no string")]
    ExportName,
    /// The client went on in plain text behind its request for TLS, or somebody did in its name.
    #[error("{0} bytes of plain text where TLS begins")]
    PlainText(usize),
    /// A request did not start with the magic of the form that was negotiated.
    #[error("expected a request, found {0:#010x}")]
    RequestMagic(u32),
    /// A request announced more payload than we ever agree to read.
    #[error("a payload of {0} bytes")]
    PayloadLength(u64),
    /// A reply did not start with a magic of the form that was negotiated.
    #[error("expected a reply, found {0:#010x}")]
    ReplyMagic(u32),
    /// A chunk is of a type that is no error, and unknown in the form that was negotiated.
    #[error("a reply chunk of unknown type {0}")]
    ChunkType(u16),
    /// A chunk's length does not fit what it contains, or is more than we ever agree to read.
    #[error("a reply chunk of type {kind} with {length} bytes")]
    ChunkLength {
        /// The chunk's type.
        kind: u16,
        /// What its header announced.
        length: u64,
    },
}
