//! How many may ask at once what of a disk is where.
//!
//! Each that asks takes a thread of a worker's pool and a lock of the image's inode for a while, and
//! a guest's writes want both.

use tokio::sync::Semaphore;

/// Some of each role, so that a guest does not wait for backups; of each disk, so that none waits
/// for another's device.
pub(crate) struct Lookups {
    /// Of a live export.
    pub(crate) live: Semaphore,
    /// Of the disk's frozen exports, all together.
    pub(crate) backup: Semaphore,
}

impl Default for Lookups {
    fn default() -> Self {
        Self {
            live: Semaphore::new(AT_ONCE),
            backup: Semaphore::new(AT_ONCE),
        }
    }
}

/// A guest has a processor for itself, where there are two.
const AT_ONCE: usize = 1;
