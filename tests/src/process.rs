//! Running programs, and saying well what went wrong.

use std::os::unix::process::ExitStatusExt;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};
use std::{fmt, fs};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fd::{AsFd, BorrowedFd};
use rustix::process::{Pid, PidfdFlags, Signal, kill_process, pidfd_open, pidfd_send_signal};
use serde_json::Value;

/// Longer than anything here takes on a slow machine; whoever runs into it hangs.
pub const PATIENCE: Duration = Duration::from_secs(120);

/// What a program printed, and how it ended.
#[derive(Clone, Debug)]
pub struct Output {
    /// The command line, for messages.
    pub line: String,
    /// How it ended.
    pub status: ExitStatus,
    /// What it printed.
    pub stdout: String,
    /// What it complained of.
    pub stderr: String,
}

impl Output {
    /// Its exit code; a signal counts as 128 and its number, as in a shell.
    pub fn code(&self) -> i32 {
        self.status
            .code()
            .unwrap_or_else(|| 128 + self.status.signal().unwrap_or(0))
    }

    /// What it printed, if it succeeded.
    #[track_caller]
    pub fn ok(&self) -> &str {
        self.exits(0);
        &self.stdout
    }

    /// What it printed as one JSON document, if it succeeded.
    #[track_caller]
    pub fn json(&self) -> Value {
        self.ok();
        serde_json::from_str(&self.stdout)
            .unwrap_or_else(|error| panic!("no JSON on stdout: {error}\n{self}"))
    }

    /// Itself, if it ended with this exit code.
    #[track_caller]
    pub fn exits(&self, code: i32) -> &Self {
        assert_eq!(
            self.code(),
            code,
            "exit code {} instead of {code}\n{self}",
            self.code()
        );
        self
    }

    /// Sees that a `stillpoint` command with `--json` failed with the exit code 1, this code, and a message
    /// that says so.
    #[track_caller]
    pub fn fails_with(&self, code: &str, saying: &str) {
        let told: Value = serde_json::from_str(&self.exits(1).stdout)
            .unwrap_or_else(|error| panic!("no JSON on stdout: {error}\n{self}"));
        assert_eq!(told["error"]["code"], code, "{self}");
        let message = told["error"]["message"].as_str().unwrap_or_default();
        assert!(message.contains(saying), "nothing about {saying:?}\n{self}");
    }

    /// The error of a `stillpoint` command that failed with this exit code: one line, and perhaps
    /// a hint. Returns what follows `stillpoint: error: `.
    #[track_caller]
    pub fn error(&self, code: i32) -> &str {
        self.exits(code);
        let mut lines = self.stderr.lines();
        let first = lines.next().unwrap_or("");
        let Some(error) = first.strip_prefix("stillpoint: error: ") else {
            panic!("stderr does not start with `stillpoint: error: `\n{self}");
        };
        assert!(error.contains(": "), "an error says WHAT: WHY\n{self}");
        let rest: Vec<_> = lines.collect();
        assert!(
            rest.len() <= 1
                && rest
                    .iter()
                    .all(|line| line.trim_start().starts_with("hint: ")),
            "an error is one line and perhaps a hint\n{self}"
        );
        error
    }
}

impl Output {
    /// A refusal of what was typed: an error as any other, or a usage error with exit code 2,
    /// that says this.
    #[track_caller]
    pub fn refused(&self, saying: &str) {
        if self.code() == 2 {
            assert!(
                self.stderr.contains("error: "),
                "no error on stderr\n{self}"
            );
        } else {
            self.error(1);
        }
        assert!(
            self.stderr.contains(saying),
            "nothing about {saying:?}\n{self}"
        );
    }
}

impl fmt::Display for Output {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "$ {}\n{}\n", self.line, self.status)?;
        write!(
            f,
            "--- stdout\n{}\n--- stderr\n{}\n---",
            self.stdout, self.stderr
        )
    }
}

/// Runs a program to its end. One that hangs is killed and fails with exit code 124.
pub fn run(command: &mut Command) -> Output {
    run_at_most(command, PATIENCE)
}

/// Runs a program for so long at most.
pub fn run_at_most(command: &mut Command, patience: Duration) -> Output {
    let mut limited = Command::new("timeout");
    limited
        .arg("--kill-after=5")
        .arg(patience.as_secs().to_string());
    limited
        .arg(command.get_program())
        .args(command.get_args())
        .stdin(Stdio::null());
    for (name, value) in command.get_envs() {
        match value {
            Some(value) => limited.env(name, value),
            None => limited.env_remove(name),
        };
    }
    if let Some(directory) = command.get_current_dir() {
        limited.current_dir(directory);
    }
    let line = line(command);
    let output = limited
        .output()
        .unwrap_or_else(|error| panic!("timeout {line}: {error}"));
    Output {
        line,
        status: output.status,
        stdout: String::from_utf8_lossy(&output.stdout).into_owned(),
        stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
    }
}

/// The command as one would type it, nearly.
pub fn line(command: &Command) -> String {
    let words: Vec<_> = std::iter::once(command.get_program())
        .chain(command.get_args())
        .map(|word| word.to_string_lossy().into_owned())
        .collect();
    words.join(" ")
}

/// Sends a signal to a process that we started.
pub fn signal(child: &Child, signal: Signal) {
    kill_process(pid(child), signal).expect("our own child, not yet waited for");
}

/// Waits for the end of a process, but not for ever.
pub fn wait(child: &mut Child) -> Option<ExitStatus> {
    wait_at_most(child, PATIENCE)
}

/// Waits for the end of a process for so long.
pub fn wait_at_most(child: &mut Child, patience: Duration) -> Option<ExitStatus> {
    match readable_or_ended(None, child, patience) {
        Woken::Ended => Some(child.wait().expect("our own child")),
        Woken::Readable => unreachable!("nothing to read was given"),
        Woken::TimedOut => None,
    }
}

/// Why a wait ended.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Woken {
    /// There is something to read.
    Readable,
    /// The process has ended.
    Ended,
    /// Neither came in time.
    TimedOut,
}

/// Waits until there is something to read, or the process has ended.
pub fn readable_or_ended(
    readable: Option<BorrowedFd<'_>>,
    child: &Child,
    patience: Duration,
) -> Woken {
    let process = pidfd_open(pid(child), PidfdFlags::empty()).expect("our own child");
    let deadline = Instant::now() + patience;
    loop {
        let mut fds = vec![PollFd::from_borrowed_fd(process.as_fd(), PollFlags::IN)];
        fds.extend(readable.map(|fd| PollFd::from_borrowed_fd(fd, PollFlags::IN)));
        let left = deadline.saturating_duration_since(Instant::now());
        let left = Timespec::try_from(left).expect("a short time");
        match poll(&mut fds, Some(&left)) {
            Err(rustix::io::Errno::INTR) => {}
            Err(error) => panic!("poll: {error}"),
            Ok(0) => return Woken::TimedOut,
            Ok(_) if fds.get(1).is_some_and(|fd| !fd.revents().is_empty()) => {
                return Woken::Readable;
            }
            Ok(_) => return Woken::Ended,
        }
    }
}

fn pid(child: &Child) -> Pid {
    Pid::from_child(child)
}

/// A process that does not outlive the test that started it.
#[derive(Debug)]
pub struct KilledOnDrop {
    /// The process.
    pub child: Child,
    line: String,
}

impl KilledOnDrop {
    /// Starts it.
    #[track_caller]
    pub fn spawn(command: &mut Command) -> Self {
        let line = line(command);
        let child = command
            .spawn()
            .unwrap_or_else(|error| panic!("{line}: {error}"));
        Self { child, line }
    }

    /// Waits until it has made something readable.
    #[track_caller]
    pub fn wait_until_readable(&mut self, readable: &impl AsFd) {
        match readable_or_ended(Some(readable.as_fd()), &self.child, PATIENCE) {
            Woken::Readable => {}
            other => panic!("{}: {other:?} before it was ready", self.line),
        }
    }
}

impl Drop for KilledOnDrop {
    fn drop(&mut self) {
        // It may have ended by itself, which is as good.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A daemon, not our child, that does not outlive the test that started it.
#[derive(Debug)]
pub struct EndedOnDrop(pub i32);

impl Drop for EndedOnDrop {
    fn drop(&mut self) {
        let pid = Pid::from_raw(self.0).expect("a process id is not zero");
        let Ok(process) = pidfd_open(pid, PidfdFlags::empty()) else {
            return;
        };
        let second = Timespec::try_from(Duration::from_secs(1)).expect("a short time");
        let begun = Instant::now();
        while begun.elapsed() < PATIENCE {
            // It may have ended by itself, which is as good; and a qemu-nbd that has only just begun forgets it.
            let _ = pidfd_send_signal(&process, Signal::TERM);
            let ended = poll(&mut [PollFd::new(&process, PollFlags::IN)], Some(&second));
            if ended != Ok(0) {
                return;
            }
        }
        let _ = pidfd_send_signal(&process, Signal::KILL);
    }
}

/// Returns when a thread of the process waits in the kernel for something that cannot be interrupted.
#[track_caller]
pub fn wait_until_blocked(pid: u32) {
    let begun = Instant::now();
    while begun.elapsed() < PATIENCE {
        let tasks = fs::read_dir(format!("/proc/{pid}/task")).expect("the server runs");
        let mut states = tasks.flatten().filter_map(|task| {
            let stat = fs::read_to_string(task.path().join("stat")).ok()?;
            stat.rsplit(") ").next()?.chars().next()
        });
        if states.any(|state| state == 'D') {
            return;
        }
        std::thread::yield_now();
    }
    panic!("no thread waits for the storage");
}
