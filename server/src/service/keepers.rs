//! What is done for a disk for as long as it is served.

use std::collections::BTreeMap;
use std::sync::{Arc, MutexGuard, PoisonError};

use tokio::task::JoinSet;

use super::{Event, Service};
use crate::names::Name;
use crate::served::ServedDisk;

/// The tasks of one disk.
pub(super) type Keepers = JoinSet<()>;

impl Service {
    /// Looks after `disk` from now on.
    ///
    /// Runs on a [`LocalSet`](tokio::task::LocalSet).
    pub(crate) fn keep(self: &Arc<Self>, disk: &Arc<ServedDisk>) {
        let mut tasks = Keepers::new();
        let kept = Arc::clone(disk);
        tasks.spawn_local(async move { kept.look_after().await });
        let (service, watched) = (Arc::clone(self), Arc::clone(disk));
        tasks.spawn_local(async move { service.watch_tracking(&watched).await });
        self.keepers().insert(disk.name.clone(), tasks);
    }

    /// Looks after this disk no longer; returns when nothing of that goes on.
    pub(super) async fn let_go(&self, disk: &Name) {
        let tasks = self.keepers().remove(disk);
        if let Some(mut tasks) = tasks {
            tasks.shutdown().await;
        }
    }

    /// The same for all disks.
    pub(crate) async fn let_all_go(&self) {
        let all = std::mem::take(&mut *self.keepers());
        for mut tasks in all.into_values() {
            tasks.shutdown().await;
        }
    }

    fn keepers(&self) -> MutexGuard<'_, BTreeMap<Name, Keepers>> {
        self.keepers.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Tells everyone whenever tracking of `disk` is lost.
    async fn watch_tracking(&self, disk: &ServedDisk) {
        loop {
            disk.disk.tracking_lost().await;
            let Some(loss) = disk.disk.loss() else {
                continue;
            };
            tracing::error!(disk = %disk.name, reason = loss.reason, "tracking is lost");
            self.announce(Event::TrackingLost {
                disk: disk.name.clone(),
                reason: loss.reason,
            });
        }
    }
}
