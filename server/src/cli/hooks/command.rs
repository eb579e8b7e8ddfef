//! A command of whoever takes the instant, which is killed when it takes too long.

use std::io;
use std::os::fd::AsFd;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::process::{Child, Command, ExitStatus, Stdio};

use rustix::process::{Pid, PidfdFlags, Signal, kill_process_group, pidfd_open};
use thiserror::Error;

use super::wait::{Limit, Wait, ended};

/// Why a hook did not do what it is for.
#[derive(Debug, Error)]
pub(super) enum CommandError {
    /// It was not even begun.
    #[error("cannot be run: {0}")]
    Start(#[from] io::Error),
    /// It said so itself.
    #[error("failed with exit code {0}")]
    Failed(i32),
    /// Somebody ended it.
    #[error("was ended by signal {0}")]
    Killed(i32),
    /// It took too long.
    #[error("took too long and was killed")]
    Late,
    /// Nobody waits for it any more.
    #[error("was killed, as the command that it is for is gone")]
    Abandoned,
}

/// Runs `line` by a shell, with `environment` besides its own.
pub(super) fn run(
    line: &str,
    environment: &[(&'static str, String)],
    limit: &Limit<'_>,
) -> Result<(), CommandError> {
    let mut command = Command::new("/bin/sh");
    command.arg("-c").arg(line).stdin(Stdio::null());
    // What it prints is for people; our own output may be for a program.
    command.stdout(io::stderr().as_fd().try_clone_to_owned()?);
    for (name, value) in environment {
        command.env(name, value);
    }
    // A group, so that what it starts is killed with it.
    let mut child = command.process_group(0).spawn()?;
    let process = pidfd_open(Pid::from_child(&child), PidfdFlags::empty());
    let process = process.map_err(|error| kill(&child, error.into()))?;
    match ended(&process, limit) {
        Wait::Ready => judge(child.wait()?),
        Wait::Late => Err(kill(&child, CommandError::Late)),
        Wait::Abandoned => Err(kill(&child, CommandError::Abandoned)),
    }
}

impl From<rustix::io::Errno> for CommandError {
    fn from(error: rustix::io::Errno) -> Self {
        Self::Start(error.into())
    }
}

fn judge(status: ExitStatus) -> Result<(), CommandError> {
    match (status.code(), status.signal()) {
        (Some(0), _) => Ok(()),
        (Some(code), _) => Err(CommandError::Failed(code)),
        (None, signal) => Err(CommandError::Killed(signal.unwrap_or(0))),
    }
}

fn kill(child: &Child, why: CommandError) -> CommandError {
    // One that has just ended by itself is as good. Its end is not waited for: it may hang in a system
    // call, and the guest is to be thawed.
    let _ = kill_process_group(Pid::from_child(child), Signal::KILL);
    why
}
