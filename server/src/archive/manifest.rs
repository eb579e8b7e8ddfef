//! What is known of a point.

use time::OffsetDateTime;
use uuid::Uuid;

use super::plan::{Identity, Mode, Origin, Since};

/// A point in the folder, without the map and the hashes of its contents.
#[derive(Clone, Debug, PartialEq)]
pub struct Point {
    /// From 1 on; never used again.
    pub number: u64,
    /// The instant that it holds.
    pub instant: OffsetDateTime,
    /// Where it was copied from.
    pub origin: Origin,
    /// The server's backup that it is a copy of.
    pub backup: Option<Identity>,
    /// The checkpoint of that instant.
    pub checkpoint: Option<Identity>,
    /// For how long hooks held the machine, in microseconds.
    pub held_us: Option<u64>,
    /// The disks in it.
    pub disks: Vec<DiskEntry>,
}

/// One disk of a point.
#[derive(Clone, Debug, PartialEq)]
pub struct DiskEntry {
    /// Its name.
    pub name: String,
    /// Its uuid, if the server told one.
    pub uuid: Option<Uuid>,
    /// How large the disk is, in bytes.
    pub size: u64,
    /// Whether all of it is here.
    pub mode: Mode,
    /// Why it is a full, in words.
    pub reason: Option<String>,
    /// The checkpoint since which changes are here.
    pub since: Option<Since>,
    /// What an incremental builds on.
    pub parent: Option<Parent>,
    /// The name of the file, in the folder of the point.
    pub file: String,
    /// How long that file is.
    pub file_size: u64,
    /// How many bytes of the disk are data here.
    pub data_bytes: u64,
    /// How many bytes are recorded as zeroes.
    pub zero_bytes: u64,
}

/// The point that an incremental builds on.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Parent {
    /// Its number.
    pub point: u64,
    /// The hash of its file.
    pub blake3: blake3::Hash,
}
