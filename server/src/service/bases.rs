//! What a backup begins from.

use std::collections::BTreeMap;
use std::sync::Arc;

use uuid::Uuid;

use super::Service;
use super::book::{Base, BeginRequest, Book, Checkpoint, FrozenDisk, Last};
use crate::failure::Failure;
use crate::names::Name;
use crate::served::ServedDisk;

/// Why a disk is full the first time that a consumer asks for its changes.
pub(crate) const FIRST_BACKUP: &str = "first backup of this consumer";

/// What someone asked for the changes since.
pub(super) enum Since {
    /// Nothing.
    Nothing,
    /// A checkpoint.
    Checkpoint(Checkpoint),
    /// A checkpoint that nobody knows any more, in words.
    Gone(String),
    /// The last backup of a consumer, by disk.
    Last {
        /// Which consumer.
        consumer: Name,
        /// Where it is.
        lasts: BTreeMap<Name, Last>,
    },
}

impl Service {
    /// Finds what `request` asks for, for a backup of `disks`.
    pub(super) fn find_base(
        &self,
        request: &BeginRequest,
        disks: &[Arc<ServedDisk>],
    ) -> Result<Since, Failure> {
        let Some(text) = request.since.as_deref() else {
            return Ok(Since::Nothing);
        };
        let book = self.book();
        if LAST.contains(&text) {
            let Some(consumer) = request.consumer.clone() else {
                let message = format!("since '{text}' needs a consumer whose last backup is meant");
                return Err(
                    Failure::new("bad-argument", message).hint("say which: --consumer NAME")
                );
            };
            let lasts = book.consumers.get(&consumer).cloned().unwrap_or_default();
            return Ok(Since::Last { consumer, lasts });
        }
        let since = find_checkpoint(&book, text, disks)?;
        if let Since::Checkpoint(base) = &since
            && !disks.iter().any(|disk| base.eras.contains_key(&disk.name))
            && !disks.iter().any(|disk| disk.forgotten.is_some())
        {
            let message = format!("checkpoint '{}' is on none of these disks", base.name);
            return Err(Failure::new("unknown-checkpoint", message));
        }
        Ok(since)
    }

    /// What `disk` can be compared with.
    pub(super) fn base_of(&self, since: &Since, disk: &ServedDisk) -> Base {
        let unusable = |reason: String| Base::Unusable(disk.forgotten.clone().unwrap_or(reason));
        match since {
            Since::Nothing => Base::None,
            Since::Gone(reason) => unusable(reason.clone()),
            Since::Checkpoint(base) => usable(base, disk).unwrap_or_else(|| {
                unusable(format!("checkpoint '{}' does not include it", base.name))
            }),
            Since::Last { consumer, lasts } => {
                let Some(last) = lasts.get(&disk.name) else {
                    return unusable(if lasts.is_empty() {
                        FIRST_BACKUP.to_owned()
                    } else {
                        format!("consumer '{consumer}' has no backup of it yet")
                    });
                };
                self.base_of_last(consumer, disk, last)
            }
        }
    }

    /// What `disk` can be compared with, for a consumer that is there at `last`.
    pub(crate) fn base_of_last(&self, consumer: &Name, disk: &ServedDisk, last: &Last) -> Base {
        let book = self.book();
        let found = book.checkpoints.iter().find(|c| c.uuid == last.uuid);
        found.and_then(|base| usable(base, disk)).unwrap_or_else(|| {
            let Last { name, uuid, .. } = last;
            let reason = format!(
                "the last checkpoint of consumer '{consumer}', '{name}' with uuid {uuid}, is gone"
            );
            Base::Unusable(reason)
        })
    }

    /// What a frozen disk can be compared with, if it is the checkpoint `uuid`; `None` if nobody knows
    /// that one.
    pub(crate) fn base_of_frozen(&self, part: &FrozenDisk, uuid: Uuid) -> Option<Base> {
        let book = self.book();
        let mut visible = book.checkpoints.iter().filter(|c| c.pending_of.is_none());
        let found = visible.find(|c| c.uuid == uuid)?;
        let era = *found.eras.get(&part.disk.name)?;
        if book.bases(part).any(|(_, base)| base == era) {
            return usable(found, &part.disk);
        }
        let why = part.disk.why_lost(era);
        let newer = || format!("checkpoint '{}' is not older than this backup", found.name);
        Some(Base::Unusable(why.unwrap_or_else(newer)))
    }
}

fn find_checkpoint(book: &Book, text: &str, disks: &[Arc<ServedDisk>]) -> Result<Since, Failure> {
    let by_uuid = Uuid::try_parse(text).ok();
    // A name may look like an identity, but is only asked for when none is meant.
    let found = book
        .checkpoints
        .iter()
        .find(|checkpoint| by_uuid == Some(checkpoint.uuid))
        .or_else(|| book.checkpoint(text));
    match (found, by_uuid) {
        (
            Some(Checkpoint {
                name,
                pending_of: Some(backup),
                ..
            }),
            _,
        ) => {
            let message =
                format!("checkpoint '{name}' exists only when backup '{backup}' is committed");
            Err(Failure::new("unknown-checkpoint", message))
        }
        (Some(checkpoint), _) => Ok(Since::Checkpoint(checkpoint.clone())),
        // Whoever remembers an identity that is gone gets a full, not a wrong incremental.
        (None, Some(uuid)) => Ok(Since::Gone(format!(
            "no checkpoint with uuid {uuid} is known"
        ))),
        // So does whoever remembers a name that damage may have taken.
        (None, None) if disks.iter().any(|disk| disk.forgotten.is_some()) => {
            Ok(Since::Gone(format!("no checkpoint '{text}' is known")))
        }
        (None, None) => {
            let message = format!("there is no checkpoint '{text}'");
            Err(Failure::new("unknown-checkpoint", message).hint("see: stillpoint checkpoint list"))
        }
    }
}

/// `None` if the disk is not in it.
fn usable(base: &Checkpoint, disk: &ServedDisk) -> Option<Base> {
    let era = *base.eras.get(&disk.name)?;
    Some(match disk.why_lost(era) {
        Some(why) => Base::Unusable(why),
        None => Base::Checkpoint {
            name: base.name.clone(),
            uuid: base.uuid,
            era,
        },
    })
}

/// The words for where a consumer is.
const LAST: [&str; 2] = ["last", "latest"];
