//! One request under way: what it may be answered by, and what it has been answered by so far.

use std::ops::Range;

use bytes::Bytes;

use super::assembly::{Assembly, FRAGMENT_MIN, FRAGMENTS_FREE, Piece};
use super::header::Announced;
use super::session::{ERROR_CHUNK_MAX, Failure, Outcome};
use super::status::StatusAssembly;
use super::violation::ServerViolation;
use crate::errno::Errno;
use crate::incoming_reply::Chunk;
use crate::violation::Violation;
use crate::wire::chunk;

/// A request without a complete reply.
#[derive(Debug)]
pub(crate) struct Pending {
    command: u16,
    range: Range<u64>,
    chunks_left: u64,
    failure: Option<Failure>,
    gathered: Gathered,
}

/// What a request is there for.
#[derive(Debug)]
pub(crate) enum Gathered {
    /// To be done.
    Nothing,
    Data(Assembly),
    Status(StatusAssembly),
}

impl Pending {
    pub(crate) fn new(command: u16, range: Range<u64>, gathered: Gathered) -> Self {
        let length = range.end - range.start;
        let chunks_left = match &gathered {
            Gathered::Nothing => FRAGMENTS_FREE,
            Gathered::Data(_) => FRAGMENTS_FREE + length / FRAGMENT_MIN,
            Gathered::Status(status) => FRAGMENTS_FREE + status.contexts(),
        };
        Self {
            command,
            range,
            chunks_left,
            failure: None,
            gathered,
        }
    }

    /// How much data a simple reply has that says that it succeeded.
    pub(crate) fn simple_data(&self) -> u64 {
        match &self.gathered {
            Gathered::Data(_) => self.range.end - self.range.start,
            Gathered::Nothing | Gathered::Status(_) => 0,
        }
    }

    /// Whether a simple reply will do where replies can be structured.
    pub(crate) fn may_be_simple(&self, succeeded: bool) -> bool {
        match &self.gathered {
            Gathered::Nothing => true,
            Gathered::Data(_) => false,
            Gathered::Status(_) => !succeeded,
        }
    }

    /// Checks what a chunk announces, before its payload is waited for: no more is ever received
    /// than this request can have for an answer.
    pub(crate) fn expect(&self, announced: Announced) -> Result<(), ServerViolation> {
        let longest = match (announced.kind, &self.gathered) {
            (chunk::NONE, _) if !announced.done => return Err(ServerViolation::EmptyChunk),
            (chunk::NONE, _) => 0,
            (chunk::OFFSET_DATA, Gathered::Data(_)) => 8 + self.data_left(),
            (chunk::OFFSET_HOLE, Gathered::Data(_)) => 8 + 4,
            (chunk::BLOCK_STATUS, Gathered::Status(status)) => 4 + 8 * status.room(),
            (chunk::BLOCK_STATUS_EXTENDED, Gathered::Status(status)) => 8 + 16 * status.room(),
            (kind, _) if kind & chunk::ERROR_BIT != 0 => ERROR_CHUNK_MAX,
            (kind, _) => return Err(self.unexpected(kind)),
        };
        if announced.length > longest {
            return Err(too_long(announced));
        }
        Ok(())
    }

    /// Checks what an extended reply repeats.
    pub(crate) fn check_offset(&self, found: Option<u64>) -> Result<(), ServerViolation> {
        let expected = self.range.start;
        match found {
            Some(found) if found != expected => {
                Err(ServerViolation::RequestOffset { expected, found })
            }
            _ => Ok(()),
        }
    }

    /// Takes in a chunk that was expected.
    pub(crate) fn add(&mut self, chunk: Chunk) -> Result<(), ServerViolation> {
        self.chunks_left = self
            .chunks_left
            .checked_sub(1)
            .ok_or(ServerViolation::TooManyChunks)?;
        match (chunk, &mut self.gathered) {
            (Chunk::None, _) => Ok(()),
            (
                Chunk::Error {
                    errno,
                    text,
                    offset,
                },
                _,
            ) => self.fail(errno, text, offset),
            (Chunk::Data { offset, data }, Gathered::Data(assembly)) => {
                assembly.add(Piece::Data { offset, data })
            }
            (Chunk::Hole { offset, length }, Gathered::Data(assembly)) => {
                assembly.add(Piece::Hole { offset, length })
            }
            (Chunk::BlockStatus { context, extents }, Gathered::Status(status)) => {
                status.add(context, extents)
            }
            (Chunk::Data { .. }, _) => Err(self.unexpected(chunk::OFFSET_DATA)),
            (Chunk::Hole { .. }, _) => Err(self.unexpected(chunk::OFFSET_HOLE)),
            (Chunk::BlockStatus { .. }, _) => Err(self.unexpected(chunk::BLOCK_STATUS)),
        }
    }

    /// Takes in all the data of a read at once.
    pub(crate) fn add_all(&mut self, data: Bytes) -> Result<(), ServerViolation> {
        let offset = self.range.start;
        self.add(Chunk::Data { offset, data })
    }

    /// The first error is the one that is told; further ones change nothing.
    pub(crate) fn fail(
        &mut self,
        errno: Errno,
        text: String,
        offset: Option<u64>,
    ) -> Result<(), ServerViolation> {
        if let Some(offset) = offset.filter(|offset| !self.range.contains(offset)) {
            return Err(ServerViolation::OutsideRequest { offset, length: 0 });
        }
        self.failure.get_or_insert(Failure {
            errno,
            text,
            offset,
        });
        Ok(())
    }

    /// What came of it, now that nothing more will be said.
    pub(crate) fn finish(self) -> Result<Result<Outcome, Failure>, ServerViolation> {
        if let Some(failure) = self.failure {
            return Ok(Err(failure));
        }
        Ok(Ok(match self.gathered {
            Gathered::Nothing => Outcome::Done,
            Gathered::Data(assembly) => Outcome::Data(assembly.finish()?),
            Gathered::Status(status) => Outcome::BlockStatus(status.finish()?),
        }))
    }

    fn data_left(&self) -> u64 {
        match &self.gathered {
            Gathered::Data(assembly) => assembly.missing(),
            Gathered::Nothing | Gathered::Status(_) => 0,
        }
    }

    fn unexpected(&self, kind: u16) -> ServerViolation {
        ServerViolation::ChunkKind {
            kind,
            command: self.command,
        }
    }
}

/// Data that is too long is about something else than what was asked for, or comes twice.
fn too_long(announced: Announced) -> ServerViolation {
    let violation = Violation::ChunkLength {
        kind: announced.kind,
        length: announced.length,
    };
    violation.into()
}
