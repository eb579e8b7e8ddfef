//! What a message of the control socket looks like, as QEMU's clients expect it. What a command answers
//! is in [`answers`](super::answers).

use serde::{Deserialize, Serialize};
use serde_json::Value;
use serde_json::value::RawValue;
use time::OffsetDateTime;

use crate::failure::Failure;
use crate::names::Name;
use crate::service::{Event, Outcome};

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
    status: Option<&'static str>,
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
        let (mut of_disk, mut used, mut limit, mut of_job) = (None, None, None, None);
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
            Event::DiskAdded { disk } => {
                of_disk = Some(disk);
                ("DISK_ADDED", None, None, None)
            }
            Event::DiskRemoved { disk } => {
                of_disk = Some(disk);
                ("DISK_REMOVED", None, None, None)
            }
            Event::Job { id, status } => {
                of_job = Some(status);
                ("JOB_STATUS_CHANGE", Some(id), None, None)
            }
        };
        Self {
            event,
            data: Happening {
                id,
                disk: of_disk,
                outcome,
                status: of_job,
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

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

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
