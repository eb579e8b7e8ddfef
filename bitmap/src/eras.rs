use std::io;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};

use crate::entry::{self, ENTRY_BYTES};
use crate::growing::Growing;
use crate::kept::{Both, Kept, Stores};
use crate::{Chunks, Era, PageStore, Salt};

/// An era for each chunk of a disk, written through to a [`PageStore`].
///
/// A page comes into being with the first era stored on it, so an untouched disk of any size costs
/// next to nothing. Readers take no lock. The store holds each era before memory does: what a
/// reader saw outlives the process. There every entry has a sum of its own, so that damage is told
/// from what was stored, also while others are being written beside it.
#[derive(Debug)]
pub struct Eras<P> {
    pages: Growing<OnceLock<Box<Page>>>,
    count: AtomicU64,
    salt: Salt,
    stores: Stores<P>,
    torn: AtomicBool,
}

/// Neighbouring chunks with one era.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct EraRun {
    /// Which chunks.
    pub chunks: Chunks,
    /// The era that each of them has.
    pub era: Era,
}

impl<P: PageStore> Eras<P> {
    /// A map of `count` chunks that have never changed, over a store that holds only zeroes.
    pub fn new(count: u64, salt: Salt, store: P) -> Self {
        let pages = (0..count.div_ceil(ERAS_PER_PAGE))
            .map(|_| OnceLock::new())
            .collect();
        Self {
            pages,
            count: AtomicU64::new(count),
            salt,
            stores: Stores::new(store),
            torn: AtomicBool::new(false),
        }
    }

    /// Makes room for `count` chunks, where there was less. One at a time may call this.
    ///
    /// On an error everything is as it was, except that the store may be longer.
    pub fn make_room(&self, count: u64) -> io::Result<()> {
        let pages = count.div_ceil(ERAS_PER_PAGE);
        // Nobody stores meanwhile, in this store or in one that is to take its place.
        self.stores.alone().make_room(pages * PAGE_BYTES)?;
        self.pages.grow(pages as usize, OnceLock::new);
        self.count.fetch_max(count, Ordering::AcqRel);
        Ok(())
    }

    /// How many chunks there is room for.
    pub fn count(&self) -> u64 {
        self.count.load(Ordering::Acquire)
    }

    /// Brings every page into memory of which something may be in the store. What is damaged, or
    /// was never stored, is never.
    pub fn load_stored(&self) -> io::Result<()> {
        let mut offset = 0;
        let store = self.stores.current();
        while let Some(stored) = store.stored(offset)? {
            let end = stored.end.div_ceil(PAGE_BYTES).min(self.page_count());
            for page in stored.start / PAGE_BYTES..end {
                self.load_page(page)?;
            }
            offset = stored.end;
        }
        Ok(())
    }

    /// Brings page number `page` into memory as it is in the store.
    ///
    /// What is returned has no whole entry there: it is damaged, or was never stored. In memory its
    /// era is never.
    pub fn load_page(&self, page: u64) -> io::Result<Vec<Chunks>> {
        let mut bytes = [0; PAGE_BYTES as usize];
        self.stores.current().load(page * PAGE_BYTES, &mut bytes)?;
        let eras = self.page(page);
        let mut lacking: Vec<Chunks> = Vec::new();
        let Chunks { start, end } = Self::chunks_of_page(page);
        let (entries, _) = bytes.as_chunks();
        for ((chunk, era), stored) in (start..end.min(self.count())).zip(&eras[..]).zip(entries) {
            let found = entry::decode(self.salt, chunk, *stored);
            era.store(found.unwrap_or(Era::NEVER).number(), Ordering::Release);
            match lacking.last_mut() {
                _ if found.is_some() => {}
                Some(run) if run.end == chunk => run.end += 1,
                _ => lacking.push(chunk..chunk + 1),
            }
        }
        Ok(lacking)
    }

    /// Stores an entry for each of `chunks`, of which nothing is stored yet: that it has not changed
    /// since the first era began. From then on, an entry that is missing there is damage.
    pub fn fill(&self, chunks: &Chunks) -> io::Result<()> {
        for piece in pieces(chunks) {
            let stores = self.stores.shared();
            self.store_entries(&stores, &piece, Era::FIRST)?;
            // In memory too, or a copy of that would lack the entries.
            self.page(piece.start / ERAS_PER_PAGE);
        }
        Ok(())
    }

    /// Takes everything on page number `page` as never changed, in memory alone: what is there is
    /// damaged, and is about to be marked.
    pub fn disbelieve_page(&self, page: u64) {
        for era in self.page(page) {
            era.store(Era::NEVER.number(), Ordering::Release);
        }
    }

    /// The highest era on page number `page`.
    pub fn highest_on(&self, page: u64) -> Era {
        let page = self.pages.at(page as usize).get();
        let eras = page.into_iter().flat_map(|page| page.iter());
        Era::from_number(
            eras.map(|era| era.load(Ordering::Acquire))
                .max()
                .unwrap_or(0),
        )
    }

    /// What the eras on page number `page` sum to (CRC-32), as they are in memory. Never counts as
    /// the first era, which means the same to every checkpoint and is what is stored for it.
    pub fn checksum(&self, page: u64) -> u32 {
        let mut sum = crc32fast::Hasher::new();
        let mut add = |era: u32| sum.update(&era.max(Era::FIRST.number()).to_le_bytes());
        match self.pages.at(page as usize).get() {
            Some(eras) => eras.iter().for_each(|era| add(era.load(Ordering::Acquire))),
            None => (0..ERAS_PER_PAGE).for_each(|_| add(0)),
        }
        sum.finalize()
    }

    /// The highest era that any chunk has.
    pub fn highest(&self) -> Era {
        (0..self.page_count())
            .map(|page| self.highest_on(page))
            .max()
            .unwrap_or(Era::NEVER)
    }

    /// How many pages there can be.
    pub fn page_count(&self) -> u64 {
        self.pages.len() as u64
    }

    /// The chunks of page number `page`.
    pub fn chunks_of_page(page: u64) -> Chunks {
        page * ERAS_PER_PAGE..(page + 1) * ERAS_PER_PAGE
    }

    /// The era of `chunk`.
    pub fn era(&self, chunk: u64) -> Era {
        let Some(page) = self.page_of(chunk) else {
            return Era::NEVER;
        };
        Era::from_number(page[place(chunk)].load(Ordering::Acquire))
    }

    /// Gives all of `chunks` the era `era`, which is not never: in the store first, then in memory.
    ///
    /// On an error memory is as it was, and the store may hold the new era for some of them.
    pub fn set(&self, chunks: &Chunks, era: Era) -> io::Result<()> {
        for piece in pieces(chunks) {
            // Held until memory is what is stored.
            let stores = self.stores.shared();
            if let Err(error) = self.store_entries(&stores, &piece, era) {
                self.torn.store(true, Ordering::Release);
                return Err(error);
            }
            let page = self.page(piece.start / ERAS_PER_PAGE);
            for chunk in piece {
                page[place(chunk)].store(era.number(), Ordering::Release);
            }
        }
        Ok(())
    }

    fn store_entries(&self, stores: &Both<P>, piece: &Chunks, era: Era) -> io::Result<()> {
        let offset = piece.start * ENTRY_BYTES as u64;
        let entry = |chunk| entry::encode(self.salt, chunk, era);
        // Most writes mark one chunk.
        if piece.end - piece.start == 1 {
            return stores.store(offset, &entry(piece.start));
        }
        let entries: Vec<_> = piece.clone().map(entry).collect();
        stores.store(offset, entries.as_flattened())
    }

    /// Whether a store has failed, after which the store may hold what memory does not.
    pub fn is_torn(&self) -> bool {
        self.torn.load(Ordering::Acquire)
    }

    /// Stores what is in memory of `chunks` again, so that the next sync makes it durable even if an
    /// earlier one has failed.
    pub fn store_again(&self, chunks: &Chunks) -> io::Result<()> {
        for piece in pieces(chunks) {
            let stores = self.stores.alone();
            if page_index(piece.start) >= self.pages.len() {
                return Ok(());
            }
            let page = self.page(piece.start / ERAS_PER_PAGE);
            let offset = piece.start * ENTRY_BYTES as u64;
            stores.store(offset, &self.bytes_of(page, &piece))?;
        }
        Ok(())
    }

    /// As [`fill`](Self::fill) and [`set`](Self::set) store them.
    fn bytes_of(&self, page: &Page, chunks: &Chunks) -> Vec<u8> {
        let entry = |chunk| {
            let era = Era::from_number(page[place(chunk)].load(Ordering::Acquire));
            entry::encode(self.salt, chunk, era.max(Era::FIRST))
        };
        chunks.clone().flat_map(entry).collect()
    }

    /// To look at one chunk after the other.
    pub(crate) fn cursor(&self) -> Cursor<'_, P> {
        Cursor {
            eras: self,
            number: 0,
            page: None,
        }
    }

    /// Up to where, at most `end`, no page is there from that of `chunk` on.
    fn next_touched(&self, chunk: u64, end: u64) -> u64 {
        let pages = page_index(chunk)..page_index(end - 1) + 1;
        let mut after = pages.clone().skip(1);
        let touched = after.find(|page| self.pages.at(*page).get().is_some());
        (touched.unwrap_or(pages.end) as u64 * ERAS_PER_PAGE).min(end)
    }

    /// What its entries are summed up with.
    pub fn salt(&self) -> Salt {
        self.salt
    }

    /// The store, to be synced or looked into.
    pub fn store(&self) -> Arc<P> {
        self.stores.current()
    }

    fn page_of(&self, chunk: u64) -> Option<&Page> {
        self.pages.at(page_index(chunk)).get().map(Box::as_ref)
    }

    /// Page number `page`, which comes into being if need be.
    fn page(&self, page: u64) -> &Page {
        self.pages.at(page as usize).get_or_init(empty_page)
    }
}

/// Looks at chunks in order, and finds a page once. What it returns is what is in memory at that moment.
pub(crate) struct Cursor<'a, P> {
    eras: &'a Eras<P>,
    number: u64,
    page: Option<&'a Page>,
}

impl<P: PageStore> Cursor<'_, P> {
    /// The era of `chunk`, and up to where, at most `end`, every chunk is known to have the same: the next
    /// one, or beyond all pages that are not there, which is a quick way across what never changed.
    #[inline]
    pub(crate) fn stretch(&mut self, chunk: u64, end: u64) -> (Era, u64) {
        match self.page_of(chunk) {
            Some(page) => {
                let era = page[place(chunk)].load(Ordering::Acquire);
                (Era::from_number(era), chunk + 1)
            }
            None => (Era::NEVER, self.eras.next_touched(chunk, end)),
        }
    }

    /// The era of `chunk`.
    #[inline]
    pub(crate) fn era(&mut self, chunk: u64) -> Era {
        self.stretch(chunk, chunk + 1).0
    }

    #[inline]
    fn page_of(&mut self, chunk: u64) -> Option<&Page> {
        let number = chunk / ERAS_PER_PAGE;
        // That a page was not there says nothing about now.
        if self.page.is_none() || self.number != number {
            self.number = number;
            self.page = self.eras.page_of(chunk);
        }
        self.page
    }
}

impl<P: PageStore> Kept for Eras<P> {
    type Store = P;

    fn store(&self) -> Arc<P> {
        self.stores.current()
    }

    fn parts(&self) -> u64 {
        self.page_count()
    }

    fn begin_anew(&self, next: Arc<P>) {
        self.stores.begin(next);
    }

    fn copy_part(&self, page: u64) -> io::Result<()> {
        let stores = self.stores.alone();
        match (&stores.next, self.pages.at(page as usize).get()) {
            (Some(next), Some(eras)) => {
                let entries = self.bytes_of(eras, &Self::chunks_of_page(page));
                next.store(page * PAGE_BYTES, &entries)
            }
            _ => Ok(()),
        }
    }

    fn end_anew(&self, succeeded: bool) {
        self.stores.end(succeeded);
    }
}

/// Cuts `chunks` where pages begin.
fn pieces(chunks: &Chunks) -> impl Iterator<Item = Chunks> {
    let end = chunks.end;
    let mut next = chunks.start;
    std::iter::from_fn(move || {
        let start = next;
        next = ((start / ERAS_PER_PAGE + 1) * ERAS_PER_PAGE).min(end);
        (start < end).then_some(start..next)
    })
}

fn page_index(chunk: u64) -> usize {
    (chunk / ERAS_PER_PAGE) as usize
}

fn place(chunk: u64) -> usize {
    (chunk % ERAS_PER_PAGE) as usize
}

fn empty_page() -> Box<Page> {
    Box::new([const { AtomicU32::new(0) }; ERAS_PER_PAGE as usize])
}

type Page = [AtomicU32; ERAS_PER_PAGE as usize];

/// A page of eras is a page of memory: 4 KiB.
pub const ERAS_PER_PAGE: u64 = 1024;
/// And twice that in the store.
pub const PAGE_BYTES: u64 = ERAS_PER_PAGE * ENTRY_BYTES as u64;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::MemoryPages;

    const SALT: Salt = Salt::from_number(5);

    #[test]
    fn what_was_never_set_is_never() {
        let eras = Eras::new(5000, SALT, MemoryPages::default());
        assert_eq!(eras.era(4999), Era::NEVER);
        assert_eq!(eras.cursor().stretch(7, 5000), (Era::NEVER, 5000));
    }

    #[test]
    fn a_run_across_pages_is_set_in_memory_and_in_the_store() {
        let eras = Eras::new(5000, SALT, MemoryPages::default());
        eras.set(&(1000..2050), Era::from_number(7)).unwrap();
        let stored = Eras::new(5000, SALT, MemoryPages::from(eras.store().contents()));
        stored.load_stored().unwrap();

        for (chunk, era) in [(999, 0), (1000, 7), (1024, 7), (2049, 7), (2050, 0)] {
            assert_eq!(eras.era(chunk).number(), era, "chunk {chunk}");
            assert_eq!(stored.era(chunk).number(), era, "stored, chunk {chunk}");
        }
        for (chunk, era, stop) in [(0, 0, 1), (1000, 7, 1001), (2050, 0, 2051), (4000, 0, 5000)] {
            let found = eras.cursor().stretch(chunk, 5000);
            assert_eq!(found, (Era::from_number(era), stop), "chunk {chunk}");
        }
    }

    #[test]
    fn a_cursor_sees_what_is_stored_after_it_has_looked() {
        let eras = Eras::new(5000, SALT, MemoryPages::default());
        let mut cursor = eras.cursor();
        assert_eq!(cursor.stretch(10, 5000), (Era::NEVER, 5000));
        eras.set(&(10..11), Era::from_number(7)).unwrap();
        assert_eq!(cursor.stretch(10, 5000), (Era::from_number(7), 11));
        eras.set(&(10..11), Era::from_number(8)).unwrap();
        assert_eq!(cursor.stretch(10, 5000), (Era::from_number(8), 11));
        assert_eq!(cursor.stretch(1024, 5000), (Era::NEVER, 5000));
        assert_eq!(cursor.stretch(12, 500), (Era::NEVER, 13));
    }

    #[test]
    fn what_is_damaged_or_was_never_stored_is_told_from_what_was() {
        let eras = Eras::new(1030, SALT, MemoryPages::default());
        eras.fill(&(960..1088)).unwrap();
        eras.set(&(1000..1003), Era::from_number(7)).unwrap();
        let sum = eras.checksum(0);

        let mut bytes = eras.store().contents();
        bytes[1001 * ENTRY_BYTES] ^= 1;
        bytes[1020 * ENTRY_BYTES..1024 * ENTRY_BYTES].fill(0);
        let stored = Eras::new(1030, SALT, MemoryPages::from(bytes));
        assert_eq!(
            stored.load_page(0).unwrap(),
            [0..960, 1001..1002, 1020..1024]
        );
        assert_ne!(stored.checksum(0), sum);
        assert_eq!(
            stored.load_page(1).unwrap(),
            [] as [Chunks; 0],
            "beyond the end"
        );
        let found = [960, 1000, 1001, 1002, 1021, 1029].map(|chunk| stored.era(chunk).number());
        assert_eq!(found, [1, 7, 0, 7, 0, 1]);
    }

    #[test]
    fn what_never_changed_sums_to_the_same_in_memory_and_from_the_store() {
        let eras = Eras::new(1024, SALT, MemoryPages::default());
        eras.fill(&(0..64)).unwrap();
        eras.set(&(3..4), Era::from_number(7)).unwrap();
        let stored = Eras::new(1024, SALT, MemoryPages::from(eras.store().contents()));
        stored.load_page(0).unwrap();
        assert_eq!(stored.checksum(0), eras.checksum(0));
    }

    #[test]
    fn an_era_that_cannot_be_stored_does_not_appear() {
        struct Full;
        impl PageStore for Full {
            fn store(&self, _: u64, _: &[u8]) -> io::Result<()> {
                Err(io::ErrorKind::StorageFull.into())
            }
            fn load(&self, _: u64, _: &mut [u8]) -> io::Result<()> {
                Ok(())
            }
            fn stored(&self, _: u64) -> io::Result<Option<std::ops::Range<u64>>> {
                Ok(None)
            }
        }
        let eras = Eras::new(10, SALT, Full);
        assert!(eras.set(&(0..1), Era::FIRST).is_err());
        assert_eq!(eras.era(0), Era::NEVER);
    }
}
