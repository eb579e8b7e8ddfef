//! An NBD client by hand, one message at a time.
//!
//! Written from the protocol document, blocking, and free to be rude: a test can send anything and
//! see exactly what comes back. [`RawNbd`] is the pair of its two halves, [`Sender`] and
//! [`Receiver`], which can go to different threads.

use std::collections::{BTreeMap, HashMap};
use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::{Arc, Mutex};

use crate::Extent;
use crate::process::PATIENCE;

pub mod extended;

/// Options of the handshake.
pub mod option {
    #![allow(missing_docs, reason = "the names are the protocol document's")]
    pub const EXPORT_NAME: u32 = 1;
    pub const ABORT: u32 = 2;
    pub const LIST: u32 = 3;
    pub const STARTTLS: u32 = 5;
    pub const INFO: u32 = 6;
    pub const GO: u32 = 7;
    pub const STRUCTURED_REPLY: u32 = 8;
    pub const LIST_META_CONTEXT: u32 = 9;
    pub const SET_META_CONTEXT: u32 = 10;
    pub const EXTENDED_HEADERS: u32 = 11;
}

/// Replies to options.
pub mod rep {
    #![allow(missing_docs, reason = "the names are the protocol document's")]
    pub const ACK: u32 = 1;
    pub const SERVER: u32 = 2;
    pub const INFO: u32 = 3;
    pub const META_CONTEXT: u32 = 4;
    pub const ERR_UNSUP: u32 = 1 << 31 | 1;
    pub const ERR_POLICY: u32 = 1 << 31 | 2;
    pub const ERR_INVALID: u32 = 1 << 31 | 3;
    pub const ERR_TLS_REQD: u32 = 1 << 31 | 5;
    pub const ERR_UNKNOWN: u32 = 1 << 31 | 6;
    pub const ERR_SHUTDOWN: u32 = 1 << 31 | 7;
    pub const ERR_TOO_BIG: u32 = 1 << 31 | 9;
    pub const ERR_EXT_HEADER_REQD: u32 = 1 << 31 | 0xa;
}

/// Kinds of information about an export.
pub mod info {
    #![allow(missing_docs, reason = "the names are the protocol document's")]
    pub const EXPORT: u16 = 0;
    pub const NAME: u16 = 1;
    pub const DESCRIPTION: u16 = 2;
    pub const BLOCK_SIZE: u16 = 3;
}

/// Transmission flags: what an export can do.
pub mod can {
    #![allow(missing_docs, reason = "the names are the protocol document's")]
    pub const HAS_FLAGS: u16 = 1;
    pub const READ_ONLY: u16 = 1 << 1;
    pub const FLUSH: u16 = 1 << 2;
    pub const FUA: u16 = 1 << 3;
    pub const TRIM: u16 = 1 << 5;
    pub const WRITE_ZEROES: u16 = 1 << 6;
    pub const DF: u16 = 1 << 7;
    pub const MULTI_CONN: u16 = 1 << 8;
    pub const CACHE: u16 = 1 << 10;
    pub const FAST_ZERO: u16 = 1 << 11;
    pub const BLOCK_STATUS_PAYLOAD: u16 = 1 << 12;
}

/// Commands.
pub mod command {
    #![allow(missing_docs, reason = "the names are the protocol document's")]
    pub const READ: u16 = 0;
    pub const WRITE: u16 = 1;
    pub const DISC: u16 = 2;
    pub const FLUSH: u16 = 3;
    pub const TRIM: u16 = 4;
    pub const CACHE: u16 = 5;
    pub const WRITE_ZEROES: u16 = 6;
    pub const BLOCK_STATUS: u16 = 7;
}

/// Flags of commands.
pub mod flag {
    #![allow(missing_docs, reason = "the names are the protocol document's")]
    pub const FUA: u16 = 1;
    pub const NO_HOLE: u16 = 1 << 1;
    pub const DF: u16 = 1 << 2;
    pub const REQ_ONE: u16 = 1 << 3;
    pub const FAST_ZERO: u16 = 1 << 4;
    pub const PAYLOAD_LEN: u16 = 1 << 5;
}

/// Kinds of chunks in a structured reply.
pub mod chunk {
    #![allow(missing_docs, reason = "the names are the protocol document's")]
    pub const NONE: u16 = 0;
    pub const OFFSET_DATA: u16 = 1;
    pub const OFFSET_HOLE: u16 = 2;
    pub const BLOCK_STATUS: u16 = 5;
    pub const BLOCK_STATUS_EXT: u16 = 6;
    pub const ERROR: u16 = 1 << 15 | 1;
    pub const ERROR_OFFSET: u16 = 1 << 15 | 2;
    pub const DONE: u16 = 1;
}

/// Errors on the wire.
pub mod errno {
    #![allow(missing_docs, reason = "the names are the protocol document's")]
    pub const EPERM: u32 = 1;
    pub const EIO: u32 = 5;
    pub const EINVAL: u32 = 22;
    pub const ENOSPC: u32 = 28;
    pub const EOVERFLOW: u32 = 75;
    pub const ENOTSUP: u32 = 95;
    pub const ESHUTDOWN: u32 = 108;
}

const OPTION_MAGIC: &[u8; 8] = b"IHAVEOPT";
const OPTION_REPLY_MAGIC: u64 = 0x0003_e889_0455_65a9;
const REQUEST_MAGIC: u32 = 0x2560_9513;
const SIMPLE_MAGIC: u32 = 0x6744_6698;
const CHUNK_MAGIC: u32 = 0x668e_33ef;
const EXTENDED_REQUEST_MAGIC: u32 = 0x21e4_1c71;
const EXTENDED_CHUNK_MAGIC: u32 = 0x6e8a_278c;

/// A reply to an option.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct OptionReply {
    /// The option it answers.
    pub option: u32,
    /// One of [`rep`].
    pub kind: u32,
    /// The rest.
    pub data: Vec<u8>,
}

/// What a server told about an export.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct Export {
    /// Its size in bytes.
    pub size: u64,
    /// Its transmission flags, of [`can`].
    pub flags: u16,
    /// Its minimum, preferred and maximum block size, if it told them.
    pub block_sizes: Option<[u32; 3]>,
    /// Its description, if it told one.
    pub description: Option<String>,
}

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
    /// Zero, or one of [`errno`].
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

/// The half that sends.
#[derive(Debug)]
pub struct Sender {
    stream: UnixStream,
    extended: bool,
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
    structured: bool,
    extended: bool,
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

    fn rest_of_chunk(
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

    fn bytes(&mut self, length: usize) -> io::Result<Vec<u8>> {
        let mut bytes = vec![0; length];
        self.stream.read_exact(&mut bytes)?;
        Ok(bytes)
    }

    fn u16(&mut self) -> io::Result<u16> {
        Ok(u16_at(&self.bytes(2)?, 0))
    }

    fn u32(&mut self) -> io::Result<u32> {
        Ok(u32_at(&self.bytes(4)?, 0))
    }

    fn u64(&mut self) -> io::Result<u64> {
        Ok(u64_at(&self.bytes(8)?, 0))
    }
}

/// A connection to an NBD server.
#[derive(Debug)]
pub struct RawNbd {
    sender: Sender,
    receiver: Receiver,
    export: Export,
    contexts: BTreeMap<String, u32>,
    cookies: u64,
}

impl RawNbd {
    /// Connects and exchanges the flags of the handshake: fixed newstyle, no zeroes.
    pub fn connect(path: &Path) -> Self {
        let mut nbd = Self::connect_silently(path);
        let greeting = nbd.receive_raw(18).expect("the greeting of the server");
        assert_eq!(&greeting[..16], b"NBDMAGICIHAVEOPT");
        assert_eq!(
            greeting[16..],
            [0, 3],
            "fixed newstyle and no zeroes are offered"
        );
        nbd.send_raw(&3u32.to_be_bytes())
            .expect("the server reads our flags");
        nbd
    }

    /// Connects, and says nothing yet.
    pub fn connect_silently(path: &Path) -> Self {
        let stream = UnixStream::connect(path)
            .unwrap_or_else(|error| panic!("cannot connect to {}: {error}", path.display()));
        // A server that does not answer is a failure, not a hang.
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream.set_write_timeout(Some(PATIENCE)).unwrap();
        let reads = Arc::<Mutex<HashMap<u64, u32>>>::default();
        Self {
            sender: Sender {
                stream: stream.try_clone().unwrap(),
                extended: false,
                reads: Arc::clone(&reads),
            },
            receiver: Receiver {
                stream: io::BufReader::new(stream),
                structured: false,
                extended: false,
                reads,
                partial: HashMap::new(),
            },
            export: Export::default(),
            contexts: BTreeMap::new(),
            cookies: 0,
        }
    }

    /// Connects, negotiates all that we know, and opens an export with these contexts.
    #[track_caller]
    pub fn open(path: &Path, name: &str, contexts: &[&str]) -> Self {
        Self::try_open(path, name, contexts)
            .unwrap_or_else(|kind| panic!("export {name:?} is refused with {kind:#x}"))
    }

    /// The same for an export that may be refused.
    pub fn try_open(path: &Path, name: &str, contexts: &[&str]) -> Result<Self, u32> {
        let mut nbd = Self::connect(path);
        nbd.structured_replies();
        if !contexts.is_empty() {
            nbd.set_contexts(name, contexts)?;
        }
        nbd.go(name)?;
        Ok(nbd)
    }

    /// Sends an option.
    pub fn send_option(&mut self, option: u32, data: &[u8]) {
        let mut message = OPTION_MAGIC.to_vec();
        message.extend(option.to_be_bytes());
        message.extend((data.len() as u32).to_be_bytes());
        message.extend(data);
        self.send_raw(&message).expect("the server reads options");
    }

    /// Receives one reply to an option.
    pub fn option_reply(&mut self) -> io::Result<OptionReply> {
        let magic = self.receiver.u64()?;
        assert_eq!(magic, OPTION_REPLY_MAGIC, "expected a reply to an option");
        let (option, kind) = (self.receiver.u32()?, self.receiver.u32()?);
        let length = self.receiver.u32()?;
        Ok(OptionReply {
            option,
            kind,
            data: self.receiver.bytes(length as usize)?,
        })
    }

    /// Sends an option and receives its replies up to the acknowledgement, or the error.
    pub fn option(&mut self, option: u32, data: &[u8]) -> Result<Vec<OptionReply>, u32> {
        self.send_option(option, data);
        let mut replies = Vec::new();
        loop {
            let reply = self.option_reply().expect("a reply to the option");
            assert_eq!(reply.option, option, "a reply to another option");
            match reply.kind {
                rep::ACK => return Ok(replies),
                kind if kind & 1 << 31 != 0 => return Err(kind),
                _ => replies.push(reply),
            }
        }
    }

    /// Asks for structured replies.
    pub fn structured_replies(&mut self) {
        self.option(option::STRUCTURED_REPLY, &[])
            .expect("structured replies are acknowledged");
        self.receiver.structured = true;
    }

    /// The exports that the server lists, with their descriptions.
    pub fn list(&mut self) -> Result<Vec<(String, String)>, u32> {
        let replies = self.option(option::LIST, &[])?;
        Ok(replies
            .iter()
            .map(|reply| {
                assert_eq!(reply.kind, rep::SERVER);
                let (name, text) = reply.data[4..].split_at(u32_at(&reply.data, 0) as usize);
                (text_of(name), text_of(text))
            })
            .collect())
    }

    /// The contexts of an export that match these queries.
    pub fn list_contexts(&mut self, name: &str, queries: &[&str]) -> Result<Vec<String>, u32> {
        let replies = self.option(option::LIST_META_CONTEXT, &context_queries(name, queries))?;
        Ok(contexts_of(&replies).map(|(_, context)| context).collect())
    }

    /// Selects the contexts of an export that match these queries, and returns them.
    pub fn set_contexts(&mut self, name: &str, queries: &[&str]) -> Result<Vec<String>, u32> {
        let replies = self.option(option::SET_META_CONTEXT, &context_queries(name, queries))?;
        self.contexts = contexts_of(&replies)
            .map(|(id, context)| (context, id))
            .collect();
        Ok(contexts_of(&replies).map(|(_, context)| context).collect())
    }

    /// Asks about an export and stays in the handshake.
    pub fn info(&mut self, name: &str) -> Result<Export, u32> {
        let replies = self.option(option::INFO, &info_request(name))?;
        Ok(export_of(&replies))
    }

    /// Opens an export; requests may follow.
    pub fn go(&mut self, name: &str) -> Result<Export, u32> {
        let replies = self.option(option::GO, &info_request(name))?;
        self.export = export_of(&replies);
        Ok(self.export.clone())
    }

    /// Opens an export in the old way, which has no way to refuse but hanging up.
    pub fn export_name(&mut self, name: &str) -> io::Result<Export> {
        self.send_option(option::EXPORT_NAME, name.as_bytes());
        let (size, flags) = (self.receiver.u64()?, self.receiver.u16()?);
        self.export = Export {
            size,
            flags,
            ..Export::default()
        };
        Ok(self.export.clone())
    }

    /// What is known about the open export.
    pub fn export(&self) -> &Export {
        &self.export
    }

    /// The id of a selected context.
    #[track_caller]
    pub fn context(&self, name: &str) -> u32 {
        *self
            .contexts
            .get(name)
            .unwrap_or_else(|| panic!("context {name} was not selected"))
    }

    /// Sends one request and returns its answer. Nothing else may be in flight.
    pub fn call(
        &mut self,
        command_and_flags: (u16, u16),
        offset: u64,
        length: u32,
        payload: &[u8],
    ) -> Answer {
        self.cookies += 1;
        self.sender
            .request(command_and_flags, self.cookies, offset, length, payload)
            .expect("the server takes requests");
        self.answer_at(offset)
    }

    fn answer_at(&mut self, offset: u64) -> Answer {
        let answer = self.receiver.answer().expect("the server answers");
        assert_eq!(answer.cookie, self.cookies, "the answer to another request");
        let echoed = self.sender.extended.then_some(offset);
        let told = answer.chunks.iter().map(|chunk| chunk.request_offset);
        assert!(told.into_iter().all(|told| told == echoed), "{answer:?}");
        answer
    }

    /// Reads.
    #[track_caller]
    pub fn read(&mut self, offset: u64, length: u32) -> Result<Vec<u8>, u32> {
        self.call((command::READ, 0), offset, length, &[])
            .data(offset, length)
    }

    /// Reads everything.
    #[track_caller]
    pub fn read_all(&mut self) -> Vec<u8> {
        let mut bytes = Vec::new();
        while (bytes.len() as u64) < self.export.size {
            let offset = bytes.len() as u64;
            let length = (self.export.size - offset).min(1 << 20) as u32;
            bytes.extend(self.read(offset, length).expect("the export can be read"));
        }
        bytes
    }

    /// Writes.
    pub fn write(&mut self, offset: u64, bytes: &[u8]) -> Result<(), u32> {
        self.call((command::WRITE, 0), offset, bytes.len() as u32, bytes)
            .done()
    }

    /// Flushes.
    pub fn flush(&mut self) -> Result<(), u32> {
        self.call((command::FLUSH, 0), 0, 0, &[]).done()
    }

    /// Trims.
    pub fn trim(&mut self, offset: u64, length: u32) -> Result<(), u32> {
        self.call((command::TRIM, 0), offset, length, &[]).done()
    }

    /// Writes zeroes.
    pub fn zeroes(&mut self, offset: u64, length: u32, flags: u16) -> Result<(), u32> {
        self.call((command::WRITE_ZEROES, flags), offset, length, &[])
            .done()
    }

    /// Caches.
    pub fn cache(&mut self, offset: u64, length: u32) -> Result<(), u32> {
        self.call((command::CACHE, 0), offset, length, &[]).done()
    }

    /// The extents of each selected context by its id.
    pub fn block_status(
        &mut self,
        offset: u64,
        length: u32,
        flags: u16,
    ) -> Result<BTreeMap<u32, Vec<(u32, u32)>>, u32> {
        self.call((command::BLOCK_STATUS, flags), offset, length, &[])
            .extents()
    }

    /// The map of the whole export in one context, neighbours merged.
    #[track_caller]
    pub fn map(&mut self, context: &str) -> Vec<Extent> {
        let id = self.context(context);
        let mut map: Vec<Extent> = Vec::new();
        let mut offset = 0;
        while offset < self.export.size {
            let length = (self.export.size - offset).min(1 << 31) as u32;
            let extents = self
                .block_status(offset, length, 0)
                .expect("the block status");
            for &(length, flags) in &extents[&id] {
                match map.last_mut() {
                    Some(last) if last.2 == flags => last.1 += u64::from(length),
                    _ => map.push((offset, u64::from(length), flags)),
                }
                offset += u64::from(length);
            }
        }
        map
    }

    /// Says good-bye, and sees the server hang up.
    pub fn disconnect(mut self) {
        self.sender
            .disconnect()
            .expect("the server reads our good-bye");
        assert!(self.is_closed(), "the server hangs up after a good-bye");
    }

    /// Whether the server has hung up; waits for it or for a byte.
    pub fn is_closed(&mut self) -> bool {
        match self.receiver.bytes(1) {
            Ok(_) => false,
            Err(error) => matches!(
                error.kind(),
                io::ErrorKind::UnexpectedEof | io::ErrorKind::ConnectionReset
            ),
        }
    }

    /// Hangs up without a word.
    pub fn hang_up(self) {
        // The other side may have been quicker.
        let _ = self.sender.stream.shutdown(Shutdown::Both);
    }

    /// Sends anything.
    pub fn send_raw(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.sender.raw(bytes)
    }

    /// Receives so many bytes.
    pub fn receive_raw(&mut self, length: usize) -> io::Result<Vec<u8>> {
        self.receiver.bytes(length)
    }

    /// Both halves, for many requests in flight.
    pub fn split(self) -> (Sender, Receiver) {
        (self.sender, self.receiver)
    }

    /// Both halves, borrowed.
    pub fn halves(&mut self) -> (&mut Sender, &mut Receiver) {
        (&mut self.sender, &mut self.receiver)
    }
}

fn info_request(name: &str) -> Vec<u8> {
    let mut data = sized(name);
    let wanted = [info::NAME, info::DESCRIPTION, info::BLOCK_SIZE];
    data.extend((wanted.len() as u16).to_be_bytes());
    data.extend(wanted.iter().flat_map(|kind| kind.to_be_bytes()));
    data
}

fn context_queries(name: &str, queries: &[&str]) -> Vec<u8> {
    let mut data = sized(name);
    data.extend((queries.len() as u32).to_be_bytes());
    data.extend(queries.iter().flat_map(|query| sized(query)));
    data
}

fn sized(text: &str) -> Vec<u8> {
    let mut data = (text.len() as u32).to_be_bytes().to_vec();
    data.extend(text.as_bytes());
    data
}

fn export_of(replies: &[OptionReply]) -> Export {
    let mut export = Export::default();
    let mut described = false;
    for data in replies
        .iter()
        .filter(|reply| reply.kind == rep::INFO)
        .map(|reply| &reply.data)
    {
        match u16_at(data, 0) {
            info::EXPORT => {
                described = true;
                export.size = u64_at(data, 2);
                export.flags = u16_at(data, 10);
            }
            info::DESCRIPTION => export.description = Some(text_of(&data[2..])),
            info::BLOCK_SIZE => {
                export.block_sizes = Some([2, 6, 10].map(|start| u32_at(data, start)));
            }
            _ => {}
        }
    }
    assert!(described, "the size and flags of an export are always told");
    export
}

fn contexts_of(replies: &[OptionReply]) -> impl Iterator<Item = (u32, String)> {
    replies
        .iter()
        .filter(|reply| reply.kind == rep::META_CONTEXT)
        .map(|reply| (u32_at(&reply.data, 0), text_of(&reply.data[4..])))
}

fn text_of(bytes: &[u8]) -> String {
    String::from_utf8(bytes.to_vec()).expect("UTF-8")
}

fn u16_at(bytes: &[u8], start: usize) -> u16 {
    u16::from_be_bytes(bytes[start..start + 2].try_into().expect("two bytes"))
}

fn u32_at(bytes: &[u8], start: usize) -> u32 {
    u32::from_be_bytes(bytes[start..start + 4].try_into().expect("four bytes"))
}

fn u64_at(bytes: &[u8], start: usize) -> u64 {
    u64::from_be_bytes(bytes[start..start + 8].try_into().expect("eight bytes"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tools::with_nbdkit;

    #[test]
    fn what_is_written_to_someone_elses_server_is_read_back() {
        with_nbdkit(&["memory", "1M"], |socket| {
            let mut nbd = RawNbd::open(socket, "", &["base:allocation"]);
            assert_eq!(nbd.export().size, 1 << 20);
            nbd.write(65536, &[7; 3000]).unwrap();
            let bytes = nbd.read(65000, 4096).unwrap();
            assert_eq!(bytes[..536], [0; 536]);
            assert_eq!(bytes[536..3536], [7; 3000]);
            assert_eq!(nbd.read_all().len(), 1 << 20);
            assert_eq!(nbd.read(1 << 20, 1), Err(errno::EINVAL));
            let map = nbd.map("base:allocation");
            assert_eq!(map.iter().map(|extent| extent.1).sum::<u64>(), 1 << 20);
            assert!(map.len() > 1, "{map:?}");
            nbd.disconnect();
        });
    }

    #[test]
    fn a_client_that_negotiates_nothing_gets_simple_replies() {
        with_nbdkit(&["memory", "1M"], |socket| {
            let mut nbd = RawNbd::connect(socket);
            let export = nbd.export_name("").unwrap();
            assert_eq!(export.size, 1 << 20);
            nbd.write(0, &[1; 512]).unwrap();
            assert_eq!(nbd.read(0, 512).unwrap(), [1; 512]);
        });
    }
}
