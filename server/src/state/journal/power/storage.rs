use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::rc::Rc;

use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

use super::super::log::Log;

/// A folder with one file in it, on storage that forgets what was not synced.
pub(super) struct Machine {
    random: RefCell<ChaCha8Rng>,
    /// The files that are found under the name: the newest last, and others only for as long as a
    /// power cut may bring them back.
    found: RefCell<Vec<Rc<Medium>>>,
    /// After so many steps the server is gone.
    fuse: Cell<u64>,
    /// Of a hundred calls, so many fail.
    rate: Cell<u64>,
    faults: Cell<u64>,
    made: Cell<u64>,
}

/// The bytes of a file.
struct Medium {
    number: u64,
    now: RefCell<Vec<u8>>,
    /// Of each sector that is not durable: what else it may be.
    loose: RefCell<BTreeMap<usize, Vec<Sector>>>,
    /// Sectors that the kernel has given up and takes for clean.
    stuck: RefCell<BTreeSet<usize>>,
    /// How long it is at least, after a power cut.
    durable_length: Cell<usize>,
}

type Sector = [u8; SECTOR];

impl Machine {
    pub(super) fn new(seed: u64) -> Rc<Self> {
        Rc::new(Self {
            random: RefCell::new(ChaCha8Rng::seed_from_u64(seed)),
            found: RefCell::new(vec![Medium::new(0)]),
            fuse: Cell::new(0),
            rate: Cell::new(0),
            faults: Cell::new(0),
            made: Cell::new(0),
        })
    }

    pub(super) fn below(&self, bound: u64) -> u64 {
        self.random.borrow_mut().random_range(0..bound)
    }

    pub(super) fn one_in(&self, bound: u64) -> bool {
        self.below(bound) == 0
    }

    /// How long the next server lives, and how its storage is.
    pub(super) fn draw(&self) {
        self.fuse.set(self.below(60));
        let rates = [0, 0, 5, 30];
        self.rate.set(rates[self.below(4) as usize]);
    }

    pub(super) fn heal(&self) {
        self.fuse.set(u64::MAX);
        self.rate.set(0);
    }

    pub(super) fn is_over(&self) -> bool {
        self.fuse.get() == 0
    }

    pub(super) fn may_fail(&self) -> bool {
        self.is_over() || self.rate.get() > 0
    }

    pub(super) fn faults(&self) -> u64 {
        self.faults.get()
    }

    pub(super) fn open(self: &Rc<Self>) -> SimFile {
        let medium = Rc::clone(self.found.borrow().last().expect("there is always one"));
        SimFile {
            machine: Rc::clone(self),
            medium,
        }
    }

    /// The server is gone, and with a power cut what was not durable, as far as is drawn.
    pub(super) fn crash(&self, power_cut: bool) {
        if power_cut {
            let mut found = self.found.borrow_mut();
            let which = self.below(found.len() as u64) as usize;
            let left = found.swap_remove(which);
            *found = vec![left];
            found[0].lose_power(self);
        }
    }

    /// A step of a call: it is done, it fails, or the server is gone before its end.
    fn step(&self) -> io::Result<()> {
        if self.fuse.get() == 0 {
            return Err(io::Error::other("the server is gone"));
        }
        self.fuse.set(self.fuse.get() - 1);
        if self.fuse.get() == 0 || self.below(100) < self.rate.get() {
            self.faults.set(self.faults.get() + 1);
            return Err(io::Error::other("drawn"));
        }
        Ok(())
    }
}

/// The file, as one server has it open.
pub(super) struct SimFile {
    machine: Rc<Machine>,
    medium: Rc<Medium>,
}

impl SimFile {
    /// Which of the files it is.
    pub(super) fn number(&self) -> u64 {
        self.medium.number
    }
}

impl Log for SimFile {
    fn load(&self, _: u64) -> io::Result<Vec<u8>> {
        Ok(self.medium.now.borrow().clone())
    }

    fn store(&self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        let done = self.machine.step();
        let length = if done.is_ok() {
            bytes.len()
        } else {
            // Nothing of it, some, or all and nobody hears of it.
            let sectors = bytes.len().div_ceil(SECTOR) as u64;
            (self.machine.below(sectors + 1) as usize * SECTOR).min(bytes.len())
        };
        if !self.machine.is_over() || self.machine.one_in(2) || done.is_ok() {
            self.medium.store(offset as usize, &bytes[..length]);
        }
        done
    }

    fn reserve_behind(&self, _: u64, _: u64) -> io::Result<()> {
        Ok(())
    }

    async fn sync(&self) -> io::Result<()> {
        let done = self.machine.step();
        match done {
            Ok(()) => self.medium.sync(),
            Err(_) if self.machine.is_over() => {}
            Err(_) => self.medium.fail_sync(),
        }
        done
    }

    fn successor(&self) -> io::Result<Self> {
        self.machine.step()?;
        let made = &self.machine.made;
        made.set(made.get() + 1);
        Ok(Self {
            machine: Rc::clone(&self.machine),
            medium: Medium::new(made.get()),
        })
    }

    fn succeed(&self) -> io::Result<()> {
        let done = self.machine.step();
        if done.is_ok() || self.machine.is_over() && self.machine.one_in(2) {
            self.machine
                .found
                .borrow_mut()
                .push(Rc::clone(&self.medium));
        }
        done
    }

    async fn sync_place(&self) -> io::Result<()> {
        self.machine.step()?;
        let mut found = self.machine.found.borrow_mut();
        let last = found.pop().expect("there is always one");
        *found = vec![last];
        Ok(())
    }
}

impl Medium {
    fn new(number: u64) -> Rc<Self> {
        Rc::new(Self {
            number,
            now: RefCell::default(),
            loose: RefCell::default(),
            stuck: RefCell::default(),
            durable_length: Cell::new(0),
        })
    }

    fn store(&self, offset: usize, bytes: &[u8]) {
        let mut now = self.now.borrow_mut();
        let end = (offset + bytes.len()).next_multiple_of(SECTOR);
        if now.len() < end {
            now.resize(end, 0);
        }
        for sector in offset / SECTOR..end / SECTOR {
            let was = sector_of(&now, sector);
            self.loose.borrow_mut().entry(sector).or_default().push(was);
            self.stuck.borrow_mut().remove(&sector);
        }
        now[offset..offset + bytes.len()].copy_from_slice(bytes);
    }

    fn sync(&self) {
        let stuck = self.stuck.borrow();
        self.loose
            .borrow_mut()
            .retain(|sector, _| stuck.contains(sector));
        self.durable_length.set(self.now.borrow().len());
    }

    fn fail_sync(&self) {
        self.stuck
            .borrow_mut()
            .extend(self.loose.borrow().keys().copied());
    }

    fn lose_power(&self, machine: &Machine) {
        let mut now = self.now.borrow_mut();
        let habit = machine.below(4);
        for (sector, states) in std::mem::take(&mut *self.loose.borrow_mut()) {
            let left = match habit {
                0 => 0,
                1 => states.len(),
                _ => machine.below(states.len() as u64 + 1) as usize,
            };
            if let Some(state) = states.get(left) {
                now[sector * SECTOR..(sector + 1) * SECTOR].copy_from_slice(state);
            }
        }
        if machine.one_in(2) {
            // The new length did not get there.
            let sectors = (now.len() - self.durable_length.get()) / SECTOR;
            let lost = machine.below(sectors as u64 + 1) as usize * SECTOR;
            let length = now.len() - lost;
            now.truncate(length);
        }
        self.stuck.borrow_mut().clear();
        self.durable_length.set(now.len());
    }
}

fn sector_of(bytes: &[u8], sector: usize) -> Sector {
    let found = &bytes[sector * SECTOR..(sector + 1) * SECTOR];
    found.try_into().expect("it is as long")
}

const SECTOR: usize = 512;
