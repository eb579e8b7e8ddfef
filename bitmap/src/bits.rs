use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;

use bitvec::array::BitArray;
use bitvec::order::Lsb0;
use thiserror::Error;

use crate::{Era, EraMap, FrozenEras, PageStore, Run};

/// How much of a disk one bit stands for: a power of two, 512 bytes to 2 GiB.
#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub struct BitGranularity(u64);

impl BitGranularity {
    /// Refuses all but a power of two from 512 bytes to 2 GiB.
    pub fn new(bytes: u64) -> Result<Self, BitGranularityError> {
        if bytes.is_power_of_two() && (512..=2 << 30).contains(&bytes) {
            Ok(Self(bytes))
        } else {
            Err(BitGranularityError(bytes))
        }
    }

    /// In bytes.
    pub const fn bytes(self) -> u64 {
        self.0
    }

    /// The bits that `range`, in bytes, touches.
    fn bits(self, range: &Range<u64>) -> Range<u64> {
        if range.is_empty() {
            return 0..0;
        }
        range.start / self.0..range.end.div_ceil(self.0)
    }

    /// Grows `range` outwards to whole bits.
    fn align_out(self, range: &Range<u64>) -> Range<u64> {
        let bits = self.bits(range);
        bits.start * self.0..bits.end.saturating_mul(self.0)
    }
}

/// A share of a disk that no bit can have.
#[derive(Clone, Copy, Debug, Eq, Error, PartialEq)]
#[error("granularity {0} is not a power of two from 512 bytes to 2 GiB")]
pub struct BitGranularityError(pub u64);

/// Which blocks of a disk are dirty, bit by bit.
///
/// It has one owner; whoever shares one replaces it and never changes it. What is clean takes no
/// memory: there are pages only where a bit is set.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Bits {
    granularity: BitGranularity,
    pages: BTreeMap<u64, Box<Page>>,
}

type Page = BitArray<[u64; WORDS_PER_PAGE], Lsb0>;

impl Bits {
    /// All clean.
    pub fn new(granularity: BitGranularity) -> Self {
        Self {
            granularity,
            pages: BTreeMap::new(),
        }
    }

    /// How much of the disk one bit stands for.
    pub fn granularity(&self) -> BitGranularity {
        self.granularity
    }

    /// Makes every block dirty that `range`, in bytes, touches.
    pub fn set(&mut self, range: &Range<u64>) {
        let mut bits = self.granularity.bits(range);
        while bits.start < bits.end {
            let page = bits.start / BITS_PER_PAGE;
            let end = bits.end.min((page + 1) * BITS_PER_PAGE);
            let base = page * BITS_PER_PAGE;
            let within = (bits.start - base) as usize..(end - base) as usize;
            self.pages.entry(page).or_default()[within].fill(true);
            bits.start = end;
        }
    }

    /// Makes every block dirty that a dirty block of `other` touches, whatever its granularity.
    pub fn merge(&mut self, other: &Self) {
        for range in other.dirty(0..u64::MAX) {
            self.set(&range);
        }
    }

    /// The dirty blocks that `range` touches: ranges in bytes, in order, whole blocks each. Two of
    /// them may be neighbours.
    pub fn dirty(&self, range: Range<u64>) -> impl Iterator<Item = Range<u64>> + '_ {
        let bits = self.granularity.bits(&range);
        let pages = bits.start / BITS_PER_PAGE..bits.end.div_ceil(BITS_PER_PAGE);
        let found = self.pages.range(pages).flat_map(move |(page, blocks)| {
            let base = page * BITS_PER_PAGE;
            let within = bits.start.max(base) - base..(bits.end - base).min(BITS_PER_PAGE);
            ones(blocks, within).map(move |ones| ones.start + base..ones.end + base)
        });
        found.map(|ones| {
            let bytes = self.granularity.bytes();
            ones.start * bytes..ones.end.saturating_mul(bytes)
        })
    }

    /// How many blocks are dirty, in bytes; the last one counts whole, wherever the disk ends.
    pub fn dirty_bytes(&self) -> u64 {
        let blocks = self.pages.values().map(|page| page.count_ones() as u64);
        blocks.sum::<u64>() * self.granularity.bytes()
    }

    /// The pages that are there, each as it is stored: its number, then one bit for each block,
    /// the first being the lowest of the first byte.
    pub fn to_bytes(&self) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(self.pages.len() * PAGE_RECORD_BYTES);
        for (number, page) in &self.pages {
            bytes.extend(number.to_le_bytes());
            for word in page.data {
                bytes.extend(word.to_le_bytes());
            }
        }
        bytes
    }

    /// What [`to_bytes`](Self::to_bytes) returned; `None` for anything else.
    pub fn from_bytes(granularity: BitGranularity, bytes: &[u8]) -> Option<Self> {
        let records = bytes.chunks_exact(PAGE_RECORD_BYTES);
        if !records.remainder().is_empty() {
            return None;
        }
        let pages_max = u64::MAX / granularity.0 / BITS_PER_PAGE;
        let mut pages = BTreeMap::new();
        for record in records {
            let (number, words) = record.split_at(8);
            let number = u64::from_le_bytes(number.try_into().ok()?);
            let mut page = Box::<Page>::default();
            for (word, stored) in page.data.iter_mut().zip(words.chunks_exact(8)) {
                *word = u64::from_le_bytes(stored.try_into().ok()?);
            }
            // No disk is larger than what 64 bits can count, nor are pages stored twice.
            let is_last = pages
                .last_key_value()
                .is_none_or(|(last, _)| *last < number);
            if number >= pages_max || !is_last {
                return None;
            }
            pages.insert(number, page);
        }
        Some(Self { granularity, pages })
    }
}

/// The runs of ones in `within`.
fn ones(page: &Page, within: Range<u64>) -> impl Iterator<Item = Range<u64>> + '_ {
    let mut at = within.start as usize;
    let end = within.end as usize;
    std::iter::from_fn(move || {
        let start = at + page[at..end].first_one()?;
        at = page[start..end]
            .first_zero()
            .map_or(end, |zero| start + zero);
        Some(start as u64..at as u64)
    })
}

/// What a dirty bitmap says is dirty: bits, and whatever changed since it records.
///
/// So a guest's write pays for none of them: it marks its era in the map of the disk, and each set
/// finds it there.
#[derive(Clone, Debug)]
pub struct DirtySet {
    /// What was dirty before.
    pub bits: Arc<Bits>,
    /// What changed in this era or later is dirty as well; nothing else is without one.
    pub since: Option<Era>,
}

impl DirtySet {
    /// What of `range` is dirty on a disk as it is: adjacent runs, covering all of it.
    pub fn runs<'a, P: PageStore>(
        &'a self,
        map: &'a EraMap<P>,
        range: Range<u64>,
    ) -> impl Iterator<Item = Run> + 'a {
        let whole = self.whole(&range, map.size());
        let changed = self.since.map(|since| map.changes(whole, since));
        self.joined(range, changed.into_iter().flatten())
    }

    /// The same on a disk as it was.
    pub fn frozen_runs<'a, P: PageStore>(
        &'a self,
        eras: &'a FrozenEras<P>,
        range: Range<u64>,
    ) -> impl Iterator<Item = Run> + 'a {
        let whole = self.whole(&range, eras.size());
        let changed = self.since.map(|since| eras.changes(whole, since));
        self.joined(range, changed.into_iter().flatten())
    }

    /// How many bytes are dirty on a disk as it is; a last block that it cuts short counts whole.
    pub fn dirty_bytes<P: PageStore>(&self, map: &EraMap<P>) -> u64 {
        let dirty = self.runs(map, 0..map.size()).filter(|run| run.dirty);
        let whole = dirty.map(|run| self.bits.granularity.align_out(&run.range));
        whole.map(|range| range.end - range.start).sum()
    }

    /// All that is dirty on a disk as it is.
    pub fn collect<P: PageStore>(&self, map: &EraMap<P>) -> Bits {
        let mut bits = (*self.bits).clone();
        if let Some(since) = self.since {
            let changed = map.changes(0..map.size(), since).filter(|run| run.dirty);
            changed.for_each(|run| bits.set(&run.range));
        }
        bits
    }

    /// The part of the disk that has a say in `range`: all of the blocks that it touches.
    fn whole(&self, range: &Range<u64>, size: u64) -> Range<u64> {
        let whole = self.bits.granularity.align_out(range);
        whole.start.min(size)..whole.end.min(size)
    }

    fn joined<'a>(
        &'a self,
        range: Range<u64>,
        changed: impl Iterator<Item = Run> + 'a,
    ) -> impl Iterator<Item = Run> + 'a {
        let granularity = self.bits.granularity;
        let changed = changed.filter(|run| run.dirty);
        let changed = changed.map(move |run| granularity.align_out(&run.range));
        let mut bits = self.bits.dirty(range.clone()).peekable();
        let mut changed = changed.peekable();
        // The next that begins, of both.
        let mut next = std::iter::from_fn(move || match (bits.peek(), changed.peek()) {
            (Some(bit), Some(change)) if bit.start <= change.start => bits.next(),
            (_, Some(_)) => changed.next(),
            _ => bits.next(),
        })
        .peekable();
        let mut at = range.start;
        std::iter::from_fn(move || {
            let start = at;
            if start >= range.end {
                return None;
            }
            while next.next_if(|dirty| dirty.end <= start).is_some() {}
            let dirty = next.peek().is_some_and(|dirty| dirty.start <= start);
            at = match next.peek() {
                None => range.end,
                Some(first) if !dirty => first.start,
                Some(_) => {
                    let mut end = start;
                    while let Some(more) = next.next_if(|more| more.start <= end.max(start)) {
                        end = end.max(more.end);
                    }
                    end
                }
            }
            .min(range.end);
            Some(Run {
                range: start..at,
                dirty,
            })
        })
    }
}

const WORDS_PER_PAGE: usize = 512;
const BITS_PER_PAGE: u64 = 64 * WORDS_PER_PAGE as u64;

/// A page with its number.
const PAGE_RECORD_BYTES: usize = 8 + 8 * WORDS_PER_PAGE;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Granularity, MemoryPages, Salt};

    const CHUNK: u64 = 64 << 10;

    fn granularity(bytes: u64) -> BitGranularity {
        BitGranularity::new(bytes).unwrap()
    }

    fn bits(bytes: u64, dirty: &[Range<u64>]) -> Bits {
        let mut bits = Bits::new(granularity(bytes));
        for range in dirty {
            bits.set(range);
        }
        bits
    }

    /// From and to.
    fn dirty(bits: &Bits, range: Range<u64>) -> Vec<(u64, u64)> {
        let found = bits.dirty(range);
        found.map(|range| (range.start, range.end)).collect()
    }

    fn all_dirty(bits: &Bits) -> Vec<(u64, u64)> {
        dirty(bits, 0..u64::MAX)
    }

    #[test]
    fn only_powers_of_two_from_512_bytes_to_2_gib_are_granularities() {
        for good in [512, 4096, 2 << 30] {
            assert_eq!(
                BitGranularity::new(good).map(BitGranularity::bytes),
                Ok(good)
            );
        }
        for bad in [0, 1, 256, 65_535, 4 << 30, u64::MAX] {
            assert_eq!(BitGranularity::new(bad), Err(BitGranularityError(bad)));
        }
    }

    #[test]
    fn what_is_touched_is_dirty_by_whole_blocks() {
        let bits = bits(4096, &[1..2, 4095..4097, 100_000..100_000]);
        assert_eq!(all_dirty(&bits), [(0, 8192)]);
        assert_eq!(bits.dirty_bytes(), 8192);
        assert_eq!(dirty(&bits, 8192..u64::MAX), []);
        assert_eq!(dirty(&bits, 8191..8192), [(4096, 8192)]);
    }

    #[test]
    fn runs_go_on_across_pages_and_clean_pages_take_no_memory() {
        let edge = BITS_PER_PAGE * 4096;
        let bits = bits(4096, &[edge - 4096..edge + 4096, 1 << 60..(1 << 60) + 1]);
        let found = all_dirty(&bits);
        assert_eq!(found[..2], [(edge - 4096, edge), (edge, edge + 4096)]);
        assert_eq!(found[2], (1 << 60, (1 << 60) + 4096));
        assert_eq!(bits.pages.len(), 3);
    }

    #[test]
    fn a_merge_grows_what_is_finer_and_splits_what_is_coarser() {
        let fine = bits(4096, &[4096..8192, 200_000..200_001]);
        let mut coarse = bits(CHUNK, &[]);
        coarse.merge(&fine);
        assert_eq!(all_dirty(&coarse), [(0, CHUNK), (3 * CHUNK, 4 * CHUNK)]);
        let mut again = bits(4096, &[]);
        again.merge(&coarse);
        assert_eq!(all_dirty(&again), all_dirty(&coarse));
    }

    #[test]
    fn what_is_stored_is_found_again_and_what_is_damaged_is_not_believed() {
        let bits = bits(4096, &[0..1, 1 << 40..(1 << 40) + CHUNK]);
        let stored = bits.to_bytes();
        assert_eq!(Bits::from_bytes(granularity(4096), &stored), Some(bits));
        assert_eq!(Bits::from_bytes(granularity(4096), &stored[1..]), None);
        let twice = [&stored[..], &stored[..]].concat();
        assert_eq!(Bits::from_bytes(granularity(4096), &twice), None);
        let last = u64::MAX / 4096 / BITS_PER_PAGE - 1;
        let page = |number: u64| [&number.to_le_bytes(), &stored[8..PAGE_RECORD_BYTES]].concat();
        assert!(Bits::from_bytes(granularity(4096), &page(last)).is_some());
        assert_eq!(Bits::from_bytes(granularity(4096), &page(last + 1)), None);
    }

    #[test]
    fn a_set_is_its_bits_and_what_changed_since() {
        let (salt, store) = (Salt::default(), MemoryPages::default());
        let map = EraMap::new(8 * CHUNK, Granularity::DEFAULT, salt, store);
        map.mark(&(3..4), Era::from_number(2)).unwrap();
        map.mark(&(6..7), Era::from_number(3)).unwrap();
        let mut set = DirtySet {
            bits: Arc::new(bits(2 * CHUNK, &[0..1, 4 * CHUNK..4 * CHUNK + 1])),
            since: None,
        };
        let found = |set: &DirtySet, range: Range<u64>| -> Vec<(Range<u64>, bool)> {
            let runs = set.runs(&map, range).map(|run| (run.range, run.dirty));
            runs.map(|(r, dirty)| (r.start / 512..r.end / 512, dirty))
                .collect()
        };
        let chunks = |from: u64, to: u64| from * 128..to * 128;
        let all = 0..8 * CHUNK;
        let expected = [(0, 2, true), (2, 4, false), (4, 6, true), (6, 8, false)];
        assert_eq!(
            found(&set, all.clone()),
            expected.map(|(from, to, dirty)| (chunks(from, to), dirty))
        );
        set.since = Some(Era::from_number(3));
        let expected = [(0, 2, true), (2, 4, false), (4, 8, true)];
        assert_eq!(
            found(&set, all.clone()),
            expected.map(|(from, to, dirty)| (chunks(from, to), dirty))
        );
        set.since = Some(Era::from_number(2));
        assert_eq!(found(&set, all), [(chunks(0, 8), true)]);
        // A change next to the range is in the same block.
        assert_eq!(found(&set, 2 * CHUNK..3 * CHUNK), [(chunks(2, 3), true)]);
        assert_eq!(all_dirty(&set.collect(&map)), [(0, 8 * CHUNK)]);
    }
}
