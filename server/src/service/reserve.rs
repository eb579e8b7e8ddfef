//! Free space that others use up while backups hold theirs.

use std::sync::Arc;
use std::time::Duration;

use scratch::{OnError, Room};
use tokio::time::MissedTickBehavior;

use super::Service;
use super::book::FrozenDisk;

impl Service {
    /// Sees that no file system falls below its reserve because of a backup, for as long as the
    /// server runs: a guest that fills a sparse image stores nothing in scratch, and nobody else
    /// would look.
    pub(crate) async fn guard_reserves(&self) {
        let mut ticks = tokio::time::interval(LOOK);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            ticks.tick().await;
            if self.space.on_error() == OnError::FailGuestWrite {
                // There the backup comes first, also before what a guest writes for the first time.
                continue;
            }
            for room in self.space.rooms() {
                self.guard(&room);
            }
        }
    }

    /// Breaks the backup that holds most; what it gives back is seen at the next look.
    fn guard(&self, room: &Arc<Room>) {
        match room.falls_short() {
            Ok(true) => {}
            Ok(false) => return,
            Err(error) => return tracing::warn!(%error, "cannot tell how much space is free"),
        }
        let Some(part) = self.largest_in(room) else {
            return;
        };
        let reason = format!(
            "fewer than the {} bytes that are to stay free beside scratch were free",
            room.reserve()
        );
        if let Err(error) = part.frozen.snapshot().break_with(reason) {
            let backup = &part.backup;
            tracing::error!(%backup, %error, "a backup cannot be broken");
        }
    }

    fn largest_in(&self, room: &Arc<Room>) -> Option<Arc<FrozenDisk>> {
        let book = self.book();
        let parts = book.backups.iter().flat_map(|backup| backup.disks.values());
        parts
            .filter(|part| {
                let snapshot = part.frozen.snapshot();
                Arc::ptr_eq(&snapshot.allowance().room, room) && snapshot.scratch_used() > 0
            })
            .max_by_key(|part| part.frozen.snapshot().scratch_used())
            .cloned()
    }
}

/// A guest that fills a sparse image at 1 GiB/s gets as far as the smallest reserve that is taken
/// unasked.
const LOOK: Duration = Duration::from_secs(1);
