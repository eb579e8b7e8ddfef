use std::io;
use std::ops::Range;

use bitmap::{EraMap, Region, Regions};
use scratch::{Pace, Step, World};
use tokio::sync::{Mutex, MutexGuard, Notify};

use super::durability::Durability;
use super::lease::Lease;
use super::sound_sync::SoundSync;

/// That a region is being written is durable before anything in it is.
///
/// So after a power cut, what may have changed unnoticed lies in the regions that were active.
/// Everyone who waits shares one sync of the table; in a region that is active, nobody waits.
pub struct Intents<W: World> {
    regions: Regions<W::Pages>,
    lease: Lease<W::Pages>,
    durability: Durability,
    syncs: SoundSync,
    /// Held by whoever retires regions.
    retiring: Mutex<()>,
    /// There are more active regions than there should be.
    crowded: Notify,
}

/// A writer's place in every region that it touches, until this is dropped.
pub(super) struct Inside<'a, W: World> {
    intents: &'a Intents<W>,
    range: Range<u64>,
}

impl<W: World> Intents<W> {
    /// Over the regions that were active before, and are until they are retired.
    ///
    /// With less than [`Durability::Power`] a region is active as soon as that is stored: then a
    /// start after a kill still knows which pages of the map have no checksum.
    pub fn new(regions: Regions<W::Pages>, lease: Lease<W::Pages>, durability: Durability) -> Self {
        Self {
            regions,
            lease,
            durability,
            syncs: SoundSync::default(),
            retiring: Mutex::default(),
            crowded: Notify::new(),
        }
    }

    /// Returns when every region that `range` touches is active, and will be until what is returned
    /// is dropped.
    ///
    /// Asked by every write, also where the map has the current era already: the mark may be
    /// durable and the region retired, and then the bytes would be without cover. In `map`, a region
    /// that is entered for the first time gets an entry for each of its chunks.
    pub(super) async fn enter(
        &self,
        range: &Range<u64>,
        map: &EraMap<W::Pages>,
        pace: &W::Pace,
    ) -> io::Result<Inside<'_, W>> {
        self.may_issue(pace).await?;
        let inside = Inside {
            intents: self,
            range: range.clone(),
        };
        let entered: Vec<Region> = self
            .regions
            .of(range)
            .filter(|region| !self.regions.enter(*region))
            .collect();
        if entered.is_empty() {
            return Ok(inside);
        }
        for region in &entered {
            pace.step(Step::Activate).await;
            let fill = |chunks: &_| map.eras().fill(chunks);
            self.regions.activate(*region, fill)?;
        }
        if self.durability == Durability::Power {
            // Begun after the last of these was stored, so it covers them.
            self.sync().await?;
        }
        for region in entered {
            self.regions.activated(region);
        }
        if self.regions.active() > ACTIVE_MAX && self.durability == Durability::Power {
            self.crowded.notify_one();
        }
        Ok(inside)
    }

    /// Returns when the image may be changed: who finds it changed then knows that it was us.
    pub(super) async fn may_issue(&self, pace: &W::Pace) -> io::Result<()> {
        if self.durability == Durability::Power {
            self.lease.cover(pace.now()).await?;
        }
        self.lease.note(pace.now())
    }

    /// The image is about to be changed, perhaps long after it was allowed. If that cannot be stored, who
    /// finds it changed after a kill takes it for someone else's doing.
    pub(super) fn issuing(&self, pace: &W::Pace) {
        if let Err(error) = self.lease.note(pace.now()) {
            tracing::error!(%error, "the time of a write cannot be stored");
        }
    }

    /// Waits until there are too many active regions.
    pub(super) async fn crowded(&self) {
        self.crowded.notified().await;
    }

    /// Returns when nobody else retires regions. A retirement that was taken back and begun again
    /// by another would else be ended by the one that began it first, whose syncs are too old.
    pub(super) async fn retire_alone(&self) -> MutexGuard<'_, ()> {
        self.retiring.lock().await
    }

    /// What the tracking survives.
    pub fn durability(&self) -> Durability {
        self.durability
    }

    /// The regions.
    pub fn regions(&self) -> &Regions<W::Pages> {
        &self.regions
    }

    /// Whether the table may have lost what was stored in it.
    pub(super) fn in_doubt(&self) -> bool {
        self.syncs.has_failed()
    }

    /// Makes the table durable.
    pub(super) async fn sync(&self) -> io::Result<()> {
        self.syncs.run(self.regions.table()).await
    }
}

impl<W: World> Drop for Inside<'_, W> {
    fn drop(&mut self) {
        for region in self.intents.regions.of(&self.range) {
            self.intents.regions.leave(region);
        }
    }
}

/// How many regions may be active before some are retired. What a power cut leaves in doubt is so
/// many regions, with chunks of 64 KiB 2 GiB, and those that are entered until that is done, for
/// which nobody waits. Fewer would make a database that writes all over its files wait for a sync of
/// the image again and again; those that it leaves alone are retired in time anyway.
pub const ACTIVE_MAX: usize = 512;

/// How many are retired at a time: one sync of the image for all of them.
pub(super) const RETIRED_AT_ONCE: usize = ACTIVE_MAX / 2;
