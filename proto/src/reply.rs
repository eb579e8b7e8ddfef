//! What the server replies in transmission, from values to bytes.

use bytes::{BufMut, BytesMut};

use crate::errno::Errno;
use crate::extents::{ContextId, Extent, Extents, cover_the_same_length};
use crate::headers::Headers;
use crate::request::Origin;
use crate::string::clip;
use crate::wire::{CHUNK_MAGIC, EXTENDED_CHUNK_MAGIC, SIMPLE_REPLY_MAGIC, chunk};

/// Writes replies in the form that was negotiated.
///
/// A session with structured replies gets nothing else, though it might, so that every error comes
/// with a text; one with extended headers must get nothing else.
#[derive(Clone, Copy, Debug)]
pub struct Replies {
    headers: Headers,
}

impl Replies {
    /// Replies of that form.
    pub fn new(headers: Headers) -> Self {
        Self { headers }
    }

    /// Whether a read may be answered in several pieces. If not, one call of
    /// [`begin_data`](Self::begin_data) or [`hole`](Self::hole) answers all of it.
    pub fn may_fragment(self) -> bool {
        self.headers.has_chunks()
    }

    /// Says that it is done; ends the reply.
    pub fn ok(self, output: &mut BytesMut, origin: Origin) {
        if self.headers.has_chunks() {
            self.put_chunk(output, origin, chunk::NONE, true, 0);
        } else {
            put_simple(output, origin, 0);
        }
    }

    /// Says that it failed; ends the reply. Where replies are simple the text is lost.
    ///
    /// A reply of which a piece has been sent already can only fail where replies are structured.
    pub fn error(self, output: &mut BytesMut, origin: Origin, errno: Errno, text: &str) {
        if self.headers.has_chunks() {
            let text = clip(text);
            self.put_chunk(
                output,
                origin,
                chunk::ERROR,
                true,
                4 + 2 + text.len() as u64,
            );
            put_error(output, errno, text);
        } else {
            put_simple(output, origin, errno.to_wire());
        }
    }

    /// Says that it failed at `offset`; ends the reply. What was sent from before it is good.
    pub fn error_at(
        self,
        output: &mut BytesMut,
        origin: Origin,
        offset: u64,
        errno: Errno,
        text: &str,
    ) {
        if self.headers.has_chunks() {
            let text = clip(text);
            self.put_chunk(
                output,
                origin,
                chunk::ERROR_OFFSET,
                true,
                4 + 2 + text.len() as u64 + 8,
            );
            put_error(output, errno, text);
            output.put_u64(offset);
        } else {
            put_simple(output, origin, errno.to_wire());
        }
    }

    /// Announces data: exactly `length` bytes, read at `offset`, must be appended next.
    ///
    /// If that fails before anything is sent, truncate `output` to what it was and reply with an
    /// error instead.
    ///
    /// # Panics
    ///
    /// If `length` is more than a read can be, [`PAYLOAD_MAX`](crate::PAYLOAD_MAX).
    pub fn begin_data(
        self,
        output: &mut BytesMut,
        origin: Origin,
        offset: u64,
        length: u64,
        last: bool,
    ) {
        if !self.headers.has_chunks() {
            debug_assert!(last, "a simple reply comes in one piece");
            put_simple(output, origin, 0);
        } else if length > 0 {
            self.put_chunk(output, origin, chunk::OFFSET_DATA, last, 8 + length);
            output.put_u64(offset);
        } else if last {
            // No chunk may be empty, but the reply must end.
            self.ok(output, origin);
        }
    }

    /// Says that `length` bytes at `offset` are zero. Nothing is to be appended.
    ///
    /// # Panics
    ///
    /// If `length` is more than a read can be, [`PAYLOAD_MAX`](crate::PAYLOAD_MAX).
    pub fn hole(self, output: &mut BytesMut, origin: Origin, offset: u64, length: u64, last: bool) {
        if self.headers.has_chunks() && length > 0 {
            self.put_chunk(output, origin, chunk::OFFSET_HOLE, last, 8 + 4);
            output.put_u64(offset);
            output.put_u32(wire_length(length));
        } else {
            self.begin_data(output, origin, offset, length, last);
            output.put_bytes(0, length as usize);
        }
    }

    /// Tells what contexts say about a range; the whole reply.
    ///
    /// They are shortened to cover the same length. If that is nothing, the reply is an error: a
    /// client has to make progress.
    pub fn block_status(
        self,
        output: &mut BytesMut,
        origin: Origin,
        contexts: &mut [(ContextId, Extents)],
    ) {
        cover_the_same_length(contexts);
        if contexts.iter().all(|(_, extents)| extents.covered() == 0) {
            return self.error(output, origin, Errno::Io, "the block status is not known");
        }
        let last = contexts.len() - 1;
        for (index, (id, extents)) in contexts.iter().enumerate() {
            self.put_extents(output, origin, *id, extents, index == last);
        }
    }

    fn put_extents(
        self,
        output: &mut BytesMut,
        origin: Origin,
        id: ContextId,
        extents: &Extents,
        last: bool,
    ) {
        let extents = extents.as_slice();
        let count = extents.len() as u32;
        if self.headers == Headers::Extended {
            let length = 4 + 4 + 16 * u64::from(count);
            self.put_chunk(output, origin, chunk::BLOCK_STATUS_EXTENDED, last, length);
            output.put_u32(id.0);
            output.put_u32(count);
            put_each(output, extents, |extent| {
                u128::to_be_bytes(u128::from(extent.length) << 64 | u128::from(extent.flags))
            });
        } else {
            let length = 4 + 8 * u64::from(count);
            self.put_chunk(output, origin, chunk::BLOCK_STATUS, last, length);
            output.put_u32(id.0);
            // What is pushed has 32 bits.
            put_each(output, extents, |extent| {
                u64::to_be_bytes(u64::from(wire_length(extent.length)) << 32 | extent.flags)
            });
        }
    }

    fn put_chunk(self, output: &mut BytesMut, origin: Origin, kind: u16, last: bool, length: u64) {
        let flags = if last { chunk::DONE } else { 0 };
        if self.headers == Headers::Extended {
            output.put_u32(EXTENDED_CHUNK_MAGIC);
            output.put_u16(flags);
            output.put_u16(kind);
            output.put_u64(origin.cookie.0);
            output.put_u64(origin.offset);
            output.put_u64(length);
        } else {
            output.put_u32(CHUNK_MAGIC);
            output.put_u16(flags);
            output.put_u16(kind);
            output.put_u64(origin.cookie.0);
            output.put_u32(wire_length(length));
        }
    }
}

/// Appends them all: a reply can have tens of thousands, and each by itself would be looked at for room.
fn put_each<const N: usize>(
    output: &mut BytesMut,
    extents: &[Extent],
    encode: impl Fn(&Extent) -> [u8; N],
) {
    let begin = output.len();
    output.resize(begin + N * extents.len(), 0);
    let (places, _) = output[begin..].as_chunks_mut();
    for (place, extent) in places.iter_mut().zip(extents) {
        *place = encode(extent);
    }
}

fn put_simple(output: &mut BytesMut, origin: Origin, error: u32) {
    output.put_u32(SIMPLE_REPLY_MAGIC);
    output.put_u32(error);
    output.put_u64(origin.cookie.0);
}

fn put_error(output: &mut BytesMut, errno: Errno, text: &str) {
    output.put_u32(errno.to_wire());
    output.put_u16(text.len() as u16);
    output.put_slice(text.as_bytes());
}

fn wire_length(length: u64) -> u32 {
    u32::try_from(length).expect("admission and `Extents` keep lengths below 32 bits")
}

#[cfg(test)]
mod tests;
