//! Where a copy goes.

use crate::archive::{ArchiveError, Chunk, DiskDraft, Piece};

/// A disk that is being put together, by any number of threads.
pub(crate) trait Target: Send + Sync + 'static {
    /// How many bytes it takes in all.
    fn data_bytes(&self) -> u64;

    /// What it lacks, ascending.
    fn missing(&self) -> impl Iterator<Item = Chunk>;

    /// Takes the contents of a chunk: the bytes of its runs in order, in pieces of any length. What is
    /// taken stays, whatever comes after.
    fn put(&self, chunk: &Chunk, data: &[Piece]) -> Result<(), ArchiveError>;
}

/// In a folder of backups.
impl Target for DiskDraft {
    fn data_bytes(&self) -> u64 {
        self.data_bytes()
    }

    fn missing(&self) -> impl Iterator<Item = Chunk> {
        self.chunks()
    }

    fn put(&self, chunk: &Chunk, data: &[Piece]) -> Result<(), ArchiveError> {
        self.put(chunk, data)
    }
}
