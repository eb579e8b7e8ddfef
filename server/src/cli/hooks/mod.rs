//! A guest that is quiet around an instant: frozen before it, and thawed after it whatever happens.
//!
//! All of it is done by a child process, the [guardian](guardian): this process may be killed at any
//! moment, and the end of the pipe between the two is then what the guardian thaws upon.

pub(super) mod guardian;

mod agent;
mod command;
mod guest;
mod wait;

use std::io::{BufRead, BufReader, Write};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::time::{Duration, Instant};

use clap::Args;
use serde::{Deserialize, Serialize};

use super::NONE;
use super::client::{Client, parse};
use super::problem::Problem;
use super::units::{microseconds, parse_duration};
use guardian::{Answer, Plan, Word};
use guest::Guest;

use crate::control::answers::DiskAnswer;

/// What is done around the instant.
#[derive(Args, Debug)]
#[command(next_help_heading = "Around the instant")]
pub(super) struct HookArgs {
    /// Run this command, by `sh -c`, before the instant; if it fails, nothing is begun.
    #[arg(long, value_name = "CMD")]
    freeze_hook: Option<String>,
    /// Run this command, by `sh -c`, after the instant, whatever came of it.
    #[arg(long, value_name = "CMD")]
    thaw_hook: Option<String>,
    /// Have the QEMU guest agent behind this socket freeze the guest's file systems meanwhile.
    #[arg(long, value_name = "SOCKET")]
    guest_agent: Option<PathBuf>,
    /// How long each hook and each answer of the agent may take, and for how long the guest is held
    /// when the instant does not come.
    #[arg(long, value_name = "DURATION", default_value = "30s", value_parser = parse_duration)]
    hook_timeout: Duration,
}

/// What hooks are told of what they are run for.
#[derive(Clone, Debug, Default, Deserialize, Serialize)]
pub(super) struct Occasion {
    /// The command, such as `backup begin`.
    pub(super) command: String,
    /// Where the server is, unless it is somewhere else than behind a run directory.
    pub(super) run_dir: Option<PathBuf>,
    /// The disks of the instant.
    pub(super) disks: Vec<String>,
    /// The backup's id, as far as it is known.
    pub(super) backup: Option<String>,
    /// The checkpoint's name, as far as it is known.
    pub(super) checkpoint: Option<String>,
}

/// What came of an instant.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub(super) enum Instance {
    /// It was taken; of a backup with this id, if it is one.
    Taken(Option<String>),
    /// There is none.
    Failed,
    /// Whoever asked for it is gone.
    Unknown,
}

/// For how long the guest was held, and whether all went well.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub(super) struct Held {
    /// From the beginning of the freeze to the end of the thaw.
    #[serde(rename = "held_us")]
    pub(super) time_us: u64,
    /// How many file systems the guest agent froze.
    pub(super) filesystems: Option<u64>,
    /// What went wrong after the freeze; the instant stands in any case.
    pub(super) error: Option<Trouble>,
}

/// What went wrong.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub(super) struct Trouble {
    /// For scripts.
    pub(super) code: String,
    /// For people.
    pub(super) message: String,
    /// What to do about it.
    pub(super) hint: Option<String>,
}

impl HookArgs {
    /// Whether there is anything to do around an instant.
    pub(super) fn are_wanted(&self) -> bool {
        self.freeze_hook.is_some() || self.thaw_hook.is_some() || self.guest_agent.is_some()
    }

    /// What hooks are told of an instant of some disks of a server, or of all. Asked before anything
    /// is frozen, so that a server that is gone costs nobody's quiet.
    pub(super) fn occasion(
        &self,
        command: &str,
        client: &mut Client,
        disks: Option<&[String]>,
    ) -> Result<Occasion, Problem> {
        if !self.are_wanted() {
            return Ok(Occasion::default());
        }
        let disks = if let Some(disks) = disks {
            disks.to_vec()
        } else {
            let all: Vec<DiskAnswer> = parse(&client.execute("query-disks", &NONE)?)?;
            all.into_iter().map(|disk| disk.disk.to_string()).collect()
        };
        Ok(Occasion {
            command: command.to_owned(),
            run_dir: Some(client.run_dir().to_path_buf()),
            disks,
            ..Occasion::default()
        })
    }

    /// Freezes, takes an instant, thaws: whatever comes of either. The instant returns its answer and
    /// the id of the backup that it began, if it did.
    pub(super) fn around<T>(
        &self,
        occasion: Occasion,
        instant: impl FnOnce() -> Result<(T, Option<String>), Problem>,
    ) -> Result<(T, Option<Held>), Problem> {
        let quiet = self.freeze(occasion)?;
        match instant() {
            Ok((answer, backup)) => Ok((answer, quiet.thaw(&Instance::Taken(backup)))),
            Err(problem) => {
                quiet.thaw(&Instance::Failed);
                Err(problem)
            }
        }
    }

    /// Makes the guest quiet, until what is returned is thawed or dropped or this process ends.
    pub(super) fn freeze(&self, occasion: Occasion) -> Result<Quiet, Problem> {
        if !self.are_wanted() {
            return Ok(Quiet { guard: None });
        }
        let guard = Guard::begin(Plan {
            freeze_hook: self.freeze_hook.clone(),
            thaw_hook: self.thaw_hook.clone(),
            guest_agent: self.guest_agent.clone(),
            timeout_ms: u64::try_from(self.hook_timeout.as_millis()).unwrap_or(u64::MAX),
            occasion,
        })?;
        Ok(Quiet { guard: Some(guard) })
    }
}

/// A guest that is held, or one that need not be.
#[must_use = "the guest is held until it is thawed"]
pub(super) struct Quiet {
    guard: Option<Guard>,
}

impl Quiet {
    /// Thaws the guest, and says how it was held; `None` if nothing was asked for. What goes wrong is
    /// said on stderr at once: the guest may still stand still.
    pub(super) fn thaw(mut self, instance: &Instance) -> Option<Held> {
        let held = self.guard.take()?.thaw(instance);
        if let Some(trouble) = &held.error {
            let _ = Problem::from(trouble.clone()).report("thaw", false);
        }
        Some(held)
    }
}

struct Guard {
    child: Child,
    /// Closed, it is the guardian's word to thaw.
    words: Option<ChildStdin>,
    answers: BufReader<ChildStdout>,
    plan: Plan,
    since: Instant,
    filesystems: Option<u64>,
}

impl Guard {
    fn begin(plan: Plan) -> Result<Self, Problem> {
        let since = Instant::now();
        // The very binary that runs, also when another one has been installed over it meanwhile.
        let mut command = Command::new("/proc/self/exe");
        command.arg0("stillpoint").arg(guardian::COMMAND);
        command.stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut child = command
            .spawn()
            .map_err(|error| no_guardian(&format!("cannot be started: {error}")))?;
        let words = child.stdin.take();
        let answers = child.stdout.take().expect("asked for above");
        let mut guard = Self {
            child,
            words,
            answers: BufReader::new(answers),
            plan,
            since,
            filesystems: None,
        };
        let plan = guard.plan.clone();
        guard.say(&plan);
        match guard.listen() {
            Some(Answer::Frozen { filesystems }) => {
                guard.filesystems = filesystems;
                Ok(guard)
            }
            Some(Answer::Failed(trouble)) => Err(trouble.into()),
            Some(Answer::Thawed(_)) | None => {
                // Killed halfway, it may have left the guest anyhow.
                let gone = no_guardian("was killed");
                Err(match guard.thaw(&Instance::Failed).error {
                    None => gone.into(),
                    Some(worse) => gone.and(&worse).into(),
                })
            }
        }
    }

    fn thaw(mut self, instance: &Instance) -> Held {
        self.say(&Word::Thaw(instance.clone()));
        if let Some(Answer::Thawed(held)) = self.listen() {
            return held;
        }
        // It was killed: then this process does what it would have done.
        let mut guest = Guest::of(&self.plan);
        let error = guest.thaw_without_guardian(instance).err();
        Held {
            time_us: u64::try_from(self.since.elapsed().as_micros()).unwrap_or(u64::MAX),
            filesystems: self.filesystems,
            error,
        }
    }

    /// What cannot be said is noticed when no answer comes.
    fn say(&mut self, what: &impl Serialize) {
        let mut line = serde_json::to_string(what).expect("texts and numbers");
        line.push('\n');
        if let Some(words) = &mut self.words {
            let _ = words.write_all(line.as_bytes());
        }
    }

    fn listen(&mut self) -> Option<Answer> {
        let mut line = String::new();
        self.answers.read_line(&mut line).ok()?;
        serde_json::from_str(&line).ok()
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        self.words = None;
        // Thawed before this command ends, and before it says how it ended.
        let _ = self.child.wait();
    }
}

impl Held {
    /// For people.
    pub(super) fn text(&self) -> String {
        let systems = match self.filesystems {
            None => String::new(),
            Some(1) => ", 1 file system frozen".to_owned(),
            Some(count) => format!(", {count} file systems frozen"),
        };
        format!("guest held for {}{systems}\n", microseconds(self.time_us))
    }
}

impl From<Trouble> for Problem {
    fn from(trouble: Trouble) -> Self {
        let problem = Self::new(trouble.code, trouble.message);
        match trouble.hint {
            Some(hint) => problem.hint(hint),
            None => problem,
        }
    }
}

impl Occasion {
    /// What hooks find in their environment.
    fn environment(&self) -> Vec<(&'static str, String)> {
        let mut variables = vec![
            ("STILLPOINT_COMMAND", self.command.clone()),
            ("STILLPOINT_DISKS", self.disks.join(" ")),
        ];
        let run_dir = self.run_dir.as_deref().map(Path::display);
        for (name, value) in [
            ("STILLPOINT_RUN_DIR", run_dir.map(|dir| dir.to_string())),
            ("STILLPOINT_BACKUP", self.backup.clone()),
            ("STILLPOINT_CHECKPOINT", self.checkpoint.clone()),
        ] {
            variables.extend(value.map(|value| (name, value)));
        }
        variables
    }
}

fn no_guardian(why: &str) -> Trouble {
    Trouble {
        code: "freeze-failed".to_owned(),
        message: format!("the process that is to thaw the guest {why}"),
        hint: Some("nothing was begun".to_owned()),
    }
}
