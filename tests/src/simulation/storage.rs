use std::cell::{Ref, RefCell};
use std::io;
use std::ops::Range;
use std::rc::Rc;
use std::sync::Arc;

use block::{Extent, Storage, Zeroing};
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
            released: false,
        };
        Self {
            sim: Arc::clone(sim),
            reads,
            writes,
            syncs,
            state: Rc::new(RefCell::new(contents)),
        }
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

    pub(super) fn begin_era(&self, era: u32) {
        self.state.borrow_mut().era = era;
    }

    /// Changes `range` in two steps, with time between them, or only in part and with an error.
    async fn change(&self, range: Range<u64>, effect: impl Fn(&mut Contents, Range<u64>)) -> Done {
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
        let failure = self
            .sim
            .fails(self.writes, &range)
            .then(|| self.sim.below(3));
        if failure != Some(0) {
            effect(&mut self.state.borrow_mut(), range.start..middle);
            pause(&self.sim).await;
        }
        if failure.is_none_or(|extent| extent == 2) {
            effect(&mut self.state.borrow_mut(), middle..range.end);
            pause(&self.sim).await;
        }
        self.state.borrow_mut().in_flight -= 1;
        failure.map_or(Ok(()), |_| Err(io::Error::other("drawn")))
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
        let put = |contents: &mut Contents, range: Range<u64>| {
            let from = &data[(range.start - offset) as usize..(range.end - offset) as usize];
            contents.bytes[range.start as usize..range.end as usize].copy_from_slice(from);
            contents.fill(&range);
        };
        self.change(offset..offset + data.len() as u64, put).await
    }

    async fn zero(&self, range: Range<u64>, how: Zeroing) -> Done {
        if how.fast() && self.sim.one_in(2) {
            let era = self.state.borrow().era;
            self.state.borrow_mut().changes.push((range, era));
            return Err(io::ErrorKind::Unsupported.into());
        }
        let clear = |contents: &mut Contents, range: Range<u64>| {
            contents.bytes[range.start as usize..range.end as usize].fill(0);
            if how.unmaps() {
                contents.punch(&range);
            } else {
                contents.fill(&range);
            }
        };
        self.change(range, clear).await
    }

    async fn sync(&self) -> Done {
        pause(&self.sim).await;
        let failed = self
            .syncs
            .is_some_and(|place| self.sim.fails(place, &(0..self.size())));
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
