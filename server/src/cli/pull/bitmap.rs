//! Disks that come by a dirty bitmap: one that is stored in an image, or that the server keeps.
//!
//! The server tells what is dirty in it, and nobody knows since when: whoever asks for it says that it
//! has everything since the last point in the folder. So what comes by it is not vouched for.

use std::collections::BTreeMap;

use uuid::Uuid;

use super::base::{self, Base, Coming};
use crate::archive::{DiskPlan, Point, Since};
use crate::control::answers::{BackupDisk, CheckpointAnswer};
use crate::control::bitmaps::Node;
use crate::copy::reasons::{FIRST, resized};

/// The dirty bitmap that was asked for, on the disks of a server.
pub(super) struct Bitmap {
    name: String,
    /// By disk: how many bytes are dirty, or why it is of no use.
    disks: BTreeMap<String, Result<u64, String>>,
}

impl Bitmap {
    /// What a server has under this name, by what it says of its disks and checkpoints.
    pub(super) fn find(name: &str, nodes: &[Node], known: &[CheckpointAnswer]) -> Self {
        let is_checkpoint = known.iter().any(|it| it.name.as_str() == name);
        let found = nodes.iter().filter_map(|node| {
            let mut bitmaps = node.dirty_bitmaps.iter();
            let bitmap = bitmaps.find(|bitmap| bitmap.name == name)?;
            let usable = if bitmap.inconsistent {
                Err(format!("its dirty bitmap '{name}' is inconsistent"))
            } else if !node.ro && !bitmap.recording {
                // On a disk that nobody writes nothing has changed since it ended.
                Err(format!(
                    "its dirty bitmap '{name}' is disabled, and misses what changes"
                ))
            } else if is_checkpoint {
                Err(format!(
                    "a checkpoint has the name of its dirty bitmap '{name}'"
                ))
            } else {
                Ok(bitmap.count)
            };
            Some((node.disk.to_string(), usable))
        });
        Self {
            name: name.to_owned(),
            disks: found.collect(),
        }
    }

    pub(super) fn name(&self) -> &str {
        &self.name
    }

    /// Whether a server would refuse it for a backup of these disks, of which it is of use to others.
    pub(super) fn is_in_the_way(&self, disks: &[String]) -> bool {
        disks
            .iter()
            .any(|disk| matches!(self.disks.get(disk), Some(Err(_))))
    }

    /// How many bytes of a disk are dirty in it, or why it is of no use.
    pub(super) fn of(&self, disk: &str) -> Result<u64, String> {
        let none = || Err(format!("it has no dirty bitmap '{}'", self.name));
        self.disks.get(disk).cloned().unwrap_or_else(none)
    }

    /// How a frozen disk comes: by the bitmap where that is served, else as without it.
    pub(super) fn coming(&self, points: &[Point], base: &Base, answer: &BackupDisk) -> Coming {
        let context = format!("qemu:dirty-bitmap:{}", self.name);
        let why_not = match self.of(answer.disk.as_str()) {
            Ok(_) if answer.contexts.contains(&context) => {
                return self.on_top_of(
                    points,
                    (answer.disk.as_str(), answer.disk_uuid),
                    answer.size,
                );
            }
            Ok(_) => format!("its dirty bitmap '{}' is not served", self.name),
            Err(reason) => reason,
        };
        match base::coming(points, base, answer) {
            Coming::Full(reason) => Coming::Full(also(&why_not, reason)),
            incremental @ Coming::Incremental { .. } => incremental,
        }
    }

    /// How a disk of this size comes by the bitmap.
    pub(super) fn on_top_of(&self, points: &[Point], disk: (&str, Uuid), size: u64) -> Coming {
        let mut newest_first = points.iter().rev();
        let last = newest_first.find_map(|point| Some((point, base::entry(point, disk)?)));
        match last {
            None => Coming::Full(FIRST.to_owned()),
            Some((_, entry)) if entry.size != size => Coming::Full(resized(entry.size, size)),
            Some((point, _)) => Coming::Incremental {
                since: Since {
                    name: self.name.clone(),
                    uuid: None,
                },
                parent: point.number,
            },
        }
    }
}

/// Why it is a full without the bitmap too.
pub(super) fn also(why_not: &str, reason: String) -> String {
    if reason == FIRST {
        return reason;
    }
    format!("{why_not}, and {reason}")
}

/// Whether a disk comes, or came, by a dirty bitmap: checkpoints have uuids.
pub(super) fn is_by_bitmap(plan: &DiskPlan) -> bool {
    plan.since
        .as_ref()
        .is_some_and(|since| since.uuid.is_none())
}
