//! Why something about a backup folder was not done.

use std::io;
use std::path::PathBuf;

use thiserror::Error;

/// Divided by who has to do something about it.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum ArchiveError {
    /// There is no backup folder at this path.
    #[error("'{}' holds no backups", .0.display())]
    NoFolder(PathBuf),
    /// What lies there is not ours.
    #[error("'{}' is not empty, and no backup folder", .0.display())]
    NotOurs(PathBuf),
    /// Somebody else changes, or reads, the folder.
    #[error("'{}' is in use by another process", .0.display())]
    Locked(PathBuf),
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
    #[error("'{}' has format version {version}; this program knows up to {known}", path.display())]
    Newer {
        /// The manifest.
        path: PathBuf,
        /// Its version.
        version: u64,
        /// The newest that is known here.
        known: u64,
    },
    /// A point that another one builds on is missing.
    #[error("point {point} builds on point {missing}, which is not there")]
    MissingLink {
        /// The point that is there.
        point: u64,
        /// The one that is not.
        missing: u64,
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
    #[error("'{}' is not what was written, at {offset}: {what}", path.display())]
    Differs {
        /// The file.
        path: PathBuf,
        /// Where in it.
        offset: u64,
        /// What lies there.
        what: String,
    },
    /// A plan that cannot be: a bug of whoever made it.
    #[error("no such point can be made: {0}")]
    Plan(String),
    /// It was asked to stop; what was copied so far stays.
    #[error("stopped")]
    Stopped,
    /// Anything else that a file system can meet.
    #[error("'{}': {source}", path.display())]
    Io {
        /// What was accessed.
        path: PathBuf,
        /// What came of it.
        source: io::Error,
    },
}

impl ArchiveError {
    /// A word that scripts can compare.
    pub fn code(&self) -> &'static str {
        match self {
            Self::NoFolder(_) => "no-backup-folder",
            Self::NotOurs(_) => "not-a-backup-folder",
            Self::Locked(_) => "folder-in-use",
            Self::NotWritable { .. } => "not-writable",
            Self::NoSpace(_) => "no-space",
            Self::OtherDisk { .. } => "other-disk",
            Self::Newer { .. } => "newer-version",
            Self::MissingLink { .. } => "missing-point",
            Self::Manifest { .. } => "damaged-manifest",
            Self::Differs { .. } => "verification-failed",
            Self::Plan(_) => "impossible-plan",
            Self::Stopped => "stopped",
            Self::Io { .. } => "io-error",
        }
    }

    /// What to do about it, where that is not obvious.
    pub fn hint(&self) -> Option<String> {
        None
    }

    /// Whether stored data is not what it should be.
    pub fn is_damage(&self) -> bool {
        matches!(
            self,
            Self::MissingLink { .. } | Self::Manifest { .. } | Self::Differs { .. }
        )
    }
}
