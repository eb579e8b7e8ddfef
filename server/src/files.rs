//! Disks and snapshots on files.

use std::fs::{self, File};
use std::io;
use std::ops::Range;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};

use bitmap::PageStore;
use block::{Cells, FileStorage};
use scratch::{Durable, Snapshot, SnapshotFiles, World};

use rustix::fs::{MemfdFlags, memfd_create};

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

impl From<Cells> for CellPages {
    fn from(cells: Cells) -> Self {
        Self(cells)
    }
}

impl PageStore for CellPages {
    fn store(&self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        self.0.store(offset, bytes)
    }

    fn load(&self, offset: u64, bytes: &mut [u8]) -> io::Result<()> {
        self.0.load(offset, bytes)
    }

    fn stored(&self, offset: u64) -> io::Result<Option<Range<u64>>> {
        self.0.stored(offset)
    }
}

impl Durable for CellPages {
    async fn sync(&self) -> io::Result<()> {
        self.0.sync().await
    }
}

impl CellPages {
    /// Pages of zeroes, in a new file at `path`.
    pub(crate) fn create(path: &Path) -> io::Result<Self> {
        Cells::create(path).map(Self)
    }
}

/// The folder in which one disk's share of one backup lies. Removed when dropped, unless it is to
/// be [kept](Self::keep).
#[derive(Debug)]
pub(crate) struct SnapshotDir {
    path: PathBuf,
    kept: AtomicBool,
}

impl SnapshotDir {
    /// Makes the folder, for a disk of `size` bytes, and the files in it.
    pub(crate) fn create(path: PathBuf, size: u64) -> io::Result<(Self, SnapshotFiles<Files>)> {
        fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(&path)?;
        let dir = Self {
            path,
            kept: AtomicBool::new(false),
        };
        let scratch = File::options()
            .read(true)
            .write(true)
            .create(true)
            .truncate(true)
            .mode(0o600)
            .open(dir.path.join(SCRATCH))?;
        scratch.set_len(size)?;
        let states = Cells::create(&dir.path.join(STATES))?;
        states.reserve(Snapshot::<Files>::RECORD_BYTES)?;
        states.extend(states_bytes(size))?;
        let files = SnapshotFiles {
            scratch: FileStorage::new(scratch)?,
            states: CellPages(states),
            eras: CellPages::create(&dir.path.join(ERAS))?,
        };
        Ok((dir, files))
    }

    /// The folder and its files, as an earlier server left them.
    pub(crate) fn open(path: PathBuf, size: u64) -> io::Result<(Self, SnapshotFiles<Files>)> {
        let scratch = File::options()
            .read(true)
            .write(true)
            .open(path.join(SCRATCH))?;
        let files: SnapshotFiles<Files> = SnapshotFiles {
            scratch: FileStorage::new(scratch)?,
            states: CellPages(Cells::open(&path.join(STATES))?),
            eras: CellPages(Cells::open(&path.join(ERAS))?),
        };
        if block::Storage::size(&files.scratch) != size
            || files.states.0.length()? != states_bytes(size)
        {
            return Err(io::Error::other("the scratch files are not whole"));
        }
        Ok((
            Self {
                path,
                kept: AtomicBool::new(true),
            },
            files,
        ))
    }

    /// Makes the folder and its files survive, as files, whatever happens to the machine.
    pub(crate) fn sync_names(&self) -> io::Result<()> {
        let parents = self.path.ancestors().take(FOLDERS_MADE);
        parents
            .into_iter()
            .try_for_each(|folder| File::open(folder)?.sync_all())
    }

    /// Where the bits of the backup's dirty bitmap number `number` lie.
    pub(crate) fn bitmap(&self, number: usize) -> PathBuf {
        self.path.join(format!("bitmap-{number}"))
    }

    /// It is known of in the journal, and stays until it is removed.
    pub(crate) fn keep(&self) {
        self.kept.store(true, Ordering::Relaxed);
    }

    /// Removes the folder; what is open in it goes when it is closed.
    pub(crate) fn remove(&self) {
        match fs::remove_dir_all(&self.path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                let path = self.path.display();
                tracing::warn!(%path, %error, "scratch files are left behind");
            }
            _ => {}
        }
    }
}

impl Drop for SnapshotDir {
    fn drop(&mut self) {
        if !self.kept.load(Ordering::Relaxed) {
            self.remove();
        }
    }
}

/// How long the states of a disk of `size` bytes are: a state that is missing is no state.
fn states_bytes(size: u64) -> u64 {
    Snapshot::<Files>::RECORD_BYTES + size.div_ceil(scratch::GRANULE)
}

/// Files that nobody can find, for a snapshot of which nothing is left.
pub(crate) fn nowhere(size: u64) -> io::Result<SnapshotFiles<Files>> {
    let file = || Ok::<_, io::Error>(File::from(memfd_create("lost", MemfdFlags::CLOEXEC)?));
    let scratch = file()?;
    scratch.set_len(size)?;
    Ok(SnapshotFiles {
        scratch: FileStorage::new(scratch)?,
        states: CellPages(Cells::from(file()?)),
        eras: CellPages(Cells::from(file()?)),
    })
}

const SCRATCH: &str = "scratch";
const STATES: &str = "states";
const ERAS: &str = "eras";

/// The folder itself, the one of all backups, and the one that that is in.
const FOLDERS_MADE: usize = 3;
