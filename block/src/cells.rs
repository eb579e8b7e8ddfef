use std::fs::File;
use std::io;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;

/// A small file of bookkeeping: sparse, and stored to by system calls that can fail.
///
/// Never mapped: on a full file system a store through a mapping is a signal, not an error.
#[derive(Debug)]
pub struct Cells {
    file: File,
}

impl Cells {
    /// Makes an empty file at `path`, in the place of any that is there.
    pub fn create(path: &Path) -> io::Result<Self> {
        let mut options = File::options();
        options.read(true).write(true).create(true).truncate(true);
        // What is kept about a disk is its owner's business alone.
        let file = options.mode(0o600).open(path)?;
        Ok(Self { file })
    }

    /// Hands `bytes` to the kernel: they survive the process from here on.
    pub fn store(&self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        self.file.write_all_at(bytes, offset)
    }

    /// Takes the space for the first `length` bytes now, so that storing there cannot find it gone.
    pub fn reserve(&self, length: u64) -> io::Result<()> {
        let none = rustix::fs::FallocateFlags::empty();
        match rustix::fs::fallocate(&self.file, none, 0, length) {
            // Where space cannot be taken in advance, written zeroes take it.
            Err(rustix::io::Errno::OPNOTSUPP) => self.store(0, &vec![0; length as usize]),
            other => Ok(other?),
        }
    }
}
