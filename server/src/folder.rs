//! A folder that one disk of one server has for itself.

use std::fs;
use std::io;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};

use crate::failure::Failure;
use crate::lock_file::LockFile;

/// A folder that nobody else uses for as long as this lives. One that was made for it goes with it,
/// unless it [stays](Self::stays).
pub(crate) struct Folder {
    path: PathBuf,
    stays: AtomicBool,
    _lock: LockFile,
}

impl Folder {
    /// Makes `dir` if need be, and keeps every other server out of it. What is in it may be removed;
    /// so it must be ours from the beginning.
    pub(crate) fn claim(dir: &Path, what: &str) -> Result<Self, Failure> {
        let was_there = dir.exists();
        // Old contents of disks lie here: nobody else may look.
        let made = fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(dir);
        made.map_err(|error| cannot_write(dir, &error))?;
        let path = dir.join(FOLDER_LOCK);
        refuse_foreign_folder(dir, &path, what)?;
        let lock = LockFile::take(&path).map_err(|error| cannot_write(&path, &error))?;
        let lock = lock.map_err(|holder| {
            let whose = if holder.is_this_process() {
                "another disk of this server".to_owned()
            } else {
                format!("another server{holder}")
            };
            let dir = dir.display();
            let message = format!("the {what} directory '{dir}' is in use by {whose}");
            Failure::new("locked", message)
        })?;
        Ok(Self {
            path: dir.to_owned(),
            stays: AtomicBool::new(was_there),
            _lock: lock,
        })
    }

    /// From now on something lies in it that is worth keeping.
    pub(crate) fn stays(&self) {
        self.stays.store(true, Ordering::Relaxed);
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        if self.stays.load(Ordering::Relaxed) {
            return;
        }
        if let Err(error) = fs::remove_dir_all(&self.path) {
            let path = self.path.display();
            tracing::warn!(%path, %error, "a folder that nobody needs is left behind");
        }
    }
}

fn refuse_foreign_folder(dir: &Path, lock: &Path, what: &str) -> Result<(), Failure> {
    let mut entries = fs::read_dir(dir).map_err(|error| cannot_write(dir, &error))?;
    if entries.next().is_none() || lock.exists() {
        return Ok(());
    }
    let message = format!(
        "the {what} directory '{}' has files in it that are not Stillpoint's",
        dir.display()
    );
    Err(Failure::new("foreign-directory", message).hint("name an empty directory, or a new one"))
}

/// That `path` cannot be made or written.
pub(crate) fn cannot_write(path: &Path, error: &io::Error) -> Failure {
    Failure::new(
        "cannot-write",
        format!("cannot write '{}': {error}", path.display()),
    )
}

/// Its presence says that a folder is Stillpoint's, and its lock that a server uses it.
const FOLDER_LOCK: &str = "stillpoint.lock";
