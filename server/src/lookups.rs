//! How many may ask at once what of a disk is where.
//!
//! Each that asks takes a thread of a worker's pool and a lock of the image's inode for a while, and
//! a guest's writes want both.

use tokio::sync::Semaphore;

/// One of each role waits for its turn at a time, so that a guest waits for no more than one lookup of
/// backups; and for each disk one has it, so that none waits for another's device, and a guest has a
/// processor for itself where there are two.
pub(crate) struct Lookups {
    /// Of a live export.
    pub(crate) live: Semaphore,
    /// Of the disk's frozen exports, all together.
    pub(crate) backup: Semaphore,
    /// Of both. Whoever has its permit has one of the others too.
    pub(crate) turn: Semaphore,
}

impl Default for Lookups {
    fn default() -> Self {
        let [live, backup, turn] = [(); 3].map(|()| Semaphore::new(1));
        Self { live, backup, turn }
    }
}
