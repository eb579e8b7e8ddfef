//! How far the reading of a folder of backups is, for people who watch it and for programs.

use std::fmt::Write as _;
use std::io::{IsTerminal, Write as _};
use std::time::Instant;

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use serde::Serialize;

use super::progress::{BAR, JSON_INTERVAL, LINE_INTERVAL};
use super::units::size;

/// What is being read, and how much of it has been. It shows that by itself, now and then.
#[derive(Debug)]
pub(super) struct Reading {
    phase: &'static str,
    disk: Option<String>,
    total: u64,
    done: u64,
    begun: Instant,
    told: Instant,
    way: Way,
}

/// How it is shown.
#[derive(Debug)]
pub(super) enum Way {
    /// Not at all.
    Nothing,
    /// By a bar on a terminal.
    Bar(ProgressBar),
    /// By a line now and then on standard error.
    Lines,
    /// By a line of JSON on standard output.
    Json,
}

#[derive(Serialize)]
struct State<'a> {
    event: &'static str,
    phase: &'static str,
    disk: Option<&'a str>,
    bytes_per_s: u64,
    eta_s: Option<u64>,
    done_bytes: u64,
    total_bytes: u64,
}

impl Way {
    /// For people.
    pub(super) fn human() -> Self {
        if std::io::stderr().is_terminal() {
            let bar = ProgressBar::with_draw_target(None, ProgressDrawTarget::stderr());
            let style = ProgressStyle::with_template(BAR).expect("our own template");
            bar.set_style(style.progress_chars("=> "));
            Self::Bar(bar)
        } else {
            Self::Lines
        }
    }
}

impl Reading {
    /// Of nothing yet.
    pub(super) fn new(way: Way) -> Self {
        Self {
            phase: "",
            disk: None,
            total: 0,
            done: 0,
            begun: Instant::now(),
            told: Instant::now(),
            way,
        }
    }

    /// What is read next, in a word, and of which disk if it is one.
    pub(super) fn begin(&mut self, phase: &'static str, disk: Option<&str>) {
        self.phase = phase;
        self.disk = disk.map(str::to_owned);
        (self.total, self.done) = (0, 0);
        (self.begun, self.told) = (Instant::now(), Instant::now());
        if let Way::Bar(bar) = &self.way {
            bar.set_prefix(disk.unwrap_or(phase).to_owned());
            bar.set_position(0);
            bar.reset_elapsed();
        }
    }

    /// How much there is of it.
    pub(super) fn expect(&mut self, bytes: u64) {
        self.total = bytes;
        if let Way::Bar(bar) = &self.way {
            bar.set_length(bytes);
        }
    }

    /// So much more has been read.
    pub(super) fn add(&mut self, bytes: u64) {
        self.done += bytes;
        let interval = match &self.way {
            Way::Nothing => return,
            Way::Bar(bar) => {
                // It is drawn no more often than can be seen.
                bar.set_position(self.done);
                return;
            }
            Way::Lines => LINE_INTERVAL,
            Way::Json => JSON_INTERVAL,
        };
        if self.told.elapsed() >= interval {
            self.told = Instant::now();
            self.tell();
        }
    }

    /// Does something that prints, beside a bar that may be there.
    pub(super) fn beside<T>(&self, print: impl FnOnce() -> T) -> T {
        match &self.way {
            Way::Bar(bar) => bar.suspend(print),
            Way::Nothing | Way::Lines | Way::Json => print(),
        }
    }

    fn tell(&self) {
        let state = self.state();
        // When nobody reads any more, what is done is done all the same.
        let _ = if matches!(self.way, Way::Json) {
            let line = serde_json::to_string(&state).expect("names and numbers");
            writeln!(std::io::stdout(), "{line}")
        } else {
            writeln!(std::io::stderr(), "{}", state.words())
        };
    }

    fn state(&self) -> State<'_> {
        let time = (self.begun.elapsed().as_millis() as u64).max(1);
        let bytes_per_s = self.done.saturating_mul(1000) / time;
        State {
            event: "progress",
            phase: self.phase,
            disk: self.disk.as_deref(),
            bytes_per_s,
            eta_s: self
                .total
                .saturating_sub(self.done)
                .checked_div(bytes_per_s),
            done_bytes: self.done,
            total_bytes: self.total,
        }
    }
}

impl State<'_> {
    fn words(&self) -> String {
        let (done, total) = (size(self.done_bytes), size(self.total_bytes));
        let what = self
            .disk
            .map_or_else(String::new, |disk| format!(" {disk}"));
        let mut text = format!(
            "{}{what}: {done} of {total}; {}/s",
            self.phase,
            size(self.bytes_per_s)
        );
        if let Some(eta) = self.eta_s {
            let _ = write!(text, ", {eta} s to go");
        }
        text
    }
}

impl Drop for Reading {
    fn drop(&mut self) {
        if let Way::Bar(bar) = &self.way {
            bar.finish_and_clear();
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_line_says_what_how_much_and_how_long() {
        let mut reading = Reading::new(Way::Lines);
        reading.begin("restore", Some("vda"));
        reading.expect(4 << 20);
        reading.done = 1 << 20;
        let state = State {
            bytes_per_s: 1 << 20,
            eta_s: Some(3),
            ..reading.state()
        };
        assert_eq!(
            state.words(),
            "restore vda: 1.0 MiB of 4.0 MiB; 1.0 MiB/s, 3 s to go"
        );
        let state = serde_json::to_value(&state).unwrap();
        let expected = json!({"event": "progress", "phase": "restore", "disk": "vda",
            "bytes_per_s": 1 << 20, "eta_s": 3, "done_bytes": 1 << 20, "total_bytes": 4 << 20});
        assert_eq!(state, expected);
    }
}
