//! A file that says that a folder is in use, and by whom.

use std::fmt;
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use rustix::fs::{FlockOperation, flock};
use rustix::io::Errno;

/// A lock that ends with the process, on a file that holds its pid.
#[derive(Debug)]
pub(crate) struct LockFile(File);

/// Who has the lock, as a text to append: ` (pid 17)`, or nothing where that is not known.
#[derive(Debug)]
pub(crate) struct Holder(Option<u32>);

impl LockFile {
    /// Takes the lock, or says who has it.
    pub(crate) fn take(path: &Path) -> io::Result<Result<Self, Holder>> {
        let mut options = File::options();
        let mut file = options
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .open(path)?;
        match flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => {}
            Err(Errno::WOULDBLOCK) => {
                let mut text = String::new();
                let read = (&file).take(PID_DIGITS_MAX).read_to_string(&mut text);
                return Ok(Err(Holder(
                    read.ok().and_then(|_| text.trim().parse().ok()),
                )));
            }
            Err(error) => return Err(error.into()),
        }
        file.set_len(0)?;
        writeln!(file, "{}", std::process::id())?;
        Ok(Ok(Self(file)))
    }
}

impl Drop for LockFile {
    fn drop(&mut self) {
        // Closing alone would leave it to a child that was forked and has not closed its files yet.
        let _ = flock(&self.0, FlockOperation::Unlock);
    }
}

impl Holder {
    /// Whether that is ourselves.
    pub(crate) fn is_this_process(&self) -> bool {
        self.0 == Some(std::process::id())
    }
}

impl fmt::Display for Holder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.map_or(Ok(()), |pid| write!(f, " (pid {pid})"))
    }
}

/// A pid and its line end.
const PID_DIGITS_MAX: u64 = 12;
