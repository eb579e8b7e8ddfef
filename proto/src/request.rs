//! What a client asks for in transmission, from bytes to requests and back.

use std::io;

use bytes::{Buf, BufMut, Bytes, BytesMut};
use thiserror::Error;
use tokio_util::codec::Decoder;

use crate::command::{BLOCK_STATUS, DISCONNECT, PAYLOAD_LENGTH, WRITE};
use crate::context_filter::FILTER_MAX;
use crate::headers::Headers;
use crate::violation::Violation;
use crate::wire::{EXTENDED_REQUEST_MAGIC, REQUEST_MAGIC};

/// The longest write that is kept, and the longest read that is answered: what `proto.md` lets
/// every client presume.
pub const PAYLOAD_MAX: u64 = 32 << 20;

/// The longest payload of a compact write that is skipped, so that it can be refused and the next
/// request found. Beyond it the connection ends; with extended headers it ends beyond
/// [`PAYLOAD_MAX`], as their reference advises.
pub const PAYLOAD_SKIPPED_MAX: u64 = 4 * PAYLOAD_MAX;

/// What a client calls a request by until it is answered.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
pub struct Cookie(pub u64);

/// What a reply repeats of its request.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
pub struct Origin {
    /// What the client calls the request by.
    pub cookie: Cookie,
    /// Where its range starts. Only an extended reply says so, in all its chunks.
    pub offset: u64,
}

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
    /// How long it is; or how long the payload is, if there is one and [`PAYLOAD_LENGTH`] is set.
    pub length: u64,
    /// The payload. Empty if it was longer than could be right and has been skipped.
    pub data: Bytes,
}

impl Request {
    /// What its reply repeats.
    pub fn origin(&self) -> Origin {
        Origin {
            cookie: self.cookie,
            offset: self.offset,
        }
    }

    /// Appends the request to `output`, payload included.
    ///
    /// The flags are sent as they are. With extended headers whatever has a payload needs
    /// [`PAYLOAD_LENGTH`]: every write, and a block status with a
    /// [`ContextFilter`](crate::ContextFilter).
    ///
    /// # Panics
    ///
    /// If the header is compact and the length does not fit its 32 bits.
    pub fn encode(&self, headers: Headers, output: &mut BytesMut) {
        let extended = headers == Headers::Extended;
        output.put_u32(magic_of(headers));
        output.put_u16(self.flags);
        output.put_u16(self.kind);
        output.put_u64(self.cookie.0);
        output.put_u64(self.offset);
        if extended {
            output.put_u64(self.length);
        } else {
            output.put_u32(u32::try_from(self.length).expect("a length of at most 32 bits"));
        }
        output.put_slice(&self.data);
    }

    fn has_payload(&self, headers: Headers) -> bool {
        match headers {
            // The flag must be set on a write, but QEMU 10 leaves it out and sends the data.
            Headers::Extended => self.kind == WRITE || self.flags & PAYLOAD_LENGTH != 0,
            // Nothing else has one, unknown commands included.
            Headers::Simple | Headers::Structured => self.kind == WRITE,
        }
    }

    /// The longest payload that this can do something with.
    fn payload_max(&self) -> u64 {
        match self.kind {
            WRITE => PAYLOAD_MAX,
            BLOCK_STATUS => FILTER_MAX,
            _ => 0,
        }
    }
}

fn magic_of(headers: Headers) -> u32 {
    match headers {
        Headers::Extended => EXTENDED_REQUEST_MAGIC,
        Headers::Simple | Headers::Structured => REQUEST_MAGIC,
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
/// A payload is a slice of the buffer that it was received in: keeping one keeps that
/// piece of the buffer.
#[derive(Debug, Default)]
pub struct RequestDecoder {
    headers: Headers,
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
    /// Expects requests of that form.
    pub fn new(headers: Headers) -> Self {
        Self {
            headers,
            expecting: Expecting::default(),
        }
    }

    /// How long the payload is that the next request waits for; what of it has arrived is in the
    /// input. Zero, if it waits for none, or for one that nobody keeps.
    pub fn payload(&self) -> usize {
        match &self.expecting {
            Expecting::Payload(request) => request.length as usize,
            Expecting::Header | Expecting::Skipping { .. } => 0,
        }
    }

    /// Keeps nothing of the [payload](Self::payload) that the next request waits for: it is skipped.
    pub fn skip_payload(&mut self) {
        if let Expecting::Payload(request) = &mut self.expecting {
            self.expecting = Expecting::Skipping {
                left: request.length,
                request: request.clone(),
            };
        }
    }

    /// Whether a part of a request has been taken.
    pub fn is_within(&self) -> bool {
        !matches!(self.expecting, Expecting::Header)
    }

    /// Takes the next request off the front of `input`, or `None` until more has arrived.
    ///
    /// Whoever reads a [payload](Self::payload) should make room for it once and for all.
    pub fn decode(&mut self, input: &mut BytesMut) -> Result<Option<Incoming>, Violation> {
        if matches!(self.expecting, Expecting::Header) {
            let Some(request) = read_header(self.headers, input)? else {
                return Ok(None);
            };
            if request.kind == DISCONNECT {
                return Ok(Some(Incoming::Disconnect));
            }
            if !request.has_payload(self.headers) {
                return Ok(Some(Incoming::Request(request)));
            }
            if request.length > self.skipped_max() {
                return Err(Violation::PayloadLength(request.length));
            }
            self.expecting = if request.length > request.payload_max() {
                Expecting::Skipping {
                    left: request.length,
                    request,
                }
            } else {
                Expecting::Payload(request)
            };
        }

        match std::mem::take(&mut self.expecting) {
            Expecting::Header => Ok(None),
            Expecting::Payload(mut request) => {
                let length = request.length as usize;
                if input.len() < length {
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

    fn skipped_max(&self) -> u64 {
        match self.headers {
            Headers::Extended => PAYLOAD_MAX,
            Headers::Simple | Headers::Structured => PAYLOAD_SKIPPED_MAX,
        }
    }
}

fn read_header(headers: Headers, input: &mut BytesMut) -> Result<Option<Request>, Violation> {
    let extended = headers == Headers::Extended;
    let size = if extended {
        EXTENDED_HEADER_SIZE
    } else {
        HEADER_SIZE
    };
    if input.len() < size {
        return Ok(None);
    }
    let magic = input.get_u32();
    if magic != magic_of(headers) {
        return Err(Violation::RequestMagic(magic));
    }
    let flags = input.get_u16();
    let kind = input.get_u16();
    let cookie = Cookie(input.get_u64());
    let offset = input.get_u64();
    let length = if extended {
        input.get_u64()
    } else {
        u64::from(input.get_u32())
    };
    Ok(Some(Request {
        cookie,
        kind,
        flags,
        offset,
        length,
        data: Bytes::new(),
    }))
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

/// Magic, flags, kind, cookie, offset and a length of 32 bits.
const HEADER_SIZE: usize = 28;
/// The same with a length of 64 bits.
const EXTENDED_HEADER_SIZE: usize = 32;

#[cfg(test)]
mod tests;
