use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::io;
use std::ops::Range;
use std::rc::Rc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bitmap::{PageStore, PageTable};
use block::{Extent, Storage, Zeroing};
use bytes::Bytes;
use scratch::{Durable, Pace, Step, World};
use stillpoint::disk::{Disk, Durability, Ending, Loss};

use super::life::Header;
use super::medium::Medium;
use super::oracle::Oracle;
use super::shape::{CHUNK, SECTOR, Shape};
use crate::simulation::executor::pause;
use crate::simulation::sim::Sim;

/// A machine with a disk and its state, which outlive the servers that run on it.
pub(super) struct Machine {
    pub(super) sim: Arc<Sim>,
    pub(super) shape: Shape,
    /// Whether the image is on another machine, which may be killed together with the server.
    pub(super) is_elsewhere: bool,
    /// Four bytes for each sector of the disk: which write it is from.
    pub(super) image: File,
    /// How long it is, in bytes.
    length: File,
    pub(super) eras: File,
    pub(super) table: File,
    pub(super) lease: File,
    pub(super) header: File,
    pub(super) journal: File,
    pub(super) boot: Cell<u64>,
    /// What fails while guests write.
    pub(super) faults: Arc<Faults>,
    /// The disk's record that tracking was lost.
    pub(super) loss: File,
    /// The weakest of the servers since everything that they stored was durable.
    pub(super) weakest: Cell<Durability>,
    pub(super) seconds: Cell<u64>,
    /// Writes that were issued and have not ended: the sectors that have not changed yet.
    in_flight: RefCell<BTreeMap<u64, (Range<u64>, u32)>>,
    last_issued: Cell<u64>,
    /// Writing the image back has failed, of which the next sync tells.
    image_failed: Cell<bool>,
    pub(super) oracle: RefCell<Oracle>,
    /// The map was damaged since a start last ended.
    pub(super) rotten: Cell<bool>,
    /// The stored map as it once was.
    pub(super) old_eras: RefCell<Vec<u8>>,
    /// Of the server that runs.
    pub(super) disk: RefCell<Option<Arc<Disk<PowerWorld>>>>,
}

/// Of an era, in the stored map.
const ENTRY_BYTES: usize = 8;

/// How a server ends that nobody asked to.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Crash {
    Kill,
    PowerCut,
}

impl Machine {
    pub(super) fn new(sim: &Arc<Sim>) -> Self {
        let shape = Shape::draw(sim);
        let faults = Arc::new(Faults::default());
        let file = |unit, size| File::new(sim, &faults, unit, size);
        // What fails there is another matter.
        let sound = |unit, size| File::new(sim, &Arc::default(), unit, size);
        let pages = shape.pages();
        let table = file(512, 0);
        PageTable::create(pages, table.clone()).expect("nothing fails here");
        table.medium().settle();
        let length = sound(8, 8);
        length.medium().store(0, &shape.size.to_le_bytes());
        length.medium().settle();
        let loss = file(512, 2048);
        let at = Loss::<File>::OFFSET as usize;
        loss.medium().store(at, &Loss::<File>::empty());
        loss.medium().settle();
        Self {
            sim: Arc::clone(sim),
            is_elsewhere: sim.one_in(4),
            image: sound(4, shape.sectors() as usize * 4),
            length,
            eras: file(512, pages as usize * bitmap::PAGE_BYTES as usize),
            table,
            lease: file(512, 1024),
            header: sound(64, 64),
            journal: sound(16, 0),
            loss,
            boot: Cell::new(1),
            weakest: Cell::new(Durability::Power),
            seconds: Cell::new(1000),
            in_flight: RefCell::default(),
            last_issued: Cell::new(0),
            image_failed: Cell::new(false),
            oracle: RefCell::new(Oracle::new(sim.seed, &shape)),
            rotten: Cell::new(false),
            old_eras: RefCell::default(),
            disk: RefCell::default(),
            shape,
            faults,
        }
    }

    /// What the tracking of the next server is to survive.
    pub(super) fn draw_durability(&self) -> Durability {
        match self.sim.below(4) {
            0 => Durability::None,
            1 => Durability::Process,
            _ => Durability::Power,
        }
    }

    /// Everything that ran is gone. What was in flight lands now or never.
    pub(super) fn crash(&self, crash: Crash) {
        let habit = self.sim.below(3);
        for (_, (sectors, value)) in std::mem::take(&mut *self.in_flight.borrow_mut()) {
            for sector in sectors {
                if habit == 0 || habit == 1 && self.sim.one_in(2) {
                    self.put(sector, value);
                }
            }
        }
        self.oracle.borrow_mut().crashed(self.sim.tick());
        if self.sim.one_in(2) {
            self.old_eras
                .replace(self.eras.open().medium().now().to_vec());
        }
        *self.disk.borrow_mut() = None;
        self.faults.heal();
        self.seconds.set(self.seconds.get() + self.sim.below(100));
        let header = Header::read(self);
        if crash == Crash::Kill && header.is_believed(self) && self.sim.one_in(16) {
            self.image_failed.set(true);
            self.image.medium().lose_power(&self.sim);
            let active = self.shape.active(self.table.open().medium().now());
            self.oracle.borrow_mut().power_cut(&active, false);
            self.may_lose(Ending::PowerCut);
        }
        if crash == Crash::Kill && self.is_elsewhere && self.sim.one_in(2) {
            self.image.medium().lose_power(&self.sim);
        }
        if crash == Crash::PowerCut {
            self.image_failed.set(false);
            self.boot.set(self.boot.get() + 1);
            for file in [
                &self.image,
                &self.length,
                &self.eras,
                &self.table,
                &self.lease,
                &self.loss,
                &self.header,
                &self.journal,
            ] {
                file.lose_power();
            }
            self.check_lease();
            let clean = Header::read(self).clean;
            let active = self.shape.active(self.table.open().medium().now());
            self.oracle.borrow_mut().power_cut(&active, clean);
        }
        if !Header::read(self).clean {
            self.may_lose(match crash {
                Crash::Kill => Ending::Killed,
                Crash::PowerCut => Ending::PowerCut,
            });
        }
        self.oracle
            .borrow_mut()
            .found_journal(self.journal.medium().now());
    }

    /// Damages the map that is stored: some of it is zeroed, or flipped, or what it once was. The
    /// latter nobody can tell while a region of the page is active.
    pub(super) fn rot(&self) {
        let sim = &*self.sim;
        let active = self.shape.active(self.table.open().medium().now());
        let chunk = self.shape.stretch(sim, self.shape.size).start / CHUNK;
        let page = self.shape.page_of(chunk);
        if !Shape::is_filled(self.table.open().medium().now(), chunk) {
            return;
        }
        let calm = Shape::is_calm(self.table.open().medium().now(), chunk);
        let file = self.eras.open();
        let mut eras = file.medium();
        let old = self.old_eras.borrow();
        let entry = chunk as usize * ENTRY_BYTES;
        let sector = entry / 512 * 512;
        match sim.below(if calm { 6 } else { 2 }) {
            0 => {
                let start = sim.one_of(&[sector, entry, entry + 1]);
                let length = 1 + sim.below((sector + 512 - start) as u64) as usize;
                eras.damage(start, &vec![0; length]);
            }
            1 => {
                for _ in 0..=sim.below(3) {
                    let at = entry + sim.below(8) as usize;
                    let flipped = eras.now()[at] ^ 1 << sim.below(8);
                    eras.damage(at, &[flipped]);
                }
            }
            _ if !old.is_empty() => {
                eras.damage(sector, &old[sector..sector + 512]);
                // It stays calm: with what it was before, a power cut would give it active regions.
                self.table.settle();
            }
            _ => {}
        }
        self.rotten.set(true);
        let mut oracle = self.oracle.borrow_mut();
        oracle.rotted(&page, &active);
        // Found by a start that is interrupted, it is a doubt as after a power cut.
        oracle.may_lose |= self.weakest.get() != Durability::Power;
    }

    fn is_untracked(&self) -> bool {
        let disk = self.disk.borrow();
        disk.as_ref()
            .is_some_and(|disk| disk.is_lost_in(disk.tracking().era))
    }

    fn may_lose(&self, ending: Ending) {
        if self.weakest.get().why_lost(ending).is_some() {
            self.oracle.borrow_mut().may_lose = true;
        }
    }

    /// A change of the image that is later than the lease would be taken for someone else's.
    fn check_lease(&self) {
        let mut end = [0; 8];
        self.lease.medium().load(0, &mut end);
        let end = u64::from_le_bytes(end);
        // A write may wait for as long as the lease is renewed before its end.
        let last = self.last_issued.get().saturating_sub(10);
        let seed = self.sim.seed;
        assert!(
            last == 0 || end > last,
            "seed {seed}: a write was issued beyond the lease"
        );
    }

    fn put(&self, sector: u64, value: u32) {
        let at = sector as usize * 4;
        self.image.medium().store(at, &value.to_le_bytes());
    }

    /// How large the image is.
    pub(super) fn length(&self) -> u64 {
        let mut bytes = [0; 8];
        self.length.medium().load(0, &mut bytes);
        u64::from_le_bytes(bytes)
    }

    /// Who is told of the size that the image has by now finds all of it marked that is new.
    fn check_offer(&self) {
        let disk = self.disk.borrow();
        let disk = disk.as_ref().expect("a server runs");
        let image = self.image.medium();
        let now = disk_of(image.now(), self.length());
        self.forget_lost(disk);
        self.oracle.borrow().check_covered(disk.map(), now);
    }

    /// Of what went untracked nothing is promised.
    fn forget_lost(&self, disk: &Disk<PowerWorld>) {
        let mut oracle = self.oracle.borrow_mut();
        if let Some(loss) = disk.loss() {
            let before = oracle.lost_era();
            oracle.lost(loss.era.max(before));
        }
    }

    /// What is kept when the gate is closed.
    fn capture(&self) {
        let disk = self.disk.borrow();
        let disk = disk.as_ref().expect("a server runs");
        let now = self.sim.tick();
        if !self.oracle.borrow().is_making() {
            return;
        }
        self.forget_lost(disk);
        let mut oracle = self.oracle.borrow_mut();
        let image = self.image.medium();
        oracle.captured(disk.map(), disk_of(image.now(), disk.size()), now);
    }
}

/// What of an image is a disk of `size` bytes.
pub(super) fn disk_of(image: &[u8], size: u64) -> &[u8] {
    &image[..(size / SECTOR) as usize * 4]
}

/// How often the files of the state fail.
#[derive(Default)]
pub(super) struct Faults {
    pub(super) stores: Rate,
    pub(super) syncs: Rate,
    drawn: AtomicBool,
}

/// How many of a thousand calls fail.
#[derive(Default)]
pub(super) struct Rate(AtomicU64);

impl Rate {
    fn fails(&self, sim: &Sim) -> bool {
        let rate = self.0.load(Ordering::Relaxed);
        rate > 0 && sim.below(1000) < rate
    }
}

impl Faults {
    /// Half of all servers have none.
    pub(super) fn draw(&self, sim: &Sim) {
        let drawn = sim.one_in(2);
        self.drawn.store(drawn, Ordering::Relaxed);
        if !drawn {
            return;
        }
        for rate in [&self.stores, &self.syncs] {
            let often = sim.one_of(&[0, 20, 200, 900]);
            rate.0.store(often, Ordering::Relaxed);
        }
    }

    /// From here on nothing fails.
    pub(super) fn heal(&self) {
        for rate in [&self.stores, &self.syncs] {
            rate.0.store(0, Ordering::Relaxed);
        }
    }

    /// Whether something may have failed for the server that runs.
    pub(super) fn any(&self) -> bool {
        self.drawn.load(Ordering::Relaxed)
    }
}

/// A file, or the image of the disk.
#[derive(Clone)]
pub(super) struct File {
    sim: Arc<Sim>,
    faults: Arc<Faults>,
    medium: Arc<Mutex<Medium>>,
    /// The files that are found under the name: the newest last, and others only for as long as a
    /// power cut may bring them back.
    found: Arc<Mutex<Vec<Arc<Mutex<Medium>>>>>,
}

impl File {
    fn new(sim: &Arc<Sim>, faults: &Arc<Faults>, unit: usize, size: usize) -> Self {
        let medium = Arc::new(Mutex::new(Medium::new(unit, size)));
        Self {
            sim: Arc::clone(sim),
            faults: Arc::clone(faults),
            found: Arc::new(Mutex::new(vec![Arc::clone(&medium)])),
            medium,
        }
    }

    pub(super) fn medium(&self) -> MutexGuard<'_, Medium> {
        self.medium.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn found(&self) -> MutexGuard<'_, Vec<Arc<Mutex<Medium>>>> {
        self.found.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The file that is found under the name now.
    pub(super) fn open(&self) -> Self {
        let medium = Arc::clone(self.found().last().expect("there is always one"));
        Self {
            medium,
            ..self.clone()
        }
    }

    /// What is found under the name is durable, and the name too.
    fn settle(&self) {
        let durable = self.found().len() - 1;
        self.found().drain(..durable);
        self.open().medium().settle();
    }

    fn lose_power(&self) {
        let which = self.sim.below(self.found().len() as u64) as usize;
        let found = self.found().swap_remove(which);
        *self.found() = vec![found];
        self.open().medium().lose_power(&self.sim);
    }
}

impl PageStore for File {
    fn store(&self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        if self.faults.stores.fails(&self.sim) {
            // What belongs together is there or not; of a map, any of its entries.
            let unit = if bytes.len().is_multiple_of(512) {
                512
            } else {
                ENTRY_BYTES
            };
            let stored = self.sim.below((bytes.len() / unit) as u64 + 1) as usize * unit;
            self.medium().store(offset as usize, &bytes[..stored]);
            return Err(io::Error::other("drawn"));
        }
        self.medium().store(offset as usize, bytes);
        Ok(())
    }

    fn load(&self, offset: u64, bytes: &mut [u8]) -> io::Result<()> {
        self.medium().load(offset as usize, bytes);
        Ok(())
    }

    fn stored(&self, offset: u64) -> io::Result<Option<Range<u64>>> {
        let end = self.medium().now().len() as u64;
        Ok((offset < end).then_some(offset..end))
    }
}

impl Durable for File {
    async fn sync(&self) -> io::Result<()> {
        pause(&self.sim).await;
        let begun = self.medium().begin_sync();
        pause(&self.sim).await;
        if self.faults.syncs.fails(&self.sim) {
            self.medium().fail_sync();
            return Err(io::Error::other("drawn"));
        }
        self.medium().end_sync(begun);
        pause(&self.sim).await;
        Ok(())
    }

    fn successor(&self) -> io::Result<Self> {
        let next = self.medium().successor();
        Ok(Self {
            medium: Arc::new(Mutex::new(next)),
            ..self.clone()
        })
    }

    fn succeed(&self) -> io::Result<()> {
        if self.faults.stores.fails(&self.sim) {
            return Err(io::Error::other("drawn"));
        }
        self.found().push(Arc::clone(&self.medium));
        Ok(())
    }

    async fn sync_place(&self) -> io::Result<()> {
        pause(&self.sim).await;
        if self.faults.syncs.fails(&self.sim) {
            return Err(io::Error::other("drawn"));
        }
        let durable = self.found().len() - 1;
        pause(&self.sim).await;
        self.found().drain(..durable);
        pause(&self.sim).await;
        Ok(())
    }
}

pub(super) struct PowerWorld;

impl World for PowerWorld {
    type Image = Image;
    type Scratch = Image;
    type Pages = File;
    type Pace = MachinePace;
}

/// The disk, where every write takes a while.
pub(super) struct Image(pub(super) Rc<Machine>);

impl Image {
    async fn change(&self, range: Range<u64>, value: u32) -> io::Result<()> {
        let machine = &*self.0;
        let sectors = range.start / SECTOR..range.end.div_ceil(SECTOR);
        let id = machine.sim.tick();
        // Without a lease, what is left after a power cut is of no use.
        if machine.weakest.get() == Durability::Power && !machine.is_untracked() {
            machine.last_issued.set(machine.seconds.get());
        }
        machine.oracle.borrow_mut().issued(&range, id);
        let left = (sectors.clone(), value);
        machine.in_flight.borrow_mut().insert(id, left);
        let middle = sectors.start + machine.sim.below(sectors.end - sectors.start + 1);
        for part in [sectors.start..middle, middle..sectors.end] {
            pause(&machine.sim).await;
            let left = (part.end..sectors.end, value);
            machine.in_flight.borrow_mut().insert(id, left);
            part.for_each(|sector| machine.put(sector, value));
        }
        pause(&machine.sim).await;
        machine.in_flight.borrow_mut().remove(&id);
        Ok(())
    }
}

impl Storage for Image {
    fn size(&self) -> u64 {
        self.0.length()
    }

    async fn grow(&self, size: u64) -> io::Result<()> {
        pause(&self.0.sim).await;
        self.0.length.medium().store(0, &size.to_le_bytes());
        pause(&self.0.sim).await;
        Ok(())
    }

    async fn read(&self, _: u64, _: &mut [u8]) -> io::Result<()> {
        unreachable!("nobody reads here")
    }

    async fn write(&self, offset: u64, data: &Bytes) -> io::Result<()> {
        let value = u32::from_le_bytes([data[0], data[1], data[2], data[3]]);
        self.change(offset..offset + data.len() as u64, value).await
    }

    async fn zero(&self, range: Range<u64>, _: Zeroing) -> io::Result<()> {
        self.change(range, 0).await
    }

    async fn sync(&self) -> io::Result<()> {
        if self.0.image_failed.take() {
            return Err(io::Error::other("drawn"));
        }
        self.0.image.sync().await?;
        self.0.length.sync().await
    }

    async fn extents(&self, range: Range<u64>) -> io::Result<Vec<Extent>> {
        Ok(vec![Extent { range, hole: false }])
    }

    fn is_elsewhere(&self) -> bool {
        self.0.is_elsewhere
    }
}

pub(super) struct MachinePace(pub(super) Rc<Machine>);

impl Pace for MachinePace {
    async fn step(&self, before: Step) {
        pause(&self.0.sim).await;
        match before {
            Step::Swap => self.0.capture(),
            Step::Offer => self.0.check_offer(),
            _ => {}
        }
    }

    fn now(&self) -> u64 {
        self.0.seconds.get()
    }
}
