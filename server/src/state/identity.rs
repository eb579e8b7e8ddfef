//! Whether an image is the one that was left here, as it was left.

use std::fs::File;
use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt};

use block::{FileStorage, Storage};
use rustix::fs::{AtFlags, StatxFlags, statx};

use crate::image::Image;

/// What identifies an image, and the state that it is in.
///
/// Of a file, the time of change cannot be put back by a program, other than that of modification. A
/// block device has no times that can be used; within a boot of the machine the kernel numbers what
/// stands behind a device node, and counts what is written to it.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub(crate) struct ImageIdentity {
    is_device: bool,
    device: u64,
    /// Of a file its inode, of a device the number of what is behind it.
    number: u64,
    size: u64,
    /// Of a file when it was changed, in seconds since 1970, and nanoseconds; of a device how many
    /// writes and sectors it has taken.
    change: [u64; 2],
}

impl ImageIdentity {
    /// As it is now.
    pub(crate) fn of(image: &Image) -> io::Result<Self> {
        match image {
            Image::File(file) => Self::of_file(file.file(), file.size()),
            // Nothing else of it can be told, but by its [fingerprint](super::fingerprint).
            Image::Nbd(_) => Ok(Self {
                device: ELSEWHERE,
                size: image.size(),
                ..Self::default()
            }),
            Image::Qcow2(image) => {
                Self::of_files(image.files().map(FileStorage::file), image.size())
            }
        }
    }

    /// Of an image that is in several files, none of which is ever written by us: whatever happens to
    /// one of them, the sum is another.
    fn of_files<'a>(files: impl Iterator<Item = &'a File>, size: u64) -> io::Result<Self> {
        let mut all = Self {
            size,
            ..Self::default()
        };
        for (place, file) in files.enumerate() {
            let file = Self::of_file(file, 0)?;
            if place == 0 {
                (all.device, all.number) = (file.device, file.number);
            }
            all.is_device |= file.is_device;
            let [change, more] = file.change;
            all.change[0] = all.change[0].max(change);
            for number in [file.number, change, more] {
                // Each step can be undone, so that a single number that differs makes a difference.
                all.change[1] = (all.change[1].rotate_left(7) ^ number).wrapping_mul(SCATTER);
            }
        }
        Ok(all)
    }

    fn of_file(image: &File, size: u64) -> io::Result<Self> {
        let found = image.metadata()?;
        if found.file_type().is_block_device() {
            let (number, change) = device_counters(found.rdev());
            let device = found.rdev();
            return Ok(Self {
                is_device: true,
                device,
                number,
                size,
                change,
            });
        }
        let time = [found.ctime(), found.ctime_nsec()];
        Ok(Self {
            is_device: false,
            device: found.dev(),
            number: found.ino(),
            size,
            change: time.map(|part| u64::try_from(part).unwrap_or(0)),
        })
    }

    /// Why an image found like this is not the one that was left as `self`, in words; `None` if it
    /// is. `same_boot` says whether device numbers still mean the same.
    ///
    /// `last_change` is a time after which a file was not changed by us, in seconds since 1970;
    /// `None` asks for the very same change.
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
        if self.is_device && !same_boot {
            return Some(
                "the machine was started anew, and what happened to a block device meanwhile cannot be seen"
                    .to_owned(),
            );
        }
        let same_place = !same_boot || found.device == self.device;
        if found.is_device != self.is_device || found.number != self.number || !same_place {
            return Some("the image was replaced by another".to_owned());
        }
        let untouched = match last_change {
            None => found.change == self.change,
            // What the last server wrote is still being counted.
            Some(_) if self.is_device => true,
            Some(last) => found.change[0] <= last,
        };
        // The time of change of a file is that of its attributes and links too.
        let others = if self.is_device {
            ""
        } else {
            ", or its times, mode, owner or names were"
        };
        (!untouched).then(|| format!("the image was changed while the server was down{others}"))
    }

    /// The same image with `size` bytes.
    pub(crate) fn with_size(self, size: u64) -> Self {
        Self { size, ..self }
    }

    /// In bytes.
    pub(crate) fn size(&self) -> u64 {
        self.size
    }

    /// Whether its size is not ours to choose: that of a block device, or of what another server has.
    pub(crate) fn has_given_size(&self) -> bool {
        self.is_device || self.device == ELSEWHERE
    }

    /// When a file was changed last, in seconds since 1970.
    pub(crate) fn changed_seconds(&self) -> u64 {
        self.change[0]
    }

    /// How many numbers it is stored as.
    pub(crate) const NUMBERS: usize = 6;

    pub(crate) fn numbers(&self) -> [u64; Self::NUMBERS] {
        let [change, more] = self.change;
        [
            self.is_device.into(),
            self.device,
            self.number,
            self.size,
            change,
            more,
        ]
    }

    pub(crate) fn from_numbers(numbers: [u64; Self::NUMBERS]) -> Self {
        let [is_device, device, number, size, change, more] = numbers;
        Self {
            is_device: is_device != 0,
            device,
            number,
            size,
            change: [change, more],
        }
    }
}

/// A large odd number.
const SCATTER: u64 = 0x9e37_79b9_7f4a_7c15;

/// The kernel's number for what is behind a block device, and how many writes and sectors it has
/// taken; zeroes where the kernel does not tell.
fn device_counters(device: u64) -> (u64, [u64; 2]) {
    let node = format!(
        "/sys/dev/block/{}:{}",
        rustix::fs::major(device),
        rustix::fs::minor(device)
    );
    let read = |name: &str| std::fs::read_to_string(format!("{node}/{name}")).ok();
    // A partition has the number of its disk.
    let number = read("diskseq").or_else(|| read("../diskseq"));
    let number = number
        .and_then(|text| text.trim().parse().ok())
        .unwrap_or(0);
    let counters = read("stat").unwrap_or_default();
    let counter = |at| {
        counters
            .split_whitespace()
            .nth(at)
            .and_then(|text| text.parse().ok())
    };
    // Writes, and sectors written, of the kernel's `Documentation/block/stat.rst`.
    (number, [4, 6].map(|at| counter(at).unwrap_or(0)))
}

/// Which boot of the machine this is.
pub(crate) fn boot() -> io::Result<[u8; 16]> {
    let text = std::fs::read_to_string("/proc/sys/kernel/random/boot_id")?;
    let id = uuid::Uuid::try_parse(text.trim()).map_err(io::Error::other)?;
    Ok(id.into_bytes())
}

/// Which mount an image is reached through.
pub(crate) fn mount_of(image: &Image) -> io::Result<u64> {
    match image {
        Image::File(file) => mount(file.file()),
        Image::Nbd(_) => Ok(0),
        Image::Qcow2(image) => image
            .files()
            .next()
            .map_or(Ok(0), |file| mount(file.file())),
    }
}

/// Which mount a file is reached through, by a number that is not used twice within a boot; on
/// kernels that have none, by the one that they have.
pub(crate) fn mount(file: &File) -> io::Result<u64> {
    let unique = StatxFlags::from_bits_retain(STATX_MNT_ID_UNIQUE);
    let ask = |flags| statx(file, "", AtFlags::EMPTY_PATH, flags);
    let found = ask(unique).or_else(|_| ask(StatxFlags::MNT_ID))?;
    Ok(found.stx_mnt_id)
}

/// No device has this number.
const ELSEWHERE: u64 = u64::MAX;

/// Linux 6.8; newer than the constants of the system call crate.
const STATX_MNT_ID_UNIQUE: u32 = 0x4000;

#[cfg(test)]
mod tests {
    use super::*;

    fn file(numbers: [u64; 5]) -> ImageIdentity {
        let [device, number, size, change, more] = numbers;
        ImageIdentity::from_numbers([0, device, number, size, change, more])
    }

    #[test]
    fn what_happened_to_an_image_is_told_in_words() {
        let left = file([1, 2, 512, 100, 5]);
        let found = |numbers| left.differs(&file(numbers), true, None);
        assert_eq!(found([1, 2, 512, 100, 5]), None);
        assert!(found([1, 2, 1024, 100, 5]).unwrap().contains("resized"));
        assert!(found([1, 3, 512, 100, 5]).unwrap().contains("replaced"));
        let changed = found([1, 2, 512, 100, 6]).unwrap();
        assert!(changed.contains("changed") && changed.contains("owner"));
    }

    #[test]
    fn after_a_kill_what_we_changed_ourselves_is_no_difference() {
        let left = file([1, 2, 512, 100, 5]);
        let later = file([1, 2, 512, 150, 0]);
        assert_eq!(left.differs(&later, true, Some(150)), None);
        assert!(left.differs(&later, true, Some(149)).is_some());
        let other_device = file([9, 2, 512, 100, 5]);
        assert_eq!(left.differs(&other_device, false, Some(150)), None);
    }

    #[test]
    fn of_a_device_nothing_is_believed_across_boots() {
        let left = ImageIdentity::from_numbers([1, 7, 3, 512, 10, 80]);
        let written = ImageIdentity::from_numbers([1, 7, 3, 512, 11, 88]);
        assert_eq!(left.differs(&left, true, None), None);
        let changed = left.differs(&written, true, None).unwrap();
        assert!(!changed.contains("owner"), "{changed}");
        assert_eq!(left.differs(&written, true, Some(0)), None);
        assert!(left.differs(&left, false, None).is_some());
    }

    #[test]
    fn a_boot_and_a_mount_have_an_identity() {
        assert_eq!(boot().unwrap(), boot().unwrap());
        let file = tempfile::tempfile().unwrap();
        assert_eq!(mount(&file).unwrap(), mount(&file).unwrap());
    }
}
