use std::io;
use std::ops::Range;

use bytes::Bytes;

/// A number of bytes that can be read and written by offset, and that can only grow.
///
/// Ranges are in bytes and lie within [`size`](Self::size). Futures are not `Send`: each is driven
/// to its end on the thread that began it. A call that was polled once takes effect even if its
/// future is dropped, or has no effect.
pub trait Storage: 'static {
    /// The size in bytes.
    fn size(&self) -> u64;

    /// Makes it `size` bytes long, if it was shorter; what is new may hold anything. Where the size is
    /// not ours to choose, it must be that by now.
    fn grow(&self, size: u64) -> impl Future<Output = io::Result<()>> {
        let _ = size;
        std::future::ready(Err(io::ErrorKind::Unsupported.into()))
    }

    /// Fills `buffer` with what is at `offset`.
    fn read(&self, offset: u64, buffer: &mut [u8]) -> impl Future<Output = io::Result<()>>;

    /// Puts `data` at `offset`.
    fn write(&self, offset: u64, data: &Bytes) -> impl Future<Output = io::Result<()>>;

    /// Makes `range` read as zeroes.
    fn zero(&self, range: Range<u64>, how: Zeroing) -> impl Future<Output = io::Result<()>>;

    /// Makes durable what was written before the call. After an error a repeat that succeeds proves
    /// nothing, unless it was [`Unreachable`](crate::Unreachable).
    fn sync(&self) -> impl Future<Output = io::Result<()>>;

    /// What of `range` takes space, from its start on: at least one extent, as many as are cheap to
    /// tell, and adjacent.
    ///
    /// A hole reads as zeroes, and stays one until something in it, or in the same block of the
    /// file system, is written.
    fn extents(&self, range: Range<u64>) -> impl Future<Output = io::Result<Vec<Extent>>>;

    /// What may change although nobody writes it: storage elsewhere may still perform writes that were
    /// given up, or that were repeated. A range that belongs here does so before the call that was
    /// about it returns.
    fn unsettled(&self) -> Vec<Range<u64>> {
        Vec::new()
    }

    /// Whether it may lose, while it is used, what was written and not synced, as storage on another
    /// machine does when that is killed together with this process.
    fn is_elsewhere(&self) -> bool {
        false
    }
}

/// A stretch that is wholly a hole, or wholly not.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Extent {
    /// In bytes.
    pub range: Range<u64>,
    /// Whether it takes no space, and so reads as zeroes.
    pub hole: bool,
}

/// Whether all of `bytes` are zero.
pub fn is_zero(bytes: &[u8]) -> bool {
    // Wide words and no early exit within a block, which the compiler turns into vector code.
    bytes
        .chunks(256)
        .all(|block| block.iter().fold(0, |all, byte| all | byte) == 0)
}

/// What zeroing may do to the space that was in use.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Zeroing {
    /// Give it back; write zeroes where that is impossible.
    MayUnmap,
    /// Keep it in use; write zeroes where that takes it.
    Keep,
    /// Give it back or fail, with [`io::ErrorKind::Unsupported`]: zeroes are never written.
    FastMayUnmap,
    /// Keep it in use, without writing zeroes, or fail with [`io::ErrorKind::Unsupported`].
    FastKeep,
}

impl Zeroing {
    /// Whether the space may be given back.
    pub fn unmaps(self) -> bool {
        matches!(self, Self::MayUnmap | Self::FastMayUnmap)
    }

    /// Whether writing zeroes is out of the question.
    pub fn fast(self) -> bool {
        matches!(self, Self::FastMayUnmap | Self::FastKeep)
    }
}
