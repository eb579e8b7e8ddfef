use std::io;
use std::sync::Arc;

use block::Unreachable;
use scratch::{Pace, Snapshot, Step, World};
use thiserror::Error;

use super::{Disk, Tracking};

/// A disk, and what it is to track from the instant on.
pub struct Freeze<W: World> {
    /// The disk.
    pub disk: Arc<Disk<W>>,
    /// Its next tracking, with an era that has not been used yet.
    pub next: Tracking<W>,
}

/// Why there is no instant.
#[derive(Debug, Error)]
pub enum NotFrozen {
    /// Nothing has changed.
    #[error("writes in flight did not end in time")]
    Busy,
    /// What was written untracked before it may not be durable.
    #[error("a sync of the image failed: {0}")]
    Image(io::Error),
    /// What was written before it is not known to be durable where the image is. Nobody is told of it.
    #[error("what was written before the instant cannot be made durable: {0}")]
    Elsewhere(io::Error),
}

/// Moves every disk to its next tracking at one point in time, or none of them.
///
/// All that can fail has been done by now: `next` is ready-made, so the guests pause only for the
/// writes already in flight, and for no longer than `patience` takes. Only one instant may be taken
/// at a time. [`Cover`] ends it, whatever came of it.
pub async fn freeze<W: World>(
    freezes: Vec<Freeze<W>>,
    patience: impl Future<Output = ()>,
) -> Result<(), NotFrozen> {
    let ready: Vec<_> = freezes
        .into_iter()
        .map(|freeze| (freeze.disk, Arc::new(freeze.next)))
        .collect();
    if crate::hooks::leaves_gates_open() {
        for (disk, next) in &ready {
            between_swaps(disk).await;
            disk.gate.replace(Arc::clone(next));
        }
        return Ok(());
    }
    // Dropped early, all of these reopen.
    let closed: Vec<_> = ready
        .iter()
        .map(|(disk, next)| (disk.gate.close(), next))
        .collect();
    let emptied = async {
        for (gate, _) in &closed {
            gate.emptied().await;
        }
    };
    tokio::select! {
        biased;
        () = emptied => {}
        () = patience => return Err(NotFrozen::Busy),
    }
    let untracked: Vec<_> = ready
        .iter()
        .filter(|(disk, _)| disk.is_lost_in(disk.tracking().era))
        .collect();
    for ((gate, next), (disk, _)) in closed.iter().zip(&ready) {
        between_swaps(disk).await;
        gate.set(Arc::clone(next));
    }
    drop(closed);
    for (disk, _) in &ready {
        // A sync that failed after this was prepared found only the instants from before.
        if disk.sync_failed() {
            disk.give_up("a sync of the image failed");
        }
    }
    // What nobody tracked is in no active region: from here on, what is in the copy of a client must
    // not be lost by a power cut that would not tell.
    for (disk, _) in untracked {
        disk.flush().await.map_err(|error| {
            if Unreachable::is(&error) {
                NotFrozen::Elsewhere(error)
            } else {
                NotFrozen::Image(error)
            }
        })?;
    }
    Ok(())
}

/// What is left to be done for an instant when it has been taken, and before anybody is told of it:
/// nothing, unless an image is elsewhere. The guests run again meanwhile.
#[must_use = "an instant of what is elsewhere is none without it"]
pub struct Cover<W: World>(Vec<Covered<W>>);

/// A disk, and what keeps the instant of it.
type Covered<W> = (Arc<Disk<W>>, Vec<Arc<Snapshot<W>>>);

impl<W: World> Cover<W> {
    /// Of an instant that is about to be taken.
    pub fn of(freezes: &[Freeze<W>]) -> Self {
        let new = |Freeze { disk, next }: &Freeze<W>| {
            let before = disk.tracking();
            let is_new = |new: &&Arc<_>| !before.snapshots.iter().any(|old| Arc::ptr_eq(old, new));
            let new = next.snapshots.iter().filter(is_new).cloned().collect();
            (Arc::clone(disk), new)
        };
        Self(freezes.iter().map(new).collect())
    }

    /// Does it, if the instant was `taken`. On an error the instant is kept no longer.
    pub async fn finish(self, taken: Result<(), NotFrozen>) -> Result<(), NotFrozen> {
        let finished = match taken {
            Ok(()) => self.cover().await,
            failed => failed,
        };
        if finished.is_err() {
            for (disk, new) in &self.0 {
                for snapshot in new {
                    disk.forget(snapshot);
                }
            }
        }
        finished
    }

    async fn cover(&self) -> Result<(), NotFrozen> {
        for (disk, _) in &self.0 {
            let covered = disk.cover_instant().await;
            covered.map_err(NotFrozen::Elsewhere)?;
        }
        Ok(())
    }
}

/// Nothing waits between the first swap and the last: this does nothing, except in a simulation.
async fn between_swaps<W: World>(disk: &Disk<W>) {
    disk.pace.step(Step::Swap).await;
}
