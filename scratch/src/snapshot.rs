use std::io;
use std::sync::{Arc, OnceLock};

use bitmap::{Era, EraMap, EraRun, FrozenEras};
use block::Storage;
use tokio::sync::Notify;

use crate::allowance::Allowance;
use crate::code::Code;
use crate::frozen::FrozenError;
use crate::granules::{GRANULE, granules};
use crate::head::Head;
use crate::preserved::{Kept, Preserved};
use crate::sync::{AtomicBool, AtomicU64, Ordering, fence};
use crate::terms::{OnError, Terms, refused_write};
use crate::world::{Durable, World};

/// What is kept of one disk at one instant: old bytes, and old eras.
///
/// Everything rests on one order: old bytes in scratch, then the preserved bit, then the guest's
/// write. So whoever reads the past takes no lock: it reads the disk, looks at the bits again, and
/// where one is set by now takes those granules from scratch. A guest never waits for a reader.
///
/// A snapshot that could not keep something is broken, for good: the record of that is stored
/// before the write that it could not keep up with is issued. One that is broken or has ended is
/// over: nobody is answered from it any more, and what it keeps may go.
pub struct Snapshot<W: World> {
    pub(crate) scratch: W::Scratch,
    pub(crate) preserved: Preserved<W::Pages>,
    pub(crate) eras: FrozenEras<W::Pages>,
    nonce: u64,
    terms: Terms,
    broken: OnceLock<String>,
    breaking: Notify,
    over: AtomicBool,
    /// How many are storing something in scratch.
    keeping: AtomicU64,
    left: Notify,
    scratch_used: AtomicU64,
    copying_writes: AtomicU64,
    /// Something could not be copied that no write was about to change: that is not tried again.
    not_ahead: AtomicBool,
    /// What is still in scratch, and nobody's any more.
    going: AtomicU64,
}

/// Where a snapshot keeps things. All of them hold only zeroes when it begins.
pub struct SnapshotFiles<W: World> {
    /// Old bytes, each at its own offset; as large as the disk at this instant.
    pub scratch: W::Scratch,
    /// The snapshot's own record, and a byte for each granule.
    pub states: W::Pages,
    /// Another byte for each granule, to tell damage by.
    pub second: W::Pages,
    /// Old eras.
    pub eras: W::Pages,
}

/// Someone is storing something in scratch, which does not go meanwhile.
pub(crate) struct Keeping<'a, W: World>(&'a Snapshot<W>);

impl<W: World> Snapshot<W> {
    /// The instant at which era `frozen_in` begins on the disk whose live map is `live`; no other
    /// snapshot has the number `nonce`.
    ///
    /// Room for the record of a break must have been reserved in `files.states`:
    /// [`RECORD_BYTES`](Self::RECORD_BYTES).
    pub fn new(
        live: Arc<EraMap<W::Pages>>,
        frozen_in: Era,
        files: SnapshotFiles<W>,
        terms: Terms,
        nonce: u64,
    ) -> io::Result<Self> {
        let head = Head {
            nonce,
            broken: None,
        };
        head.store(&files.states)?;
        let SnapshotFiles {
            scratch,
            states,
            second,
            eras,
        } = files;
        let size = scratch.size();
        let count = granules(&(0..size)).end;
        let preserved = Preserved::new(count, states, second, Code::new(nonce));
        let eras = FrozenEras::new(live, size, frozen_in, eras);
        Ok(Self::of(scratch, preserved, eras, terms, nonce))
    }

    /// The same instant after a restart within one life of the machine, from what is in `files`.
    ///
    /// Fails if that is damaged.
    pub fn reopen(
        live: Arc<EraMap<W::Pages>>,
        frozen_in: Era,
        files: SnapshotFiles<W>,
        terms: Terms,
    ) -> io::Result<Self> {
        let SnapshotFiles {
            scratch,
            states,
            second,
            eras,
        } = files;
        let Head { nonce, broken } = Head::load(&states)?;
        let size = scratch.size();
        let count = granules(&(0..size)).end;
        let (preserved, in_scratch) = Preserved::reopen(count, states, second, Code::new(nonce))?;
        let eras = FrozenEras::reopen(live, size, frozen_in, eras)?;
        let snapshot = Self::of(scratch, preserved, eras, terms, nonce);
        snapshot.terms.allowance.add(in_scratch * GRANULE);
        snapshot.count_scratch(in_scratch);
        if let Some(reason) = broken {
            snapshot.lose(reason);
        }
        Ok(snapshot)
    }

    /// What the record in `states` says why the snapshot is broken, if it does.
    ///
    /// Fails if the record is damaged.
    pub fn recorded_break(states: &W::Pages) -> io::Result<Option<String>> {
        Ok(Head::load(states)?.broken)
    }

    fn of(
        scratch: W::Scratch,
        preserved: Preserved<W::Pages>,
        eras: FrozenEras<W::Pages>,
        terms: Terms,
        nonce: u64,
    ) -> Self {
        terms.allowance.expect(preserved.most_bytes());
        Self {
            scratch,
            preserved,
            eras,
            nonce,
            terms,
            broken: OnceLock::new(),
            breaking: Notify::new(),
            over: AtomicBool::new(false),
            keeping: AtomicU64::new(0),
            left: Notify::new(),
            scratch_used: AtomicU64::new(0),
            copying_writes: AtomicU64::new(0),
            not_ahead: AtomicBool::new(false),
            going: AtomicU64::new(0),
        }
    }

    /// How much of the states file belongs to the snapshot's own record.
    pub const RECORD_BYTES: u64 = crate::preserved::STATES_OFFSET;

    /// The size of the disk at this instant, in bytes.
    pub fn size(&self) -> u64 {
        self.scratch.size()
    }

    /// The eras of the disk at this instant.
    pub fn eras(&self) -> &FrozenEras<W::Pages> {
        &self.eras
    }

    /// How it keeps the old contents of `granule`.
    pub fn kept(&self, granule: u64) -> Kept {
        self.preserved.kept(granule)
    }

    /// From what it takes its scratch.
    pub fn allowance(&self) -> &Allowance {
        &self.terms.allowance
    }

    /// Keeps eras that are about to be overwritten.
    pub fn put_aside(&self, run: &EraRun) -> io::Result<()> {
        self.eras.put_aside(run)
    }

    /// Why the instant is lost, if it is.
    pub fn broken(&self) -> Option<&str> {
        self.broken.get().map(String::as_str)
    }

    /// Whether it is broken or has ended.
    pub fn is_over(&self) -> bool {
        self.over.load(Ordering::Acquire)
    }

    /// Fails unless what was read before the call is what was there at the instant.
    pub(crate) fn whole(&self) -> Result<(), FrozenError> {
        if !self.is_over() {
            return Ok(());
        }
        Err(self.broken().map_or(FrozenError::Ended, |why| {
            FrozenError::Broken(why.to_owned())
        }))
    }

    /// Waits until the instant is lost, and says why.
    pub async fn breaks(&self) -> &str {
        loop {
            let breaking = self.breaking.notified();
            tokio::pin!(breaking);
            breaking.as_mut().enable();
            if let Some(reason) = self.broken() {
                return reason;
            }
            breaking.await;
        }
    }

    /// Something of the instant cannot be kept, because of `error`, and is about to be overwritten.
    ///
    /// An error means that it must not be: as the terms have it, or because the break could not be
    /// stored.
    pub fn cannot_keep(&self, what: &str, error: &io::Error) -> io::Result<()> {
        if self.is_over() {
            // It needs nothing any more.
            return Ok(());
        }
        let reason = format!("{what}: {error}");
        match self.terms.on_error {
            OnError::BreakBackup => self.break_with(reason),
            OnError::FailGuestWrite => Err(refused_write(reason, error)),
        }
    }

    /// Whether a guest's write fails rather than this breaks.
    pub(crate) fn comes_first(&self) -> bool {
        self.terms.on_error == OnError::FailGuestWrite
    }

    /// Gives the instant up. When this returns, everyone who asks knows, after a kill as well.
    ///
    /// An error means that the break could not be stored, and that the write for which the
    /// snapshot was to be given up must not be issued.
    pub fn break_with(&self, reason: String) -> io::Result<()> {
        self.record_break(&reason)?;
        self.lose(reason);
        Ok(())
    }

    /// Gives the instant up, whether or not that can be stored: for a loss that also the next start
    /// will know of.
    pub fn give_up(&self, reason: String) {
        if self.broken().is_none() {
            let _ = self.record_break(&reason);
            self.lose(reason);
        }
    }

    fn record_break(&self, reason: &str) -> io::Result<()> {
        let head = Head {
            nonce: self.nonce,
            broken: Some(reason.to_owned()),
        };
        head.store(self.preserved.store())
    }

    fn lose(&self, reason: String) {
        // Whoever came first has said why.
        let _ = self.broken.set(reason);
        self.end();
        self.breaking.notify_waiters();
    }

    /// Nobody needs the instant any more.
    pub fn end(&self) {
        self.over.store(true, Ordering::Release);
        fence(Ordering::SeqCst);
        self.let_go();
    }

    /// Others may take what it has taken, from now on, and will find the space by then: else all
    /// would break for want of what the first of them gives back.
    fn let_go(&self) {
        let used = self.scratch_used.swap(0, Ordering::Relaxed);
        self.going.fetch_add(used, Ordering::Relaxed);
        self.terms.allowance.let_go(used);
    }

    /// Waits, when it is over, until nothing more is stored in scratch; then what is there may go.
    ///
    /// Whoever reads the past asks at last whether it is over, so what was read from where something
    /// has gone is not believed; and whoever stores has counted itself before asking, so nothing
    /// comes after what has gone.
    pub async fn quiet(&self) {
        loop {
            let left = self.left.notified();
            tokio::pin!(left);
            left.as_mut().enable();
            fence(Ordering::SeqCst);
            if self.keeping.load(Ordering::Acquire) == 0 {
                return;
            }
            left.await;
        }
    }

    /// What was in scratch is gone.
    pub fn released(&self) {
        // Also of whoever was storing when it was over.
        self.let_go();
        let gone = self.going.swap(0, Ordering::Relaxed);
        self.terms.allowance.room.gone(gone);
    }

    /// Keeps what is in scratch from going, unless it is over.
    pub(crate) fn enter(&self) -> Option<Keeping<'_, W>> {
        self.keeping.fetch_add(1, Ordering::Relaxed);
        let keeping = Keeping(self);
        // Counted before the look, as whoever ends it says so before looking at the count: one of
        // the two sees the other.
        fence(Ordering::SeqCst);
        (!self.is_over()).then_some(keeping)
    }

    /// Makes durable what is kept.
    pub async fn sync(&self) -> io::Result<()> {
        self.scratch.sync().await?;
        self.preserved.store().sync().await?;
        self.preserved.second().sync().await?;
        self.eras.store().sync().await
    }

    /// Makes durable that it is broken.
    pub async fn sync_record(&self) -> io::Result<()> {
        self.preserved.store().sync().await
    }

    /// How many bytes of old contents are in scratch.
    pub fn scratch_used(&self) -> u64 {
        self.scratch_used.load(Ordering::Relaxed)
    }

    /// How many pieces of writes found something lacking, since this was made or
    /// [reopened](Self::reopen).
    pub fn copying_writes(&self) -> u64 {
        self.copying_writes.load(Ordering::Relaxed)
    }

    pub(crate) fn count_copying_write(&self) {
        self.copying_writes.fetch_add(1, Ordering::Relaxed);
    }

    pub(crate) fn takes_copies_ahead(&self) -> bool {
        !self.not_ahead.load(Ordering::Relaxed) && self.allowance().holds_all()
    }

    pub(crate) fn failed_ahead(&self) {
        self.not_ahead.store(true, Ordering::Relaxed);
    }

    pub(crate) fn count_scratch(&self, granules: u64) {
        self.scratch_used
            .fetch_add(granules * GRANULE, Ordering::Relaxed);
    }
}

impl<W: World> Drop for Keeping<'_, W> {
    fn drop(&mut self) {
        let last = self.0.keeping.fetch_sub(1, Ordering::AcqRel) == 1;
        if !last {
            return;
        }
        // Or whoever waits could see the old count, and we not that anyone waits.
        fence(Ordering::SeqCst);
        if self.0.is_over() {
            self.0.left.notify_waiters();
        }
    }
}

impl<W: World> Drop for Snapshot<W> {
    fn drop(&mut self) {
        self.released();
        let most = self.preserved.most_bytes();
        self.terms.allowance.expect_no_more(most);
    }
}
