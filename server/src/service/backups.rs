//! Instants that are kept, from begin to commit or abort.

use std::collections::BTreeMap;
use std::io;
use std::path::PathBuf;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use bitmap::Era;
use scratch::{Budget, Snapshot};
use time::OffsetDateTime;
use uuid::Uuid;

use super::bases::Since;
use super::bitmaps::{FrozenBitmap, inconsistent};
use super::book::{Backup, Base, BaseState, BeginRequest, Checkpoint, FrozenDisk, Outcome};
use super::expiry::expiry;
use super::{Counter, Event, Service, blocking, next_era, not_recorded, refuse_untrusted, restore};
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
        self.check_consumer(&request)?;
        let now = (self.clock)();
        let checkpoint = self.checkpoint_name(&request, now)?;
        let expires_at = expiry(&request, now)?;
        let disks = self.select(request.disks.as_deref())?;
        if checkpoint.is_some() {
            self.check_room(disks.iter().map(|disk| &disk.name))?;
        }
        let since = self.find_base(&request, &disks)?;
        let mut bitmaps = self.bitmaps_to_freeze(&request, &disks)?;

        let budget = self.space.new_budget(request.scratch_limit)?;
        let mut prepared = Vec::new();
        for disk in disks {
            let base = self.base_of(&since, &disk);
            let bitmaps = bitmaps.remove(&disk.name).unwrap_or_default();
            prepared.push(self.prepare(&id, disk, base, bitmaps, &budget).await?);
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
        if let Err(lost) = prepared.iter().try_for_each(Prepared::still_known) {
            for part in &prepared {
                part.disk.disk.forget(&part.snapshot);
            }
            return Err(lost);
        }
        let entry = Entry {
            id,
            request,
            checkpoint,
            expires_at,
            frozen_at: (self.clock)(),
            pause,
            budget,
        };
        let backup = self.prepare_entry(entry, &since, prepared);
        if let Err((disk, error)) = self.record_begin(&backup).await {
            let undo = Record::Aborted { uuid: backup.uuid };
            self.record_or_owe(backup.disks.keys(), &undo).await;
            backup.disks.values().for_each(|part| part.end());
            release(&backup).await;
            return Err(not_recorded(&disk, &error));
        }
        self.enter(&backup);
        self.watch(&backup);
        self.announce(Event::Begun {
            id: backup.id.clone(),
        });
        Ok(backup)
    }

    /// Ends a backup as a success: its checkpoint becomes visible, and its consumer moves there. One
    /// record does all of it, before scratch is touched.
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
                return Err(broken(&backup, &error.to_string()));
            }
        }
        if let Some(reason) = backup.broken() {
            return Err(broken(&backup, &reason));
        }
        let record = Record::Committed { uuid: backup.uuid };
        self.record_decision(backup.disks.keys(), &record).await?;
        self.end(&backup, Outcome::Committed).await;
        self.drop_left_behind().await;
        Ok(())
    }

    /// Ends a backup as a failure: as if it had never begun. It is recorded by the disk that would
    /// have decided a commit, so that one that failed cannot come true afterwards.
    pub(crate) async fn abort_backup(&self, id: &Name) -> Result<(), Failure> {
        let _alone = self.instants.lock().await;
        let Some(backup) = self.open_or_ended(id, Outcome::Aborted)? else {
            return Ok(());
        };
        let record = Record::Aborted { uuid: backup.uuid };
        self.record_decision(backup.disks.keys(), &record).await?;
        self.end(&backup, Outcome::Aborted).await;
        self.drop_left_behind().await;
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
        if book.backups.len() >= OPEN_BACKUPS_MAX {
            let message = format!("{OPEN_BACKUPS_MAX} backups are open, and no more may be");
            let hint = "commit or abort those that are not in use: stillpoint backup list";
            return Err(Failure::new("too-many-backups", message).hint(hint));
        }
        if let Some(id) = &request.id {
            if book.ended.get(id).is_some() {
                let message = format!("backup id '{id}' was used before; ids are never reused");
                return Err(Failure::new("backup-exists", message));
            }
            return Ok(id.clone());
        }
        loop {
            counter.0 += 1;
            let id = Name::parse(&format!("b{}", counter.0)).expect("a letter and digits");
            if book.backup(id.as_str()).is_none() && book.ended.get(&id).is_none() {
                return Ok(id);
            }
        }
    }

    /// What will be entered in the book of a backup whose instant has been taken.
    fn prepare_entry(&self, entry: Entry, since: &Since, prepared: Vec<Prepared>) -> Arc<Backup> {
        let Entry {
            id,
            request,
            checkpoint,
            expires_at,
            frozen_at,
            pause,
            budget,
        } = entry;
        let freeze = |part: Prepared| {
            let name = part.disk.name.clone();
            let is_first = !self
                .book()
                .backups
                .iter()
                .any(|open| open.disks.contains_key(&name));
            (name, Arc::new(part.freeze(&id, is_first)))
        };
        let disks: BTreeMap<Name, Arc<FrozenDisk>> = prepared.into_iter().map(freeze).collect();
        let since = match since {
            Since::Checkpoint(base) => Some((base.name.clone(), base.uuid)),
            Since::Last { .. } => common_base(disks.values()),
            Since::Gone(_) | Since::Nothing => None,
        };
        Arc::new(Backup {
            id,
            uuid: Uuid::new_v4(),
            request,
            frozen_at,
            pause,
            since,
            checkpoint: checkpoint.map(|name| (name, Uuid::new_v4())),
            expires_at,
            budget,
            disks,
            lost: OnceLock::new(),
        })
    }

    /// Makes the beginning of a backup durable on each of its disks: then it is open.
    async fn record_begin(&self, backup: &Backup) -> Result<(), (Name, io::Error)> {
        for (name, part) in &backup.disks {
            let named = match &part.dir {
                Some(dir) => dir.sync_names().await,
                None => Ok(()),
            };
            let recorded = match named {
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
        book.checkpoints.extend(backup.pending_checkpoint());
        book.backups.push(Arc::clone(backup));
    }

    /// Tells everyone when the backup comes near its limits, and when it breaks.
    pub(super) fn watch(self: &Arc<Self>, backup: &Arc<Backup>) {
        let (service, backup) = (Arc::clone(self), Arc::clone(backup));
        tokio::task::spawn_local(async move {
            let Some(reason) = service.watermarks_until_broken(&backup).await else {
                return;
            };
            tracing::error!(backup = %backup.id, reason, "broken");
            service.announce(Event::Broken {
                id: backup.id.clone(),
                reason: reason.to_owned(),
            });
            release(&backup).await;
        });
    }

    async fn watermarks_until_broken<'a>(&self, backup: &'a Backup) -> Option<&'a str> {
        let broken = backup.breaks();
        tokio::pin!(broken);
        // Those that an earlier server has told of are not told of again.
        let mut known = backup.budget.level();
        loop {
            let reached = tokio::select! {
                biased;
                reached = backup.budget.rises(known) => reached,
                reason = &mut broken => return reason,
            };
            known += reached.len();
            for nearest in reached {
                let id = backup.id.clone();
                self.announce(Event::ScratchThreshold { id, nearest });
            }
        }
    }

    /// The open backup, or `None` if it has ended in this very way already.
    fn open_or_ended(&self, id: &Name, wanted: Outcome) -> Result<Option<Arc<Backup>>, Failure> {
        if let Some(open) = self.book().backup(id.as_str()) {
            return Ok(Some(Arc::clone(open)));
        }
        match self.book().ended.get(id) {
            Some(outcome) if outcome == wanted => Ok(None),
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

    /// Ends the open backup with this identity, if there is one; that is recorded already.
    pub(super) async fn end_by_uuid(&self, uuid: Uuid, outcome: Outcome) {
        let open = self.book().backups.clone();
        if let Some(backup) = open.iter().find(|backup| backup.uuid == uuid) {
            self.end(backup, outcome).await;
        }
    }

    async fn end(&self, backup: &Backup, outcome: Outcome) {
        self.enter_end(backup, outcome);
        for part in backup.disks.values() {
            part.end();
        }
        release(backup).await;
        self.announce(Event::Ended {
            id: backup.id.clone(),
            outcome,
        });
    }

    fn enter_end(&self, backup: &Backup, outcome: Outcome) {
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
                Self::move_consumer(&mut book, backup);
            }
            Outcome::Aborted => book.checkpoints.retain(|checkpoint| !ours(checkpoint)),
        }
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

/// What is known of a backup besides its disks, when its instant has been taken.
struct Entry {
    id: Name,
    request: BeginRequest,
    checkpoint: Option<Name>,
    expires_at: Option<OffsetDateTime>,
    frozen_at: OffsetDateTime,
    pause: Duration,
    budget: Arc<Budget>,
}

/// The checkpoint that all those disks begin from that have one, if it is one.
fn common_base<'a>(parts: impl Iterator<Item = &'a Arc<FrozenDisk>>) -> Option<(Name, Uuid)> {
    let mut bases = parts.filter_map(|part| part.base.checkpoint());
    let first = bases.next()?;
    bases.all(|base| base == first).then_some(first)
}

impl Service {
    async fn prepare(
        &self,
        id: &Name,
        disk: Arc<ServedDisk>,
        base: Base,
        bitmaps: Vec<FrozenBitmap>,
        budget: &Arc<Budget>,
    ) -> Result<Prepared, Failure> {
        refuse_untrusted(&disk)?;
        let tracking = disk.disk.tracking();
        let era = next_era(&disk, &tracking)?;
        let path: PathBuf = disk.snapshot_dir(id);
        let failed = |error: io::Error| {
            let message = format!("cannot make scratch files in '{}': {error}", path.display());
            Failure::new("scratch", message)
        };
        let (size, engine) = (disk.disk.size(), disk.engine);
        let place = path.clone();
        let made = blocking(move || SnapshotDir::create(place, size, engine)).await?;
        let (dir, files) = made.map_err(failed)?;
        let terms = self.space.terms(budget, dir.parent()).map_err(failed)?;
        self.space
            .refuse_if_full(&terms.allowance.room, dir.parent())?;
        // Nobody changes these while an instant is being taken; of the eras, the snapshot keeps its
        // own.
        for (number, bitmap) in bitmaps.iter().enumerate() {
            let (path, id) = (dir.bitmap(number), BitsId::frozen(bitmap.uuid));
            let bits = Arc::clone(&bitmap.dirty.bits);
            let written = blocking(move || write_bits(&path, id, &bits)).await?;
            written.map_err(|error| {
                let message = format!("cannot keep dirty bitmap '{}': {error}", bitmap.name);
                Failure::new("scratch", message)
            })?;
        }
        let live = Arc::clone(disk.disk.map());
        let nonce = Uuid::new_v4().as_u64_pair().1;
        let snapshot = Snapshot::new(live, era, files, terms, nonce).map_err(failed)?;
        Ok(Prepared {
            disk,
            era,
            snapshot: Arc::new(snapshot),
            dir,
            base,
            bitmaps,
        })
    }
}

impl Prepared {
    /// Refuses where a write went untracked before the instant of which a bitmap should tell. A base is
    /// asked by [`freeze`](Self::freeze): without one there is still a full backup.
    fn still_known(&self) -> Result<(), Failure> {
        let is_lost = |bitmap: &&FrozenBitmap| {
            let since = bitmap.dirty.since;
            since.is_some_and(|era| self.disk.why_lost(era).is_some())
        };
        let lost = self.bitmaps.iter().find(is_lost);
        lost.map_or(Ok(()), |bitmap| Err(inconsistent(&bitmap.name)))
    }

    /// After the instant: what went untracked before it is known by now.
    fn freeze(self, backup: &Name, has_disk_name: bool) -> FrozenDisk {
        let why_lost = match &self.base {
            Base::Checkpoint { era, .. } => self.disk.why_lost(*era),
            Base::None | Base::Unusable(_) => None,
        };
        let base = why_lost.map_or(self.base, Base::Unusable);
        let frozen = self.disk.disk.frozen(self.snapshot);
        let dir = Some(self.dir);
        FrozenDisk::new(
            self.disk,
            backup.clone(),
            frozen,
            base,
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
            since: part.base.checkpoint().or_else(|| self.since.clone()),
            base: match &part.base {
                Base::None => None,
                Base::Checkpoint { era, .. } => Some(Ok(era.number())),
                Base::Unusable(reason) => Some(Err(reason.clone())),
            },
            checkpoint: self.checkpoint.clone(),
            bitmaps: part.bitmaps.iter().map(FrozenBitmap::record).collect(),
            expires_at: self.expires_at.map(restore::nanoseconds_of),
            scratch_limit: self.budget.own().limit(),
            size: Some(part.frozen.size()),
        }
    }
}

/// Gives back the space of a backup that is broken or has ended.
async fn release(backup: &Backup) {
    for part in backup.disks.values() {
        part.release().await;
    }
}

fn broken(backup: &Backup, reason: &str) -> Failure {
    let message = format!("backup '{}' is broken: {reason}", backup.id);
    let hint = match backup.base_state() {
        BaseState::Intact => "its base is intact: abort it and begin anew",
        BaseState::Lost => {
            "abort it and begin anew: its base is of no use any more either, and the next backup is a full one"
        }
        BaseState::None => "abort it and begin anew",
    };
    Failure::new("backup-broken", message).hint(hint)
}

/// Each takes three descriptors for each disk, of the 1,024 that a process usually may have, and a
/// copy of every granule that is overwritten while it is open.
const OPEN_BACKUPS_MAX: usize = 64;
