//! Whether an image is the one that was left here, as it was left.

use std::fs::File;
use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt};

use rustix::fs::{AtFlags, StatxFlags, statx};

/// What identifies an image, and the state that it is in.
///
/// The time of change cannot be put back by a program, other than that of modification. Block
/// devices have no usable times: for them it is zero, and says nothing.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub(crate) struct ImageIdentity {
    device: u64,
    inode: u64,
    size: u64,
    changed_at: u64,
    nanoseconds: u64,
}

impl ImageIdentity {
    /// As it is now, for an image of `size` bytes.
    pub(crate) fn of(image: &File, size: u64) -> io::Result<Self> {
        let found = image.metadata()?;
        if found.file_type().is_block_device() {
            return Ok(Self {
                device: found.rdev(),
                size,
                ..Self::default()
            });
        }
        Ok(Self {
            device: found.dev(),
            inode: found.ino(),
            size,
            changed_at: u64::try_from(found.ctime()).unwrap_or(0),
            nanoseconds: u64::try_from(found.ctime_nsec()).unwrap_or(0),
        })
    }

    /// Why an image found like this is not the one that was left as `self`, in words; `None` if it
    /// is. `same_boot` says whether device numbers still mean the same.
    ///
    /// `last_change` is a time after which it was not changed by us, in seconds since 1970; `None`
    /// asks for the very same time of change.
    pub(crate) fn differs(
        &self,
        found: &Self,
        same_boot: bool,
        last_change: Option<u64>,
    ) -> Option<String> {
        if found.size != self.size {
            return Some(format!(
                "the image was resized, from {} to {} bytes, while the server was down",
                self.size, found.size
            ));
        }
        if found.inode != self.inode || (same_boot && found.device != self.device) {
            return Some("the image was replaced by another file".to_owned());
        }
        let untouched = match last_change {
            None => (found.changed_at, found.nanoseconds) == (self.changed_at, self.nanoseconds),
            Some(last) => found.changed_at <= last,
        };
        (!untouched).then(|| "the image was changed while the server was down".to_owned())
    }

    /// When it was changed last, in seconds since 1970.
    pub(crate) fn changed_seconds(&self) -> u64 {
        self.changed_at
    }

    /// How many numbers it is stored as.
    pub(crate) const NUMBERS: usize = 5;

    pub(crate) fn numbers(&self) -> [u64; Self::NUMBERS] {
        [
            self.device,
            self.inode,
            self.size,
            self.changed_at,
            self.nanoseconds,
        ]
    }

    pub(crate) fn from_numbers(numbers: [u64; Self::NUMBERS]) -> Self {
        let [device, inode, size, changed_at, nanoseconds] = numbers;
        Self {
            device,
            inode,
            size,
            changed_at,
            nanoseconds,
        }
    }
}

/// Which boot of the machine this is.
pub(crate) fn boot() -> io::Result<[u8; 16]> {
    let text = std::fs::read_to_string("/proc/sys/kernel/random/boot_id")?;
    let id = uuid::Uuid::try_parse(text.trim()).map_err(io::Error::other)?;
    Ok(id.into_bytes())
}

/// Which mount a file is reached through, by a number that is not used twice within a boot; on
/// kernels that have none, by the one that they have.
pub(crate) fn mount(file: &File) -> io::Result<u64> {
    let unique = StatxFlags::from_bits_retain(STATX_MNT_ID_UNIQUE);
    let ask = |flags| statx(file, "", AtFlags::EMPTY_PATH, flags);
    let found = ask(unique).or_else(|_| ask(StatxFlags::MNT_ID))?;
    Ok(found.stx_mnt_id)
}

/// Linux 6.8; newer than the constants of the system call crate.
const STATX_MNT_ID_UNIQUE: u32 = 0x4000;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_happened_to_an_image_is_told_in_words() {
        let left = ImageIdentity::from_numbers([1, 2, 512, 100, 5]);
        let found = |numbers| left.differs(&ImageIdentity::from_numbers(numbers), true, None);
        assert_eq!(found([1, 2, 512, 100, 5]), None);
        assert!(found([1, 2, 1024, 100, 5]).unwrap().contains("resized"));
        assert!(found([1, 3, 512, 100, 5]).unwrap().contains("replaced"));
        assert!(found([1, 2, 512, 100, 6]).unwrap().contains("changed"));
    }

    #[test]
    fn after_a_kill_what_we_changed_ourselves_is_no_difference() {
        let left = ImageIdentity::from_numbers([1, 2, 512, 100, 5]);
        let later = ImageIdentity::from_numbers([1, 2, 512, 150, 0]);
        assert_eq!(left.differs(&later, true, Some(150)), None);
        assert!(left.differs(&later, true, Some(149)).is_some());
        let other_device = ImageIdentity::from_numbers([9, 2, 512, 100, 5]);
        assert_eq!(left.differs(&other_device, false, Some(150)), None);
    }

    #[test]
    fn a_boot_and_a_mount_have_an_identity() {
        assert_eq!(boot().unwrap(), boot().unwrap());
        let file = tempfile::tempfile().unwrap();
        assert_eq!(mount(&file).unwrap(), mount(&file).unwrap());
    }
}
