//! What is found not to be what was written.

use std::ops::Range;
use std::path::Path;

use serde::Serialize;

use super::error::ArchiveError;
use super::inspect::{Fault, part_name};
use super::progress::Progress;
use super::runs;

/// Something in a backup folder that is not what was written.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Damage {
    /// The point that it is in.
    pub point: u64,
    /// The disk whose file it is in, if it is in one.
    pub disk: Option<String>,
    /// The file, from the backup folder on.
    pub file: String,
    /// Where in the file, if it is a stretch of it.
    pub offset: Option<u64>,
    /// How long that stretch is.
    pub length: Option<u64>,
    /// What lies there.
    pub what: String,
    /// What of the disk is lost with it, as offsets and lengths.
    #[serde(with = "runs::pairs")]
    pub lost: Vec<Range<u64>>,
    /// All of it, in words.
    pub message: String,
}

/// Hears of damage as it is found.
pub trait Watch: Progress {
    /// This was found.
    fn found(&self, damage: &Damage);
}

impl Watch for () {
    fn found(&self, _: &Damage) {}
}

impl Damage {
    /// Of a stretch of the file of a disk.
    pub(super) fn in_file(point: u64, disk: &str, file: &str, fault: &Fault) -> Self {
        let file = format!("{point}/{file}");
        Self {
            point,
            disk: Some(disk.to_owned()),
            message: format!(
                "{file} is not what was written, at {} for {} bytes: {fault}",
                fault.offset, fault.length
            ),
            file,
            offset: Some(fault.offset),
            length: Some(fault.length),
            what: part_name(&fault.part).to_owned(),
            lost: fault.guest.clone(),
        }
    }

    /// Of a file of a disk as a whole.
    pub(super) fn of_file(point: u64, disk: &str, file: &str, what: &str, message: &str) -> Self {
        let file = format!("{point}/{file}");
        Self {
            point,
            disk: Some(disk.to_owned()),
            message: format!("{file} {message}"),
            file,
            offset: None,
            length: None,
            what: what.to_owned(),
            lost: Vec::new(),
        }
    }

    /// Of what is no file of a disk.
    pub(super) fn of(point: u64, file: &Path, error: &ArchiveError) -> Self {
        Self {
            point,
            disk: None,
            file: file.display().to_string(),
            offset: None,
            length: None,
            what: match error {
                ArchiveError::MissingLink { .. } | ArchiveError::OtherParent { .. } => "the chain",
                _ => "the manifest",
            }
            .to_owned(),
            lost: Vec::new(),
            message: error.with_cause(),
        }
    }
}
