//! Where a file has no extent at all.
//!
//! `SEEK_HOLE` calls an allocated but unwritten extent a hole until someone reads it into the page
//! cache, and data from then on: an answer that moves although nothing was written. Whether an
//! extent exists moves only with a write. So this asks for extents (Linux `fiemap.txt`), without
//! the flag that would write the cache out first: an extent that is only in the cache is reported
//! as well, as a delayed allocation.

#![expect(
    unsafe_code,
    reason = "an ioctl that the system call crate does not wrap"
)]

use std::fs::File;
use std::ops::Range;

use rustix::io::Errno;
use rustix::ioctl::{Updater, ioctl, opcode};

use crate::Extent;

/// The holes and extents at the start of `range`, or the error of a file system without this call.
pub(crate) fn extents(file: &File, range: &Range<u64>) -> Result<Vec<Extent>, Errno> {
    let mut request = Request {
        start: range.start,
        length: range.end - range.start,
        flags: 0,
        mapped: 0,
        count: EXTENTS_MAX as u32,
        reserved: 0,
        extents: [Entry::default(); EXTENTS_MAX],
    };
    // SAFETY: the opcode is FS_IOC_FIEMAP, whose argument is a `struct fiemap` followed by as many
    // `struct fiemap_extent` as its count says; `Request` has that layout, and the kernel writes
    // within it only.
    unsafe {
        let call = Updater::<FS_IOC_FIEMAP, Request>::new(&mut request);
        ioctl(file, call)?;
    }
    let count = (request.mapped as usize).min(EXTENTS_MAX);
    Ok(arrange(
        range,
        &request.extents[..count],
        count == EXTENTS_MAX,
    ))
}

/// Turns the kernel's extents into adjacent ones from the start of `range` on; to its end, unless
/// `more` may follow what the kernel had room to say.
fn arrange(range: &Range<u64>, entries: &[Entry], more: bool) -> Vec<Extent> {
    let mut extents: Vec<Extent> = Vec::with_capacity(entries.len() * 2 + 1);
    let mut at = range.start;
    let mut push = |end: u64, hole: bool| {
        let end = end.min(range.end);
        if end <= at {
            return;
        }
        match extents.last_mut() {
            Some(last) if last.hole == hole => last.range.end = end,
            _ => extents.push(Extent {
                range: at..end,
                hole,
            }),
        }
        at = end;
    };
    for entry in entries {
        push(entry.logical, true);
        push(entry.logical.saturating_add(entry.length), false);
    }
    if !more {
        push(range.end, true);
    }
    extents
}

/// `struct fiemap`, with room for extents behind it.
#[repr(C)]
struct Request {
    start: u64,
    length: u64,
    flags: u32,
    mapped: u32,
    count: u32,
    reserved: u32,
    extents: [Entry; EXTENTS_MAX],
}

/// `struct fiemap_extent`.
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct Entry {
    logical: u64,
    physical: u64,
    length: u64,
    reserved: [u64; 2],
    flags: u32,
    reserved_too: [u32; 3],
}

/// `_IOWR('f', 11, struct fiemap)`, whose size is that of the head alone.
const FS_IOC_FIEMAP: rustix::ioctl::Opcode = opcode::read_write::<[u64; 4]>(b'f', 11);

/// The kernel has the lock of the file all the while, and does not stop for whoever is woken
/// meanwhile: a guest waits for both.
const EXTENTS_MAX: usize = 32;

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(logical: u64, length: u64) -> Entry {
        Entry {
            logical,
            length,
            ..Entry::default()
        }
    }

    fn hole(range: Range<u64>) -> Extent {
        Extent { range, hole: true }
    }

    fn data(range: Range<u64>) -> Extent {
        Extent { range, hole: false }
    }

    #[test]
    fn what_lies_between_extents_is_a_hole() {
        let found = arrange(
            &(10..100),
            &[entry(0, 20), entry(20, 5), entry(50, 10)],
            false,
        );
        assert_eq!(
            found,
            [data(10..25), hole(25..50), data(50..60), hole(60..100)]
        );
    }

    #[test]
    fn behind_the_last_extent_that_fitted_nothing_is_claimed() {
        assert_eq!(arrange(&(0..100), &[entry(0, 20)], true), [data(0..20)]);
    }

    #[test]
    fn extents_never_reach_beyond_the_range() {
        assert_eq!(
            arrange(&(10..30), &[entry(0, u64::MAX)], true),
            [data(10..30)]
        );
        assert_eq!(arrange(&(10..30), &[], false), [hole(10..30)]);
    }
}
