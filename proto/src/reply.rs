//! What the server replies in transmission, from values to bytes.

use bytes::{BufMut, BytesMut};

use crate::errno::Errno;
use crate::extents::{ContextId, Extents, cover_the_same_length};
use crate::request::Cookie;
use crate::string::clip;
use crate::wire::{CHUNK_MAGIC, SIMPLE_REPLY_MAGIC, chunk};

/// Writes replies in the form that was negotiated.
///
/// A session with structured replies gets nothing else, so that every error comes with a text.
#[derive(Clone, Copy, Debug)]
pub struct Replies {
    structured: bool,
}

impl Replies {
    /// Replies that are structured, or simple.
    pub fn new(structured: bool) -> Self {
        Self { structured }
    }

    /// Whether a read may be answered in several pieces. If not, one call of
    /// [`begin_data`](Self::begin_data) or [`hole`](Self::hole) answers all of it.
    pub fn may_fragment(self) -> bool {
        self.structured
    }

    /// Says that it is done; ends the reply.
    pub fn ok(self, output: &mut BytesMut, cookie: Cookie) {
        if self.structured {
            put_chunk(output, cookie, chunk::NONE, true, 0);
        } else {
            put_simple(output, cookie, 0);
        }
    }

    /// Says that it failed; ends the reply. Where replies are simple the text is lost.
    ///
    /// A reply of which a piece has been sent already can only fail where replies are structured.
    pub fn error(self, output: &mut BytesMut, cookie: Cookie, errno: Errno, text: &str) {
        if self.structured {
            let text = clip(text);
            put_chunk(
                output,
                cookie,
                chunk::ERROR,
                true,
                4 + 2 + text.len() as u64,
            );
            put_error(output, errno, text);
        } else {
            put_simple(output, cookie, errno.to_wire());
        }
    }

    /// Says that it failed at `offset`; ends the reply. What was sent from before it is good.
    pub fn error_at(
        self,
        output: &mut BytesMut,
        cookie: Cookie,
        offset: u64,
        errno: Errno,
        text: &str,
    ) {
        if self.structured {
            let text = clip(text);
            put_chunk(
                output,
                cookie,
                chunk::ERROR_OFFSET,
                true,
                4 + 2 + text.len() as u64 + 8,
            );
            put_error(output, errno, text);
            output.put_u64(offset);
        } else {
            put_simple(output, cookie, errno.to_wire());
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
        cookie: Cookie,
        offset: u64,
        length: u64,
        last: bool,
    ) {
        if !self.structured {
            debug_assert!(last, "a simple reply comes in one piece");
            put_simple(output, cookie, 0);
        } else if length > 0 {
            put_chunk(output, cookie, chunk::OFFSET_DATA, last, 8 + length);
            output.put_u64(offset);
        } else if last {
            // No chunk may be empty, but the reply must end.
            self.ok(output, cookie);
        }
    }

    /// Says that `length` bytes at `offset` are zero. Nothing is to be appended.
    ///
    /// # Panics
    ///
    /// If `length` is more than a read can be, [`PAYLOAD_MAX`](crate::PAYLOAD_MAX).
    pub fn hole(self, output: &mut BytesMut, cookie: Cookie, offset: u64, length: u64, last: bool) {
        if self.structured && length > 0 {
            put_chunk(output, cookie, chunk::OFFSET_HOLE, last, 8 + 4);
            output.put_u64(offset);
            output.put_u32(wire_length(length));
        } else {
            self.begin_data(output, cookie, offset, length, last);
            output.put_bytes(0, length as usize);
        }
    }

    /// Tells what all contexts of the session say about a range; the whole reply.
    ///
    /// They are shortened to cover the same length. If that is nothing, the reply is an error: a
    /// client has to make progress.
    pub fn block_status(
        self,
        output: &mut BytesMut,
        cookie: Cookie,
        contexts: &mut [(ContextId, Extents)],
    ) {
        cover_the_same_length(contexts);
        if contexts.iter().all(|(_, extents)| extents.covered() == 0) {
            return self.error(output, cookie, Errno::Io, "the block status is not known");
        }
        let last = contexts.len() - 1;
        for (index, (id, extents)) in contexts.iter().enumerate() {
            let extents = extents.as_slice();
            let length = 4 + 8 * extents.len() as u64;
            put_chunk(output, cookie, chunk::BLOCK_STATUS, index == last, length);
            output.put_u32(id.0);
            for extent in extents {
                output.put_u32(wire_length(extent.length));
                output.put_u32(extent.flags);
            }
        }
    }
}

fn put_simple(output: &mut BytesMut, cookie: Cookie, error: u32) {
    output.put_u32(SIMPLE_REPLY_MAGIC);
    output.put_u32(error);
    output.put_u64(cookie.0);
}

fn put_chunk(output: &mut BytesMut, cookie: Cookie, kind: u16, last: bool, length: u64) {
    output.put_u32(CHUNK_MAGIC);
    output.put_u16(if last { chunk::DONE } else { 0 });
    output.put_u16(kind);
    output.put_u64(cookie.0);
    output.put_u32(wire_length(length));
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
mod tests {
    use bytes::{BufMut, BytesMut};

    use super::{Cookie, Replies};
    use crate::{Chunk, ContextId, Errno, Extent, Extents, Reply};

    const COOKIE: Cookie = Cookie(0x0102_0304_0506_0708);

    #[test]
    fn simple_replies_are_sixteen_bytes_and_then_the_data() {
        let replies = Replies::new(false);
        let mut output = BytesMut::new();
        replies.ok(&mut output, COOKIE);
        assert_eq!(
            &output[..],
            b"\x67\x44\x66\x98\0\0\0\0\x01\x02\x03\x04\x05\x06\x07\x08"
        );

        output.clear();
        replies.error(&mut output, COOKIE, Errno::NoSpc, "lost");
        assert_eq!(output[7], 28);
        assert_eq!(output.len(), 16);

        output.clear();
        replies.hole(&mut output, COOKIE, 512, 3, true);
        assert_eq!(output.len(), 19);
        assert_eq!(
            Reply::decode(&mut output),
            Ok(Some(Reply::Simple {
                cookie: COOKIE,
                result: Ok(())
            }))
        );
        assert_eq!(&output[..], [0; 3]);
    }

    #[test]
    fn structured_replies_say_what_they_were_told() {
        let replies = Replies::new(true);
        let mut output = BytesMut::new();
        replies.begin_data(&mut output, COOKIE, 1 << 40, 2, false);
        output.put_slice(b"hi");
        replies.hole(&mut output, COOKIE, 7, 9, false);
        replies.error_at(&mut output, COOKIE, 8, Errno::Io, "bad sector");
        replies.error(&mut output, COOKIE, Errno::Perm, "");
        replies.ok(&mut output, COOKIE);

        let error = |errno, text: &str, offset| Chunk::Error {
            errno,
            text: text.into(),
            offset,
        };
        let expected = [
            (
                false,
                Chunk::Data {
                    offset: 1 << 40,
                    data: "hi".into(),
                },
            ),
            (
                false,
                Chunk::Hole {
                    offset: 7,
                    length: 9,
                },
            ),
            (true, error(Errno::Io, "bad sector", Some(8))),
            (true, error(Errno::Perm, "", None)),
            (true, Chunk::None),
        ];
        assert_eq!(chunks(&mut output), expected);
    }

    #[test]
    fn an_empty_read_is_answered_without_an_empty_chunk() {
        let mut output = BytesMut::new();
        Replies::new(true).begin_data(&mut output, COOKIE, 0, 0, true);
        assert_eq!(chunks(&mut output), [(true, Chunk::None)]);
        Replies::new(true).hole(&mut output, COOKIE, 0, 0, true);
        assert_eq!(chunks(&mut output), [(true, Chunk::None)]);
    }

    #[test]
    fn a_block_status_ends_with_its_last_context_and_covers_one_length() {
        let mut first = Extents::new(100, false);
        first.push(100, 3);
        let mut second = Extents::new(100, false);
        second.push(10, 0);
        second.push(20, 1);
        let mut output = BytesMut::new();
        let mut contexts = [(ContextId(1), first), (ContextId(2), second)];
        Replies::new(true).block_status(&mut output, COOKIE, &mut contexts);

        let status = |id, extents: &[(u64, u32)]| Chunk::BlockStatus {
            context: ContextId(id),
            extents: extents
                .iter()
                .map(|(length, flags)| Extent {
                    length: *length,
                    flags: *flags,
                })
                .collect(),
        };
        let expected = [
            (false, status(1, &[(30, 3)])),
            (true, status(2, &[(10, 0), (20, 1)])),
        ];
        assert_eq!(chunks(&mut output), expected);
    }

    #[test]
    fn a_block_status_that_covers_nothing_is_an_error() {
        let mut some = Extents::new(100, false);
        some.push(100, 0);
        let mut contexts = [
            (ContextId(1), some),
            (ContextId(2), Extents::new(100, false)),
        ];
        let mut output = BytesMut::new();
        Replies::new(true).block_status(&mut output, COOKIE, &mut contexts);
        assert!(matches!(
            chunks(&mut output)[..],
            [(true, Chunk::Error { .. })]
        ));
    }

    fn chunks(output: &mut BytesMut) -> Vec<(bool, Chunk)> {
        std::iter::from_fn(|| Reply::decode(output).unwrap())
            .map(|reply| match reply {
                Reply::Chunk {
                    cookie: COOKIE,
                    done,
                    chunk,
                } => (done, chunk),
                other => panic!("expected a chunk, found {other:?}"),
            })
            .collect()
    }
}
