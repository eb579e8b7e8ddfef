//! Names for instants.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use uuid::Uuid;

use super::book::Checkpoint;
use super::{Service, next_era, not_recorded, refuse_untrusted, restore};
use crate::disk::Freeze;
use crate::failure::Failure;
use crate::names::Name;
use crate::state::{CheckpointRecord, Record};

impl Service {
    /// Names this instant of `disks`, or of all of them.
    pub(crate) async fn create_checkpoint(
        &self,
        name: Name,
        disks: Option<Vec<Name>>,
    ) -> Result<Checkpoint, Failure> {
        let _alone = self.instants.lock().await;
        self.check_checkpoint_name(&name)?;
        let disks = self.select(disks.as_deref())?;
        self.check_room(disks.iter().map(|disk| &disk.name))?;
        let mut eras = BTreeMap::new();
        let mut freezes = Vec::new();
        for disk in disks {
            refuse_untrusted(&disk)?;
            let tracking = disk.disk.tracking();
            let era = next_era(&disk, &tracking)?;
            eras.insert(disk.name.clone(), era);
            freezes.push(Freeze {
                disk: Arc::clone(&disk.disk),
                next: tracking.followed_by(era, None),
            });
        }
        self.freeze(freezes).await?;
        let created = (self.clock)();
        let checkpoint = Checkpoint {
            name,
            uuid: Uuid::new_v4(),
            created,
            eras,
            pending_of: None,
            automatic: false,
        };
        self.record_checkpoint(&checkpoint).await?;
        self.book_mut().checkpoints.push(checkpoint.clone());
        Ok(checkpoint)
    }

    /// Each disk says that it is there; then each says that all do. A server that is killed in
    /// between leaves it on all of them, or it goes from all of them at the next start.
    pub(super) async fn record_checkpoint(&self, checkpoint: &Checkpoint) -> Result<(), Failure> {
        let disks = self.identities(checkpoint.eras.keys());
        // After the swap, so that no mark of the time before can carry its era; durable before
        // anyone is told.
        for (disk, era) in &checkpoint.eras {
            let record = Record::Checkpoint(CheckpointRecord {
                name: checkpoint.name.clone(),
                uuid: checkpoint.uuid,
                created: restore::nanoseconds_of(checkpoint.created),
                era: era.number(),
                disks: if disks.len() > 1 {
                    disks.clone()
                } else {
                    Vec::new()
                },
                automatic: false,
            });
            if let Err(error) = self.disks()[disk].record(&record).await {
                let undo = Record::Deleted {
                    uuid: checkpoint.uuid,
                    disks,
                };
                self.record_or_owe(checkpoint.eras.keys(), &undo).await;
                return Err(not_recorded(disk, &error));
            }
        }
        if disks.len() > 1 {
            let complete = Record::Complete {
                uuid: checkpoint.uuid,
            };
            self.record_or_owe(checkpoint.eras.keys(), &complete).await;
        }
        Ok(())
    }

    pub(super) fn identities<'a>(&self, disks: impl Iterator<Item = &'a Name>) -> Vec<Uuid> {
        let served = self.disks();
        disks.map(|disk| served[disk].uuid).collect()
    }

    /// Forgets a checkpoint. What changed since any other one stays known. The last one of a
    /// consumer goes only by `force`: its next backup is then a full one.
    pub(crate) async fn delete_checkpoint(
        &self,
        name: &Name,
        disks: Option<Vec<Name>>,
        force: bool,
    ) -> Result<(), Failure> {
        let _alone = self.instants.lock().await;
        let is_of_all = disks.is_none();
        let disks: BTreeSet<Name> = self
            .select(disks.as_deref())?
            .into_iter()
            .map(|disk| disk.name.clone())
            .collect();
        let checkpoint = self.deletable(name, (&disks, is_of_all), force)?;
        let on = checkpoint.eras.keys().filter(|disk| disks.contains(*disk));
        let on: Vec<Name> = on.cloned().collect();
        // Those that are away hear of it when they are back.
        let away = if is_of_all {
            self.book().away_with(checkpoint.uuid)
        } else {
            Vec::new()
        };
        let mut told = self.identities(on.iter());
        told.extend(&away);
        let record = Record::Deleted {
            uuid: checkpoint.uuid,
            disks: told,
        };
        self.record_decision(on.iter(), &record).await?;
        let mut book = self.book_mut();
        book.remove_checkpoint(checkpoint.uuid, &on);
        book.owe(&record, &away);
        Ok(())
    }

    /// The checkpoint of this name, unless a backup uses it on one of `disks`, or a consumer is there
    /// and nobody uses `force`.
    fn deletable(
        &self,
        name: &Name,
        (disks, is_of_all): (&BTreeSet<Name>, bool),
        force: bool,
    ) -> Result<Checkpoint, Failure> {
        let book = self.book();
        let checkpoint = book.checkpoint(name.as_str()).ok_or_else(|| {
            Failure::new(
                "unknown-checkpoint",
                format!("there is no checkpoint '{name}'"),
            )
        })?;
        if let Some(backup) = &checkpoint.pending_of {
            return Err(in_use(name, backup));
        }
        let on = || checkpoint.eras.keys().filter(|disk| disks.contains(*disk));
        if let Some(backup) = on().find_map(|disk| book.user_of(checkpoint.uuid, disk)) {
            return Err(in_use(name, backup));
        }
        let here = on().find_map(|disk| book.consumer_at(checkpoint.uuid, disk));
        let away = || book.away_consumer_at(checkpoint.uuid);
        match here.or_else(|| is_of_all.then(away).flatten()) {
            Some(consumer) if !force => {
                let message =
                    format!("checkpoint '{name}' is the last one of consumer '{consumer}'");
                let hint = "with --force it goes, and the consumer's next backup is a full one";
                Err(Failure::new("checkpoint-in-use", message).hint(hint))
            }
            _ => Ok(checkpoint.clone()),
        }
    }

    /// Refuses another checkpoint where a disk has too many.
    pub(super) fn check_room<'a>(
        &self,
        mut disks: impl Iterator<Item = &'a Name>,
    ) -> Result<(), Failure> {
        let book = self.book();
        let count = |disk: &Name| {
            book.checkpoints
                .iter()
                .filter(|c| c.eras.contains_key(disk))
                .count()
        };
        let Some(full) = disks.find(|disk| count(disk) >= CHECKPOINTS_MAX) else {
            return Ok(());
        };
        let message =
            format!("disk '{full}' has {CHECKPOINTS_MAX} checkpoints, and may have no more");
        let hint = "delete those that are no base any more: stillpoint checkpoint delete NAME";
        Err(Failure::new("too-many-checkpoints", message).hint(hint))
    }

    pub(super) fn check_checkpoint_name(&self, name: &Name) -> Result<(), Failure> {
        let of_disk = name.as_str().strip_prefix("backup-");
        if of_disk.is_some_and(|disk| self.disks().contains_key(disk)) {
            let message = format!("'{name}' is the name that a disk's backup bitmap goes by");
            return Err(Failure::new("invalid-name", message));
        }
        match self.book().checkpoint(name.as_str()) {
            None => Ok(()),
            Some(Checkpoint {
                pending_of: Some(backup),
                ..
            }) => {
                let message = format!("checkpoint '{name}' is being made by backup '{backup}'");
                Err(Failure::new("checkpoint-exists", message))
            }
            Some(_) => {
                let failure =
                    Failure::new("checkpoint-exists", format!("checkpoint '{name}' exists"));
                Err(failure.hint("delete it first, or choose another name"))
            }
        }
    }
}

fn in_use(name: &Name, backup: &Name) -> Failure {
    let message = format!("checkpoint '{name}' is in use by backup '{backup}'");
    Failure::new("checkpoint-in-use", message).hint("commit or abort the backup first")
}

/// Hourly ones of almost two years. Each is a record of 512 bytes in the journal, which is read at a
/// start, and is listed with how much has changed since.
const CHECKPOINTS_MAX: usize = 16_384;
