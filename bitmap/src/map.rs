use std::io;
use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::{Chunks, Era, EraRun, Eras, Granularity, PageStore, Run, Salt};

/// For each chunk of a live disk, the era of its last change.
///
/// Whoever writes marks first: [`older`](Self::older) says which chunks still carry an older era,
/// so that those can be put aside for open backups, and [`mark`](Self::mark) then replaces them.
/// Marking happens under the disk's gate, where the era does not change; so writers that meet on one
/// chunk store the same value, and no era is ever lowered.
#[derive(Debug)]
pub struct EraMap<P> {
    eras: Eras<P>,
    granularity: Granularity,
    size: AtomicU64,
}

impl<P: PageStore> EraMap<P> {
    /// The map of a disk of `size` bytes on which nothing has changed yet.
    pub fn new(size: u64, granularity: Granularity, salt: Salt, store: P) -> Self {
        let eras = Eras::new(size.div_ceil(granularity.bytes()), salt, store);
        Self {
            eras,
            granularity,
            size: AtomicU64::new(size),
        }
    }

    /// The chunk size.
    pub fn granularity(&self) -> Granularity {
        self.granularity
    }

    /// The size of the disk in bytes.
    pub fn size(&self) -> u64 {
        self.size.load(Ordering::Acquire)
    }

    /// Makes room for a disk of `size` bytes, of which nobody is told yet. One at a time may call
    /// this.
    pub fn make_room(&self, size: u64) -> io::Result<()> {
        self.eras.make_room(size.div_ceil(self.granularity.bytes()))
    }

    /// From now on the disk has `size` bytes, for which there is room.
    pub fn grow(&self, size: u64) {
        self.size.fetch_max(size, Ordering::AcqRel);
    }

    /// The era in which `chunk` last changed.
    pub fn era(&self, chunk: u64) -> Era {
        self.eras.era(chunk)
    }

    /// The chunks of `range`, in bytes, that do not carry `era` yet. Usually none.
    pub fn older(&self, range: &Range<u64>, era: Era) -> Vec<EraRun> {
        let mut runs: Vec<EraRun> = Vec::new();
        for chunk in self.granularity.chunks(range) {
            let found = self.eras.era(chunk);
            match runs.last_mut() {
                _ if found == era => {}
                Some(run) if run.era == found && run.chunks.end == chunk => run.chunks.end += 1,
                _ => runs.push(EraRun {
                    chunks: chunk..chunk + 1,
                    era: found,
                }),
            }
        }
        runs
    }

    /// Records that `chunks` change in `era`. On an error they must not be changed.
    pub fn mark(&self, chunks: &Chunks, era: Era) -> io::Result<()> {
        self.eras.set(chunks, era)
    }

    /// What of `range`, in bytes, changed in `since` or later: adjacent runs, covering all of it.
    pub fn changes(&self, range: Range<u64>, since: Era) -> impl Iterator<Item = Run> + '_ {
        let mut eras = self.eras.cursor();
        let look = move |chunk, end| {
            let (era, stop) = eras.stretch(chunk, end);
            (era >= since, stop)
        };
        runs(self.granularity, self.size(), range, look)
    }

    /// How many bytes changed in `since` or later.
    pub fn changed_bytes(&self, since: Era) -> u64 {
        dirty_bytes(self.changes(0..self.size(), since))
    }

    /// What is stored, page by page.
    pub fn eras(&self) -> &Eras<P> {
        &self.eras
    }

    /// How many bytes changed in `since` or later, as far as is known, in one of `presumed`: eras in
    /// which nothing was written, but marked after a power cut or for damage.
    pub fn presumed_bytes(&self, since: Era, presumed: &[Era]) -> u64 {
        if presumed.is_empty() {
            return 0;
        }
        let bytes = |chunk: u64| {
            let range = self.granularity.range(&(chunk..chunk + 1), self.size());
            range.end - range.start
        };
        let dirty = self.changes(0..self.size(), since).filter(|run| run.dirty);
        let chunks = dirty.flat_map(|run| self.granularity.chunks(&run.range));
        chunks
            .filter(|chunk| presumed.contains(&self.era(*chunk)))
            .map(bytes)
            .sum()
    }

    /// Marks in `era` every chunk that `range`, in bytes, touches and that is older.
    pub fn presume(&self, range: &Range<u64>, era: Era) -> io::Result<()> {
        let range = range.start.min(self.size())..range.end.min(self.size());
        for run in self.older(&range, era) {
            self.mark(&run.chunks, era)?;
        }
        Ok(())
    }
}

/// Turns a walk over chunks into runs over the bytes of `range`.
///
/// `look(chunk, end)` says whether that chunk is dirty, and up to where, at most `end`, all is known to be
/// like it. Each chunk is looked at once.
pub(crate) fn runs(
    granularity: Granularity,
    size: u64,
    range: Range<u64>,
    mut look: impl FnMut(u64, u64) -> (bool, u64),
) -> impl Iterator<Item = Run> {
    let end = granularity.chunks(&range).end;
    let mut at = range.start;
    let mut seen = None;
    std::iter::from_fn(move || {
        if at >= range.end {
            return None;
        }
        let start = at;
        let (dirty, mut stop) = seen
            .take()
            .unwrap_or_else(|| look(start / granularity.bytes(), end));
        while stop < end {
            let next = look(stop, end);
            if next.0 != dirty {
                seen = Some(next);
                break;
            }
            stop = next.1;
        }
        at = granularity.range(&(0..stop), size).end.min(range.end);
        Some(Run {
            range: start..at,
            dirty,
        })
    })
}

pub(crate) fn dirty_bytes(runs: impl Iterator<Item = Run>) -> u64 {
    runs.filter(|run| run.dirty)
        .map(|run| run.range.end - run.range.start)
        .sum()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::MemoryPages;

    const CHUNK: u64 = 64 << 10;

    fn map(size: u64) -> EraMap<MemoryPages> {
        EraMap::new(
            size,
            Granularity::DEFAULT,
            Salt::default(),
            MemoryPages::default(),
        )
    }

    fn write(map: &EraMap<MemoryPages>, range: Range<u64>, era: u32) {
        for run in map.older(&range, Era::from_number(era)) {
            map.mark(&run.chunks, Era::from_number(era)).unwrap();
        }
    }

    #[test]
    fn a_mark_that_is_there_already_is_not_made_again() {
        let map = map(10 * CHUNK);
        write(&map, 0..1, 2);
        assert_eq!(map.older(&(0..CHUNK), Era::from_number(2)), []);
        let older = map.older(&(0..3 * CHUNK), Era::from_number(2));
        assert_eq!(
            older,
            [EraRun {
                chunks: 1..3,
                era: Era::NEVER
            }]
        );
    }

    #[test]
    fn every_checkpoint_sees_what_changed_in_its_era_or_later() {
        let map = map(10 * CHUNK);
        write(&map, CHUNK..CHUNK + 1, 2);
        write(&map, 3 * CHUNK - 1..3 * CHUNK + 1, 3);

        assert_eq!(map.changed_bytes(Era::from_number(2)), 3 * CHUNK);
        assert_eq!(map.changed_bytes(Era::from_number(3)), 2 * CHUNK);
        assert_eq!(map.changed_bytes(Era::from_number(4)), 0);
        let runs: Vec<_> = map.changes(0..10 * CHUNK, Era::from_number(3)).collect();
        let expected = [
            Run {
                range: 0..2 * CHUNK,
                dirty: false,
            },
            Run {
                range: 2 * CHUNK..4 * CHUNK,
                dirty: true,
            },
            Run {
                range: 4 * CHUNK..10 * CHUNK,
                dirty: false,
            },
        ];
        assert_eq!(runs, expected);
    }

    #[test]
    fn runs_are_cut_to_the_range_that_was_asked_for_and_to_the_disk() {
        let map = map(2 * CHUNK + 512);
        write(&map, 2 * CHUNK..2 * CHUNK + 1, 2);
        let runs: Vec<_> = map
            .changes(2 * CHUNK + 1..2 * CHUNK + 512, Era::from_number(2))
            .collect();
        assert_eq!(
            runs,
            [Run {
                range: 2 * CHUNK + 1..2 * CHUNK + 512,
                dirty: true
            }]
        );
        assert_eq!(map.changed_bytes(Era::from_number(2)), 512);
    }

    #[test]
    fn an_untouched_disk_of_16_tib_is_one_clean_run() {
        let map = map(16 << 40);
        let runs: Vec<_> = map.changes(0..16 << 40, Era::from_number(2)).collect();
        assert_eq!(
            runs,
            [Run {
                range: 0..16 << 40,
                dirty: false
            }]
        );
    }

    #[test]
    fn untouched_pages_merge_with_clean_neighbours() {
        let map = map(16 << 40);
        write(&map, 0..1, 1);
        write(&map, (1 << 40)..(1 << 40) + 1, 5);
        let runs: Vec<_> = map.changes(0..16 << 40, Era::from_number(2)).collect();
        assert_eq!(runs.len(), 3);
        assert_eq!(
            runs[1],
            Run {
                range: 1 << 40..(1 << 40) + CHUNK,
                dirty: true
            }
        );
    }
}
