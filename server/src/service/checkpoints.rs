//! Names for instants.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use uuid::Uuid;

use super::book::{Backup, Checkpoint};
use super::{Service, next_era, not_recorded, now, refuse_untrusted, restore};
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
        let created = now();
        let checkpoint = Checkpoint {
            name,
            uuid: Uuid::new_v4(),
            created,
            eras,
            pending_of: None,
        };
        // After the swap, so that no mark of the time before can carry its era; durable before
        // anyone is told.
        for (disk, era) in &checkpoint.eras {
            let record = Record::Checkpoint(CheckpointRecord {
                name: checkpoint.name.clone(),
                uuid: checkpoint.uuid,
                created: restore::nanoseconds_of(created),
                era: era.number(),
            });
            if let Err(error) = self.disks[disk].record(&record).await {
                let undo = Record::Deleted {
                    uuid: checkpoint.uuid,
                };
                self.record_where_possible(checkpoint.eras.keys(), &undo)
                    .await;
                return Err(not_recorded(disk, &error));
            }
        }
        self.book_mut().checkpoints.push(checkpoint.clone());
        Ok(checkpoint)
    }

    /// Forgets a checkpoint. What changed since any other one stays known.
    pub(crate) async fn delete_checkpoint(
        &self,
        name: &Name,
        disks: Option<Vec<Name>>,
    ) -> Result<(), Failure> {
        let _alone = self.instants.lock().await;
        let disks: BTreeSet<Name> = self
            .select(disks.as_deref())?
            .into_iter()
            .map(|disk| disk.name.clone())
            .collect();
        let checkpoint = self.deletable(name, &disks)?;
        for disk in checkpoint.eras.keys().filter(|disk| disks.contains(*disk)) {
            let record = Record::Deleted {
                uuid: checkpoint.uuid,
            };
            let recorded = self.disks[disk].record(&record).await;
            recorded.map_err(|error| not_recorded(disk, &error))?;
        }
        let mut book = self.book_mut();
        let found = book
            .checkpoints
            .iter_mut()
            .find(|c| c.uuid == checkpoint.uuid);
        if let Some(found) = found {
            found.eras.retain(|disk, _| !disks.contains(disk));
        }
        book.checkpoints
            .retain(|checkpoint| !checkpoint.eras.is_empty());
        Ok(())
    }

    /// The checkpoint of this name, unless a backup uses it on one of `disks`.
    fn deletable(&self, name: &Name, disks: &BTreeSet<Name>) -> Result<Checkpoint, Failure> {
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
        let uses = |backup: &&Arc<Backup>| {
            let since = backup
                .since
                .as_ref()
                .is_some_and(|(_, since)| *since == checkpoint.uuid);
            since && backup.disks.keys().any(|disk| disks.contains(disk))
        };
        match book.backups.iter().find(uses) {
            Some(backup) => Err(in_use(name, &backup.id)),
            None => Ok(checkpoint.clone()),
        }
    }

    pub(super) fn check_checkpoint_name(&self, name: &Name) -> Result<(), Failure> {
        let of_disk = name.as_str().strip_prefix("backup-");
        if of_disk.is_some_and(|disk| self.disks.contains_key(disk)) {
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
