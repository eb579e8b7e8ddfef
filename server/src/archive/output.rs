//! Where the contents of a disk are restored to.

use std::fs::{self, File};
use std::io;
use std::ops::Range;
use std::os::unix::fs::{
    FileExt, FileTypeExt, MetadataExt, OpenOptionsExt, PermissionsExt, fchown,
};
use std::path::{Path, PathBuf};

use block::ImageLock;
use block::qcow2::Layout;
use rustix::fs::{SeekFrom, seek};
use rustix::io::Errno;

use super::error::ArchiveError;
use super::folder::sync_folder;
use super::runs;
use super::zeroes::{self, Space};
use crate::place::rename_to_free_place;

/// The shape in which contents are restored.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub enum Format {
    /// As they are; sparse, if it is a file.
    #[default]
    Raw,
    /// A qcow2 file that needs no other.
    Qcow2,
}

/// What is at the output's place.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Existing {
    /// It is left alone.
    Keep,
    /// It is replaced, or overwritten if it is a device.
    Replace,
}

/// Whom a file belongs to that replaces another.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Owner {
    /// Whom the other belonged to; or there was none.
    Kept,
    /// Whoever restores: the system did not let it have the owner, or the group, of the other.
    Changed,
}

/// What is being written.
#[derive(Debug)]
pub(super) enum Output {
    /// A file beside its place, which it takes when it is complete.
    File(Aside),
    /// A device.
    Device { file: File, path: PathBuf },
}

#[derive(Debug)]
pub(super) struct Aside {
    file: File,
    /// Of a qcow2 file.
    layout: Option<Layout>,
    path: PathBuf,
    place: PathBuf,
    /// The file that is to be replaced, locked: nobody may begin to use it that would be left with a file
    /// that has no name any more.
    replaced: Option<File>,
}

impl Output {
    /// Begins to write a disk of `size` bytes, of which no more than `data` will come.
    pub(super) fn begin(
        place: &Path,
        format: Format,
        existing: Existing,
        size: u64,
        data: &[Range<u64>],
    ) -> Result<Self, ArchiveError> {
        let unusable = |reason: String| {
            let path = place.to_owned();
            Err(ArchiveError::Output { path, reason })
        };
        match fs::metadata(place) {
            Ok(_) if existing == Existing::Keep => Err(ArchiveError::Exists(place.to_owned())),
            Ok(found) if found.file_type().is_block_device() => match format {
                Format::Raw => Self::device(place, size),
                Format::Qcow2 => unusable("is a device, which takes raw contents only".to_owned()),
            },
            Ok(found) if !found.is_file() => unusable("is no file and no block device".to_owned()),
            // The file itself is replaced, not a link to it.
            Ok(_) => {
                let real = fs::canonicalize(place);
                let real = real.map_err(|error| ArchiveError::reading(place, error))?;
                let replaced = open_to_lock(&real)?;
                lock(&replaced, &real)?;
                Self::file(&real, format, Some(replaced), size, data)
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                Self::file(place, format, None, size, data)
            }
            Err(error) => Err(ArchiveError::writing(place, error)),
        }
    }

    fn device(path: &Path, size: u64) -> Result<Self, ArchiveError> {
        let unusable = |reason: String| {
            let path = path.to_owned();
            ArchiveError::Output { path, reason }
        };
        // Exclusive: not one that is mounted.
        let flags = rustix::fs::OFlags::EXCL.bits().cast_signed();
        let mut options = File::options();
        // The locks that are shared are for who may read.
        let opened = options
            .read(true)
            .write(true)
            .custom_flags(flags)
            .open(path);
        let file = opened.map_err(|error| match Errno::from_io_error(&error) {
            Some(Errno::BUSY) => unusable("is in use".to_owned()),
            _ => ArchiveError::writing(path, error),
        })?;
        // Nor one that somebody serves, who has it open like any file.
        lock(&file, path)?;
        let length = seek(&file, SeekFrom::End(0));
        let length = length.map_err(|error| ArchiveError::reading(path, error.into()))?;
        if length < size {
            return Err(unusable(format!(
                "has {length} bytes, and the disk has {size}"
            )));
        }
        let path = path.to_owned();
        Ok(Self::Device { file, path })
    }

    fn file(
        place: &Path,
        format: Format,
        replaced: Option<File>,
        size: u64,
        data: &[Range<u64>],
    ) -> Result<Self, ArchiveError> {
        let layout = match format {
            Format::Raw => None,
            Format::Qcow2 => {
                let clusters = data
                    .iter()
                    .map(|run| runs::align_out(run, CLUSTER_SIZE, size));
                let layout = Layout::new(size, CLUSTER_SIZE, &runs::union(clusters), &[]);
                Some(layout.map_err(|error| ArchiveError::Output {
                    path: place.to_owned(),
                    reason: error.to_string(),
                })?)
            }
        };
        let Some(name) = place.file_name() else {
            let (path, reason) = (place.to_owned(), "names no file".to_owned());
            return Err(ArchiveError::Output { path, reason });
        };
        let name = name.to_string_lossy();
        let path = place.with_file_name(format!(".{name}.{}.partial", std::process::id()));
        let writing = |error| ArchiveError::writing(place, error);
        let mut options = File::options();
        let options = options.write(true).create_new(true).mode(0o600);
        let aside = Aside {
            file: options.open(&path).map_err(writing)?,
            layout,
            path,
            place: place.to_owned(),
            replaced,
        };
        let begun = match &aside.layout {
            None => aside.file.set_len(size),
            Some(layout) => layout.write_metadata(&aside.file),
        };
        begun.map_err(writing)?;
        Ok(Self::File(aside))
    }

    /// Writes contents of the disk.
    pub(super) fn write(&self, guest: u64, bytes: &[u8]) -> Result<(), ArchiveError> {
        let written = match self {
            Self::Device { file, .. } => file.write_all_at(bytes, guest),
            Self::File(aside) => aside.write(guest, bytes),
        };
        written.map_err(|error| ArchiveError::writing(self.place(), error))
    }

    /// Writes zeroes.
    pub(super) fn zero(&self, range: &Range<u64>) -> Result<(), ArchiveError> {
        match self {
            // It is all zeroes before anything is written.
            Self::File(_) => Ok(()),
            Self::Device { file, path } => {
                let length = range.end - range.start;
                zeroes::fill(file, range.start, length, Space::Kept)
                    .map_err(|error| ArchiveError::writing(path, error))
            }
        }
    }

    /// Makes it durable, and puts it in its place.
    pub(super) fn finish(self) -> Result<Owner, ArchiveError> {
        let place = self.place().to_owned();
        let finished = match self {
            Self::Device { file, .. } => file.sync_all().map(|()| Owner::Kept),
            Self::File(aside) => match aside.finish() {
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
                    return Err(ArchiveError::Exists(place));
                }
                finished => finished,
            },
        };
        finished.map_err(|error| ArchiveError::writing(&place, error))
    }

    fn place(&self) -> &Path {
        match self {
            Self::File(aside) => &aside.place,
            Self::Device { path, .. } => path,
        }
    }
}

impl Aside {
    /// Writes what is not zero of it.
    fn write(&self, guest: u64, bytes: &[u8]) -> io::Result<()> {
        let start = match &self.layout {
            None => guest,
            Some(layout) => layout.host_offset(guest).expect("it was said to be data"),
        };
        let mut at = 0;
        while at < bytes.len() {
            let is_zero = |block: &[u8]| block::is_zero(block);
            let blocks = |from: usize| bytes[from..].chunks(HOLE);
            let zero: usize = blocks(at).take_while(|b| is_zero(b)).map(<[u8]>::len).sum();
            at += zero;
            let data: usize = blocks(at)
                .take_while(|b| !is_zero(b))
                .map(<[u8]>::len)
                .sum();
            self.file
                .write_all_at(&bytes[at..at + data], start + at as u64)?;
            at += data;
        }
        Ok(())
    }

    fn finish(self) -> io::Result<Owner> {
        let owner = match &self.replaced {
            Some(replaced) => give_rights(&self.file, replaced)?,
            None => Owner::Kept,
        };
        self.file.sync_all()?;
        match &self.replaced {
            Some(_) => fs::rename(&self.path, &self.place)?,
            None => rename_to_free_place(&self.path, &self.place)?,
        }
        let folder = self
            .place
            .parent()
            .filter(|parent| parent != &Path::new(""));
        sync_folder(folder.unwrap_or(Path::new(".")))?;
        Ok(owner)
    }
}

impl Drop for Aside {
    fn drop(&mut self) {
        // It is not there if it has taken its place.
        let _ = fs::remove_file(&self.path);
    }
}

/// Opens a file that is to be replaced.
fn open_to_lock(path: &Path) -> Result<File, ArchiveError> {
    // A network file system locks against others only what can be written.
    let writable = File::options().read(true).write(true).open(path);
    let file = writable.or_else(|_| File::open(path));
    file.map_err(|error| ArchiveError::reading(path, error))
}

/// Locks what is to be replaced or overwritten, as whoever served it would.
fn lock(file: &File, path: &Path) -> Result<(), ArchiveError> {
    let taken = ImageLock::take(file).map(drop);
    taken.map_err(|source| ArchiveError::InUse {
        path: path.to_owned(),
        source,
    })
}

/// Gives a file the owner, the group and the mode of the one that it replaces.
fn give_rights(file: &File, replaced: &File) -> io::Result<Owner> {
    let (own, wanted) = (file.metadata()?, replaced.metadata()?);
    let has_owner = own.uid() == wanted.uid() || fchown(file, Some(wanted.uid()), None).is_ok();
    let has_group = own.gid() == wanted.gid() || fchown(file, None, Some(wanted.gid())).is_ok();
    let mut mode = wanted.mode() & 0o777;
    if !has_group {
        // What the one group might do is not for another.
        mode &= !0o070;
    }
    file.set_permissions(fs::Permissions::from_mode(mode))?;
    Ok(if has_owner && has_group {
        Owner::Kept
    } else {
        Owner::Changed
    })
}

/// What QEMU has by default.
const CLUSTER_SIZE: u64 = 64 << 10;

/// What a file system gives no space for where it is zeroes.
const HOLE: usize = 4 << 10;
