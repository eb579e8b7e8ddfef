//! An NBD client by hand, one message at a time.
//!
//! Written from the protocol document, blocking, and free to be rude: a test can send anything and
//! see exactly what comes back. [`RawNbd`] is the pair of its two halves, [`Sender`] and
//! [`Receiver`], which can go to different threads.

mod constants;

mod negotiation;

mod transmission;

pub mod extended;

use std::collections::BTreeMap;
use std::io;
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::path::Path;

pub use constants::{can, chunk, command, errno, flag, info, option, rep};
pub use negotiation::{Export, OptionReply};
pub use transmission::{Answer, Chunk, Receiver, Sender};

use crate::Extent;
use crate::process::PATIENCE;

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
        let (sender, receiver) = transmission::halves(stream);
        Self {
            sender,
            receiver,
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
