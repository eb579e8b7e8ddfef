//! What is done for a disk for as long as it is served.

use std::collections::BTreeMap;
use std::sync::{Arc, MutexGuard, PoisonError};

use tokio::sync::watch;
use tokio::task::JoinSet;

use super::{Event, Service};
use crate::names::Name;
use crate::served::ServedDisk;

/// The tasks of one disk, which end when they are told to: a sync that nobody waits for any more would
/// take with it what came of it.
#[derive(Default)]
pub(super) struct Keepers {
    stop: watch::Sender<bool>,
    tasks: JoinSet<()>,
}

impl Keepers {
    async fn end(mut self) {
        self.stop.send_replace(true);
        while self.tasks.join_next().await.is_some() {}
    }
}

impl Service {
    /// Looks after `disk` from now on.
    ///
    /// Runs on a [`LocalSet`](tokio::task::LocalSet).
    pub(crate) fn keep(self: &Arc<Self>, disk: &Arc<ServedDisk>) {
        let mut keepers = Keepers::default();
        let (kept, mut stop) = (Arc::clone(disk), keepers.stop.subscribe());
        keepers.tasks.spawn_local(async move {
            kept.look_after(&mut stop).await;
        });
        let (service, watched) = (Arc::clone(self), Arc::clone(disk));
        let mut stop = keepers.stop.subscribe();
        keepers.tasks.spawn_local(async move {
            tokio::select! {
                _ = stop.wait_for(|stop| *stop) => {}
                () = service.watch_tracking(&watched) => {}
            }
        });
        self.keepers().insert(disk.name.clone(), keepers);
    }

    /// Looks after this disk no longer; returns when nothing of that goes on.
    pub(super) async fn let_go(&self, disk: &Name) {
        let keepers = self.keepers().remove(disk);
        if let Some(keepers) = keepers {
            keepers.end().await;
        }
    }

    /// The same for all disks.
    pub(crate) async fn let_all_go(&self) {
        let all = std::mem::take(&mut *self.keepers());
        for keepers in all.into_values() {
            keepers.end().await;
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
