//! Who may write an image.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use rustix::fs::{FlockOperation, flock};
use rustix::io::Errno;
use thiserror::Error;

/// A claim on an image, held on the very descriptor that writes it.
///
/// It lasts until the last write of the process has landed, also when the process was killed: an
/// exclusive `flock` keeps out another Stillpoint, and QEMU's own byte-range locks keep out a QEMU,
/// and are refused while a QEMU has the image.
#[derive(Debug)]
pub struct ImageLock(());

/// Why an image cannot be had.
#[derive(Debug, Error)]
pub enum LockError {
    /// A process holds it.
    #[error("in use by {}", holder(*pid))]
    Held {
        /// Who, where that is known. Nobody is found where the process has ended and the kernel still
        /// performs what it had asked for, or where it is hidden from us.
        pid: Option<u32>,
    },
    /// Locking itself failed.
    #[error("cannot be locked")]
    Io(#[from] io::Error),
}

fn holder(pid: Option<u32>) -> String {
    match pid {
        Some(pid) if pid == std::process::id() => "this very process".to_owned(),
        Some(pid) => format!("another process (pid {pid})"),
        None => "another process".to_owned(),
    }
}

impl ImageLock {
    /// Locks `file` for as long as this descriptor is open anywhere.
    pub fn take(file: &File) -> Result<Self, LockError> {
        match flock(file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => {}
            Err(Errno::WOULDBLOCK) => {
                return Err(LockError::Held {
                    pid: holder_of(file),
                });
            }
            Err(error) => return Err(LockError::Io(error.into())),
        }
        for byte in qemu_bytes() {
            match ofd::lock_shared(file, byte) {
                Ok(()) => {}
                Err(Errno::AGAIN | Errno::ACCESS) => {
                    return Err(LockError::Held {
                        pid: holder_of(file),
                    });
                }
                Err(error) => return Err(LockError::Io(error.into())),
            }
        }
        // QEMU's order: take first, then look whether anyone else has what we exclude; of two who
        // come at once, at least one sees the other.
        for byte in qemu_bytes() {
            if ofd::is_locked_by_another(file, byte).map_err(io::Error::from)? {
                return Err(LockError::Held {
                    pid: holder_of(file),
                });
            }
        }
        Ok(Self(()))
    }

    /// Gives `file` back, whoever still has this descriptor open.
    pub(crate) fn release(file: &File) {
        // What is not locked, or cannot be told of, has no lock to give back.
        let _ = flock(file, FlockOperation::Unlock);
        for byte in qemu_bytes() {
            let _ = ofd::unlock(file, byte);
        }
    }

    /// Locks `file` against writers for as long as this descriptor is open anywhere. Others may read
    /// it, and lock it likewise.
    pub fn share(file: &File) -> Result<Self, LockError> {
        let held = || LockError::Held {
            pid: holder_of(file),
        };
        match flock(file, FlockOperation::NonBlockingLockShared) {
            Ok(()) => {}
            Err(Errno::WOULDBLOCK) => return Err(held()),
            Err(error) => return Err(LockError::Io(error.into())),
        }
        for byte in [CONSISTENT_READ, NO_WRITE, NO_RESIZE] {
            match ofd::lock_shared(file, byte) {
                Ok(()) => {}
                Err(Errno::AGAIN | Errno::ACCESS) => return Err(held()),
                Err(error) => return Err(LockError::Io(error.into())),
            }
        }
        for byte in [NO_CONSISTENT_READ, WRITE, RESIZE] {
            if ofd::is_locked_by_another(file, byte).map_err(io::Error::from)? {
                return Err(held());
            }
        }
        Ok(Self(()))
    }
}

/// Of [`qemu_bytes`] those that a reader needs, and those that it minds.
const CONSISTENT_READ: i64 = 100;
const WRITE: i64 = 101;
const RESIZE: i64 = 103;
const NO_CONSISTENT_READ: i64 = 200;
const NO_WRITE: i64 = 201;
const NO_RESIZE: i64 = 203;

/// The bytes that QEMU locks (`block/file-posix.c`): from 100 on one for each permission that is
/// held, from 200 on one for each that nobody else may have. We hold and exclude all of them:
/// consistent read, write, write unchanged, resize.
fn qemu_bytes() -> impl Iterator<Item = i64> {
    (100..104).chain(200..204)
}

/// A process that has this file open, by another descriptor than ours.
///
/// The kernel does not tell the holder of an open-file lock; who has the file open is the next
/// best answer.
fn holder_of(file: &File) -> Option<u32> {
    let wanted = file.metadata().ok()?;
    let processes = std::fs::read_dir("/proc").ok()?.flatten();
    let mut pids = processes.filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok());
    let ours = Path::new("/proc").join(format!("{}/fd/{}", std::process::id(), file.as_raw_fd()));
    pids.find(|pid| {
        let Ok(descriptors) = std::fs::read_dir(format!("/proc/{pid}/fd")) else {
            return false;
        };
        let mut others = descriptors.flatten().filter(|entry| entry.path() != ours);
        others.any(|descriptor| {
            std::fs::metadata(descriptor.path()).is_ok_and(|found| {
                found.dev() == wanted.dev()
                    && found.ino() == wanted.ino()
                    && found.rdev() == wanted.rdev()
            })
        })
    })
}

mod ofd {
    #![expect(
        unsafe_code,
        reason = "open-file-description locks have no safe wrapper"
    )]

    use std::fs::File;
    use std::os::fd::AsRawFd;

    use rustix::io::Errno;

    /// Takes a shared lock on one byte, without waiting.
    pub(super) fn lock_shared(file: &File, byte: i64) -> Result<(), Errno> {
        let mut lock = description(libc::F_RDLCK, byte);
        call(file, libc::F_OFD_SETLK, &mut lock)
    }

    /// Gives up the lock on one byte.
    pub(super) fn unlock(file: &File, byte: i64) -> Result<(), Errno> {
        let mut lock = description(libc::F_UNLCK, byte);
        call(file, libc::F_OFD_SETLK, &mut lock)
    }

    /// Whether another descriptor would keep us from an exclusive lock on one byte.
    pub(super) fn is_locked_by_another(file: &File, byte: i64) -> Result<bool, Errno> {
        let mut lock = description(libc::F_WRLCK, byte);
        call(file, libc::F_OFD_GETLK, &mut lock)?;
        Ok(i32::from(lock.l_type) != libc::F_UNLCK)
    }

    fn description(kind: i32, byte: i64) -> libc::flock {
        libc::flock {
            l_type: kind as libc::c_short,
            l_whence: libc::SEEK_SET as libc::c_short,
            l_start: byte,
            l_len: 1,
            // Must be zero for open-file locks.
            l_pid: 0,
        }
    }

    fn call(file: &File, command: i32, lock: &mut libc::flock) -> Result<(), Errno> {
        // SAFETY: the descriptor is open for as long as `file` is borrowed, and both commands take
        // a pointer to one `struct flock`, which they read and write within its bounds.
        let result = unsafe { libc::fcntl(file.as_raw_fd(), command, lock) };
        if result == -1 {
            let error = std::io::Error::last_os_error();
            return Err(Errno::from_io_error(&error).unwrap_or(Errno::IO));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn open(file: &tempfile::NamedTempFile) -> File {
        let mut options = File::options();
        options.read(true).write(true).open(file.path()).unwrap()
    }

    #[test]
    fn an_image_can_be_had_once() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let open = || open(&file);
        let first = open();
        ImageLock::take(&first).unwrap();
        let refused = ImageLock::take(&open()).unwrap_err();
        assert_eq!(refused.to_string(), "in use by this very process");
        drop(first);
        ImageLock::take(&open()).unwrap();
    }

    #[test]
    fn readers_share_an_image_and_keep_writers_out() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let open = || open(&file);
        let (first, second) = (open(), open());
        ImageLock::share(&first).unwrap();
        ImageLock::share(&second).unwrap();
        assert!(ImageLock::take(&open()).is_err());
        drop((first, second));
        for byte in [WRITE, RESIZE, NO_CONSISTENT_READ] {
            let qemu = open();
            ofd::lock_shared(&qemu, byte).unwrap();
            assert!(ImageLock::share(&open()).is_err(), "byte {byte}");
        }
        // As a QEMU has it that reads.
        let qemu = open();
        for byte in [CONSISTENT_READ, NO_WRITE, NO_RESIZE] {
            ofd::lock_shared(&qemu, byte).unwrap();
        }
        ImageLock::share(&open()).unwrap();
        let writer = open();
        ImageLock::take(&writer).unwrap_err();
    }

    #[test]
    fn an_image_with_a_qemu_lock_is_refused() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let open = || open(&file);
        let qemu = open();
        ofd::lock_shared(&qemu, 101).unwrap();
        assert!(matches!(
            ImageLock::take(&open()),
            Err(LockError::Held { .. })
        ));
    }
}
