//! The folder as a whole: its points, its locks, and what was left half done.

use std::fs::{self, DirBuilder, File};
use std::io;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustix::fs::{FlockOperation, flock};
use rustix::io::Errno;
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::begin::{self, Leftover};
use super::draft::Draft;
use super::entries::{
    Entry, IDENTITY, LOCK, LOST_AND_FOUND, PARTIAL, PRUNED, READERS, entries, meaning,
};
use super::error::ArchiveError;
use super::manifest::{DiskEntry, Manifest, Point};
use super::plan::Plan;
use super::sealed::{self, Unsound};
use crate::lock_file::LockFile;

/// A backup folder that is open.
#[derive(Debug)]
pub struct Archive {
    path: PathBuf,
    points: Vec<Point>,
    /// Points of which no manifest can be believed, and why.
    unsound: Vec<(u64, ArchiveError)>,
    writer: Option<Writer>,
    /// Keeps points from being removed meanwhile.
    readers: Option<Reading>,
}

/// Says that points are being read.
#[derive(Debug)]
struct Reading(File);

/// The right to add to a folder and to remove from it; held by one at a time, in all processes.
#[derive(Clone, Debug)]
pub(super) struct Writer(#[expect(dead_code, reason = "held, not used")] Arc<LockFile>);

impl Archive {
    /// Opens a folder that is there, to read it. Others may read it too, and add points.
    pub fn open(path: &Path) -> Result<Self, ArchiveError> {
        let entries = entries(path).map_err(|error| match error.kind() {
            io::ErrorKind::NotFound | io::ErrorKind::NotADirectory => {
                ArchiveError::NoFolder(path.to_owned())
            }
            _ => ArchiveError::reading(path, error),
        })?;
        let is_ours = |(entry, _): &(Entry, _)| matches!(entry, Entry::Point(_) | Entry::Ours);
        if !entries.iter().any(is_ours) {
            return Err(ArchiveError::NoFolder(path.to_owned()));
        }
        let readers = share(&path.join(READERS));
        let readers = readers.map_err(|error| locked_or(path, error, ArchiveError::reading))?;
        let mut archive = Self {
            path: path.to_owned(),
            points: Vec::new(),
            unsound: Vec::new(),
            writer: None,
            readers,
        };
        archive.read_points()?;
        Ok(archive)
    }

    /// Opens a folder to change it, alone, and makes it if it is not there.
    ///
    /// What it then shows is durable, and what was being removed is gone.
    pub fn open_for_writing(path: &Path) -> Result<Self, ArchiveError> {
        let writing = |error| ArchiveError::writing(path, error);
        make_folder(path).map_err(writing)?;
        let found = entries(path).map_err(writing)?;
        let is_new = found.iter().all(|(_, name)| name == LOST_AND_FOUND);
        if !is_new && found.iter().all(|(entry, _)| *entry == Entry::Foreign) {
            return Err(ArchiveError::NotOurs(path.to_owned()));
        }
        let lock = LockFile::take(&path.join(LOCK)).map_err(writing)?;
        let lock = lock.map_err(|holder| ArchiveError::Locked {
            path: path.to_owned(),
            holder: holder.to_string(),
        })?;
        let readers = share(&path.join(READERS));
        let readers = readers.map_err(|error| locked_or(path, error, ArchiveError::writing))?;
        let mut archive = Self {
            path: path.to_owned(),
            points: Vec::new(),
            unsound: Vec::new(),
            writer: Some(Writer(Arc::new(lock))),
            readers,
        };
        archive.identity()?;
        archive.sweep().map_err(writing)?;
        sync_folder(path).map_err(writing)?;
        archive.read_points()?;
        match archive.unsound.pop() {
            None => Ok(archive),
            Some((_, error)) => Err(error),
        }
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Whether what lies at `path`, by whatever way, is a file that we made in it.
    pub(super) fn has_file(&self, path: &Path) -> bool {
        let (Ok(folder), Ok(path)) = (fs::canonicalize(&self.path), fs::canonicalize(path)) else {
            return false;
        };
        let within = path.strip_prefix(folder).ok();
        let first = within.and_then(|within| within.iter().next());
        first.is_some_and(|name| meaning(&name.to_string_lossy()) != Entry::Foreign)
    }

    /// Its points, ascending.
    pub fn points(&self) -> &[Point] {
        &self.points
    }

    /// The newest point that has a disk of this name.
    pub fn last_of(&self, disk: &str) -> Option<(&Point, &DiskEntry)> {
        let mut newest_first = self.points.iter().rev();
        newest_first.find_map(|point| Some((point, point.disk(disk)?)))
    }

    /// The point of this number.
    pub fn point(&self, number: u64) -> Option<&Point> {
        self.points.iter().find(|point| point.number == number)
    }

    /// What the folder is known by, wherever it lies; made when it is first written.
    pub fn identity(&self) -> Result<Uuid, ArchiveError> {
        let path = self.path.join(IDENTITY);
        match File::open(&path) {
            Ok(file) => {
                let damaged = |reason: &str| ArchiveError::Manifest {
                    path: path.clone(),
                    reason: reason.to_owned(),
                };
                let text = sealed::read_at_most(file, IDENTITY_MAX)
                    .map_err(|error| ArchiveError::reading(&path, error))?
                    .ok_or_else(|| damaged("it is too long"))?;
                match sealed::unseal::<FolderDocument>(&text, VERSION) {
                    Ok(document) => Ok(document.uuid),
                    Err(Unsound::Damaged(reason)) => Err(damaged(&reason)),
                    Err(Unsound::Newer(version)) => Err(ArchiveError::Newer {
                        path,
                        version,
                        known: VERSION,
                    }),
                }
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound && self.writer.is_some() => {
                let uuid = Uuid::new_v4();
                let version = VERSION;
                let text = sealed::seal(&FolderDocument { version, uuid });
                let written = write_aside(&path, &text);
                written.map_err(|error| ArchiveError::writing(&path, error))?;
                Ok(uuid)
            }
            Err(error) => Err(ArchiveError::reading(&path, error)),
        }
    }

    /// What an interrupted run has left.
    pub fn leftover(&self) -> Result<Leftover, ArchiveError> {
        let writer = self.writer()?;
        let entries = entries(&self.path);
        let entries = entries.map_err(|error| ArchiveError::reading(&self.path, error))?;
        let partial = entries.iter().find_map(|(entry, _)| match entry {
            Entry::Partial(number) => Some(*number),
            _ => None,
        });
        match partial {
            None => Ok(Leftover::Nothing),
            Some(number) => begin::found(self, number, writer),
        }
    }

    /// Begins the next point. A leftover must have been discarded.
    pub fn begin(&self, plan: Plan) -> Result<Draft, ArchiveError> {
        let writer = self.writer()?;
        let newest = self.points.last().map_or(0, |point| point.number);
        begin::begin(self, newest + 1, plan, writer)
    }

    /// The folder of a point.
    pub(super) fn folder_of(&self, number: u64) -> PathBuf {
        self.path.join(number.to_string())
    }

    /// The folder of a point that is being made.
    pub(super) fn partial_folder_of(&self, number: u64) -> PathBuf {
        self.path.join(format!("{number}{PARTIAL}"))
    }

    /// The points of which no manifest can be believed, and why.
    pub fn unsound(&self) -> &[(u64, ArchiveError)] {
        &self.unsound
    }

    /// All that is known of a point.
    pub(super) fn manifest(&self, number: u64) -> Result<Manifest, ArchiveError> {
        Manifest::read(&self.folder_of(number), number)
    }

    /// Removes points, in this order. Nobody else may be reading.
    pub(super) fn remove(&self, numbers: &[u64]) -> Result<(), ArchiveError> {
        self.writer()?;
        let _alone = self.alone()?;
        for number in numbers {
            let (from, to) = (self.folder_of(*number), self.pruned_folder_of(*number));
            let removed = fs::rename(&from, &to)
                .and_then(|()| sync_folder(&self.path))
                .and_then(|()| fs::remove_dir_all(&to));
            removed.map_err(|error| ArchiveError::writing(&from, error))?;
        }
        Ok(())
    }

    fn pruned_folder_of(&self, number: u64) -> PathBuf {
        self.path.join(format!("{number}{PRUNED}"))
    }

    fn alone(&self) -> Result<Alone<'_>, ArchiveError> {
        if let Some(readers) = &self.readers {
            flock(&readers.0, FlockOperation::NonBlockingLockExclusive)
                .map_err(|error| locked_or(&self.path, error.into(), ArchiveError::writing))?;
        }
        Ok(Alone(self.readers.as_ref()))
    }

    fn writer(&self) -> Result<Writer, ArchiveError> {
        let read_only = || ArchiveError::Plan("the folder is open for reading".to_owned());
        self.writer.clone().ok_or_else(read_only)
    }

    fn read_points(&mut self) -> Result<(), ArchiveError> {
        let entries = entries(&self.path);
        let entries = entries.map_err(|error| ArchiveError::reading(&self.path, error))?;
        let number = |(entry, _): &(Entry, _)| match entry {
            Entry::Point(number) => Some(*number),
            _ => None,
        };
        let mut numbers: Vec<_> = entries.iter().filter_map(number).collect();
        numbers.sort_unstable();
        for number in numbers {
            // One after the other: the map and the hashes of one at a time are in memory.
            match self.manifest(number) {
                Ok(manifest) => self.points.push(manifest.point),
                Err(error) => self.unsound.push((number, error)),
            }
        }
        Ok(())
    }

    /// Removes what earlier runs were removing, and what a point needed only until it was whole.
    fn sweep(&self) -> io::Result<()> {
        for (entry, name) in entries(&self.path)? {
            match entry {
                Entry::Pruned(_) => fs::remove_dir_all(self.path.join(name))?,
                Entry::Point(number) => begin::sweep(&self.folder_of(number)),
                _ => {}
            }
        }
        Ok(())
    }
}

/// Nobody else reads until it is dropped.
struct Alone<'a>(Option<&'a Reading>);

impl Drop for Alone<'_> {
    fn drop(&mut self) {
        if let Some(readers) = self.0 {
            // What fails here keeps others out until this process ends.
            let _ = flock(&readers.0, FlockOperation::NonBlockingLockShared);
        }
    }
}

impl Drop for Reading {
    fn drop(&mut self) {
        // Closing alone would leave it to a child that was forked and has not closed its files yet.
        let _ = flock(&self.0, FlockOperation::Unlock);
    }
}

/// Makes what is in a folder, as names, survive whatever happens to the machine.
pub(super) fn sync_folder(path: &Path) -> io::Result<()> {
    File::open(path)?.sync_all()
}

/// Makes the file at `path`, whole or not at all, also if the machine loses power.
pub(super) fn write_aside(path: &Path, text: &[u8]) -> io::Result<()> {
    let aside = path.with_extension("new");
    let mut options = File::options();
    let options = options.write(true).create(true).truncate(true).mode(0o600);
    let mut file = options.open(&aside)?;
    io::Write::write_all(&mut file, text)?;
    file.sync_all()?;
    fs::rename(&aside, path)
}

fn make_folder(path: &Path) -> io::Result<()> {
    match DirBuilder::new().mode(0o700).create(path) {
        Ok(()) => {
            // Of `x`, the folder that it is in is called nothing.
            let parent = path.parent().filter(|parent| parent != &Path::new(""));
            sync_folder(parent.unwrap_or(Path::new(".")))
        }
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(()),
        Err(error) => Err(error),
    }
}

/// Says to whoever would remove something that it is being read. Where the file of the lock cannot
/// be made, nothing can be removed either.
fn share(path: &Path) -> io::Result<Option<Reading>> {
    use io::ErrorKind::{PermissionDenied, ReadOnlyFilesystem, StorageFull};
    let mut options = File::options();
    let options = options.read(true).write(true).create(true).mode(0o600);
    let file = match File::open(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => match options.open(path) {
            Err(e)
                if matches!(
                    e.kind(),
                    PermissionDenied | ReadOnlyFilesystem | StorageFull
                ) =>
            {
                return Ok(None);
            }
            made => made?,
        },
        Err(error) if error.kind() == PermissionDenied => return Ok(None),
        found => found?,
    };
    flock(&file, FlockOperation::NonBlockingLockShared)?;
    Ok(Some(Reading(file)))
}

fn locked_or(
    path: &Path,
    error: io::Error,
    otherwise: fn(&Path, io::Error) -> ArchiveError,
) -> ArchiveError {
    if Errno::from_io_error(&error) == Some(Errno::WOULDBLOCK) {
        let (path, holder) = (path.to_owned(), String::new());
        return ArchiveError::Locked { path, holder };
    }
    otherwise(path, error)
}

/// The shape of `folder.json`.
#[derive(Deserialize, Serialize)]
struct FolderDocument {
    version: u64,
    uuid: Uuid,
}

const IDENTITY_MAX: u64 = 64 << 10;
const VERSION: u64 = 1;
