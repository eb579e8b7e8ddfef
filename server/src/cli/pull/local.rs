//! Disks of a Stillpoint server: with an instant for all of them, and a commit at the end.

use std::path::Path;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;
use tokio::task::{JoinHandle, spawn_blocking, spawn_local};
use tokio::time::sleep;
use uuid::Uuid;

use super::base::{self, Base, Coming};
use super::bitmap::{Bitmap, is_by_bitmap};
use super::dry_run::dry_run;
use super::server::{Beginning, Server};
use super::stop::Stop;
use super::{Common, Failed, Ready, broken, source_problem, stopped};
use crate::archive::{Archive, ArchiveError, DiskPlan, Identity, Mode, Origin, Plan, Point};
use crate::cli::Done;
use crate::cli::problem::{Problem, exit};
use crate::cli::progress::{ServerSide, Watch};
use crate::control::answers::{
    BackupAnswer, BackupDisk, BackupState, CheckpointAnswer, DiskAnswer,
};
use crate::copy::reasons::ASKED_FOR;
use crate::copy::{CopyError, NbdSource, SourceError, survey};
use crate::failure::Failure;
use crate::nbd_uri::NbdUriError;

/// Pulls disks of the server of this run directory.
pub(super) async fn pull(
    common: &Common<'_>,
    run_dir: &Path,
    stop: &mut Stop,
) -> Result<Done, Problem> {
    let mut server = Server::connect(run_dir)?;
    let disks = server.disks(&common.args.disks)?;
    if common.args.dry_run {
        return dry_run(common, &mut server, &disks);
    }
    let archive = common.archive()?;
    refuse_others(&common.args.to, archive.points(), &disks)?;
    let mut local = Local {
        common,
        server,
        archive,
        thaw_failed: false,
    };
    local.commit_published()?;
    let ready = match local.go_on(&disks, stop).await? {
        Some(ready) => ready,
        None => local.begin(&disks, stop).await?,
    };
    local.complete(ready, stop).await
}

/// One pull, and where it is from and goes to.
pub(super) struct Local<'a> {
    pub(super) common: &'a Common<'a>,
    pub(super) server: Server,
    pub(super) archive: Archive,
    /// The guest may still stand still.
    thaw_failed: bool,
}

impl Local<'_> {
    /// Freezes an instant of these disks and makes a draft of it. If that fails, it is as if nothing
    /// had begun.
    async fn begin(&mut self, disks: &[DiskAnswer], stop: &mut Stop) -> Result<Ready, Problem> {
        let known = self.server.checkpoints()?;
        let bitmap = bitmap_of(self.common, &mut self.server, &known)?;
        let base = |disk| base_of(self.common.args.full, self.archive.points(), disk, &known);
        let bases: Vec<Base> = disks.iter().map(base).collect();
        let names: Vec<String> = disks.iter().map(|disk| disk.disk.to_string()).collect();
        let id = format!("{}{}", self.prefix()?, short(Uuid::new_v4()));
        // A disk whose bitmap cannot be believed comes without it, and is not to keep others from theirs.
        let frozen = bitmap
            .as_ref()
            .filter(|bitmap| !bitmap.is_in_the_way(&names));
        let frozen: Vec<&str> = frozen.map(Bitmap::name).into_iter().collect();
        let beginning = Beginning {
            id: &id,
            disks: &names,
            since: base::since(&bases),
            consumer: &self.consumer()?,
            bitmaps: &frozen,
        };
        let (backup, held) = self.server.begin(&beginning, &self.common.args.hooks)?;
        self.thaw_failed = held.as_ref().is_some_and(|held| held.error.is_some());
        let held = held.map(|held| held.time_us);
        let bases = (&names[..], &bases[..], bitmap.as_ref());
        let drafted = self.draft(&backup, held, bases, stop).await;
        if drafted.is_err() {
            // What cannot be aborted now is found by the next run.
            let _ = self.server.abort(&id);
        }
        drafted
    }

    async fn draft(
        &mut self,
        backup: &BackupAnswer,
        held_us: Option<u64>,
        (names, bases, bitmap): (&[String], &[Base], Option<&Bitmap>),
        stop: &mut Stop,
    ) -> Result<Ready, Problem> {
        let (mut disks, mut sources) = (Vec::new(), Vec::new());
        for disk in &backup.disks {
            let at = names.iter().position(|name| name == disk.disk.as_str());
            let base = at.map(|at| &bases[at]).ok_or_else(|| unexpected(backup))?;
            let points = self.archive.points();
            let coming = match bitmap {
                _ if self.common.args.full => Coming::Full(ASKED_FOR.to_owned()),
                Some(bitmap) => bitmap.coming(points, base, disk),
                None => base::coming(points, base, disk),
            };
            let planning = async {
                let bitmap = match &coming {
                    Coming::Incremental { since, .. } => Some(since.name.as_str()),
                    Coming::Full(_) => None,
                };
                let source = self.open(disk, bitmap).await?;
                let survey = survey(&source).await?;
                Ok::<_, SourceError>((source, survey))
            };
            let planned = stop.unless_stopped(planning).await.ok_or_else(stopped)?;
            let (source, survey) = planned.map_err(|error| source_problem(&error))?;
            let (mode, reason, since, parent) = match coming {
                Coming::Full(reason) => (Mode::Full, Some(reason), None, None),
                Coming::Incremental { since, parent } => {
                    (Mode::Incremental, None, Some(since), Some(parent))
                }
            };
            disks.push(DiskPlan {
                name: disk.disk.to_string(),
                uuid: Some(disk.disk_uuid),
                size: survey.size,
                mode,
                reason,
                since,
                parent,
                granularity: survey.granularity(),
                data: survey.data,
                zero: survey.zero,
            });
            sources.push(Rc::new(source));
        }
        let draft = self.archive.begin(Plan {
            origin: Origin {
                place: self.server.run_dir().to_string_lossy().into_owned(),
                vouched: !disks.iter().any(is_by_bitmap),
            },
            backup: Some(Identity {
                name: backup.id.to_string(),
                uuid: backup.uuid,
            }),
            instant: instant(backup)?,
            checkpoint: checkpoint(backup),
            held_us,
            disks,
        })?;
        Ok(Ready { draft, sources })
    }

    /// Copies, verifies, publishes, commits.
    async fn complete(mut self, mut ready: Ready, stop: &mut Stop) -> Result<Done, Problem> {
        let identity = ready.draft.plan().backup.clone();
        let identity = identity.expect("drafts of a server's disks have a backup");
        let rows = self.common.announce(&ready.draft);
        let watch = Arc::new(Watch::of(&ready.draft));
        let telling = self.tell(&watch, identity.uuid);
        let outcome = self.fetch(&mut ready, &identity, &watch, stop).await;
        telling.abort();
        match outcome {
            Ok(()) => {}
            Err(Failed::Stopped) => return Err(stopped()),
            Err(Failed::Copy(CopyError::Source(disk, error))) => {
                let disk = ready.draft.disks()[disk].plan().name.clone();
                return Err(self.settle(ready, &identity, &disk, &error).await);
            }
            Err(Failed::Copy(error)) => return Err(error.into()),
        }
        let point = self.common.finish(ready, &watch, stop).await?;
        self.commit(&point, &identity)?;
        let next = self.next_bytes(&point);
        let mut done = self
            .common
            .finished(self.archive.points(), &point, &rows, Some(next));
        if self.thaw_failed {
            done.exit = exit::FAILED;
        }
        Ok(done)
    }

    /// What it means that a disk cannot be read any more.
    async fn settle(
        &mut self,
        ready: Ready,
        identity: &Identity,
        disk: &str,
        error: &SourceError,
    ) -> Problem {
        let read = || {
            let problem = source_problem(error);
            Problem::new(
                problem.code(),
                format!("cannot read {disk}: {}", problem.message()),
            )
            .hint("run the same command again: it goes on with what is there")
        };
        // It may be another one by now.
        let Ok(mut server) = Server::connect(self.server.run_dir()) else {
            return read();
        };
        let id = &identity.name;
        let end = match server.backup(identity.uuid) {
            Ok(Some(backup)) if backup.state == BackupState::Broken => {
                let reason = backup.broken_reason.unwrap_or_default();
                server.abort(id).map(|()| broken(id, &reason))
            }
            Ok(None) => Ok(ended(id)),
            Ok(Some(_)) | Err(_) => return read(),
        };
        let discarded = self.common.discard(ready).await;
        end.and_then(|problem| discarded.map(|()| problem))
            .unwrap_or_else(|problem| problem)
    }

    /// Says that the copy is complete, of a point that is published.
    fn commit(&mut self, point: &Point, identity: &Identity) -> Result<(), Problem> {
        let id = &identity.name;
        // A verification may have taken longer than the server's life.
        let committed = Server::connect(self.server.run_dir()).and_then(|server| {
            self.server = server;
            self.server.commit(id)
        });
        let number = point.number;
        committed.map_err(|problem| match problem.code() {
            BROKEN => {
                let _ = self.server.abort(id);
                let message = format!(
                    "point {number} is complete and verified, but backup {id} broke before it was \
                     committed: {}",
                    problem.message()
                );
                Problem::new(BROKEN, message)
                    .hint("the next pull takes the changes since the point before, or a full")
            }
            code => {
                let message = format!(
                    "point {number} is complete and verified, but backup {id} is not committed: {}",
                    problem.message()
                );
                Problem::new(code, message).hint("the next pull commits it first")
            }
        })
    }

    /// What has changed since a point, by disk; what cannot be known is left out.
    fn next_bytes(&mut self, point: &Point) -> Vec<(String, u64)> {
        let known = self.server.checkpoints().unwrap_or_default();
        let mut made = known.iter().filter(|checkpoint| {
            point
                .checkpoint
                .as_ref()
                .is_some_and(|of| of.uuid == checkpoint.uuid)
        });
        let disks = made.next().map(|checkpoint| checkpoint.disks.iter());
        let disks = disks.into_iter().flatten();
        disks
            .map(|disk| (disk.disk.to_string(), disk.dirty_bytes))
            .collect()
    }

    pub(super) async fn sources(
        &self,
        plan: &Plan,
        backup: &BackupAnswer,
    ) -> Result<Vec<Rc<NbdSource>>, SourceError> {
        let mut sources = Vec::new();
        for planned in &plan.disks {
            let mut disks = backup.disks.iter();
            let disk = disks.find(|disk| disk.disk.as_str() == planned.name);
            let disk = disk.ok_or_else(|| unexpected(backup))?;
            sources.push(Rc::new(self.open(disk, None).await?));
        }
        Ok(sources)
    }

    /// Enters the frozen export of a disk, on the nearest of the server's sockets.
    async fn open(
        &self,
        disk: &BackupDisk,
        bitmap: Option<&str>,
    ) -> Result<NbdSource, SourceError> {
        let mut uris = disk.uris.iter();
        let uri = uris
            .clone()
            .find(|uri| uri.contains("+unix://"))
            .or_else(|| uris.next());
        let uri = uri.map_or("", String::as_str).parse();
        let uri =
            uri.map_err(|error: NbdUriError| Failure::new("bad-server", error.to_string()))?;
        NbdSource::open(&uri, self.common.tls.as_ref(), bitmap).await
    }
}

impl Local<'_> {
    /// What the ids of backups begin with that are begun for this folder.
    pub(super) fn prefix(&self) -> Result<String, Problem> {
        Ok(format!("pull-{}-", short(self.archive.identity()?)))
    }

    /// For whom the server keeps checkpoints.
    fn consumer(&self) -> Result<String, Problem> {
        match &self.common.args.consumer {
            Some(consumer) => Ok(consumer.clone()),
            None => Ok(format!("pull-{}", short(self.archive.identity()?))),
        }
    }

    /// Asks the server now and then how it fares, for whoever watches.
    fn tell(&self, watch: &Arc<Watch>, backup: Uuid) -> JoinHandle<()> {
        let (watch, run_dir) = (Arc::clone(watch), self.server.run_dir().to_owned());
        spawn_local(async move {
            loop {
                let run_dir = run_dir.clone();
                let asked = spawn_blocking(move || Server::connect(&run_dir)?.backup(backup));
                if let Ok(Ok(Some(backup))) = asked.await {
                    watch.tell(ServerSide {
                        scratch_used_bytes: backup.scratch_used_bytes.unwrap_or(0),
                        guest_stall_us: backup.guest_stall_us.unwrap_or(0),
                    });
                }
                sleep(INTERVAL).await;
            }
        })
    }
}

/// Refuses a folder that has other disks under these names, before anything is done.
pub(super) fn refuse_others(
    folder: &Path,
    points: &[Point],
    disks: &[DiskAnswer],
) -> Result<(), Problem> {
    for disk in disks {
        let name = disk.disk.as_str();
        let mut newest_first = points.iter().rev();
        let last = newest_first.find_map(|point| point.disk(name));
        if last.is_some_and(|entry| entry.uuid != Some(disk.uuid)) {
            return Err(ArchiveError::OtherDisk {
                path: folder.to_owned(),
                disk: name.to_owned(),
            }
            .into());
        }
    }
    Ok(())
}

/// What a disk's changes could be relative to.
pub(super) fn base_of(
    full: bool,
    points: &[Point],
    disk: &DiskAnswer,
    known: &[CheckpointAnswer],
) -> Base {
    if full {
        return Base::None(ASKED_FOR.to_owned());
    }
    base::find(points, (disk.disk.as_str(), disk.uuid), known)
}

/// The dirty bitmap that was asked for, on the disks of a server.
pub(super) fn bitmap_of(
    common: &Common<'_>,
    server: &mut Server,
    known: &[CheckpointAnswer],
) -> Result<Option<Bitmap>, Problem> {
    match &common.args.bitmap {
        Some(name) if !common.args.full => Ok(Some(Bitmap::find(name, &server.nodes()?, known))),
        _ => Ok(None),
    }
}

/// Enough of a uuid to tell some apart.
fn short(uuid: Uuid) -> String {
    let mut text = uuid.simple().to_string();
    text.truncate(8);
    text
}

fn instant(backup: &BackupAnswer) -> Result<OffsetDateTime, Problem> {
    let instant = OffsetDateTime::parse(&backup.frozen_at, &Rfc3339);
    instant.map_err(|_| unexpected(backup).into())
}

fn checkpoint(backup: &BackupAnswer) -> Option<Identity> {
    let (name, uuid) = backup.checkpoint.as_ref().zip(backup.checkpoint_uuid)?;
    Some(Identity {
        name: name.to_string(),
        uuid,
    })
}

/// An answer that is not what was asked for.
fn unexpected(backup: &BackupAnswer) -> Failure {
    let message = format!("backup {} is not of what it was begun for", backup.id);
    Failure::new("bad-server", message)
}

/// The backup that was being copied is gone.
fn ended(id: &str) -> Problem {
    let message = format!("backup {id} was ended by somebody else, or has expired");
    Problem::broken(message).hint("nothing that changed is forgotten: run the same command again")
}

/// What a failure of a broken backup is called.
pub(super) const BROKEN: &str = "backup-broken";

/// Between two questions to the server: often enough for people.
const INTERVAL: Duration = Duration::from_secs(1);
