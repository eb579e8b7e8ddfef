//! What the control socket answers. Each shape is also what a client reads.

use std::path::Path;

use serde::{Deserialize, Serialize};
use time::OffsetDateTime;
use time::format_description::BorrowedFormatItem;
use time::macros::format_description;
use uuid::Uuid;

use crate::listeners::Endpoint;
use crate::names::Name;
use crate::service::{Changes, Imported, Resized};

/// A command, as `query-commands` lists it.
#[derive(Debug, Serialize)]
pub(crate) struct CommandName {
    /// What to execute.
    pub(crate) name: &'static str,
}

/// The answer to `query-status`.
#[derive(Debug, Deserialize, Serialize)]
pub(crate) struct Status {
    /// Of the server.
    pub(crate) version: String,
    /// Of the server.
    pub(crate) pid: u32,
    /// Where its sockets are.
    pub(crate) run_dir: String,
    /// What does what waits for a device: `io_uring` or `threads`.
    pub(crate) io_engine: String,
    /// As `query-disks` says.
    pub(crate) disks: Vec<DiskAnswer>,
    /// How many.
    pub(crate) checkpoints: usize,
    /// As `query-backups` says.
    pub(crate) backups: Vec<BackupAnswer>,
    /// What all backups keep.
    pub(crate) scratch_used_bytes: u64,
    /// What they may keep, if there is a limit.
    pub(crate) scratch_limit_bytes: Option<u64>,
    /// The longest time for which a freeze held the guests.
    pub(crate) longest_guest_stall_us: u64,
    /// Where it listens.
    pub(crate) sockets: Sockets,
}

/// Where a server listens.
#[derive(Debug, Deserialize, Serialize)]
pub(crate) struct Sockets {
    /// For live exports.
    pub(crate) live: Vec<String>,
    /// For frozen exports.
    pub(crate) backup: Vec<String>,
    /// The control socket's path.
    pub(crate) control: String,
}

/// A disk.
#[derive(Debug, Deserialize, Serialize)]
pub(crate) struct DiskAnswer {
    /// Its name.
    pub(crate) disk: Name,
    /// Its identity.
    pub(crate) uuid: Uuid,
    /// Its image.
    pub(crate) path: String,
    /// The image's.
    pub(crate) format: String,
    /// In bytes.
    pub(crate) size: u64,
    /// The chunk size of its map, in bytes.
    pub(crate) granularity: u64,
    /// Nobody may write it.
    pub(crate) read_only: bool,
    /// What its tracking survives: `power`, `process` or `none`.
    pub(crate) durability: String,
    /// How it is read and written: `writeback` or `none`.
    pub(crate) cache: String,
    /// Whether changes are tracked now: `ok` or `lost`.
    pub(crate) tracking: String,
    /// Why they are not.
    pub(crate) tracking_reason: Option<String>,
    /// How much is only presumed to have changed since its oldest checkpoint.
    pub(crate) uncertain_bytes: u64,
    /// How much would be after a power cut now, besides that.
    pub(crate) active_bytes: u64,
    /// How much another server may still change that was given up, and so is in every backup.
    pub(crate) unsettled_bytes: u64,
    /// The name of its live export.
    pub(crate) live_export: String,
    /// One for each listener.
    pub(crate) live_uris: Vec<String>,
}

/// A checkpoint.
#[derive(Debug, Deserialize, Serialize)]
pub(crate) struct CheckpointAnswer {
    /// Its name.
    pub(crate) name: Name,
    /// Its identity.
    pub(crate) uuid: Uuid,
    /// When it was taken.
    pub(crate) created_at: String,
    /// It becomes a base when its backup is committed.
    pub(crate) pending: bool,
    /// The backup that makes it.
    pub(crate) backup: Option<Name>,
    /// The disks that it is of.
    pub(crate) disks: Vec<CheckpointDisk>,
}

/// A checkpoint's share of one disk.
#[derive(Debug, Deserialize, Serialize)]
pub(crate) struct CheckpointDisk {
    /// Its name.
    pub(crate) disk: Name,
    /// Its identity.
    pub(crate) disk_uuid: Uuid,
    /// How much has changed since.
    pub(crate) dirty_bytes: u64,
    /// How much of that is only presumed to have changed.
    pub(crate) uncertain_bytes: u64,
    /// Why that is all of it, and a backup since this a full one, if so.
    pub(crate) reason: Option<String>,
}

/// What has become of a disk that was to be larger.
#[derive(Debug, Deserialize, Serialize)]
pub(crate) struct ResizeAnswer {
    /// Its name.
    pub(crate) disk: Name,
    /// In bytes.
    pub(crate) size_before: u64,
    /// In bytes.
    pub(crate) size: u64,
}

impl ResizeAnswer {
    /// Of the disk `disk`.
    pub(crate) fn new(disk: Name, resized: Resized) -> Self {
        Self {
            disk,
            size_before: resized.before,
            size: resized.now,
        }
    }
}

/// What was taken in from a file.
#[derive(Debug, Deserialize, Serialize)]
pub(crate) struct ImportAnswer {
    /// The disk.
    pub(crate) disk: Name,
    /// The checkpoint or the bitmap.
    pub(crate) name: String,
    /// How much the file says is dirty, in bytes, by whole chunks or blocks.
    pub(crate) told_bytes: u64,
    /// The same with what changed here since.
    pub(crate) dirty_bytes: u64,
}

impl ImportAnswer {
    /// Of what is called `name` on the disk `disk`.
    pub(crate) fn new(disk: Name, name: String, imported: Imported) -> Self {
        Self {
            disk,
            name,
            told_bytes: imported.told_bytes,
            dirty_bytes: imported.dirty_bytes,
        }
    }
}

/// What was written to a file, as its command tells it.
#[derive(Debug, Deserialize, Serialize)]
pub(crate) struct ExportAnswer {
    /// The disk.
    pub(crate) disk: String,
    /// The checkpoint or the bitmap.
    pub(crate) name: String,
    /// The file.
    pub(crate) to: String,
    /// Of the disk, in bytes.
    pub(crate) size: u64,
    /// How much of it is dirty, in bytes.
    pub(crate) dirty_bytes: u64,
}

/// A piece of what has changed on a disk.
#[derive(Debug, Deserialize, Serialize)]
pub(crate) struct ChangesAnswer {
    /// The disk.
    pub(crate) disk: Name,
    /// In bytes.
    pub(crate) size: u64,
    /// In bytes.
    pub(crate) granularity: u64,
    /// The identity of the checkpoint or the bitmap.
    pub(crate) uuid: Uuid,
    /// Of a bitmap, how often a command has changed it.
    pub(crate) revision: Option<u64>,
    /// What is dirty: offsets and lengths.
    pub(crate) dirty: Vec<(u64, u64)>,
    /// From where on to ask for more; null at the end.
    pub(crate) next: Option<u64>,
}

impl ChangesAnswer {
    /// Of the disk `disk`.
    pub(crate) fn new(disk: Name, changes: Changes) -> Self {
        let dirty = changes.dirty.into_iter();
        Self {
            disk,
            size: changes.size,
            granularity: changes.granularity,
            uuid: changes.uuid,
            revision: changes.revision,
            dirty: dirty
                .map(|range| (range.start, range.end - range.start))
                .collect(),
            next: changes.next,
        }
    }
}

/// A consumer.
#[derive(Debug, Deserialize, Serialize)]
pub(crate) struct ConsumerAnswer {
    /// Its name.
    pub(crate) name: Name,
    /// Where it is.
    pub(crate) disks: Vec<ConsumerDisk>,
}

/// Where a consumer is on one disk.
#[derive(Debug, Deserialize, Serialize)]
pub(crate) struct ConsumerDisk {
    /// The disk's name.
    pub(crate) disk: Name,
    /// The disk's identity.
    pub(crate) disk_uuid: Uuid,
    /// The checkpoint of the last backup that it committed.
    pub(crate) checkpoint: Name,
    /// The identity of that.
    pub(crate) checkpoint_uuid: Uuid,
    /// When that was taken.
    pub(crate) created_at: String,
    /// Why its next backup is full, if it is.
    pub(crate) reason: Option<String>,
    /// How much has changed since; all, if the next backup is full.
    pub(crate) dirty_bytes: u64,
    /// How much of that is only presumed to have changed.
    pub(crate) uncertain_bytes: u64,
}

/// A backup.
#[derive(Debug, Deserialize, Serialize)]
pub(crate) struct BackupAnswer {
    /// Its name.
    pub(crate) id: Name,
    /// Its identity.
    pub(crate) uuid: Uuid,
    /// Whether it can be relied on.
    pub(crate) state: BackupState,
    /// Why it cannot.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) broken_reason: Option<String>,
    /// The instant.
    pub(crate) frozen_at: String,
    /// The checkpoint that it begins from.
    pub(crate) since: Option<Name>,
    /// The identity of that.
    pub(crate) since_uuid: Option<Uuid>,
    /// The checkpoint that its commit makes.
    pub(crate) checkpoint: Option<Name>,
    /// The identity of that.
    pub(crate) checkpoint_uuid: Option<Uuid>,
    /// For whom it is.
    pub(crate) consumer: Option<Name>,
    /// When the server aborts it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) expires_at: Option<String>,
    /// For how long the guests were held.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) guest_stall_us: Option<u64>,
    /// What it keeps, on all its disks.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) scratch_used_bytes: Option<u64>,
    /// What it may keep, if there is a limit.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) scratch_limit_bytes: Option<u64>,
    /// Its disks.
    pub(crate) disks: Vec<BackupDisk>,
}

/// Whether a backup can be relied on.
#[derive(Clone, Copy, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum BackupState {
    /// It can.
    Open,
    /// Something of its instant is lost.
    Broken,
}

/// A backup's share of one disk.
#[derive(Debug, Deserialize, Serialize)]
pub(crate) struct BackupDisk {
    /// Its name.
    pub(crate) disk: Name,
    /// Its identity.
    pub(crate) disk_uuid: Uuid,
    /// In bytes.
    pub(crate) size: u64,
    /// Whether a copy needs a base.
    pub(crate) mode: Mode,
    /// The checkpoint that it begins from.
    pub(crate) since: Option<Name>,
    /// The identity of that.
    pub(crate) since_uuid: Option<Uuid>,
    /// Why it is full, where an incremental was asked for.
    pub(crate) reason: Option<String>,
    /// How much a copy has to fetch.
    pub(crate) changed_bytes: u64,
    /// How much of that is only presumed to have changed.
    pub(crate) uncertain_bytes: u64,
    /// The name of its frozen export.
    pub(crate) export: String,
    /// One for each listener.
    pub(crate) uris: Vec<String>,
    /// What the export lists.
    pub(crate) contexts: Vec<String>,
    /// The same as a difference from the base.
    pub(crate) difference: Option<Difference>,
    /// How its exports have been used.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) exports: Option<Vec<ExportUse>>,
    /// What it keeps of the instant.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) scratch_used_bytes: Option<u64>,
    /// How many pieces of writes found something that had to be copied first.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) copying_writes: Option<u64>,
}

/// What a copy of a frozen disk consists of.
#[derive(Clone, Copy, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Mode {
    /// All of it.
    Full,
    /// What changed since a checkpoint.
    Incremental,
}

/// An export that shows a difference.
#[derive(Debug, Deserialize, Serialize)]
pub(crate) struct Difference {
    /// Its name.
    pub(crate) export: String,
    /// One for each listener.
    pub(crate) uris: Vec<String>,
}

/// What clients did with an export.
#[derive(Debug, Deserialize, Serialize)]
pub(crate) struct ExportUse {
    /// Its name.
    pub(crate) export: String,
    /// By all of them together.
    pub(crate) bytes_read: u64,
    /// How many are connected.
    pub(crate) clients: usize,
}

/// RFC 3339 with milliseconds.
pub(crate) fn time_text(time: OffsetDateTime) -> String {
    let utc = time.to_offset(time::UtcOffset::UTC);
    utc.format(RFC_3339_MILLISECONDS)
        .expect("years of this clock have four digits")
}

/// A path as far as JSON can hold it.
pub(crate) fn path_text(path: &Path) -> String {
    path.to_string_lossy().into_owned()
}

/// Where `export` can be opened.
pub(crate) fn uris(endpoints: &[Endpoint], export: &str) -> Vec<String> {
    endpoints
        .iter()
        .map(|endpoint| endpoint.uri(export))
        .collect()
}

const RFC_3339_MILLISECONDS: &[BorrowedFormatItem<'_>] =
    format_description!("[year]-[month]-[day]T[hour]:[minute]:[second].[subsecond digits:3]Z");

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_have_milliseconds_and_are_in_utc() {
        let time = OffsetDateTime::from_unix_timestamp_nanos(1_795_209_243_118_999_999).unwrap();
        assert_eq!(time_text(time), "2026-11-20T21:14:03.118Z");
        let elsewhere = time.to_offset(time::UtcOffset::from_hms(5, 30, 0).unwrap());
        assert_eq!(time_text(elsewhere), "2026-11-20T21:14:03.118Z");
    }
}
