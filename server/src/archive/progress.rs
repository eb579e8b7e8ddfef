//! Whoever watches something long.

use super::error::ArchiveError;

/// Hears how far a long operation is, and may stop it.
pub trait Progress: Send + Sync {
    /// So many bytes are going to be read, where that is known before.
    fn expect(&self, bytes: u64) {
        let _ = bytes;
    }

    /// So many more bytes of files were read back.
    fn checked(&self, bytes: u64) {
        let _ = bytes;
    }

    /// Whether to stop with [`ArchiveError::Stopped`].
    fn is_stopped(&self) -> bool {
        false
    }
}

/// Nobody watches.
impl Progress for () {}

/// Tells of progress, and ends what is to be stopped.
pub(super) fn step(progress: &dyn Progress, bytes: u64) -> Result<(), ArchiveError> {
    progress.checked(bytes);
    if progress.is_stopped() {
        return Err(ArchiveError::Stopped);
    }
    Ok(())
}
