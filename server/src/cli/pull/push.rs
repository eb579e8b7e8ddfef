//! `stillpoint push`: what a pull does, done by the server itself.
//!
//! The folder is the server's to read and to write; what this command knows of it, the server has
//! told. So it begins the backup, with hooks around the instant, has the server copy it, and watches.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use clap::Args;
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::runtime::Builder;
use tokio::time::sleep;
use uuid::Uuid;

use super::dry_run::foreseen;
use super::local::refuse_others;
use super::report::{Finished, Report, Row};
use super::server::wanted;
use super::stop::Stop;
use super::stopped;
use crate::archive::{Mode, Point};
use crate::cli::client::{self, Client};
use crate::cli::hooks::HookArgs;
use crate::cli::problem::{Problem, exit};
use crate::cli::progress::{ServerSide, Watch};
use crate::cli::{Answers, Done, NONE};
use crate::control::answers::{self, BackupAnswer, BackupState, CheckpointAnswer, DiskAnswer};
use crate::control::jobs::{DiskJobAnswer, InterruptedAnswer, JobAnswer, TargetAnswer};
use crate::copy::reasons::FIRST;
use crate::push::prefix;

#[derive(Args, Debug)]
pub(in crate::cli) struct PushArgs {
    /// Only these disks; all of the server without any.
    #[arg(value_name = "DISK")]
    disks: Vec<String>,
    /// The folder that the points go to, as the server sees it; it is made if it is not there.
    #[arg(long, value_name = "PATH")]
    to: PathBuf,
    /// Copy all of each disk, whatever is in the folder.
    #[arg(long)]
    full: bool,
    /// Say what would be copied, and do nothing.
    #[arg(long)]
    dry_run: bool,
    /// Whose backup this is for the server [default: a name made for the folder].
    #[arg(long, value_name = "NAME")]
    consumer: Option<String>,
    /// Say nothing but errors.
    #[arg(long, short)]
    quiet: bool,
    #[command(flatten)]
    hooks: HookArgs,
}

impl PushArgs {
    pub(in crate::cli) fn run(self, run_dir: &Path, answers: &Answers) -> Result<Done, Problem> {
        let report = Report::new(answers.is_json, self.quiet);
        let runtime = Builder::new_current_thread().enable_all().build();
        let runtime = runtime
            .map_err(|error| Problem::new("no-runtime", format!("cannot begin: {error}")))?;
        let to = std::path::absolute(&self.to).map_err(|error| {
            Problem::usage(format!("the path '{}': {error}", self.to.display()))
        })?;
        let mut push = Push {
            client: Client::connect(run_dir)?,
            args: &self,
            to,
            report: &report,
            begun: Instant::now(),
        };
        if self.dry_run {
            return push.dry_run();
        }
        runtime.block_on(push.run())
    }
}

struct Push<'a> {
    client: Client,
    args: &'a PushArgs,
    to: PathBuf,
    report: &'a Report,
    begun: Instant,
}

/// A job that has begun, and whether all has gone well until then.
struct Begun {
    id: String,
    /// The instant is an earlier push's.
    is_old: bool,
    is_well: bool,
}

impl Push<'_> {
    async fn run(&mut self) -> Result<Done, Problem> {
        let disks = self.disks()?;
        let disks: Vec<String> = disks.iter().map(|disk| disk.disk.to_string()).collect();
        let to = self.to.clone();
        let target: TargetAnswer = self.ask("query-push-target", &To { to: &to })?;
        let begun = match target.interrupted {
            Some(left) => self.go_on(&left, &disks)?,
            None => None,
        };
        let begun = match begun {
            Some(begun) => begun,
            None => self.begin(target.uuid, &disks)?,
        };
        // Until here, whoever interrupts this command ends it; from here on there is a job to stop.
        let job = self.watch(&begun.id, &mut Stop::listen()?).await?;
        self.finished(&begun, &job)
    }

    /// Says how each disk would come.
    fn dry_run(&mut self) -> Result<Done, Problem> {
        let disks = self.disks()?;
        let to = self.to.clone();
        let points: Vec<Point> = self.ask("query-push-points", &To { to: &to })?;
        refuse_others(&to, &points, &disks)?;
        let known: Vec<CheckpointAnswer> = self.ask("query-checkpoints", &NONE)?;
        let rows = foreseen(&points, self.args.full, &disks, &known);
        self.report.plan(&to, None, &rows);
        Ok(Done {
            text: self.report.nothing_done(),
            exit: self.exit(&rows),
        })
    }

    fn ask<T: DeserializeOwned>(
        &mut self,
        command: &str,
        arguments: &impl Serialize,
    ) -> Result<T, Problem> {
        client::parse(&self.client.execute(command, arguments)?)
    }

    /// The disks that are wanted, in the server's order.
    fn disks(&mut self) -> Result<Vec<DiskAnswer>, Problem> {
        let all: Vec<DiskAnswer> = self.ask("query-disks", &NONE)?;
        wanted(all, &self.args.disks)
    }

    /// Goes on with what an interrupted push has left, if that is what is asked for and the instant
    /// is still there.
    fn go_on(
        &mut self,
        left: &InterruptedAnswer,
        disks: &[String],
    ) -> Result<Option<Begun>, Problem> {
        let open: Vec<BackupAnswer> = self.ask("query-backups", &NONE)?;
        let Some(backup) = open.iter().find(|backup| backup.uuid == left.backup_uuid) else {
            return Ok(None);
        };
        let id = backup.id.as_str();
        if let BackupState::Broken = backup.state {
            self.client.execute("backup-abort", &Id { id })?;
            let reason = backup.broken_reason.as_deref().unwrap_or_default();
            return Err(super::broken(id, reason));
        }
        let is_asked_for = (left.full || !self.args.full)
            && left.disks.len() == disks.len()
            && disks.iter().all(|disk| left.disks.contains(disk));
        if !is_asked_for {
            self.client.execute("backup-abort", &Id { id })?;
            return Ok(None);
        }
        self.start(id, None)?;
        let id = id.to_owned();
        Ok(Some(Begun {
            id,
            is_old: true,
            is_well: true,
        }))
    }

    /// Freezes an instant, with what is to be done around it, and has it copied. If that fails, it is as
    /// if nothing had begun.
    fn begin(&mut self, folder: Uuid, disks: &[String]) -> Result<Begun, Problem> {
        let short = |uuid: Uuid| uuid.simple().to_string()[..8].to_owned();
        let id = format!("{}{}", prefix(folder), short(Uuid::new_v4()));
        let consumer = self.args.consumer.clone();
        let beginning = Beginning {
            id: &id,
            disks,
            // The folder's, whether its points are pulled or pushed.
            consumer: consumer.unwrap_or_else(|| format!("pull-{}", short(folder))),
        };
        let hooks = &self.args.hooks;
        let mut occasion = hooks.occasion("push", &mut self.client, Some(disks))?;
        occasion.backup = Some(id.clone());
        let ((), held) = hooks.around(occasion, || {
            self.client.execute("backup-begin", &beginning)?;
            Ok(((), Some(id.clone())))
        })?;
        let is_well = held.as_ref().is_none_or(|held| held.error.is_none());
        match self.start(&id, held.map(|held| held.time_us)) {
            Ok(()) => Ok(Begun {
                id,
                is_old: false,
                is_well,
            }),
            Err(problem) => {
                // What cannot be aborted now can be aborted by hand.
                let _ = self.client.execute("backup-abort", &Id { id: &id });
                Err(problem)
            }
        }
    }

    fn start(&mut self, id: &str, held_us: Option<u64>) -> Result<(), Problem> {
        let request = Request {
            id,
            to: &self.to,
            full: self.args.full,
            held_us,
        };
        self.client.execute("push", &request).map(drop)
    }

    /// Shows how far the job is until it is over.
    async fn watch(&mut self, id: &str, stop: &mut Stop) -> Result<JobAnswer, Problem> {
        let mut noted = 0;
        let mut shown = None;
        let mut is_stopped = false;
        let job = loop {
            let job = self.job(id)?;
            for note in &job.notes[noted..] {
                self.report.note(note);
            }
            noted = job.notes.len();
            if shown.is_none() && job.point.is_some() {
                let rows: Vec<Row> = job.disks.iter().map(row).collect();
                self.report.plan(&self.to, job.point, &rows);
                let watch = Watch::at(
                    job.disks
                        .iter()
                        .map(|disk| (disk.disk.clone(), disk.copy_bytes, disk.copied_bytes)),
                );
                shown = Some((self.report.display(&watch), watch));
            }
            if let Some((display, watch)) = &mut shown {
                watch.set(
                    job.disks.iter().map(|disk| disk.done_bytes),
                    job.checked_bytes,
                );
                if let Some(server) = self.server_side(id)? {
                    watch.tell(server);
                }
                display.show(watch);
            }
            if job.status == CONCLUDED {
                break job;
            }
            if stop.unless_stopped(sleep(REDRAWN_AFTER)).await.is_none() {
                if !is_stopped {
                    is_stopped = true;
                    // One that is over by now has an outcome.
                    let _ = self.client.execute("job-cancel", &Leave { id, keep: true });
                }
                sleep(REDRAWN_AFTER).await;
            }
        };
        if let Some((display, watch)) = shown {
            display.close(&watch);
        }
        Ok(job)
    }

    fn job(&mut self, id: &str) -> Result<JobAnswer, Problem> {
        let all: Vec<JobAnswer> = self
            .ask("query-jobs", &NONE)
            .map_err(|problem| gone(&problem))?;
        let found = all.into_iter().find(|job| job.id == id);
        found.ok_or_else(|| {
            let message = format!("the server no longer knows of the push of backup {id}");
            Problem::new("unknown-job", message).hint("push again: it goes on with what is there")
        })
    }

    fn server_side(&mut self, id: &str) -> Result<Option<ServerSide>, Problem> {
        let open: Vec<BackupAnswer> = self.ask("query-backups", &NONE)?;
        let backup = open.iter().find(|backup| backup.id.as_str() == id);
        Ok(backup.map(|backup| ServerSide {
            scratch_used_bytes: backup.scratch_used_bytes.unwrap_or(0),
            guest_stall_us: backup.guest_stall_us.unwrap_or(0),
        }))
    }

    /// Says what has come of it, and how to exit.
    fn finished(&mut self, begun: &Begun, job: &JobAnswer) -> Result<Done, Problem> {
        let id = &begun.id;
        let Some(point) = &job.result else {
            if !begun.is_old && job.point.is_none() {
                // Nothing was copied of it. The server may have aborted it, or may be gone.
                let _ = self.client.execute("backup-abort", &Id { id });
            }
            return Err(failed(job));
        };
        let rows: Vec<Row> = job.disks.iter().map(row).collect();
        let next_bytes = self.next_bytes(point)?;
        let finished = Finished {
            command: "push",
            folder: &self.to,
            point,
            rows: &rows,
            time: self.begun.elapsed(),
            is_committed: true,
            next_bytes,
        };
        let text = self.report.finished(&finished);
        // It has been read; and whoever asks for it once more has been told.
        let _ = self.client.execute("job-dismiss", &Id { id });
        let exit = if begun.is_well {
            self.exit(&rows)
        } else {
            exit::FAILED
        };
        Ok(Done { text, exit })
    }

    /// How to exit when all is well.
    fn exit(&self, rows: &[Row]) -> u8 {
        let is_surprise =
            |row: &Row| row.mode == Mode::Full && row.reason.as_deref() != Some(FIRST);
        if !self.args.full && rows.iter().any(is_surprise) {
            exit::FULL
        } else {
            0
        }
    }

    /// What has changed since a point, by disk; what cannot be known is left out.
    fn next_bytes(&mut self, point: &Point) -> Result<Vec<(String, u64)>, Problem> {
        let known: Vec<CheckpointAnswer> = self.ask("query-checkpoints", &NONE)?;
        let made = point
            .checkpoint
            .as_ref()
            .and_then(|of| known.iter().find(|checkpoint| checkpoint.uuid == of.uuid));
        let disks = made.map(|checkpoint| checkpoint.disks.iter());
        let disks = disks.into_iter().flatten();
        Ok(disks
            .map(|disk| (disk.disk.to_string(), disk.dirty_bytes))
            .collect())
    }
}

fn row(disk: &DiskJobAnswer) -> Row {
    Row {
        disk: disk.disk.clone(),
        size: disk.size,
        mode: match disk.mode {
            answers::Mode::Full => Mode::Full,
            answers::Mode::Incremental => Mode::Incremental,
        },
        reason: disk.reason.clone(),
        since: disk.since.clone(),
        since_uuid: disk.since_uuid,
        parent: disk.parent,
        changed_bytes: disk.changed_bytes,
        zero_bytes: Some(disk.zero_bytes),
        copy_bytes: disk.copy_bytes,
        copied_bytes: disk.copied_bytes,
    }
}

/// The server has ended, and the job with it.
fn gone(problem: &Problem) -> Problem {
    let message = format!("the copy goes on no more: {}", problem.message());
    Problem::new(problem.code(), message)
        .hint("when the server runs again, push again: it goes on with what is there")
}

fn failed(job: &JobAnswer) -> Problem {
    let code = job.code.as_deref().unwrap_or("internal");
    let message = job.error.as_deref().unwrap_or("the push came to no end");
    let problem = match code {
        "stopped" => return stopped(),
        "backup-broken" | "backup-ended" => Problem::broken(message),
        code => Problem::new(code, message),
    };
    match &job.hint {
        Some(hint) => problem.hint(hint),
        None => problem,
    }
}

#[derive(Serialize)]
struct Id<'a> {
    id: &'a str,
}

#[derive(Serialize)]
struct Leave<'a> {
    id: &'a str,
    keep: bool,
}

#[derive(Serialize)]
struct To<'a> {
    to: &'a Path,
}

#[derive(Serialize)]
struct Beginning<'a> {
    id: &'a str,
    disks: &'a [String],
    consumer: String,
}

#[derive(Serialize)]
struct Request<'a> {
    id: &'a str,
    to: &'a Path,
    full: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    held_us: Option<u64>,
}

const CONCLUDED: &str = "concluded";

/// Often enough for a bar that moves.
const REDRAWN_AFTER: Duration = Duration::from_millis(200);
