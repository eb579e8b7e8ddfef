//! `stillpoint pull`: begin, copy, verify, publish, commit.
//!
//! A point is published before its backup is committed. Killed in between, the next run finds a
//! published point whose backup is still open, and commits it: the server never takes for a base what
//! the folder does not hold.

pub(super) mod push;

mod local;

mod base;
mod bitmap;
mod dry_run;
mod leftover;
mod reconnect;
mod server;

mod remote;

mod report;
mod stop;

use std::path::PathBuf;
use std::pin::pin;
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};

use clap::Args;
use tokio::runtime::Builder;
use tokio::task::{JoinError, LocalSet, spawn_blocking};
use tokio::time::sleep;

use super::hooks::HookArgs;
use super::problem::{Problem, error_chain, exit};
use super::progress::Watch;
use super::units::parse_duration;
use super::{Answers, Done};
use crate::archive::{self, Archive, ArchiveError, Draft, Interrupted, Point};
use crate::copy::{self, CopyError, NbdSource, SourceError};
use crate::nbd_uri::{NbdUri, NbdUriError};
use crate::tls::ClientTls;
use base::is_surprise;
use report::{Finished, Report, Row, rows};
use stop::Stop;

#[derive(Args, Debug)]
pub(super) struct PullArgs {
    /// Only these disks; all of the server without any.
    #[arg(value_name = "DISK")]
    disks: Vec<String>,
    /// The folder that the points go to; it is made if it is not there.
    #[arg(long, value_name = "DIR")]
    to: PathBuf,
    /// Copy all of each disk, whatever is in the folder.
    #[arg(long)]
    full: bool,
    /// Say what would be copied, and do nothing.
    #[arg(long)]
    dry_run: bool,
    /// Whose backup this is for the server [default: a name made for the folder].
    #[arg(long, value_name = "NAME", conflicts_with = "uri")]
    consumer: Option<String>,
    /// Pull this export of any NBD server, such as `nbd+unix:///vda?socket=/run/nbd.sock`, without begin
    /// and commit.
    #[arg(long, value_name = "URI", value_parser = parse_uri)]
    uri: Option<NbdUri>,
    /// Copy what is dirty in this bitmap, such as one that is stored in a qcow2 image, on top of the last
    /// point in the folder. It has to have recorded since then.
    #[arg(long, value_name = "NAME")]
    bitmap: Option<String>,
    /// Believe servers whose certificates ca-cert.pem of this directory vouches for, and show
    /// client-cert.pem to those that ask.
    #[arg(long, value_name = "DIR", visible_alias = "tls-certificates")]
    tls_creds: Option<PathBuf>,
    /// How long to try again when the connection to the server is lost; 0s for not at all.
    #[arg(long, value_name = "DURATION", default_value = "30s", value_parser = parse_duration)]
    #[arg(conflicts_with = "uri")]
    reconnect: Duration,
    /// Say nothing but errors.
    #[arg(long, short)]
    quiet: bool,
    #[command(flatten)]
    hooks: HookArgs,
}

fn parse_uri(text: &str) -> Result<NbdUri, String> {
    text.parse().map_err(|error: NbdUriError| error.to_string())
}

impl PullArgs {
    pub(super) fn run(
        self,
        run_dir: impl FnOnce() -> Result<PathBuf, Problem>,
        answers: &Answers,
    ) -> Result<Done, Problem> {
        let report = Report::new(answers.is_json, self.quiet);
        let runtime = Builder::new_current_thread().enable_all().build();
        let runtime = runtime
            .map_err(|error| Problem::new("no-runtime", format!("cannot begin: {error}")))?;
        let done = LocalSet::new().block_on(&runtime, self.pull(run_dir, &report));
        // What was stopped may still be in the middle of a chunk, and nobody waits for it.
        runtime.shutdown_background();
        done
    }

    async fn pull(
        &self,
        run_dir: impl FnOnce() -> Result<PathBuf, Problem>,
        report: &Report,
    ) -> Result<Done, Problem> {
        let mut stop = Stop::listen()?;
        let creds = self.uri.as_ref().and_then(|uri| uri.tls_creds.as_deref());
        let creds = self.tls_creds.as_deref().or(creds);
        let tls = creds.map(ClientTls::read).transpose()?;
        let common = Common {
            args: self,
            tls,
            report,
            begun: Instant::now(),
        };
        match &self.uri {
            None => local::pull(&common, &run_dir()?, &mut stop).await,
            Some(uri) => remote::pull(&common, uri, &mut stop).await,
        }
    }
}

/// What is the same for disks from anywhere.
struct Common<'a> {
    args: &'a PullArgs,
    tls: Option<ClientTls>,
    report: &'a Report,
    begun: Instant,
}

/// A draft, and where the rest of it comes from.
struct Ready {
    draft: Draft,
    /// In the order of its disks.
    sources: Vec<Rc<NbdSource>>,
}

/// Why a draft is not complete.
enum Failed {
    /// Somebody wants us to stop.
    Stopped,
    Copy(CopyError),
}

impl Common<'_> {
    /// Opens the folder, alone.
    fn archive(&self) -> Result<Archive, Problem> {
        Ok(Archive::open_for_writing(&self.args.to)?)
    }

    /// The points of a folder that is only looked at; none if it is not there.
    fn points(&self) -> Result<Vec<Point>, Problem> {
        match Archive::open(&self.args.to) {
            Ok(archive) => Ok(archive.points().to_vec()),
            Err(ArchiveError::NoFolder(_)) => Ok(Vec::new()),
            Err(error) => Err(error.into()),
        }
    }

    /// Goes on with what an interrupted run has left, as far as it is right.
    async fn go_on(&self, interrupted: Interrupted, stop: &mut Stop) -> Result<Draft, Problem> {
        let watch = Arc::new(Watch::nothing());
        let worker = Arc::clone(&watch);
        let going_on = spawn_blocking(move || interrupted.go_on(&*worker));
        joined(stop.telling(going_on, || watch.stop()).await)
    }

    /// Says what is to be copied.
    fn announce(&self, draft: &Draft) -> Vec<Row> {
        let rows = rows(draft);
        let number = Some(draft.number());
        self.report.plan(&self.args.to, number, &rows);
        rows
    }

    /// Fetches what a draft lacks, while somebody watches.
    async fn fetch(
        &self,
        ready: &mut Ready,
        watch: &Arc<Watch>,
        stop: &mut Stop,
    ) -> Result<(), Failed> {
        let follower = Arc::clone(watch) as Arc<dyn archive::Progress>;
        ready.draft.follow(&follower);
        let disks = ready.sources.iter().cloned();
        let disks = disks.zip(ready.draft.disks().iter().cloned()).collect();
        let copying = copy::run(disks, Arc::clone(watch) as Arc<dyn copy::Progress>);
        match self.shown(watch, stop.unless_stopped(copying)).await {
            Some(outcome) => outcome.map_err(Failed::Copy),
            None => Err(Failed::Stopped),
        }
    }

    /// Verifies and publishes a draft that has everything.
    async fn finish(
        &self,
        ready: Ready,
        watch: &Arc<Watch>,
        stop: &mut Stop,
    ) -> Result<Point, Problem> {
        ready.close().await;
        let worker = Arc::clone(watch);
        let draft = ready.draft;
        let finishing = spawn_blocking(move || draft.finish(&*worker));
        let finishing = stop.telling(finishing, || watch.stop());
        joined(self.shown(watch, finishing).await)
    }

    /// Removes a draft that nobody can complete.
    async fn discard(&self, ready: Ready) -> Result<(), Problem> {
        joined(spawn_blocking(move || ready.draft.discard()).await)
    }

    /// Shows how far some work is until it is done.
    async fn shown<T>(&self, watch: &Watch, work: impl Future<Output = T>) -> T {
        let mut display = self.report.display(watch);
        let mut work = pin!(work);
        let outcome = loop {
            tokio::select! {
                biased;
                outcome = &mut work => break outcome,
                () = sleep(REDRAWN_AFTER) => display.show(watch),
            }
        };
        display.close(watch);
        outcome
    }

    /// Says what has come of it, and how to exit, by the points that there were before.
    fn finished(
        &self,
        before: &[Point],
        point: &Point,
        rows: &[Row],
        next: Option<Vec<(String, u64)>>,
    ) -> Done {
        let finished = Finished {
            command: "pull",
            folder: &self.args.to,
            point,
            rows,
            time: self.begun.elapsed(),
            is_committed: next.is_some(),
            next_bytes: next.unwrap_or_default(),
        };
        Done {
            text: self.report.finished(&finished),
            exit: self.exit(before, rows),
        }
    }

    /// Says what would be done.
    fn dry_run(&self, points: &[Point], rows: &[Row]) -> Done {
        self.report.plan(&self.args.to, None, rows);
        Done {
            text: self.report.nothing_done(),
            exit: self.exit(points, rows),
        }
    }

    /// How to exit when all is well: whoever has points of a disk and asks for no full, expects none.
    fn exit(&self, before: &[Point], rows: &[Row]) -> u8 {
        let is_surprise = |row: &Row| is_surprise(before, &row.disk, row.mode);
        if !self.args.full && rows.iter().any(is_surprise) {
            exit::FULL
        } else {
            0
        }
    }
}

impl Ready {
    /// Says goodbye to the servers.
    async fn close(&self) {
        for source in &self.sources {
            source.close().await;
        }
    }
}

/// What came of something on another thread.
fn joined<T>(outcome: Result<Result<T, ArchiveError>, JoinError>) -> Result<T, Problem> {
    match outcome {
        Ok(Err(ArchiveError::Stopped)) => Err(stopped()),
        Ok(outcome) => Ok(outcome?),
        Err(error) => Err(Problem::new(
            "internal",
            format!("a thread has ended early: {error}"),
        )),
    }
}

fn stopped() -> Problem {
    Problem::new("stopped", "stopped")
        .hint("run the same command again: it goes on with what is there")
}

/// The instant is lost. What the next one can begin from, the server says then.
fn broken(id: &str, reason: &str) -> Problem {
    let message = format!("backup {id} is broken: {reason}");
    Problem::broken(message).hint("it has been aborted: run the same command again")
}

fn source_problem(error: &SourceError) -> Problem {
    match error {
        SourceError::Unusable(failure) => failure.clone().into(),
        error => Problem::new("nbd", error_chain(error)),
    }
}

impl From<CopyError> for Problem {
    fn from(error: CopyError) -> Self {
        match error {
            CopyError::Source(_, error) => source_problem(&error),
            CopyError::Archive(error) => error.into(),
            CopyError::Thread(error) => Self::new("internal", error.to_string()),
        }
    }
}

/// Often enough for a bar that moves.
const REDRAWN_AFTER: Duration = Duration::from_millis(200);
