//! Kills a process at a system call of one's choice, stops it, slows it down or has it fail there.

use std::fs;
use std::io::{BufRead as _, BufReader, Read as _};
use std::path::Path;
use std::process::{ChildStderr, Command, Stdio};

use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;

use crate::process::{self, KilledOnDrop, Output, line, wait};
use crate::{Server, tools};

/// What `strace` does to a server for as long as this lives.
#[derive(Debug)]
pub struct Killer {
    strace: KilledOnDrop,
    _told: BufReader<ChildStderr>,
}

impl Killer {
    /// Kills the server when one of its threads makes one of these calls for the `n`th time.
    #[track_caller]
    pub fn of(server: &Server, calls: &str, n: usize) -> Self {
        Self::attach(server, killing(calls, n))
    }

    /// Has the server make such calls for the file at `path` so many microseconds late.
    #[track_caller]
    pub fn slowing(server: &Server, calls: &str, path: &Path, late_us: u32) -> Self {
        Self::at(server, calls, path, &format!("delay_enter={late_us}"))
    }

    /// Has such calls for the file at `path` fail with EIO.
    #[track_caller]
    pub fn failing(server: &Server, calls: &str, path: &Path) -> Self {
        Self::at(server, calls, path, "error=EIO")
    }

    #[track_caller]
    fn at(server: &Server, calls: &str, path: &Path, effect: &str) -> Self {
        let mut strace = Command::new("strace");
        strace
            .args([
                "-f",
                "-o",
                "/dev/null",
                "-e",
                &format!("trace={calls}"),
                "-P",
            ])
            .arg(path)
            .args(["-e", &format!("inject={calls}:{effect}")]);
        Self::attach(server, strace)
    }

    #[track_caller]
    fn attach(server: &Server, mut strace: Command) -> Self {
        strace.arg(format!("--attach={}", server.pid()));
        let mut strace = KilledOnDrop::spawn(strace.stderr(Stdio::piped()));
        let told = strace.child.stderr.take().expect("it was asked for");
        let mut told = BufReader::new(told);
        let mut line = String::new();
        while !line.contains("attached") {
            line.clear();
            let length = told.read_line(&mut line).expect("what strace says");
            assert!(length > 0, "strace ended");
        }
        Self {
            strace,
            _told: told,
        }
    }

    /// Leaves the server alone: from here on it is killed, if perhaps not yet ended, or goes on.
    pub fn detach(mut self) {
        process::signal(&self.strace.child, Signal::INT);
        wait(&mut self.strace.child).expect("strace ends");
    }
}

/// Executes a command in a server that is killed at the `n`th of its `calls`, or else afterwards;
/// whether it answered.
#[track_caller]
pub fn execute_and_die(server: &mut Server, command: &Value, calls: &str, n: usize) -> bool {
    let answered = {
        let mut qmp = server.qmp();
        let _killer = Killer::of(server, calls, n);
        qmp.try_send(command.to_string().as_bytes())
            .expect("the server reads it");
        qmp.receive().is_some()
    };
    if answered {
        server.kill();
    } else {
        server.wait();
    }
    answered
}

/// Runs a command that is stopped when one of its threads has made a `call` about `path` for the `n`th time,
/// and goes on when `then` is done.
#[track_caller]
pub fn stopped_at(
    command: &Command,
    call: &str,
    path: &Path,
    n: usize,
    then: impl FnOnce(),
) -> Output {
    let mut strace = Command::new("strace");
    strace
        .args([
            "-f",
            "-P",
            tools::path(path),
            "-e",
            &format!("trace={call}"),
        ])
        .args(["-e", &format!("inject={call}:signal=STOP:when={n}")])
        .arg(command.get_program())
        .args(command.get_args());
    strace.stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut strace = KilledOnDrop::spawn(&mut strace);
    let mut told = BufReader::new(strace.child.stderr.take().expect("it was asked for"));
    let mut stderr = String::new();
    while !stderr.contains("--- stopped by SIGSTOP ---") {
        let length = told.read_line(&mut stderr).expect("what strace says");
        assert!(length > 0, "no {call} {n} of {}: {stderr}", path.display());
    }
    then();
    let traced = traced_by(strace.child.id());
    kill_process(traced, Signal::CONT).expect("it is stopped");
    told.read_to_string(&mut stderr).expect("what strace says");
    let status = wait(&mut strace.child).expect("an end");
    let mut stdout = String::new();
    let mut printed = strace.child.stdout.take().expect("it was asked for");
    printed.read_to_string(&mut stdout).expect("it is text");
    Output {
        line: line(command),
        status,
        stdout,
        stderr,
    }
}

/// What the `strace` of this process id has run.
pub fn traced_by(strace: u32) -> Pid {
    let children = fs::read_to_string(format!("/proc/{strace}/task/{strace}/children"));
    let children = children.expect("strace runs");
    let child = children.split_whitespace().next().expect("a child");
    Pid::from_raw(child.parse().expect("a process id")).expect("not zero")
}

/// A `strace` that kills what it runs, as above; a command is to follow.
pub fn killing(calls: &str, n: usize) -> Command {
    let mut command = Command::new("strace");
    command
        .args(["-f", "-o", "/dev/null", "-e", &format!("trace={calls}")])
        .args(["-e", &format!("inject={calls}:signal=KILL:when={n}")]);
    command
}
