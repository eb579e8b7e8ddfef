//! Whether a disk comes as a full or as an incremental, and why.
//!
//! An incremental is right only on top of the very instant since which its changes are known. So a
//! checkpoint is a base only where the folder has a point of exactly that one, by uuid.

use std::sync::Arc;

use bitmap::Era;

use crate::archive::{Point, Since};
use crate::copy::reasons;
use crate::service::{Base, FrozenDisk, Service};

/// How a disk comes.
pub(super) enum Coming {
    /// All of it, for this reason.
    Full(String),
    /// What has changed since a checkpoint, on top of the point that has it.
    Incremental {
        /// The checkpoint.
        since: Since,
        /// What began with it.
        era: Era,
        /// The number of the point.
        parent: u64,
    },
}

impl Coming {
    pub(super) fn incremental(&self) -> Option<(&Since, Era, u64)> {
        match self {
            Self::Full(_) => None,
            Self::Incremental { since, era, parent } => Some((since, *era, *parent)),
        }
    }
}

/// How a frozen disk comes into a folder with these points.
pub(super) fn coming(
    service: &Service,
    points: &[Point],
    part: &Arc<FrozenDisk>,
    full: bool,
) -> Coming {
    if full {
        return Coming::Full(reasons::ASKED_FOR.to_owned());
    }
    let is_of_disk = |point: &&Point| {
        let entry = point.disk(part.disk.name.as_str());
        entry.is_some_and(|entry| {
            entry.uuid == Some(part.disk.uuid) && entry.size <= part.frozen.size()
        })
    };
    let mut newest_first = points.iter().rev().filter(is_of_disk);
    let Some(newest) = newest_first.clone().next() else {
        return Coming::Full(reasons::FIRST.to_owned());
    };
    let found = newest_first.find_map(|point| {
        let uuid = point.checkpoint.as_ref()?.uuid;
        Some((point.number, service.base_of_frozen(part, uuid)?))
    });
    match found {
        None | Some((_, Base::None)) => Coming::Full(reasons::without_checkpoint(newest)),
        Some((_, Base::Unusable(reason))) => Coming::Full(reason),
        Some((parent, Base::Checkpoint { name, uuid, era })) => Coming::Incremental {
            since: Since {
                name: name.to_string(),
                uuid: Some(uuid),
            },
            era,
            parent,
        },
    }
}
