//! Which checkpoints and backups there are.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::Duration;

use bitmap::Era;
use scratch::Frozen;
use time::OffsetDateTime;
use tokio::sync::Notify;
use tokio::task::JoinSet;
use uuid::Uuid;

use super::bitmaps::{Bitmaps, FrozenBitmap};
use crate::files::{Files, SnapshotDir};
use crate::names::Name;
use crate::served::ServedDisk;

/// Checkpoints and backups, as they are known to everyone.
#[derive(Default)]
pub(crate) struct Book {
    /// Oldest first; pending ones too.
    pub(crate) checkpoints: Vec<Checkpoint>,
    /// The open ones, oldest first.
    pub(crate) backups: Vec<Arc<Backup>>,
    /// How each backup that is no longer open ended.
    pub(crate) ended: BTreeMap<Name, Outcome>,
    /// Dirty bitmaps, which have a namespace of their own.
    pub(crate) bitmaps: Bitmaps,
}

/// A name for the instant at which an era began on each of some disks.
#[derive(Clone, Debug)]
pub(crate) struct Checkpoint {
    /// Its name, which may be used again when it is gone.
    pub(crate) name: Name,
    /// Its identity, which is never used again.
    pub(crate) uuid: Uuid,
    /// When it was taken.
    pub(crate) created: OffsetDateTime,
    /// The era that began then, by disk.
    pub(crate) eras: BTreeMap<Name, Era>,
    /// The backup whose commit makes it visible, until then.
    pub(crate) pending_of: Option<Name>,
}

/// What a backup was asked for.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub(crate) struct BeginRequest {
    /// Its id, else one is made.
    pub(crate) id: Option<Name>,
    /// The disks, else all.
    pub(crate) disks: Option<Vec<Name>>,
    /// The checkpoint to begin from, by name or uuid.
    pub(crate) since: Option<String>,
    /// The checkpoint that its commit makes.
    pub(crate) checkpoint: Option<Name>,
    /// The dirty bitmaps that it serves.
    pub(crate) bitmaps: Option<Vec<String>>,
}

/// An instant that is kept until it is committed or aborted.
pub(crate) struct Backup {
    /// Its name.
    pub(crate) id: Name,
    /// Its identity.
    pub(crate) uuid: Uuid,
    /// What was asked for.
    pub(crate) request: BeginRequest,
    /// The instant.
    pub(crate) frozen_at: OffsetDateTime,
    /// For how long the guests were held.
    pub(crate) pause: Duration,
    /// The checkpoint that it begins from: name and identity.
    pub(crate) since: Option<(Name, Uuid)>,
    /// The checkpoint that its commit makes: name and identity.
    pub(crate) checkpoint: Option<(Name, Uuid)>,
    /// Its disks.
    pub(crate) disks: BTreeMap<Name, Arc<FrozenDisk>>,
    /// Why all of it was given up: the first of its disks that was lost.
    pub(super) lost: OnceLock<String>,
}

/// How a backup ended.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Outcome {
    /// It succeeded: its checkpoint is a base.
    Committed,
    /// As if it had never begun.
    Aborted,
}

/// One disk of a backup.
pub(crate) struct FrozenDisk {
    /// The disk.
    pub(crate) disk: Arc<ServedDisk>,
    /// The backup.
    pub(crate) backup: Name,
    /// The disk as it was.
    pub(crate) frozen: Frozen<Files>,
    /// What it can be compared with.
    pub(crate) base: Base,
    /// How much of it changed since its base; all of it without one.
    pub(crate) changed_bytes: u64,
    /// How much of that is only presumed to have changed.
    pub(crate) uncertain_bytes: u64,
    /// Whether the disk's own name means this export, until the backup ends.
    pub(crate) has_disk_name: bool,
    /// The dirty bitmaps that were asked for, as they were.
    pub(crate) bitmaps: Vec<FrozenBitmap>,
    /// Use of `DISK@ID`.
    pub(crate) whole: Usage,
    /// Use of each `DISK@CHECKPOINT..ID`.
    pub(crate) differences: Differences,
    pub(super) ended: AtomicBool,
    pub(super) ending: Notify,
    /// None of a disk of which nothing is left.
    pub(super) dir: Option<SnapshotDir>,
}

/// What a frozen disk can be compared with.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(crate) enum Base {
    /// Nothing was asked for.
    None,
    /// A checkpoint.
    Checkpoint {
        /// Its name.
        name: Name,
        /// The era that began with it.
        era: Era,
    },
    /// A checkpoint was asked for, and this disk cannot use it, for a reason in words.
    Unusable(String),
}

/// What clients did with an export.
#[derive(Debug, Default)]
pub(crate) struct Usage {
    /// How many bytes they have read.
    pub(crate) bytes_read: AtomicU64,
    /// How many are connected.
    pub(crate) clients: AtomicUsize,
}

/// Use of each `DISK@CHECKPOINT..ID`, by checkpoint: of the one that the backup begins from, and of
/// those that a client has opened.
#[derive(Debug, Default)]
pub(crate) struct Differences(Mutex<BTreeMap<String, Arc<Usage>>>);

impl Differences {
    /// Use of the difference from `checkpoint`.
    pub(crate) fn usage_of(&self, checkpoint: &str) -> Arc<Usage> {
        let mut all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        Arc::clone(all.entry(checkpoint.to_owned()).or_default())
    }

    /// All of them.
    pub(crate) fn all(&self) -> BTreeMap<String, Arc<Usage>> {
        self.0
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }
}

impl Book {
    /// The checkpoint of this name, pending or not.
    pub(crate) fn checkpoint(&self, name: &str) -> Option<&Checkpoint> {
        self.checkpoints
            .iter()
            .find(|checkpoint| checkpoint.name.as_str() == name)
    }

    /// The open backup with this id.
    pub(crate) fn backup(&self, id: &str) -> Option<&Arc<Backup>> {
        self.backups.iter().find(|backup| backup.id.as_str() == id)
    }

    /// The checkpoints that a frozen disk can be compared with, oldest first: name and era.
    pub(crate) fn bases<'a>(
        &'a self,
        frozen: &'a FrozenDisk,
    ) -> impl Iterator<Item = (&'a Name, Era)> {
        let frozen_in = frozen.frozen.snapshot().eras().frozen_in();
        let visible = self.checkpoints.iter().filter(|c| c.pending_of.is_none());
        visible.filter_map(move |checkpoint| {
            let era = *checkpoint.eras.get(&frozen.disk.name)?;
            let usable = era < frozen_in && frozen.disk.why_lost(era).is_none();
            usable.then_some((&checkpoint.name, era))
        })
    }
}

impl Backup {
    /// Why it is broken, if it is.
    pub(crate) fn broken(&self) -> Option<String> {
        // Whoever asks before that has been told finds the disk itself.
        self.lost.get().cloned().or_else(|| {
            self.disks.values().find_map(|disk| {
                let why = disk.frozen.snapshot().broken()?;
                Some(format!("disk '{}': {why}", disk.disk.name))
            })
        })
    }

    /// Waits until one of its disks is lost, and gives up the others; says why. `None` if it ends
    /// before.
    pub(super) async fn breaks(&self) -> Option<&str> {
        let (disk, why) = self.first_lost().await?;
        let reason = self.lost.get_or_init(|| format!("disk '{disk}': {why}"));
        // Of an instant of several disks, a part is worth nothing.
        for part in self.disks.values() {
            part.frozen.snapshot().give_up(reason.clone());
        }
        Some(reason)
    }

    async fn first_lost(&self) -> Option<(Name, String)> {
        let mut parts = JoinSet::new();
        for part in self.disks.values().cloned() {
            parts.spawn_local(async move {
                tokio::select! {
                    () = part.ends() => None,
                    why = part.frozen.snapshot().breaks() => {
                        Some((part.disk.name.clone(), why.to_owned()))
                    }
                }
            });
        }
        parts.join_next().await?.ok()?
    }
}

impl FrozenDisk {
    /// Counts what changed, which for a large disk takes a moment.
    pub(super) fn new(
        disk: Arc<ServedDisk>,
        backup: Name,
        frozen: Frozen<Files>,
        base: Base,
        has_disk_name: bool,
        dir: Option<SnapshotDir>,
        bitmaps: Vec<FrozenBitmap>,
    ) -> Self {
        let eras = frozen.snapshot().eras();
        let (changed_bytes, uncertain_bytes) = match &base {
            Base::Checkpoint { era, .. } => (
                eras.changed_bytes(*era),
                eras.presumed_bytes(*era, &disk.presumed),
            ),
            Base::None | Base::Unusable(_) => (frozen.size(), 0),
        };
        let differences = Differences::default();
        if let Base::Checkpoint { name, .. } = &base {
            differences.usage_of(name.as_str());
        }
        Self {
            disk,
            backup,
            frozen,
            base,
            changed_bytes,
            uncertain_bytes,
            has_disk_name,
            bitmaps,
            whole: Usage::default(),
            differences,
            ended: AtomicBool::new(false),
            ending: Notify::new(),
            dir,
        }
    }

    /// Whether the backup has been committed or aborted.
    pub(crate) fn has_ended(&self) -> bool {
        self.ended.load(Ordering::Acquire)
    }

    /// Waits until the backup is committed or aborted.
    pub(crate) async fn ends(&self) {
        loop {
            let ending = self.ending.notified();
            tokio::pin!(ending);
            ending.as_mut().enable();
            if self.has_ended() {
                return;
            }
            ending.await;
        }
    }

    pub(super) fn end(&self) {
        // Who reads from now on is told; then what they would have read may go.
        self.ended.store(true, Ordering::Release);
        self.ending.notify_waiters();
        self.disk.disk.forget(self.frozen.snapshot());
        if let Some(dir) = &self.dir {
            dir.remove();
        }
    }
}
