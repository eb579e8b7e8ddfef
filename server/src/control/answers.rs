//! What the control socket says: the one place where names of JSON members are written.
//!
//! Each shape is also what a client reads.

use std::path::Path;

use serde::{Deserialize, Serialize};
use serde_json::Value;
use serde_json::value::RawValue;
use time::OffsetDateTime;
use time::format_description::BorrowedFormatItem;
use time::macros::format_description;
use uuid::Uuid;

use crate::failure::Failure;
use crate::listeners::Endpoint;
use crate::names::Name;
use crate::service::{Event, Outcome, Resized};

/// What a client hears first.
#[derive(Debug, Serialize)]
pub(crate) struct Greeting {
    #[serde(rename = "QMP")]
    qmp: Protocol,
}

#[derive(Debug, Serialize)]
struct Protocol {
    version: Version,
    capabilities: [(); 0],
}

/// Which server this is, in QEMU's shape.
#[derive(Debug, Serialize)]
pub(crate) struct Version {
    qemu: Release,
    package: &'static str,
}

#[derive(Debug, Serialize)]
struct Release {
    major: u32,
    minor: u32,
    micro: u32,
}

/// What follows a command.
#[derive(Debug, Serialize)]
#[serde(untagged)]
pub(crate) enum Reply {
    /// It succeeded.
    Success {
        /// Its answer.
        #[serde(rename = "return")]
        value: Box<RawValue>,
        /// What the client called it.
        #[serde(skip_serializing_if = "Option::is_none")]
        id: Option<Value>,
    },
    /// It failed.
    Failure {
        /// Why.
        error: Fault,
        /// What the client called it.
        #[serde(skip_serializing_if = "Option::is_none")]
        id: Option<Value>,
    },
}

/// Why a command failed.
#[derive(Debug, Deserialize, Serialize)]
pub(crate) struct Fault {
    class: String,
    /// In words.
    pub(crate) desc: String,
    /// For scripts.
    pub(crate) code: String,
    /// What to do about it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) hint: Option<String>,
}

/// Something that happened.
#[derive(Debug, Serialize)]
pub(crate) struct Notice {
    event: &'static str,
    data: Happening,
    timestamp: Timestamp,
}

#[derive(Debug, Serialize)]
struct Happening {
    #[serde(skip_serializing_if = "Option::is_none")]
    id: Option<Name>,
    #[serde(skip_serializing_if = "Option::is_none")]
    disk: Option<Name>,
    #[serde(skip_serializing_if = "Option::is_none")]
    outcome: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    reason: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    used: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    limit: Option<u64>,
}

#[derive(Debug, Serialize)]
struct Timestamp {
    seconds: i64,
    microseconds: u32,
}

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

impl Greeting {
    /// This server's.
    pub(crate) fn current() -> Self {
        let qmp = Protocol {
            version: Version::current(),
            capabilities: [],
        };
        Self { qmp }
    }
}

impl Version {
    /// This server's.
    pub(crate) fn current() -> Self {
        let mut numbers = env!("CARGO_PKG_VERSION")
            .split('.')
            .map(|part| part.parse().unwrap_or(0));
        let mut next = || numbers.next().unwrap_or(0);
        Self {
            qemu: Release {
                major: next(),
                minor: next(),
                micro: next(),
            },
            package: env!("CARGO_PKG_NAME"),
        }
    }
}

impl Reply {
    /// The answer to a command that failed.
    pub(crate) fn failure(failure: &Failure, id: Option<Value>) -> Self {
        let error = Fault {
            class: "GenericError".to_owned(),
            desc: failure.message.clone(),
            code: failure.code.to_owned(),
            hint: failure.hint.clone(),
        };
        Self::Failure { error, id }
    }

    /// The answer to a command that does not exist, or not at this time.
    pub(crate) fn not_found(reason: impl Into<String>, id: Option<Value>) -> Self {
        let error = Fault {
            class: "CommandNotFound".to_owned(),
            desc: reason.into(),
            code: "unknown-command".to_owned(),
            hint: None,
        };
        Self::Failure { error, id }
    }
}

impl Notice {
    /// How clients are told of `event` at time `now`.
    pub(crate) fn new(event: Event, now: OffsetDateTime) -> Self {
        let (mut of_disk, mut used, mut limit) = (None, None, None);
        let (event, id, outcome, reason) = match event {
            Event::Begun { id } => ("BACKUP_BEGUN", Some(id), None, None),
            Event::ScratchThreshold { id, nearest } => {
                (used, limit) = (Some(nearest.used), Some(nearest.limit));
                ("SCRATCH_THRESHOLD", Some(id), None, None)
            }
            Event::Ended { id, outcome } => {
                let outcome = match outcome {
                    Outcome::Committed => "committed",
                    Outcome::Aborted => "aborted",
                };
                ("BACKUP_ENDED", Some(id), Some(outcome), None)
            }
            Event::Broken { id, reason } => ("BACKUP_BROKEN", Some(id), None, Some(reason)),
            Event::TrackingLost { disk, reason } => {
                of_disk = Some(disk);
                ("TRACKING_LOST", None, None, Some(reason))
            }
        };
        Self {
            event,
            data: Happening {
                id,
                disk: of_disk,
                outcome,
                reason,
                used,
                limit,
            },
            timestamp: Timestamp {
                seconds: now.unix_timestamp(),
                microseconds: now.microsecond(),
            },
        }
    }
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
    use serde_json::json;

    use super::*;

    #[test]
    fn times_have_milliseconds_and_are_in_utc() {
        let time = OffsetDateTime::from_unix_timestamp_nanos(1_795_209_243_118_999_999).unwrap();
        assert_eq!(time_text(time), "2026-11-20T21:14:03.118Z");
        let elsewhere = time.to_offset(time::UtcOffset::from_hms(5, 30, 0).unwrap());
        assert_eq!(time_text(elsewhere), "2026-11-20T21:14:03.118Z");
    }

    #[test]
    fn a_failure_keeps_qemus_members_and_adds_ours() {
        let failure = Failure::new("unknown-disk", "there is no disk 'x'").hint("look");
        let reply = serde_json::to_value(Reply::failure(&failure, Some(json!(7)))).unwrap();
        let expected = json!({"error": {"class": "GenericError", "desc": "there is no disk 'x'",
            "code": "unknown-disk", "hint": "look"}, "id": 7});
        assert_eq!(reply, expected);
        let value = RawValue::from_string("{}".to_owned()).unwrap();
        let reply = serde_json::to_string(&Reply::Success { value, id: None }).unwrap();
        assert_eq!(reply, r#"{"return":{}}"#);
    }

    #[test]
    fn events_look_as_qemus_do() {
        let event = Event::Ended {
            id: Name::parse("b1").unwrap(),
            outcome: Outcome::Committed,
        };
        let time = OffsetDateTime::from_unix_timestamp_nanos(5_000_007_000).unwrap();
        assert_eq!(
            serde_json::to_value(Notice::new(event, time)).unwrap(),
            json!({"event": "BACKUP_ENDED", "data": {"id": "b1", "outcome": "committed"},
                "timestamp": {"seconds": 5, "microseconds": 7}})
        );
    }
}
