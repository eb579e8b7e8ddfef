//! Dirty bitmaps that are stored in an image.

use std::collections::BTreeSet;
use std::fs::File;
use std::io;
use std::ops::Range;

use super::chain::{Unreadable, read_header};
use super::header::{BitmapDirectory, OFFSET_MAX};
use super::image::Qcow2Image;
use super::layer::{Layer, damaged};
use crate::{Engine, FileStorage, ImageLock, Storage};

/// A dirty bitmap that is stored in an image, without its bits.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct StoredBitmap {
    /// Its name.
    pub name: String,
    /// How much of the disk one bit stands for: a power of two, 512 bytes to 2 GiB.
    pub granularity: u64,
    /// Whether whoever runs the machine records in it.
    pub recording: bool,
    /// Why its bits cannot be believed, if so.
    pub inconsistent: Option<&'static str>,
    table: u64,
    clusters: u64,
}

/// How much memory the bits of the bitmaps of an image may still take, and how much may be read for it,
/// in bytes.
#[derive(Clone, Copy, Debug)]
pub struct Room(pub u64);

/// An image of which only the dirty bitmaps are read: no file that it names is opened.
pub struct BitmapFile(Layer);

impl BitmapFile {
    /// Locks `file` against writers, and reads its head.
    pub async fn open(file: File, engine: Engine) -> Result<Self, Unreadable> {
        ImageLock::share(&file)?;
        let file = FileStorage::new(file, engine)?;
        let header = read_header(&file).await?;
        Ok(Self(Layer::new(0, header, file, None)?))
    }

    /// The size of the disk, in bytes.
    pub fn size(&self) -> u64 {
        self.0.header.size
    }

    /// As [`Qcow2Image::bitmaps`].
    pub async fn bitmaps(&self) -> io::Result<Vec<StoredBitmap>> {
        self.0.bitmaps().await
    }

    /// As [`Qcow2Image::dirty`].
    pub async fn dirty(
        &self,
        bitmap: &StoredBitmap,
        room: &mut Room,
        dirty: impl FnMut(Range<u64>),
    ) -> io::Result<()> {
        self.0.dirty(bitmap, room, dirty).await
    }
}

impl Qcow2Image {
    /// The dirty bitmaps that are stored in the image itself, or why their list is of no use.
    pub async fn bitmaps(&self) -> io::Result<Vec<StoredBitmap>> {
        match self.top() {
            Some(layer) => layer.bitmaps().await,
            None => Ok(Vec::new()),
        }
    }

    /// Says what is dirty in `bitmap`, which is one of this image's: ranges of the disk, in order and
    /// by whole bits, the last of which may reach beyond its end.
    pub async fn dirty(
        &self,
        bitmap: &StoredBitmap,
        room: &mut Room,
        dirty: impl FnMut(Range<u64>),
    ) -> io::Result<()> {
        match self.top() {
            Some(layer) => layer.dirty(bitmap, room, dirty).await,
            None => Ok(()),
        }
    }
}

impl Layer {
    async fn bitmaps(&self) -> io::Result<Vec<StoredBitmap>> {
        let Some(directory) = self.header.bitmaps else {
            return Ok(Vec::new());
        };
        let cluster = self.geometry.cluster();
        let BitmapDirectory {
            count,
            bytes,
            offset,
            ..
        } = directory;
        if count > COUNT_MAX || bytes > u64::from(COUNT_MAX) * ENTRY_BYTES_MAX {
            return Err(damaged("it has more bitmaps than can be served"));
        }
        if !offset.is_multiple_of(cluster) || offset > OFFSET_MAX {
            return Err(damaged("the list of bitmaps is at no cluster"));
        }
        let listed = read_at(&self.file, offset, bytes).await?;
        let bitmaps = list(&listed, self, &directory)?;
        let names: BTreeSet<_> = bitmaps.iter().map(|bitmap| &bitmap.name).collect();
        if bitmaps.len() != count as usize || names.len() != bitmaps.len() {
            return Err(damaged("its list of bitmaps does not add up"));
        }
        Ok(bitmaps)
    }

    async fn dirty(
        &self,
        bitmap: &StoredBitmap,
        room: &mut Room,
        mut dirty: impl FnMut(Range<u64>),
    ) -> io::Result<()> {
        let cluster = self.geometry.cluster();
        // What one cluster of bits stands for.
        let covered = (cluster * 8).saturating_mul(bitmap.granularity);
        let mut at = 0;
        while at < bitmap.clusters {
            let count = (bitmap.clusters - at).min(TABLE_ENTRIES_AT_ONCE);
            room.take(8 * count)?;
            let table = read_at(&self.file, bitmap.table + 8 * at, 8 * count).await?;
            for (number, entry) in (at..).zip(table.chunks_exact(8)) {
                let entry = u64::from_be_bytes(entry.try_into().unwrap_or_default());
                let start = number.saturating_mul(covered);
                match bits(entry, cluster)? {
                    BitsAt::Clean => {}
                    BitsAt::Dirty => {
                        room.take(cluster.max(BITS_PAGE))?;
                        dirty(start..start.saturating_add(covered).min(self.header.size));
                    }
                    BitsAt::Cluster(offset) => {
                        room.take(cluster.max(BITS_PAGE))?;
                        let bits = read_at(&self.file, offset, cluster).await?;
                        for run in ones(&bits) {
                            let from = start.saturating_add(run.start * bitmap.granularity);
                            let to = start.saturating_add(run.end * bitmap.granularity);
                            // What is said of what is behind the end of the disk is said of nothing.
                            if from < self.header.size {
                                dirty(from..to);
                            }
                        }
                    }
                }
            }
            at += count;
        }
        Ok(())
    }
}

impl Room {
    fn take(&mut self, bytes: u64) -> io::Result<()> {
        let left = self.0.checked_sub(bytes);
        self.0 = left.ok_or_else(|| {
            io::Error::other("the bitmaps of the image take more memory than they may")
        })?;
        Ok(())
    }
}

/// Where the bits of one cluster of a bitmap are.
enum BitsAt {
    Clean,
    Dirty,
    Cluster(u64),
}

fn bits(entry: u64, cluster: u64) -> io::Result<BitsAt> {
    match (entry & TABLE_OFFSET, entry & !TABLE_OFFSET) {
        (0, 0) => Ok(BitsAt::Clean),
        (0, 1) => Ok(BitsAt::Dirty),
        (offset, 0) if offset.is_multiple_of(cluster) => Ok(BitsAt::Cluster(offset)),
        _ => Err(damaged("a table of a bitmap says what cannot be")),
    }
}

/// The runs of ones in `bits`, the first being the lowest of the first byte.
fn ones(bits: &[u8]) -> impl Iterator<Item = Range<u64>> + '_ {
    let words = bits.chunks_exact(8);
    let words = words.map(|word| u64::from_le_bytes(word.try_into().unwrap_or_default()));
    let mut runs = words.zip(0..).flat_map(|(word, number)| {
        let base = number * 64;
        let mut at = 0;
        std::iter::from_fn(move || {
            let rest = word.checked_shr(at).unwrap_or(0);
            if rest == 0 {
                return None;
            }
            let start = at + rest.trailing_zeros();
            at = start + (word >> start).trailing_ones();
            Some(base + u64::from(start)..base + u64::from(at))
        })
    });
    let mut next = runs.next();
    std::iter::from_fn(move || {
        let mut run = next.take()?;
        next = runs.next();
        while let Some(more) = next.as_ref().filter(|more| more.start == run.end) {
            run.end = more.end;
            next = runs.next();
        }
        Some(run)
    })
}

/// Reads the list; what is wrong with one bitmap is told with it.
fn list(
    mut bytes: &[u8],
    layer: &Layer,
    directory: &BitmapDirectory,
) -> io::Result<Vec<StoredBitmap>> {
    let mut bitmaps = Vec::new();
    while let Some((head, behind)) = bytes.split_first_chunk::<ENTRY_HEAD_BYTES>() {
        let number = |at: usize, length: usize| {
            head[at..at + length]
                .iter()
                .fold(0, |sum: u64, byte| sum << 8 | u64::from(*byte))
        };
        let (name_bytes, extra_bytes) = (number(18, 2) as usize, number(20, 4) as usize);
        let name = behind
            .get(extra_bytes..)
            .and_then(|rest| rest.get(..name_bytes));
        let name = name.ok_or_else(|| damaged("its list of bitmaps is cut short"))?;
        let entry = Entry {
            table: number(0, 8),
            clusters: number(8, 4),
            flags: number(12, 4),
            kind: head[16],
            granularity_bits: head[17],
            has_more: extra_bytes > 0,
            name,
        };
        bitmaps.push(entry.bitmap(layer, directory));
        let length = (ENTRY_HEAD_BYTES + extra_bytes + name_bytes).next_multiple_of(8);
        bytes = bytes.get(length..).unwrap_or_default();
    }
    Ok(bitmaps)
}

/// As it is stored.
struct Entry<'a> {
    table: u64,
    clusters: u64,
    flags: u64,
    kind: u8,
    granularity_bits: u8,
    has_more: bool,
    name: &'a [u8],
}

impl Entry<'_> {
    fn bitmap(&self, layer: &Layer, directory: &BitmapDirectory) -> StoredBitmap {
        let granularity = 1_u64.checked_shl(self.granularity_bits.into()).unwrap_or(0);
        StoredBitmap {
            name: String::from_utf8_lossy(self.name).replace('\0', "\u{fffd}"),
            granularity: granularity.clamp(GRANULARITY_MIN, GRANULARITY_MAX),
            recording: self.flags & RECORDING != 0,
            inconsistent: self.inconsistent(granularity, layer, directory).err(),
            table: self.table,
            clusters: self.clusters,
        }
    }

    fn inconsistent(
        &self,
        granularity: u64,
        layer: &Layer,
        directory: &BitmapDirectory,
    ) -> Result<(), &'static str> {
        let cluster = layer.geometry.cluster();
        let (is_in_use, is_stale) = (self.flags & IN_USE != 0, !directory.consistent);
        let named = std::str::from_utf8(self.name).is_ok_and(|name| !name.contains('\0'));
        let named = named && (1..=NAME_MAX).contains(&self.name.len());
        let known = self.kind == DIRTY_TRACKING && self.flags & !KNOWN == 0 && !self.has_more;
        match () {
            () if is_stale => Err("the image was written by a program that knows no bitmaps"),
            () if is_in_use => Err("whoever recorded in it did not close the image"),
            () if !named => Err("its name is no text of 1 to 1023 bytes"),
            () if !known => Err("it is of a kind that is not known"),
            () if !(GRANULARITY_MIN..=GRANULARITY_MAX).contains(&granularity) => {
                Err("its granularity is not from 512 bytes to 2 GiB")
            }
            () if self.clusters * cluster > BITMAP_BYTES_MAX => Err("it is too large"),
            () if !self.table.is_multiple_of(cluster) || self.table > OFFSET_MAX => {
                Err("its table is at no cluster")
            }
            () => {
                let bytes = layer.header.size.div_ceil(granularity).div_ceil(8);
                if self.clusters == bytes.div_ceil(cluster) {
                    Ok(())
                } else {
                    Err("it is for a disk of another size")
                }
            }
        }
    }
}

/// Exactly these bytes of a file.
async fn read_at(file: &FileStorage, offset: u64, length: u64) -> io::Result<Vec<u8>> {
    if offset.saturating_add(length) > file.size() {
        return Err(damaged(
            "a part of its bitmaps is behind the end of the file",
        ));
    }
    let mut bytes = vec![0; length as usize];
    file.read(offset, &mut bytes).await?;
    Ok(bytes)
}

/// The fixed part of an entry of the list.
const ENTRY_HEAD_BYTES: usize = 24;

/// With the longest name and some more.
const ENTRY_BYTES_MAX: u64 = 2048;

/// As many as a disk can have. The format allows for 65,535.
const COUNT_MAX: u32 = 1024;

const NAME_MAX: usize = 1023;

const IN_USE: u64 = 1;
const RECORDING: u64 = 1 << 1;
/// With what follows the head of an entry the bitmap is the same as without.
const MORE_IS_HARMLESS: u64 = 1 << 2;
const KNOWN: u64 = IN_USE | RECORDING | MORE_IS_HARMLESS;

const DIRTY_TRACKING: u8 = 1;

const GRANULARITY_MIN: u64 = 512;
const GRANULARITY_MAX: u64 = 2 << 30;

/// Bits 9 to 55.
const TABLE_OFFSET: u64 = OFFSET_MAX & !511;

/// QEMU's limit for the bits of one bitmap.
const BITMAP_BYTES_MAX: u64 = 512 << 20;

/// 64 KiB of table.
const TABLE_ENTRIES_AT_ONCE: u64 = 8192;

/// Whoever keeps bits keeps as much for the first of them.
const BITS_PAGE: u64 = 4096;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_of_ones_go_on_across_bytes_and_words() {
        let mut bits = [0; 24];
        bits[0] = 0b1000_0110;
        bits[1] = 1;
        bits[7] = 0x80;
        bits[8..16].fill(0xff);
        bits[16] = 1;
        bits[23] = 0x80;
        let found: Vec<_> = ones(&bits).collect();
        assert_eq!(found, [1..3, 7..9, 63..129, 191..192]);
        assert_eq!(ones(&[0; 8]).count(), 0);
        assert_eq!(ones(&[0xff; 16]).collect::<Vec<_>>(), [0..128]);
    }
}
