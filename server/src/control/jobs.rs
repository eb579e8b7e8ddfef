//! Jobs as the control socket tells of them: QEMU's members, with its hyphens, and ours besides.

use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::answers::{Mode, path_text};
use crate::archive::{self, Point};
use crate::failure::Failure;
use crate::push::{DiskJob, Job, JobStatus, Target};

/// The answer to `query-push-target`.
#[derive(Debug, Deserialize, Serialize)]
pub(crate) struct TargetAnswer {
    /// What the folder is known by.
    pub(crate) uuid: Uuid,
    /// What there is to go on with.
    pub(crate) interrupted: Option<InterruptedAnswer>,
}

/// A push that was interrupted.
#[derive(Debug, Deserialize, Serialize)]
pub(crate) struct InterruptedAnswer {
    /// The id of its backup.
    pub(crate) backup: String,
    /// The identity of that.
    pub(crate) backup_uuid: Uuid,
    /// The names of its disks.
    pub(crate) disks: Vec<String>,
    /// All of each disk is being copied.
    pub(crate) full: bool,
}

/// A job.
#[derive(Debug, Deserialize, Serialize)]
pub(crate) struct JobAnswer {
    /// The backup's, too.
    pub(crate) id: String,
    /// `push`.
    #[serde(rename = "type")]
    pub(crate) kind: String,
    /// In QEMU's words.
    pub(crate) status: String,
    /// Bytes that were copied and read back.
    #[serde(rename = "current-progress")]
    pub(crate) current: u64,
    /// How many there are, of both.
    #[serde(rename = "total-progress")]
    pub(crate) total: u64,
    /// What went wrong, in words.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) error: Option<String>,
    /// The word for that.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) code: Option<String>,
    /// What to do about it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) hint: Option<String>,
    /// The folder.
    pub(crate) to: String,
    /// The number of the point that is being made, when it is known.
    pub(crate) point: Option<u64>,
    /// How many bytes were read back.
    pub(crate) checked_bytes: u64,
    /// What somebody should know.
    pub(crate) notes: Vec<String>,
    /// Its disks, when they are known.
    pub(crate) disks: Vec<DiskJobAnswer>,
    /// What has been published, as the manifest says it, without its maps and hashes of chunks.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) result: Option<Point>,
}

/// A job's share of one disk.
#[derive(Debug, Deserialize, Serialize)]
pub(crate) struct DiskJobAnswer {
    /// Its name.
    pub(crate) disk: String,
    /// Its identity.
    pub(crate) disk_uuid: Option<Uuid>,
    /// In bytes.
    pub(crate) size: u64,
    /// Whether all of it is copied.
    pub(crate) mode: Mode,
    /// Why.
    pub(crate) reason: Option<String>,
    /// The checkpoint since which changes are copied.
    pub(crate) since: Option<String>,
    /// The identity of that.
    pub(crate) since_uuid: Option<Uuid>,
    /// The point that it builds on.
    pub(crate) parent: Option<u64>,
    /// How much has changed.
    pub(crate) changed_bytes: u64,
    /// How much of that reads as zeroes.
    pub(crate) zero_bytes: u64,
    /// How much is to be fetched.
    pub(crate) copy_bytes: u64,
    /// How much of that an earlier job has fetched.
    pub(crate) copied_bytes: u64,
    /// How much has been fetched by now.
    pub(crate) done_bytes: u64,
}

impl TargetAnswer {
    /// Of a folder.
    pub(crate) fn new(target: Target) -> Self {
        Self {
            uuid: target.identity,
            interrupted: target.interrupted.map(|left| InterruptedAnswer {
                backup: left.backup.name,
                backup_uuid: left.backup.uuid,
                disks: left.disks,
                full: left.full,
            }),
        }
    }
}

impl JobAnswer {
    /// How a job stands.
    pub(crate) fn new(job: &Job) -> Self {
        let planned = job.planned();
        let disks = planned.map(|planned| planned.disks.as_slice());
        let disks: Vec<_> = disks.unwrap_or_default().iter().map(disk).collect();
        let sum = |of: fn(&DiskJobAnswer) -> u64| disks.iter().map(of).sum::<u64>();
        let failure: Option<&Failure> = match job.outcome() {
            Some(Err(failure)) => Some(failure),
            Some(Ok(_)) | None => None,
        };
        let published = job.outcome().and_then(|outcome| outcome.as_ref().ok());
        let status = job.status();
        let total = 2 * sum(|disk| disk.copy_bytes);
        let checked = job.checked();
        // What is read back is more than what was copied; a job that has done all has done all.
        let current = match (status, published) {
            (JobStatus::Concluded, Some(_)) => total,
            _ => total.min(sum(|disk| disk.done_bytes) + checked),
        };
        Self {
            id: job.id.to_string(),
            kind: "push".to_owned(),
            status: status.word().to_owned(),
            current,
            total,
            error: failure.map(|failure| failure.message.clone()),
            code: failure.map(|failure| failure.code.to_owned()),
            hint: failure.and_then(|failure| failure.hint.clone()),
            to: path_text(&job.to),
            point: planned.map(|planned| planned.point),
            checked_bytes: checked,
            notes: job.notes(),
            disks,
            result: published.cloned(),
        }
    }
}

fn disk(job: &DiskJob) -> DiskJobAnswer {
    let plan = &job.plan;
    let bytes =
        |runs: &[std::ops::Range<u64>]| -> u64 { runs.iter().map(|run| run.end - run.start).sum() };
    let (data, zero) = (bytes(&plan.data), bytes(&plan.zero));
    DiskJobAnswer {
        disk: plan.name.clone(),
        disk_uuid: plan.uuid,
        size: plan.size,
        mode: match plan.mode {
            archive::Mode::Full => Mode::Full,
            archive::Mode::Incremental => Mode::Incremental,
        },
        reason: plan.reason.clone(),
        since: plan.since.as_ref().map(|since| since.name.clone()),
        since_uuid: plan.since.as_ref().and_then(|since| since.uuid),
        parent: plan.parent,
        changed_bytes: data + zero,
        zero_bytes: zero,
        copy_bytes: job.total,
        copied_bytes: job.before,
        done_bytes: job.done(),
    }
}
