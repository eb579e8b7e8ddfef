use std::cell::{Cell, RefCell};
use std::collections::BTreeSet;
use std::ops::Range;
use std::rc::Rc;
use std::sync::Arc;

use bitmap::{Era, EraMap, Granularity, Salt};
use scratch::{Frozen, OnError, Quota, Snapshot};
use stillpoint::disk::Disk;

use super::capture::Capture;
use super::history::{Operation, contents_of};
use super::sim::{Fault, Place, Sim};
use super::storage::{Contents, SimStorage};
use super::world::{SimPace, SimPages, SimWorld};
use super::{GRANULE, Tally};

/// All that takes part in one schedule, and what is known about it.
pub(super) struct Stage {
    pub(super) sim: Arc<Sim>,
    /// How many tasks, from the first on, are guests.
    pub(super) guests: usize,
    pub(super) disks: Vec<Subject>,
    /// What gives way when something cannot be kept.
    pub(super) on_error: OnError,
    /// What all snapshots may take together.
    pub(super) scratch: Arc<Quota>,
    /// Whether there is a limit to that.
    pub(super) limits_scratch: bool,
    pub(super) capture: Rc<RefCell<Capture>>,
    /// Everything that guests did; the first entries are what was there before.
    pub(super) operations: RefCell<Vec<Operation>>,
    /// Everything that was ever frozen.
    pub(super) snapshots: RefCell<Vec<Rc<Kept>>>,
    /// When each freeze began and had returned, and the copy of each disk in it.
    pub(super) moments: RefCell<Vec<Moment>>,
    pub(super) tally: Cell<Tally>,
}

/// A disk, and the model of it.
pub(super) struct Subject {
    pub(super) index: usize,
    pub(super) disk: Arc<Disk<SimWorld>>,
    pub(super) image: SimStorage,
    pub(super) map: SimPages,
    pub(super) size: u64,
    pub(super) chunk: u64,
    /// Every era that began, and the disk as it was then.
    pub(super) instants: RefCell<Vec<Instant>>,
    /// Eras are not used twice, not even if the freeze that was to begin them failed.
    pub(super) last_era: Cell<u32>,
    /// Operations that failed, with the eras in which they may have marked something.
    pub(super) failed: RefCell<Vec<(Range<u64>, Range<u32>)>>,
}

#[derive(Clone)]
pub(super) struct Instant {
    pub(super) era: u32,
    pub(super) copy: Rc<Contents>,
}

/// A moment at which one disk or several were frozen together.
pub(super) struct Moment {
    pub(super) begun: u64,
    pub(super) returned: u64,
    pub(super) copies: Vec<(usize, Rc<Contents>)>,
}

/// An instant that is kept, and what it is kept in.
pub(super) struct Kept {
    pub(super) index: usize,
    pub(super) disk: usize,
    pub(super) instant: Instant,
    pub(super) frozen: Frozen<SimWorld>,
    pub(super) scratch: SimStorage,
    pub(super) states: SimPages,
    pub(super) second: SimPages,
    pub(super) aside: SimPages,
    pub(super) opened: u64,
    pub(super) ended: Cell<bool>,
    /// What was in scratch has gone.
    pub(super) released: Cell<bool>,
}

/// For each chunk, whether it changed: surely, or perhaps.
pub(super) struct Changed {
    pub(super) surely: Vec<bool>,
    pub(super) perhaps: Vec<bool>,
}

impl Stage {
    pub(super) fn new(sim: &Arc<Sim>) -> Self {
        let limits_scratch = sim.one_in(4);
        let limit = limits_scratch.then(|| (2 + sim.below(30)) * GRANULE);
        let mut stage = Self {
            sim: Arc::clone(sim),
            guests: 2 + sim.below(6) as usize,
            disks: Vec::new(),
            on_error: sim.one_of(&[OnError::BreakBackup, OnError::FailGuestWrite]),
            scratch: Arc::new(Quota::new(limit)),
            limits_scratch,
            capture: Rc::default(),
            operations: RefCell::default(),
            snapshots: RefCell::default(),
            moments: RefCell::default(),
            tally: Cell::default(),
        };
        for index in 0..=sim.below(2) as usize {
            let subject = stage.subject(index);
            stage.disks.push(subject);
        }
        stage
    }

    fn subject(&self, index: usize) -> Subject {
        let sim = &self.sim;
        // An odd size now and then, so that the last granule and the last chunk are partial ones.
        let size = sim.one_of(&[8, 16, 24, 48]) * GRANULE - sim.one_of(&[0, 0, 512, 3584]);
        let chunk = sim.one_of(&[4096, 8192, 16_384]);
        let mut image = SimStorage::image(sim, index, size, sim.one_of(&[512, 1024, 4096]));
        if sim.one_in(3) {
            image = image.elsewhere();
        }
        for _ in 0..sim.below(4) {
            let range = self.stretch(size, 6 * GRANULE);
            let zero = sim.one_in(3);
            let data = self.operation(index, range.clone(), zero, 0);
            self.operations.borrow_mut()[data].completed = Some(0);
            image.preset(&range, &contents_of(data, &range, zero));
        }
        let map = SimPages::new(sim, Place::Map(index));
        let granularity = Granularity::new(chunk).expect("all of them are powers of two");
        let era = 1 + sim.below(3) as u32;
        image.begin_era(era);
        let pace = SimPace {
            sim: Arc::clone(sim),
            capture: Rc::clone(&self.capture),
        };
        let eras = Arc::new(EraMap::new(size, granularity, Salt::default(), map.clone()));
        // What a power cut leaves is another simulation's matter.
        let disk = Disk::new(image.clone(), eras, None, Era::from_number(era), pace);
        #[expect(
            clippy::arc_with_non_send_sync,
            reason = "the server's API, on one thread here"
        )]
        let disk = Arc::new(disk);
        Subject {
            index,
            disk,
            image,
            map,
            size,
            chunk,
            instants: RefCell::default(),
            last_era: Cell::new(era),
            failed: RefCell::default(),
        }
    }

    /// A range of whole words, somewhere on a disk of `size` bytes, of at most `length_max` bytes.
    pub(super) fn stretch(&self, size: u64, length_max: u64) -> Range<u64> {
        let sim = &self.sim;
        let unit = sim.one_of(&[4, 512, 4096]);
        // Often in the same place, so that many meet there.
        let crowd = sim.one_of(&[size, size, 4 * GRANULE, GRANULE]);
        let within = size.min(crowd);
        let start = sim.below(within / unit) * unit;
        let length = unit * (1 + sim.below(length_max / unit));
        start..(start + length).min(size)
    }

    /// Enters an operation that begins at `issued`; its number is what it writes.
    pub(super) fn operation(
        &self,
        disk: usize,
        range: Range<u64>,
        zero: bool,
        issued: u64,
    ) -> usize {
        let mut operations = self.operations.borrow_mut();
        operations.push(Operation {
            disk,
            range,
            zero,
            issued,
            completed: None,
            succeeded: true,
        });
        operations.len() - 1
    }

    /// The instants that are kept now.
    pub(super) fn open(&self) -> Vec<Rc<Kept>> {
        let snapshots = self.snapshots.borrow();
        snapshots
            .iter()
            .filter(|kept| !kept.ended.get())
            .cloned()
            .collect()
    }

    pub(super) fn count(&self, what: impl FnOnce(&mut Tally)) {
        let mut tally = self.tally.get();
        what(&mut tally);
        self.tally.set(tally);
    }
}

impl Subject {
    /// What changed in the eras of `eras`.
    pub(super) fn changed(&self, eras: &Range<u32>) -> Changed {
        let count = self.size.div_ceil(self.chunk) as usize;
        let mut changed = Changed {
            surely: vec![false; count],
            perhaps: vec![false; count],
        };
        for (range, era) in &self.image.contents().changes {
            if eras.contains(era) {
                changed.surely[self.chunks(range)].fill(true);
            }
        }
        for (range, between) in &*self.failed.borrow() {
            if between.start < eras.end && eras.start < between.end {
                changed.perhaps[self.chunks(range)].fill(true);
            }
        }
        changed
    }

    pub(super) fn chunks(&self, range: &Range<u64>) -> Range<usize> {
        (range.start / self.chunk) as usize..range.end.div_ceil(self.chunk) as usize
    }

    /// The eras of all instants so far that are older than `era`.
    pub(super) fn bases(&self, era: u32) -> BTreeSet<u32> {
        let instants = self.instants.borrow();
        instants
            .iter()
            .map(|instant| instant.era)
            .filter(|base| *base < era)
            .collect()
    }
}

impl Kept {
    pub(super) fn snapshot(&self) -> &Arc<Snapshot<SimWorld>> {
        self.frozen.snapshot()
    }

    fn lacks(&self, range: &Range<u64>) -> bool {
        let mut granules = range.start / GRANULE..range.end.div_ceil(GRANULE);
        let states = Snapshot::<SimWorld>::RECORD_BYTES;
        granules.any(|granule| self.states.byte(states + granule) == 0)
    }

    pub(super) fn title(&self, seed: u64) -> String {
        format!("seed {seed}, snapshot {} of disk {}", self.index, self.disk)
    }

    /// Whether this may be broken because of `fault`.
    pub(super) fn may_break_by(&self, fault: &Fault, writers: usize) -> bool {
        match fault.place {
            Place::ScratchWrite(index)
            | Place::States(index)
            | Place::Second(index)
            | Place::Aside(index) => index == self.index,
            // Only if it still lacks something of what could not be read for a write.
            Place::ImageRead(disk) => {
                disk == self.disk
                    && fault.at > self.opened
                    && fault.task < writers
                    && self.lacks(&fault.range)
            }
            Place::ImageSync(disk) => disk == self.disk,
            _ => false,
        }
    }
}
