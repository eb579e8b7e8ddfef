//! How much scratch backups may take, together and each, and from which file systems.

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};

use rustix::fs::fstatvfs;
use scratch::{Allowance, Budget, FreeSpace, GRANULE, OnError, Quota, Room, Terms};

use crate::failure::Failure;

/// What the server was told about scratch.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub(crate) struct ScratchOptions {
    /// What all backups may take together, in bytes.
    pub(crate) limit: Option<u64>,
    /// What each may take for which nothing else is asked, in bytes.
    pub(crate) backup_limit: Option<u64>,
    /// What stays free of a file system.
    pub(crate) reserve: Reserve,
    /// What gives way when something cannot be kept.
    pub(crate) on_error: OnError,
}

/// How much of a file system is left to others.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub(crate) enum Reserve {
    /// [`PERCENT`], and at least [`LEAST`].
    #[default]
    Default,
    /// So many bytes.
    Bytes(u64),
    /// So many hundredths of its size.
    Percent(u8),
}

/// Scratch as all backups share it.
pub(super) struct Space {
    options: ScratchOptions,
    all: Arc<Quota>,
    /// By device number.
    rooms: Mutex<BTreeMap<u64, Arc<Room>>>,
}

impl Space {
    pub(super) fn new(options: ScratchOptions) -> Self {
        Self {
            options,
            all: Arc::new(Quota::new(options.limit)),
            rooms: Mutex::default(),
        }
    }

    /// What all backups use and may use.
    pub(super) fn all(&self) -> &Quota {
        &self.all
    }

    /// What gives way when something cannot be kept.
    pub(super) fn on_error(&self) -> OnError {
        self.options.on_error
    }

    /// The file systems that scratch is on.
    pub(super) fn rooms(&self) -> Vec<Arc<Room>> {
        let rooms = self.rooms.lock().unwrap_or_else(PoisonError::into_inner);
        rooms.values().cloned().collect()
    }

    /// For a new backup for which a limit of `wanted` bytes was asked, if any was. One that holds nothing
    /// is refused.
    pub(super) fn new_budget(&self, wanted: Option<u64>) -> Result<Arc<Budget>, Failure> {
        let limit = wanted.or(self.options.backup_limit);
        if let Some(limit) = limit.filter(|limit| *limit < GRANULE) {
            let option = match wanted {
                Some(_) => "--scratch-limit",
                None => "--backup-scratch-limit",
            };
            let message = format!(
                "a scratch limit of {limit} bytes is less than the {GRANULE} that the smallest write takes"
            );
            let hint = format!("give a larger {option}");
            return Err(Failure::new("scratch-limit", message).hint(hint));
        }
        Ok(self.budget(limit))
    }

    /// For a backup that may use `limit` bytes.
    pub(super) fn budget(&self, limit: Option<u64>) -> Arc<Budget> {
        Arc::new(Budget::new(limit, Arc::clone(&self.all)))
    }

    /// The terms of a snapshot whose scratch is in `folder`.
    pub(super) fn terms(&self, budget: &Arc<Budget>, folder: &Path) -> io::Result<Terms> {
        let allowance = Allowance {
            budget: Arc::clone(budget),
            room: self.room(folder)?,
        };
        Ok(Terms {
            allowance,
            on_error: self.options.on_error,
        })
    }

    /// Refuses to begin what would break with the first write, and says what to do.
    pub(super) fn refuse_if_full(&self, room: &Room, folder: &Path) -> Result<(), Failure> {
        let is_reached = |limit: &u64| limit.saturating_sub(self.all.used()) < GRANULE;
        if let Some(limit) = self.all.limit().filter(is_reached) {
            let message = format!("the scratch limit of all backups, {limit} bytes, is reached");
            let hint = "end a backup, or serve with a larger --scratch-limit";
            return Err(Failure::new("scratch-limit", message).hint(hint));
        }
        let folder = folder.display();
        let unknown = |error| {
            let message = format!("cannot tell how much is free in '{folder}': {error}");
            Failure::new("scratch", message)
        };
        if room.is_full().map_err(unknown)? {
            let free = room.free().map_err(unknown)?;
            let message = format!(
                "the file system of '{folder}' has {free} bytes free, and {} are to stay free",
                room.reserve()
            );
            let hint = "free some, choose another --scratch-dir, or serve with a smaller --scratch-reserve";
            return Err(Failure::new("scratch-reserve", message).hint(hint));
        }
        Ok(())
    }

    /// Lets go of the file systems that no backup has scratch on.
    pub(super) fn forget_unused(&self) {
        let mut rooms = self.rooms.lock().unwrap_or_else(PoisonError::into_inner);
        rooms.retain(|_, room| Arc::strong_count(room) > 1);
    }

    /// Backups on one file system share what is known of its free space.
    fn room(&self, folder: &Path) -> io::Result<Arc<Room>> {
        let folder = File::open(folder)?;
        let device = folder.metadata()?.dev();
        let mut rooms = self.rooms.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(room) = rooms.get(&device) {
            return Ok(Arc::clone(room));
        }
        let volume = Volume(folder);
        let reserve = self.options.reserve.of(volume.size()?);
        let room = Arc::new(Room::new(volume, reserve));
        rooms.insert(device, Arc::clone(&room));
        Ok(room)
    }
}

impl Reserve {
    fn of(self, size: u64) -> u64 {
        let part = |percent: u8| (u128::from(size) * u128::from(percent) / 100) as u64;
        match self {
            Self::Default => part(PERCENT).max(LEAST),
            Self::Bytes(bytes) => bytes,
            Self::Percent(percent) => part(percent),
        }
    }
}

/// A mounted file system.
struct Volume(File);

impl Volume {
    fn size(&self) -> io::Result<u64> {
        let told = fstatvfs(&self.0)?;
        Ok(told.f_blocks.saturating_mul(told.f_frsize))
    }
}

impl FreeSpace for Volume {
    fn free(&self) -> io::Result<u64> {
        let told = fstatvfs(&self.0)?;
        // Not what is kept for root, also if we are.
        Ok(told.f_bavail.saturating_mul(told.f_frsize))
    }
}

/// As much as ext4 keeps for root, for the same reason: what else is there needs room to go on.
const PERCENT: u8 = 5;

/// A guest that fills a sparse image at full speed should not get further between two looks.
const LEAST: u64 = 1 << 30;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_reserve_is_a_part_or_a_number_and_by_default_at_least_a_gibibyte() {
        assert_eq!(Reserve::Default.of(100 << 30), 5 << 30);
        assert_eq!(Reserve::Default.of(1 << 30), LEAST);
        assert_eq!(Reserve::Bytes(0).of(1 << 40), 0);
        assert_eq!(Reserve::Percent(50).of(u64::MAX), u64::MAX / 2);
    }
}
