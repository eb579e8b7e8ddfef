//! How far a long copy is, for people who watch it and for programs.

use std::fmt::Write as _;
use std::io::{IsTerminal, Write};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use indicatif::{MultiProgress, ProgressBar, ProgressDrawTarget, ProgressStyle};
use serde::Serialize;

use super::units::{microseconds, size};
use crate::archive::{DiskDraft, Draft};

/// What is counted while it happens. Any thread may add to it.
#[derive(Debug)]
pub(super) struct Watch {
    disks: Vec<Gauge>,
    /// Bytes that were read back.
    checked: AtomicU64,
    server: Mutex<Option<ServerSide>>,
    is_stopped: AtomicBool,
    begun: Instant,
}

/// One disk.
#[derive(Debug)]
struct Gauge {
    disk: String,
    /// What there is to copy.
    total: u64,
    /// What an earlier run has copied.
    before: u64,
    done: AtomicU64,
}

/// What the server says of it.
#[derive(Clone, Copy, Debug, Serialize)]
pub(super) struct ServerSide {
    pub(super) scratch_used_bytes: u64,
    pub(super) guest_stall_us: u64,
}

/// All of it at one moment.
#[derive(Debug, Serialize)]
struct State {
    event: &'static str,
    phase: &'static str,
    bytes_per_s: u64,
    eta_s: Option<u64>,
    #[serde(flatten)]
    server: Option<ServerSide>,
    disks: Vec<DiskState>,
}

#[derive(Debug, Serialize)]
struct DiskState {
    disk: String,
    done_bytes: u64,
    total_bytes: u64,
}

impl Watch {
    /// Of the disks of a draft.
    pub(super) fn of(draft: &Draft) -> Self {
        Self::at(draft.disks().iter().map(|disk| {
            let total = disk.data_bytes();
            (disk.plan().name.clone(), total, total - missing_bytes(disk))
        }))
    }

    /// Of disks of these names: what there is to copy, and what of that has been copied before.
    pub(super) fn at(disks: impl Iterator<Item = (String, u64, u64)>) -> Self {
        let disks = disks.map(|(disk, total, before)| Gauge {
            disk,
            total,
            before,
            done: AtomicU64::new(before),
        });
        Self {
            disks: disks.collect(),
            ..Self::nothing()
        }
    }

    /// Of something that can only be stopped.
    pub(super) fn nothing() -> Self {
        Self {
            disks: Vec::new(),
            checked: AtomicU64::new(0),
            server: Mutex::new(None),
            is_stopped: AtomicBool::new(false),
            begun: Instant::now(),
        }
    }

    /// Takes in how far somebody else is: of each disk, and in all what was read back.
    pub(super) fn set(&self, done: impl Iterator<Item = u64>, checked: u64) {
        for (disk, done) in self.disks.iter().zip(done) {
            disk.done.store(done, Ordering::Relaxed);
        }
        self.checked.store(checked, Ordering::Relaxed);
    }

    /// Takes in what the server says.
    pub(super) fn tell(&self, server: ServerSide) {
        *self.server.lock().unwrap_or_else(PoisonError::into_inner) = Some(server);
    }

    /// Asks whoever works to stop.
    pub(super) fn stop(&self) {
        self.is_stopped.store(true, Ordering::Relaxed);
    }

    /// So much of all disks together: to copy, there before, and there now.
    fn sums(&self) -> (u64, u64, u64) {
        let sum = |of: &dyn Fn(&Gauge) -> u64| self.disks.iter().map(of).sum::<u64>();
        (
            sum(&|disk| disk.total),
            sum(&|disk| disk.before),
            sum(&|disk| disk.done.load(Ordering::Relaxed)),
        )
    }

    /// How it stands.
    fn state(&self) -> State {
        let (total, before, done) = self.sums();
        let time = self.begun.elapsed().as_millis().max(1) as u64;
        let bytes_per_s = (done - before).saturating_mul(1000) / time;
        let is_copied = done >= total;
        State {
            event: "progress",
            phase: if is_copied { "verify" } else { "copy" },
            bytes_per_s,
            eta_s: (total - done.min(total)).checked_div(bytes_per_s),
            server: *self.server.lock().unwrap_or_else(PoisonError::into_inner),
            disks: self.disks.iter().map(Gauge::state).collect(),
        }
    }
}

impl Gauge {
    fn state(&self) -> DiskState {
        DiskState {
            disk: self.disk.clone(),
            done_bytes: self.done.load(Ordering::Relaxed),
            total_bytes: self.total,
        }
    }
}

impl crate::copy::Progress for Watch {
    fn copied(&self, disk: usize, bytes: u64) {
        self.disks[disk].done.fetch_add(bytes, Ordering::Relaxed);
    }
}

impl crate::archive::Progress for Watch {
    fn checked(&self, bytes: u64) {
        self.checked.fetch_add(bytes, Ordering::Relaxed);
    }

    fn is_stopped(&self) -> bool {
        self.is_stopped.load(Ordering::Relaxed)
    }
}

/// How much of a disk is not there yet.
pub(super) fn missing_bytes(disk: &DiskDraft) -> u64 {
    disk.chunks().map(|chunk| chunk.bytes()).sum()
}

/// What is seen of it: bars on a terminal, or a line now and then.
pub(super) struct Display {
    way: Way,
    told: Instant,
}

enum Way {
    Nothing,
    Bars(Bars),
    Lines,
    Json,
}

struct Bars {
    /// What draws them together.
    _all: MultiProgress,
    /// One for each disk while it is being copied.
    disks: Vec<ProgressBar>,
    /// How much has been read back, when all is copied.
    checked: Option<ProgressBar>,
}

impl Display {
    /// For nobody.
    pub(super) fn nothing() -> Self {
        Self::new(Way::Nothing)
    }

    /// JSON lines on standard output.
    pub(super) fn json() -> Self {
        Self::new(Way::Json)
    }

    /// For people, on standard error.
    pub(super) fn human(watch: &Watch) -> Self {
        if std::io::stderr().is_terminal() {
            Self::new(Way::Bars(Bars::new(watch)))
        } else {
            Self::new(Way::Lines)
        }
    }

    fn new(way: Way) -> Self {
        Self {
            way,
            told: Instant::now(),
        }
    }

    /// Shows how it stands now; to be called some times a second.
    pub(super) fn show(&mut self, watch: &Watch) {
        let interval = match self.way {
            Way::Nothing => return,
            Way::Bars(_) => Duration::ZERO,
            Way::Lines => LINE_INTERVAL,
            Way::Json => JSON_INTERVAL,
        };
        if self.told.elapsed() < interval {
            return;
        }
        self.told = Instant::now();
        // When nobody reads any more, what is done is done all the same.
        let _ = match &self.way {
            Way::Nothing => Ok(()),
            Way::Bars(bars) => {
                bars.show(watch);
                Ok(())
            }
            Way::Lines => writeln!(std::io::stderr(), "{}", line(watch)),
            Way::Json => {
                let state = serde_json::to_string(&watch.state()).expect("names and numbers");
                writeln!(std::io::stdout(), "{state}")
            }
        };
    }

    /// Shows the end of it.
    pub(super) fn close(self, watch: &Watch) {
        if let Way::Bars(bars) = self.way {
            bars.show(watch);
            for bar in bars.disks.iter().chain(&bars.checked) {
                bar.abandon();
            }
        }
    }
}

impl Bars {
    fn new(watch: &Watch) -> Self {
        let all = MultiProgress::with_draw_target(ProgressDrawTarget::stderr());
        let names = watch.disks.iter().map(|disk| disk.disk.len());
        let width = names.max().unwrap_or(0).max(VERIFYING.len());
        let bar = |total: u64, done: u64, prefix: &str| {
            let bar = all.add(ProgressBar::new(total));
            let style = ProgressStyle::with_template(BAR).expect("our own template");
            bar.set_style(style.progress_chars("=> "));
            bar.set_prefix(format!("{prefix:width$}"));
            // What was there before says nothing about the pace.
            bar.set_position(done);
            bar.reset_eta();
            bar
        };
        let (total, _, done) = watch.sums();
        let (mut disks, mut checked) = (Vec::new(), None);
        if done < total {
            let bars = watch.disks.iter();
            let bars = bars.map(|disk| bar(disk.total, disk.before, &disk.disk));
            disks = bars.collect();
        } else {
            checked = Some(bar(total, 0, VERIFYING));
        }
        Self {
            _all: all,
            disks,
            checked,
        }
    }

    fn show(&self, watch: &Watch) {
        let state = watch.state();
        for (bar, disk) in self.disks.iter().zip(&state.disks) {
            bar.set_position(disk.done_bytes);
        }
        if let (Some(first), Some(server)) = (self.disks.first(), state.server) {
            first.set_message(server.words());
        }
        if let Some(bar) = &self.checked {
            bar.set_position(watch.checked.load(Ordering::Relaxed));
        }
    }
}

impl ServerSide {
    fn words(self) -> String {
        format!(
            "scratch {}, guest stall {}",
            size(self.scratch_used_bytes),
            microseconds(self.guest_stall_us)
        )
    }
}

/// How it stands, in one line.
fn line(watch: &Watch) -> String {
    let state = watch.state();
    if state.phase == "verify" {
        let checked = watch.checked.load(Ordering::Relaxed);
        return format!("verifying: {} read back", size(checked));
    }
    let disks: Vec<_> = state
        .disks
        .iter()
        .map(|disk| {
            format!(
                "{} {} of {}",
                disk.disk,
                size(disk.done_bytes),
                size(disk.total_bytes)
            )
        })
        .collect();
    let mut text = format!("{}; {}/s", disks.join(", "), size(state.bytes_per_s));
    if let Some(eta) = state.eta_s {
        let _ = write!(text, ", {eta} s to go");
    }
    if let Some(server) = state.server {
        let _ = write!(text, "; {}", server.words());
    }
    text
}

/// How a bar looks.
pub(super) const BAR: &str = "{prefix}  [{bar:30}] {binary_bytes} of {binary_total_bytes}, {binary_bytes_per_sec}, {eta} to go  {msg}";
const VERIFYING: &str = "verified";

/// So often a log is told.
pub(super) const LINE_INTERVAL: Duration = Duration::from_secs(10);

/// So often a program is told, which may draw bars of its own.
pub(super) const JSON_INTERVAL: Duration = Duration::from_secs(1);
