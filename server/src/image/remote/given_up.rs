//! Writes that the other side may still perform.
//!
//! A file of slots. Before a write is sent its range is stored in a slot, which is emptied when it is
//! answered; so whoever finds the file after a kill knows what may have been under way. Where a
//! connection is lost, what was under way on it moves to the slots of what was given up: nobody can
//! tell whether, or when, the other side performs it. There it stays until somebody knows that the
//! other side has ended it.

use std::io;
use std::ops::Range;
use std::path::Path;
use std::sync::{Mutex, MutexGuard, PoisonError};

use block::Cells;

/// Which ranges may change although nobody is known to write them.
#[derive(Debug, Default)]
pub(super) struct GivenUp(Mutex<Slots>);

#[derive(Debug, Default)]
struct Slots {
    cells: Option<Cells>,
    under_way: Vec<Option<Range<u64>>>,
    /// In order, and apart from each other.
    lost: Vec<Range<u64>>,
    /// Where they are stored.
    bank: usize,
}

impl GivenUp {
    /// Keeps account in the file at `path` from here on. What was under way for an earlier server, or
    /// given up by it, is given up; where that cannot be read, anything may have been. Of a state that
    /// is new it is nothing. All of that is durable when this returns.
    pub(super) async fn keep_at(&self, path: &Path, is_new: bool) -> io::Result<()> {
        self.open(path, is_new)?.sync().await
    }

    fn open(&self, path: &Path, is_new: bool) -> io::Result<Cells> {
        let cells = match Cells::open(path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Cells::create(path)?,
            other => other?,
        };
        let mut slots = self.slots();
        let bank = load(&cells, BANK)?;
        slots.bank = usize::from(bank == Some(1..2));
        if bank.is_none() && is_new {
            // Written and not only reserved: nothing that is stored here later may need room.
            let empty = encode(&(0..0)).repeat(BANK + 1);
            cells.store(0, &empty)?;
        } else if bank.is_none() {
            slots.lost.push(ANYTHING);
        }
        let lost = (1 + slots.bank) * SLOTS..(2 + slots.bank) * SLOTS;
        for slot in (0..SLOTS).chain(lost) {
            let found = load(&cells, slot)?.unwrap_or(ANYTHING);
            slots
                .lost
                .extend(Some(found).filter(|range| !range.is_empty()));
        }
        slots.cells = Some(cells.clone());
        slots.under_way = vec![None; SLOTS];
        slots.store_lost()?;
        (0..SLOTS).try_for_each(|slot| slots.store(slot, &(0..0)))?;
        Ok(cells)
    }

    /// A write of `range` is about to be sent. There is room for [`SLOTS`] at once.
    pub(super) fn begin(&self, range: &Range<u64>) -> io::Result<usize> {
        let mut slots = self.slots();
        let free = slots.under_way.iter().position(Option::is_none);
        let slot = free.ok_or_else(|| io::Error::other("too many writes are under way"))?;
        slots.store(slot, range)?;
        slots.under_way[slot] = Some(range.clone());
        Ok(slot)
    }

    /// It has been answered. What cannot be stored of that is taken for given up later.
    pub(super) fn end(&self, slot: usize) {
        let mut slots = self.slots();
        slots.under_way[slot] = None;
        if let Err(error) = slots.store(slot, &(0..0)) {
            tracing::warn!(%error, "that a write was answered cannot be recorded");
        }
    }

    /// What is under way will not be answered any more. That is durable when this returns.
    pub(super) async fn lose_all(&self) -> io::Result<()> {
        let Some(cells) = self.move_all()? else {
            return Ok(());
        };
        cells.sync().await
    }

    fn move_all(&self) -> io::Result<Option<Cells>> {
        let mut slots = self.slots();
        let under_way: Vec<_> = slots.under_way.iter().flatten().cloned().collect();
        if under_way.is_empty() {
            return Ok(None);
        }
        slots.lost.extend(under_way);
        slots.store_lost()?;
        for slot in 0..slots.under_way.len() {
            if slots.under_way[slot].take().is_some() {
                slots.store(slot, &(0..0))?;
            }
        }
        Ok(slots.cells.clone())
    }

    /// More that may change: nobody knows what was under way when the machine stopped. That is durable
    /// when this returns: the regions that it is known from retire.
    pub(super) async fn add(&self, ranges: Vec<Range<u64>>) -> io::Result<()> {
        self.store_more(ranges)?.sync().await
    }

    fn store_more(&self, ranges: Vec<Range<u64>>) -> io::Result<Cells> {
        let mut slots = self.slots();
        slots.lost.extend(ranges);
        slots.store_lost()?;
        slots.cells().cloned()
    }

    /// What may change.
    pub(super) fn ranges(&self) -> Vec<Range<u64>> {
        self.slots().lost.clone()
    }

    /// Somebody knows that the other side has ended all of it.
    pub(super) fn settle(&self) -> io::Result<()> {
        let mut slots = self.slots();
        slots.lost.clear();
        slots.store_lost()
    }

    fn slots(&self) -> MutexGuard<'_, Slots> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Slots {
    /// In the bank that is not in use, which then is: a kill on the way leaves one of the two.
    fn store_lost(&mut self) -> io::Result<()> {
        self.lost = merged(std::mem::take(&mut self.lost));
        let cells = self.cells()?;
        let bank = 1 - self.bank;
        let none = (self.lost.len()..SLOTS).map(|_| 0..0);
        let all = self.lost.iter().cloned().chain(none);
        let bytes: Vec<u8> = all.flat_map(|range| encode(&range)).collect();
        cells.store(((1 + bank) * SLOTS * SLOT_BYTES) as u64, &bytes)?;
        self.store(BANK, &(bank as u64..bank as u64 + 1))?;
        self.bank = bank;
        Ok(())
    }

    fn store(&self, slot: usize, range: &Range<u64>) -> io::Result<()> {
        let offset = (slot * SLOT_BYTES) as u64;
        self.cells()?.store(offset, &encode(range))
    }

    fn cells(&self) -> io::Result<&Cells> {
        let cells = self.cells.as_ref();
        cells.ok_or_else(|| io::Error::other("there is no account of writes yet"))
    }
}

/// Start, end, and a checksum, so that nothing reads as no range.
fn encode(range: &Range<u64>) -> [u8; SLOT_BYTES] {
    let mut bytes = [0; SLOT_BYTES];
    bytes[..8].copy_from_slice(&range.start.to_le_bytes());
    bytes[8..16].copy_from_slice(&range.end.to_le_bytes());
    let sum = crc32fast::hash(&bytes[..16]);
    bytes[16..].copy_from_slice(&sum.to_le_bytes());
    bytes
}

/// The range in a slot, which may be empty; `None` if it is damaged.
fn load(cells: &Cells, slot: usize) -> io::Result<Option<Range<u64>>> {
    let mut bytes = [0; SLOT_BYTES];
    cells.load((slot * SLOT_BYTES) as u64, &mut bytes)?;
    let number = |at: usize| u64::from_le_bytes(bytes[at..at + 8].try_into().expect("eight"));
    let range = number(0)..number(8);
    Ok((encode(&range) == bytes).then_some(range))
}

/// In order, joined where they touch; and where there are more than there are slots, with the smallest
/// gaps between them filled.
fn merged(mut ranges: Vec<Range<u64>>) -> Vec<Range<u64>> {
    ranges.sort_by_key(|range| range.start);
    let mut merged: Vec<Range<u64>> = Vec::with_capacity(ranges.len());
    for range in ranges {
        match merged.last_mut() {
            Some(last) if range.start <= last.end => last.end = last.end.max(range.end),
            _ => merged.push(range),
        }
    }
    while merged.len() > SLOTS {
        let gaps = merged.windows(2).map(|pair| pair[1].start - pair[0].end);
        let Some((at, _)) = gaps.enumerate().min_by_key(|(_, gap)| *gap) else {
            break;
        };
        merged[at].end = merged[at + 1].end;
        merged.remove(at + 1);
    }
    merged
}

/// How many writes may be under way at once: as many as one connection carries.
pub(super) const SLOTS: usize = proto::client::REQUESTS_MAX;

/// After the writes under way and two banks for what was given up: which of them is in use.
const BANK: usize = 3 * SLOTS;

const SLOT_BYTES: usize = 20;

/// Where it cannot be read what was given up.
const ANYTHING: Range<u64> = 0..u64::MAX;

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn what_was_under_way_at_a_kill_is_given_up() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("given-up");
        let before = GivenUp::default();
        before.keep_at(&path, true).await.unwrap();
        let first = before.begin(&(0..512)).unwrap();
        before.begin(&(4096..8192)).unwrap();
        before.end(first);

        let after = GivenUp::default();
        after.keep_at(&path, false).await.unwrap();
        assert_eq!(after.ranges(), [4096..8192]);
        after.begin(&(512..1024)).unwrap();
        after.lose_all().await.unwrap();
        assert_eq!(after.ranges(), [512..1024, 4096..8192]);
        after.settle().unwrap();
        let settled = GivenUp::default();
        settled.keep_at(&path, false).await.unwrap();
        assert!(settled.ranges().is_empty());
    }

    #[tokio::test]
    async fn where_it_is_damaged_anything_may_have_been_given_up() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("given-up");
        let find = async |is_new| {
            let given_up = GivenUp::default();
            given_up.keep_at(&path, is_new).await.unwrap();
            given_up.ranges()
        };
        assert_eq!(find(true).await, []);
        assert_eq!(find(false).await, []);
        let whole = std::fs::read(&path).unwrap();
        for slot in [0, SLOTS, 2 * SLOTS, BANK] {
            let mut zeroed = whole.clone();
            zeroed[slot * SLOT_BYTES..][..SLOT_BYTES].fill(0);
            std::fs::write(&path, zeroed).unwrap();
            // The bank that is not in use says nothing.
            let found = find(false).await;
            assert!(
                found == [ANYTHING] || slot == SLOTS || slot == 2 * SLOTS,
                "{slot}"
            );
        }
        std::fs::write(&path, &whole[..BANK * SLOT_BYTES]).unwrap();
        assert_eq!(find(false).await, [ANYTHING]);
        std::fs::remove_file(&path).unwrap();
        assert_eq!(find(false).await, [ANYTHING]);
    }

    #[tokio::test]
    async fn more_than_there_are_slots_for_grow_together_and_lose_nothing() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("given-up");
        let given_up = GivenUp::default();
        given_up.keep_at(&path, true).await.unwrap();
        let all: Vec<_> = (0..1000_u64)
            .map(|n| n * n * 512..n * n * 512 + 512)
            .collect();
        given_up.add(all.clone()).await.unwrap();
        let again = GivenUp::default();
        again.keep_at(&path, false).await.unwrap();
        let found = again.ranges();
        assert!(found.len() <= SLOTS);
        for range in all {
            let covers = |f: &Range<u64>| f.start <= range.start && range.end <= f.end;
            assert!(found.iter().any(covers), "{range:?}");
        }
    }
}
