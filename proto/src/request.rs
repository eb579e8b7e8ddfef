//! What a client asks for in transmission, from bytes to requests and back.

use std::io;

use bytes::{Buf, BufMut, Bytes, BytesMut};
use thiserror::Error;
use tokio_util::codec::Decoder;

use crate::command::{DISCONNECT, WRITE};
use crate::violation::Violation;
use crate::wire::REQUEST_MAGIC;

/// The longest write that is kept, and the longest read that is answered: what `proto.md` lets
/// every client presume.
pub const PAYLOAD_MAX: u64 = 32 << 20;

/// The longest payload that is skipped, so that its write can be refused and the next request
/// found. Beyond it the connection ends.
pub const PAYLOAD_SKIPPED_MAX: u64 = 4 * PAYLOAD_MAX;

/// What a client calls a request by until it is answered.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
pub struct Cookie(pub u64);

/// A request as it came, not yet believed; [`Admission`](crate::Admission) turns it into a command.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Request {
    /// What the reply goes by.
    pub cookie: Cookie,
    /// One of [`command`](crate::command), or anything.
    pub kind: u16,
    /// Some of the flags of [`command`](crate::command), or anything.
    pub flags: u16,
    /// Where the range starts.
    pub offset: u64,
    /// How long it is.
    pub length: u64,
    /// The payload of a write. Empty if it was longer than [`PAYLOAD_MAX`] and has been skipped.
    pub data: Bytes,
}

impl Request {
    /// Appends the request to `output`, payload included.
    ///
    /// # Panics
    ///
    /// If the length does not fit the header's 32 bits.
    pub fn encode(&self, output: &mut BytesMut) {
        let length = u32::try_from(self.length).expect("a length of at most 32 bits");
        output.put_u32(REQUEST_MAGIC);
        output.put_u16(self.flags);
        output.put_u16(self.kind);
        output.put_u64(self.cookie.0);
        output.put_u64(self.offset);
        output.put_u32(length);
        output.put_slice(&self.data);
    }
}

/// What a client sends in transmission.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum Incoming {
    /// To be answered.
    Request(Request),
    /// The client is leaving; finish what is under way, then close. Nothing follows.
    Disconnect,
}

/// Finds the requests in a stream of bytes.
///
/// The payload of a write is a slice of the buffer that it was received in: keeping one keeps that
/// piece of the buffer.
#[derive(Debug, Default)]
pub struct RequestDecoder {
    expecting: Expecting,
}

#[derive(Debug, Default)]
enum Expecting {
    #[default]
    Header,
    Payload(Request),
    Skipping {
        request: Request,
        left: u64,
    },
}

impl RequestDecoder {
    /// Takes the next request off the front of `input`, or `None` until more has arrived.
    pub fn decode(&mut self, input: &mut BytesMut) -> Result<Option<Incoming>, Violation> {
        if matches!(self.expecting, Expecting::Header) {
            if input.len() < HEADER_SIZE {
                return Ok(None);
            }
            let request = read_header(input)?;
            self.expecting = match request.kind {
                DISCONNECT => return Ok(Some(Incoming::Disconnect)),
                WRITE if request.length > PAYLOAD_SKIPPED_MAX => {
                    return Err(Violation::PayloadLength(request.length));
                }
                WRITE if request.length > PAYLOAD_MAX => Expecting::Skipping {
                    left: request.length,
                    request,
                },
                WRITE => Expecting::Payload(request),
                // Nothing else has a payload, unknown commands included.
                _ => return Ok(Some(Incoming::Request(request))),
            };
        }

        match std::mem::take(&mut self.expecting) {
            Expecting::Header => Ok(None),
            Expecting::Payload(mut request) => {
                let length = request.length as usize;
                if input.len() < length {
                    // Once and for all, instead of by doubling.
                    input.reserve(length - input.len());
                    self.expecting = Expecting::Payload(request);
                    return Ok(None);
                }
                request.data = input.split_to(length).freeze();
                Ok(Some(Incoming::Request(request)))
            }
            Expecting::Skipping { request, mut left } => {
                let arrived = left.min(input.len() as u64);
                input.advance(arrived as usize);
                left -= arrived;
                if left > 0 {
                    self.expecting = Expecting::Skipping { request, left };
                    return Ok(None);
                }
                Ok(Some(Incoming::Request(request)))
            }
        }
    }
}

fn read_header(input: &mut BytesMut) -> Result<Request, Violation> {
    let magic = input.get_u32();
    if magic != REQUEST_MAGIC {
        return Err(Violation::RequestMagic(magic));
    }
    let flags = input.get_u16();
    let kind = input.get_u16();
    let cookie = Cookie(input.get_u64());
    let offset = input.get_u64();
    let length = u64::from(input.get_u32());
    Ok(Request {
        cookie,
        kind,
        flags,
        offset,
        length,
        data: Bytes::new(),
    })
}

/// Why a framed stream of requests ended early.
#[derive(Debug, Error)]
pub enum DecodeError {
    /// The transport failed.
    #[error("cannot read from the peer")]
    Io(#[from] io::Error),
    /// The peer did.
    #[error(transparent)]
    Violation(#[from] Violation),
}

impl Decoder for RequestDecoder {
    type Item = Incoming;
    type Error = DecodeError;

    fn decode(&mut self, input: &mut BytesMut) -> Result<Option<Incoming>, DecodeError> {
        Ok(RequestDecoder::decode(self, input)?)
    }
}

/// Magic, flags, kind, cookie, offset and length of a request.
const HEADER_SIZE: usize = 28;

#[cfg(test)]
mod tests {
    use bytes::{BufMut, Bytes, BytesMut};

    use super::{Cookie, HEADER_SIZE, Incoming, PAYLOAD_MAX, PAYLOAD_SKIPPED_MAX, Request};
    use super::{RequestDecoder, Violation};
    use crate::command::{DISCONNECT, FUA, READ, WRITE};

    #[test]
    fn requests_survive_the_wire_however_it_cuts_them() {
        let requests = [
            request(READ, 4096, b""),
            request(WRITE, 5, b"hello"),
            request(WRITE, 0, b""),
            request(77, 1 << 31, b""),
        ];
        let mut wire = BytesMut::new();
        for request in &requests {
            request.encode(&mut wire);
        }
        let mut goodbye = request(DISCONNECT, 0, b"");
        goodbye.flags = 0;
        goodbye.encode(&mut wire);

        for step in 1..wire.len() {
            let (mut decoder, mut input, mut found) =
                (RequestDecoder::default(), BytesMut::new(), Vec::new());
            for piece in wire.chunks(step) {
                input.put_slice(piece);
                while let Some(incoming) = decoder.decode(&mut input).unwrap() {
                    found.push(incoming);
                }
            }
            let expected: Vec<_> = requests
                .iter()
                .cloned()
                .map(Incoming::Request)
                .chain([Incoming::Disconnect])
                .collect();
            assert_eq!(found, expected, "{step} bytes at a time");
            assert!(input.is_empty());
        }
    }

    #[test]
    fn a_payload_is_a_slice_of_what_was_received() {
        let mut input = BytesMut::new();
        request(WRITE, 5, b"hello").encode(&mut input);
        let payload_at = input[HEADER_SIZE..].as_ptr();
        let Some(Incoming::Request(request)) =
            RequestDecoder::default().decode(&mut input).unwrap()
        else {
            panic!("expected a request");
        };
        assert_eq!(request.data.as_ptr(), payload_at);
    }

    #[test]
    fn an_overlong_payload_is_skipped_without_being_kept() {
        let mut decoder = RequestDecoder::default();
        let mut input = BytesMut::new();
        request(WRITE, PAYLOAD_MAX + 1, b"").encode(&mut input);
        let piece = vec![0; 1 << 20];
        for _ in 0..PAYLOAD_MAX / (1 << 20) {
            input.put_slice(&piece);
            assert_eq!(decoder.decode(&mut input), Ok(None));
            assert!(input.is_empty());
        }
        input.put_u8(0);
        let refused = request(WRITE, PAYLOAD_MAX + 1, b"");
        assert_eq!(
            decoder.decode(&mut input),
            Ok(Some(Incoming::Request(refused)))
        );

        request(READ, 1, b"").encode(&mut input);
        let next = Incoming::Request(request(READ, 1, b""));
        assert_eq!(decoder.decode(&mut input), Ok(Some(next)));
    }

    #[test]
    fn an_absurd_payload_or_a_wrong_magic_ends_the_connection() {
        let mut input = BytesMut::new();
        request(WRITE, PAYLOAD_SKIPPED_MAX + 1, b"").encode(&mut input);
        assert_eq!(
            RequestDecoder::default().decode(&mut input),
            Err(Violation::PayloadLength(PAYLOAD_SKIPPED_MAX + 1))
        );

        let mut input = BytesMut::from(&[0x11; HEADER_SIZE][..]);
        assert_eq!(
            RequestDecoder::default().decode(&mut input),
            Err(Violation::RequestMagic(0x1111_1111))
        );
    }

    fn request(kind: u16, length: u64, data: &'static [u8]) -> Request {
        let data = Bytes::from_static(data);
        Request {
            cookie: Cookie(7),
            kind,
            flags: FUA,
            offset: 1 << 40,
            length,
            data,
        }
    }
}
