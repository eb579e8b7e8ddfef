//! Instants that are kept, from begin to commit or abort.

use std::io;
use std::path::PathBuf;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use bitmap::Era;
use scratch::Snapshot;
use time::OffsetDateTime;
use uuid::Uuid;

use super::bitmaps::FrozenBitmap;
use super::book::{Backup, Base, BeginRequest, Checkpoint, FrozenDisk, Outcome};
use super::{Counter, Event, Service, next_era, not_recorded, now, refuse_untrusted, restore};
use crate::disk::Freeze;
use crate::failure::Failure;
use crate::files::{Files, SnapshotDir};
use crate::names::Name;
use crate::served::ServedDisk;
use crate::state::{BackupRecord, BitsId, Record, write_bits};

impl Service {
    /// Freezes one instant of some disks, or of all. Asked again for an open backup with the same
    /// arguments, it is that backup.
    pub(crate) async fn begin_backup(
        self: &Arc<Self>,
        request: BeginRequest,
    ) -> Result<Arc<Backup>, Failure> {
        let mut counter = self.instants.lock().await;
        if let Some(open) = self.already_open(&request)? {
            return Ok(open);
        }
        let id = self.choose_id(&request, &mut counter)?;
        if let Some(name) = &request.checkpoint {
            self.check_checkpoint_name(name)?;
        }
        let since = request
            .since
            .as_deref()
            .map(|text| self.find_base(text))
            .transpose()?;
        let disks = self.select(request.disks.as_deref())?;
        refuse_base_of_none(since.as_ref(), &disks)?;
        let mut bitmaps = self.bitmaps_to_freeze(&request, &disks)?;

        let mut prepared = Vec::new();
        for disk in disks {
            let bitmaps = bitmaps.remove(&disk.name).unwrap_or_default();
            prepared.push(prepare(&id, disk, since.as_ref(), bitmaps)?);
        }
        let next = |part: &Prepared| Freeze {
            disk: Arc::clone(&part.disk.disk),
            next: part
                .disk
                .disk
                .tracking()
                .followed_by(part.era, Some(Arc::clone(&part.snapshot))),
        };
        let pause = self.freeze(prepared.iter().map(next).collect()).await?;
        let frozen_at = now();

        let backup = self.prepare_entry(id, request, since, prepared, frozen_at, pause);
        if let Err((disk, error)) = self.record_begin(&backup).await {
            let undo = Record::Aborted { uuid: backup.uuid };
            self.record_where_possible(backup.disks.keys(), &undo).await;
            backup.disks.values().for_each(|part| part.end());
            return Err(not_recorded(&disk, &error));
        }
        self.enter(&backup);
        self.watch(&backup);
        self.announce(Event::Begun {
            id: backup.id.clone(),
        });
        Ok(backup)
    }

    /// Ends a backup as a success: its checkpoint becomes visible.
    pub(crate) async fn commit_backup(&self, id: &Name) -> Result<(), Failure> {
        let _alone = self.instants.lock().await;
        let Some(backup) = self.open_or_ended(id, Outcome::Committed)? else {
            return Ok(());
        };
        for part in backup.disks.values() {
            let snapshot = part.frozen.snapshot();
            if let Err(error) = snapshot.sync().await {
                // It is given up either way; what cannot be recorded is reported below.
                let _ = snapshot.break_with(format!("scratch cannot be synced: {error}"));
                return Err(broken(id, &error.to_string()));
            }
        }
        if let Some(reason) = backup.broken() {
            return Err(broken(id, &reason));
        }
        self.record_commit(&backup).await?;
        self.end(&backup, Outcome::Committed);
        Ok(())
    }

    /// Ends a backup as a failure: as if it had never begun.
    pub(crate) async fn abort_backup(&self, id: &Name) -> Result<(), Failure> {
        let _alone = self.instants.lock().await;
        let Some(backup) = self.open_or_ended(id, Outcome::Aborted)? else {
            return Ok(());
        };
        let record = Record::Aborted { uuid: backup.uuid };
        self.record_where_possible(backup.disks.keys(), &record)
            .await;
        self.end(&backup, Outcome::Aborted);
        Ok(())
    }

    /// One record decides: a backup is committed when any of its disks says so, and scratch is not
    /// touched before.
    async fn record_commit(&self, backup: &Backup) -> Result<(), Failure> {
        let record = Record::Committed { uuid: backup.uuid };
        let mut disks = backup.disks.keys();
        let Some(first) = disks.next() else {
            return Ok(());
        };
        let decided = self.disks[first].record(&record).await;
        decided.map_err(|error| not_recorded(first, &error))?;
        self.record_where_possible(disks, &record).await;
        Ok(())
    }

    /// The open backup with this id.
    pub(crate) fn open_backup(&self, id: &str) -> Result<Arc<Backup>, Failure> {
        self.book().backup(id).cloned().ok_or_else(|| {
            Failure::new("unknown-backup", format!("there is no open backup '{id}'"))
        })
    }

    fn already_open(&self, request: &BeginRequest) -> Result<Option<Arc<Backup>>, Failure> {
        let book = self.book();
        let open = request.id.as_ref().and_then(|id| book.backup(id.as_str()));
        match open {
            None => Ok(None),
            Some(backup) if backup.request == *request => Ok(Some(Arc::clone(backup))),
            Some(backup) => {
                let message = format!(
                    "backup '{}' is open, and was begun with other arguments",
                    backup.id
                );
                Err(Failure::new("backup-exists", message))
            }
        }
    }

    fn choose_id(&self, request: &BeginRequest, counter: &mut Counter) -> Result<Name, Failure> {
        let book = self.book();
        if let Some(id) = &request.id {
            if book.ended.contains_key(id) {
                let message = format!("backup id '{id}' was used before; ids are never reused");
                return Err(Failure::new("backup-exists", message));
            }
            return Ok(id.clone());
        }
        loop {
            counter.0 += 1;
            let id = Name::parse(&format!("b{}", counter.0)).expect("a letter and digits");
            if book.backup(id.as_str()).is_none() && !book.ended.contains_key(&id) {
                return Ok(id);
            }
        }
    }

    fn find_base(&self, text: &str) -> Result<Found, Failure> {
        let book = self.book();
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
            (Some(checkpoint), _) => Ok(Found::Checkpoint(checkpoint.clone())),
            // Whoever remembers an identity that is gone gets a full, not a wrong incremental.
            (None, Some(uuid)) => Ok(Found::Gone(uuid)),
            (None, None) => {
                let message = format!("there is no checkpoint '{text}'");
                Err(Failure::new("unknown-checkpoint", message)
                    .hint("see: stillpoint checkpoint list"))
            }
        }
    }

    /// What will be entered in the book of a backup whose instant has been taken.
    fn prepare_entry(
        &self,
        id: Name,
        request: BeginRequest,
        since: Option<Found>,
        prepared: Vec<Prepared>,
        frozen_at: OffsetDateTime,
        pause: Duration,
    ) -> Arc<Backup> {
        let freeze = |part: Prepared| {
            let name = part.disk.name.clone();
            let is_first = !self
                .book()
                .backups
                .iter()
                .any(|open| open.disks.contains_key(&name));
            (name, Arc::new(part.freeze(&id, is_first)))
        };
        let disks = prepared.into_iter().map(freeze).collect();
        let checkpoint = request
            .checkpoint
            .clone()
            .map(|name| (name, Uuid::new_v4()));
        let since = match since {
            Some(Found::Checkpoint(base)) => Some((base.name, base.uuid)),
            Some(Found::Gone(_)) | None => None,
        };
        let uuid = Uuid::new_v4();
        Arc::new(Backup {
            id,
            uuid,
            request,
            frozen_at,
            pause,
            since,
            checkpoint,
            disks,
            lost: OnceLock::new(),
        })
    }

    /// Makes the beginning of a backup durable on each of its disks: then it is open.
    async fn record_begin(&self, backup: &Backup) -> Result<(), (Name, io::Error)> {
        for (name, part) in &backup.disks {
            let sync_names = || part.dir.as_ref().map_or(Ok(()), SnapshotDir::sync_names);
            let recorded = match sync_names() {
                Ok(()) => {
                    part.disk
                        .record(&Record::Begun(Box::new(backup.record_of(part))))
                        .await
                }
                failed => failed,
            };
            recorded.map_err(|error| (name.clone(), error))?;
        }
        backup
            .disks
            .values()
            .filter_map(|part| part.dir.as_ref())
            .for_each(SnapshotDir::keep);
        Ok(())
    }

    fn enter(&self, backup: &Arc<Backup>) {
        let mut book = self.book_mut();
        if let Some((name, uuid)) = backup.checkpoint.clone() {
            let era = |part: &FrozenDisk| part.frozen.snapshot().eras().frozen_in();
            book.checkpoints.push(Checkpoint {
                name,
                uuid,
                created: backup.frozen_at,
                eras: backup
                    .disks
                    .iter()
                    .map(|(name, part)| (name.clone(), era(part)))
                    .collect(),
                pending_of: Some(backup.id.clone()),
            });
        }
        book.backups.push(Arc::clone(backup));
    }

    /// Tells everyone when the backup breaks.
    pub(super) fn watch(self: &Arc<Self>, backup: &Arc<Backup>) {
        let (service, backup) = (Arc::clone(self), Arc::clone(backup));
        tokio::task::spawn_local(async move {
            let Some(reason) = backup.breaks().await else {
                return;
            };
            tracing::error!(backup = %backup.id, reason, "broken");
            service.announce(Event::Broken {
                id: backup.id.clone(),
                reason: reason.to_owned(),
            });
        });
    }

    /// The open backup, or `None` if it has ended in this very way already.
    fn open_or_ended(&self, id: &Name, wanted: Outcome) -> Result<Option<Arc<Backup>>, Failure> {
        if let Some(open) = self.book().backup(id.as_str()) {
            return Ok(Some(Arc::clone(open)));
        }
        match self.book().ended.get(id) {
            Some(outcome) if *outcome == wanted => Ok(None),
            Some(Outcome::Committed) => Err(Failure::new(
                "already-committed",
                format!("backup '{id}' was committed"),
            )),
            Some(Outcome::Aborted) => Err(Failure::new(
                "already-aborted",
                format!("backup '{id}' was aborted"),
            )),
            None => Err(Failure::new(
                "unknown-backup",
                format!("there is no backup '{id}'"),
            )),
        }
    }

    fn end(&self, backup: &Backup, outcome: Outcome) {
        let mut book = self.book_mut();
        book.backups.retain(|open| open.id != backup.id);
        book.ended.insert(backup.id.clone(), outcome);
        let ours = |c: &Checkpoint| c.pending_of.as_ref() == Some(&backup.id);
        match outcome {
            Outcome::Committed => {
                book.checkpoints
                    .iter_mut()
                    .filter(|c| ours(c))
                    .for_each(|c| c.pending_of = None);
            }
            Outcome::Aborted => book.checkpoints.retain(|checkpoint| !ours(checkpoint)),
        }
        drop(book);
        for part in backup.disks.values() {
            part.end();
        }
        self.announce(Event::Ended {
            id: backup.id.clone(),
            outcome,
        });
    }
}

/// What one disk of a backup begins with, before the instant.
struct Prepared {
    disk: Arc<ServedDisk>,
    era: Era,
    snapshot: Arc<Snapshot<Files>>,
    dir: SnapshotDir,
    base: Base,
    bitmaps: Vec<FrozenBitmap>,
}

/// The checkpoint that someone asked for.
enum Found {
    Checkpoint(Checkpoint),
    Gone(Uuid),
}

fn refuse_base_of_none(since: Option<&Found>, disks: &[Arc<ServedDisk>]) -> Result<(), Failure> {
    let Some(Found::Checkpoint(base)) = since else {
        return Ok(());
    };
    if disks.iter().any(|disk| base.eras.contains_key(&disk.name)) {
        return Ok(());
    }
    let message = format!("checkpoint '{}' is on none of these disks", base.name);
    Err(Failure::new("unknown-checkpoint", message))
}

fn prepare(
    id: &Name,
    disk: Arc<ServedDisk>,
    since: Option<&Found>,
    bitmaps: Vec<FrozenBitmap>,
) -> Result<Prepared, Failure> {
    refuse_untrusted(&disk)?;
    let tracking = disk.disk.tracking();
    let era = next_era(&disk, &tracking)?;
    let path: PathBuf = disk.snapshot_dir(id);
    let (dir, files) = SnapshotDir::create(path.clone(), disk.disk.size()).map_err(|error| {
        let message = format!("cannot make scratch files in '{}': {error}", path.display());
        Failure::new("scratch", message)
    })?;
    // Nobody changes these while an instant is being taken; of the eras, the snapshot keeps its own.
    for (number, bitmap) in bitmaps.iter().enumerate() {
        let bits = BitsId::frozen(bitmap.uuid);
        write_bits(&dir.bitmap(number), bits, &bitmap.dirty.bits).map_err(|error| {
            let message = format!("cannot keep dirty bitmap '{}': {error}", bitmap.name);
            Failure::new("scratch", message)
        })?;
    }
    let snapshot = Arc::new(Snapshot::new(Arc::clone(disk.disk.map()), era, files));
    let base = match since {
        None => Base::None,
        Some(Found::Gone(uuid)) => {
            Base::Unusable(format!("no checkpoint with uuid {uuid} is known"))
        }
        Some(Found::Checkpoint(base)) => match base.eras.get(&disk.name) {
            Some(&era) => match disk.why_lost(era) {
                Some(why) => Base::Unusable(why.to_owned()),
                None => Base::Checkpoint {
                    name: base.name.clone(),
                    era,
                },
            },
            None => Base::Unusable(format!("checkpoint '{}' does not include it", base.name)),
        },
    };
    Ok(Prepared {
        disk,
        era,
        snapshot,
        dir,
        base,
        bitmaps,
    })
}

impl Prepared {
    fn freeze(self, backup: &Name, has_disk_name: bool) -> FrozenDisk {
        let frozen = self.disk.disk.frozen(self.snapshot);
        let dir = Some(self.dir);
        FrozenDisk::new(
            self.disk,
            backup.clone(),
            frozen,
            self.base,
            has_disk_name,
            dir,
            self.bitmaps,
        )
    }
}

impl Backup {
    /// What the journal of one of its disks says of it.
    fn record_of(&self, part: &FrozenDisk) -> BackupRecord {
        BackupRecord {
            id: self.id.clone(),
            uuid: self.uuid,
            frozen_at: restore::nanoseconds_of(self.frozen_at),
            pause_us: self.pause.as_micros() as u64,
            era: part.frozen.snapshot().eras().frozen_in().number(),
            disks: self.disks.values().map(|part| part.disk.uuid).collect(),
            has_disk_name: part.has_disk_name,
            request: self.request.clone().into(),
            since: self.since.clone(),
            base: match &part.base {
                Base::None => None,
                Base::Checkpoint { era, .. } => Some(Ok(era.number())),
                Base::Unusable(reason) => Some(Err(reason.clone())),
            },
            checkpoint: self.checkpoint.clone(),
            bitmaps: part.bitmaps.iter().map(FrozenBitmap::record).collect(),
        }
    }
}

fn broken(id: &Name, reason: &str) -> Failure {
    let message = format!("backup '{id}' is broken: {reason}");
    Failure::new("backup-broken", message).hint("its base is intact: abort it and begin anew")
}
