//! Kills a process at a system call of one's choice.

use std::io::{BufRead as _, BufReader};
use std::process::{ChildStderr, Command, Stdio};

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
        let mut strace = killing(calls, n);
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

/// A `strace` that kills what it runs, as above; a command is to follow.
pub fn killing(calls: &str, n: usize) -> Command {
    let mut command = Command::new("strace");
    command
        .args(["-f", "-o", "/dev/null", "-e", &format!("trace={calls}")])
        .args(["-e", &format!("inject={calls}:signal=KILL:when={n}")]);
    command
}
