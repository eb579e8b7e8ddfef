//! A guest agent by the letter of QEMU's document, on a socket, with file systems that are a flag.
//!
//! Like the real one it is at the end of a serial line: it reads bytes, not connections. A byte 0xFF
//! makes it forget what it has read of an object, about which it complains; what it says before it is
//! asked to synchronize may be anything.

use std::fs::{File, OpenOptions};
use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::mpsc::{self, Receiver, Sender};
use std::thread;

use serde_json::{Value, json};

use crate::process::PATIENCE;

/// In what an agent is different from one that works.
#[derive(Clone, Debug, Default)]
pub struct Manners {
    /// How many file systems it has that can be frozen.
    pub filesystems: u64,
    /// They are frozen already.
    pub is_frozen: bool,
    /// What it says as soon as somebody connects.
    pub stale: Vec<u8>,
    /// It says what it says byte by byte.
    pub dribbles: bool,
    /// How it answers to the freeze.
    pub freeze: Manner,
    /// How it answers to the first thaws, one after the other; to those that follow as it should.
    pub thaws: Vec<Manner>,
}

/// How a command is answered.
#[derive(Clone, Debug, Default)]
pub enum Manner {
    /// It is carried out.
    #[default]
    Good,
    /// It is not, with this reason.
    Refused(&'static str),
    /// It is carried out, and the connection closed without an answer.
    HangsUp,
    /// It is carried out, and answered with this number.
    Says(u64),
    /// It is carried out when the next command comes, and answered before that.
    Late,
    /// The file systems are thawed by themselves, and it is refused with this reason.
    ThawedAlone(&'static str),
    /// It is never answered, nor is anything else.
    Silent,
}

/// An agent that runs; its thread ends with the last of its connections after it is dropped.
#[derive(Debug)]
pub struct GuestAgent {
    path: PathBuf,
    carried_out: Receiver<String>,
}

impl GuestAgent {
    /// Starts one on a socket of this path. Whatever it carries out is appended to `log`, after
    /// `witness` has said what there is to say of that moment.
    pub fn start(
        path: &Path,
        manners: Manners,
        log: &Path,
        witness: impl Fn() -> String + Send + 'static,
    ) -> Self {
        let listener = UnixListener::bind(path).expect("a socket in a directory of the test");
        let log = OpenOptions::new().create(true).append(true).open(log);
        let (tell, carried_out) = mpsc::channel();
        let agent = Agent {
            is_frozen: manners.is_frozen,
            manners,
            frozen: 0,
            postponed: None,
            log: log.expect("a file of the test"),
            tell,
            witness: Box::new(witness),
        };
        thread::spawn(move || agent.serve(&listener));
        Self {
            path: path.to_path_buf(),
            carried_out,
        }
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Waits until it carries out this command; `COMMAND asked` is one that it will.
    #[track_caller]
    pub fn wait_for(&self, command: &str) {
        loop {
            match self.carried_out.recv_timeout(PATIENCE) {
                Ok(found) if found == command => return,
                Ok(_) => {}
                Err(error) => panic!("no {command}: {error}"),
            }
        }
    }

    /// The commands that it has carried out since the last time.
    pub fn carried_out(&self) -> Vec<String> {
        self.carried_out.try_iter().collect()
    }
}

struct Agent {
    manners: Manners,
    is_frozen: bool,
    /// How many file systems the last freeze froze.
    frozen: u64,
    postponed: Option<&'static str>,
    log: File,
    tell: Sender<String>,
    witness: Box<dyn Fn() -> String + Send>,
}

/// What follows an answer.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Next {
    Listen,
    HangUp,
    Silence,
}

impl Agent {
    fn serve(mut self, listener: &UnixListener) {
        while let Ok((stream, _)) = listener.accept() {
            self.talk(&stream);
        }
    }

    fn talk(&mut self, mut stream: &UnixStream) {
        let stale = self.manners.stale.clone();
        self.say(stream, &stale);
        let mut object = Vec::new();
        let mut byte = [0];
        while let Ok(1) = stream.read(&mut byte) {
            match byte[0] {
                0xff => {
                    object.clear();
                    self.say(stream, &line(&error("JSON parse error, stray 'ÿ'")));
                }
                b'\n' => {
                    let Ok(request) = serde_json::from_slice::<Value>(&object) else {
                        continue;
                    };
                    object.clear();
                    match self.answer(stream, &request) {
                        Next::Listen => {}
                        Next::HangUp => return,
                        // Read on and say nothing, until the other side has gone.
                        Next::Silence => while let Ok(1) = stream.read(&mut byte) {},
                    }
                }
                other => object.push(other),
            }
        }
    }

    fn answer(&mut self, stream: &UnixStream, request: &Value) -> Next {
        if let Some(command) = self.postponed.take() {
            let answer = self.carry_out(command);
            self.say(stream, &line(&answer));
        }
        let command = request["execute"].as_str().unwrap_or_default();
        match command {
            "guest-sync-delimited" => {
                let answer = json!({"return": request["arguments"]["id"]});
                self.say(stream, &[&[0xff], &line(&answer)[..]].concat());
                return Next::Listen;
            }
            "guest-fsfreeze-status" => {
                let status = if self.is_frozen { "frozen" } else { "thawed" };
                self.say(stream, &line(&json!({ "return": status })));
                return Next::Listen;
            }
            _ => {}
        }
        let (command, manner) = match command {
            "guest-fsfreeze-freeze" if !self.is_frozen => {
                ("guest-fsfreeze-freeze", self.manners.freeze.clone())
            }
            "guest-fsfreeze-thaw" if self.manners.thaws.is_empty() => {
                ("guest-fsfreeze-thaw", Manner::Good)
            }
            "guest-fsfreeze-thaw" => ("guest-fsfreeze-thaw", self.manners.thaws.remove(0)),
            other => {
                let disabled = format!(
                    "Command {other} has been disabled: the command is not allowed while frozen"
                );
                self.say(stream, &line(&error(&disabled)));
                return Next::Listen;
            }
        };
        let answer = match manner {
            Manner::Good => self.carry_out(command),
            Manner::Refused(reason) => error(reason),
            Manner::HangsUp => {
                self.carry_out(command);
                return Next::HangUp;
            }
            Manner::Says(number) => {
                self.carry_out(command);
                json!({ "return": number })
            }
            Manner::Late => {
                let _ = self.tell.send(format!("{command} asked"));
                self.postponed = Some(command);
                return Next::Listen;
            }
            Manner::ThawedAlone(reason) => {
                self.is_frozen = false;
                error(reason)
            }
            Manner::Silent => return Next::Silence,
        };
        self.say(stream, &line(&answer));
        Next::Listen
    }

    fn carry_out(&mut self, command: &'static str) -> Value {
        let count = if command == "guest-fsfreeze-freeze" {
            self.frozen = self.manners.filesystems;
            // One that has frozen nothing is not frozen.
            self.is_frozen = self.frozen > 0;
            self.frozen
        } else {
            self.is_frozen = false;
            std::mem::take(&mut self.frozen)
        };
        let seen = (self.witness)();
        writeln!(self.log, "{command} {seen}").expect("the log of the test");
        // Whoever started it may look no more.
        let _ = self.tell.send(command.to_owned());
        json!({ "return": count })
    }

    /// To somebody who may have gone.
    fn say(&self, mut stream: &UnixStream, text: &[u8]) {
        let step = if self.manners.dribbles {
            1
        } else {
            text.len().max(1)
        };
        for piece in text.chunks(step) {
            let _ = stream.write_all(piece);
        }
    }
}

fn error(reason: &str) -> Value {
    json!({"error": {"class": "GenericError", "desc": reason}})
}

fn line(value: &Value) -> Vec<u8> {
    format!("{value}\n").into_bytes()
}
