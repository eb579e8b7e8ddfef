//! A disk that knows what changes on it, and can be frozen.
//!
//! A guest write takes one path: reserve, gate, mark, preserve, write. What it must not do out of order, and
//! what each step leaves behind when the process is killed after it, stands at [`Disk::change`].

mod doubt;
mod durability;
mod elsewhere;
mod freeze;
mod gate;
mod growth;
mod intents;
mod lease;
mod loss;
mod marking;
mod recovery;
mod sound_sync;
mod tracking;

use std::io;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use bitmap::{Era, EraMap, Region};
use block::{Extent, SharedSync, Storage, Unreachable, Zeroing};
use bytes::Bytes;
use scratch::{Claims, Frozen, Pace, Snapshot, Step, World, preserve};

use intents::Inside;
use sound_sync::SoundSync;
use tokio::sync::Notify;

pub use doubt::Doubt;
pub use durability::Durability;
pub use freeze::{Cover, Freeze, NotFrozen, freeze};
pub use gate::{Closed, Gate, Pass};
pub use growth::{Growth, GrowthRecord, NotGrown};
pub use intents::{ACTIVE_MAX, Intents};
pub use lease::{Lease, LeaseRecord};
pub use loss::{Loss, LossRecord, OnTrackingError};
pub use recovery::{Before, Chronicle, Ending, NewEras, Recovered, Recovery, Running};
pub use tracking::Tracking;

/// One image, served live: every change goes through here.
pub struct Disk<W: World> {
    image: Arc<W::Image>,
    map: Arc<EraMap<W::Pages>>,
    /// None where the map need not survive the machine.
    intents: Option<Intents<W>>,
    /// None where a write that cannot be tracked fails.
    loss: Option<Loss<W::Pages>>,
    /// None where nobody starts after this.
    doubt: Option<Doubt<W::Pages>>,
    map_syncs: SoundSync,
    /// Entered for as long as a write is under way. Closed and empty, it is therefore a moment when
    /// no write is half done: a point in time.
    gate: Gate<Tracking<W>>,
    claims: Claims,
    pace: Arc<W::Pace>,
    /// Has one sync at a time, so that its outcome is known before the next begins.
    syncs: SharedSync,
    /// Set for good once a sync of the image has failed: what was acknowledged before it may be
    /// lost, and a later sync that succeeds proves nothing.
    sync_failed: AtomicBool,
    failing: Notify,
}

/// What a change does to a range.
enum Change {
    Write(Bytes),
    Zero(Zeroing),
    /// Nothing that we do.
    ByItself,
}

impl<W: World> Disk<W> {
    /// A disk in era `era`, of which nobody keeps any instant yet.
    pub fn new(
        image: W::Image,
        map: Arc<EraMap<W::Pages>>,
        intents: Option<Intents<W>>,
        era: Era,
        pace: W::Pace,
    ) -> Self {
        Self {
            image: Arc::new(image),
            map,
            intents,
            loss: None,
            doubt: None,
            map_syncs: SoundSync::default(),
            gate: Gate::new(Tracking::new(era)),
            claims: Claims::default(),
            pace: Arc::new(pace),
            syncs: SharedSync::default(),
            sync_failed: AtomicBool::new(false),
            failing: Notify::new(),
        }
    }

    /// The same with a policy for writes that cannot be tracked.
    #[must_use]
    pub fn with_loss(self, loss: Loss<W::Pages>) -> Self {
        let loss = Some(loss);
        Self { loss, ..self }
    }

    /// The same with a place for what the next start must know.
    #[must_use]
    pub fn with_doubt(self, doubt: Doubt<W::Pages>) -> Self {
        let doubt = Some(doubt);
        Self { doubt, ..self }
    }

    /// What is not known because tracking was lost, if so.
    pub fn loss(&self) -> Option<LossRecord> {
        self.loss.as_ref()?.record()
    }

    /// Waits until tracking is lost once more.
    pub async fn tracking_lost(&self) {
        match &self.loss {
            Some(loss) => loss.lost().await,
            None => std::future::pending().await,
        }
    }

    /// Whether something was written in `era` that nobody tracked.
    pub fn is_lost_in(&self, era: Era) -> bool {
        self.loss.as_ref().is_some_and(|loss| loss.is_lost_in(era))
    }

    /// The size in bytes that clients are told. The image may be larger while the disk grows.
    pub fn size(&self) -> u64 {
        self.map.size()
    }

    /// The live map.
    pub fn map(&self) -> &Arc<EraMap<W::Pages>> {
        &self.map
    }

    /// The current era, and who keeps what.
    pub fn tracking(&self) -> Arc<Tracking<W>> {
        self.gate.current()
    }

    /// Keeps `ended`, an instant that nobody needs any more, no longer.
    ///
    /// Must not run while an instant is being taken.
    pub fn forget(&self, ended: &Arc<Snapshot<W>>) {
        self.gate.replace(Arc::new(self.tracking().without(ended)));
    }

    /// Reads what `snapshot`, an instant of this disk, keeps.
    pub fn frozen(&self, snapshot: Arc<Snapshot<W>>) -> Frozen<W> {
        Frozen::new(Arc::clone(&self.image), snapshot, Arc::clone(&self.pace))
    }

    /// Fills `buffer` with what is at `offset` now.
    pub async fn read(&self, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
        self.image.read(offset, buffer).await
    }

    /// What of `range` takes space now: adjacent extents from its start on, at least one.
    pub async fn extents(&self, range: Range<u64>) -> io::Result<Vec<Extent>> {
        self.image.extents(range).await
    }

    /// Puts `data` at `offset`.
    ///
    /// Each [`PIECE_MAX`] bytes are wholly before or wholly after any instant. On
    /// an error the range may hold old or new bytes, and is marked as changed.
    pub async fn write(&self, offset: u64, data: Bytes) -> io::Result<()> {
        let range = offset..offset + data.len() as u64;
        for piece in pieces(range) {
            let from = (piece.start - offset) as usize;
            let length = (piece.end - piece.start) as usize;
            self.change(piece, Change::Write(data.slice(from..from + length)))
                .await?;
        }
        Ok(())
    }

    /// Makes `range` read as zeroes; as for [`write`](Self::write).
    pub async fn zero(&self, range: Range<u64>, how: Zeroing) -> io::Result<()> {
        for stretch in cut(range, RESERVED_MAX) {
            let _inside = self.reserve_ahead(&stretch).await;
            for piece in pieces(stretch) {
                self.change(piece, Change::Zero(how)).await?;
            }
        }
        Ok(())
    }

    /// Activates the regions of a stretch of several pieces together, for which one sync is enough.
    ///
    /// Each piece asks again, and learns then of what failed here. A process that is killed leaves
    /// regions active that need not be.
    async fn reserve_ahead(&self, stretch: &Range<u64>) -> Option<Inside<'_, W>> {
        let intents = self.intents.as_ref()?;
        if stretch.end - stretch.start <= PIECE_MAX {
            return None;
        }
        intents.enter(stretch, &self.map, &self.pace).await.ok()
    }

    /// Makes durable every write that was acknowledged before the call, whoever made it.
    pub async fn flush(&self) -> io::Result<()> {
        self.syncs.run(|| self.sync()).await
    }

    /// No other sync is under way: once one has failed, none that begins later is believed.
    async fn sync(&self) -> io::Result<()> {
        if self.sync_failed() {
            return Err(io::Error::other("an earlier sync of the image failed"));
        }
        let result = self.image.sync().await;
        if let Err(error) = &result
            && !Unreachable::is(error)
        {
            self.lose_trust(error).await;
        }
        result
    }

    /// A sync has failed with `error`, of which nobody knows yet. Whoever is told of it, or of any that comes
    /// after, finds it stored: else a server that is killed then would leave a disk that looks as it should.
    async fn lose_trust(&self, error: &io::Error) {
        let stored = self.doubt.as_ref().map_or(Ok(()), Doubt::store);
        self.sync_failed.store(true, Ordering::Release);
        self.give_up(&format!("a sync of the image failed: {error}"));
        let recorded = match (&self.doubt, stored) {
            (Some(doubt), Ok(())) => doubt.sync().await,
            (_, other) => other,
        };
        if let Err(error) = recorded {
            tracing::error!(%error, "that a sync of the image failed cannot be recorded");
        }
    }

    /// Gives up every instant that is kept.
    fn give_up(&self, reason: &str) {
        for snapshot in &self.tracking().snapshots {
            snapshot.give_up(reason.to_owned());
        }
    }

    /// How much a power cut now would leave in doubt.
    pub fn active_bytes(&self) -> u64 {
        let intents = self.intents.as_ref();
        let active = intents.map_or(0, |intents| intents.regions().active_bytes());
        active.min(self.size())
    }

    /// Waits until more regions are active than should be.
    pub async fn crowded(&self) {
        match &self.intents {
            Some(intents) => intents.crowded().await,
            None => std::future::pending().await,
        }
    }

    /// Retires the regions that nobody has entered lately, and some more to make room.
    pub async fn retire_some(&self) -> io::Result<()> {
        self.retire_early(intents::RETIRED_AT_ONCE).await
    }

    /// Retires the regions that nobody has entered since the last time.
    pub async fn retire_idle(&self) -> io::Result<()> {
        self.retire_early(0).await
    }

    /// Where a power cut leaves nothing to be known, fewer active regions are worth no sync.
    async fn retire_early(&self, least: usize) -> io::Result<()> {
        match &self.intents {
            Some(intents) if intents.durability() == Durability::Power => self.retire(least).await,
            _ => Ok(()),
        }
    }

    /// Retires every region, if nobody writes; then the map is exact also for the next machine.
    pub async fn retire_all(&self) -> io::Result<()> {
        self.retire(usize::MAX).await
    }

    /// The image and the map are durable, both by syncs that began after the last writer left;
    /// then it is recorded that the region is inactive, unless someone has entered it meanwhile. A
    /// record that is lost costs nothing: the region is found active, and retired again.
    async fn retire(&self, least: usize) -> io::Result<()> {
        let Some(intents) = &self.intents else {
            return Ok(());
        };
        let _alone = intents.retire_alone().await;
        let regions = intents.regions();
        let retiring = regions.begin_retiring(least);
        if retiring.is_empty() {
            return Ok(());
        }
        let synced = match self.flush().await.and_then(|()| self.mend(&retiring)) {
            Ok(()) => self.map_syncs.run(self.map.eras()).await,
            failed => failed,
        };
        // That a region is inactive need not be durable, but is worth nothing in a file in doubt.
        let synced = match synced {
            Ok(()) if intents.in_doubt() => intents.sync().await,
            other => other,
        };
        self.tell_doubt();
        let mut outcome = synced;
        for region in retiring {
            self.pace.step(Step::Retire).await;
            let checksum = || self.map.eras().checksum(region.page());
            outcome = outcome.and_then(|()| regions.retire(region, checksum));
            if outcome.is_err() {
                regions.cancel_retiring(region);
            }
        }
        outcome
    }

    /// Makes what is stored of `regions` what is in memory, also where a store has failed: what a page
    /// sums to is told from memory.
    fn mend(&self, regions: &[Region]) -> io::Result<()> {
        let (Some(intents), true) = (&self.intents, self.map.eras().is_torn()) else {
            return Ok(());
        };
        regions.iter().try_for_each(|region| {
            let bytes = intents.regions().range(*region);
            let chunks = self.map.granularity().chunks(&bytes);
            self.map.eras().store_again(&chunks)
        })
    }

    /// Makes durable what the map and the table of regions say.
    pub async fn sync_tracking(&self) -> io::Result<()> {
        self.map_syncs.run(self.map.eras()).await?;
        match &self.intents {
            Some(intents) => intents.sync().await,
            None => Ok(()),
        }
    }

    /// Whether a sync of the map or of the table has failed, so that what is stored there may be gone, even without
    /// a power cut.
    pub fn in_doubt(&self) -> bool {
        let table = self.intents.as_ref().is_some_and(Intents::in_doubt);
        self.map_syncs.has_failed() || table
    }

    fn tell_doubt(&self) {
        if self.in_doubt() {
            self.failing.notify_one();
        }
    }

    /// Waits until a sync of the map or of the table has failed, and what it was to make durable is in doubt.
    pub async fn sync_fails(&self) {
        self.failing.notified().await;
    }

    /// What it is on.
    pub fn image(&self) -> &W::Image {
        &self.image
    }

    /// Keeps an instant that was kept before a restart. Must not run while one is being taken.
    pub fn keep_on(&self, snapshot: Arc<Snapshot<W>>) {
        let tracking = self.tracking();
        self.gate
            .replace(Arc::new(tracking.followed_by(tracking.era, Some(snapshot))));
    }

    /// Whether a sync of the image has failed, so that no instant of it can be relied on.
    pub fn sync_failed(&self) -> bool {
        self.sync_failed.load(Ordering::Acquire)
    }

    /// Changes one piece of the disk. The whole contract of tracking is the order of these lines.
    ///
    /// A process that is killed leaves, after reserving: regions active that need not be, which the
    /// next server retires. After the mark: a chunk marked that did not change, which is
    /// harmless. After preserving: old bytes kept that the disk still has, likewise. After the
    /// write: a change that is marked and whose before-image is kept. Where it could not be marked:
    /// that nothing is known of its era and before.
    async fn change(&self, range: Range<u64>, change: Change) -> io::Result<()> {
        // Outside the gate, where a freeze does not wait for it.
        let (_inside, refusal) = match &self.intents {
            Some(intents) => match intents.enter(&range, &self.map, &self.pace).await {
                Ok(inside) => (Some(inside), None),
                Err(error) => (None, Some(error)),
            },
            None => (None, None),
        };
        let pass = self.gate.enter().await;
        self.pace.step(Step::Look).await;
        // A mark in a region that may not be active would not be found; and without one, what any
        // instant knows of this chunk stays as it is.
        let tracked = match refusal {
            None => self.mark(&range, &pass).await,
            Some(error) => Err(error),
        };
        if let Err(error) = tracked {
            self.tell_doubt();
            // Inside the gate: which era it is lost in is the one that the next instant ends.
            match &self.loss {
                Some(loss) => loss.lose(pass.era, error).await?,
                None => return Err(error),
            }
        }
        self.pace.step(Step::Preserve).await;
        preserve(
            &range,
            &*self.image,
            &pass.snapshots,
            &self.claims,
            &*self.pace,
        )
        .await?;
        self.pace.step(Step::Write).await;
        self.issuing();
        match change {
            Change::Write(data) => self.image.write(range.start, &data).await,
            Change::Zero(how) => self.image.zero(range, how).await,
            Change::ByItself => Ok(()),
        }
        // The pass is given back here, when the outcome is known; then the regions are left.
    }

    /// The image is about to be changed.
    fn issuing(&self) {
        if let Some(intents) = &self.intents {
            intents.issuing(&self.pace);
        }
    }

    async fn mark(&self, range: &Range<u64>, tracking: &Tracking<W>) -> io::Result<()> {
        for run in self.map.older(range, tracking.era) {
            // The old era is kept first, or a map of the past would not find it.
            for snapshot in tracking.snapshots.iter().filter(|s| !s.is_over()) {
                if let Err(error) = snapshot.put_aside(&run) {
                    snapshot.cannot_keep("old eras", &error)?;
                }
            }
            self.pace.step(Step::Mark).await;
            self.map.mark(&run.chunks, tracking.era)?;
        }
        Ok(())
    }
}

/// Cuts `range` into pieces that are written as one.
fn pieces(range: Range<u64>) -> impl Iterator<Item = Range<u64>> {
    cut(range, PIECE_MAX)
}

/// Cuts `range` at multiples of `size`, so that a chunk is rarely cut.
fn cut(range: Range<u64>, size: u64) -> impl Iterator<Item = Range<u64>> {
    let mut at = range.start;
    std::iter::from_fn(move || {
        let start = at;
        at = ((start / size + 1) * size).min(range.end);
        (start < range.end).then_some(start..at)
    })
}

/// The most bytes that are written as one.
pub const PIECE_MAX: u64 = 4 << 20;

/// The most bytes whose regions are activated together, for one sync: 16 regions at the usual
/// granularity, few beside those that may be active.
const RESERVED_MAX: u64 = 64 << 20;
