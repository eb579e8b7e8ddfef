//! A client of the control socket.

use std::collections::VecDeque;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;

use serde_json::{Value, json};

use crate::process::PATIENCE;

/// A connection to the control socket.
#[derive(Debug)]
pub struct Qmp {
    stream: BufReader<UnixStream>,
    greeting: Value,
    events: VecDeque<Value>,
}

impl Qmp {
    /// Connects, reads the greeting and leaves the negotiation of capabilities behind.
    #[track_caller]
    pub fn connect(path: &Path) -> Self {
        let mut qmp = Self::connect_silently(path);
        qmp.execute("qmp_capabilities", &json!({}));
        qmp
    }

    /// Connects and reads the greeting.
    #[track_caller]
    pub fn connect_silently(path: &Path) -> Self {
        let stream = UnixStream::connect(path)
            .unwrap_or_else(|error| panic!("cannot connect to {}: {error}", path.display()));
        // A server that does not answer is a failure, not a hang.
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream.set_write_timeout(Some(PATIENCE)).unwrap();
        let stream = BufReader::new(stream);
        let mut qmp = Self {
            stream,
            greeting: Value::Null,
            events: VecDeque::new(),
        };
        qmp.greeting = qmp.receive().expect("a greeting");
        qmp
    }

    /// What the server said first.
    pub fn greeting(&self) -> &Value {
        &self.greeting
    }

    /// Executes a command that succeeds.
    #[track_caller]
    pub fn execute(&mut self, command: &str, arguments: &Value) -> Value {
        self.try_execute(command, arguments)
            .unwrap_or_else(|error| panic!("{command} {arguments}: {error}"))
    }

    /// Executes a command that may fail; the error is its text.
    #[track_caller]
    pub fn try_execute(&mut self, command: &str, arguments: &Value) -> Result<Value, String> {
        let request = json!({"execute": command, "arguments": arguments});
        self.send(request.to_string().as_bytes());
        let mut reply = self.reply();
        if let Some(error) = reply.get("error") {
            return Err(error["desc"]
                .as_str()
                .expect("an error has a text")
                .to_owned());
        }
        assert!(
            reply.get("return").is_some(),
            "neither return nor error: {reply}"
        );
        Ok(reply["return"].take())
    }

    /// Sends bytes.
    #[track_caller]
    pub fn send(&mut self, bytes: &[u8]) {
        self.stream
            .get_mut()
            .write_all(bytes)
            .expect("the server reads commands");
    }

    /// Sends bytes to a server that may have hung up.
    pub fn try_send(&mut self, bytes: &[u8]) -> std::io::Result<()> {
        self.stream.get_mut().write_all(bytes)
    }

    /// Receives the next reply; events are put aside.
    #[track_caller]
    pub fn reply(&mut self) -> Value {
        loop {
            let message = self.receive().expect("a reply, not a hang-up");
            if message.get("event").is_none() {
                return message;
            }
            self.events.push_back(message);
        }
    }

    /// Waits for an event of this name; others before it are dropped.
    #[track_caller]
    pub fn event(&mut self, name: &str) -> Value {
        loop {
            let next = self.events.pop_front().or_else(|| self.receive());
            let event = next.unwrap_or_else(|| panic!("a hang-up instead of {name}"));
            if event["event"] == name {
                return event;
            }
            assert!(
                event.get("event").is_some(),
                "a reply instead of {name}: {event}"
            );
        }
    }

    /// Receives one message, or nothing if the server has hung up.
    #[track_caller]
    pub fn receive(&mut self) -> Option<Value> {
        let mut line = String::new();
        match self.stream.read_line(&mut line) {
            Ok(0) => return None,
            Err(error) if error.kind() == std::io::ErrorKind::ConnectionReset => return None,
            result => result.expect("the server answers in time"),
        };
        assert!(line.ends_with("\r\n"), "a message ends with CRLF: {line:?}");
        Some(serde_json::from_str(&line).unwrap_or_else(|error| panic!("{error} in {line:?}")))
    }

    /// Whether the server hangs up, whatever it says before.
    pub fn hangs_up(&mut self) -> bool {
        let mut rest = [0; 4096];
        loop {
            match self.stream.read(&mut rest) {
                Ok(0) => return true,
                Ok(_) => {}
                Err(error) => return error.kind() == std::io::ErrorKind::ConnectionReset,
            }
        }
    }
}
