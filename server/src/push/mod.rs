//! Copying inside the server: jobs, each of which copies an open backup into a folder and ends it.
//!
//! A job is what a client of the backup would do, without one: it decides what has to be copied, copies,
//! reads back, publishes, and only then commits. A job that is told to stop leaves what it has, so that
//! another goes on with it; one that is cancelled, or whose backup is lost, leaves nothing, and
//! its backup is aborted. So whatever happens, the next backup has its base.

mod base;
mod job;
mod work;

use std::cell::RefCell;
use std::collections::{BTreeSet, VecDeque};
use std::path::PathBuf;
use std::rc::Rc;
use std::sync::Arc;

use tokio::task::{JoinHandle, spawn_blocking, spawn_local};
use uuid::Uuid;

pub(crate) use job::{DiskJob, Job, JobStatus};

use crate::archive::{Archive, ArchiveError, Identity, Leftover, Mode, Point};
use crate::failure::Failure;
use crate::names::Name;
use crate::service::{Backup, Event, Service};
use job::Wish;
use work::{End, Work};

/// What is to be copied where.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(crate) struct PushRequest {
    /// The open backup.
    pub(crate) id: Name,
    /// The folder, by its whole path.
    pub(crate) to: PathBuf,
    /// Copy all of each disk, whatever is in the folder.
    pub(crate) full: bool,
    /// For how long hooks held the guest, in microseconds.
    pub(crate) held_us: Option<u64>,
}

/// What is known of a folder before anything is copied there.
#[derive(Clone, Debug)]
pub(crate) struct Target {
    /// What it is known by.
    pub(crate) identity: Uuid,
    /// The copy that was interrupted and can go on.
    pub(crate) interrupted: Option<Left>,
}

/// What an interrupted job has left.
#[derive(Clone, Debug)]
pub(crate) struct Left {
    /// The backup that it copied.
    pub(crate) backup: Identity,
    /// The names of its disks.
    pub(crate) disks: Vec<String>,
    /// Whether it copied all of each.
    pub(crate) full: bool,
}

/// The jobs of a server. They live on its main thread, and work on threads of their own.
pub(crate) struct Jobs {
    service: Arc<Service>,
    /// Where the server can be found, which is told in what it copies.
    place: String,
    /// Oldest first; those that are over too, until there are too many.
    all: RefCell<VecDeque<Entry>>,
}

struct Entry {
    job: Arc<Job>,
    /// None when it has been waited for.
    task: Option<JoinHandle<()>>,
}

impl Jobs {
    /// None yet, of a server that can be found at `place`.
    pub(crate) fn new(service: Arc<Service>, place: String) -> Self {
        Self {
            service,
            place,
            all: RefCell::default(),
        }
    }

    /// All of them, oldest first.
    pub(crate) fn all(&self) -> Vec<Arc<Job>> {
        let all = self.all.borrow();
        all.iter().map(|entry| Arc::clone(&entry.job)).collect()
    }

    /// What there is in a folder to go on with. It is made if it is not there.
    pub(crate) async fn look(&self, to: PathBuf) -> Result<Target, Failure> {
        check_path(&to)?;
        let look = move || -> Result<Target, Failure> {
            let archive = Archive::open_for_writing(&to)?;
            let interrupted = match archive.leftover()? {
                Leftover::Interrupted(interrupted) => {
                    let plan = interrupted.plan();
                    plan.backup.clone().map(|backup| Left {
                        backup,
                        disks: plan.disks.iter().map(|disk| disk.name.clone()).collect(),
                        full: plan.disks.iter().all(|disk| disk.mode == Mode::Full),
                    })
                }
                Leftover::Nothing | Leftover::Removed(_) => None,
            };
            Ok(Target {
                identity: archive.identity()?,
                interrupted,
            })
        };
        joined(spawn_blocking(look).await)?
    }

    /// What a push into a folder could build on: its newest point of each disk, and those whose
    /// checkpoints the server has; nothing if it is not there. Nothing is made.
    pub(crate) async fn points(&self, to: PathBuf) -> Result<Vec<Point>, Failure> {
        check_path(&to)?;
        let read = move || match Archive::open(&to) {
            Ok(archive) => Ok(archive.points().to_vec()),
            Err(ArchiveError::NoFolder(_)) => Ok(Vec::new()),
            Err(error) => Err(error),
        };
        let all = joined(spawn_blocking(read).await)??;
        let book = self.service.book();
        let known: BTreeSet<Uuid> = book.checkpoints.iter().map(|it| it.uuid).collect();
        let mut seen = BTreeSet::new();
        let mut bases: Vec<Point> = all.into_iter().rev().collect();
        bases.retain(|point| {
            let mut is_newest = false;
            for disk in &point.disks {
                is_newest |= seen.insert(disk.name.clone());
            }
            let checkpoint = point.checkpoint.as_ref();
            is_newest || checkpoint.is_some_and(|of| known.contains(&of.uuid))
        });
        bases.reverse();
        Ok(bases)
    }

    /// Begins a job.
    pub(crate) fn start(self: &Rc<Self>, request: PushRequest) -> Result<Arc<Job>, Failure> {
        check_path(&request.to)?;
        let backup = self.service.open_backup(request.id.as_str())?;
        if let Some(reason) = backup.broken() {
            let message = format!("backup '{}' is broken: {reason}", backup.id);
            return Err(Failure::new("backup-broken", message).hint("abort it and begin anew"));
        }
        let mut all = self.all.borrow_mut();
        let mut running = all.iter().filter(|entry| !entry.job.is_over());
        if running.clone().any(|entry| entry.job.id == request.id) {
            let message = format!("backup '{}' is being pushed already", request.id);
            return Err(Failure::new("job-exists", message).hint("see: query-jobs"));
        }
        if running.nth(RUNNING_MAX - 1).is_some() {
            let message = format!("{RUNNING_MAX} jobs are running, and no more may");
            return Err(Failure::new("too-many-jobs", message).hint("wait until one is over"));
        }
        // An id is that of one job: the one before has been read, or nobody wanted to.
        all.retain(|entry| entry.job.id != request.id);
        if all.len() >= REMEMBERED_MAX
            && let Some(oldest) = all.iter().position(|entry| entry.job.is_over())
        {
            all.remove(oldest);
        }
        let job = Arc::new(Job::new(request.id.clone(), request.to.clone()));
        let performing = Rc::clone(self).perform(Arc::clone(&job), request, backup);
        all.push_back(Entry {
            job: Arc::clone(&job),
            task: Some(spawn_local(performing)),
        });
        Ok(job)
    }

    /// Ends a job as a failure, for good unless what is there is kept. It returns at once; the job is over
    /// some time later.
    pub(crate) fn cancel(&self, id: &Name, keep: bool) -> Result<(), Failure> {
        let all = self.all.borrow();
        let found = all.iter().find(|entry| entry.job.id == *id);
        match found {
            // As in QEMU, one that is over is no job to be cancelled.
            Some(entry) if !entry.job.is_over() => {
                entry
                    .job
                    .wish(if keep { Wish::Leave } else { Wish::Cancel });
                self.tell(&entry.job);
                Ok(())
            }
            _ => Err(Failure::new(
                "unknown-job",
                format!("no job '{id}' is running"),
            )),
        }
    }

    /// Forgets a job that is over.
    pub(crate) fn dismiss(&self, id: &Name) -> Result<(), Failure> {
        let mut all = self.all.borrow_mut();
        let before = all.len();
        all.retain(|entry| entry.job.id != *id || !entry.job.is_over());
        if all.len() < before {
            return Ok(());
        }
        let message = format!("there is no job '{id}' that is over");
        Err(Failure::new("unknown-job", message))
    }

    /// Stops all jobs, each where it is, and waits until nothing of them is left. Those that have
    /// published still commit.
    pub(crate) async fn rest(&self) {
        let tasks: Vec<_> = {
            let mut all = self.all.borrow_mut();
            for entry in all.iter() {
                entry.job.wish(Wish::Leave);
            }
            all.iter_mut()
                .filter_map(|entry| entry.task.take())
                .collect()
        };
        for task in tasks {
            // A task that panicked has said so.
            let _ = task.await;
        }
    }

    async fn perform(self: Rc<Self>, job: Arc<Job>, request: PushRequest, backup: Arc<Backup>) {
        self.tell(&job);
        let outcome = self.push(&job, request, &backup).await;
        if let Err(failure) = &outcome {
            tracing::warn!(backup = %job.id, code = failure.code, "push failed: {failure}");
        }
        job.conclude(outcome);
        self.tell(&job);
    }

    fn tell(&self, job: &Job) {
        self.service.announce(Event::Job {
            id: job.id.clone(),
            status: job.status().word(),
        });
    }

    async fn push(
        &self,
        job: &Arc<Job>,
        request: PushRequest,
        backup: &Arc<Backup>,
    ) -> Result<Point, Failure> {
        let to = request.to.clone();
        let archive = joined(spawn_blocking(move || Archive::open_for_writing(&to)).await)??;
        self.commit_published(job, &archive, backup).await?;
        self.abort_forgotten(&archive, backup).await?;
        let work = Work {
            job: Arc::clone(job),
            service: Arc::clone(&self.service),
            place: self.place.clone(),
            request,
            backup: Arc::clone(backup),
            archive,
        };
        // Joined by its end, which it says when nothing of it is left.
        let (say, end) = tokio::sync::oneshot::channel();
        let thread = std::thread::Builder::new()
            .name("push".to_owned())
            .spawn(move || {
                // Nobody hears it where the server is gone, which waits for it.
                let _ = say.send(work.perform());
            });
        let thread = thread.map_err(|error| {
            Failure::new("system", format!("cannot start a thread to copy: {error}"))
        })?;
        let end = end.await;
        // It has said its last word; what is left is its own end.
        if thread.join().is_err() {
            return Err(Failure::new("internal", "the thread that copied panicked"));
        }
        match end.map_err(|_| Failure::new("internal", "the thread that copied said nothing"))? {
            End::Published(point) => self.commit(backup, point).await,
            End::Kept(failure) => Err(failure),
            End::Lost(failure) => {
                match self.service.abort_backup(&backup.id).await {
                    // What somebody else has ended needs no end.
                    Ok(()) => {}
                    Err(error) => {
                        tracing::warn!(backup = %backup.id, "a backup that is of no use stays: {error}");
                    }
                }
                Err(failure)
            }
        }
    }

    /// Ends backups whose copies in the folder are complete, and whose end could not be recorded.
    async fn commit_published(
        &self,
        job: &Job,
        archive: &Archive,
        ours: &Arc<Backup>,
    ) -> Result<(), Failure> {
        let open = self.service.book().backups.clone();
        for backup in open {
            let is = |of: &Option<Identity>| of.as_ref().is_some_and(|of| of.uuid == backup.uuid);
            let Some(point) = archive.points().iter().find(|point| is(&point.backup)) else {
                continue;
            };
            let (id, number) = (&backup.id, point.number);
            match self.service.commit_backup(id).await {
                Ok(()) if backup.uuid == ours.uuid => {
                    let message =
                        format!("point {number} was complete, and backup '{id}' is committed now");
                    let hint = "there is nothing left to do: begin another one";
                    return Err(Failure::new("already-pushed", message).hint(hint));
                }
                Ok(()) => {
                    job.note(format!(
                        "point {number} was complete: its backup {id} is committed now"
                    ));
                }
                Err(failure) if failure.code == "backup-broken" => {
                    job.note(format!(
                        "point {number} is complete, but its backup {id} broke before it was \
                         committed: the next changes are known since the point before"
                    ));
                    self.service.abort_backup(id).await?;
                }
                Err(failure) => return Err(failure),
            }
        }
        Ok(())
    }

    /// Aborts backups that earlier pushes into this folder began and did not come to copy, or whose copies
    /// are not gone on with.
    async fn abort_forgotten(&self, archive: &Archive, ours: &Backup) -> Result<(), Failure> {
        let theirs = prefix(archive.identity()?);
        let open = self.service.book().backups.clone();
        let is_forgotten = |backup: &&Arc<Backup>| {
            backup.id.as_str().starts_with(&theirs) && backup.uuid != ours.uuid
        };
        for backup in open.iter().filter(is_forgotten) {
            self.service.abort_backup(&backup.id).await?;
        }
        Ok(())
    }

    /// Says that the copy is complete, of a point that is published.
    async fn commit(&self, backup: &Backup, point: Point) -> Result<Point, Failure> {
        let (id, number) = (&backup.id, point.number);
        let Err(failure) = self.service.commit_backup(id).await else {
            return Ok(point);
        };
        let why = &failure.message;
        if failure.code == "backup-broken" {
            // Nobody can commit it any more; if this fails too, somebody else will abort it.
            let _ = self.service.abort_backup(id).await;
            let message = format!(
                "point {number} is complete and verified, but backup {id} broke before it was \
                 committed: {why}"
            );
            let hint = "the next push takes the changes since the point before, or a full";
            return Err(Failure::new("backup-broken", message).hint(hint));
        }
        let message = format!(
            "point {number} is complete and verified, but backup {id} is not committed: {why}"
        );
        Err(Failure::new(failure.code, message).hint("the next push commits it first"))
    }
}

/// What the ids of backups begin with that are begun to be pushed into a folder.
pub(crate) fn prefix(folder: Uuid) -> String {
    format!("push-{}-", &folder.simple().to_string()[..8])
}

fn check_path(to: &std::path::Path) -> Result<(), Failure> {
    if to.is_absolute() {
        return Ok(());
    }
    let message = format!("'{}' is no path from the root on", to.display());
    Err(Failure::new("bad-argument", message).hint("the server is in no folder that you know of"))
}

fn joined<T>(outcome: Result<T, tokio::task::JoinError>) -> Result<T, Failure> {
    outcome.map_err(|error| Failure::new("internal", format!("a thread has ended early: {error}")))
}

/// Each has a thread, and tens of MiB under way: more than that make nothing faster.
const RUNNING_MAX: usize = 4;

/// Those that are over among them: more than anyone looks at.
const REMEMBERED_MAX: usize = 64;
