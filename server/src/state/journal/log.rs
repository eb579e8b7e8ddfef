use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};

use block::Cells;

/// What a journal asks of the file that it is in.
pub(in crate::state) trait Log: Sized {
    /// What is in it, up to `most` bytes.
    fn load(&self, most: u64) -> io::Result<Vec<u8>>;

    /// Hands `bytes` to the kernel: they survive the process from here on.
    fn store(&self, offset: u64, bytes: &[u8]) -> io::Result<()>;

    /// Takes the space for what will be stored, and leaves the file as long as it is.
    fn reserve_behind(&self, offset: u64, length: u64) -> io::Result<()>;

    /// Makes durable what was stored before the call.
    async fn sync(&self) -> io::Result<()>;

    /// An empty file that can take the place of this one.
    fn successor(&self) -> io::Result<Self>;

    /// Takes the place of the file that this one succeeds.
    fn succeed(&self) -> io::Result<()>;

    /// Makes durable which file is found.
    async fn sync_place(&self) -> io::Result<()>;
}

/// A file under a name.
pub(crate) struct LogFile {
    cells: Cells,
    path: PathBuf,
}

impl LogFile {
    /// The file at `path`, which is empty if there was none.
    pub(super) fn open(path: &Path) -> io::Result<Self> {
        // Not a journal yet when its server was killed.
        let _ = fs::remove_file(successor_of(path));
        match Cells::open(path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Self::create(path),
            other => Ok(Self {
                cells: other?,
                path: path.to_owned(),
            }),
        }
    }

    /// An empty file at `path`, in the place of any that is there.
    pub(super) fn create(path: &Path) -> io::Result<Self> {
        Ok(Self {
            cells: Cells::create(path)?,
            path: path.to_owned(),
        })
    }
}

impl Log for LogFile {
    fn load(&self, most: u64) -> io::Result<Vec<u8>> {
        let mut bytes = vec![0; self.cells.length()?.min(most) as usize];
        self.cells.load(0, &mut bytes)?;
        Ok(bytes)
    }

    fn store(&self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        self.cells.store(offset, bytes)
    }

    fn reserve_behind(&self, offset: u64, length: u64) -> io::Result<()> {
        self.cells.reserve_behind(offset, length)
    }

    async fn sync(&self) -> io::Result<()> {
        self.cells.sync().await
    }

    fn successor(&self) -> io::Result<Self> {
        Ok(Self {
            cells: Cells::create(&successor_of(&self.path))?,
            path: self.path.clone(),
        })
    }

    fn succeed(&self) -> io::Result<()> {
        fs::rename(successor_of(&self.path), &self.path)
    }

    async fn sync_place(&self) -> io::Result<()> {
        let folder = self.path.parent().ok_or(io::ErrorKind::NotFound)?;
        let folder = File::open(folder)?;
        let synced = tokio::task::spawn_blocking(move || folder.sync_all()).await;
        synced.map_err(io::Error::other)?
    }
}

/// Where the file that is to take the place of `path` is made.
fn successor_of(path: &Path) -> PathBuf {
    path.with_extension("new")
}
