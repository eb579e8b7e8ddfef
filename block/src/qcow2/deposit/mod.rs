//! A dirty bitmap is put into an image that nobody uses (`qcow2.txt` of QEMU, version 3).
//!
//! Nothing that is in use is changed before the last step, and that is one store within a sector. Blocks of
//! counts that are there are written over with new counts in them: those of clusters that are in use keep
//! their bytes, and as a sector is written whole or not at all, half of such a block is as good as
//! either. What each crash point leaves behind:
//!
//! 1. while bits, their table, the list of bitmaps and what counts clusters are written, all behind what
//!    the image has: the image as it was, and clusters that are counted and not used;
//! 2. after the new table of counts is named: the same;
//! 3. while room is made in the header: the same, the name of the backing file being moved first;
//! 4. after the list is named: the new bitmap, and the clusters of the list before;
//! 5. while those are given back: the same, with fewer.
//!
//! Clusters that are counted and not used are what `qemu-img check -r leaks` gives back. Where anything
//! of a bitmap that is replaced is strange, all that it had is left to that: by a damaged table the disk's
//! own clusters would be given back.
//!
//! Where the head of an image has its list of bitmaps across two sectors, or where naming the first one
//! takes two, there is a moment between 3 and 4 in which all of its bitmaps count as inconsistent: too
//! much is copied then, and never too little.

mod directory;
mod head;
mod refcounts;

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;

use thiserror::Error;

use self::directory::{Directory, Entry};
use self::head::Head;
use self::refcounts::Refcounts;
use super::header::{OFFSET_MAX, Refusal};
use crate::{ImageLock, LockError};

/// A dirty bitmap to be.
#[derive(Clone, Copy, Debug)]
pub struct NewBitmap<'a> {
    /// What it is called: 1 to 1,023 bytes without NUL.
    pub name: &'a str,
    /// How much of the disk one bit stands for: a power of two, 512 bytes to 2 GiB.
    pub granularity: u64,
    /// Whether whoever runs the machine is to record in it.
    pub recording: bool,
    /// What is dirty: ranges of the disk in bytes, in order, none empty.
    pub dirty: &'a [Range<u64>],
}

/// What becomes of what is in the image already.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Existing {
    /// One of the same name stays, and nothing is stored.
    Stays,
    /// One of the same name is replaced; bitmaps that nobody can believe any more are forgotten.
    Goes,
}

/// Why a bitmap is not stored.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum NotStored {
    /// The image is in use.
    #[error(transparent)]
    Lock(#[from] LockError),
    /// What its head says.
    #[error(transparent)]
    Refused(#[from] Refusal),
    /// It is no regular file, so there is no room behind its end.
    #[error("it is no regular file")]
    NoFile,
    /// Its version has no place for bitmaps.
    #[error("it is of version 2 of the format, which has no dirty bitmaps")]
    Version2,
    /// It is of another disk.
    #[error("it is of a disk of {found} bytes, and the bitmap of one of {wanted}")]
    OtherSize {
        /// As its head says.
        found: u64,
        /// As was asked for.
        wanted: u64,
    },
    /// Such a bitmap cannot be stored.
    #[error("{0}")]
    Bitmap(&'static str),
    /// It has a bitmap of this name.
    #[error("it has a bitmap of this name")]
    Exists,
    /// It has bitmaps that nobody can believe.
    #[error("its bitmaps are inconsistent: it was written by a program that knows none")]
    Stale,
    /// There is no room for what has to be said.
    #[error("{0}")]
    NoRoom(&'static str),
    /// What is in it cannot be.
    #[error("it is damaged: {0}")]
    Damaged(&'static str),
    /// It cannot be read or written.
    #[error(transparent)]
    Io(#[from] io::Error),
}

/// Stores `bitmap` in the image `file`, whose disk has `size` bytes, durably. Nobody else has it open, and
/// nobody can until the descriptor is closed.
pub fn store_bitmap(
    file: &File,
    size: u64,
    bitmap: &NewBitmap<'_>,
    existing: Existing,
) -> Result<(), NotStored> {
    check(bitmap)?;
    if !file.metadata()?.is_file() {
        return Err(NotStored::NoFile);
    }
    ImageLock::take(file)?;
    let mut head = Head::read(file)?;
    if head.size() != size {
        return Err(NotStored::OtherSize {
            found: head.size(),
            wanted: size,
        });
    }
    let mut refcounts = Refcounts::read(file, &head)?;
    let before = Directory::read(file, &head, existing)?;
    let replaced = before.find(bitmap.name);
    if replaced.is_some() && existing == Existing::Stays {
        return Err(NotStored::Exists);
    }
    head.check_room()?;
    let mut unused: Vec<_> = before.clusters(head.cluster()).collect();
    if let Some(replaced) = replaced {
        unused.extend(replaced.clusters(file, &head)?);
    }
    let unused = match refcounts.used_once(file, &head, unused) {
        // Who knows what they are.
        Err(NotStored::Damaged(_)) => Vec::new(),
        found => found?,
    };

    let cluster = head.cluster();
    let bits = Bits::new(bitmap, size, cluster)?;
    let first = file.metadata()?.len().div_ceil(cluster);
    let first = first.max(refcounts.end(file)?);
    let table_at = first + bits.dirty.len() as u64;
    let list_at = table_at + (8 * bits.count).div_ceil(cluster);
    let list = before.with(&Entry {
        table: table_at * cluster,
        clusters: bits.count as u32,
        bitmap,
    })?;
    let count = list_at + (list.bytes.len() as u64).div_ceil(cluster) - first;
    let plan = refcounts.plan(first, count)?;
    if plan.end().saturating_mul(cluster) > OFFSET_MAX {
        return Err(NotStored::NoRoom("the file would be too long"));
    }

    bits.write(file, bitmap, first, table_at)?;
    write_padded(file, list_at * cluster, &list.bytes, cluster)?;
    let counts = refcounts.count_in(file, &plan)?;
    // To its full length, so that no cluster is behind the end.
    let length = file.metadata()?.len();
    file.set_len(length.max(plan.end() * cluster))?;
    file.sync_data()?;
    if let Some(table) = counts {
        head.name_refcounts(file, &table)?;
        let old = refcounts.moved_to(&table);
        head.name_bitmaps(file, &list, list_at * cluster)?;
        refcounts.give_back(file, std::iter::once(old))?;
    } else {
        head.name_bitmaps(file, &list, list_at * cluster)?;
    }
    refcounts.give_back(file, unused.into_iter())?;
    file.sync_data()?;
    Ok(())
}

fn check(bitmap: &NewBitmap<'_>) -> Result<(), NotStored> {
    let NewBitmap {
        name, granularity, ..
    } = *bitmap;
    if !(1..=NAME_MAX).contains(&name.len()) || name.contains('\0') {
        return Err(NotStored::Bitmap("a bitmap's name has 1 to 1023 bytes"));
    }
    if !granularity.is_power_of_two() || !(GRANULARITY_MIN..=GRANULARITY_MAX).contains(&granularity)
    {
        return Err(NotStored::Bitmap(
            "its granularity is not from 512 bytes to 2 GiB",
        ));
    }
    Ok(())
}

/// The bits of a bitmap, as clusters.
struct Bits {
    /// Those in which any is set, by number.
    dirty: Vec<u64>,
    /// How many there are, set or not.
    count: u64,
    size: u64,
    cluster: u64,
}

impl Bits {
    fn new(bitmap: &NewBitmap<'_>, size: u64, cluster: u64) -> Result<Self, NotStored> {
        let bytes = size.div_ceil(bitmap.granularity).div_ceil(8);
        let count = bytes.div_ceil(cluster);
        if count == 0 || count * cluster > BITMAP_BYTES_MAX {
            return Err(NotStored::Bitmap(
                "its bits are more than an image can have",
            ));
        }
        let covered = bitmap.granularity.saturating_mul(8 * cluster);
        let mut dirty: Vec<u64> = Vec::new();
        let mut end = 0;
        for range in bitmap.dirty {
            if range.is_empty() || range.start < end || range.end > size {
                return Err(NotStored::Bitmap("what is dirty is not in order"));
            }
            end = range.end;
            let touched = range.start / covered..range.end.div_ceil(covered);
            let known = dirty.last().map_or(0, |last| last + 1);
            dirty.extend(touched.start.max(known)..touched.end);
        }
        Ok(Self {
            dirty,
            count,
            size,
            cluster,
        })
    }

    /// Writes the bits from cluster `first` on, and at cluster `table_at` where they are.
    fn write(
        &self,
        file: &File,
        bitmap: &NewBitmap<'_>,
        first: u64,
        table_at: u64,
    ) -> io::Result<()> {
        let mut table = vec![0; (8 * self.count) as usize];
        let covered = bitmap.granularity.saturating_mul(8 * self.cluster);
        let mut ranges = bitmap.dirty;
        for (number, at) in self.dirty.iter().zip(first..) {
            let start = number * covered;
            let end = start.saturating_add(covered).min(self.size);
            let mut bits = vec![0; self.cluster as usize];
            while let Some(range) = ranges.first().filter(|range| range.start < end) {
                let from = (range.start.max(start) - start) / bitmap.granularity;
                let to = (range.end.min(end) - start).div_ceil(bitmap.granularity);
                set(&mut bits, from..to);
                if range.end > end {
                    break;
                }
                ranges = &ranges[1..];
            }
            file.write_all_at(&bits, at * self.cluster)?;
            let entry = (8 * number) as usize;
            table[entry..entry + 8].copy_from_slice(&(at * self.cluster).to_be_bytes());
        }
        write_padded(file, table_at * self.cluster, &table, self.cluster)
    }
}

/// Sets these bits, the first being the lowest of the first byte.
fn set(bits: &mut [u8], mut range: Range<u64>) {
    while !range.is_empty() {
        let byte = (range.start / 8) as usize;
        if range.start.is_multiple_of(8) && range.end - range.start >= 8 {
            let whole = (range.end / 8) as usize;
            bits[byte..whole].fill(0xff);
            range.start = 8 * whole as u64;
        } else {
            bits[byte] |= 1 << (range.start % 8);
            range.start += 1;
        }
    }
}

/// Writes `bytes` and zeroes up to a whole cluster.
fn write_padded(file: &File, at: u64, bytes: &[u8], cluster: u64) -> io::Result<()> {
    let length = bytes.len() as u64;
    file.write_all_at(bytes, at)?;
    let padding = length.next_multiple_of(cluster) - length;
    file.write_all_at(&vec![0; padding as usize], at + length)
}

/// Exactly these bytes of the file.
fn read_at(file: &File, at: u64, length: u64) -> Result<Vec<u8>, NotStored> {
    let mut bytes = vec![0; length as usize];
    file.read_exact_at(&mut bytes, at).map_err(|error| {
        if error.kind() == io::ErrorKind::UnexpectedEof {
            NotStored::Damaged("a table is behind the end of the file")
        } else {
            error.into()
        }
    })?;
    Ok(bytes)
}

fn be64(bytes: &[u8], at: usize) -> u64 {
    let word = bytes.get(at..).and_then(|rest| rest.first_chunk());
    u64::from_be_bytes(word.copied().unwrap_or_default())
}

fn be32(bytes: &[u8], at: usize) -> u32 {
    let word = bytes.get(at..).and_then(|rest| rest.first_chunk());
    u32::from_be_bytes(word.copied().unwrap_or_default())
}

const NAME_MAX: usize = 1023;

const GRANULARITY_MIN: u64 = 512;
const GRANULARITY_MAX: u64 = 2 << 30;

/// QEMU's limit for the bits of one bitmap.
const BITMAP_BYTES_MAX: u64 = 512 << 20;

/// What storage writes whole or not at all.
const SECTOR: u64 = 512;

#[cfg(test)]
mod tests;
