//! What the head of a reply announces, looked at before its payload is waited for.

use bytes::Buf;

use crate::request::Cookie;
use crate::wire::{CHUNK_MAGIC, chunk};

/// A chunk of which the header has arrived.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Announced {
    pub(crate) cookie: Cookie,
    pub(crate) done: bool,
    pub(crate) kind: u16,
    /// Of the payload.
    pub(crate) length: u64,
}

impl Announced {
    /// Of all of it.
    pub(crate) fn size(self) -> usize {
        CHUNK_HEADER_SIZE + self.length as usize
    }
}

/// What the next chunk in `input` announces; `None` if that is not known yet, or no chunk.
pub(crate) fn announced(input: &[u8]) -> Option<Announced> {
    let mut header = input.get(..CHUNK_HEADER_SIZE)?;
    if header.get_u32() != CHUNK_MAGIC {
        return None;
    }
    let flags = header.get_u16();
    Some(Announced {
        kind: header.get_u16(),
        cookie: Cookie(header.get_u64()),
        length: u64::from(header.get_u32()),
        done: flags & chunk::DONE != 0,
    })
}

/// Magic, flags, type, cookie and length.
const CHUNK_HEADER_SIZE: usize = 20;
