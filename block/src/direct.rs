//! Access to a file past the page cache, at any offset and length.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bytes::Bytes;
use tokio::sync::Notify;

use crate::buffer::{ALIGNMENT, Buffer};
use crate::engine::{Data, Engine};

/// Reads and writes whole blocks, and makes them of whatever is asked for.
///
/// Whoever writes a part of a block reads it, changes it and writes it whole, and has it alone
/// meanwhile: another who wrote other bytes of the same block would lose them.
#[derive(Debug)]
pub(crate) struct Direct {
    block: u64,
    held: Mutex<Vec<Hold>>,
    left: Notify,
}

/// Blocks that someone is writing.
#[derive(Clone, Debug, Eq, PartialEq)]
struct Hold {
    range: Range<u64>,
    alone: bool,
}

/// Leave to write some blocks, until this is dropped.
struct Held<'a> {
    direct: &'a Direct,
    hold: Hold,
}

impl Direct {
    /// For a file whose blocks have `block` bytes.
    pub(crate) fn new(block: u64) -> Self {
        Self {
            block,
            held: Mutex::default(),
            left: Notify::new(),
        }
    }

    /// In bytes.
    pub(crate) fn block(&self) -> u64 {
        self.block
    }

    /// The whole blocks that `range` touches.
    fn around(&self, range: &Range<u64>) -> Range<u64> {
        range.start / self.block * self.block..range.end.next_multiple_of(self.block)
    }

    /// Fills `buffer` with what is at `offset`.
    pub(crate) async fn read(
        &self,
        (file, engine): (&Arc<File>, Engine),
        offset: u64,
        buffer: &mut [u8],
    ) -> io::Result<()> {
        let mut at = offset;
        for piece in buffer.chunks_mut(PIECE) {
            let end = at + piece.len() as u64;
            let blocks = self.around(&(at..end));
            let whole = Buffer::of((blocks.end - blocks.start) as usize);
            let whole = engine.read(file, blocks.start, whole).await?;
            let from = (at - blocks.start) as usize;
            piece.copy_from_slice(&whole[from..from + piece.len()]);
            at = end;
        }
        Ok(())
    }

    /// Puts `data` at `offset`.
    pub(crate) async fn write(
        &self,
        (file, engine): (&Arc<File>, Engine),
        offset: u64,
        data: &Bytes,
    ) -> io::Result<()> {
        for part in self.parts(offset..offset + data.len() as u64) {
            let from = (part.start - offset) as usize;
            let data = data.slice(from..from + (part.end - part.start) as usize);
            if self.is_whole(&part) {
                let _held = self.hold(part.clone(), false).await;
                let data = match data.as_ptr().align_offset(ALIGNMENT) {
                    0 => Data::Received(data),
                    _ => Data::Own(copy_of(&data)),
                };
                engine.write(file, part.start, data).await?;
            } else {
                self.change((file, engine), part, |bytes| bytes.copy_from_slice(&data))
                    .await?;
            }
        }
        Ok(())
    }

    /// Writes zeroes where `range` has parts of blocks, and `zero`es the whole ones between them.
    pub(crate) async fn zero<F: Future<Output = io::Result<()>>>(
        &self,
        (file, engine): (&Arc<File>, Engine),
        range: Range<u64>,
        zero: impl Fn(Range<u64>) -> F,
    ) -> io::Result<()> {
        let whole = self.whole(&range);
        // First what may be refused as a whole.
        if !whole.is_empty() {
            let _held = self.hold(whole.clone(), false).await;
            zero(whole.clone()).await?;
        }
        for edge in [range.start..whole.start, whole.end..range.end] {
            for part in self.parts(edge) {
                self.change((file, engine), part, |bytes| bytes.fill(0))
                    .await?;
            }
        }
        Ok(())
    }

    /// Changes a part of one block.
    async fn change(
        &self,
        (file, engine): (&Arc<File>, Engine),
        part: Range<u64>,
        change: impl FnOnce(&mut [u8]),
    ) -> io::Result<()> {
        let block = self.around(&part);
        let _held = self.hold(block.clone(), true).await;
        let whole = Buffer::of((block.end - block.start) as usize);
        let mut whole = engine.read(file, block.start, whole).await?;
        let from = (part.start - block.start) as usize;
        change(&mut whole[from..from + (part.end - part.start) as usize]);
        engine.write(file, block.start, Data::Own(whole)).await
    }

    /// The whole blocks within `range`; where there are none, an empty range in it.
    fn whole(&self, range: &Range<u64>) -> Range<u64> {
        let start = range.start.next_multiple_of(self.block).min(range.end);
        start..(range.end / self.block * self.block).max(start)
    }

    fn is_whole(&self, part: &Range<u64>) -> bool {
        self.whole(part) == *part
    }

    /// `range` in order: whole blocks, in pieces of bounded length, and parts of single ones.
    fn parts(&self, range: Range<u64>) -> impl Iterator<Item = Range<u64>> {
        let (block, whole) = (self.block, self.whole(&range));
        let mut at = range.start;
        std::iter::from_fn(move || {
            let start = at;
            at = if whole.contains(&start) {
                whole.end.min(start + PIECE as u64)
            } else {
                range.end.min((start / block + 1) * block)
            };
            (start < range.end).then_some(start..at)
        })
    }

    /// Waits until nobody has any block of `range` alone; nor in common, who wants it alone.
    async fn hold(&self, range: Range<u64>, alone: bool) -> Held<'_> {
        let hold = Hold { range, alone };
        loop {
            let left = self.left.notified();
            tokio::pin!(left);
            // Counted as waiting before the look, or an end in between would go unnoticed.
            left.as_mut().enable();
            if self.try_hold(&hold) {
                return Held { direct: self, hold };
            }
            left.await;
        }
    }

    fn try_hold(&self, wanted: &Hold) -> bool {
        let mut held = self.held();
        let free = held.iter().all(|other| {
            let apart =
                other.range.end <= wanted.range.start || wanted.range.end <= other.range.start;
            apart || !(other.alone || wanted.alone)
        });
        if free {
            held.push(wanted.clone());
        }
        free
    }

    fn held(&self) -> MutexGuard<'_, Vec<Hold>> {
        self.held.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Held<'_> {
    fn drop(&mut self) {
        let mut held = self.direct.held();
        if let Some(at) = held.iter().position(|other| *other == self.hold) {
            held.swap_remove(at);
        }
        drop(held);
        self.direct.left.notify_waiters();
    }
}

fn copy_of(data: &[u8]) -> Buffer {
    let mut copy = Buffer::of(data.len());
    copy.copy_from_slice(data);
    copy
}

/// What is moved at once. A device gains nothing from more, and each takes its size in memory.
const PIECE: usize = 1 << 20;

#[cfg(test)]
mod tests {
    use super::*;

    fn direct() -> Direct {
        Direct::new(512)
    }

    #[test]
    fn a_range_is_cut_into_whole_blocks_and_parts_of_single_ones() {
        for (range, ends) in [
            (0..1024, &[1024][..]),
            (1..1500, &[512, 1024, 1500]),
            (513..600, &[600]),
            (500..600, &[512, 600]),
            (7..7, &[]),
        ] {
            let found: Vec<u64> = direct().parts(range.clone()).map(|part| part.end).collect();
            assert_eq!(found, ends, "{range:?}");
        }
        let long = 3 * PIECE as u64 + 512;
        assert_eq!(direct().parts(0..long).count(), 4);
    }

    #[tokio::test]
    async fn a_part_of_a_block_excludes_everyone_else_from_it() {
        let direct = direct();
        let shared = direct.hold(0..1024, false).await;
        let beside = direct.hold(512..2048, false).await;
        let hold = |range, alone| Hold { range, alone };
        assert!(!direct.try_hold(&hold(512..1024, true)));
        drop((shared, beside));
        let alone = direct.hold(512..1024, true).await;
        assert!(!direct.try_hold(&hold(0..1024, false)));
        assert!(!direct.try_hold(&hold(512..1024, true)));
        let next = direct.hold(1024..2048, true).await;
        drop((alone, next));
        assert!(direct.held().is_empty());
    }

    #[tokio::test]
    async fn those_who_change_parts_of_one_block_at_once_lose_nothing_of_each_other() {
        const PARTS: u64 = 16;
        for engine in [Engine::Threads, Engine::io_uring().expect("a ring")] {
            let file = tempfile::tempfile().unwrap();
            file.set_len(4096).unwrap();
            let (file, direct) = (Arc::new(file), Arc::new(Direct::new(4096)));
            let mut writers = tokio::task::JoinSet::new();
            let tasks = tokio::task::LocalSet::new();
            for part in 0..PARTS {
                let (file, direct) = (Arc::clone(&file), Arc::clone(&direct));
                let write = async move {
                    let data = Bytes::from(vec![1; 10]);
                    direct.write((&file, engine), part * 10, &data).await
                };
                writers.spawn_local_on(write, &tasks);
            }
            let all = async { while writers.join_next().await.is_some() {} };
            tasks.run_until(all).await;
            let mut written = [0; PARTS as usize * 10];
            let read = direct.read((&file, engine), 0, &mut written).await;
            read.unwrap();
            assert!(
                written.iter().all(|byte| *byte == 1),
                "{engine:?}: {written:?}"
            );
        }
    }
}
