//! What the head of a chunk announces, looked at before its payload is waited for.

use bytes::Buf;

use crate::headers::Headers;
use crate::request::Cookie;
use crate::wire::{CHUNK_MAGIC, EXTENDED_CHUNK_MAGIC, chunk};

/// A chunk of which the header has arrived.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Announced {
    pub(crate) cookie: Cookie,
    pub(crate) done: bool,
    pub(crate) kind: u16,
    /// Of the payload.
    pub(crate) length: u64,
    header_size: usize,
}

impl Announced {
    /// Of all of it.
    pub(crate) fn size(self) -> usize {
        self.header_size.saturating_add(self.length as usize)
    }
}

/// What the next chunk in `input` announces; `None` if that is not known yet, or it is none of the
/// form that was agreed on.
pub(crate) fn announced(headers: Headers, input: &[u8]) -> Option<Announced> {
    let (magic, header_size) = match headers {
        Headers::Simple => return None,
        Headers::Structured => (CHUNK_MAGIC, HEADER_SIZE),
        Headers::Extended => (EXTENDED_CHUNK_MAGIC, EXTENDED_HEADER_SIZE),
    };
    let mut header = input.get(..header_size)?;
    if header.get_u32() != magic {
        return None;
    }
    let flags = header.get_u16();
    let kind = header.get_u16();
    let cookie = Cookie(header.get_u64());
    let length = if headers == Headers::Extended {
        header.advance(size_of::<u64>());
        header.get_u64()
    } else {
        u64::from(header.get_u32())
    };
    Some(Announced {
        cookie,
        done: flags & chunk::DONE != 0,
        kind,
        length,
        header_size,
    })
}

/// Magic, flags, type, cookie and length.
const HEADER_SIZE: usize = 20;
/// The same with the request's offset and a longer length.
const EXTENDED_HEADER_SIZE: usize = 32;
