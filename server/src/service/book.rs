//! Which checkpoints and backups there are.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::time::Duration;

use bitmap::Era;
use scratch::Frozen;
use time::OffsetDateTime;
use uuid::Uuid;

use crate::files::{Files, SnapshotDir};
use crate::names::Name;
use crate::served::ServedDisk;

/// Checkpoints and backups, as they are known to everyone.
#[derive(Default)]
pub struct Book {
    /// Oldest first; pending ones too.
    pub checkpoints: Vec<Checkpoint>,
    /// The open ones, oldest first.
    pub backups: Vec<Arc<Backup>>,
    /// How each backup that is no longer open ended.
    pub ended: BTreeMap<Name, Outcome>,
}

/// A name for the instant at which an era began on each of some disks.
#[derive(Clone, Debug)]
pub struct Checkpoint {
    /// Its name, which may be used again when it is gone.
    pub name: Name,
    /// Its identity, which is never used again.
    pub uuid: Uuid,
    /// When it was taken.
    pub created: OffsetDateTime,
    /// The era that began then, by disk.
    pub eras: BTreeMap<Name, Era>,
    /// The backup whose commit makes it visible, until then.
    pub pending_of: Option<Name>,
}

/// What a backup was asked for.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct BeginRequest {
    /// Its id, else one is made.
    pub id: Option<Name>,
    /// The disks, else all.
    pub disks: Option<Vec<Name>>,
    /// The checkpoint to begin from, by name or uuid.
    pub since: Option<String>,
    /// The checkpoint that its commit makes.
    pub checkpoint: Option<Name>,
}

/// An instant that is kept until it is committed or aborted.
pub struct Backup {
    /// Its name.
    pub id: Name,
    /// Its identity.
    pub uuid: Uuid,
    /// What was asked for.
    pub request: BeginRequest,
    /// The instant.
    pub frozen_at: OffsetDateTime,
    /// For how long the guests were held.
    pub pause: Duration,
    /// The checkpoint that it begins from: name and identity.
    pub since: Option<(Name, Uuid)>,
    /// The checkpoint that its commit makes: name and identity.
    pub checkpoint: Option<(Name, Uuid)>,
    /// Its disks.
    pub disks: BTreeMap<Name, Arc<FrozenDisk>>,
}

/// How a backup ended.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Outcome {
    /// It succeeded: its checkpoint is a base.
    Committed,
    /// As if it had never begun.
    Aborted,
}

/// One disk of a backup.
pub struct FrozenDisk {
    /// The disk.
    pub disk: Arc<ServedDisk>,
    /// The backup.
    pub backup: Name,
    /// The disk as it was.
    pub frozen: Frozen<Files>,
    /// What it can be compared with.
    pub base: Base,
    /// How much of it changed since its base; all of it without one.
    pub changed_bytes: u64,
    /// Whether the disk's own name means this export, until the backup ends.
    pub has_disk_name: bool,
    /// Use of `DISK@ID`.
    pub whole: Usage,
    /// Use of `DISK@CHECKPOINT..ID`.
    pub difference: Usage,
    pub(super) ended: AtomicBool,
    pub(super) _dir: SnapshotDir,
}

/// What a frozen disk can be compared with.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum Base {
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
pub struct Usage {
    /// How many bytes they have read.
    pub bytes_read: AtomicU64,
    /// How many are connected.
    pub clients: AtomicUsize,
}

impl Book {
    /// The checkpoint of this name, pending or not.
    pub fn checkpoint(&self, name: &str) -> Option<&Checkpoint> {
        self.checkpoints
            .iter()
            .find(|checkpoint| checkpoint.name.as_str() == name)
    }

    /// The open backup with this id.
    pub fn backup(&self, id: &str) -> Option<&Arc<Backup>> {
        self.backups.iter().find(|backup| backup.id.as_str() == id)
    }

    /// The checkpoints that a frozen disk can be compared with, oldest first: name and era.
    pub fn bases<'a>(&'a self, frozen: &'a FrozenDisk) -> impl Iterator<Item = (&'a Name, Era)> {
        let frozen_in = frozen.frozen.snapshot().eras().frozen_in();
        let visible = self.checkpoints.iter().filter(|c| c.pending_of.is_none());
        visible.filter_map(move |checkpoint| {
            let era = *checkpoint.eras.get(&frozen.disk.name)?;
            (era < frozen_in).then_some((&checkpoint.name, era))
        })
    }
}

impl Backup {
    /// Why it is broken, if it is.
    pub fn broken(&self) -> Option<String> {
        self.disks.values().find_map(|disk| {
            let why = disk.frozen.snapshot().broken()?;
            Some(format!("disk '{}': {why}", disk.disk.name))
        })
    }
}

impl FrozenDisk {
    /// Whether the backup has been committed or aborted.
    pub fn has_ended(&self) -> bool {
        self.ended.load(Ordering::Acquire)
    }
}
