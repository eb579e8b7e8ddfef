use std::io;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU32, Ordering};

use crate::{Chunks, Era, PageStore};

/// An era for each chunk of a disk, written through to a [`PageStore`].
///
/// A page comes into being with the first era stored on it, so an untouched disk of any size costs
/// next to nothing. Readers take no lock. The store holds each era before memory does: what a
/// reader saw outlives the process.
#[derive(Debug)]
pub struct Eras<P> {
    pages: Box<[OnceLock<Box<Page>>]>,
    store: P,
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
    pub fn new(count: u64, store: P) -> Self {
        let pages = (0..count.div_ceil(ERAS_PER_PAGE))
            .map(|_| OnceLock::new())
            .collect();
        Self { pages, store }
    }

    /// Brings every page into memory of which something may be in the store.
    pub fn load_stored(&self) -> io::Result<()> {
        let mut offset = 0;
        while let Some(stored) = self.store.stored(offset)? {
            let end = stored
                .end
                .div_ceil(PAGE_BYTES as u64)
                .min(self.page_count());
            for page in stored.start / PAGE_BYTES as u64..end {
                self.load_page(page)?;
            }
            offset = stored.end;
        }
        Ok(())
    }

    /// Brings page number `page` into memory as it is in the store, and says what it sums to
    /// (CRC-32).
    pub fn load_page(&self, page: u64) -> io::Result<u32> {
        let mut bytes = [0; PAGE_BYTES];
        self.store.load(page * PAGE_BYTES as u64, &mut bytes)?;
        let eras = self.pages[page as usize].get_or_init(empty_page);
        for (era, stored) in eras.iter().zip(bytes.chunks_exact(ERA_BYTES as usize)) {
            let number = stored.try_into().map_or(0, u32::from_le_bytes);
            era.store(number, Ordering::Release);
        }
        Ok(crc32fast::hash(&bytes))
    }

    /// Takes everything on page number `page` as never changed, in memory alone: what is there is
    /// damaged, and is about to be marked.
    pub fn disbelieve_page(&self, page: u64) {
        let eras = self.pages[page as usize].get_or_init(empty_page);
        eras.iter()
            .for_each(|era| era.store(Era::NEVER.number(), Ordering::Release));
    }

    /// The highest era on page number `page`.
    pub fn highest_on(&self, page: u64) -> Era {
        let page = self.pages[page as usize].get();
        let eras = page.into_iter().flat_map(|page| page.iter());
        Era::from_number(
            eras.map(|era| era.load(Ordering::Acquire))
                .max()
                .unwrap_or(0),
        )
    }

    /// What page number `page` sums to (CRC-32), as it is in memory.
    pub fn checksum(&self, page: u64) -> u32 {
        let mut sum = crc32fast::Hasher::new();
        match self.pages[page as usize].get() {
            Some(eras) => {
                eras.iter()
                    .for_each(|era| sum.update(&era.load(Ordering::Acquire).to_le_bytes()));
            }
            None => sum.update(&[0; PAGE_BYTES]),
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

    /// Gives all of `chunks` the era `era`: in the store first, then in memory.
    ///
    /// On an error memory is as it was, and the store may hold the new era for some of them.
    pub fn set(&self, chunks: &Chunks, era: Era) -> io::Result<()> {
        let bytes = era.number().to_le_bytes();
        for piece in pieces(chunks) {
            let length = (piece.end - piece.start) as usize;
            if length == 1 {
                self.store.store(piece.start * ERA_BYTES, &bytes)?;
            } else {
                self.store
                    .store(piece.start * ERA_BYTES, &bytes.repeat(length))?;
            }
            let page = self.pages[page_index(piece.start)].get_or_init(empty_page);
            for chunk in piece {
                page[place(chunk)].store(era.number(), Ordering::Release);
            }
        }
        Ok(())
    }

    /// The last chunk index, plus one, up to which no chunk from `chunk` on has a page.
    ///
    /// Equal to `chunk` where there is one: a quick way across what never changed.
    pub fn skip_untouched(&self, chunk: u64, end: u64) -> u64 {
        if chunk >= end || self.page_of(chunk).is_some() {
            return chunk;
        }
        let untouched = self.pages[page_index(chunk)..]
            .iter()
            .take_while(|page| page.get().is_none());
        ((page_index(chunk) + untouched.count()) as u64 * ERAS_PER_PAGE).min(end)
    }

    /// The store, to be synced or looked into.
    pub fn store(&self) -> &P {
        &self.store
    }

    fn page_of(&self, chunk: u64) -> Option<&Page> {
        self.pages[page_index(chunk)].get().map(Box::as_ref)
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

/// A page of eras is a page of memory and of the file: 4 KiB.
pub const ERAS_PER_PAGE: u64 = 1024;
const ERA_BYTES: u64 = 4;
const PAGE_BYTES: usize = (ERAS_PER_PAGE * ERA_BYTES) as usize;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::MemoryPages;

    #[test]
    fn what_was_never_set_is_never() {
        let eras = Eras::new(5000, MemoryPages::default());
        assert_eq!(eras.era(4999), Era::NEVER);
        assert_eq!(eras.skip_untouched(7, 5000), 5000);
    }

    #[test]
    fn a_run_across_pages_is_set_in_memory_and_in_the_store() {
        let eras = Eras::new(5000, MemoryPages::default());
        eras.set(&(1000..2050), Era::from_number(7)).unwrap();

        for (chunk, era) in [(999, 0), (1000, 7), (1024, 7), (2049, 7), (2050, 0)] {
            assert_eq!(eras.era(chunk).number(), era, "chunk {chunk}");
            let stored = eras.store().contents();
            let at = chunk as usize * 4;
            let found = stored.get(at..at + 4).map_or(0, |b| b[0]);
            assert_eq!(u32::from(found), era, "stored, chunk {chunk}");
        }
        assert_eq!(eras.skip_untouched(4000, 5000), 5000);
        assert_eq!(eras.skip_untouched(0, 5000), 0);
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
        let eras = Eras::new(10, Full);
        assert!(eras.set(&(0..1), Era::FIRST).is_err());
        assert_eq!(eras.era(0), Era::NEVER);
    }
}
