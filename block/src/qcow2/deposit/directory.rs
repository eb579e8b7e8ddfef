//! The list of bitmaps of an image.

use std::fs::File;
use std::ops::Range;

use super::head::Head;
use super::{
    Existing, GRANULARITY_MAX, GRANULARITY_MIN, NewBitmap, NotStored, be32, be64, read_at,
};
use crate::qcow2::header::OFFSET_MAX;

/// The list that an image has.
pub(super) struct Directory {
    bytes: Vec<u8>,
    entries: Vec<Known>,
    offset: u64,
}

/// A bitmap that is in it.
pub(super) struct Known {
    place: Range<usize>,
    name: Vec<u8>,
    table: u64,
    clusters: u64,
    flags: u32,
    kind: u8,
    granularity_bits: u8,
    has_more: bool,
}

/// A bitmap that is to be in it.
pub(super) struct Entry<'a> {
    pub(super) table: u64,
    pub(super) clusters: u32,
    pub(super) bitmap: &'a NewBitmap<'a>,
}

/// A list to be.
pub(super) struct List {
    pub(super) count: u32,
    pub(super) bytes: Vec<u8>,
}

impl Directory {
    pub(super) fn read(file: &File, head: &Head, existing: Existing) -> Result<Self, NotStored> {
        let empty = Self {
            bytes: Vec::new(),
            entries: Vec::new(),
            offset: 0,
        };
        let Some(listed) = head.header().bitmaps else {
            return Ok(empty);
        };
        if !listed.consistent {
            return match existing {
                Existing::Stays => Err(NotStored::Stale),
                // Others may have taken its clusters by now.
                Existing::Goes => Ok(empty),
            };
        }
        if listed.count > COUNT_MAX || listed.bytes > BYTES_MAX {
            return Err(NotStored::NoRoom("it has as many bitmaps as can be"));
        }
        if !listed.offset.is_multiple_of(head.cluster()) || listed.offset > OFFSET_MAX {
            return Err(NotStored::Damaged("its list of bitmaps is at no cluster"));
        }
        let bytes = read_at(file, listed.offset, listed.bytes)?;
        let entries = entries(&bytes)?;
        if entries.len() != listed.count as usize {
            return Err(NotStored::Damaged("its list of bitmaps does not add up"));
        }
        Ok(Self {
            bytes,
            entries,
            offset: listed.offset,
        })
    }

    pub(super) fn find(&self, name: &str) -> Option<&Known> {
        self.entries
            .iter()
            .find(|known| known.name == name.as_bytes())
    }

    /// The same with one more, in the place of any of its name.
    pub(super) fn with(&self, entry: &Entry<'_>) -> Result<List, NotStored> {
        let name = entry.bitmap.name.as_bytes();
        let others = self.entries.iter().filter(|known| known.name != name);
        let mut list = List {
            count: 1,
            bytes: Vec::new(),
        };
        for known in others {
            list.bytes.extend(&self.bytes[known.place.clone()]);
            list.count += 1;
        }
        list.bytes.extend(entry.encode());
        if list.count > COUNT_MAX || list.bytes.len() as u64 > BYTES_MAX {
            return Err(NotStored::NoRoom("it has as many bitmaps as can be"));
        }
        Ok(list)
    }

    /// The clusters that the list is in.
    pub(super) fn clusters(&self, cluster: u64) -> impl Iterator<Item = Range<u64>> {
        let first = self.offset / cluster;
        let count = (self.bytes.len() as u64).div_ceil(cluster);
        std::iter::once(first..first + count)
    }
}

impl Known {
    /// The clusters that its bits and their table are in; none if anything about it is strange. What is
    /// not given back is a leak, and what is given back by a table that is none may be the disk's.
    pub(super) fn clusters(&self, file: &File, head: &Head) -> Result<Vec<Range<u64>>, NotStored> {
        let (cluster, length) = (head.cluster(), file.metadata()?.len());
        let is_place = |offset: u64, length_there: u64| {
            let end = offset.saturating_add(length_there);
            offset != 0 && offset.is_multiple_of(cluster) && end <= length
        };
        if !self.is_sound(head) || !is_place(self.table, 8 * self.clusters) {
            return Ok(Vec::new());
        }
        let table = read_at(file, self.table, 8 * self.clusters)?;
        let first = self.table / cluster;
        let mut found = vec![first..first + (8 * self.clusters).div_ceil(cluster)];
        for entry in table.chunks_exact(8).map(|entry| be64(entry, 0)) {
            match entry {
                NO_BITS | ALL_BITS => {}
                offset if offset <= OFFSET_MAX && is_place(offset, cluster) => {
                    found.push(offset / cluster..offset / cluster + 1);
                }
                _ => return Ok(Vec::new()),
            }
        }
        Ok(found)
    }

    /// Whether it is of a known kind, and of this disk.
    fn is_sound(&self, head: &Head) -> bool {
        let known = self.kind == DIRTY_TRACKING && self.flags & !KNOWN == 0 && !self.has_more;
        let granularity = 1_u64.checked_shl(self.granularity_bits.into()).unwrap_or(0);
        if !known || !(GRANULARITY_MIN..=GRANULARITY_MAX).contains(&granularity) {
            return false;
        }
        let bytes = head.size().div_ceil(granularity).div_ceil(8);
        self.clusters == bytes.div_ceil(head.cluster())
    }
}

impl Entry<'_> {
    fn encode(&self) -> Vec<u8> {
        let name = self.bitmap.name.as_bytes();
        let flags: u32 = if self.bitmap.recording { RECORDING } else { 0 };
        let mut bytes = Vec::with_capacity(HEAD + name.len() + 7);
        bytes.extend(self.table.to_be_bytes());
        bytes.extend(self.clusters.to_be_bytes());
        bytes.extend(flags.to_be_bytes());
        bytes.push(DIRTY_TRACKING);
        bytes.push(self.bitmap.granularity.trailing_zeros() as u8);
        bytes.extend((name.len() as u16).to_be_bytes());
        bytes.extend(0_u32.to_be_bytes());
        bytes.extend(name);
        bytes.resize(bytes.len().next_multiple_of(8), 0);
        bytes
    }
}

fn entries(bytes: &[u8]) -> Result<Vec<Known>, NotStored> {
    let mut entries = Vec::new();
    let mut at = 0;
    while at < bytes.len() {
        let cut = NotStored::Damaged("its list of bitmaps is cut short");
        let Some(head) = bytes.get(at..at + HEAD) else {
            return Err(cut);
        };
        let name = usize::from(u16::from_be_bytes([head[18], head[19]]));
        let name_at = at + HEAD + be32(head, 20) as usize;
        let end = (name_at + name).next_multiple_of(8);
        let (Some(name), true) = (bytes.get(name_at..name_at + name), end <= bytes.len()) else {
            return Err(cut);
        };
        let clusters = u64::from(be32(head, 8));
        if clusters > CLUSTERS_MAX {
            return Err(NotStored::Damaged("a bitmap is larger than any can be"));
        }
        entries.push(Known {
            place: at..end,
            name: name.to_vec(),
            table: be64(head, 0),
            clusters,
            flags: be32(head, 12),
            kind: head[16],
            granularity_bits: head[17],
            has_more: be32(head, 20) > 0,
        });
        at = end;
    }
    Ok(entries)
}

/// The fixed part of an entry.
const HEAD: usize = 24;

const IN_USE: u32 = 1;
const RECORDING: u32 = 1 << 1;
const MORE_IS_HARMLESS: u32 = 1 << 2;
const KNOWN: u32 = IN_USE | RECORDING | MORE_IS_HARMLESS;
const DIRTY_TRACKING: u8 = 1;

/// In a table, of a cluster of bits that is nowhere.
const NO_BITS: u64 = 0;
const ALL_BITS: u64 = 1;

/// As many as are read.
const COUNT_MAX: u32 = 1024;
const BYTES_MAX: u64 = 2 << 20;

/// 512 MiB of bits in the smallest clusters.
const CLUSTERS_MAX: u64 = 1 << 20;
