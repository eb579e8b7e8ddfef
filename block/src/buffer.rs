//! Memory for what goes to a device and comes from one.

use std::cell::RefCell;
use std::ops::{Deref, DerefMut, Range};

use memmap2::MmapMut;

/// So many bytes in memory, aligned as direct I/O wants them.
///
/// What is in them at first is left from an earlier use. A buffer goes back to the thread that drops
/// it: the first touch of new memory costs more than a small transfer.
#[derive(Debug)]
pub struct Buffer {
    memory: Memory,
    place: Range<usize>,
}

/// It never grows, so that what it points to stays where it is.
#[derive(Debug)]
enum Memory {
    Heap(Vec<u8>),
    /// What is long has pages of its own: freed in a heap, they would stay with the process as long as
    /// anything behind them is in use.
    Pages(MmapMut),
}

impl Buffer {
    /// Of `length` bytes.
    pub fn of(length: usize) -> Self {
        let memory = LEFT.with_borrow_mut(|left| left.take(length));
        let memory = memory.unwrap_or_else(|| Memory::new(class(length)));
        let start = memory.as_ptr().align_offset(ALIGNMENT);
        Self {
            memory,
            place: start..start + length,
        }
    }
}

impl Deref for Buffer {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.memory[self.place.clone()]
    }
}

impl DerefMut for Buffer {
    fn deref_mut(&mut self) -> &mut [u8] {
        &mut self.memory[self.place.clone()]
    }
}

impl AsRef<[u8]> for Buffer {
    fn as_ref(&self) -> &[u8] {
        self
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        let memory = std::mem::replace(&mut self.memory, Memory::Heap(Vec::new()));
        // A thread that ends keeps nothing.
        let _ = LEFT.try_with(|left| left.borrow_mut().put(memory));
    }
}

impl Memory {
    /// Of at least this many bytes, from a multiple of the alignment on.
    fn new(length: usize) -> Self {
        if length > SHORT_MAX
            && let Ok(pages) = MmapMut::map_anon(length)
        {
            return Self::Pages(pages);
        }
        Self::Heap(vec![0; length + ALIGNMENT])
    }

    /// What [`class`] it is of.
    fn class(&self) -> usize {
        match self {
            Self::Heap(bytes) => bytes.len().saturating_sub(ALIGNMENT),
            Self::Pages(pages) => pages.len(),
        }
    }
}

impl Deref for Memory {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        match self {
            Self::Heap(bytes) => bytes,
            Self::Pages(pages) => pages,
        }
    }
}

impl DerefMut for Memory {
    fn deref_mut(&mut self) -> &mut [u8] {
        match self {
            Self::Heap(bytes) => bytes,
            Self::Pages(pages) => pages,
        }
    }
}

/// What a thread has left over.
#[derive(Default)]
struct Left {
    memory: Vec<Memory>,
    bytes: usize,
}

impl Left {
    fn take(&mut self, length: usize) -> Option<Memory> {
        let wanted = class(length);
        // What was used last is still in the processor's cache.
        let at = self.memory.iter().rposition(|it| it.class() == wanted)?;
        self.bytes -= self.memory[at].len();
        Some(self.memory.remove(at))
    }

    fn put(&mut self, memory: Memory) {
        if !memory.is_empty() && self.bytes + memory.len() <= LEFT_MAX {
            self.bytes += memory.len();
            self.memory.push(memory);
        }
    }
}

/// Short ones are rounded up to a power of two, so that one serves for another. Of long ones most are as
/// long as the last, and others should not take twice what they need.
fn class(length: usize) -> usize {
    match length {
        ..=SHORT_MAX => length.next_power_of_two().max(ALIGNMENT),
        _ => length.next_multiple_of(ALIGNMENT),
    }
}

thread_local! {
    static LEFT: RefCell<Left> = RefCell::default();
}

/// No device wants more than a page.
pub(crate) const ALIGNMENT: usize = 4096;

/// Up to here a buffer may be twice as long as it need be.
const SHORT_MAX: usize = 32 << 10;

/// What a thread keeps for the next: what eight busy clients have on the way to their sockets.
const LEFT_MAX: usize = 8 << 20;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buffers_are_aligned_and_as_long_as_asked_for() {
        for length in [0, 1, 512, 4096, 4097, 1 << 20] {
            let mut buffer = Buffer::of(length);
            assert_eq!(buffer.len(), length);
            assert_eq!(buffer.as_ptr() as usize % ALIGNMENT, 0, "{length}");
            buffer.fill(7);
        }
    }

    #[test]
    fn memory_is_used_again_and_a_thread_keeps_a_bounded_lot_of_it() {
        let first = Buffer::of(5000);
        let place = first.as_ptr();
        drop(first);
        assert_eq!(Buffer::of(8000).as_ptr(), place, "the same class");
        drop((0..100).map(|_| Buffer::of(1 << 20)).collect::<Vec<_>>());
        let kept =
            LEFT.with_borrow(|left| (left.bytes, left.memory.iter().map(|it| it.len()).sum()));
        assert_eq!(kept.0, kept.1);
        assert!(kept.0 <= LEFT_MAX, "{kept:?}");
    }
}
