use std::io;

use crate::allowance::Allowance;

/// On what terms a snapshot is kept.
#[derive(Clone, Debug)]
pub struct Terms {
    /// What it may take.
    pub allowance: Allowance,
    /// What gives way when it cannot keep something.
    pub on_error: OnError,
}

/// What gives way when the old contents of something cannot be kept, and the guest is about to
/// overwrite it.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub enum OnError {
    /// The backup: it is broken, and the guest does not notice.
    #[default]
    BreakBackup,
    /// The guest's write: it fails, nothing of it is written, and the backup stays whole.
    FailGuestWrite,
}

impl Terms {
    /// As much as it wants, and the guest comes first.
    pub fn endless() -> Self {
        Self {
            allowance: Allowance::endless(),
            on_error: OnError::default(),
        }
    }
}

/// What a guest is told of a write that was not made for the sake of a backup: that there is no
/// space, at which it can wait for some, or that storage failed.
pub(crate) fn refused_write(reason: String, error: &io::Error) -> io::Error {
    let kind = match error.kind() {
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => io::ErrorKind::StorageFull,
        _ => io::ErrorKind::Other,
    };
    io::Error::new(kind, reason)
}
