//! Requests and replies.

use std::collections::{BTreeMap, HashMap};
use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex};

use super::constants::{chunk, command, flag};

const REQUEST_MAGIC: u32 = 0x2560_9513;
const SIMPLE_MAGIC: u32 = 0x6744_6698;
const CHUNK_MAGIC: u32 = 0x668e_33ef;
pub(super) const EXTENDED_REQUEST_MAGIC: u32 = 0x21e4_1c71;
const EXTENDED_CHUNK_MAGIC: u32 = 0x6e8a_278c;

/// A reply, or a part of one, as it came.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Chunk {
    /// Whose answer it is.
    pub cookie: u64,
    /// Whether it came as a simple reply.
    pub simple: bool,
    /// Where its request starts, if it came with an extended header.
    pub request_offset: Option<u64>,
    /// Whether it is the last.
    pub done: bool,
    /// One of [`chunk`]; a simple reply counts as `NONE`, or as `OFFSET_DATA` if it has data.
    pub kind: u16,
    /// Zero, or one of [`errno`](super::errno).
    pub error: u32,
    /// What follows the header; for an error chunk its message.
    pub payload: Vec<u8>,
}

/// All the chunks of one reply.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct Answer {
    /// Whose answer it is.
    pub cookie: u64,
    /// Zero, or the first error.
    pub error: u32,
    /// The chunks in the order of their arrival.
    pub chunks: Vec<Chunk>,
}

impl Answer {
    /// Nothing, or the error.
    pub fn done(&self) -> Result<(), u32> {
        if self.error == 0 {
            Ok(())
        } else {
            Err(self.error)
        }
    }

    /// The bytes read at `offset`, each of which must have come exactly once.
    #[track_caller]
    pub fn data(&self, offset: u64, length: u32) -> Result<Vec<u8>, u32> {
        self.done()?;
        let mut bytes = vec![0; length as usize];
        let mut seen = vec![false; length as usize];
        for part in &self.chunks {
            let (at, content) = match part.kind {
                chunk::OFFSET_DATA if part.simple => (offset, Some(&part.payload[..])),
                chunk::OFFSET_DATA => (u64_at(&part.payload, 0), Some(&part.payload[8..])),
                chunk::OFFSET_HOLE => (u64_at(&part.payload, 0), None),
                chunk::NONE => continue,
                kind => panic!("a chunk of kind {kind} in the answer to a read"),
            };
            let size = content.map_or_else(|| u32_at(&part.payload, 8) as usize, <[u8]>::len);
            let start = at.checked_sub(offset).expect("no bytes before the request") as usize;
            assert!(
                start + size <= bytes.len(),
                "bytes past the request: {at}+{size}"
            );
            assert!(size > 0, "an empty chunk at {at}");
            assert!(
                !seen[start..start + size].contains(&true),
                "bytes came twice: {at}+{size}"
            );
            seen[start..start + size].fill(true);
            if let Some(content) = content {
                bytes[start..start + size].copy_from_slice(content);
            }
        }
        assert!(
            !seen.contains(&false),
            "not all of {offset}+{length} was answered"
        );
        Ok(bytes)
    }

    /// The extents of each context, by its id, as lengths and flags.
    pub fn extents(&self) -> Result<BTreeMap<u32, Vec<(u32, u32)>>, u32> {
        self.done()?;
        let mut contexts = BTreeMap::new();
        for part in self
            .chunks
            .iter()
            .filter(|part| part.kind == chunk::BLOCK_STATUS)
        {
            let extents: Vec<_> = part.payload[4..]
                .chunks(8)
                .map(|e| (u32_at(e, 0), u32_at(e, 4)))
                .collect();
            assert!(!extents.is_empty(), "a context without extents");
            let before = contexts.insert(u32_at(&part.payload, 0), extents);
            assert!(before.is_none(), "a context was answered twice");
        }
        Ok(contexts)
    }
}

/// Both halves of a connection on which nothing was agreed yet.
pub(super) fn halves(stream: UnixStream) -> (Sender, Receiver) {
    let reads = Arc::<Mutex<HashMap<u64, u32>>>::default();
    let sender = Sender {
        stream: stream.try_clone().unwrap(),
        extended: false,
        reads: Arc::clone(&reads),
    };
    let receiver = Receiver {
        stream: io::BufReader::new(stream),
        structured: false,
        extended: false,
        reads,
        partial: HashMap::new(),
    };
    (sender, receiver)
}

/// The half that sends.
#[derive(Debug)]
pub struct Sender {
    pub(super) stream: UnixStream,
    pub(super) extended: bool,
    /// How much data a simple reply to each read has.
    reads: Arc<Mutex<HashMap<u64, u32>>>,
}

impl Sender {
    /// Sends one request, with any payload, in the form that was agreed on.
    pub fn request(
        &mut self,
        (command, flags): (u16, u16),
        cookie: u64,
        offset: u64,
        length: u32,
        payload: &[u8],
    ) -> io::Result<()> {
        if self.extended {
            let flags = match command {
                command::WRITE => flags | flag::PAYLOAD_LEN,
                _ => flags,
            };
            return self.extended((command, flags), cookie, offset, length.into(), payload);
        }
        if command == command::READ {
            self.reads.lock().unwrap().insert(cookie, length);
        }
        let mut message = Vec::with_capacity(28 + payload.len());
        message.extend(REQUEST_MAGIC.to_be_bytes());
        message.extend(flags.to_be_bytes());
        message.extend(command.to_be_bytes());
        message.extend(cookie.to_be_bytes());
        message.extend(offset.to_be_bytes());
        message.extend(length.to_be_bytes());
        message.extend(payload);
        self.stream.write_all(&message)
    }

    /// Sends anything.
    pub fn raw(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.stream.write_all(bytes)
    }

    /// Says good-bye.
    pub fn disconnect(&mut self) -> io::Result<()> {
        self.request((command::DISC, 0), 0, 0, 0, &[])
    }
}

/// The half that receives.
#[derive(Debug)]
pub struct Receiver {
    stream: io::BufReader<UnixStream>,
    pub(super) structured: bool,
    pub(super) extended: bool,
    reads: Arc<Mutex<HashMap<u64, u32>>>,
    partial: HashMap<u64, Answer>,
}

impl Receiver {
    /// Receives one reply, or one chunk of one.
    pub fn chunk(&mut self) -> io::Result<Chunk> {
        match self.u32()? {
            EXTENDED_CHUNK_MAGIC if self.extended => self.extended(),
            magic if self.extended => panic!("expected an extended chunk, found {magic:#010x}"),
            SIMPLE_MAGIC => self.simple(),
            CHUNK_MAGIC if self.structured => self.structured(),
            magic => panic!("expected a reply, found {magic:#010x}"),
        }
    }

    /// Receives until a reply is complete.
    pub fn answer(&mut self) -> io::Result<Answer> {
        loop {
            let chunk = self.chunk()?;
            let cookie = chunk.cookie;
            let answer = self.partial.entry(cookie).or_default();
            answer.cookie = cookie;
            if answer.error == 0 {
                answer.error = chunk.error;
            }
            let done = chunk.done;
            answer.chunks.push(chunk);
            if done {
                self.reads.lock().unwrap().remove(&cookie);
                return Ok(self.partial.remove(&cookie).expect("just entered"));
            }
        }
    }

    fn simple(&mut self) -> io::Result<Chunk> {
        let (error, cookie) = (self.u32()?, self.u64()?);
        let read = self.reads.lock().unwrap().get(&cookie).copied();
        assert!(
            !(self.structured && read.is_some()),
            "a simple reply to a read"
        );
        let length = if error == 0 { read.unwrap_or(0) } else { 0 };
        let payload = self.bytes(length as usize)?;
        let kind = if length > 0 {
            chunk::OFFSET_DATA
        } else {
            chunk::NONE
        };
        Ok(Chunk {
            cookie,
            simple: true,
            request_offset: None,
            done: true,
            kind,
            error,
            payload,
        })
    }

    fn structured(&mut self) -> io::Result<Chunk> {
        let (flags, kind) = (self.u16()?, self.u16()?);
        let cookie = self.u64()?;
        let length = self.u32()?;
        self.rest_of_chunk((flags, kind), cookie, None, length.into())
    }

    pub(super) fn rest_of_chunk(
        &mut self,
        (flags, kind): (u16, u16),
        cookie: u64,
        request_offset: Option<u64>,
        length: u64,
    ) -> io::Result<Chunk> {
        assert_eq!(flags & !chunk::DONE, 0, "unknown flags of a chunk");
        assert!(length <= 64 << 20, "a chunk of {length} bytes");
        let mut payload = self.bytes(length as usize)?;
        let mut error = 0;
        if kind & 1 << 15 != 0 {
            error = u32_at(&payload, 0);
            assert_ne!(error, 0, "an error chunk without an error");
            let text = u16_at(&payload, 4) as usize;
            payload = payload[6..6 + text].to_vec();
        }
        Ok(Chunk {
            cookie,
            simple: false,
            request_offset,
            done: flags & chunk::DONE != 0,
            kind,
            error,
            payload,
        })
    }

    pub(super) fn bytes(&mut self, length: usize) -> io::Result<Vec<u8>> {
        let mut bytes = vec![0; length];
        self.stream.read_exact(&mut bytes)?;
        Ok(bytes)
    }

    pub(super) fn u16(&mut self) -> io::Result<u16> {
        Ok(u16_at(&self.bytes(2)?, 0))
    }

    pub(super) fn u32(&mut self) -> io::Result<u32> {
        Ok(u32_at(&self.bytes(4)?, 0))
    }

    pub(super) fn u64(&mut self) -> io::Result<u64> {
        Ok(u64_at(&self.bytes(8)?, 0))
    }
}

pub(super) fn u16_at(bytes: &[u8], start: usize) -> u16 {
    u16::from_be_bytes(bytes[start..start + 2].try_into().expect("two bytes"))
}

pub(super) fn u32_at(bytes: &[u8], start: usize) -> u32 {
    u32::from_be_bytes(bytes[start..start + 4].try_into().expect("four bytes"))
}

pub(super) fn u64_at(bytes: &[u8], start: usize) -> u64 {
    u64::from_be_bytes(bytes[start..start + 8].try_into().expect("eight bytes"))
}
