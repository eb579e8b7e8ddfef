use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;
use std::sync::Arc;

use rustix::fs::{SeekFrom, seek};
use rustix::io::Errno;

use crate::pool::blocking;

/// A small file of bookkeeping: sparse, and stored to by system calls that can fail.
///
/// Never mapped: on a full file system a store through a mapping is a signal, not an error.
#[derive(Clone, Debug)]
pub struct Cells {
    file: Arc<File>,
}

impl From<File> for Cells {
    fn from(file: File) -> Self {
        Self {
            file: Arc::new(file),
        }
    }
}

impl Cells {
    /// Makes an empty file at `path`, in the place of any that is there.
    pub fn create(path: &Path) -> io::Result<Self> {
        let mut options = File::options();
        options.read(true).write(true).create(true).truncate(true);
        // What is kept about a disk is its owner's business alone.
        let file = options.mode(0o600).open(path)?;
        Ok(Self {
            file: Arc::new(file),
        })
    }

    /// Opens the file at `path` as it is.
    pub fn open(path: &Path) -> io::Result<Self> {
        let file = File::options().read(true).write(true).open(path)?;
        Ok(Self {
            file: Arc::new(file),
        })
    }

    /// Fills `bytes` with what is at `offset`; what lies beyond the end reads as zero.
    pub fn load(&self, offset: u64, mut bytes: &mut [u8]) -> io::Result<()> {
        let mut at = offset;
        while !bytes.is_empty() {
            match self.file.read_at(bytes, at) {
                Ok(0) => break,
                Ok(length) => {
                    at += length as u64;
                    bytes = &mut bytes[length..];
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        bytes.fill(0);
        Ok(())
    }

    /// The first stretch at or after `offset` that takes space, if any.
    pub fn stored(&self, offset: u64) -> io::Result<Option<Range<u64>>> {
        let start = match seek(&*self.file, SeekFrom::Data(offset)) {
            Ok(start) => start,
            Err(Errno::NXIO) => return Ok(None),
            Err(error) => return Err(error.into()),
        };
        Ok(Some(start..seek(&*self.file, SeekFrom::Hole(start))?))
    }

    /// How long the file is, in bytes.
    pub fn length(&self) -> io::Result<u64> {
        Ok(self.file.metadata()?.len())
    }

    /// Makes the file this long, if it is shorter, without taking space: what was never stored is
    /// there all the same, and its absence is damage.
    pub fn extend(&self, length: u64) -> io::Result<()> {
        if self.length()? < length {
            self.file.set_len(length)?;
        }
        Ok(())
    }

    /// Cuts the file, if it is longer.
    pub fn cut(&self, length: u64) -> io::Result<()> {
        if self.length()? > length {
            self.file.set_len(length)?;
        }
        Ok(())
    }

    /// Makes the file this long, if it is shorter, and takes the space for what is new where that can
    /// be taken in advance.
    pub fn extend_reserved(&self, length: u64) -> io::Result<()> {
        let begin = self.length()?;
        if begin >= length {
            return Ok(());
        }
        let none = rustix::fs::FallocateFlags::empty();
        match rustix::fs::fallocate(&*self.file, none, begin, length - begin) {
            Err(Errno::OPNOTSUPP) => self.extend(length),
            other => Ok(other?),
        }
    }

    /// Makes durable what was stored before the call.
    pub async fn sync(&self) -> io::Result<()> {
        let file = Arc::clone(&self.file);
        blocking(move || file.sync_data()).await
    }

    /// Hands `bytes` to the kernel: they survive the process from here on.
    pub fn store(&self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        self.file.write_all_at(bytes, offset)
    }

    /// Takes the space for `length` bytes from `offset` on now, and leaves the file as long as it is.
    pub fn reserve_behind(&self, offset: u64, length: u64) -> io::Result<()> {
        let keep = rustix::fs::FallocateFlags::KEEP_SIZE;
        Ok(rustix::fs::fallocate(&*self.file, keep, offset, length)?)
    }

    /// Takes the space for the first `length` bytes now, so that storing there cannot find it gone.
    pub fn reserve(&self, length: u64) -> io::Result<()> {
        let none = rustix::fs::FallocateFlags::empty();
        match rustix::fs::fallocate(&*self.file, none, 0, length) {
            // Where space cannot be taken in advance, written zeroes take it.
            Err(Errno::OPNOTSUPP) => self.store(0, &vec![0; length as usize]),
            other => Ok(other?),
        }
    }
}
