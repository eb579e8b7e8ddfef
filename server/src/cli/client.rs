//! A client of the control socket, which waits for each answer.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use serde::de::{DeserializeOwned, IgnoredAny};
use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;

use super::problem::Problem;
use crate::control::SOCKET;
use crate::control::messages::Fault;

/// A connection that is ready for commands.
pub(super) struct Client {
    stream: BufReader<UnixStream>,
    path: PathBuf,
}

#[derive(Serialize)]
struct Request<'a, A> {
    execute: &'a str,
    arguments: &'a A,
}

#[derive(Deserialize)]
struct Message {
    #[serde(rename = "QMP")]
    greeting: Option<IgnoredAny>,
    event: Option<IgnoredAny>,
    #[serde(rename = "return")]
    value: Option<Box<RawValue>>,
    error: Option<Fault>,
}

impl Client {
    /// Connects to the server of this run directory.
    pub(super) fn connect(run_dir: &Path) -> Result<Self, Problem> {
        Self::greet(run_dir, GREETING_MAX)
    }

    /// The same, as soon as there is one, but within `patience`.
    pub(super) fn wait_for(run_dir: &Path, patience: Duration) -> Result<Self, Problem> {
        let begun = Instant::now();
        loop {
            let left = patience.saturating_sub(begun.elapsed());
            match Self::greet(run_dir, left.clamp(INTERVAL, GREETING_MAX)) {
                Err(problem) if problem.code() == NO_SERVER && begun.elapsed() < patience => {
                    std::thread::sleep(INTERVAL.min(patience.saturating_sub(begun.elapsed())));
                }
                end => return end,
            }
        }
    }

    fn greet(run_dir: &Path, patience: Duration) -> Result<Self, Problem> {
        let path = run_dir.join(SOCKET);
        let stream = UnixStream::connect(&path).map_err(|error| no_server(&path, &error))?;
        let mut client = Self {
            stream: BufReader::new(stream),
            path,
        };
        client.limit(Some(patience))?;
        let first = client.receive()?;
        if let Some(fault) = first.error {
            return Err(fault.into());
        }
        if first.greeting.is_none() {
            return Err(client.nonsense("no greeting"));
        }
        client.execute("qmp_capabilities", &super::NONE)?;
        // A command takes as long as it takes.
        client.limit(None)?;
        Ok(client)
    }

    /// Where its server's sockets are.
    pub(super) fn run_dir(&self) -> &Path {
        self.path.parent().unwrap_or(&self.path)
    }

    /// Executes a command and returns its answer as it came.
    pub(super) fn execute(
        &mut self,
        execute: &str,
        arguments: &impl Serialize,
    ) -> Result<Box<RawValue>, Problem> {
        let request = Request { execute, arguments };
        let request = serde_json::to_string(&request).expect("arguments are texts");
        self.exchange(request)
    }

    /// The same for a command that is JSON already.
    pub(super) fn execute_raw(&mut self, request: &RawValue) -> Result<Box<RawValue>, Problem> {
        self.exchange(request.get().to_owned())
    }

    fn exchange(&mut self, mut request: String) -> Result<Box<RawValue>, Problem> {
        request.push('\n');
        let sent = self.stream.get_mut().write_all(request.as_bytes());
        // The server may have hung up and said why.
        let answer = self.answer();
        match (answer, sent) {
            (Err(problem), Err(error)) if problem.code() == NO_SERVER => {
                Err(no_server(&self.path, &error))
            }
            (answer, _) => answer,
        }
    }

    fn answer(&mut self) -> Result<Box<RawValue>, Problem> {
        loop {
            let message = self.receive()?;
            if let Some(fault) = message.error {
                return Err(fault.into());
            }
            if let Some(value) = message.value {
                return Ok(value);
            }
            if message.event.is_none() {
                return Err(self.nonsense("neither an answer nor an event"));
            }
        }
    }

    fn receive(&mut self) -> Result<Message, Problem> {
        let mut line = Vec::new();
        let read = self
            .stream
            .by_ref()
            .take(ANSWER_MAX)
            .read_until(b'\n', &mut line);
        match read {
            Ok(0) => Err(no_server(&self.path, &io::ErrorKind::UnexpectedEof.into())),
            Ok(_) => serde_json::from_slice(&line).map_err(|error| self.nonsense(error)),
            Err(error) => Err(no_server(&self.path, &error)),
        }
    }

    fn limit(&mut self, patience: Option<Duration>) -> Result<(), Problem> {
        let stream = self.stream.get_ref();
        stream
            .set_read_timeout(patience)
            .and_then(|()| stream.set_write_timeout(patience))
            .map_err(|error| no_server(&self.path, &error))
    }

    fn nonsense(&self, what: impl std::fmt::Display) -> Problem {
        let message = format!(
            "what answers on '{}' is no stillpoint server: {what}",
            self.path.display()
        );
        Problem::new("bad-server", message)
    }
}

/// Reads an answer.
pub(super) fn parse<T: DeserializeOwned>(answer: &RawValue) -> Result<T, Problem> {
    serde_json::from_str(answer.get()).map_err(|error| {
        let problem = Problem::new(
            "bad-server",
            format!("the answer is not understood: {error}"),
        );
        problem.hint("is the server of another version? --json prints the answer as it came")
    })
}

fn no_server(path: &Path, error: &io::Error) -> Problem {
    let why = match error.kind() {
        io::ErrorKind::UnexpectedEof | io::ErrorKind::BrokenPipe => "it hung up".to_owned(),
        io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut => "it says nothing".to_owned(),
        _ => error.to_string(),
    };
    let message = format!("no server answers on '{}': {why}", path.display());
    if error.kind() == io::ErrorKind::PermissionDenied {
        return Problem::new("not-permitted", message)
            .hint("the server decides who may connect: see --socket-mode and --socket-group");
    }
    let run_dir = path.parent().unwrap_or(path).display();
    Problem::new(NO_SERVER, message).hint(format!(
        "start one with: stillpoint serve --run-dir {run_dir} --disk NAME=PATH"
    ))
}

const NO_SERVER: &str = "no-server";

/// A server that is alive greets at once, whatever its disks do.
const GREETING_MAX: Duration = Duration::from_secs(10);

/// Between two attempts to connect: soon enough for scripts, rare enough to cost nothing.
const INTERVAL: Duration = Duration::from_millis(50);

/// Hundreds of thousands of checkpoints.
const ANSWER_MAX: u64 = 256 << 20;
