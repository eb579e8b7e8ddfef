//! Damage to backups, told as it is found.

use std::io::Write;
use std::sync::Mutex;

use serde::Serialize;

use super::Answers;
use crate::archive::{Damage, Progress, Watch};

/// Prints what is found, a line each.
pub(super) struct Finder {
    is_json: bool,
    /// One line at a time.
    out: Mutex<std::io::Stdout>,
}

/// A line of JSON.
#[derive(Serialize)]
pub(super) struct Event<T> {
    pub(super) event: &'static str,
    #[serde(flatten)]
    pub(super) what: T,
}

impl Finder {
    pub(super) fn new(answers: &Answers) -> Self {
        Self {
            is_json: answers.is_json,
            out: Mutex::new(std::io::stdout()),
        }
    }
}

impl Finder {
    pub(super) fn is_json(&self) -> bool {
        self.is_json
    }

    /// Prints one of them.
    pub(super) fn tell<T: Serialize>(&self, event: &Event<T>, words: &str) {
        let line = if self.is_json {
            event.line()
        } else {
            format!("{words}\n")
        };
        let mut out = self.out.lock().expect("nobody panics with it");
        // Whoever does not listen still hears the exit code.
        let _ = out.write_all(line.as_bytes());
    }
}

impl<T: Serialize> Event<T> {
    /// The last line of a command.
    pub(super) fn result(what: T) -> String {
        let event = Self {
            event: "result",
            what,
        };
        event.line()
    }

    fn line(&self) -> String {
        serde_json::to_string(self).expect("texts and numbers can be JSON") + "\n"
    }
}

impl Progress for Finder {}

impl Watch for Finder {
    fn found(&self, damage: &Damage) {
        let event = Event {
            event: "damage",
            what: damage,
        };
        self.tell(&event, &format!("damaged: {}", damage.message));
    }
}

/// So many, in words.
pub(super) fn damages(count: u64) -> String {
    match count {
        1 => "1 damage".to_owned(),
        _ => format!("{count} damages"),
    }
}
