//! Damage to backups, told as it is found; and how far the looking for it is.

use std::io::Write;
use std::sync::{Mutex, MutexGuard, PoisonError};

use serde::Serialize;

use super::Answers;
use super::reading::{Reading, Way};
use crate::archive::{Damage, Progress, Watch};

/// Prints what is found, a line each.
pub(super) struct Finder {
    is_json: bool,
    /// One line at a time.
    reading: Mutex<Reading>,
}

/// A line of JSON.
#[derive(Serialize)]
pub(super) struct Event<T> {
    pub(super) event: &'static str,
    #[serde(flatten)]
    pub(super) what: T,
}

impl Finder {
    /// One that shows how far it is, unless it is to be quiet; JSON lines are for programs, which are
    /// told in any case.
    pub(super) fn new(answers: &Answers, is_quiet: bool) -> Self {
        let way = match (answers.is_json, is_quiet) {
            (true, _) => Way::Json,
            (false, true) => Way::Nothing,
            (false, false) => Way::human(),
        };
        Self {
            is_json: answers.is_json,
            reading: Mutex::new(Reading::new(way)),
        }
    }

    pub(super) fn is_json(&self) -> bool {
        self.is_json
    }

    /// What is read next, in a word, and of which disk if it is one.
    pub(super) fn begin(&self, phase: &'static str, disk: Option<&str>) {
        self.reading().begin(phase, disk);
    }

    /// Prints one of them.
    pub(super) fn tell<T: Serialize>(&self, event: &Event<T>, words: &str) {
        let line = if self.is_json {
            event.line()
        } else {
            format!("{words}\n")
        };
        // Whoever does not listen still hears the exit code.
        let print = || std::io::stdout().write_all(line.as_bytes());
        let _ = self.reading().beside(print);
    }

    fn reading(&self) -> MutexGuard<'_, Reading> {
        self.reading.lock().unwrap_or_else(PoisonError::into_inner)
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

impl Progress for Finder {
    fn expect(&self, bytes: u64) {
        self.reading().expect(bytes);
    }

    fn checked(&self, bytes: u64) {
        self.reading().add(bytes);
    }
}

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
