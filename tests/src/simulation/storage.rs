use std::cell::{Ref, RefCell};
use std::io;
use std::ops::Range;
use std::rc::Rc;
use std::sync::Arc;

use block::{Extent, Storage, Unreachable, Zeroing};
use bytes::Bytes;

use super::executor::pause;
use super::sim::{Place, Sim};

/// A disk in memory: others run before and after every effect, and in the middle of it.
#[derive(Clone)]
pub(super) struct SimStorage {
    sim: Arc<Sim>,
    reads: Place,
    writes: Place,
    syncs: Option<Place>,
    state: Rc<RefCell<Contents>>,
    elsewhere: Option<Rc<RefCell<Elsewhere>>>,
}

/// What storage on another machine may still do.
#[derive(Default)]
struct Elsewhere {
    /// Everything that was given up, or that was repeated.
    late: Vec<Late>,
}

/// A change that may be performed at any time from now on, and more than once.
#[derive(Clone)]
struct Late {
    range: Range<u64>,
    effect: Effect,
}

/// What a call does to any part of its range.
#[derive(Clone)]
enum Effect {
    /// Puts these bytes there, of which the first belongs at this offset.
    Put(u64, Bytes),
    Clear(Zeroing),
}

/// What is on a disk, and what has happened to it.
#[derive(Clone)]
pub(super) struct Contents {
    pub(super) bytes: Vec<u8>,
    /// Of each block, whether it is a hole.
    pub(super) holes: Vec<bool>,
    pub(super) block: u64,
    /// Calls that change something and have not ended.
    pub(super) in_flight: u64,
    /// Every call that changed something, with the era in which it was made.
    pub(super) changes: Vec<(Range<u64>, u32)>,
    /// The era that begins with each instant, as the model has it.
    pub(super) era: u32,
    /// When each sync took effect, and whether it succeeded.
    pub(super) syncs: Vec<(u64, bool)>,
    /// How often it could not be reached for a sync.
    pub(super) unreachable: u64,
    /// Its space was given back: what is written now is lost, and what is read is nothing.
    pub(super) released: bool,
}

impl SimStorage {
    /// A hole of `size` bytes that is told of in blocks of `block`.
    pub(super) fn image(sim: &Arc<Sim>, disk: usize, size: u64, block: u64) -> Self {
        Self::new(
            sim,
            (Place::ImageRead(disk), Place::ImageWrite(disk)),
            Some(Place::ImageSync(disk)),
            size,
            block,
        )
    }

    /// The scratch of a snapshot of a disk of `size` bytes.
    pub(super) fn scratch(sim: &Arc<Sim>, snapshot: usize, size: u64) -> Self {
        Self::new(
            sim,
            (Place::ScratchRead(snapshot), Place::ScratchWrite(snapshot)),
            None,
            size,
            4096,
        )
    }

    fn new(
        sim: &Arc<Sim>,
        (reads, writes): (Place, Place),
        syncs: Option<Place>,
        size: u64,
        block: u64,
    ) -> Self {
        let contents = Contents {
            bytes: vec![0; size as usize],
            holes: vec![true; size.div_ceil(block) as usize],
            block,
            in_flight: 0,
            changes: Vec::new(),
            era: 0,
            syncs: Vec::new(),
            unreachable: 0,
            released: false,
        };
        Self {
            sim: Arc::clone(sim),
            reads,
            writes,
            syncs,
            state: Rc::new(RefCell::new(contents)),
            elsewhere: None,
        }
    }

    /// The same on another machine.
    pub(super) fn elsewhere(self) -> Self {
        let elsewhere = Some(Rc::default());
        Self { elsewhere, ..self }
    }

    /// Performs, in whole or in part, something that was given up or has been performed already, if
    /// there is such a thing.
    pub(super) fn land(&self) -> bool {
        let late = match &self.elsewhere {
            Some(elsewhere) if !elsewhere.borrow().late.is_empty() => {
                self.sim.one_of(&elsewhere.borrow().late)
            }
            _ => return false,
        };
        let Range { start, end } = late.range;
        let words = |from: u64| self.sim.below((end - from) / 4 + 1) * 4;
        let start = if self.sim.one_in(2) {
            start
        } else {
            start + words(start)
        };
        let end = if self.sim.one_in(2) {
            end
        } else {
            start + words(start)
        };
        late.effect.apply(&mut self.state.borrow_mut(), start..end);
        true
    }

    /// Whether the byte at `at` may have come to be `byte` by itself.
    pub(super) fn may_have_landed(&self, at: u64, byte: u8) -> bool {
        let Some(elsewhere) = &self.elsewhere else {
            return false;
        };
        let elsewhere = elsewhere.borrow();
        let mut here = elsewhere
            .late
            .iter()
            .filter(|late| late.range.contains(&at));
        here.any(|late| match &late.effect {
            Effect::Put(offset, data) => data[(at - offset) as usize] == byte,
            Effect::Clear(_) => byte == 0,
        })
    }

    pub(super) fn contents(&self) -> Ref<'_, Contents> {
        self.state.borrow()
    }

    /// Puts `data` there before anything begins.
    pub(super) fn preset(&self, range: &Range<u64>, data: &[u8]) {
        let mut contents = self.state.borrow_mut();
        contents.bytes[range.start as usize..range.end as usize].copy_from_slice(data);
        contents.fill(range);
    }

    /// Gives its space back.
    pub(super) fn release(&self) {
        let mut contents = self.state.borrow_mut();
        assert_eq!(
            contents.in_flight, 0,
            "seed {}: scratch goes while it is written",
            self.sim.seed
        );
        contents.released = true;
        contents.bytes.fill(0);
    }

    /// Each of these counts as changed in `era`.
    pub(super) fn changed_in(&self, era: u32, ranges: &[Range<u64>]) {
        let changes = ranges.iter().map(|range| (range.clone(), era));
        self.state.borrow_mut().changes.extend(changes);
    }

    pub(super) fn begin_era(&self, era: u32) {
        self.state.borrow_mut().era = era;
    }

    /// Changes `range` in two steps, with time between them, or only in part and with an error; on
    /// another machine perhaps at any time later, and with an error, or once more.
    async fn change(&self, range: Range<u64>, effect: Effect) -> Done {
        let era = self.state.borrow().era;
        assert!(
            !self.state.borrow().released,
            "seed {}: scratch is written that has gone",
            self.sim.seed
        );
        self.state.borrow_mut().changes.push((range.clone(), era));
        self.state.borrow_mut().in_flight += 1;
        pause(&self.sim).await;
        let middle = range.start + self.sim.below((range.end - range.start) / 4 + 1) * 4;
        let is_late = self.elsewhere.is_some() && self.sim.one_in(LATE);
        let is_given_up = is_late && self.sim.one_in(2);
        let failed = if is_given_up {
            self.sim.fault(self.writes, &range);
            true
        } else {
            self.sim.fails(self.writes, &range)
        };
        let failure = failed.then(|| self.sim.below(3));
        if failure != Some(0) {
            effect.apply(&mut self.state.borrow_mut(), range.start..middle);
            pause(&self.sim).await;
        }
        if failure.is_none_or(|extent| extent == 2) {
            effect.apply(&mut self.state.borrow_mut(), middle..range.end);
            pause(&self.sim).await;
        }
        if let Some(elsewhere) = self.elsewhere.as_ref().filter(|_| is_late) {
            elsewhere.borrow_mut().late.push(Late { range, effect });
        }
        self.state.borrow_mut().in_flight -= 1;
        failure.map_or(Ok(()), |_| Err(io::Error::other("drawn")))
    }
}

impl Effect {
    fn apply(&self, contents: &mut Contents, range: Range<u64>) {
        let place = range.start as usize..range.end as usize;
        match self {
            Self::Put(offset, data) => {
                let from = &data[(range.start - offset) as usize..(range.end - offset) as usize];
                contents.bytes[place].copy_from_slice(from);
                contents.fill(&range);
            }
            Self::Clear(how) => {
                contents.bytes[place].fill(0);
                if how.unmaps() {
                    contents.punch(&range);
                } else {
                    contents.fill(&range);
                }
            }
        }
    }
}

type Done = io::Result<()>;

impl Storage for SimStorage {
    fn size(&self) -> u64 {
        self.state.borrow().bytes.len() as u64
    }

    async fn read(&self, offset: u64, buffer: &mut [u8]) -> Done {
        pause(&self.sim).await;
        let middle = self.sim.below(buffer.len() as u64 + 1) as usize;
        let at = offset as usize;
        let end = at + buffer.len();
        buffer[..middle].copy_from_slice(&self.state.borrow().bytes[at..at + middle]);
        pause(&self.sim).await;
        buffer[middle..].copy_from_slice(&self.state.borrow().bytes[at + middle..end]);
        pause(&self.sim).await;
        if self.sim.fails(self.reads, &(offset..end as u64)) {
            return Err(io::Error::other("drawn"));
        }
        Ok(())
    }

    async fn write(&self, offset: u64, data: &Bytes) -> Done {
        let range = offset..offset + data.len() as u64;
        self.change(range, Effect::Put(offset, data.clone())).await
    }

    async fn zero(&self, range: Range<u64>, how: Zeroing) -> Done {
        if how.fast() && self.sim.one_in(2) {
            let era = self.state.borrow().era;
            self.state.borrow_mut().changes.push((range, era));
            return Err(io::ErrorKind::Unsupported.into());
        }
        self.change(range, Effect::Clear(how)).await
    }

    async fn sync(&self) -> Done {
        pause(&self.sim).await;
        let failed = self
            .syncs
            .is_some_and(|place| self.sim.fails(place, &(0..self.size())));
        if failed && self.elsewhere.is_some() && self.sim.one_in(2) {
            self.state.borrow_mut().unreachable += 1;
            return Err(io::Error::other(Unreachable));
        }
        let now = self.sim.tick();
        self.state.borrow_mut().syncs.push((now, !failed));
        pause(&self.sim).await;
        if failed {
            return Err(io::Error::other("drawn"));
        }
        Ok(())
    }

    async fn extents(&self, range: Range<u64>) -> io::Result<Vec<Extent>> {
        pause(&self.sim).await;
        let mut extents = self.state.borrow().extents(&range);
        // As many as are cheap to tell.
        extents.truncate(1 + self.sim.below(extents.len() as u64) as usize);
        pause(&self.sim).await;
        // Asked for part of what is needed, it is needed all the same.
        if self.sim.fails(self.reads, &(0..self.size())) {
            return Err(io::Error::other("drawn"));
        }
        Ok(extents)
    }

    fn unsettled(&self) -> Vec<Range<u64>> {
        let elsewhere = self.elsewhere.iter();
        let late = elsewhere.flat_map(|elsewhere| elsewhere.borrow().late.clone());
        late.map(|late| late.range).collect()
    }

    fn is_elsewhere(&self) -> bool {
        self.elsewhere.is_some()
    }
}

impl Contents {
    /// What of `range` is a hole: adjacent extents.
    fn extents(&self, range: &Range<u64>) -> Vec<Extent> {
        let mut extents: Vec<Extent> = Vec::new();
        for block in range.start / self.block..range.end.div_ceil(self.block) {
            let start = (block * self.block).max(range.start);
            let end = ((block + 1) * self.block).min(range.end);
            let hole = self.holes[block as usize];
            match extents.last_mut() {
                Some(last) if last.hole == hole => last.range.end = end,
                _ => extents.push(Extent {
                    range: start..end,
                    hole,
                }),
            }
        }
        extents
    }

    /// Whether all of `range`, which is not empty, is a hole.
    pub(super) fn is_hole(&self, range: &Range<u64>) -> bool {
        matches!(&self.extents(range)[..], [extent] if extent.hole)
    }

    /// Takes what is kept of a granule for what was there.
    pub(super) fn take(&mut self, range: &Range<u64>, bytes: &[u8], hole: bool) {
        self.bytes[range.start as usize..range.end as usize].copy_from_slice(bytes);
        if hole {
            self.punch(range);
        } else {
            self.fill(range);
        }
    }

    fn fill(&mut self, range: &Range<u64>) {
        let blocks = range.start / self.block..range.end.div_ceil(self.block);
        if !range.is_empty() {
            self.holes[blocks.start as usize..blocks.end as usize].fill(false);
        }
    }

    fn punch(&mut self, range: &Range<u64>) {
        let last = if range.end == self.bytes.len() as u64 {
            self.holes.len() as u64
        } else {
            range.end / self.block
        };
        let blocks = range.start.div_ceil(self.block)..last;
        if !blocks.is_empty() {
            self.holes[blocks.start as usize..blocks.end as usize].fill(true);
        }
    }
}

/// On another machine one change in so many is performed later, or once more.
const LATE: u64 = 6;
