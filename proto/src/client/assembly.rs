//! A read put together from the pieces that a server sends.

use std::collections::BTreeMap;
use std::ops::Range;

use bytes::{Bytes, BytesMut};

use super::violation::ServerViolation;

/// The size of the pieces that a read is taken to come in at worst. The protocol asks servers not
/// to send smaller ones where they can help it; a read of so many times this length may have so
/// many pieces.
pub const FRAGMENT_MIN: u64 = 512;

/// So many pieces a read may have besides, however short it is.
pub const FRAGMENTS_FREE: u64 = 16;

/// A part of what was read.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum Piece {
    /// These bytes.
    Data {
        /// Where they start in the export.
        offset: u64,
        /// Never empty.
        data: Bytes,
    },
    /// Zeroes, which the server has sent as a hole.
    Hole {
        /// Where they start in the export.
        offset: u64,
        /// Never zero.
        length: u64,
    },
}

impl Piece {
    /// What part of the export it is.
    pub fn range(&self) -> Range<u64> {
        match self {
            Self::Data { offset, data } => *offset..*offset + data.len() as u64,
            Self::Hole { offset, length } => *offset..*offset + *length,
        }
    }
}

/// The bytes of pieces that follow each other, holes as zeroes. Copies nothing if it is one piece
/// of data.
pub fn into_bytes(pieces: Vec<Piece>) -> Bytes {
    let pieces = match <[Piece; 1]>::try_from(pieces) {
        Ok([Piece::Data { data, .. }]) => return data,
        Ok([hole]) => vec![hole],
        Err(pieces) => pieces,
    };
    let length: u64 = pieces.iter().map(|piece| length(&piece.range())).sum();
    let mut bytes = BytesMut::with_capacity(length as usize);
    for piece in pieces {
        match piece {
            Piece::Data { data, .. } => bytes.extend_from_slice(&data),
            Piece::Hole { length, .. } => bytes.resize(bytes.len() + length as usize, 0),
        }
    }
    bytes.freeze()
}

/// What has arrived of a read.
///
/// The pieces lie within the range and do not overlap; so they are complete exactly when their
/// lengths add up to that of the range.
#[derive(Debug)]
pub(crate) struct Assembly {
    range: Range<u64>,
    /// By where they start.
    pieces: BTreeMap<u64, Piece>,
    covered: u64,
    one_piece: bool,
}

impl Assembly {
    pub(crate) fn new(range: Range<u64>, one_piece: bool) -> Self {
        Self {
            range,
            pieces: BTreeMap::new(),
            covered: 0,
            one_piece,
        }
    }

    /// The longest data that can still come.
    pub(crate) fn missing(&self) -> u64 {
        length(&self.range) - self.covered
    }

    pub(crate) fn add(&mut self, piece: Piece) -> Result<(), ServerViolation> {
        let offset = match &piece {
            Piece::Data { offset, .. } | Piece::Hole { offset, .. } => *offset,
        };
        let length = match &piece {
            Piece::Data { data, .. } => data.len() as u64,
            Piece::Hole { length, .. } => *length,
        };
        // Compared without adding: these numbers are the server's.
        let inside = offset >= self.range.start
            && offset <= self.range.end
            && length <= self.range.end - offset;
        if !inside {
            return Err(ServerViolation::OutsideRequest { offset, length });
        }
        if self.overlaps(&(offset..offset + length)) {
            return Err(ServerViolation::Overlap { offset, length });
        }
        if self.one_piece && !self.pieces.is_empty() {
            return Err(ServerViolation::Fragmented);
        }
        self.covered += length;
        self.pieces.insert(offset, compact(piece));
        Ok(())
    }

    /// All of the range, in order, or what is missing.
    pub(crate) fn finish(self) -> Result<Vec<Piece>, ServerViolation> {
        match self.missing() {
            0 => Ok(self.pieces.into_values().collect()),
            missing => Err(ServerViolation::MissingData(missing)),
        }
    }

    fn overlaps(&self, range: &Range<u64>) -> bool {
        // What starts before its end must have ended before its start; and what starts last among
        // those ends last.
        self.pieces
            .range(..range.end)
            .next_back()
            .is_some_and(|(_, before)| before.range().end > range.start)
    }
}

/// A small piece would keep alive the whole buffer that it was received in.
fn compact(piece: Piece) -> Piece {
    match piece {
        Piece::Data { offset, data } if data.len() < COPIED_BELOW => Piece::Data {
            offset,
            data: Bytes::copy_from_slice(&data),
        },
        other => other,
    }
}

fn length(range: &Range<u64>) -> u64 {
    range.end - range.start
}

/// Half of what is received at once: so what is kept is at most some three times what it is for.
const COPIED_BELOW: usize = 32 << 10;
