//! What a point is to hold, decided before the first byte is copied.

use std::ops::Range;

use serde::{Deserialize, Serialize};
use time::OffsetDateTime;
use uuid::Uuid;

/// A point that is to be made.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
pub struct Plan {
    /// Where the disks are copied from.
    pub origin: Origin,
    /// The backup of the server that holds the instant, if the server has such.
    pub backup: Option<Identity>,
    /// The instant that is copied.
    #[serde(with = "time::serde::rfc3339")]
    pub instant: OffsetDateTime,
    /// The checkpoint that the server made of it, if any.
    pub checkpoint: Option<Identity>,
    /// For how long hooks held the machine for it, in microseconds, if there were any.
    #[serde(default)]
    pub held_us: Option<u64>,
    /// The disks, each of its own name.
    pub disks: Vec<DiskPlan>,
}

/// Where disks were copied from.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub struct Origin {
    /// The run directory of the server, or a URI.
    pub place: String,
    /// Whether the server vouches that what it calls unchanged has not changed.
    pub vouched: bool,
}

/// What has a name, and a uuid that is never used again.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub struct Identity {
    /// The name, or id.
    pub name: String,
    /// The uuid.
    pub uuid: Uuid,
}

/// One disk of a point.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub struct DiskPlan {
    /// Its name: by the rules for names of disks.
    pub name: String,
    /// Its uuid, if the server told one.
    pub uuid: Option<Uuid>,
    /// How large it is, in bytes.
    pub size: u64,
    /// Whether all of it is copied.
    pub mode: Mode,
    /// Why it is a full, in words, where an incremental could have been expected.
    pub reason: Option<String>,
    /// The checkpoint since which changes are known; of an incremental.
    pub since: Option<Since>,
    /// The number of the point that an incremental builds on.
    pub parent: Option<u64>,
    /// How finely changes are known, in bytes.
    pub granularity: u64,
    /// What is to be copied; ascending, without overlaps. It need not be aligned to anything: chunks
    /// come rounded out to clusters, and then the rest of a cluster is read from the source too.
    #[serde(with = "super::runs::pairs")]
    pub data: Vec<Range<u64>>,
    /// What reads as zeroes: of a full, all that is no data; of an incremental, what changed to them.
    #[serde(with = "super::runs::pairs")]
    pub zero: Vec<Range<u64>>,
}

/// A checkpoint as a server without uuids can tell of it too.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub struct Since {
    /// The name of the checkpoint or dirty bitmap.
    pub name: String,
    /// The uuid, if it has one.
    pub uuid: Option<Uuid>,
}

/// How much of a disk a point holds.
#[derive(Clone, Copy, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Mode {
    /// All of it.
    Full,
    /// What has changed since the point before.
    Incremental,
}
