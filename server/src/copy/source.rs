//! Where a copy comes from.

use std::io;
use std::ops::Range;

use proto::Errno;
use proto::client::{self, Piece};
use thiserror::Error;

use crate::failure::Failure;

/// A disk of which no byte changes.
pub(crate) trait Source {
    /// In bytes.
    fn size(&self) -> u64;

    /// What follows from `offset` on, in order and without gaps: as much as can be said at once, and
    /// something unless the disk ends there.
    async fn map(&self, offset: u64) -> Result<Vec<Stretch>, SourceError>;

    /// Reads these ranges, at once where that is possible. The pieces are in the order of the ranges
    /// and cover each of them without gaps; a hole is zeroes.
    async fn read(&self, ranges: &[Range<u64>]) -> Result<Vec<Piece>, SourceError>;
}

/// A part of a disk that is all of one kind.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) struct Stretch {
    /// In bytes, never zero.
    pub(crate) length: u64,
    /// What kind.
    pub(crate) content: Content,
}

/// What a copy has to do about a part of a disk.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Content {
    /// Nothing: the base has it.
    Clean,
    /// It is to read as zeroes, and there is nothing to fetch.
    Zero,
    /// It is to be fetched.
    Data,
}

/// Why a source does not give what it was asked for.
#[derive(Debug, Error)]
pub(crate) enum SourceError {
    /// The server says no, or is gone.
    #[error(transparent)]
    Client(#[from] client::Error),
    /// The disk cannot be read.
    #[error(transparent)]
    Io(#[from] io::Error),
    /// It cannot be had at all, for a reason that whoever asked can do something about.
    #[error(transparent)]
    Unusable(#[from] Failure),
}

impl SourceError {
    /// Whether it is the connection that is lost, and not what it led to.
    pub(crate) fn is_disconnection(&self) -> bool {
        use client::Error::{Closed, Ended, Failed, Io, Leaving};
        match self {
            Self::Client(Closed | Ended | Io(_) | Leaving) => true,
            Self::Client(Failed(failure)) => failure.errno == Errno::Shutdown,
            Self::Client(_) | Self::Io(_) | Self::Unusable(_) => false,
        }
    }
}
