use std::cell::Cell;
use std::io;
use std::rc::Rc;
use std::sync::Arc;

use bitmap::{Era, Salt};
use block::{Storage as _, Zeroing};
use bytes::Bytes;
use scratch::Durable;
use stillpoint::disk::{
    Before, Chronicle, Cover, Disk, Durability, Ending, Freeze, Growth, GrowthRecord, Intents,
    Lease, Loss, NotGrown, OnTrackingError, Recovery, Running, freeze,
};

use super::machine::{Image, Machine, MachinePace, PowerWorld, disk_of};
use super::oracle::{CHECKPOINT, Record, STARTED, records};
use super::shape::{REGION, granularity};
use crate::simulation::executor::pause;

/// A server that has started.
pub(super) struct Life {
    pub(super) machine: Rc<Machine>,
    disk: Arc<Disk<PowerWorld>>,
    pub(super) ending: Ending,
    /// The map had been damaged, and whether that was noticed.
    pub(super) rotten: bool,
    pub(super) damaged: bool,
    /// It has been asked to end.
    pub(super) stopping: Cell<bool>,
}

/// What the header of a state says of its server.
#[derive(Clone, Copy)]
pub(super) struct Header {
    pub(super) clean: bool,
    in_doubt: bool,
    boot: u64,
    era_high: u32,
    /// Checkpoints of this era and before are of no use.
    lost_era: u32,
    durability: Durability,
    /// Of the disk.
    size: u64,
    growth: Option<Growth>,
}

impl Header {
    /// Of a state that was made just now, of a disk of `size` bytes.
    pub(super) fn new(size: u64) -> Self {
        Self { size, ..Self::NEW }
    }

    const NEW: Self = Self {
        size: 0,
        growth: None,
        clean: true,
        in_doubt: false,
        boot: 0,
        era_high: 0,
        lost_era: 0,
        durability: Durability::Power,
    };

    /// Whether the next server will believe what is not durable, if a sync succeeds.
    pub(super) fn is_believed(self, machine: &Machine) -> bool {
        !self.clean && !self.in_doubt && self.boot == machine.boot.get()
    }

    pub(super) fn read(machine: &Machine) -> Self {
        let mut bytes = [0; 64];
        machine.header.medium().load(0, &mut bytes);
        let number = |at: usize| u32::from_le_bytes([0, 1, 2, 3].map(|n| bytes[at + n]));
        let size = |at: usize| u64::from(number(at)) | u64::from(number(at + 4)) << 32;
        let (from, to) = (size(40), size(48));
        Self {
            size: size(32),
            growth: (to > 0).then_some(Growth { from, to }),
            clean: bytes[16] != 0,
            in_doubt: bytes[17] != 0,
            boot: number(0).into(),
            era_high: number(8),
            lost_era: number(12),
            durability: DURABILITIES[usize::from(bytes[18])],
        }
    }

    /// Two copies take turns, so it is stored whole or not at all.
    pub(super) fn store(self, machine: &Machine) {
        let mut bytes = Vec::with_capacity(64);
        bytes.extend(self.boot.to_le_bytes());
        bytes.extend(self.era_high.to_le_bytes());
        bytes.extend(self.lost_era.to_le_bytes());
        let durability = DURABILITIES.iter().position(|d| *d == self.durability);
        let durability = durability.expect("all are listed") as u8;
        bytes.extend([u8::from(self.clean), u8::from(self.in_doubt), durability]);
        bytes.resize(32, 0);
        let growth = self
            .growth
            .map_or([0; 2], |growth| [growth.from, growth.to]);
        for size in [self.size, growth[0], growth[1], 0] {
            bytes.extend(size.to_le_bytes());
        }
        machine.header.medium().store(0, &bytes);
    }
}

/// How this start is recorded, as the server's state does it with files.
struct Books<'a> {
    machine: &'a Machine,
    /// Nothing that was known is of use.
    lost: bool,
    header: Header,
}

impl Books<'_> {
    /// What is new is marked, durably.
    async fn end_growth(&mut self, image: &Image) -> io::Result<()> {
        image.sync().await?;
        self.header.growth = None;
        self.header.store(self.machine);
        self.machine.header.sync().await
    }
}

impl Chronicle for Books<'_> {
    async fn runs(&mut self, running: Running) -> io::Result<()> {
        self.header = Header {
            clean: false,
            in_doubt: running.in_doubt,
            boot: self.machine.boot.get(),
            era_high: running.eras.guests.number(),
            lost_era: self.header.lost_era,
            durability: running.durability,
            size: self.machine.length(),
            growth: self.header.growth,
        };
        if std::mem::take(&mut self.lost) {
            self.header.lost_era = running.eras.presumed.number();
        }
        self.header.store(self.machine);
        self.machine.header.sync().await
    }

    async fn started(&mut self, presumed: Era) -> io::Result<()> {
        append(self.machine, STARTED, 0, presumed).await
    }
}

async fn append(machine: &Machine, kind: u32, id: u32, era: Era) -> io::Result<()> {
    let record = Record {
        kind,
        id,
        era: era.number(),
    };
    let end = machine.journal.medium().now().len();
    machine.journal.medium().store(end, &record.bytes());
    machine.journal.sync().await
}

fn highest_era(journal: &[u8]) -> u32 {
    let eras = records(journal).map(|record| match record.kind {
        STARTED => record.era + 1,
        _ => record.era,
    });
    eras.max().unwrap_or(0)
}

/// Starts a server on `machine`.
pub(super) async fn start(machine: Rc<Machine>) -> Life {
    let header = Header::read(&machine);
    let same_boot = header.boot == machine.boot.get();
    let image = Image(Rc::clone(&machine));
    let ending = Ending::of(header.clean, same_boot, header.in_doubt, &image).await;
    if ending == Ending::PowerCut {
        // At once, as the server does it: the next sync may well succeed, and would prove nothing.
        let in_doubt = true;
        Header { in_doubt, ..header }.store(&machine);
    }

    let journal = machine.journal.medium().now().to_vec();
    let known = highest_era(&journal);
    let policies = [OnTrackingError::FailWrite, OnTrackingError::StopTracking];
    let policy = machine.sim.one_of(&policies);
    let (record_of_loss, untracked) = Loss::open(machine.loss.clone(), policy)
        .await
        .expect("nothing fails here");
    let untracked = untracked.expect("it is one sector").era;
    let known = known.max(header.era_high).max(header.lost_era);
    let known = known.max(untracked.number());
    let (lease, _) = Lease::open(machine.lease.clone()).expect("nothing fails here");
    let seed = machine.sim.seed;
    let (size, growth) = found_size(&machine, header, ending);
    let recovery = Recovery::load(
        size,
        granularity(),
        Salt::from_number(seed as u32),
        (machine.eras.open(), machine.table.open()),
        Era::from_number(known + 1000),
    );
    let recovery = recovery.expect("nothing fails here").ending(growth);
    let lost = header.durability.why_lost(ending).is_some();
    let mut books = Books {
        machine: &machine,
        lost,
        header: Header { growth, ..header },
    };
    let before = Before {
        ending,
        durability: header.durability,
        known: Era::from_number(known),
    };
    let durability = machine.draw_durability();
    // What it stores is not durable from the beginning, whatever becomes of its start.
    machine.weakest.set(machine.weakest.get().min(durability));
    let recovered = recovery
        .start(before, durability, &mut books)
        .await
        .expect("nothing fails here");
    machine.weakest.set(durability);
    if growth.is_some() {
        books.end_growth(&image).await.expect("nothing fails here");
    }
    if lost {
        // The map is another file, which never was as the old one.
        machine.old_eras.take();
    }

    let rotten = machine.rotten.take();
    assert!(
        recovered.damaged_bytes == 0 || rotten,
        "seed {seed}: a crash is taken for damage"
    );
    let started = records(&journal).filter(|record| record.kind == STARTED);
    let presumed = started
        .map(|record| Era::from_number(record.era))
        .chain([recovered.eras.presumed]);
    {
        let mut oracle = machine.oracle.borrow_mut();
        assert!(
            oracle.in_doubt || ending != Ending::PowerCut,
            "seed {seed}: a power cut that nobody saw"
        );
        oracle.presumed = presumed.collect();
        oracle.lost(Era::from_number(books.header.lost_era).max(untracked));
        oracle.started(ending != Ending::PowerCut && !rotten, machine.sim.tick());
    }
    let disk = Disk::new(
        image,
        recovered.map,
        Some(Intents::new(recovered.regions, lease, durability)),
        recovered.eras.guests,
        MachinePace(Rc::clone(&machine)),
    )
    .with_loss(record_of_loss);
    #[expect(
        clippy::arc_with_non_send_sync,
        reason = "the server's API, on one thread here"
    )]
    let disk = Arc::new(disk);
    *machine.disk.borrow_mut() = Some(Arc::clone(&disk));
    catch_up(&machine, &disk, ending).await;
    // From here on what was lost by a fault may be lost.
    machine.faults.draw(&machine.sim);
    machine.oracle.borrow_mut().may_lose |=
        machine.faults.any() && policy == OnTrackingError::StopTracking;
    Life {
        disk,
        ending,
        rotten,
        damaged: recovered.damaged_bytes > 0,
        stopping: Cell::new(false),
        machine,
    }
}

/// Marks what an image on another machine may have lost with a server that was killed.
async fn catch_up(machine: &Machine, disk: &Disk<PowerWorld>, ending: Ending) {
    if !machine.is_elsewhere || ending != Ending::Killed {
        return;
    }
    let now = machine.sim.tick();
    for range in disk.active_ranges() {
        machine.oracle.borrow_mut().may_be_marked(&range, now);
    }
    disk.mark_active().await.expect("nothing fails here");
}

/// How large the disk is, and from where it was growing to that.
fn found_size(machine: &Machine, header: Header, ending: Ending) -> (u64, Option<Growth>) {
    let (size, seed) = (machine.length(), machine.sim.seed);
    let ours = header.growth.map_or([header.size; 2], |g| [g.from, g.to]);
    assert!(
        ours.contains(&size),
        "seed {seed}: {size} bytes count as someone else's doing, not {ours:?}"
    );
    let growth = header.growth.filter(|growth| growth.to == size);
    if let Some(Growth { from, to }) = growth {
        let now = machine.sim.tick();
        // A start that was interrupted may have made the region active in which the disk ended.
        let start = match ending {
            Ending::PowerCut => from / REGION * REGION,
            Ending::Clean | Ending::Killed => from,
        };
        machine.oracle.borrow_mut().grows(&(start..to), now);
    }
    (size, growth)
}

/// As the server's state has it with a file.
struct Sizes<'a>(&'a Machine);

impl Sizes<'_> {
    async fn store(&self, header: Header) -> io::Result<()> {
        header.store(self.0);
        self.0.header.sync().await
    }
}

impl GrowthRecord for Sizes<'_> {
    async fn begins(&mut self, growth: Growth) -> io::Result<()> {
        let growth = Some(growth);
        let header = Header::read(self.0);
        self.store(Header { growth, ..header }).await
    }

    async fn ends(&mut self, growth: Growth) -> io::Result<()> {
        let header = Header {
            size: growth.to,
            growth: None,
            ..Header::read(self.0)
        };
        self.store(header).await
    }

    async fn undone(&mut self) -> io::Result<()> {
        let growth = None;
        let header = Header::read(self.0);
        self.store(Header { growth, ..header }).await
    }
}

impl Life {
    async fn pauses(&self, most: u64) {
        for _ in 0..self.machine.sim.below(most) {
            pause(&self.machine.sim).await;
        }
    }

    /// So many pauses; `None` for ever.
    async fn patience(&self, pauses: Option<u64>) {
        match pauses {
            Some(pauses) => {
                for _ in 0..pauses {
                    pause(&self.machine.sim).await;
                }
            }
            None => std::future::pending().await,
        }
    }

    async fn until_stopping(&self) {
        while !self.stopping.get() {
            pause(&self.machine.sim).await;
        }
    }

    /// Compares what this server says with the disk.
    pub(super) fn check(&self) -> Option<u64> {
        let image = self.machine.image.medium();
        let oracle = self.machine.oracle.borrow();
        oracle.check(self.disk.map(), disk_of(image.now(), self.disk.size()))
    }
}

/// Writes, zeroes and flushes.
pub(super) async fn guest(life: Rc<Life>) {
    let machine = &*life.machine;
    let sim = &*machine.sim;
    for _ in 0..=sim.below(16) {
        if life.stopping.get() {
            return;
        }
        if sim.one_in(16) {
            machine.seconds.set(machine.seconds.get() + 1);
        }
        if sim.one_in(10) {
            life.disk.flush().await.expect("nothing fails here");
            continue;
        }
        let range = machine.shape.stretch(sim, life.disk.size());
        let number = sim.tick();
        machine.oracle.borrow_mut().begun(number, range.clone());
        let result = if sim.one_in(6) {
            life.disk.zero(range, Zeroing::MayUnmap).await
        } else {
            let word = (number as u32).to_le_bytes();
            let data = word.repeat((range.end - range.start) as usize / 4);
            life.disk.write(range.start, Bytes::from(data)).await
        };
        if let Err(error) = result {
            let seed = sim.seed;
            assert!(machine.faults.any(), "seed {seed}: {error}");
            let now = sim.tick();
            machine.oracle.borrow_mut().failed(number, now);
        } else {
            machine.oracle.borrow_mut().ended(number);
        }
        life.pauses(6).await;
    }
}

/// Takes checkpoints.
pub(super) async fn steward(life: Rc<Life>, count: u64) {
    let machine = &*life.machine;
    let sim = &*machine.sim;
    for _ in 0..count {
        life.pauses(40).await;
        if life.stopping.get() {
            return;
        }
        if sim.one_in(4) {
            grow(&life).await;
            continue;
        }
        let tracking = life.disk.tracking();
        let era = tracking.era.next().expect("there are enough eras");
        let id = sim.tick() as u32;
        machine.oracle.borrow_mut().make(id, era);
        let next = Freeze {
            disk: Arc::clone(&life.disk),
            next: tracking.followed_by(era, None),
        };
        let patience = sim.one_in(4).then_some(10);
        let waits = life.patience(patience);
        let freezes = vec![next];
        let cover = Cover::of(&freezes);
        let taken = freeze(freezes, waits).await;
        let frozen = cover.finish(taken).await;
        // Now and then it is given up after the swap.
        if frozen.is_err() || sim.one_in(6) {
            machine.oracle.borrow_mut().unmake(id);
            continue;
        }
        append(machine, CHECKPOINT, id, era)
            .await
            .expect("nothing fails here");
        machine.oracle.borrow_mut().told(id);
    }
}

/// Makes the disk larger, to the size that an attempt that failed had given the image if there was
/// one.
async fn grow(life: &Life) {
    let machine = &*life.machine;
    let (sim, now) = (&*machine.sim, life.disk.size());
    let unfinished = Header::read(machine).growth.map(|growth| growth.to);
    let Some(size) = unfinished.or_else(|| machine.shape.larger(sim, now)) else {
        return;
    };
    let tracking = life.disk.tracking();
    let era = tracking.era.next().expect("there are enough eras");
    let next = Freeze {
        disk: Arc::clone(&life.disk),
        next: tracking.followed_by(era, None),
    };
    let freezes = vec![next];
    let cover = Cover::of(&freezes);
    let taken = freeze(freezes, life.patience(Some(20))).await;
    if cover.finish(taken).await.is_err() {
        return;
    }
    let tick = sim.tick();
    machine.oracle.borrow_mut().grows(&(now..size), tick);
    let grown = life.disk.grow(size, &mut Sizes(machine)).await;
    let seed = sim.seed;
    match grown {
        Ok(()) => assert_eq!(life.disk.size(), size, "seed {seed}"),
        Err(NotGrown::Refused(error) | NotGrown::Unfinished(error)) => {
            assert!(machine.faults.any(), "seed {seed}: {error}");
            assert_eq!(life.disk.size(), now, "seed {seed}");
        }
    }
}

/// Retires regions, which is sometimes interrupted.
pub(super) async fn retirer(life: Rc<Life>) {
    let sim = &*life.machine.sim;
    while !life.stopping.get() {
        life.pauses(60).await;
        let patience = sim.one_in(4).then_some(12);
        let retire = async {
            if sim.one_in(2) {
                life.disk.retire_all().await
            } else {
                life.disk.retire_some().await
            }
        };
        let interrupted = life.patience(patience);
        tokio::select! {
            biased;
            () = life.until_stopping() => return,
            () = interrupted => {}
            retired = retire => {
                let seed = sim.seed;
                assert!(retired.is_ok() || life.machine.faults.any(), "seed {seed}: {retired:?}");
            }
        }
    }
}

/// Ends in good order; nobody writes any more.
pub(super) async fn close(life: Rc<Life>) {
    let machine = &*life.machine;
    let done = "nothing fails here";
    life.disk.flush().await.expect(done);
    life.disk.retire_all().await.expect(done);
    life.disk.sync_tracking().await.expect(done);
    let header = Header {
        clean: true,
        era_high: life.disk.tracking().era.number(),
        ..Header::read(machine)
    };
    header.store(machine);
    machine.header.sync().await.expect(done);
}

const DURABILITIES: [Durability; 3] = [Durability::Power, Durability::Process, Durability::None];
