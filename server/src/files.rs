//! Disks and snapshots on files.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use bitmap::PageStore;
use block::{Cells, FileStorage};
use scratch::{Snapshot, SnapshotFiles, World};

use crate::hooks::Hooks;

/// Files and block devices.
pub(crate) struct Files;

impl World for Files {
    type Image = FileStorage;
    type Scratch = FileStorage;
    type Pages = CellPages;
    type Pace = Hooks;
}

/// Pages in a file of cells.
pub(crate) struct CellPages(Cells);

impl PageStore for CellPages {
    fn store(&self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        self.0.store(offset, bytes)
    }
}

impl CellPages {
    /// Pages of zeroes, in a new file at `path`.
    pub(crate) fn create(path: &Path) -> io::Result<Self> {
        Cells::create(path).map(Self)
    }
}

/// The folder in which one disk's share of one backup lies. Removed when dropped.
#[derive(Debug)]
pub(crate) struct SnapshotDir(PathBuf);

impl SnapshotDir {
    /// Makes the folder, for a disk of `size` bytes, and the files in it.
    pub(crate) fn create(path: PathBuf, size: u64) -> io::Result<(Self, SnapshotFiles<Files>)> {
        fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(&path)?;
        let dir = Self(path);
        let scratch = File::options()
            .read(true)
            .write(true)
            .create(true)
            .truncate(true)
            .mode(0o600)
            .open(dir.0.join("scratch"))?;
        scratch.set_len(size)?;
        let states = Cells::create(&dir.0.join("states"))?;
        states.reserve(Snapshot::<Files>::RECORD_BYTES)?;
        let files = SnapshotFiles {
            scratch: FileStorage::new(scratch)?,
            states: CellPages(states),
            eras: CellPages::create(&dir.0.join("eras"))?,
        };
        Ok((dir, files))
    }
}

impl SnapshotDir {
    /// Removes the folder; what is open in it goes when it is closed.
    pub(crate) fn remove(&self) {
        match fs::remove_dir_all(&self.0) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                tracing::warn!(path = %self.0.display(), %error, "scratch files are left behind");
            }
            _ => {}
        }
    }
}

impl Drop for SnapshotDir {
    fn drop(&mut self) {
        self.remove();
    }
}
