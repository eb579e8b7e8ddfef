//! A file that is there when it is whole, and not before.

use std::fs::{self, File};
use std::io::{self, BufWriter, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use uuid::Uuid;

use crate::place::rename_to_free_place;

/// What becomes of a file that is at the place.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Occupied {
    /// It stays, which is an error.
    Stays,
    /// It is replaced.
    Goes,
}

/// Why a file is not written.
#[derive(Debug, thiserror::Error)]
pub(crate) enum NotWritten {
    /// Something is at its place, and stays.
    #[error("it exists")]
    Exists,
    /// What is at its place is never replaced: a device, a folder or a link.
    #[error("it is no regular file, and stays")]
    NoFile,
    /// It cannot be written.
    #[error(transparent)]
    Io(#[from] io::Error),
}

impl Occupied {
    /// Whether a file may be put at `place`, as far as can be told now.
    pub(crate) fn look(self, place: &Path) -> Result<(), NotWritten> {
        match place.symlink_metadata() {
            Ok(_) if self == Self::Stays => Err(NotWritten::Exists),
            Ok(found) if !found.is_file() => Err(NotWritten::NoFile),
            Ok(_) => Ok(()),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            Err(error) => Err(error.into()),
        }
    }
}

/// Writes a file beside `place`, makes it durable, and renames it. Killed before that, it leaves what
/// was there, and a file with `.partial` at the end of its name.
pub(crate) fn write_aside(
    place: &Path,
    occupied: Occupied,
    write: impl FnOnce(&mut BufWriter<&File>) -> io::Result<()>,
) -> Result<(), NotWritten> {
    occupied.look(place)?;
    let aside = Aside::create(place)?;
    let mut buffered = BufWriter::with_capacity(WRITTEN_AT_ONCE, &aside.file);
    write(&mut buffered)?;
    buffered.flush()?;
    drop(buffered);
    aside.file.sync_all()?;
    match occupied {
        Occupied::Goes => {
            // It took a while.
            occupied.look(place)?;
            fs::rename(&aside.path, place)?;
        }
        Occupied::Stays => {
            rename_to_free_place(&aside.path, place).map_err(|error| match error.kind() {
                io::ErrorKind::AlreadyExists => NotWritten::Exists,
                _ => error.into(),
            })?;
        }
    }
    let folder = place
        .parent()
        .filter(|folder| !folder.as_os_str().is_empty());
    File::open(folder.unwrap_or(Path::new(".")))?.sync_all()?;
    Ok(())
}

/// A file of our own, which goes unless it is renamed.
struct Aside {
    file: File,
    path: PathBuf,
}

impl Aside {
    fn create(place: &Path) -> io::Result<Self> {
        let name = place.file_name().ok_or(io::ErrorKind::IsADirectory)?;
        let name = name.to_string_lossy();
        let path = place.with_file_name(format!(".{name}.{}.partial", Uuid::new_v4().simple()));
        // What a disk is about is nobody else's business. Nothing that is there is opened, nor a link followed.
        let mut options = File::options();
        let options = options.write(true).create_new(true).mode(0o600);
        let file = options.open(&path)?;
        Ok(Self { file, path })
    }
}

impl Drop for Aside {
    fn drop(&mut self) {
        // It is not there if it has taken its place.
        let _ = fs::remove_file(&self.path);
    }
}

const WRITTEN_AT_ONCE: usize = 256 << 10;
