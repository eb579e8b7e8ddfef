//! What a server replied in transmission, from bytes to values.

use bytes::{Buf, Bytes, BytesMut};

use crate::errno::Errno;
use crate::extents::{ContextId, Extent};
use crate::headers::Headers;
use crate::request::{Cookie, PAYLOAD_MAX};
use crate::string;
use crate::violation::Violation;
use crate::wire::{CHUNK_MAGIC, EXTENDED_CHUNK_MAGIC, SIMPLE_REPLY_MAGIC, chunk};

/// The longest chunk that a client agrees to read: the longest payload with its offset. It holds
/// four times the 2^20 extents that `proto.md` advises as the most.
pub const CHUNK_MAX: u64 = PAYLOAD_MAX + 8;

/// A reply, or a piece of one.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum Reply {
    /// All of a reply, but for the data of a read that succeeded. That follows in the stream, and
    /// only who knows the request knows how much.
    Simple {
        /// Which request it answers.
        cookie: Cookie,
        /// Whether it succeeded.
        result: Result<(), Errno>,
    },
    /// A piece of a reply in chunks.
    Chunk {
        /// Which request it answers.
        cookie: Cookie,
        /// Where the range of that request starts, which only an extended chunk repeats; whether it
        /// is so, only who knows the request can tell.
        request_offset: Option<u64>,
        /// Whether it is the last piece.
        done: bool,
        /// What it says.
        chunk: Chunk,
    },
}

/// What a piece of a reply says.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum Chunk {
    /// Nothing more.
    None,
    /// What was read.
    Data {
        /// Where.
        offset: u64,
        /// Never empty.
        data: Bytes,
    },
    /// That what was read is zero.
    Hole {
        /// Where.
        offset: u64,
        /// Never zero.
        length: u64,
    },
    /// What a context says about the range, from its start.
    BlockStatus {
        /// Which context.
        context: ContextId,
        /// Never empty, nor is any of them.
        extents: Vec<Extent>,
    },
    /// That something failed.
    Error {
        /// How.
        errno: Errno,
        /// In words for people.
        text: String,
        /// Where, if that is known.
        offset: Option<u64>,
    },
}

impl Reply {
    /// Takes the next reply or chunk off the front of `input`, or `None` until all of it has
    /// arrived. Only what was negotiated is accepted.
    pub fn decode(headers: Headers, input: &mut BytesMut) -> Result<Option<Self>, Violation> {
        use Headers::{Extended, Simple, Structured};
        let mut header = &input[..];
        let Ok(magic) = header.try_get_u32() else {
            return Ok(None);
        };
        match (magic, headers) {
            (SIMPLE_REPLY_MAGIC, Simple | Structured) => Ok(decode_simple(input)),
            (CHUNK_MAGIC, Structured) | (EXTENDED_CHUNK_MAGIC, Extended) => {
                decode_chunk(headers, input)
            }
            (other, _) => Err(Violation::ReplyMagic(other)),
        }
    }
}

fn decode_simple(input: &mut BytesMut) -> Option<Reply> {
    if input.len() < SIMPLE_SIZE {
        return None;
    }
    let mut reply = input.split_to(SIMPLE_SIZE);
    reply.advance(size_of::<u32>());
    let error = reply.get_u32();
    let cookie = Cookie(reply.get_u64());
    let result = if error == 0 {
        Ok(())
    } else {
        Err(Errno::from_wire(error))
    };
    Some(Reply::Simple { cookie, result })
}

fn decode_chunk(headers: Headers, input: &mut BytesMut) -> Result<Option<Reply>, Violation> {
    let extended = headers == Headers::Extended;
    let header_size = if extended {
        EXTENDED_CHUNK_HEADER_SIZE
    } else {
        CHUNK_HEADER_SIZE
    };
    if input.len() < header_size {
        return Ok(None);
    }
    let mut header = &input[size_of::<u32>()..header_size];
    let flags = header.get_u16();
    let kind = header.get_u16();
    let cookie = Cookie(header.get_u64());
    let (request_offset, length) = if extended {
        (Some(header.get_u64()), header.get_u64())
    } else {
        (None, u64::from(header.get_u32()))
    };

    if length > CHUNK_MAX {
        return Err(Violation::ChunkLength { kind, length });
    }
    let size = header_size + length as usize;
    if input.len() < size {
        input.reserve(size - input.len());
        return Ok(None);
    }
    let mut payload = input.split_to(size).freeze();
    payload.advance(header_size);

    let chunk = match kind {
        chunk::NONE => payload.is_empty().then_some(Chunk::None),
        chunk::OFFSET_DATA => data(payload),
        chunk::OFFSET_HOLE => hole(payload),
        chunk::BLOCK_STATUS if !extended => block_status(payload),
        chunk::BLOCK_STATUS_EXTENDED if extended => block_status_extended(payload),
        kind if kind & chunk::ERROR_BIT != 0 => error(kind, payload),
        kind => return Err(Violation::ChunkType(kind)),
    };
    let chunk = chunk.ok_or(Violation::ChunkLength { kind, length })?;
    Ok(Some(Reply::Chunk {
        cookie,
        request_offset,
        done: flags & chunk::DONE != 0,
        chunk,
    }))
}

fn data(mut payload: Bytes) -> Option<Chunk> {
    let offset = payload.try_get_u64().ok()?;
    (!payload.is_empty()).then_some(Chunk::Data {
        offset,
        data: payload,
    })
}

fn hole(mut payload: Bytes) -> Option<Chunk> {
    let offset = payload.try_get_u64().ok()?;
    let length = u64::from(payload.try_get_u32().ok()?);
    (length > 0 && payload.is_empty()).then_some(Chunk::Hole { offset, length })
}

fn block_status(mut payload: Bytes) -> Option<Chunk> {
    let context = ContextId(payload.try_get_u32().ok()?);
    let mut extents = Vec::with_capacity(payload.len() / 8);
    while payload.has_remaining() {
        let length = u64::from(payload.try_get_u32().ok()?);
        let flags = u64::from(payload.try_get_u32().ok()?);
        extents.push(Extent { length, flags });
    }
    block_status_of(context, extents)
}

fn block_status_extended(mut payload: Bytes) -> Option<Chunk> {
    let context = ContextId(payload.try_get_u32().ok()?);
    let count = payload.try_get_u32().ok()?;
    // Before anything is reserved for what it claims.
    if payload.len() as u64 != 16 * u64::from(count) {
        return None;
    }
    let mut extents = Vec::with_capacity(count as usize);
    while payload.has_remaining() {
        let length = payload.try_get_u64().ok()?;
        let flags = payload.try_get_u64().ok()?;
        extents.push(Extent { length, flags });
    }
    block_status_of(context, extents)
}

fn block_status_of(context: ContextId, extents: Vec<Extent>) -> Option<Chunk> {
    let sound = !extents.is_empty() && extents.iter().all(|extent| extent.length > 0);
    sound.then_some(Chunk::BlockStatus { context, extents })
}

fn error(kind: u16, mut payload: Bytes) -> Option<Chunk> {
    let errno = Errno::from_wire(payload.try_get_u32().ok()?);
    let length = usize::from(payload.try_get_u16().ok()?);
    if length > payload.len() {
        return None;
    }
    // A text that is no string is no reason to lose the error.
    let text = string::parse(&payload.split_to(length))
        .unwrap_or_default()
        .to_owned();
    let offset = match kind {
        chunk::ERROR_OFFSET => Some(payload.try_get_u64().ok()?),
        _ => None,
    };
    Some(Chunk::Error {
        errno,
        text,
        offset,
    })
}

/// Magic, error and cookie.
const SIMPLE_SIZE: usize = 16;
/// Magic, flags, type, cookie and a length of 32 bits.
const CHUNK_HEADER_SIZE: usize = 20;
/// Magic, flags, type, cookie, the request's offset and a length of 64 bits.
const EXTENDED_CHUNK_HEADER_SIZE: usize = 32;
