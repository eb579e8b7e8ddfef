//! Disks and snapshots on files.

use std::fs::{self, File};
use std::io;
use std::ops::Range;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};

use bitmap::PageStore;
use block::{Cells, Engine, FileStorage};
use scratch::{Durable, Snapshot, SnapshotFiles, World};

use rustix::fs::{MemfdFlags, memfd_create};

use crate::hooks::Hooks;
use crate::image::Image;

/// Images of every kind, with scratch and state in files.
pub(crate) struct Files;

impl World for Files {
    type Image = Image;
    type Scratch = FileStorage;
    type Pages = CellPages;
    type Pace = Hooks;
}

/// Pages in a file of cells.
pub(crate) struct CellPages {
    cells: Cells,
    /// Of a file whose place another may take.
    path: Option<PathBuf>,
}

impl From<Cells> for CellPages {
    fn from(cells: Cells) -> Self {
        Self { cells, path: None }
    }
}

impl PageStore for CellPages {
    fn store(&self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        self.cells.store(offset, bytes)
    }

    fn load(&self, offset: u64, bytes: &mut [u8]) -> io::Result<()> {
        self.cells.load(offset, bytes)
    }

    fn stored(&self, offset: u64) -> io::Result<Option<Range<u64>>> {
        self.cells.stored(offset)
    }

    fn make_room(&self, length: u64) -> io::Result<()> {
        self.cells.extend_reserved(length)
    }
}

impl Durable for CellPages {
    async fn sync(&self) -> io::Result<()> {
        self.cells.sync().await
    }

    fn successor(&self) -> io::Result<Self> {
        let cells = Cells::create(&successor_of(self.path()?))?;
        cells.extend(self.cells.length()?)?;
        Ok(Self {
            cells,
            path: self.path.clone(),
        })
    }

    fn succeed(&self) -> io::Result<()> {
        let path = self.path()?;
        fs::rename(successor_of(path), path)
    }

    async fn sync_place(&self) -> io::Result<()> {
        let folder = self.path()?.parent().ok_or(io::ErrorKind::NotFound)?;
        Cells::from(File::open(folder)?).sync().await
    }
}

/// Where the file that is to take the place of `path` is made.
fn successor_of(path: &Path) -> PathBuf {
    path.with_extension("new")
}

impl CellPages {
    /// Pages of zeroes, in a new file at `path`.
    pub(crate) fn create(path: &Path) -> io::Result<Self> {
        Ok(Self::at(path, Cells::create(path)?))
    }

    /// The pages in `cells`, which were opened at `path`.
    pub(crate) fn at(path: &Path, cells: Cells) -> Self {
        Self {
            cells,
            path: Some(path.to_owned()),
        }
    }

    fn path(&self) -> io::Result<&Path> {
        let path = self.path.as_deref();
        path.ok_or_else(|| io::ErrorKind::Unsupported.into())
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
    pub(crate) fn create(
        path: PathBuf,
        size: u64,
        engine: Engine,
    ) -> io::Result<(Self, SnapshotFiles<Files>)> {
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
        let second = Cells::create(&dir.path.join(SECOND))?;
        second.extend(granules(size))?;
        let files = SnapshotFiles {
            scratch: FileStorage::new(scratch, engine)?,
            states: CellPages::from(states),
            second: CellPages::from(second),
            eras: CellPages::create(&dir.path.join(ERAS))?,
        };
        Ok((dir, files))
    }

    /// The folder as an earlier server left it, whatever that is.
    pub(crate) fn left_at(path: PathBuf) -> Self {
        Self {
            path,
            kept: AtomicBool::new(true),
        }
    }

    /// The files in it.
    pub(crate) fn open(&self, size: u64, engine: Engine) -> io::Result<SnapshotFiles<Files>> {
        let scratch = File::options()
            .read(true)
            .write(true)
            .open(self.path.join(SCRATCH))?;
        let files: SnapshotFiles<Files> = SnapshotFiles {
            scratch: FileStorage::new(scratch, engine)?,
            states: CellPages::from(Cells::open(&self.path.join(STATES))?),
            second: CellPages::from(Cells::open(&self.path.join(SECOND))?),
            eras: CellPages::from(Cells::open(&self.path.join(ERAS))?),
        };
        if block::Storage::size(&files.scratch) != size
            || files.states.cells.length()? != states_bytes(size)
            || files.second.cells.length()? != granules(size)
        {
            return Err(io::Error::other("the files are not whole"));
        }
        Ok(files)
    }

    /// Why what is in it is broken, if that is recorded.
    pub(crate) fn recorded_break(&self) -> Option<String> {
        let states = CellPages::from(Cells::open(&self.path.join(STATES)).ok()?);
        Snapshot::<Files>::recorded_break(&states).ok()?
    }

    /// The folder that it is in.
    pub(crate) fn parent(&self) -> &Path {
        self.path.parent().unwrap_or(&self.path)
    }

    /// Gives back the space of the files, and leaves the record. What is left is too short to be
    /// taken for a snapshot, also after a kill at any moment.
    pub(crate) async fn release(&self) {
        let path = self.path.clone();
        let released = tokio::task::spawn_blocking(move || {
            // The first is what tells, and what counts.
            for (file, length) in [
                (SCRATCH, 0),
                (STATES, Snapshot::<Files>::RECORD_BYTES),
                (SECOND, 0),
                (ERAS, 0),
            ] {
                shorten(&path.join(file), length)?;
            }
            Ok(())
        });
        let released = released.await.map_err(io::Error::other);
        if let Err(error) = released.and_then(|done: io::Result<()>| done) {
            let path = self.path.display();
            tracing::warn!(%path, %error, "scratch takes space that nobody needs");
        }
    }

    /// Makes the folder and its files survive, as files, whatever happens to the machine.
    pub(crate) async fn sync_names(&self) -> io::Result<()> {
        let path = self.path.clone();
        let sync = move || {
            let mut parents = path.ancestors().take(FOLDERS_MADE);
            parents.try_for_each(|folder| File::open(folder)?.sync_all())
        };
        // A guest may wait for a sync that it shares with a task of this thread.
        let synced = tokio::task::spawn_blocking(sync).await;
        synced.map_err(io::Error::other)?
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
    Snapshot::<Files>::RECORD_BYTES + granules(size)
}

fn granules(size: u64) -> u64 {
    size.div_ceil(scratch::GRANULE)
}

/// Cuts the file at `path`, if there is one and it is longer.
fn shorten(path: &Path, length: u64) -> io::Result<()> {
    match File::options().write(true).open(path) {
        Ok(file) if file.metadata()?.len() > length => file.set_len(length),
        Ok(_) => Ok(()),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(error) => Err(error),
    }
}

/// Files that nobody can find, for a snapshot of which nothing is left.
pub(crate) fn nowhere(size: u64) -> io::Result<SnapshotFiles<Files>> {
    let file = || Ok::<_, io::Error>(File::from(memfd_create("lost", MemfdFlags::CLOEXEC)?));
    let scratch = file()?;
    scratch.set_len(size)?;
    Ok(SnapshotFiles {
        scratch: FileStorage::new(scratch, Engine::Threads)?,
        states: CellPages::from(Cells::from(file()?)),
        second: CellPages::from(Cells::from(file()?)),
        eras: CellPages::from(Cells::from(file()?)),
    })
}

const SCRATCH: &str = "scratch";
const STATES: &str = "states";
const SECOND: &str = "states2";
const ERAS: &str = "eras";

/// The folder itself, the one of all backups, and the one that that is in.
const FOLDERS_MADE: usize = 3;
