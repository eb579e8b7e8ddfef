//! What a client's connection does not survive.

use thiserror::Error;

use crate::extents::ContextId;
use crate::request::Cookie;
use crate::violation::Violation;

/// The server left the protocol; nothing after this point can be believed.
///
/// The connection must end, and every request without an answer has failed.
#[derive(Clone, Debug, Eq, Error, PartialEq)]
pub enum ServerViolation {
    /// What arrived cannot be cut into replies.
    #[error(transparent)]
    Framing(#[from] Violation),

    /// It does not begin like an NBD server.
    #[error("not an NBD server: it begins with {0:#018x}")]
    NotNbd(u64),
    /// It speaks a handshake in which exports have no names.
    #[error(
        "the server speaks the oldstyle handshake only, which names no exports; start it for newstyle"
    )]
    Oldstyle,
    /// Neither of the handshakes.
    #[error("an unknown handshake, {0:#018x}")]
    UnknownHandshake(u64),

    /// The answer to an option did not start with its magic.
    #[error("expected the answer to an option, found {0:#018x}")]
    AnswerMagic(u64),
    /// The answer to an option that was not asked.
    #[error("an answer to option {found} instead of {expected}")]
    AnswerTo {
        /// What was asked.
        expected: u32,
        /// What was answered.
        found: u32,
    },
    /// An answer of a type that the option does not have.
    #[error("an answer of type {kind:#x} to option {option}")]
    AnswerKind {
        /// What was asked.
        option: u32,
        /// The type of the answer.
        kind: u32,
    },
    /// An answer's length does not fit what it contains, or is more than we ever agree to read.
    #[error("an answer of type {kind:#x} with {length} bytes")]
    AnswerLength {
        /// The type of the answer.
        kind: u32,
        /// What its header announced.
        length: u32,
    },
    /// One option has more answers than we ever agree to keep.
    #[error("more than {0} answers to an option")]
    TooManyAnswers(u32),
    /// The answers to one option are longer than we ever agree to keep.
    #[error("more than {0} bytes of answers to an option")]
    TooLongAnswers(u64),
    /// A name in an answer is no string.
    #[error("a name that is not UTF-8, has a NUL or exceeds 4096 bytes")]
    Name,
    /// There was plain text behind the agreement to start TLS, where anybody may have put it.
    #[error("{0} bytes of plain text after the agreement to start TLS")]
    PlaintextAfterStartTls(usize),

    /// The server let us enter without telling what.
    #[error("an export that was not described")]
    NoExport,
    /// Two descriptions of one export that say different things.
    #[error("two descriptions of type {0} that contradict each other")]
    Contradiction(u16),
    /// An export of more bytes than offsets can count.
    #[error("an export of {0} bytes")]
    ExportSize(u64),
    /// Block sizes that the protocol does not allow.
    #[error("block sizes of {minimum}, {preferred} and {maximum} bytes")]
    BlockSize {
        /// The smallest.
        minimum: u32,
        /// The preferred.
        preferred: u32,
        /// The largest payload.
        maximum: u32,
    },
    /// A metadata context was selected that was not asked for.
    #[error("metadata context {0:?}, which was not asked for")]
    ContextNotAsked(String),
    /// A metadata context was selected twice.
    #[error("metadata context {0:?} twice")]
    ContextTwice(String),
    /// Two metadata contexts go by one id.
    #[error("two metadata contexts with id {}", .0.0)]
    ContextIdTwice(ContextId),

    /// A reply to nothing that is under way: never asked, or answered already.
    #[error("a reply to request {:#x}, which is not under way", .0.0)]
    UnknownCookie(Cookie),
    /// A reply of a form that was not agreed on, or that this request must not have.
    #[error("a {0} reply where it is not allowed")]
    ReplyForm(&'static str),
    /// An extended reply that is about another offset than its request.
    #[error("a reply about offset {found} to a request about offset {expected}")]
    RequestOffset {
        /// The request's.
        expected: u64,
        /// The reply's.
        found: u64,
    },
    /// A chunk that the request cannot have for an answer.
    #[error("a reply chunk of type {kind} to command {command}")]
    ChunkKind {
        /// The chunk's type.
        kind: u16,
        /// The number of the command.
        command: u16,
    },
    /// The chunk that says that nothing follows, and then something was to follow.
    #[error("an empty reply chunk that is not the last")]
    EmptyChunk,
    /// A reply in more pieces than can mean anything.
    #[error("more reply chunks than a request can need")]
    TooManyChunks,
    /// A piece of a reply that is about what was not asked for.
    #[error("{length} bytes at {offset}, outside of the request")]
    OutsideRequest {
        /// Where it starts.
        offset: u64,
        /// How long it is.
        length: u64,
    },
    /// Two pieces of one read that overlap.
    #[error("{length} bytes at {offset} that overlap what was sent before")]
    Overlap {
        /// Where the second starts.
        offset: u64,
        /// How long the second is.
        length: u64,
    },
    /// A read that was to come in one piece came in several.
    #[error("several pieces of a read that was to be one")]
    Fragmented,
    /// A read that is said to have succeeded, but of which bytes are missing.
    #[error("{0} bytes of a read are missing")]
    MissingData(u64),
    /// A block status for a context that was not selected.
    #[error("a block status for context {}, which was not selected", .0.0)]
    ContextNotSelected(ContextId),
    /// A second block status for a context in one reply.
    #[error("two block states for context {}", .0.0)]
    StatusTwice(ContextId),
    /// No block status for a context, in a reply that is said to have succeeded.
    #[error("no block status for context {}", .0.0)]
    StatusMissing(ContextId),
    /// Extents go on where the request has ended, or there are several where one was asked for.
    #[error("extents beyond the {0} bytes that were asked about")]
    ExtentsBeyond(u64),
    /// An extent is no multiple of the block size that the server requires of others.
    #[error("an extent of {0} bytes, which is no multiple of the block size")]
    ExtentUnaligned(u64),
    /// A block status of more extents than we ever agree to keep.
    #[error("more than {0} extents in a block status")]
    TooManyExtents(usize),
}
