use std::io;
use std::ops::Range;
use std::sync::OnceLock;

use bitmap::PageStore;

use crate::ahead::STRETCH;
use crate::code::{Code, Copy};
use crate::granules::GRANULE;
use crate::head::damaged;
use crate::sync::{AtomicU64, Ordering};

/// For each granule of a disk, whether its old contents are kept, and how.
///
/// Two bits a granule in memory, on pages that come into being when they are needed; one byte a
/// granule in each of two stores, so that writers on neighbouring granules need not agree. The stores
/// are told first, one after the other. A granule that was kept stays kept.
///
/// A process that is killed between the two leaves a granule that is kept, says the first, and that
/// the disk still has: that is harmless. The other way round, or two that say different things, is
/// damage.
#[derive(Debug)]
pub(crate) struct Preserved<P> {
    pages: Box<[OnceLock<Box<Page>>]>,
    /// Of the disk as it was. What is behind it nobody lacks.
    count: u64,
    store: P,
    second: P,
    code: Code,
}

/// How the old contents of a granule are kept.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Kept {
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
    /// Nothing is kept yet, of `count` granules; `store` holds zeroes from [`STATES_OFFSET`] on, and
    /// `second` nothing else.
    pub(crate) fn new(count: u64, store: P, second: P, code: Code) -> Self {
        let pages = (0..count.div_ceil(GRANULES_PER_PAGE))
            .map(|_| OnceLock::new())
            .collect();
        Self {
            pages,
            count,
            store,
            second,
            code,
        }
    }

    /// The same after a restart, as far as the stores have it; and how many granules are in scratch.
    ///
    /// Fails if anything in the stores is not what was stored.
    pub(crate) fn reopen(count: u64, store: P, second: P, code: Code) -> io::Result<(Self, u64)> {
        let preserved = Self::new(count, store, second, code);
        let mut in_scratch = 0;
        // A state that either of them has is a state, or damage to the other.
        for (store, first_byte) in [(&preserved.store, STATES_OFFSET), (&preserved.second, 0)] {
            let mut offset = first_byte;
            while let Some(stored) = store.stored(offset)? {
                let from = stored.start.max(first_byte) - first_byte;
                let to = stored.end.saturating_sub(first_byte).min(count);
                let mut at = from;
                while at < to {
                    let piece = at..to.min(at + PIECE);
                    in_scratch += preserved.take_in(&piece)?;
                    at = piece.end;
                }
                offset = stored.end;
            }
        }
        Ok((preserved, in_scratch))
    }

    /// Takes into memory what the stores say of `granules`, and says how many are in scratch that
    /// were not known of.
    fn take_in(&self, granules: &Range<u64>) -> io::Result<u64> {
        let length = (granules.end - granules.start) as usize;
        let (mut first, mut second) = (vec![0; length], vec![0; length]);
        self.store
            .load(STATES_OFFSET + granules.start, &mut first)?;
        self.second.load(granules.start, &mut second)?;
        let mut in_scratch = 0;
        for (granule, (first, second)) in granules.clone().zip(first.into_iter().zip(second)) {
            let kept = self.believe(granule, first, second)?;
            if kept == Kept::Not || self.kept(granule) == kept {
                continue;
            }
            in_scratch += u64::from(kept == Kept::Data);
            self.set(granule, kept as u64);
            if second == 0 {
                // So that damage to the first is noticed again from here on.
                let byte = self.code.byte(Copy::Second, granule, kept);
                self.second.store(granule, &[byte])?;
            }
        }
        Ok(in_scratch)
    }

    fn believe(&self, granule: u64, first: u8, second: u8) -> io::Result<Kept> {
        let states = (
            self.code.kept(Copy::First, granule, first),
            self.code.kept(Copy::Second, granule, second),
        );
        match states {
            (Some(kept), Some(Kept::Not)) => Ok(kept),
            (Some(kept), Some(again)) if kept == again => Ok(kept),
            _ => Err(damaged(format!(
                "the states are damaged at granule {granule}"
            ))),
        }
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

    /// What scratch can come to hold, in bytes.
    pub(crate) fn most_bytes(&self) -> u64 {
        self.count * GRANULE
    }

    /// How many are kept of the [`STRETCH`] granules from `first` on, a multiple of that.
    pub(crate) fn kept_of_stretch(&self, first: u64) -> u32 {
        let Some(page) = self.pages[(first / GRANULES_PER_PAGE) as usize].get() else {
            return 0;
        };
        let (word, shift) = place(first);
        let bits = page[word].load(Ordering::Relaxed) >> shift & STRETCH_MASK;
        ((bits | bits >> 1) & EVERY_GRANULE).count_ones()
    }

    /// Whether nothing of `granules` is lacking.
    pub(crate) fn covers(&self, granules: &Range<u64>) -> bool {
        (granules.start..granules.end.min(self.count))
            .all(|granule| self.kept(granule) != Kept::Not)
    }

    /// `granules`, as far as the disk went, cut into runs that are kept alike.
    pub(crate) fn runs(&self, granules: Range<u64>) -> impl Iterator<Item = KeptRun> + '_ {
        let mut at = granules.start;
        let granules = granules.start..granules.end.min(self.count);
        std::iter::from_fn(move || {
            let start = at;
            if start >= granules.end {
                return None;
            }
            let kept = self.kept(start);
            at = self.end_of_run(start + 1..granules.end, kept);
            Some(KeptRun {
                granules: start..at,
                kept,
            })
        })
    }

    /// Where the first of `granules` is that is not `kept`, or their end: a page or a word at a time
    /// where all of it is alike, as it mostly is on a large disk.
    fn end_of_run(&self, granules: Range<u64>, kept: Kept) -> u64 {
        let Range { start: mut at, end } = granules;
        while at < end {
            let alike = match &self.pages[(at / GRANULES_PER_PAGE) as usize].get() {
                None if kept == Kept::Not => GRANULES_PER_PAGE - at % GRANULES_PER_PAGE,
                Some(page) if at.is_multiple_of(GRANULES_PER_WORD) => {
                    let word = page[place(at).0].load(Ordering::Acquire);
                    let is_alike = word == kept as u64 * EVERY_GRANULE;
                    if is_alike { GRANULES_PER_WORD } else { 0 }
                }
                _ => 0,
            };
            if alike == 0 && self.kept(at) != kept {
                return at;
            }
            at += alike.max(1);
        }
        end
    }

    /// Records that `granules` are kept now, each as `states` says unless it was kept before: in the
    /// stores first.
    ///
    /// Whoever holds the claim on these granules calls this, and nobody else.
    pub(crate) fn keep(&self, granules: Range<u64>, states: &[Kept]) -> io::Result<()> {
        let states: Vec<Kept> = granules
            .clone()
            .zip(states)
            .map(|(granule, state)| match self.kept(granule) {
                Kept::Not => *state,
                kept => kept,
            })
            .collect();
        let bytes = |copy| -> Vec<u8> {
            let states = granules.clone().zip(&states);
            states
                .map(|(granule, kept)| self.code.byte(copy, granule, *kept))
                .collect()
        };
        self.store
            .store(STATES_OFFSET + granules.start, &bytes(Copy::First))?;
        self.second.store(granules.start, &bytes(Copy::Second))?;
        for (granule, kept) in granules.zip(&states) {
            self.set(granule, *kept as u64);
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

    /// The other store.
    pub(crate) fn second(&self) -> &P {
        &self.second
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

/// So many granules are looked at at a time after a restart.
const PIECE: u64 = 4096;

const GRANULES_PER_WORD: u64 = 32;
/// The low bit of each granule of a word.
const EVERY_GRANULE: u64 = u64::MAX / 0b11;
/// Both bits of the granules of a stretch, of which a word has some whole.
const STRETCH_MASK: u64 = (1 << (2 * STRETCH)) - 1;
/// A page of memory holds the bits of 64 MiB of disk.
const WORDS_PER_PAGE: u64 = if cfg!(feature = "loom") { 1 } else { 512 };
const GRANULES_PER_PAGE: u64 = GRANULES_PER_WORD * WORDS_PER_PAGE;

#[cfg(test)]
mod tests {
    use bitmap::MemoryPages;

    use super::*;

    const CODE: Code = Code::new(5);

    impl Preserved<MemoryPages> {
        fn keep_all(&self, granules: Range<u64>, kept: Kept) {
            let states = vec![kept; (granules.end - granules.start) as usize];
            self.keep(granules, &states).unwrap();
        }
    }

    #[test]
    fn runs_say_how_each_granule_is_kept_across_pages() {
        let pages = MemoryPages::default;
        let preserved = Preserved::new(3 * GRANULES_PER_PAGE, pages(), pages(), CODE);
        let border = GRANULES_PER_PAGE;
        let data = KeptRun {
            granules: border - 2..border + 1,
            kept: Kept::Data,
        };
        let hole = KeptRun {
            granules: border + 1..border + 2,
            kept: Kept::Hole,
        };
        for run in [&data, &hole] {
            preserved.keep_all(run.granules.clone(), run.kept);
        }

        let expected = |preserved: &Preserved<MemoryPages>| {
            let found: Vec<_> = preserved.runs(border - 3..border + 4).collect();
            let before = KeptRun {
                granules: border - 3..border - 2,
                kept: Kept::Not,
            };
            let after = KeptRun {
                granules: border + 2..border + 4,
                kept: Kept::Not,
            };
            assert_eq!(found, [before, data.clone(), hole.clone(), after]);
            assert!(preserved.covers(&data.granules));
            assert!(!preserved.covers(&(border..border + 3)));
        };
        expected(&preserved);
        let (first, second) = (preserved.store.contents(), preserved.second.contents());
        let (again, in_scratch) = reopen(first, second).unwrap();
        expected(&again);
        assert_eq!(in_scratch, 3);
    }

    #[test]
    fn runs_are_those_of_granules_looked_at_one_by_one() {
        let pages = MemoryPages::default;
        let preserved = Preserved::new(4 * GRANULES_PER_PAGE, pages(), pages(), CODE);
        let mut at = 5;
        for (length, kept) in [
            (200, Kept::Data),
            (32, Kept::Hole),
            (64, Kept::Zero),
            (1, Kept::Hole),
            (GRANULES_PER_PAGE + 3, Kept::Data),
        ] {
            let granules = at..at + length;
            at = granules.end + 7;
            preserved.keep_all(granules, kept);
        }
        let end = 4 * GRANULES_PER_PAGE;
        for range in [0..end, 3..end - 5, 32..64, 64..100, 70..71] {
            let found = preserved.runs(range.clone());
            let found = found.flat_map(|run| run.granules.map(move |g| (g, run.kept)));
            assert!(found.eq(range.clone().map(|g| (g, preserved.kept(g)))));
            let runs: Vec<_> = preserved.runs(range).collect();
            assert!(runs.windows(2).all(|two| two[0].kept != two[1].kept));
        }
    }

    const COUNT: u64 = 3 * GRANULES_PER_PAGE;

    fn reopen(first: Vec<u8>, second: Vec<u8>) -> io::Result<(Preserved<MemoryPages>, u64)> {
        Preserved::reopen(COUNT, first.into(), second.into(), CODE)
    }

    /// The stores of a snapshot that keeps granules 2 to 5 and 9, as they are after each store.
    fn histories() -> Vec<(Vec<u8>, Vec<u8>)> {
        let pages = MemoryPages::default;
        let preserved = Preserved::new(COUNT, pages(), pages(), CODE);
        let mut histories = vec![(vec![], vec![])];
        for (granules, kept) in [(2..4, Kept::Data), (4..6, Kept::Hole), (9..10, Kept::Zero)] {
            let before = preserved.second.contents();
            preserved.keep_all(granules, kept);
            histories.push((preserved.store.contents(), before));
            histories.push((preserved.store.contents(), preserved.second.contents()));
        }
        histories
    }

    #[test]
    fn a_kill_between_any_two_stores_is_no_damage() {
        for (number, (first, second)) in histories().into_iter().enumerate() {
            let (preserved, in_scratch) = reopen(first, second).unwrap();
            let kept: Vec<_> = (0..10).map(|g| preserved.kept(g)).collect();
            let runs = number.div_ceil(2);
            assert_eq!(in_scratch, if runs >= 1 { 2 } else { 0 }, "after {number}");
            let expected =
                |granule, at, state| if runs >= at { state } else { Kept::Not } == kept[granule];
            assert!(expected(3, 1, Kept::Data), "after {number}: {kept:?}");
            assert!(expected(4, 2, Kept::Hole), "after {number}: {kept:?}");
            assert!(expected(9, 3, Kept::Zero), "after {number}: {kept:?}");
            // What the second did not have it has now.
            let first = preserved.store.contents();
            let lost = vec![0; first.len()];
            let again = reopen(lost, preserved.second.contents());
            assert_eq!(again.is_err(), runs > 0, "after {number}");
        }
    }

    #[test]
    fn whatever_happens_to_one_store_nothing_wrong_is_believed() {
        let (first, second) = histories().pop().unwrap();
        let (good, _) = reopen(first.clone(), second.clone()).unwrap();
        let offset = STATES_OFFSET as usize;
        let mut bad: Vec<(Vec<u8>, Vec<u8>)> = Vec::new();
        for at in 0..14 {
            for byte in 0..=255 {
                let (mut a, mut b) = (first.clone(), second.clone());
                a.resize(offset + 14, 0);
                b.resize(14, 0);
                a[offset + at] = byte;
                b[at] = byte;
                bad.extend([(a, second.clone()), (first.clone(), b)]);
            }
            bad.push((first[..offset + at.min(9)].to_vec(), second.clone()));
            bad.push((first.clone(), second[..at.min(9)].to_vec()));
        }
        let mut missed = 0;
        for (first, second) in bad {
            let Ok((found, _)) = reopen(first.clone(), second.clone()) else {
                continue;
            };
            let wrong = (0..14).any(|g| found.kept(g) != good.kept(g));
            missed += u32::from(wrong);
        }
        // Where nothing was kept, three bytes of 255 are states.
        assert!(missed <= 9 * 3, "{missed}");
    }
}
