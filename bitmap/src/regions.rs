use std::io;
use std::ops::Range;
use std::sync::OnceLock;

use crate::eras::ERAS_PER_PAGE;
use crate::growing::Growing;
use crate::pages::{PageRecord, PageTable};
use crate::sync::{AtomicU64, AtomicUsize, Ordering};
use crate::{Chunks, Granularity, PageStore};

/// Which regions of a disk are being written, so that a power cut leaves a bounded doubt.
///
/// A writer [enters](Self::enter) every region that it touches before it marks anything, and leaves
/// when the write has ended. In a region that is not active it [activates](Self::activate) it and
/// waits for a sync of the table that began after that. A region with no writer can be retired: the
/// image and the map are synced, and if nobody entered meanwhile it is inactive from then on.
///
/// How many are inside and what state a region is in is one atomic word, so whoever enters and
/// whoever retires cannot miss each other.
#[derive(Debug)]
pub struct Regions<P> {
    table: PageTable<P>,
    words: Growing<OnceLock<Box<PageWords>>>,
    region_bytes: u64,
    active: AtomicUsize,
}

/// A region, by its number on the disk.
#[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub struct Region(u64);

type PageWords = [AtomicU64; REGIONS_PER_PAGE as usize];

impl<P: PageStore> Regions<P> {
    /// Over `table`, whose active regions stay active until they are retired in the normal way.
    pub fn new(pages: u64, granularity: Granularity, table: PageTable<P>) -> Self {
        let words = (0..pages).map(|_| OnceLock::new()).collect();
        let region_bytes = granularity.bytes() * CHUNKS;
        let regions = Self {
            table,
            words,
            region_bytes,
            active: AtomicUsize::new(0),
        };
        for region in (0..pages).flat_map(|page| regions.active_on(page)) {
            regions.word(region).store(ACTIVE, Ordering::SeqCst);
            regions.active.fetch_add(1, Ordering::Relaxed);
        }
        regions
    }

    /// Makes room for the regions of `pages` pages, none of which is active or was ever written, where
    /// there were fewer. One at a time may call this.
    pub fn make_room(&self, pages: u64) -> io::Result<()> {
        let before = self.words.len() as u64;
        if pages > before {
            self.table.make_room(before, pages)?;
            self.words.grow(pages as usize, OnceLock::new);
        }
        Ok(())
    }

    /// Cuts `range`, in bytes, into pieces of at most `count` regions.
    pub fn pieces(
        &self,
        range: Range<u64>,
        count: u64,
    ) -> impl Iterator<Item = Range<u64>> + use<P> {
        let length = self.region_bytes * count;
        let mut at = range.start;
        std::iter::from_fn(move || {
            let start = at;
            at = (start / length + 1).saturating_mul(length).min(range.end);
            (start < range.end).then_some(start..at)
        })
    }

    /// The regions that `range`, in bytes, touches.
    pub fn of(&self, range: &Range<u64>) -> impl Iterator<Item = Region> + use<P> {
        let last = if range.is_empty() {
            range.start
        } else {
            range.end.div_ceil(self.region_bytes)
        };
        (range.start / self.region_bytes..last).map(Region)
    }

    /// The bytes of `region`; beyond the end of the disk for the last one.
    pub fn range(&self, region: Region) -> Range<u64> {
        region.0 * self.region_bytes..(region.0 + 1) * self.region_bytes
    }

    /// Counts a writer in, and says whether the region is active. Must be followed by
    /// [`leave`](Self::leave).
    pub fn enter(&self, region: Region) -> bool {
        let word = self.word(region);
        let before = word.fetch_add(ONE, Ordering::SeqCst);
        if before & TOUCHED == 0 {
            word.fetch_or(TOUCHED, Ordering::Relaxed);
        }
        match before & STATE {
            ACTIVE => true,
            // Whoever wants to retire it has to look again, and finds it taken back.
            RETIRING => self.exchange(region, RETIRING, ACTIVE),
            _ => false,
        }
    }

    /// Counts a writer out.
    pub fn leave(&self, region: Region) {
        self.word(region).fetch_sub(ONE, Ordering::SeqCst);
    }

    /// Stores that `region`, which the caller has entered, is active. It is so once a sync of the
    /// table that began after this has succeeded and [`activated`](Self::activated) was called.
    ///
    /// The first time `fill` stores an entry for each chunk of it, before that is recorded. A kill
    /// in between leaves entries that nobody asks for; a power cut that takes them back finds the
    /// region active, or not recorded either.
    pub fn activate(
        &self,
        region: Region,
        fill: impl FnOnce(&Chunks) -> io::Result<()>,
    ) -> io::Result<()> {
        // Stored in any case: a record that was to be stored when the region was retired, and gave
        // an error, may be in the store all the same. Filled under the sector's lock, and so before
        // anyone marks something there.
        self.table.rewrite(region.page(), |record| {
            if !record.is_filled(region) {
                fill(&region.chunks())?;
            }
            record.activate(region);
            Ok(())
        })
    }

    /// The table has been synced since `region` was entered in it.
    pub fn activated(&self, region: Region) {
        let change = |now: u64| (now & STATE == INACTIVE).then_some(now & !STATE | ACTIVE);
        let word = self.word(region);
        // Of several who asked for it together, one makes it active, and counts it.
        let changed = word.fetch_update(Ordering::SeqCst, Ordering::SeqCst, change);
        if changed.is_ok() {
            self.active.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// How many regions are active.
    pub fn active(&self) -> usize {
        self.active.load(Ordering::Relaxed)
    }

    /// How many bytes of the disk they are, where each is whole.
    pub fn active_bytes(&self) -> u64 {
        self.active() as u64 * self.region_bytes
    }

    /// Every region that is active.
    pub fn all_active(&self) -> impl Iterator<Item = Region> + '_ {
        (0..self.words.len() as u64).flat_map(|page| self.active_on(page))
    }

    /// Begins to retire every region that nobody entered since the last time, and, if those are
    /// fewer than `least`, as many others without a writer.
    pub fn begin_retiring(&self, least: usize) -> Vec<Region> {
        let (mut retiring, mut busy) = (Vec::new(), Vec::new());
        for region in self.all_active() {
            let before = self.word(region).fetch_and(!TOUCHED, Ordering::SeqCst);
            if before == ACTIVE && self.exchange(region, ACTIVE, RETIRING) {
                retiring.push(region);
            } else {
                busy.push(region);
            }
        }
        let lacking = least.saturating_sub(retiring.len());
        let more = busy
            .into_iter()
            .filter(|region| self.exchange(*region, ACTIVE, RETIRING));
        retiring.extend(more.take(lacking));
        retiring
    }

    /// Ends the retirement of `region`, after image and map have been synced since it began.
    /// `checksum` is that of its page, as it was synced. Of no effect if someone entered meanwhile.
    pub fn retire(&self, region: Region, checksum: impl FnOnce() -> u32) -> io::Result<()> {
        // Under the sector's lock, so that whoever activates it anew does so after this.
        self.table.update(region.page(), |record| {
            if !self.exchange(region, RETIRING, INACTIVE) {
                return;
            }
            self.active.fetch_sub(1, Ordering::Relaxed);
            record.active &= !region.bit();
            if record.active == 0 {
                record.checksum = checksum();
            }
        })
    }

    /// Takes a retirement back that could not be ended.
    pub fn cancel_retiring(&self, region: Region) {
        self.exchange(region, RETIRING, ACTIVE);
    }

    /// The table, to be synced or asked.
    pub fn table(&self) -> &PageTable<P> {
        &self.table
    }

    /// Changes the state from `from` to `to` whatever the count; to inactive or retiring only while
    /// nobody is inside. Says whether it is `to` now.
    fn exchange(&self, region: Region, from: u64, to: u64) -> bool {
        let word = self.word(region);
        let change = |now: u64| {
            let empty = now / ONE == 0;
            let allowed = now & STATE == from && (to == ACTIVE || empty);
            allowed.then_some(now & !STATE | to)
        };
        match word.fetch_update(Ordering::SeqCst, Ordering::SeqCst, change) {
            Ok(_) => true,
            Err(now) => now & STATE == to,
        }
    }

    fn active_on(&self, page: u64) -> Vec<Region> {
        let PageRecord { active, .. } = self.table.record(page);
        let first = page * REGIONS_PER_PAGE;
        (0..REGIONS_PER_PAGE)
            .filter(|n| active & 1 << n != 0)
            .map(|n| Region(first + n))
            .collect()
    }

    fn word(&self, region: Region) -> &AtomicU64 {
        let page = self
            .words
            .at(region.page() as usize)
            .get_or_init(|| Box::new(std::array::from_fn(|_| AtomicU64::new(INACTIVE))));
        &page[(region.0 % REGIONS_PER_PAGE) as usize]
    }
}

impl PageRecord {
    /// Whether `region`, which is on this page, is active.
    pub fn is_active(&self, region: Region) -> bool {
        self.active & region.bit() != 0
    }

    /// Whether every chunk of `region`, which is on this page, has an entry.
    pub fn is_filled(&self, region: Region) -> bool {
        self.filled & region.bit() != 0
    }

    /// Takes note that `region`, which is on this page, has an entry for each chunk and is active.
    pub fn activate(&mut self, region: Region) {
        self.active |= region.bit();
        self.filled |= region.bit();
    }
}

impl Region {
    /// Cuts `chunks` where regions begin.
    pub fn cut(chunks: &Chunks) -> impl Iterator<Item = (Self, Chunks)> + use<> {
        let Chunks { mut start, end } = *chunks;
        std::iter::from_fn(move || {
            let region = Self(start / CHUNKS);
            let part = start..region.chunks().end.min(end);
            start = part.end;
            (!part.is_empty()).then_some((region, part))
        })
    }

    /// Its chunks; the last region may have more than the disk.
    pub fn chunks(self) -> Chunks {
        self.0 * CHUNKS..(self.0 + 1) * CHUNKS
    }

    /// The page of the era map that its chunks are on.
    pub fn page(self) -> u64 {
        self.0 / REGIONS_PER_PAGE
    }

    fn bit(self) -> u16 {
        1 << (self.0 % REGIONS_PER_PAGE)
    }
}

/// A page's regions are one word of its record: with 64 KiB chunks a region is 4 MiB.
const REGIONS_PER_PAGE: u64 = 16;
/// Of a region. Their entries are one sector of the store.
const CHUNKS: u64 = ERAS_PER_PAGE / REGIONS_PER_PAGE;

const INACTIVE: u64 = 0;
const ACTIVE: u64 = 1;
const RETIRING: u64 = 2;
const STATE: u64 = 3;
/// Someone entered since regions were last looked over for retirement.
const TOUCHED: u64 = 4;
/// One writer inside.
const ONE: u64 = 8;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::MemoryPages;

    const MIB: u64 = 1 << 20;

    fn regions() -> Regions<MemoryPages> {
        let table = PageTable::create(4, MemoryPages::default()).unwrap();
        Regions::new(4, Granularity::DEFAULT, table)
    }

    fn activate(regions: &Regions<MemoryPages>, region: Region) {
        assert!(!regions.enter(region));
        regions.activate(region, |_| Ok(())).unwrap();
        regions.activated(region);
    }

    #[test]
    fn a_region_is_active_only_after_its_record_was_synced() {
        let regions = regions();
        let region = regions.of(&(5 * MIB..5 * MIB + 1)).next().unwrap();
        assert_eq!(regions.range(region), 4 * MIB..8 * MIB);
        assert!(!regions.enter(region));
        regions.activate(region, |_| Ok(())).unwrap();
        assert!(!regions.enter(region), "stored, and not yet synced");
        regions.activated(region);
        assert!(regions.enter(region));
        assert_eq!(regions.active(), 1);
    }

    #[test]
    fn a_region_that_two_writers_activate_together_counts_once() {
        let regions = regions();
        let region = regions.of(&(0..1)).next().unwrap();
        for _ in 0..2 {
            assert!(!regions.enter(region));
            regions.activate(region, |_| Ok(())).unwrap();
        }
        regions.activated(region);
        regions.activated(region);
        assert_eq!(regions.active(), 1);
        regions.leave(region);
        regions.leave(region);
        assert_eq!(regions.begin_retiring(9), [region]);
        regions.retire(region, || 0).unwrap();
        assert_eq!(regions.active(), 0);
    }

    #[test]
    fn a_region_with_a_writer_is_not_retired_and_one_that_was_entered_again_stays() {
        let regions = regions();
        let region = regions.of(&(0..1)).next().unwrap();
        activate(&regions, region);
        assert_eq!(regions.begin_retiring(9), []);

        regions.leave(region);
        assert_eq!(regions.begin_retiring(9), [region]);
        assert!(regions.enter(region), "taken back");
        regions.leave(region);
        regions.retire(region, || 0).unwrap();
        assert_eq!(regions.table().record(0).active, 1);

        assert_eq!(regions.begin_retiring(9), [region]);
        regions.retire(region, || 77).unwrap();
        let expected = PageRecord {
            active: 0,
            filled: 1,
            checksum: 77,
        };
        assert_eq!(regions.table().record(0), expected);
        assert_eq!(regions.active(), 0);
        assert!(!regions.enter(region));
    }

    #[test]
    fn the_checksum_of_a_page_waits_for_its_last_region() {
        let regions = regions();
        let two: Vec<_> = regions.of(&(0..5 * MIB)).collect();
        for region in &two {
            activate(&regions, *region);
            regions.leave(*region);
        }
        assert_eq!(regions.begin_retiring(9).len(), 2);
        regions
            .retire(two[0], || unreachable!("the other is active"))
            .unwrap();
        regions.retire(two[1], || 5).unwrap();
        assert_eq!(regions.table().record(0).checksum, 5);
    }

    #[test]
    fn what_was_active_is_active_after_a_restart() {
        let before = regions();
        let region = before.of(&(65 * MIB..66 * MIB)).next().unwrap();
        activate(&before, region);
        let store = MemoryPages::from(before.table().store().contents());
        let after = Regions::new(
            4,
            Granularity::DEFAULT,
            PageTable::load(4, store).unwrap().0,
        );
        assert_eq!(after.all_active().collect::<Vec<_>>(), [region]);
        assert!(after.enter(region));
    }

    #[test]
    fn those_that_nobody_entered_lately_are_retired_first() {
        let regions = regions();
        let all: Vec<_> = regions.of(&(0..12 * MIB)).collect();
        for region in &all {
            activate(&regions, *region);
            regions.leave(*region);
        }
        assert_eq!(
            regions.begin_retiring(0),
            [],
            "all were entered since the beginning"
        );
        for busy in [all[0], all[2]] {
            regions.enter(busy);
            regions.leave(busy);
        }
        assert_eq!(regions.begin_retiring(0), [all[1]]);
        assert!(regions.enter(all[0]), "taken back");
        regions.leave(all[0]);
        assert_eq!(
            regions.begin_retiring(2),
            [all[2], all[0]],
            "as many as are wanted"
        );
    }
}

#[cfg(all(test, feature = "loom"))]
#[path = "regions/loom.rs"]
mod loom_tests;
