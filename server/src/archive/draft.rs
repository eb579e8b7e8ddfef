//! A point that is being made.

use std::ops::Range;
use std::sync::Arc;

use bytes::Bytes;

use super::error::ArchiveError;
use super::manifest::Point;
use super::plan::{DiskPlan, Plan};

/// A point that is being made: all disks of one instant, or, until it is finished, none.
///
/// Dropped, it stays where it is, and can go on in another process.
#[derive(Debug)]
pub struct Draft {
    plan: Plan,
    disks: Vec<Arc<DiskDraft>>,
}

/// One disk of it. Shared by all threads that fetch.
#[derive(Debug)]
pub struct DiskDraft {
    plan: DiskPlan,
}

/// What is fetched, hashed and stored together.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Chunk {
    /// Which one of the disk: its place divided by the chunk size.
    pub index: u64,
    /// The data in it, by whole clusters; at most a chunk size in all.
    pub runs: Vec<Range<u64>>,
}

/// A piece of a chunk as it comes from a source.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum Piece {
    /// These bytes.
    Data(Bytes),
    /// So many zeroes.
    Zero(u64),
}

/// What an interrupted run has left in a folder.
#[derive(Debug)]
pub enum Leftover {
    /// Nothing.
    Nothing,
    /// A point that can go on.
    Interrupted(Interrupted),
    /// Something that could not go on, for this reason; it has been removed.
    Removed(String),
}

/// A point whose making was interrupted.
#[derive(Debug)]
pub struct Interrupted {
    plan: Plan,
}

/// Hears how far a long operation is, and may stop it.
pub trait Progress: Sync {
    /// So many more bytes were read back and are what they should be.
    fn checked(&self, bytes: u64) {
        let _ = bytes;
    }

    /// Whether to stop with [`ArchiveError::Stopped`].
    fn is_stopped(&self) -> bool {
        false
    }
}

/// Nobody watches.
impl Progress for () {}

impl Interrupted {
    /// What it was to hold.
    pub fn plan(&self) -> &Plan {
        &self.plan
    }

    /// Goes on with it: reads back what is stored, and keeps what is right.
    pub fn go_on(self, progress: &dyn Progress) -> Result<Draft, ArchiveError> {
        let _ = progress;
        todo!()
    }

    /// Removes it.
    pub fn discard(self) -> Result<(), ArchiveError> {
        todo!()
    }
}

impl Draft {
    /// What it is to hold.
    pub fn plan(&self) -> &Plan {
        &self.plan
    }

    /// Its disks, in the order of the plan.
    pub fn disks(&self) -> &[Arc<DiskDraft>] {
        &self.disks
    }

    /// Syncs, drops what is cached, reads back, compares with the hashes of what was received, and
    /// publishes. When this returns a point, it is durable. After an error it stays as it is, and
    /// another run goes on with it.
    pub fn finish(self, progress: &dyn Progress) -> Result<Point, ArchiveError> {
        let _ = progress;
        todo!()
    }

    /// Removes it.
    pub fn discard(self) -> Result<(), ArchiveError> {
        todo!()
    }
}

impl DiskDraft {
    /// What it is to hold.
    pub fn plan(&self) -> &DiskPlan {
        &self.plan
    }

    /// How many bytes of data it is to hold, rounded out to clusters; and how many are there.
    pub fn data_bytes(&self) -> (u64, u64) {
        todo!()
    }

    /// The chunks that are not there yet, ascending.
    pub fn chunks(&self) -> impl Iterator<Item = Chunk> + '_ {
        std::iter::empty()
    }

    /// Takes the contents of a chunk: the bytes of its runs in order, in pieces of any length. Any
    /// thread may, in any order.
    pub fn put(&self, chunk: &Chunk, data: &[Piece]) -> Result<(), ArchiveError> {
        let _ = (chunk, data);
        todo!()
    }
}
