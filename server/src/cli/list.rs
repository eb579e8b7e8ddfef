//! `stillpoint list`: the points in a folder of backups.

use std::fmt::Write;
use std::path::PathBuf;

use clap::Args;
use serde::Serialize;
use uuid::Uuid;

use super::problem::Problem;
use super::table::Table;
use super::units::size;
use super::{Answers, Done};
use crate::archive::{Archive, ArchiveError, DiskEntry, Identity, Mode, Origin, Point, Since};
use crate::control::answers::time_text;

#[derive(Args, Debug)]
pub(super) struct ListArgs {
    /// The folder of backups.
    #[arg(value_name = "DIR")]
    folder: PathBuf,
}

impl ListArgs {
    pub(super) fn run(&self, answers: &Answers) -> Result<Done, Problem> {
        let archive = Archive::open(&self.folder)?;
        if answers.is_json {
            let mut listed: Vec<_> = archive.points().iter().map(ListedPoint::sound).collect();
            listed.extend(archive.unsound().iter().map(ListedPoint::unsound));
            listed.sort_by_key(|point| point.point);
            let text = serde_json::to_string(&listed).expect("texts and numbers can be JSON");
            let text = text + "\n";
            return Ok(Done { text, exit: 0 });
        }
        let mut text = table(archive.points());
        for (number, error) in archive.unsound() {
            let line = format_args!("point {number} cannot be read: {error}");
            writeln!(text, "{line}").expect("a string takes everything");
        }
        Ok(Done { text, exit: 0 })
    }
}

fn table(points: &[Point]) -> String {
    if points.is_empty() {
        return "no points\n".to_owned();
    }
    let mut table = Table::new([
        "POINT",
        "INSTANT",
        "CHECKPOINT",
        "DISK",
        "SIZE",
        "MODE",
        "DATA",
        "FILE",
    ]);
    for point in points {
        for disk in &point.disks {
            let checkpoint = point.checkpoint.as_ref().map(|it| it.name.clone());
            table.push([
                point.number.to_string(),
                time_text(point.instant),
                checkpoint.unwrap_or_default(),
                disk.name.clone(),
                size(disk.size),
                mode(disk),
                size(disk.data_bytes),
                size(disk.file_size),
            ]);
        }
    }
    table.render()
}

fn mode(disk: &DiskEntry) -> String {
    match (&disk.parent, &disk.reason) {
        (Some(parent), _) => format!("incremental to {}", parent.point),
        (None, Some(reason)) => format!("full, because {reason}"),
        (None, None) => "full".to_owned(),
    }
}

/// A point as it is in JSON.
#[derive(Serialize)]
struct ListedPoint<'a> {
    point: u64,
    #[serde(flatten)]
    sound: Option<SoundPoint<'a>>,
    /// Why nothing else is known of it.
    error: Option<String>,
}

#[derive(Serialize)]
struct SoundPoint<'a> {
    instant: String,
    origin: &'a Origin,
    backup: Option<&'a Identity>,
    checkpoint: Option<&'a Identity>,
    held_us: Option<u64>,
    disks: Vec<ListedDisk<'a>>,
}

#[derive(Serialize)]
struct ListedDisk<'a> {
    disk: &'a str,
    disk_uuid: Option<Uuid>,
    size: u64,
    mode: Mode,
    reason: Option<&'a str>,
    since: Option<&'a Since>,
    parent: Option<u64>,
    file: String,
    file_size: u64,
    data_bytes: u64,
    zero_bytes: u64,
}

impl<'a> ListedPoint<'a> {
    fn sound(point: &'a Point) -> Self {
        let number = point.number;
        let disks = point.disks.iter().map(|disk| ListedDisk {
            disk: &disk.name,
            disk_uuid: disk.uuid,
            size: disk.size,
            mode: disk.mode,
            reason: disk.reason.as_deref(),
            since: disk.since.as_ref(),
            parent: disk.parent.as_ref().map(|parent| parent.point),
            file: format!("{number}/{}", disk.file),
            file_size: disk.file_size,
            data_bytes: disk.data_bytes,
            zero_bytes: disk.zero_bytes,
        });
        let sound = SoundPoint {
            instant: time_text(point.instant),
            origin: &point.origin,
            backup: point.backup.as_ref(),
            checkpoint: point.checkpoint.as_ref(),
            held_us: point.held_us,
            disks: disks.collect(),
        };
        Self {
            point: number,
            sound: Some(sound),
            error: None,
        }
    }

    fn unsound((number, error): &'a (u64, ArchiveError)) -> Self {
        Self {
            point: *number,
            sound: None,
            error: Some(error.to_string()),
        }
    }
}
