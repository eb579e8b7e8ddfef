use std::io;
use std::ops::Range;
use std::sync::OnceLock;

use bitmap::PageStore;

use crate::sync::{AtomicU64, Ordering};

/// For each granule of a disk, whether its old contents are kept, and how.
///
/// Two bits a granule in memory, on pages that come into being when they are needed; one byte a
/// granule in the store, so that writers on neighbouring granules need not agree. The store is
/// told first. A granule that was kept stays kept.
#[derive(Debug)]
pub(crate) struct Preserved<P> {
    pages: Box<[OnceLock<Box<Page>>]>,
    store: P,
}

/// How the old contents of a granule are kept.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Kept {
    /// Not at all: the disk still has them.
    Not = 0,
    /// In scratch.
    Data = 1,
    /// They were zeroes, in allocated space.
    Zero = 2,
    /// They were a hole.
    Hole = 3,
}

/// Neighbouring granules that are kept alike.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(crate) struct KeptRun {
    pub(crate) granules: Range<u64>,
    pub(crate) kept: Kept,
}

impl<P: PageStore> Preserved<P> {
    /// Nothing is kept yet, of `count` granules; `store` holds zeroes from [`STATES_OFFSET`] on.
    pub(crate) fn new(count: u64, store: P) -> Self {
        let pages = (0..count.div_ceil(GRANULES_PER_PAGE))
            .map(|_| OnceLock::new())
            .collect();
        Self { pages, store }
    }

    /// The same after a restart, as far as `store` has it; and how many granules are in scratch.
    pub(crate) fn reopen(count: u64, store: P) -> io::Result<(Self, u64)> {
        let preserved = Self::new(count, store);
        let (mut offset, mut in_scratch) = (STATES_OFFSET, 0);
        while let Some(stored) = preserved.store.stored(offset)? {
            let end = stored.end.min(STATES_OFFSET + count);
            let mut at = stored.start.max(STATES_OFFSET);
            while at < end {
                let mut states = [0; 4096];
                let length = states.len().min((end - at) as usize);
                preserved.store.load(at, &mut states[..length])?;
                for (granule, state) in (at - STATES_OFFSET..).zip(&states[..length]) {
                    in_scratch += u64::from(*state == Kept::Data as u8);
                    preserved.set(granule, u64::from(*state & 0b11));
                }
                at += length as u64;
            }
            offset = stored.end;
        }
        Ok((preserved, in_scratch))
    }

    /// How `granule` is kept.
    pub(crate) fn kept(&self, granule: u64) -> Kept {
        let Some(page) = self.pages[(granule / GRANULES_PER_PAGE) as usize].get() else {
            return Kept::Not;
        };
        let (word, shift) = place(granule);
        match page[word].load(Ordering::Acquire) >> shift & 0b11 {
            0 => Kept::Not,
            1 => Kept::Data,
            2 => Kept::Zero,
            _ => Kept::Hole,
        }
    }

    /// Whether nothing of `granules` is lacking.
    pub(crate) fn covers(&self, granules: &Range<u64>) -> bool {
        granules
            .clone()
            .all(|granule| self.kept(granule) != Kept::Not)
    }

    /// `granules` cut into runs that are kept alike.
    pub(crate) fn runs(&self, granules: Range<u64>) -> impl Iterator<Item = KeptRun> + '_ {
        let mut at = granules.start;
        std::iter::from_fn(move || {
            let start = at;
            if start >= granules.end {
                return None;
            }
            let kept = self.kept(start);
            at = (start + 1..granules.end)
                .find(|&g| self.kept(g) != kept)
                .unwrap_or(granules.end);
            Some(KeptRun {
                granules: start..at,
                kept,
            })
        })
    }

    /// Records that `run`, of which nothing was kept before, is kept now: in the store first.
    ///
    /// Whoever holds the claim on these granules calls this, and nobody else.
    pub(crate) fn keep(&self, run: &KeptRun) -> io::Result<()> {
        let length = (run.granules.end - run.granules.start) as usize;
        self.store.store(
            STATES_OFFSET + run.granules.start,
            &vec![run.kept as u8; length],
        )?;
        for granule in run.granules.clone() {
            self.set(granule, run.kept as u64);
        }
        Ok(())
    }

    fn set(&self, granule: u64, bits: u64) {
        if bits == 0 {
            return;
        }
        let page = self.pages[(granule / GRANULES_PER_PAGE) as usize]
            .get_or_init(|| Box::new(std::array::from_fn(|_| AtomicU64::new(0))));
        let (word, shift) = place(granule);
        page[word].fetch_or(bits << shift, Ordering::Release);
    }

    /// The store, whose first [`STATES_OFFSET`] bytes are the snapshot's own.
    pub(crate) fn store(&self) -> &P {
        &self.store
    }
}

fn place(granule: u64) -> (usize, u64) {
    let on_page = granule % GRANULES_PER_PAGE;
    (
        (on_page / GRANULES_PER_WORD) as usize,
        on_page % GRANULES_PER_WORD * 2,
    )
}

type Page = [AtomicU64; WORDS_PER_PAGE as usize];

/// Where the states begin in the store; a page for the snapshot's own record comes before.
pub(crate) const STATES_OFFSET: u64 = 4096;

const GRANULES_PER_WORD: u64 = 32;
/// A page of memory holds the bits of 64 MiB of disk.
const WORDS_PER_PAGE: u64 = if cfg!(feature = "loom") { 1 } else { 512 };
const GRANULES_PER_PAGE: u64 = GRANULES_PER_WORD * WORDS_PER_PAGE;

#[cfg(test)]
mod tests {
    use bitmap::MemoryPages;

    use super::*;

    #[test]
    fn runs_say_how_each_granule_is_kept_across_pages() {
        let preserved = Preserved::new(3 * GRANULES_PER_PAGE, MemoryPages::default());
        let border = GRANULES_PER_PAGE;
        let data = KeptRun {
            granules: border - 2..border + 1,
            kept: Kept::Data,
        };
        let hole = KeptRun {
            granules: border + 1..border + 2,
            kept: Kept::Hole,
        };
        preserved.keep(&data).unwrap();
        preserved.keep(&hole).unwrap();

        let found: Vec<_> = preserved.runs(border - 3..border + 4).collect();
        let before = KeptRun {
            granules: border - 3..border - 2,
            kept: Kept::Not,
        };
        let after = KeptRun {
            granules: border + 2..border + 4,
            kept: Kept::Not,
        };
        assert_eq!(found, [before, data.clone(), hole, after]);
        assert!(preserved.covers(&data.granules));
        assert!(!preserved.covers(&(border..border + 3)));
        let stored = preserved.store().contents();
        assert_eq!(
            stored[(STATES_OFFSET + border - 2) as usize..],
            [1, 1, 1, 3]
        );
    }
}
