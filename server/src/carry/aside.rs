//! A file that is there when it is whole, and not before.

use std::fs::{self, File};
use std::io::{self, BufWriter, Write};
use std::path::Path;

use rustix::fs::{CWD, RenameFlags, renameat_with};

/// What becomes of a file that is at the place.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Occupied {
    /// It stays, which is an error.
    Stays,
    /// It is replaced.
    Goes,
}

/// Writes a file beside `place`, makes it durable, and renames it. Killed before that, it leaves what
/// was there, and a file that the next one writes over.
pub(crate) fn write_aside(
    place: &Path,
    occupied: Occupied,
    write: impl FnOnce(&mut BufWriter<&File>) -> io::Result<()>,
) -> io::Result<()> {
    if occupied == Occupied::Stays && place.symlink_metadata().is_ok() {
        return Err(io::ErrorKind::AlreadyExists.into());
    }
    let mut aside = place.as_os_str().to_owned();
    aside.push(".partial");
    let file = File::create(&aside)?;
    let mut buffered = BufWriter::with_capacity(WRITTEN_AT_ONCE, &file);
    let written = write(&mut buffered).and_then(|()| buffered.flush());
    drop(buffered);
    if let Err(error) = written.and_then(|()| file.sync_all()) {
        // Half of it is of no use to anyone.
        let _ = fs::remove_file(&aside);
        return Err(error);
    }
    match occupied {
        Occupied::Goes => fs::rename(&aside, place)?,
        Occupied::Stays => {
            renameat_with(CWD, &aside, CWD, place, RenameFlags::NOREPLACE)?;
        }
    }
    let folder = place
        .parent()
        .filter(|folder| !folder.as_os_str().is_empty());
    File::open(folder.unwrap_or(Path::new(".")))?.sync_all()
}

const WRITTEN_AT_ONCE: usize = 256 << 10;
