//! What a job does on its own thread: plan, copy, verify, publish.

use std::rc::Rc;
use std::sync::Arc;

use tokio::task::LocalSet;

use super::PushRequest;
use super::base::{Coming, coming};
use super::job::{Job, Wish};
use crate::archive::{
    self, Archive, ArchiveError, DiskPlan, Draft, Identity, Interrupted, Leftover, Mode, Origin,
    Plan, Point,
};
use crate::copy::{self, CopyError, FrozenSource, SourceError, survey};
use crate::failure::Failure;
use crate::nbd::{BACKUP_NICE, step_back};
use crate::service::{Backup, FrozenDisk, Service};

/// All that it needs.
pub(super) struct Work {
    pub(super) job: Arc<Job>,
    pub(super) service: Arc<Service>,
    pub(super) place: String,
    pub(super) request: PushRequest,
    pub(super) backup: Arc<Backup>,
    pub(super) archive: Archive,
}

/// How it ended.
pub(super) enum End {
    /// The point is complete.
    Published(Point),
    /// It is not, and another job can go on with what there is.
    Kept(Failure),
    /// It is not, and nothing of it is left.
    Lost(Failure),
}

/// Why a draft is not complete.
enum Failed {
    /// Somebody wants us to end.
    Stopped,
    Source(String, SourceError),
    Archive(ArchiveError),
    Other(Failure),
}

impl Work {
    /// Does all of it, and returns when nothing of it goes on.
    pub(super) fn perform(self) -> End {
        step_back(BACKUP_NICE);
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .max_blocking_threads(BLOCKING_THREADS_MAX)
            .build();
        let runtime = match runtime {
            Ok(runtime) => runtime,
            Err(error) => {
                let message = format!("cannot start a thread to copy: {error}");
                return End::Kept(Failure::new("system", message));
            }
        };
        let planning = async {
            tokio::select! {
                biased;
                () = self.job.is_to_end() => Err(Failed::Stopped),
                planned = self.draft() => planned,
            }
        };
        let mut draft = match LocalSet::new().block_on(&runtime, planning) {
            Ok(draft) => draft,
            Err(failed) => return self.end(failed, None),
        };
        self.job.plan(&draft);
        let follower = Arc::clone(&self.job) as Arc<dyn archive::Progress>;
        draft.follow(&follower);
        let copied = LocalSet::new().block_on(&runtime, self.copy(&draft));
        // What was being stored when somebody wanted us to end has been stored when this returns.
        drop(runtime);
        if let Err(failed) = copied {
            return self.end(failed, Some(draft));
        }
        match draft.finish(&*self.job) {
            Ok(point) => End::Published(point),
            Err(error) => self.end(Failed::Archive(error), None),
        }
    }

    /// What there is to go on with, or else a new one.
    async fn draft(&self) -> Result<Draft, Failed> {
        match self.archive.leftover()? {
            Leftover::Interrupted(interrupted) if self.is_ours(interrupted.plan()) => {
                let backup = &self.backup;
                let note = format!("going on with backup {} of {}", backup.id, backup.frozen_at);
                let draft = interrupted.go_on(&*self.job)?;
                self.job.note(note);
                return Ok(draft);
            }
            Leftover::Interrupted(interrupted) => self.discard(interrupted)?,
            Leftover::Removed(why) => {
                self.job
                    .note(format!("what an interrupted run left is gone: {why}"));
            }
            Leftover::Nothing => {}
        }
        let mut disks = Vec::new();
        for part in self.backup.disks.values() {
            let planned = self.disk_plan(part).await;
            let name = part.disk.name.to_string();
            disks.push(planned.map_err(|error| Failed::Source(name, error))?);
        }
        let identity = |(name, uuid): &(crate::names::Name, uuid::Uuid)| Identity {
            name: name.to_string(),
            uuid: *uuid,
        };
        Ok(self.archive.begin(Plan {
            origin: Origin {
                place: self.place.clone(),
                vouched: true,
            },
            backup: Some(identity(&(self.backup.id.clone(), self.backup.uuid))),
            instant: self.backup.frozen_at,
            checkpoint: self.backup.checkpoint.as_ref().map(identity),
            held_us: self.request.held_us,
            disks,
        })?)
    }

    fn discard(&self, interrupted: Interrupted) -> Result<(), ArchiveError> {
        interrupted.discard()?;
        self.job.note(
            "what an interrupted run left is of no use, as it is of another backup: beginning anew"
                .to_owned(),
        );
        Ok(())
    }

    fn is_ours(&self, plan: &Plan) -> bool {
        plan.backup
            .as_ref()
            .is_some_and(|of| of.uuid == self.backup.uuid)
    }

    async fn disk_plan(&self, part: &Arc<FrozenDisk>) -> Result<DiskPlan, SourceError> {
        let points = self.archive.points();
        let coming = coming(&self.service, points, part, self.request.full);
        let era = coming
            .incremental()
            .map(|(since, era, _)| (since.name.clone(), era));
        let survey = survey(&FrozenSource::new(part, era)).await?;
        let granularity = survey.granularity();
        let (mode, reason, since, parent) = match coming {
            Coming::Full(reason) => (Mode::Full, Some(reason), None, None),
            Coming::Incremental { since, parent, .. } => {
                (Mode::Incremental, None, Some(since), Some(parent))
            }
        };
        Ok(DiskPlan {
            name: part.disk.name.to_string(),
            uuid: Some(part.disk.uuid),
            size: survey.size,
            mode,
            reason,
            since,
            parent,
            granularity,
            data: survey.data,
            zero: survey.zero,
        })
    }

    async fn copy(&self, draft: &Draft) -> Result<(), Failed> {
        let mut disks = Vec::new();
        for target in draft.disks() {
            let mut parts = self.backup.disks.values();
            let name = &target.plan().name;
            let part = parts.find(|part| part.disk.name.as_str() == name);
            let part = part.ok_or_else(|| Failed::Other(unexpected(name)))?;
            disks.push((Rc::new(FrozenSource::new(part, None)), Arc::clone(target)));
        }
        let progress = Arc::clone(&self.job) as Arc<dyn copy::Progress>;
        let copied = tokio::select! {
            biased;
            () = self.job.is_to_end() => return Err(Failed::Stopped),
            copied = copy::run(disks, progress) => copied,
        };
        copied.map_err(|error| match error {
            CopyError::Source(disk, error) => {
                Failed::Source(draft.disks()[disk].plan().name.clone(), error)
            }
            CopyError::Archive(error) => Failed::Archive(error),
            CopyError::Thread(error) => {
                let message = format!("a copying thread has ended early: {error}");
                Failed::Other(Failure::new("internal", message))
            }
        })
    }

    /// What it means that the draft cannot be completed now.
    fn end(&self, failed: Failed, draft: Option<Draft>) -> End {
        let failed = match failed {
            Failed::Archive(ArchiveError::Stopped) => Failed::Stopped,
            failed => failed,
        };
        let id = &self.backup.id;
        let failure = match failed {
            Failed::Stopped if self.job.wished() == Wish::Cancel => {
                let failure = Failure::new(
                    "cancelled",
                    format!("the push of backup {id} was cancelled"),
                );
                failure.hint("its backup has been aborted, and the next one begins where it did")
            }
            Failed::Stopped => {
                return self.kept(
                    Failure::new("stopped", "stopped").hint(AGAIN),
                    draft.as_ref(),
                );
            }
            // Whatever reading says, a backup that is over is why.
            Failed::Source(..) if self.backup.broken().is_some() => {
                let reason = self.backup.broken().unwrap_or_default();
                let message = format!("backup {id} is broken: {reason}");
                Failure::new("backup-broken", message).hint("it has been aborted: push again")
            }
            Failed::Source(..) if self.backup.disks.values().any(|part| part.has_ended()) => {
                let message = format!("backup {id} was ended by somebody else, or has expired");
                Failure::new("backup-ended", message)
                    .hint("nothing that changed is forgotten: push again")
            }
            Failed::Source(disk, error) => {
                let message = format!("cannot read {disk}: {error}");
                return self.kept(
                    Failure::new("cannot-read", message).hint(AGAIN),
                    draft.as_ref(),
                );
            }
            Failed::Archive(error) => return self.kept(error.into(), draft.as_ref()),
            Failed::Other(failure) => return self.kept(failure, draft.as_ref()),
        };
        if let Err(error) = self.discard_draft(draft) {
            self.job
                .note(format!("what was copied is of no use, and stays: {error}"));
        }
        End::Lost(failure)
    }

    /// What is there stays, if anything is: an instant of which nothing was copied is not gone on with.
    fn kept(&self, failure: Failure, draft: Option<&Draft>) -> End {
        let is_there = draft.is_some()
            || match self.archive.leftover() {
                Ok(Leftover::Interrupted(left)) => self.is_ours(left.plan()),
                Ok(Leftover::Nothing | Leftover::Removed(_)) => false,
                // Nobody knows.
                Err(_) => true,
            };
        if is_there {
            End::Kept(failure)
        } else {
            End::Lost(failure)
        }
    }

    fn discard_draft(&self, draft: Option<Draft>) -> Result<(), ArchiveError> {
        match draft {
            Some(draft) => draft.discard(),
            // It was being verified, or put together.
            None => match self.archive.leftover()? {
                Leftover::Interrupted(left) if self.is_ours(left.plan()) => left.discard(),
                _ => Ok(()),
            },
        }
    }
}

impl From<ArchiveError> for Failed {
    fn from(error: ArchiveError) -> Self {
        Self::Archive(error)
    }
}

fn unexpected(disk: &str) -> Failure {
    Failure::new("internal", format!("the backup has no disk '{disk}'"))
}

const AGAIN: &str = "push again: it goes on with what is there";

/// What reads and stores at the same time, each for a chunk.
const BLOCKING_THREADS_MAX: usize = 8;
