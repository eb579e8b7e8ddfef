use std::ops::Range;
use std::sync::{Mutex, MutexGuard, PoisonError};

use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

/// Everything that is drawn in one schedule, and what went wrong on purpose.
pub(super) struct Sim {
    pub(super) seed: u64,
    state: Mutex<State>,
}

struct State {
    rng: ChaCha8Rng,
    /// Counts what happens, for before and after.
    now: u64,
    task: usize,
    rates: Rates,
    faults: Vec<Fault>,
    ahead: u64,
}

/// Where something can fail.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Place {
    /// The image of this disk, when it is read or asked for holes.
    ImageRead(usize),
    /// The image of this disk, when it is written.
    ImageWrite(usize),
    /// The image of this disk, when it is synced.
    ImageSync(usize),
    /// The map of this disk.
    Map(usize),
    /// The scratch of this snapshot, when it is read.
    ScratchRead(usize),
    /// The scratch of this snapshot, when it is written.
    ScratchWrite(usize),
    /// What this snapshot has kept.
    States(usize),
    /// The second copy of that.
    Second(usize),
    /// Where this snapshot would record that it is broken.
    Record(usize),
    /// The old eras of this snapshot.
    Aside(usize),
    /// Where nothing fails.
    Nowhere,
}

/// Something that failed on purpose.
#[derive(Clone, Debug)]
pub(super) struct Fault {
    pub(super) place: Place,
    pub(super) at: u64,
    pub(super) task: usize,
    /// What of the disk was concerned.
    pub(super) range: Range<u64>,
}

/// How many of a thousand calls fail.
#[derive(Clone, Copy, Default)]
struct Rates {
    image: u64,
    sync: u64,
    map: u64,
    scratch: u64,
    states: u64,
    record: u64,
    aside: u64,
}

impl Sim {
    pub(super) fn new(seed: u64) -> Self {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        let rates = Rates::draw(&mut rng);
        let state = State {
            rng,
            now: 0,
            task: 0,
            rates,
            faults: Vec::new(),
            ahead: 0,
        };
        Self {
            seed,
            state: Mutex::new(state),
        }
    }

    /// A number from 0 to `end`, exclusively.
    pub(super) fn below(&self, end: u64) -> u64 {
        self.state().rng.random_range(0..end)
    }

    pub(super) fn one_in(&self, many: u64) -> bool {
        self.below(many) == 0
    }

    pub(super) fn one_of<T: Clone>(&self, choices: &[T]) -> T {
        choices[self.below(choices.len() as u64) as usize].clone()
    }

    /// The number of what happens now. No two things have the same.
    pub(super) fn tick(&self) -> u64 {
        let mut state = self.state();
        state.now += 1;
        state.now
    }

    pub(super) fn enter_task(&self, task: usize) {
        self.state().task = task;
    }

    /// Whether the call at `place` that is about to be made fails; it concerns `range`.
    pub(super) fn fails(&self, place: Place, range: &Range<u64>) -> bool {
        if place == Place::Nowhere {
            return false;
        }
        let mut state = self.state();
        let rate = state.rates.of(place);
        let failed = rate > 0 && state.rng.random_range(0..1000) < rate;
        drop(state);
        if failed {
            self.fault(place, range);
        }
        failed
    }

    /// The call at `place` that is about to be made fails; it concerns `range`.
    pub(super) fn fault(&self, place: Place, range: &Range<u64>) {
        let at = self.tick();
        let mut state = self.state();
        let task = state.task;
        state.faults.push(Fault {
            place,
            at,
            task,
            range: range.clone(),
        });
    }

    /// From here on nothing fails.
    pub(super) fn heal(&self) {
        self.state().rates = Rates::default();
    }

    /// Whether something failed at a place that `explains` accepts.
    pub(super) fn failed(&self, explains: impl Fn(&Fault) -> bool) -> bool {
        self.state().faults.iter().any(explains)
    }

    /// Whether something failed, in the task that runs and since `since`, at a place that
    /// `explains` accepts.
    pub(super) fn failed_here(&self, since: u64, explains: impl Fn(Place) -> bool) -> bool {
        let task = self.state().task;
        self.failed(|fault| fault.task == task && fault.at > since && explains(fault.place))
    }

    pub(super) fn fault_count(&self) -> u64 {
        self.state().faults.len() as u64
    }

    pub(super) fn copies_ahead(&self) {
        self.state().ahead += 1;
    }

    pub(super) fn ahead_count(&self) -> u64 {
        self.state().ahead
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Rates {
    /// Half of all schedules are without faults; in the others some places fail.
    fn draw(rng: &mut ChaCha8Rng) -> Self {
        let mut rate = |often: u64| {
            if rng.random_bool(0.4) {
                rng.random_range(1..often)
            } else {
                0
            }
        };
        let rates = Self {
            image: rate(60),
            sync: rate(300),
            map: rate(100),
            scratch: rate(150),
            states: rate(150),
            record: rate(900),
            aside: rate(100),
        };
        if rng.random_bool(0.5) {
            rates
        } else {
            Self::default()
        }
    }

    fn of(self, place: Place) -> u64 {
        match place {
            Place::ImageRead(_) | Place::ImageWrite(_) => self.image,
            Place::ImageSync(_) => self.sync,
            Place::Map(_) => self.map,
            Place::ScratchRead(_) | Place::ScratchWrite(_) => self.scratch,
            Place::States(_) | Place::Second(_) => self.states,
            Place::Record(_) => self.record,
            Place::Aside(_) => self.aside,
            Place::Nowhere => 0,
        }
    }
}
