//! Which checkpoints and backups there are.

use std::collections::{BTreeMap, VecDeque};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::Duration;

use bitmap::Era;
use scratch::{Budget, Frozen};
use time::OffsetDateTime;
use tokio::sync::Notify;
use tokio::task::JoinSet;
use uuid::Uuid;

use super::bitmaps::{Bitmaps, FrozenBitmap};
use super::members::Away;
use crate::files::{Files, SnapshotDir};
use crate::names::Name;
use crate::served::ServedDisk;
pub(crate) use crate::state::Outcome;
use crate::state::{ENDED_MAX, Lost};

/// Checkpoints, backups and consumers, as they are known to everyone.
#[derive(Default)]
pub(crate) struct Book {
    /// Oldest first; pending ones too.
    pub(crate) checkpoints: Vec<Checkpoint>,
    /// The open ones, oldest first.
    pub(crate) backups: Vec<Arc<Backup>>,
    /// How the backups that are no longer open ended.
    pub(crate) ended: Ended,
    /// Where each consumer is, by disk.
    pub(crate) consumers: BTreeMap<Name, BTreeMap<Name, Last>>,
    /// Dirty bitmaps, which have a namespace of their own.
    pub(crate) bitmaps: Bitmaps,
    /// The disks that have gone since the server began, by uuid.
    pub(super) away: BTreeMap<Uuid, Away>,
}

/// Where a consumer is on a disk: at the checkpoint of the last backup that it has committed.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(crate) struct Last {
    /// Its name.
    pub(crate) name: Name,
    /// Its identity: the checkpoint itself may have been deleted, and the name used again.
    pub(crate) uuid: Uuid,
    /// When it was taken.
    pub(crate) created: OffsetDateTime,
}

/// How backups ended: of the last [`ENDED_MAX`], so that their ids are not used again.
#[derive(Default)]
pub(crate) struct Ended {
    outcomes: BTreeMap<Name, Outcome>,
    /// Oldest first.
    order: VecDeque<Name>,
}

impl Ended {
    /// Takes in what is known elsewhere. What was told here of an id goes on being told.
    pub(super) fn join(&mut self, other: Self) {
        for (id, outcome) in other.outcomes {
            if self.get(&id).is_none() {
                self.insert(id, outcome);
            }
        }
    }

    /// How the backup with this id ended.
    pub(crate) fn get(&self, id: &Name) -> Option<Outcome> {
        self.outcomes.get(id).copied()
    }

    /// An id whose beginning could not be recorded may be used again; once committed, it is that.
    pub(super) fn insert(&mut self, id: Name, outcome: Outcome) {
        match self.outcomes.get(&id) {
            Some(Outcome::Committed) => return,
            Some(Outcome::Aborted) => {}
            None => self.order.push_back(id.clone()),
        }
        self.outcomes.insert(id, outcome);
        if self.order.len() > ENDED_MAX
            && let Some(oldest) = self.order.pop_front()
        {
            self.outcomes.remove(&oldest);
        }
    }
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
    /// It was made for a consumer, and goes when nobody needs it.
    pub(crate) automatic: bool,
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
    /// For whom it is: its commit moves the consumer on.
    pub(crate) consumer: Option<Name>,
    /// After how many seconds the server aborts it.
    pub(crate) expires_s: Option<u64>,
    /// How much scratch it may take, in bytes.
    pub(crate) scratch_limit: Option<u64>,
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
    /// When the server aborts it, by its clock.
    pub(crate) expires_at: Option<OffsetDateTime>,
    /// What it uses of scratch and may use.
    pub(crate) budget: Arc<Budget>,
    /// Its disks.
    pub(crate) disks: BTreeMap<Name, Arc<FrozenDisk>>,
    /// Why all of it was given up: the first of its disks that was lost.
    pub(super) lost: OnceLock<String>,
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
    /// What was of no use when it was frozen, or when the server began: what went untracked later
    /// changed nothing that is known of the instant.
    pub(super) lost: Option<Lost>,
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

/// What became of the checkpoints that a backup begins from.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum BaseState {
    /// There are none.
    None,
    /// The next backup can begin from them too.
    Intact,
    /// On one disk at least it cannot.
    Lost,
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
        /// Its identity.
        uuid: Uuid,
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

    /// The era of the oldest checkpoint of `disk`.
    pub(crate) fn oldest_era(&self, disk: &Name) -> Option<Era> {
        let eras = self.checkpoints.iter().filter_map(|c| c.eras.get(disk));
        eras.min().copied()
    }

    /// The open backup with this id.
    pub(crate) fn backup(&self, id: &str) -> Option<&Arc<Backup>> {
        self.backups.iter().find(|backup| backup.id.as_str() == id)
    }

    /// Whether an open backup begins from the checkpoint `uuid` on `disk`, or which.
    pub(crate) fn user_of(&self, uuid: Uuid, disk: &Name) -> Option<&Name> {
        let uses = |backup: &&Arc<Backup>| {
            let base = backup.disks.get(disk).map(|part| &part.base);
            base.is_some_and(|base| base.uuid() == Some(uuid))
        };
        self.backups.iter().find(uses).map(|backup| &backup.id)
    }

    /// The consumer whose last checkpoint on `disk` is `uuid`.
    pub(crate) fn consumer_at(&self, uuid: Uuid, disk: &Name) -> Option<&Name> {
        let is_there =
            |lasts: &BTreeMap<Name, Last>| lasts.get(disk).is_some_and(|last| last.uuid == uuid);
        let mut consumers = self.consumers.iter();
        consumers
            .find(|(_, lasts)| is_there(lasts))
            .map(|(name, _)| name)
    }

    /// Oldest first.
    pub(super) fn sort(&mut self) {
        self.checkpoints
            .sort_by_key(|checkpoint| checkpoint.created);
        self.backups.sort_by_key(|backup| backup.frozen_at);
    }

    /// Checkpoints that were made for a consumer and that nobody needs any more, and where.
    pub(super) fn left_behind(&self) -> Vec<(Uuid, Vec<Name>)> {
        let mut left = Vec::new();
        let automatic = |c: &&Checkpoint| c.automatic && c.pending_of.is_none();
        for checkpoint in self.checkpoints.iter().filter(automatic) {
            let uuid = checkpoint.uuid;
            let is_needed = |disk: &Name| {
                self.consumer_at(uuid, disk).is_some() || self.user_of(uuid, disk).is_some()
            };
            let disks = checkpoint.eras.keys().filter(|disk| !is_needed(disk));
            let disks: Vec<Name> = disks.cloned().collect();
            if !disks.is_empty() {
                left.push((uuid, disks));
            }
        }
        left
    }

    /// Forgets a checkpoint on some disks.
    pub(super) fn remove_checkpoint(&mut self, uuid: Uuid, disks: &[Name]) {
        for checkpoint in self.checkpoints.iter_mut().filter(|c| c.uuid == uuid) {
            checkpoint.eras.retain(|disk, _| !disks.contains(disk));
        }
        self.checkpoints
            .retain(|checkpoint| !checkpoint.eras.is_empty());
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
            // What it begins from was looked at when its instant had been taken.
            let begins = matches!(&frozen.base, Base::Checkpoint { era: base, .. } if *base == era);
            let known = begins || frozen.lost.as_ref().is_none_or(|lost| era > lost.era);
            let usable = era < frozen_in && known;
            usable.then_some((&checkpoint.name, era))
        })
    }
}

impl Base {
    /// The checkpoint, if it is one: name and identity.
    pub(crate) fn checkpoint(&self) -> Option<(Name, Uuid)> {
        match self {
            Self::Checkpoint { name, uuid, .. } => Some((name.clone(), *uuid)),
            Self::None | Self::Unusable(_) => None,
        }
    }

    fn uuid(&self) -> Option<Uuid> {
        match self {
            Self::Checkpoint { uuid, .. } => Some(*uuid),
            Self::None | Self::Unusable(_) => None,
        }
    }
}

impl Backup {
    /// Where its commit moves its consumer.
    pub(super) fn last(&self) -> Option<Last> {
        let (name, uuid) = self.checkpoint.clone()?;
        Some(Last {
            name,
            uuid,
            created: self.frozen_at,
        })
    }

    /// The checkpoint that its commit makes, as it is until then.
    pub(super) fn pending_checkpoint(&self) -> Option<Checkpoint> {
        let (name, uuid) = self.checkpoint.clone()?;
        let era = |part: &FrozenDisk| part.frozen.snapshot().eras().frozen_in();
        let eras = self
            .disks
            .iter()
            .map(|(name, part)| (name.clone(), era(part)));
        Some(Checkpoint {
            name,
            uuid,
            created: self.frozen_at,
            eras: eras.collect(),
            pending_of: Some(self.id.clone()),
            automatic: self.request.checkpoint.is_none(),
        })
    }

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

    /// What became of the checkpoints that it begins from, for whoever begins anew.
    pub(crate) fn base_state(&self) -> BaseState {
        let mut state = BaseState::None;
        for part in self.disks.values() {
            if let Base::Checkpoint { era, .. } = &part.base {
                if part.disk.why_lost(*era).is_some() {
                    return BaseState::Lost;
                }
                state = BaseState::Intact;
            }
        }
        state
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
            lost: disk.lost(),
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
        self.frozen.snapshot().end();
        self.ending.notify_waiters();
        self.disk.disk.forget(self.frozen.snapshot());
    }

    /// Gives back the space of what is broken or has ended, also if clients still have it open.
    ///
    /// First everyone who reads is told that it is over, which whoever is reading asks at last; then
    /// whoever still stores something ends; then it goes. A process that is killed leaves files that
    /// are whole, or that are too short to be taken for a snapshot.
    pub(super) async fn release(&self) {
        let snapshot = self.frozen.snapshot();
        snapshot.quiet().await;
        if let Some(dir) = &self.dir {
            dir.release().await;
            if self.has_ended() {
                dir.remove();
            }
        }
        snapshot.released();
    }
}
