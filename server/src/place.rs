//! A file takes its place when it is whole.

use std::fs;
use std::io;
use std::path::Path;

use rustix::fs::{CWD, RenameFlags, renameat_with};
use rustix::io::Errno;

/// Renames a file to a `place` where nothing is; it stays where it is if something is there.
pub(crate) fn rename_to_free_place(file: &Path, place: &Path) -> io::Result<()> {
    match renameat_with(CWD, file, CWD, place, RenameFlags::NOREPLACE) {
        // A file system without the flag, such as NFS. A link replaces nothing either.
        Err(Errno::INVAL) => {
            fs::hard_link(file, place)?;
            fs::remove_file(file)
        }
        renamed => Ok(renamed?),
    }
}
