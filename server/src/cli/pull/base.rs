//! Whether a disk comes as a full or as an incremental, and why.
//!
//! An incremental is right only on top of the very instant since which its changes are known. So a
//! server is believed only where the folder has a point of exactly that checkpoint, by uuid.

use uuid::Uuid;

use crate::archive::{DiskEntry, Mode, Point, Since};
use crate::control::answers::{self, BackupDisk, CheckpointAnswer};
use crate::copy::reasons::{FIRST, without_checkpoint};

/// What a disk's changes could be relative to.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(super) enum Base {
    /// A point whose checkpoint the server still has, by the checkpoint's uuid.
    Checkpoint(Uuid),
    /// None, for this reason.
    None(String),
}

/// How a disk comes.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(super) enum Coming {
    /// All of it, for this reason.
    Full(String),
    /// What has changed since a checkpoint, on top of the point that has it.
    Incremental {
        /// The checkpoint.
        since: Since,
        /// The number of the point.
        parent: u64,
    },
}

/// The newest point with this disk whose checkpoint is there.
pub(super) fn find(points: &[Point], disk: (&str, Uuid), known: &[CheckpointAnswer]) -> Base {
    let mut of_disk = points
        .iter()
        .rev()
        .filter(|point| entry(point, disk).is_some());
    let Some(newest) = of_disk.clone().next() else {
        return Base::None(FIRST.to_owned());
    };
    let is_known = |uuid: Uuid| {
        known.iter().any(|checkpoint| {
            checkpoint.uuid == uuid
                && !checkpoint.pending
                && checkpoint.disks.iter().any(|part| part.disk_uuid == disk.1)
        })
    };
    let found = of_disk.find_map(|point| {
        let checkpoint = point.checkpoint.as_ref()?;
        Some(checkpoint.uuid).filter(|uuid| is_known(*uuid))
    });
    match found {
        Some(uuid) => Base::Checkpoint(uuid),
        None => Base::None(without_checkpoint(newest)),
    }
}

/// What to ask the server for, for disks with these bases: a checkpoint that all can use, or what
/// the consumer of this folder had last of each.
pub(super) fn since(bases: &[Base]) -> Option<String> {
    let mut uuids = bases.iter().filter_map(|base| match base {
        Base::Checkpoint(uuid) => Some(uuid),
        Base::None(_) => None,
    });
    let first = uuids.next()?;
    if uuids.all(|uuid| uuid == first) {
        Some(first.to_string())
    } else {
        Some("last".to_owned())
    }
}

/// How a disk comes, by what the server answered when it was asked for changes since `base`.
pub(super) fn coming(points: &[Point], base: &Base, answer: &BackupDisk) -> Coming {
    let (Some(name), Some(uuid)) = (&answer.since, answer.since_uuid) else {
        return Coming::Full(why_full(base, answer));
    };
    if answer.mode == answers::Mode::Full {
        return Coming::Full(why_full(base, answer));
    }
    let disk = (answer.disk.as_str(), answer.disk_uuid);
    let has_it = |point: &&Point| {
        point.checkpoint.as_ref().is_some_and(|at| at.uuid == uuid)
            && entry(point, disk).is_some_and(|entry| entry.size <= answer.size)
    };
    match points.iter().rev().find(has_it) {
        Some(point) => Coming::Incremental {
            since: Since {
                name: name.to_string(),
                uuid: Some(uuid),
            },
            parent: point.number,
        },
        None => Coming::Full(match base {
            Base::None(reason) => reason.clone(),
            Base::Checkpoint(_) => format!("no point here is of checkpoint '{name}'"),
        }),
    }
}

/// Whether somebody will wonder that a disk comes as a full.
pub(super) fn is_surprise(points: &[Point], name: &str, mode: Mode) -> bool {
    let is_there = points
        .iter()
        .any(|point| point.disks.iter().any(|entry| entry.name == name));
    mode == Mode::Full && is_there
}

fn why_full(base: &Base, answer: &BackupDisk) -> String {
    match (base, &answer.reason) {
        // Nothing was asked for this disk, whatever was for others.
        (Base::None(reason), _) | (Base::Checkpoint(_), Some(reason)) => reason.clone(),
        (Base::Checkpoint(_), None) => "the server gives no incremental".to_owned(),
    }
}

/// A disk in a point, by its name and its uuid.
pub(super) fn entry<'a>(point: &'a Point, (name, uuid): (&str, Uuid)) -> Option<&'a DiskEntry> {
    let mut entries = point.disks.iter();
    entries.find(|entry| entry.name == name && entry.uuid == Some(uuid))
}
