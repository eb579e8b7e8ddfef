//! The process that freezes, and thaws when it is told to or when its client is gone.
//!
//! It outlives its client by as long as a thaw takes. It has a session of its own, so what is typed
//! at the client's terminal does not reach it, and heeds no signal that can be heeded.

use std::io::{self, BufRead, Write};
use std::os::fd::AsFd;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};
use tokio::signal::unix::{SignalKind, signal};

use super::guest::Guest;
use super::wait::{Limit, Wait};
use super::{Held, Instance, Occasion, Trouble};
use crate::cli::problem::Problem;

/// The command by which this binary is one.
pub(in crate::cli) const COMMAND: &str = "hook-guardian";

/// The first line that it is told.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub(super) struct Plan {
    pub(super) freeze_hook: Option<String>,
    pub(super) thaw_hook: Option<String>,
    pub(super) guest_agent: Option<PathBuf>,
    pub(super) timeout_ms: u64,
    pub(super) occasion: Occasion,
}

/// The second one.
#[derive(Debug, Deserialize, Serialize)]
pub(super) enum Word {
    /// There is nothing more to wait for.
    Thaw(Instance),
}

/// What it says: once when the guest is frozen or has been given up, and then when it is thawed.
#[derive(Debug, Deserialize, Serialize)]
pub(super) enum Answer {
    /// The guest is quiet.
    Frozen { filesystems: Option<u64> },
    /// It is not, and whatever had been done to it has been undone.
    Failed(Trouble),
    /// It goes on.
    Thawed(Held),
}

impl Plan {
    pub(super) fn timeout(&self) -> Duration {
        Duration::from_millis(self.timeout_ms)
    }
}

/// Is the guardian of what standard input says.
pub(in crate::cli) fn guard() -> Result<(), Problem> {
    let failed =
        |error: io::Error| Problem::new("system", format!("cannot be a guardian: {error}"));
    // It fails for the leader of a group, which a child of the client never is.
    let _ = rustix::process::setsid();
    let _heedless = Heedless::new().map_err(failed)?;
    let plan = read_line().and_then(|line| serde_json::from_str(&line).ok());
    let Some(plan) = plan else {
        return Err(Problem::usage("this is for stillpoint itself"));
    };
    watch_over(&plan);
    Ok(())
}

fn watch_over(plan: &Plan) {
    let client = io::stdin();
    let mut guest = Guest::of(plan);
    let begun = Instant::now();
    let filesystems = match guest.freeze(Some(client.as_fd())) {
        Ok(filesystems) => filesystems,
        Err(trouble) => {
            let trouble = match guest.thaw(&Instance::Failed) {
                Ok(()) => trouble,
                Err(worse) => trouble.and(&worse),
            };
            return say(&Answer::Failed(trouble));
        }
    };
    say(&Answer::Frozen { filesystems });
    let patience = Limit::within(plan.timeout());
    let (instance, is_overdue) = match patience.readable(client.as_fd()) {
        Wait::Ready => (told(), false),
        Wait::Late | Wait::Abandoned => (Instance::Unknown, true),
    };
    let thawed = guest.thaw(&instance);
    let error = thawed.err().or_else(|| is_overdue.then(|| overdue(plan)));
    say(&Answer::Thawed(Held {
        time_us: u64::try_from(begun.elapsed().as_micros()).unwrap_or(u64::MAX),
        filesystems,
        error,
    }));
}

fn told() -> Instance {
    let word = read_line().and_then(|line| serde_json::from_str(&line).ok());
    word.map_or(Instance::Unknown, |Word::Thaw(instance)| instance)
}

fn overdue(plan: &Plan) -> Trouble {
    Trouble {
        code: "thawed-early".to_owned(),
        message: format!(
            "the instant took longer than {} ms, and the guest was thawed before it: what it has is \
             what a power cut would leave",
            plan.timeout_ms
        ),
        hint: Some("abort it and try again, or hold the guest longer: --hook-timeout".to_owned()),
    }
}

fn read_line() -> Option<String> {
    let mut line = String::new();
    io::stdin().lock().read_line(&mut line).ok()?;
    Some(line)
}

/// Nobody may listen any more, which changes nothing.
fn say(answer: &Answer) {
    let mut line = serde_json::to_string(answer).expect("texts and numbers");
    line.push('\n');
    let mut out = io::stdout().lock();
    let _ = out.write_all(line.as_bytes()).and_then(|()| out.flush());
}

/// A process that signals do not end: whoever stops a service signals all of its processes, and this
/// one has something left to do.
struct Heedless {
    _runtime: tokio::runtime::Runtime,
}

impl Heedless {
    fn new() -> io::Result<Self> {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()?;
        let entered = runtime.enter();
        for kind in [
            SignalKind::terminate(),
            SignalKind::interrupt(),
            SignalKind::hangup(),
            SignalKind::quit(),
        ] {
            // A handler stays for as long as the process lives.
            let _ = signal(kind)?;
        }
        drop(entered);
        Ok(Self { _runtime: runtime })
    }
}
