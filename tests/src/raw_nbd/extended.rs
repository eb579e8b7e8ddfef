//! The same client with extended headers.

use std::collections::BTreeMap;
use std::io;
use std::path::Path;

use super::RawNbd;
use super::constants::{chunk, command, flag, option};
use super::transmission::{
    Answer, Chunk, EXTENDED_REQUEST_MAGIC, Receiver, Sender, u32_at, u64_at,
};

/// What each context says, by its id: lengths and flags.
pub type Extents = BTreeMap<u32, Vec<(u64, u64)>>;

impl Sender {
    /// Sends one request with an extended header, with any flags and any payload.
    pub fn extended(
        &mut self,
        (command, flags): (u16, u16),
        cookie: u64,
        offset: u64,
        length: u64,
        payload: &[u8],
    ) -> io::Result<()> {
        let mut message = Vec::with_capacity(32 + payload.len());
        message.extend(EXTENDED_REQUEST_MAGIC.to_be_bytes());
        message.extend(flags.to_be_bytes());
        message.extend(command.to_be_bytes());
        message.extend(cookie.to_be_bytes());
        message.extend(offset.to_be_bytes());
        message.extend(length.to_be_bytes());
        message.extend(payload);
        self.raw(&message)
    }
}

impl Receiver {
    /// What follows the magic.
    pub(super) fn extended(&mut self) -> io::Result<Chunk> {
        let flags_and_kind = (self.u16()?, self.u16()?);
        let (cookie, offset, length) = (self.u64()?, self.u64()?, self.u64()?);
        self.rest_of_chunk(flags_and_kind, cookie, Some(offset), length)
    }
}

impl Answer {
    /// The extents of each context as extended chunks tell them, and no others.
    pub fn extended_extents(&self) -> Result<Extents, u32> {
        self.done()?;
        let mut contexts = BTreeMap::new();
        for part in &self.chunks {
            assert_eq!(part.kind, chunk::BLOCK_STATUS_EXT, "kind of a chunk");
            let (id, count) = (u32_at(&part.payload, 0), u32_at(&part.payload, 4));
            assert!(count > 0, "a context without extents");
            assert_eq!(part.payload.len(), 8 + 16 * count as usize, "{count}");
            let extents: Vec<_> = part.payload[8..]
                .chunks(16)
                .map(|e| (u64_at(e, 0), u64_at(e, 8)))
                .collect();
            assert!(extents.iter().all(|e| e.0 > 0), "{extents:?}");
            let before = contexts.insert(id, extents);
            assert!(before.is_none(), "a context was answered twice");
        }
        Ok(contexts)
    }
}

impl RawNbd {
    /// Asks for extended headers.
    pub fn extended_headers(&mut self) {
        self.option(option::EXTENDED_HEADERS, &[])
            .expect("extended headers are acknowledged");
        self.sender.extended = true;
        self.receiver.extended = true;
    }

    /// Connects, agrees on extended headers, and opens an export with these contexts.
    #[track_caller]
    pub fn open_extended(path: &Path, name: &str, contexts: &[&str]) -> Self {
        let mut nbd = Self::connect(path);
        nbd.extended_headers();
        if !contexts.is_empty() {
            nbd.set_contexts(name, contexts)
                .expect("the contexts can be selected");
        }
        nbd.go(name).expect("the export can be opened");
        nbd
    }

    /// Sends one request with an extended header and returns its answer. Nothing else may be in
    /// flight.
    pub fn call_extended(
        &mut self,
        command_and_flags: (u16, u16),
        offset: u64,
        length: u64,
        payload: &[u8],
    ) -> Answer {
        self.cookies += 1;
        self.sender
            .extended(command_and_flags, self.cookies, offset, length, payload)
            .expect("the server takes requests");
        self.answer_at(offset)
    }

    /// The extents of each selected context by its id.
    pub fn extended_status(
        &mut self,
        offset: u64,
        length: u64,
        flags: u16,
    ) -> Result<Extents, u32> {
        self.call_extended((command::BLOCK_STATUS, flags), offset, length, &[])
            .extended_extents()
    }

    /// The extents of the contexts with these ids.
    pub fn status_of(&mut self, offset: u64, length: u64, ids: &[u32]) -> Result<Extents, u32> {
        let payload = status_payload(length, ids);
        let asked = (command::BLOCK_STATUS, flag::PAYLOAD_LEN);
        self.call_extended(asked, offset, payload.len() as u64, &payload)
            .extended_extents()
    }
}

/// The payload of a block status of some contexts.
pub fn status_payload(length: u64, ids: &[u32]) -> Vec<u8> {
    let mut payload = length.to_be_bytes().to_vec();
    payload.extend(ids.iter().flat_map(|id| id.to_be_bytes()));
    payload
}
