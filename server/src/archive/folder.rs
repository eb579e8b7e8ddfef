//! The folder as a whole: its points, its lock, what was left half done.

use std::path::{Path, PathBuf};

use super::draft::{Draft, Leftover};
use super::error::ArchiveError;
use super::manifest::{DiskEntry, Point};
use super::plan::Plan;

/// A backup folder that is open.
#[derive(Debug)]
pub struct Archive {
    path: PathBuf,
    points: Vec<Point>,
}

impl Archive {
    /// Opens a folder that is there, to read it; others may read it too.
    pub fn open(path: &Path) -> Result<Self, ArchiveError> {
        let _ = path;
        todo!()
    }

    /// Opens a folder to change it, alone, and makes it if it is not there.
    pub fn open_for_writing(path: &Path) -> Result<Self, ArchiveError> {
        let _ = path;
        todo!()
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Its points, ascending.
    pub fn points(&self) -> &[Point] {
        &self.points
    }

    /// The newest point that has a disk of this name.
    pub fn last_of(&self, disk: &str) -> Option<(&Point, &DiskEntry)> {
        let entry = |point: &'_ Point| point.disks.iter().position(|entry| entry.name == disk);
        let mut newest_first = self.points.iter().rev();
        newest_first.find_map(|point| Some((point, &point.disks[entry(point)?])))
    }

    /// What an interrupted run has left.
    pub fn leftover(&self) -> Result<Leftover, ArchiveError> {
        todo!()
    }

    /// Begins the next point. A leftover must have been discarded.
    pub fn begin(&self, plan: Plan) -> Result<Draft, ArchiveError> {
        let _ = plan;
        todo!()
    }
}
