//! What each command does, and what it answers.

use std::collections::BTreeMap;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use bitmap::Era;
use serde::Serialize;
use serde_json::value::{RawValue, to_raw_value};

use super::Control;
use super::answers::{
    BackupAnswer, BackupDisk, BackupState, ChangesAnswer, CheckpointAnswer, CheckpointDisk,
    CommandName, ConsumerAnswer, ConsumerDisk, Difference, DiskAnswer, ExportUse, ImportAnswer,
    Mode, ResizeAnswer, Sockets, Status, path_text, time_text, uris,
};
use super::bitmaps;
use super::jobs::{JobAnswer, TargetAnswer};
use super::messages::Version;
use super::request::{COMMANDS, Command};
use crate::export::{Export, difference_name, frozen_name};
use crate::failure::Failure;
use crate::names::Name;
use crate::push::Job;
use crate::served::ServedDisk;
use crate::service::{Backup, Base, Checkpoint, FrozenDisk, Last, Outcome, Service, Usage};

/// Carries out `command`, from begin to end.
pub(crate) async fn execute(
    control: Rc<Control>,
    command: Command,
) -> Result<Box<RawValue>, Failure> {
    let service = &control.service;
    match command {
        Command::Version => answer(&Version::current()),
        Command::Commands => answer(
            &COMMANDS
                .iter()
                .map(|name| CommandName { name })
                .collect::<Vec<_>>(),
        ),
        Command::Status => answer(&control.status().await?),
        Command::Disks => answer(&control.disks().await?),
        Command::AddDisk(spec) => {
            let disk = service.add_disk(*spec, &control.opening).await?;
            answer(&control.disk(&disk, &uncertain(service).await?))
        }
        Command::RemoveDisk { disk, force } => {
            control.refuse_pushed(&disk)?;
            service.remove_disk(&disk, force).await?;
            nothing()
        }
        Command::ResizeDisk { disk, size } => {
            let resized = service.resize_disk(&disk, size).await?;
            answer(&ResizeAnswer::new(disk, resized))
        }
        Command::SettleDisk { disk } => {
            service.disk(&disk)?.settle_base()?;
            nothing()
        }
        Command::Checkpoints { disk } => answer(&checkpoints(service, disk).await?),
        Command::Backups { id } => answer(&control.backups(id.as_ref())?),
        Command::CreateCheckpoint { name, disks } => {
            let checkpoint = service.create_checkpoint(name, disks).await?;
            answer(&describe_checkpoint(Arc::clone(service), checkpoint, None).await?)
        }
        Command::DeleteCheckpoint { name, disks, force } => {
            service.delete_checkpoint(&name, disks, force).await?;
            nothing()
        }
        Command::ImportCheckpoint { import, name } => {
            let (checkpoint, imported) = service.import_checkpoint(&import, name).await?;
            let name = checkpoint.name.to_string();
            answer(&ImportAnswer::new(import.disk, name, imported))
        }
        Command::ImportBitmap { import, bitmap } => {
            let name = bitmap.name.clone();
            let imported = service.import_bitmap(&import, bitmap).await?;
            answer(&ImportAnswer::new(import.disk, name, imported))
        }
        Command::Changes { disk, of, offset } => {
            let changes = service.changes(&disk, of, offset).await?;
            answer(&ChangesAnswer::new(disk, changes))
        }
        Command::Begin(request) => {
            let backup = service.begin_backup(request).await?;
            answer(&control.backup(&backup))
        }
        Command::Commit { id } => {
            service.commit_backup(&id).await?;
            nothing()
        }
        Command::Abort { id } => {
            service.abort_backup(&id).await?;
            nothing()
        }
        Command::Bitmaps(actions) => {
            service.change_bitmaps(actions).await?;
            nothing()
        }
        Command::Nodes => answer(&bitmaps::nodes(Arc::clone(service)).await?),
        Command::Consumers => answer(&consumers(service).await?),
        Command::ForgetConsumer { name } => {
            service.forget_consumer(&name).await?;
            nothing()
        }
        Command::PushTarget { to } => answer(&TargetAnswer::new(control.jobs.look(to).await?)),
        Command::PushPoints { to } => answer(&control.jobs.points(to).await?),
        Command::Push(request) => answer(&JobAnswer::new(&*control.jobs.start(request)?)),
        Command::Jobs => {
            let jobs = control.jobs.all();
            let jobs = jobs.iter().map(|job| JobAnswer::new(job));
            answer(&jobs.collect::<Vec<_>>())
        }
        Command::CancelJob { id, keep } => {
            control.jobs.cancel(&id, keep)?;
            nothing()
        }
        Command::DismissJob { id } => {
            control.jobs.dismiss(&id)?;
            nothing()
        }
        // What these do, they do to the conversation.
        Command::Capabilities | Command::Quit => nothing(),
    }
}

impl Control {
    async fn status(&self) -> Result<Status, Failure> {
        let backups = self.all_backups();
        let texts = |endpoints: &[crate::listeners::Endpoint]| {
            let texts = endpoints
                .iter()
                .map(|endpoint| endpoint.address.to_string());
            texts.collect()
        };
        Ok(Status {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            pid: std::process::id(),
            run_dir: path_text(&self.run_dir),
            io_engine: self.opening.engine.name().to_owned(),
            disks: self.disks().await?,
            checkpoints: self.service.book().checkpoints.len(),
            scratch_used_bytes: self.service.scratch().used(),
            scratch_limit_bytes: self.service.scratch().limit(),
            backups,
            longest_guest_stall_us: self.service.longest_pause().as_micros() as u64,
            sockets: Sockets {
                live: texts(&self.live_addresses),
                backup: texts(&self.backup_addresses),
                control: path_text(&self.run_dir.join(super::SOCKET)),
            },
        })
    }

    async fn disks(&self) -> Result<Vec<DiskAnswer>, Failure> {
        let uncertain = uncertain(&self.service).await?;
        let disks = self.service.disks();
        let describe = |served: &Arc<ServedDisk>| self.disk(served, &uncertain);
        Ok(disks.values().map(describe).collect())
    }

    fn disk(&self, served: &ServedDisk, uncertain: &BTreeMap<Name, u64>) -> DiskAnswer {
        DiskAnswer {
            disk: served.name.clone(),
            uuid: served.uuid,
            path: path_text(&served.path),
            format: served.disk.image().format().to_owned(),
            size: served.disk.size(),
            granularity: served.disk.map().granularity().bytes(),
            read_only: served.read_only,
            durability: served.durability.name().to_owned(),
            cache: served.cache.name().to_owned(),
            tracking_reason: served.untracked(),
            tracking: served.untracked().map_or("ok", |_| "lost").to_owned(),
            uncertain_bytes: uncertain.get(&served.name).copied().unwrap_or(0),
            active_bytes: served.disk.active_bytes(),
            unsettled_bytes: served.disk.unsettled_bytes(),
            live_export: served.name.to_string(),
            live_uris: uris(&self.live_addresses, served.name.as_str()),
        }
    }

    /// Refuses to let a disk go that is being copied.
    fn refuse_pushed(&self, disk: &Name) -> Result<(), Failure> {
        let book = self.service.book();
        let copies = |job: &&Arc<Job>| {
            let backup = book.backup(job.id.as_str());
            !job.is_over() && backup.is_some_and(|backup| backup.disks.contains_key(disk))
        };
        let jobs = self.jobs.all();
        let Some(job) = jobs.iter().find(copies) else {
            return Ok(());
        };
        let id = &job.id;
        let message = format!("disk '{disk}' is being copied by job '{id}'");
        Err(Failure::new("disk-in-use", message).hint("wait until it is over, or cancel it"))
    }

    fn backups(&self, id: Option<&Name>) -> Result<Vec<BackupAnswer>, Failure> {
        let Some(id) = id else {
            return Ok(self.all_backups());
        };
        let backup = match self.service.open_backup(id.as_str()) {
            Ok(backup) => backup,
            Err(unknown) => return Err(self.ended(id).unwrap_or(unknown)),
        };
        Ok(vec![self.backup_in_use(&backup)])
    }

    fn all_backups(&self) -> Vec<BackupAnswer> {
        let open = self.service.book().backups.clone();
        open.iter()
            .map(|backup| self.backup_in_use(backup))
            .collect()
    }

    fn ended(&self, id: &Name) -> Option<Failure> {
        let how = match self.service.book().ended.get(id)? {
            Outcome::Committed => "committed",
            Outcome::Aborted => "aborted",
        };
        let message = format!("backup '{id}' is not open any more: it was {how}");
        Some(Failure::new("unknown-backup", message))
    }

    fn backup_in_use(&self, backup: &Backup) -> BackupAnswer {
        let mut answer = self.backup(backup);
        answer.guest_stall_us = Some(backup.pause.as_micros() as u64);
        answer.scratch_used_bytes = Some(backup.budget.own().used());
        answer.scratch_limit_bytes = backup.budget.own().limit();
        for (answer, part) in answer.disks.iter_mut().zip(backup.disks.values()) {
            answer.exports = Some(export_uses(part));
            answer.scratch_used_bytes = Some(part.frozen.snapshot().scratch_used());
            answer.copying_writes = Some(part.frozen.snapshot().copying_writes());
        }
        answer
    }

    fn backup(&self, backup: &Backup) -> BackupAnswer {
        let broken_reason = backup.broken();
        let state = match broken_reason {
            None => BackupState::Open,
            Some(_) => BackupState::Broken,
        };
        let parts = backup.disks.values();
        BackupAnswer {
            id: backup.id.clone(),
            uuid: backup.uuid,
            state,
            broken_reason,
            frozen_at: time_text(backup.frozen_at),
            since: backup.since.as_ref().map(|(name, _)| name.clone()),
            since_uuid: backup.since.as_ref().map(|(_, uuid)| *uuid),
            checkpoint: backup.checkpoint.as_ref().map(|(name, _)| name.clone()),
            checkpoint_uuid: backup.checkpoint.as_ref().map(|(_, uuid)| *uuid),
            consumer: backup.request.consumer.clone(),
            expires_at: backup.expires_at.map(time_text),
            guest_stall_us: None,
            scratch_used_bytes: None,
            scratch_limit_bytes: None,
            disks: parts.map(|part| self.backup_disk(part)).collect(),
        }
    }

    fn backup_disk(&self, part: &Arc<FrozenDisk>) -> BackupDisk {
        let (mode, reason) = match &part.base {
            Base::Checkpoint { .. } => (Mode::Incremental, None),
            Base::Unusable(reason) => (Mode::Full, Some(reason.clone())),
            Base::None => (Mode::Full, None),
        };
        let difference = base_difference(part).map(|export| Difference {
            uris: uris(&self.backup_addresses, &export),
            export,
        });
        let export = frozen_name(part);
        let (since, since_uuid) = part.base.checkpoint().unzip();
        BackupDisk {
            disk: part.disk.name.clone(),
            disk_uuid: part.disk.uuid,
            size: part.frozen.size(),
            mode,
            since,
            since_uuid,
            reason,
            changed_bytes: part.changed_bytes,
            uncertain_bytes: part.uncertain_bytes,
            uris: uris(&self.backup_addresses, &export),
            export,
            contexts: Export::Frozen(Arc::clone(part)).contexts(&self.service),
            difference,
            exports: None,
            scratch_used_bytes: None,
            copying_writes: None,
        }
    }
}

/// The name of the export that shows the difference from the checkpoint that was asked for.
fn base_difference(part: &FrozenDisk) -> Option<String> {
    match &part.base {
        Base::Checkpoint { name, .. } => Some(difference_name(part, name.as_str())),
        Base::None | Base::Unusable(_) => None,
    }
}

fn export_uses(part: &FrozenDisk) -> Vec<ExportUse> {
    let describe = |export, usage: &Usage| ExportUse {
        export,
        bytes_read: usage.bytes_read.load(Ordering::Relaxed),
        clients: usage.clients.load(Ordering::Relaxed),
    };
    let whole = describe(frozen_name(part), &part.whole);
    let differences = part.differences.all().into_iter();
    let differences =
        differences.map(|(name, usage)| describe(difference_name(part, &name), &usage));
    std::iter::once(whole).chain(differences).collect()
}

async fn checkpoints(
    service: &Arc<Service>,
    disk: Option<Name>,
) -> Result<Vec<CheckpointAnswer>, Failure> {
    if let Some(disk) = &disk {
        service.disk(disk)?;
    }
    let mut known = service.book().checkpoints.clone();
    known.retain(|checkpoint| {
        disk.as_ref()
            .is_none_or(|disk| checkpoint.eras.contains_key(disk))
    });
    let mut answers = Vec::new();
    for checkpoint in known {
        answers.push(describe_checkpoint(Arc::clone(service), checkpoint, disk.clone()).await?);
    }
    Ok(answers)
}

/// Describes `checkpoint` for `only` one disk or for all of its disks.
///
/// Counting what changed on a large disk takes a while, which the other clients do not feel.
async fn describe_checkpoint(
    service: Arc<Service>,
    checkpoint: Checkpoint,
    only: Option<Name>,
) -> Result<CheckpointAnswer, Failure> {
    let count = move || {
        let served = service.disks();
        let eras = checkpoint.eras.iter();
        let wanted = eras.filter(|(name, _)| only.as_ref().is_none_or(|only| only == *name));
        let disks = wanted.filter_map(|(name, era)| {
            // It may have been removed since.
            let disk = served.get(name)?;
            let (dirty_bytes, uncertain_bytes) = disk.dirty_bytes(*era);
            Some(CheckpointDisk {
                disk: name.clone(),
                disk_uuid: disk.uuid,
                dirty_bytes,
                uncertain_bytes,
                reason: disk.why_lost(*era),
            })
        });
        CheckpointAnswer {
            disks: disks.collect(),
            name: checkpoint.name,
            uuid: checkpoint.uuid,
            created_at: time_text(checkpoint.created),
            pending: checkpoint.pending_of.is_some(),
            backup: checkpoint.pending_of,
        }
    };
    tokio::task::spawn_blocking(count)
        .await
        .map_err(|error| Failure::new("internal", format!("counting what changed failed: {error}")))
}

/// Where all consumers are. Counting takes a while, as for checkpoints.
async fn consumers(service: &Arc<Service>) -> Result<Vec<ConsumerAnswer>, Failure> {
    let known = service.book().consumers.clone();
    let service = Arc::clone(service);
    let describe = move || {
        let consumer = |(name, lasts): (Name, BTreeMap<Name, Last>)| {
            let disk = |(disk, last): (&Name, &Last)| describe_last(&service, &name, disk, last);
            let disks = lasts.iter().filter_map(disk).collect();
            ConsumerAnswer { name, disks }
        };
        known.into_iter().map(consumer).collect()
    };
    tokio::task::spawn_blocking(describe)
        .await
        .map_err(|error| Failure::new("internal", format!("counting what changed failed: {error}")))
}

fn describe_last(
    service: &Service,
    consumer: &Name,
    disk: &Name,
    last: &Last,
) -> Option<ConsumerDisk> {
    let served = service.disks().get(disk).cloned()?;
    let (reason, (dirty_bytes, uncertain_bytes)) =
        match service.base_of_last(consumer, &served, last) {
            Base::Checkpoint { era, .. } => (None, served.dirty_bytes(era)),
            Base::Unusable(reason) => (Some(reason), (served.disk.size(), served.disk.size())),
            Base::None => return None,
        };
    Some(ConsumerDisk {
        disk: disk.clone(),
        disk_uuid: served.uuid,
        checkpoint: last.name.clone(),
        checkpoint_uuid: last.uuid,
        created_at: time_text(last.created),
        reason,
        dirty_bytes,
        uncertain_bytes,
    })
}

/// What is only presumed to have changed since the oldest checkpoint of each disk that has one.
async fn uncertain(service: &Service) -> Result<BTreeMap<Name, u64>, Failure> {
    let oldest: Vec<_> = {
        let (disks, book) = (service.disks(), service.book());
        let era = |disk: &Arc<ServedDisk>| Some((Arc::clone(disk), book.oldest_era(&disk.name)?));
        disks.values().filter_map(era).collect()
    };
    let count = move || {
        let bytes = |(disk, era): (Arc<ServedDisk>, Era)| {
            let (_, uncertain) = disk.dirty_bytes(era);
            (disk.name.clone(), uncertain)
        };
        oldest.into_iter().map(bytes).collect()
    };
    tokio::task::spawn_blocking(count)
        .await
        .map_err(|error| Failure::new("internal", format!("counting what changed failed: {error}")))
}

fn nothing() -> Result<Box<RawValue>, Failure> {
    #[derive(Serialize)]
    struct Nothing {}
    answer(&Nothing {})
}

fn answer(value: &impl Serialize) -> Result<Box<RawValue>, Failure> {
    to_raw_value(value)
        .map_err(|error| Failure::new("internal", format!("the answer is no JSON: {error}")))
}
