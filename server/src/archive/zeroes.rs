//! Zeroes, written as cheaply as can be.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use rustix::fs::{FallocateFlags, fallocate};
use rustix::io::Errno;

/// What becomes of the space.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Space {
    /// It is given back.
    GivenBack,
    /// It stays.
    Kept,
}

/// Makes a stretch of a file or device zeroes.
pub(super) fn fill(file: &File, offset: u64, length: u64, space: Space) -> io::Result<()> {
    let flags = match space {
        Space::GivenBack => FallocateFlags::PUNCH_HOLE,
        Space::Kept => FallocateFlags::ZERO_RANGE,
    };
    match fallocate(file, flags | FallocateFlags::KEEP_SIZE, offset, length) {
        // It cannot, or not by stretches like this.
        Err(Errno::OPNOTSUPP | Errno::INVAL) => {}
        done => return Ok(done?),
    }
    let mut at = offset;
    for piece in pieces(length) {
        file.write_all_at(piece, at)?;
        at += piece.len() as u64;
    }
    Ok(())
}

/// So many zeroes, in pieces.
pub(super) fn pieces(length: u64) -> impl Iterator<Item = &'static [u8]> {
    let mut left = length;
    std::iter::from_fn(move || {
        let now = left.min(ZEROES.len() as u64);
        left -= now;
        (now > 0).then(|| &ZEROES[..now as usize])
    })
}

static ZEROES: [u8; 64 << 10] = [0; 64 << 10];
