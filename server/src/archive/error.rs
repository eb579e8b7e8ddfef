//! Why something about a backup folder was not done.

use std::io;
use std::path::{Path, PathBuf};

use block::LockError;
use thiserror::Error;

use crate::failure::Failure;

/// Divided by who has to do something about it.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum ArchiveError {
    /// There is no backup folder at this path.
    #[error("'{}' holds no backups", .0.display())]
    NoFolder(PathBuf),
    /// What lies there is not ours.
    #[error("'{}' is not empty, and no folder of backups", .0.display())]
    NotOurs(PathBuf),
    /// Somebody else changes the folder, or reads what is to be removed.
    #[error("'{}' is in use by another process{holder}", path.display())]
    Locked {
        /// The folder.
        path: PathBuf,
        /// Who, as a text to append, where that is known.
        holder: String,
    },
    /// It cannot be written.
    #[error("cannot write '{}'", path.display())]
    NotWritable {
        /// What cannot be written.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// There is no space left; what was copied so far stays.
    #[error("no space is left for '{}'", .0.display())]
    NoSpace(PathBuf),
    /// The folder has backups of another disk under this name.
    #[error("'{}' has backups of another disk called {disk}", path.display())]
    OtherDisk {
        /// The folder.
        path: PathBuf,
        /// The name.
        disk: String,
    },
    /// A newer program has written there.
    #[error(
        "'{}' has version {version} of the format, and this program knows {known}",
        path.display()
    )]
    Newer {
        /// The file.
        path: PathBuf,
        /// Its version.
        version: u64,
        /// The newest that is known here.
        known: u64,
    },
    /// A point that another one builds on is missing.
    #[error("point {point} builds on point {missing} for {disk}, which is not there")]
    MissingLink {
        /// The point that is there.
        point: u64,
        /// Its disk.
        disk: String,
        /// The one that is not.
        missing: u64,
    },
    /// What a point builds on is not what it was when the point was made.
    #[error("point {point} builds on another file of {disk} than point {parent} has")]
    OtherParent {
        /// The point.
        point: u64,
        /// Its disk.
        disk: String,
        /// What it builds on.
        parent: u64,
    },
    /// There is no such point, or no such disk in it.
    #[error("{0}")]
    Unknown(String),
    /// Something lies where contents are to be restored to.
    #[error("'{}' is there already", .0.display())]
    Exists(PathBuf),
    /// Contents cannot be restored to what is there.
    #[error("'{}' {reason}", path.display())]
    Output {
        /// What is there.
        path: PathBuf,
        /// Why it cannot take them.
        reason: String,
    },
    /// What is there is in use.
    #[error("cannot use '{}'", path.display())]
    InUse {
        /// What is there.
        path: PathBuf,
        /// By whom, where that is known.
        source: LockError,
    },
    /// A manifest is not what was written.
    #[error("'{}' is damaged: {reason}", path.display())]
    Manifest {
        /// The manifest.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// What was stored is not what was received.
    #[error("'{}' is not what was written, at offset {offset}: {what}", path.display())]
    Differs {
        /// The file.
        path: PathBuf,
        /// Where in it.
        offset: u64,
        /// What lies there.
        what: String,
    },
    /// A point that cannot be made.
    #[error("no such point can be made: {0}")]
    Plan(String),
    /// It was asked to stop; what was copied so far stays.
    #[error("stopped")]
    Stopped,
    /// The machine gives no thread to read with.
    #[error("no thread can be started")]
    NoThread(#[source] io::Error),
    /// Anything else that a file system can meet.
    #[error("cannot access '{}'", path.display())]
    Io {
        /// What was accessed.
        path: PathBuf,
        /// What came of it.
        source: io::Error,
    },
}

impl ArchiveError {
    /// What it means that `path` could not be written.
    pub(super) fn writing(path: &Path, source: io::Error) -> Self {
        use io::ErrorKind::{PermissionDenied, QuotaExceeded, ReadOnlyFilesystem, StorageFull};
        let path = path.to_owned();
        match source.kind() {
            StorageFull | QuotaExceeded => Self::NoSpace(path),
            PermissionDenied | ReadOnlyFilesystem => Self::NotWritable { path, source },
            _ => Self::Io { path, source },
        }
    }

    /// What it means that `path` could not be read.
    pub(super) fn reading(path: &Path, source: io::Error) -> Self {
        let path = path.to_owned();
        Self::Io { path, source }
    }

    /// What it says, and what the system said.
    pub(super) fn with_cause(&self) -> String {
        match std::error::Error::source(self) {
            None => self.to_string(),
            Some(cause) => format!("{self}: {cause}"),
        }
    }

    /// A word that scripts can compare.
    pub fn code(&self) -> &'static str {
        match self {
            Self::NoFolder(_) => "no-backup-folder",
            Self::NotOurs(_) => "not-a-backup-folder",
            Self::Locked { .. } => "folder-in-use",
            Self::NotWritable { .. } => "not-writable",
            Self::NoSpace(_) => "no-space",
            Self::OtherDisk { .. } => "other-disk",
            Self::Newer { .. } => "newer-version",
            Self::MissingLink { .. } => "missing-point",
            Self::OtherParent { .. } => "other-parent",
            Self::Unknown(_) => "unknown-point",
            Self::Exists(_) => "output-exists",
            Self::Output { .. } => "unusable-output",
            Self::InUse { .. } => "image-locked",
            Self::Manifest { .. } => "damaged-manifest",
            Self::Differs { .. } => "verification-failed",
            Self::Plan(_) => "impossible-point",
            Self::Stopped => "stopped",
            Self::NoThread(_) => "no-thread",
            Self::Io { .. } => "io-error",
        }
    }

    /// What to do about it, where that is not obvious.
    pub fn hint(&self) -> Option<&'static str> {
        match self {
            Self::NotOurs(_) => Some("give the path of a new or an empty folder"),
            Self::Locked { .. } => Some("wait until the other one is done"),
            Self::NotWritable { .. } => Some("give a folder that you may write"),
            Self::NoSpace(_) => Some("make room, and run it again"),
            Self::OtherDisk { .. } => Some("give another folder, or another name to the disk"),
            Self::Newer { .. } => Some("use a newer stillpoint"),
            Self::MissingLink { .. } => Some("put the folder of that point back where it was"),
            Self::Unknown(_) => Some("stillpoint list shows what there is"),
            Self::Exists(_) => Some("give another path, or --force to replace it"),
            Self::InUse {
                source: LockError::Held { .. },
                ..
            } => Some("stop whoever uses it, or give another path"),
            Self::NoThread(_) => {
                Some("run it again when less runs, or with a higher limit of threads")
            }
            Self::Manifest { .. } => Some("stillpoint verify tells what is sound"),
            Self::Differs { .. } => {
                Some("run it again: what differs is copied anew; then suspect the storage")
            }
            _ => None,
        }
    }

    /// Whether stored data is not what it should be.
    pub fn is_damage(&self) -> bool {
        matches!(
            self,
            Self::MissingLink { .. }
                | Self::OtherParent { .. }
                | Self::Manifest { .. }
                | Self::Differs { .. }
        )
    }
}

impl From<ArchiveError> for Failure {
    fn from(error: ArchiveError) -> Self {
        let failure = Self::new(error.code(), error.with_cause());
        match error.hint() {
            None => failure,
            Some(hint) => failure.hint(hint),
        }
    }
}
