//! The bytes before the data.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;

use super::layout::{ENTRY, Layout, REFCOUNT};
use super::places::Places;

impl Layout {
    /// Makes the file as long as it is to be, and writes everything but the data. What is there
    /// otherwise must be zeroes.
    pub fn write_metadata(&self, file: &File) -> io::Result<()> {
        file.set_len(self.file_size())?;
        let mut buffer = vec![0; self.cluster as usize];
        for offset in self.metadata_offsets() {
            self.fill(offset, &mut buffer);
            // Tables of large disks are mostly empty.
            if !crate::is_zero(&buffer) {
                file.write_all_at(&buffer, offset)?;
            }
        }
        Ok(())
    }

    /// Where the clusters before the data begin.
    pub fn metadata_offsets(&self) -> impl Iterator<Item = u64> + use<> {
        (0..self.metadata_size()).step_by(self.cluster as usize)
    }

    /// The cluster of the file that begins at `offset`, which is before the data.
    ///
    /// # Panics
    ///
    /// If the buffer is not of a cluster's size, or `offset` none of
    /// [`metadata_offsets`](Self::metadata_offsets).
    pub fn fill(&self, offset: u64, buffer: &mut [u8]) {
        assert!(offset.is_multiple_of(self.cluster) && offset < self.metadata_size());
        assert_eq!(buffer.len() as u64, self.cluster, "a cluster");
        buffer.fill(0);
        let cluster = offset / self.cluster;
        let blocks = 1 + self.refcount_table;
        let l1 = blocks + self.refcount_blocks;
        let tables = self.first_table();
        if cluster == 0 {
            let header = self.header();
            buffer[..header.len()].copy_from_slice(&header);
        } else if cluster < blocks {
            self.fill_refcount_table(cluster - 1, buffer);
        } else if cluster < l1 {
            self.fill_refcount_block(cluster - blocks, buffer);
        } else if cluster < tables {
            self.fill_l1(cluster - l1, buffer);
        } else {
            self.fill_l2(cluster - tables, buffer);
        }
    }

    /// The header, its extensions and the name of the backing file.
    pub(super) fn header(&self) -> Vec<u8> {
        let mut extensions = Vec::new();
        if self.backing.is_some() {
            extensions.extend(BACKING_FORMAT.to_be_bytes());
            extensions.extend((FORMAT.len() as u32).to_be_bytes());
            extensions.extend(FORMAT);
            extensions.resize(extensions.len().next_multiple_of(8), 0);
        }
        // An extension of type 0 and length 0 is the end of them.
        extensions.extend([0; 8]);

        let backing = self.backing.as_deref().unwrap_or("").as_bytes();
        let backing_offset = match backing.len() {
            0 => 0,
            _ => HEADER_LENGTH as u64 + extensions.len() as u64,
        };
        let mut header = Vec::with_capacity(HEADER_LENGTH + extensions.len() + backing.len());
        let l1_offset = (1 + self.refcount_table + self.refcount_blocks) * self.cluster;
        header.extend(MAGIC);
        header.extend(VERSION.to_be_bytes());
        header.extend(backing_offset.to_be_bytes());
        header.extend((backing.len() as u32).to_be_bytes());
        header.extend(self.cluster.trailing_zeros().to_be_bytes());
        header.extend(self.size.to_be_bytes());
        header.extend(0u32.to_be_bytes()); // encryption
        header.extend((self.l1_entries() as u32).to_be_bytes());
        header.extend(l1_offset.to_be_bytes());
        header.extend(self.cluster.to_be_bytes()); // the refcount table follows the header
        header.extend((self.refcount_table as u32).to_be_bytes());
        header.extend(0u32.to_be_bytes()); // snapshots
        header.extend([0u64; 4].map(u64::to_be_bytes).concat()); // where they are; features
        header.extend(REFCOUNT_ORDER.to_be_bytes());
        header.extend((HEADER_LENGTH as u32).to_be_bytes());
        debug_assert_eq!(header.len(), HEADER_LENGTH);
        header.extend(extensions);
        header.extend(backing);
        header
    }

    fn fill_refcount_table(&self, index: u64, buffer: &mut [u8]) {
        let first = index * (self.cluster / ENTRY);
        let entries = first..self.refcount_blocks.max(first);
        for (number, entry) in entries.zip(buffer.chunks_exact_mut(ENTRY as usize)) {
            let offset = (1 + self.refcount_table + number) * self.cluster;
            entry.copy_from_slice(&offset.to_be_bytes());
        }
    }

    fn fill_refcount_block(&self, index: u64, buffer: &mut [u8]) {
        let first = index * (self.cluster / REFCOUNT);
        let clusters = self.file_size() / self.cluster;
        let refcounts = first..clusters.max(first);
        for (_, refcount) in refcounts.zip(buffer.chunks_exact_mut(REFCOUNT as usize)) {
            refcount.copy_from_slice(&1u16.to_be_bytes());
        }
    }

    fn fill_l1(&self, index: u64, buffer: &mut [u8]) {
        let entries = self.cluster / ENTRY;
        let covered = index * entries..(index + 1) * entries;
        fill_entries(buffer, covered, &self.tables, |place| {
            ((self.first_table() + place) * self.cluster) | COPIED
        });
    }

    fn fill_l2(&self, index: u64, buffer: &mut [u8]) {
        let entries = self.cluster / ENTRY;
        let table = self.tables.number_at(index).expect("it is one of them");
        let covered = table * entries..(table + 1) * entries;
        let data = self.metadata_size();
        fill_entries(buffer, covered.clone(), &self.data, |place| {
            (data + place * self.cluster) | COPIED
        });
        fill_entries(buffer, covered, &self.zero, |_| ZERO);
    }
}

/// Fills in the entries of a table, which is for the numbers in `covered`, that are in `places`.
fn fill_entries(
    buffer: &mut [u8],
    covered: Range<u64>,
    places: &Places,
    entry: impl Fn(u64) -> u64,
) {
    for (numbers, place) in places.within(covered.clone()) {
        let first = ((numbers.start - covered.start) * ENTRY) as usize;
        let entries = buffer[first..].chunks_exact_mut(ENTRY as usize);
        for ((_, place), bytes) in numbers.zip(place..).zip(entries) {
            bytes.copy_from_slice(&entry(place).to_be_bytes());
        }
    }
}

const MAGIC: [u8; 4] = *b"QFI\xfb";
const VERSION: u32 = 3;
const HEADER_LENGTH: usize = 104;

/// The type of the header extension that names the format of the backing file, and that format.
const BACKING_FORMAT: u32 = 0xe279_2aca;
const FORMAT: &[u8] = b"qcow2";

/// 16 bits.
const REFCOUNT_ORDER: u32 = 4;

/// What an entry points to has a refcount of 1.
const COPIED: u64 = 1 << 63;

/// What an L2 entry stands for reads as zeroes.
const ZERO: u64 = 1;
