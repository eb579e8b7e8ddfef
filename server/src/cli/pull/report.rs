//! What a pull says: a table before, a summary after, and the same as JSON lines.

use std::borrow::Cow;
use std::cell::Cell;
use std::fmt::Write as _;
use std::io::Write as _;
use std::path::Path;
use std::time::Duration;

use serde::Serialize;
use uuid::Uuid;

use crate::archive::{Draft, Identity, Mode, Point};
use crate::cli::progress::{Display, Watch, missing_bytes};
use crate::cli::table::Table;
use crate::cli::units::{microseconds, size};
use crate::control::answers::time_text;

/// Who listens, and to how much.
pub(super) struct Report {
    /// JSON lines, not text.
    json: bool,
    /// Nothing but errors.
    quiet: bool,
    /// Nobody reads any more; what is done is done all the same.
    unread: Cell<bool>,
}

/// How one disk comes.
#[derive(Clone, Debug, Serialize)]
pub(super) struct Row {
    pub(super) disk: String,
    #[serde(rename = "size")]
    pub(super) size: u64,
    pub(super) mode: Mode,
    pub(super) reason: Option<String>,
    pub(super) since: Option<String>,
    pub(super) since_uuid: Option<Uuid>,
    /// The point that it builds on.
    pub(super) parent: Option<u64>,
    /// Since the parent; all of it without one.
    pub(super) changed_bytes: u64,
    /// Of these, what reads as zeroes, if it is known.
    pub(super) zero_bytes: Option<u64>,
    /// What is to be fetched; at most so much where zeroes are not known.
    pub(super) copy_bytes: u64,
    /// What an earlier run has fetched of it.
    pub(super) copied_bytes: u64,
}

/// What programs read, one in each line.
#[derive(Serialize)]
#[serde(tag = "event", rename_all = "lowercase")]
enum Line<'a> {
    Note {
        message: &'a str,
    },
    Plan {
        folder: Cow<'a, str>,
        /// None of a dry run.
        point: Option<u64>,
        disks: &'a [Row],
    },
    Result(Box<PullResult<'a>>),
}

#[derive(Serialize)]
struct PullResult<'a> {
    folder: Cow<'a, str>,
    point: u64,
    instant: String,
    backup: Option<&'a str>,
    checkpoint: Option<&'a str>,
    checkpoint_uuid: Option<Uuid>,
    committed: bool,
    vouched: bool,
    guest_held_us: Option<u64>,
    time_ms: u64,
    disks: Vec<DiskResult<'a>>,
}

#[derive(Serialize)]
struct DiskResult<'a> {
    disk: &'a str,
    disk_uuid: Option<Uuid>,
    size: u64,
    mode: Mode,
    reason: Option<&'a str>,
    since: Option<&'a str>,
    since_uuid: Option<Uuid>,
    parent: Option<u64>,
    file: String,
    file_size: u64,
    data_bytes: u64,
    zero_bytes: u64,
    copied_bytes: u64,
    next_bytes: Option<u64>,
}

/// A pull or a push that is complete.
pub(super) struct Finished<'a> {
    /// What made it, in a word.
    pub(super) command: &'static str,
    pub(super) folder: &'a Path,
    pub(super) point: &'a Point,
    pub(super) rows: &'a [Row],
    pub(super) time: Duration,
    /// Whether the server knows that it is.
    pub(super) is_committed: bool,
    /// What has changed since, by disk.
    pub(super) next_bytes: Vec<(String, u64)>,
}

impl Report {
    pub(super) fn new(json: bool, quiet: bool) -> Self {
        Self {
            json,
            quiet,
            unread: Cell::new(false),
        }
    }

    /// Something that somebody should know, and that nobody has to do something about.
    pub(super) fn note(&self, text: &str) {
        if self.json {
            self.line(&Line::Note { message: text });
        } else if !self.quiet {
            // When this cannot be printed, nothing is lost that counts.
            let _ = writeln!(std::io::stderr(), "stillpoint: note: {text}");
        }
    }

    /// What is about to be copied, or would be.
    pub(super) fn plan(&self, folder: &Path, point: Option<u64>, rows: &[Row]) {
        if self.json {
            let folder = folder.to_string_lossy();
            self.line(&Line::Plan {
                folder,
                point,
                disks: rows,
            });
        } else if !self.quiet {
            self.print(&table(rows));
        }
    }

    /// How whoever listens sees how far it is.
    pub(super) fn display(&self, watch: &Watch) -> Display {
        match (self.json, self.quiet) {
            (true, _) => Display::json(),
            (false, true) => Display::nothing(),
            (false, false) => Display::human(watch),
        }
    }

    /// That nothing was to be done, to be printed at the end.
    pub(super) fn nothing_done(&self) -> String {
        match (self.json, self.quiet) {
            (true, _) => "{\"event\":\"result\",\"dry_run\":true}\n".to_owned(),
            (false, true) => String::new(),
            (false, false) => "nothing has been done\n".to_owned(),
        }
    }

    /// What has come of it, to be printed at the end.
    pub(super) fn finished(&self, finished: &Finished<'_>) -> String {
        if self.json {
            let line = serde_json::to_string(&result(finished));
            return format!("{}\n", line.expect("names and numbers"));
        }
        if self.quiet {
            return String::new();
        }
        summary(finished)
    }

    fn line(&self, object: &impl Serialize) {
        let text = serde_json::to_string(object).expect("names are texts");
        self.print(&format!("{text}\n"));
    }

    fn print(&self, text: &str) {
        let mut out = std::io::stdout().lock();
        if !self.unread.get()
            && out
                .write_all(text.as_bytes())
                .and_then(|()| out.flush())
                .is_err()
        {
            self.unread.set(true);
        }
    }
}

/// What a draft is to hold, and what of that is there.
pub(super) fn rows(draft: &Draft) -> Vec<Row> {
    let rows = draft.disks().iter().map(|disk| {
        let plan = disk.plan();
        let sum = |runs: &[std::ops::Range<u64>]| -> u64 {
            runs.iter().map(|run| run.end - run.start).sum()
        };
        let (copy_bytes, left) = (disk.data_bytes(), missing_bytes(disk));
        Row {
            disk: plan.name.clone(),
            size: plan.size,
            mode: plan.mode,
            reason: plan.reason.clone(),
            since: plan.since.as_ref().map(|since| since.name.clone()),
            since_uuid: plan.since.as_ref().and_then(|since| since.uuid),
            parent: plan.parent,
            changed_bytes: sum(&plan.data) + sum(&plan.zero),
            zero_bytes: Some(sum(&plan.zero)),
            copy_bytes,
            copied_bytes: copy_bytes - left,
        }
    });
    rows.collect()
}

fn table(rows: &[Row]) -> String {
    let mut table = Table::new(["DISK", "SIZE", "CHANGED", "ZERO", "TO COPY", "MODE", "WHY"]);
    for row in rows {
        let left = row.copy_bytes.saturating_sub(row.copied_bytes);
        let to_copy = match (row.zero_bytes, row.copied_bytes) {
            (None, _) => format!("at most {}", size(left)),
            (Some(_), 0) => size(left),
            (Some(_), _) => format!("{} of {}", size(left), size(row.copy_bytes)),
        };
        table.push([
            row.disk.clone(),
            size(row.size),
            size(row.changed_bytes),
            row.zero_bytes.map_or_else(|| "?".to_owned(), size),
            to_copy,
            mode(row.mode).to_owned(),
            why(row),
        ]);
    }
    table.render()
}

fn why(row: &Row) -> String {
    match (&row.since, row.parent, &row.reason) {
        (Some(since), Some(parent), _) => format!("since {since}, on top of point {parent}"),
        (_, _, Some(reason)) => reason.clone(),
        (Some(since), None, None) => format!("since {since}"),
        (None, _, None) => String::new(),
    }
}

fn mode(mode: Mode) -> &'static str {
    match mode {
        Mode::Full => "full",
        Mode::Incremental => "incremental",
    }
}

fn summary(finished: &Finished<'_>) -> String {
    let Finished {
        command,
        folder,
        point,
        rows,
        time,
        is_committed,
        next_bytes,
    } = finished;
    let mut text = String::new();
    let copied: u64 = rows
        .iter()
        .map(|row| row.copy_bytes - row.copied_bytes)
        .sum();
    let place = folder.join(point.number.to_string());
    say(
        &mut text,
        format_args!(
            "point {} of {} is complete and verified: {}",
            point.number,
            time_text(point.instant),
            place.display()
        ),
    );
    let rate = copied.checked_div(time.as_millis() as u64).unwrap_or(0) * 1000;
    say(
        &mut text,
        format_args!(
            "copied {} in {}, {}/s",
            size(copied),
            microseconds(time.as_micros() as u64),
            size(rate)
        ),
    );
    if let Some(held) = point.held_us {
        say(
            &mut text,
            format_args!("hooks held the guest for {}", microseconds(held)),
        );
    }
    if !point.origin.vouched {
        let what = match &point.backup {
            None => ", nor that all of this is one instant",
            Some(_) => " since the point before: that is as the dirty bitmap says",
        };
        say(
            &mut text,
            format_args!(
                "this server cannot vouch that what it calls unchanged has not changed{what}"
            ),
        );
    }
    if *is_committed {
        let next: u64 = next_bytes.iter().map(|(_, bytes)| bytes).sum();
        say(
            &mut text,
            format_args!(
                "the next {command} would copy {} at most, as things stand",
                size(next)
            ),
        );
    }
    text
}

fn result<'a>(finished: &'a Finished<'a>) -> Line<'a> {
    let (folder, point) = (finished.folder, finished.point);
    let disks = point.disks.iter().zip(finished.rows).map(|(entry, row)| {
        let mut next = finished.next_bytes.iter();
        let next = next.find(|(name, _)| *name == entry.name);
        let file = folder.join(point.number.to_string()).join(&entry.file);
        DiskResult {
            disk: &entry.name,
            disk_uuid: entry.uuid,
            size: entry.size,
            mode: entry.mode,
            reason: entry.reason.as_deref(),
            since: row.since.as_deref(),
            since_uuid: row.since_uuid,
            parent: row.parent,
            file: file.to_string_lossy().into_owned(),
            file_size: entry.file_size,
            data_bytes: entry.data_bytes,
            zero_bytes: entry.zero_bytes,
            copied_bytes: row.copy_bytes - row.copied_bytes,
            next_bytes: next.map(|(_, bytes)| *bytes),
        }
    });
    let name = |of: &'a Option<Identity>| of.as_ref().map(|of| of.name.as_str());
    Line::Result(Box::new(PullResult {
        folder: folder.to_string_lossy(),
        point: point.number,
        instant: time_text(point.instant),
        backup: name(&point.backup),
        checkpoint: name(&point.checkpoint),
        checkpoint_uuid: point.checkpoint.as_ref().map(|of| of.uuid),
        committed: finished.is_committed,
        vouched: point.origin.vouched,
        guest_held_us: point.held_us,
        time_ms: finished.time.as_millis() as u64,
        disks: disks.collect(),
    }))
}

fn say(text: &mut String, line: std::fmt::Arguments<'_>) {
    writeln!(text, "{line}").expect("a string takes everything");
}
