//! QEMU's guest agent, as far as its file systems go: `qemu-ga-ref`, one JSON object a line.
//!
//! The agent is at the other end of a serial line: it does not see clients come and go, and what it
//! says may be the answer to somebody who has left. So every conversation, and whatever follows
//! something that took too long, begins with `guest-sync-delimited`: the byte 0xFF makes either side
//! forget what it had read of a message, and only what follows an answer with our own number is ours.

use std::io::{self, ErrorKind, Read, Write};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, connect, socket_with};
use serde::Deserialize;
use serde_json::{Value, json};
use thiserror::Error;
use uuid::Uuid;

use super::wait::{Limit, Wait};

/// Why an agent did not do what it was asked.
#[derive(Debug, Error)]
pub(super) enum AgentError {
    /// Nobody can be asked.
    #[error("cannot be reached: {0}")]
    Unreachable(#[from] io::Error),
    /// It closed the connection.
    #[error("hung up")]
    HungUp,
    /// It did not answer in time.
    #[error("did not answer in time")]
    Late,
    /// Nobody waits for it any more.
    #[error("is waited for by nobody, as the command that it is for is gone")]
    Abandoned,
    /// It said no.
    #[error("refuses {command}: {reason}")]
    Refused {
        /// What it was asked.
        command: &'static str,
        /// Its own words.
        reason: String,
    },
    /// It said something else.
    #[error("answers {command} with what is no answer")]
    Nonsense {
        /// What it was asked.
        command: &'static str,
    },
}

/// What an agent says of its file systems.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Status {
    /// Some are frozen.
    Frozen,
    /// None is.
    Thawed,
}

/// What came of a thaw.
#[derive(Debug)]
pub(super) enum Thawed {
    /// So many file systems were frozen until now; `None` where that cannot be told any more.
    Now(Option<u64>),
    /// They had been thawed before, for a reason in words.
    Before(String),
}

/// A connection to an agent.
#[derive(Debug)]
pub(super) struct Agent {
    path: PathBuf,
    stream: Option<UnixStream>,
    /// What it said and nobody has looked at.
    unread: Vec<u8>,
}

#[derive(Deserialize)]
struct Message {
    #[serde(rename = "return")]
    value: Option<Value>,
    error: Option<Fault>,
}

#[derive(Deserialize)]
struct Fault {
    #[serde(default)]
    desc: String,
}

impl Agent {
    /// The agent behind the socket `path`, to which nobody has spoken yet.
    pub(super) fn at(path: &Path) -> Self {
        Self {
            path: path.to_path_buf(),
            stream: None,
            unread: Vec::new(),
        }
    }

    /// Whether its file systems are frozen.
    pub(super) fn status(&mut self, limit: &Limit<'_>) -> Result<Status, AgentError> {
        let command = "guest-fsfreeze-status";
        match self.ask(command, limit)?.as_str() {
            Some("frozen") => Ok(Status::Frozen),
            Some("thawed") => Ok(Status::Thawed),
            _ => Err(AgentError::Nonsense { command }),
        }
    }

    /// Freezes all of them that can be, and returns how many.
    pub(super) fn freeze(&mut self, limit: &Limit<'_>) -> Result<u64, AgentError> {
        self.ask_for_number("guest-fsfreeze-freeze", limit)
    }

    /// Thaws them, also when the agent has not yet answered something else; asks again for as long
    /// as the limit allows, over a new connection where the old one is gone.
    pub(super) fn thaw(&mut self, limit: &Limit<'_>) -> Result<Thawed, AgentError> {
        // What was thawed by a command that was not answered is counted by none that is.
        let mut is_first = true;
        loop {
            let error = match self.ask_for_number("guest-fsfreeze-thaw", limit) {
                Ok(count) => return Ok(Thawed::Now(Some(count).filter(|_| is_first))),
                Err(error) => error,
            };
            if let AgentError::Refused { reason, .. } = &error
                && let Ok(Status::Thawed) = self.status(limit)
            {
                let before = Thawed::Before(reason.clone());
                return Ok(if is_first { before } else { Thawed::Now(None) });
            }
            is_first &= matches!(error, AgentError::Refused { .. });
            if limit.pause() != Wait::Ready {
                return Err(error);
            }
        }
    }

    fn ask_for_number(
        &mut self,
        command: &'static str,
        limit: &Limit<'_>,
    ) -> Result<u64, AgentError> {
        let answer = self.ask(command, limit)?;
        answer.as_u64().ok_or(AgentError::Nonsense { command })
    }

    /// Says both at once, synchronization and command: so the command is on its way even if the answer
    /// to the former cannot be waited for.
    fn ask(&mut self, command: &'static str, limit: &Limit<'_>) -> Result<Value, AgentError> {
        let answer = self.exchange(command, limit);
        if matches!(
            answer,
            Err(AgentError::HungUp | AgentError::Unreachable(_) | AgentError::Nonsense { .. })
        ) {
            self.stream = None;
        }
        answer
    }

    fn exchange(&mut self, command: &'static str, limit: &Limit<'_>) -> Result<Value, AgentError> {
        if self.stream.is_none() {
            self.stream = Some(reach(&self.path, limit)?);
            self.unread.clear();
        }
        let number = u64::from(Uuid::new_v4().as_fields().0);
        let sync = json!({"execute": SYNC, "arguments": {"id": number}});
        let mut text = vec![SENTINEL];
        text.extend(format!("{sync}\n{}\n", json!({ "execute": command })).bytes());
        self.write(&text, limit)?;

        loop {
            self.skip_to_sentinel(limit)?;
            let line = self.line(SYNC, limit)?;
            let found = serde_json::from_slice::<Message>(&line).ok();
            let found = found.and_then(|message| message.value?.as_u64());
            if found == Some(number) {
                break;
            }
        }
        let line = self.line(command, limit)?;
        let nonsense = || AgentError::Nonsense { command };
        let message: Message = serde_json::from_slice(&line).map_err(|_| nonsense())?;
        if let Some(Fault { desc: reason }) = message.error {
            return Err(AgentError::Refused { command, reason });
        }
        message.value.ok_or_else(nonsense)
    }

    fn skip_to_sentinel(&mut self, limit: &Limit<'_>) -> Result<(), AgentError> {
        loop {
            match self.unread.iter().position(|byte| *byte == SENTINEL) {
                Some(at) => {
                    self.unread.drain(..=at);
                    return Ok(());
                }
                None => self.unread.clear(),
            }
            self.read(limit)?;
        }
    }

    /// The next line that is not empty. A sentinel within it makes a new beginning, as it does for
    /// the agent.
    fn line(&mut self, command: &'static str, limit: &Limit<'_>) -> Result<Vec<u8>, AgentError> {
        loop {
            if let Some(end) = self.unread.iter().position(|byte| *byte == b'\n') {
                let line: Vec<u8> = self.unread.drain(..=end).collect();
                let begin = line.iter().rposition(|byte| *byte == SENTINEL);
                let line = line[begin.map_or(0, |at| at + 1)..].trim_ascii();
                if !line.is_empty() {
                    return Ok(line.to_vec());
                }
            } else if self.unread.len() > LINE_MAX {
                return Err(AgentError::Nonsense { command });
            } else {
                self.read(limit)?;
            }
        }
    }

    fn read(&mut self, limit: &Limit<'_>) -> Result<(), AgentError> {
        let mut stream = self.stream.as_ref().ok_or(AgentError::HungUp)?;
        let mut buffer = [0; 4096];
        loop {
            match stream.read(&mut buffer) {
                Ok(0) => return Err(AgentError::HungUp),
                Ok(length) => {
                    self.unread.extend(&buffer[..length]);
                    return Ok(());
                }
                Err(error) => again(error, || limit.readable(stream.as_fd()))?,
            }
        }
    }

    fn write(&self, mut text: &[u8], limit: &Limit<'_>) -> Result<(), AgentError> {
        let mut stream = self.stream.as_ref().ok_or(AgentError::HungUp)?;
        while !text.is_empty() {
            match stream.write(text) {
                Ok(length) => text = &text[length..],
                Err(error) => again(error, || limit.writable(stream.as_fd()))?,
            }
        }
        Ok(())
    }
}

/// Connects. The queue of a socket at which nobody accepts is soon full, and a connection that
/// waits for room there would wait without a deadline: so none does.
fn reach(path: &Path, limit: &Limit<'_>) -> Result<UnixStream, AgentError> {
    let address = SocketAddrUnix::new(path).map_err(io::Error::from)?;
    loop {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None);
        let socket = socket.map_err(io::Error::from)?;
        match connect(&socket, &address) {
            Ok(()) => return Ok(UnixStream::from(socket)),
            Err(error) => again(error.into(), || limit.pause())?,
        }
    }
}

/// Whether something is to be tried again, which is `waited` for, or is over.
fn again(error: io::Error, wait: impl FnOnce() -> Wait) -> Result<(), AgentError> {
    match error.kind() {
        ErrorKind::Interrupted => Ok(()),
        ErrorKind::WouldBlock => match wait() {
            Wait::Ready => Ok(()),
            Wait::Late => Err(AgentError::Late),
            Wait::Abandoned => Err(AgentError::Abandoned),
        },
        ErrorKind::BrokenPipe | ErrorKind::ConnectionReset => Err(AgentError::HungUp),
        _ => Err(AgentError::Unreachable(error)),
    }
}

const SYNC: &str = "guest-sync-delimited";

/// No byte of any text in UTF-8.
const SENTINEL: u8 = 0xff;

/// Some times the longest answer to what is asked here.
const LINE_MAX: usize = 64 << 10;
