//! Kills a process at a system call of one's choice, slows it down or has it fail there.

use std::io::{BufRead as _, BufReader};
use std::path::Path;
use std::process::{ChildStderr, Command, Stdio};

use serde_json::Value;

use crate::Server;
use crate::process::KilledOnDrop;

/// What `strace` does to a server for as long as this lives.
#[derive(Debug)]
pub struct Killer {
    _strace: KilledOnDrop,
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
            _strace: strace,
            _told: told,
        }
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

/// A `strace` that kills what it runs, as above; a command is to follow.
pub fn killing(calls: &str, n: usize) -> Command {
    let mut command = Command::new("strace");
    command
        .args(["-f", "-o", "/dev/null", "-e", &format!("trace={calls}")])
        .args(["-e", &format!("inject={calls}:signal=KILL:when={n}")]);
    command
}
