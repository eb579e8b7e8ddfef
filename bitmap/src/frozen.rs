use std::io;
use std::ops::Range;
use std::sync::Arc;

use crate::map::{dirty_bytes, runs};
use crate::{Era, EraMap, EraRun, Eras, PageStore, Run};

/// An era map as it was at one moment, while the live one goes on.
///
/// Everything rests on one order: an era that would be overwritten is put aside first, then the
/// live map changes. So whoever reads the past loads the live era, and only where that is no longer
/// from before the moment looks at what was put aside.
#[derive(Debug)]
pub struct FrozenEras<P> {
    live: Arc<EraMap<P>>,
    aside: Eras<P>,
    frozen_in: Era,
    /// Of the disk at this moment; it may be larger by now.
    size: u64,
}

impl<P: PageStore> FrozenEras<P> {
    /// The eras of `live` as they are when era `frozen_in` begins, at which the disk has `size`
    /// bytes; `store` holds only zeroes.
    pub fn new(live: Arc<EraMap<P>>, size: u64, frozen_in: Era, store: P) -> Self {
        let count = size.div_ceil(live.granularity().bytes());
        let aside = Eras::new(count, live.eras().salt().aside(frozen_in), store);
        Self {
            live,
            aside,
            frozen_in,
            size,
        }
    }

    /// The same after a restart: what was put aside is in `store`. What is damaged there counts as
    /// missing.
    pub fn reopen(live: Arc<EraMap<P>>, size: u64, frozen_in: Era, store: P) -> io::Result<Self> {
        let frozen = Self::new(live, size, frozen_in, store);
        frozen.aside.load_stored()?;
        Ok(frozen)
    }

    /// What was put aside, to be synced.
    pub fn store(&self) -> Arc<P> {
        self.aside.store()
    }

    /// The era that began at this moment: what carries it, or a later one, changed afterwards.
    pub fn frozen_in(&self) -> Era {
        self.frozen_in
    }

    /// The size of the disk at this moment, in bytes.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// Keeps what is about to be overwritten. Of no effect on what changed after the moment, nor on
    /// what was not there yet.
    pub fn put_aside(&self, run: &EraRun) -> io::Result<()> {
        let chunks = run.chunks.start..run.chunks.end.min(self.aside.count());
        if run.era >= self.frozen_in || chunks.is_empty() {
            return Ok(());
        }
        // No checkpoint is as old as the first era, so it says the same as never; and stored as a
        // number other than zero it can be told from what is missing.
        self.aside.set(&chunks, run.era.max(Era::FIRST))
    }

    /// What of `range`, in bytes, had changed in `since` or later by then: adjacent runs, covering
    /// all of it.
    pub fn changes(&self, range: Range<u64>, since: Era) -> impl Iterator<Item = Run> + '_ {
        let (mut eras, mut aside) = (self.live.eras().cursor(), self.aside.cursor());
        let look = move |chunk, end| {
            let (live, stop) = eras.stretch(chunk, end);
            if live < self.frozen_in {
                return (live >= since, stop);
            }
            // Whatever should have been put aside and was not counts as changed.
            let aside = aside.era(chunk);
            (aside >= since || aside == Era::NEVER, stop)
        };
        runs(self.live.granularity(), self.size, range, look)
    }

    /// How many bytes had changed in `since` or later by then.
    pub fn changed_bytes(&self, since: Era) -> u64 {
        dirty_bytes(self.changes(0..self.size, since))
    }

    /// How many of those bytes carried one of `presumed`: eras in which nothing was written, but
    /// marked after a power cut or for damage.
    pub fn presumed_bytes(&self, since: Era, presumed: &[Era]) -> u64 {
        if presumed.is_empty() {
            return 0;
        }
        let (granularity, size) = (self.live.granularity(), self.size);
        let bytes = |chunk: u64| {
            let range = granularity.range(&(chunk..chunk + 1), size);
            range.end - range.start
        };
        let dirty = self.changes(0..size, since).filter(|run| run.dirty);
        let chunks = dirty.flat_map(|run| granularity.chunks(&run.range));
        chunks
            .filter(|chunk| presumed.contains(&self.era(*chunk)))
            .map(bytes)
            .sum()
    }

    /// The era that `chunk` had; never for what is missing.
    fn era(&self, chunk: u64) -> Era {
        let live = self.live.era(chunk);
        if live < self.frozen_in {
            live
        } else {
            self.aside.era(chunk)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Granularity, MemoryPages, Salt};

    const CHUNK: u64 = 64 << 10;

    struct Guest {
        map: Arc<EraMap<MemoryPages>>,
        open: Vec<FrozenEras<MemoryPages>>,
        era: Era,
    }

    impl Guest {
        fn new(chunks: u64) -> Self {
            let map = EraMap::new(
                chunks * CHUNK,
                Granularity::DEFAULT,
                Salt::default(),
                MemoryPages::default(),
            )
            .into();
            Self {
                map,
                open: Vec::new(),
                era: Era::FIRST,
            }
        }

        fn freeze(&mut self) -> Era {
            self.era = self.era.next().unwrap();
            let frozen = FrozenEras::new(
                Arc::clone(&self.map),
                self.map.size(),
                self.era,
                MemoryPages::default(),
            );
            self.open.push(frozen);
            self.era
        }

        fn write(&self, chunk: u64) {
            let range = chunk * CHUNK..chunk * CHUNK + 1;
            for run in self.map.older(&range, self.era) {
                for frozen in &self.open {
                    frozen.put_aside(&run).unwrap();
                }
                self.map.mark(&run.chunks, self.era).unwrap();
            }
        }
    }

    fn dirty(frozen: &FrozenEras<MemoryPages>, since: Era, chunks: u64) -> Vec<u64> {
        let runs = frozen
            .changes(0..chunks * CHUNK, since)
            .filter(|run| run.dirty);
        runs.flat_map(|run| run.range.start / CHUNK..run.range.end / CHUNK)
            .collect()
    }

    #[test]
    fn a_chunk_written_before_and_again_after_the_moment_stays_dirty() {
        let mut guest = Guest::new(4);
        let base = guest.freeze();
        guest.write(1);
        guest.freeze();
        guest.write(1);
        guest.write(2);
        assert_eq!(dirty(&guest.open[1], base, 4), [1]);
    }

    #[test]
    fn each_moment_keeps_its_own_map_for_every_base() {
        let mut guest = Guest::new(8);
        let first = guest.freeze();
        guest.write(0);
        let second = guest.freeze();
        guest.write(0);
        guest.write(3);
        let third = guest.freeze();
        for chunk in 0..8 {
            guest.write(chunk);
        }
        assert_eq!(dirty(&guest.open[0], first, 8), []);
        assert_eq!(dirty(&guest.open[1], first, 8), [0]);
        assert_eq!(dirty(&guest.open[1], second, 8), []);
        assert_eq!(dirty(&guest.open[2], first, 8), [0, 3]);
        assert_eq!(dirty(&guest.open[2], second, 8), [0, 3]);
        assert_eq!(dirty(&guest.open[2], third, 8), []);
    }

    #[test]
    fn what_was_not_put_aside_counts_as_changed() {
        let mut guest = Guest::new(2);
        let base = guest.freeze();
        guest.freeze();
        guest.map.mark(&(0..1), guest.era).unwrap();
        assert_eq!(dirty(&guest.open[1], base, 2), [0]);
    }
}
