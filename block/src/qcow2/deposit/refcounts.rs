//! How often each cluster of an image is used.

use std::collections::BTreeSet;
use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;

use super::head::Head;
use super::{NotStored, be64, read_at, write_padded};
use crate::qcow2::header::OFFSET_MAX;

/// The table of blocks of counts.
pub(super) struct Refcounts {
    /// Where each block is; 0 where there is none.
    blocks: Vec<u64>,
    offset: u64,
    order: u32,
    cluster: u64,
}

/// What has to be there for some clusters at the end to be counted.
pub(super) struct Plan {
    /// All of them: what they are for, then new blocks, then a new table.
    clusters: Range<u64>,
    /// Blocks to be, each with its cluster.
    blocks: Vec<(u64, u64)>,
    table: Option<NewTable>,
}

impl Plan {
    /// The first cluster behind all of it.
    pub(super) fn end(&self) -> u64 {
        self.clusters.end
    }
}

/// A table that is to take the place of the one that is named.
#[derive(Clone, Debug)]
pub(super) struct NewTable {
    pub(super) offset: u64,
    pub(super) clusters: u64,
    blocks: Vec<u64>,
}

impl Refcounts {
    pub(super) fn read(file: &File, head: &Head) -> Result<Self, NotStored> {
        let cluster = head.cluster();
        let (offset, clusters) = head.refcount_table();
        let is_placed = offset != 0 && offset.is_multiple_of(cluster) && offset <= OFFSET_MAX;
        if !is_placed || !(1..=TABLE_MAX / cluster).contains(&clusters) {
            return Err(NotStored::Damaged(
                "its table of counts is where none can be",
            ));
        }
        let table = read_at(file, offset, clusters * cluster)?;
        let blocks: Vec<u64> = table.chunks_exact(8).map(|entry| be64(entry, 0)).collect();
        let is_block = |block: &u64| block.is_multiple_of(cluster) && *block <= OFFSET_MAX;
        if !blocks.iter().all(is_block) {
            return Err(NotStored::Damaged("clusters are counted at no cluster"));
        }
        Ok(Self {
            blocks,
            offset,
            order: head.refcount_order(),
            cluster,
        })
    }

    /// The first cluster behind all that are used.
    pub(super) fn end(&self, file: &File) -> Result<u64, NotStored> {
        for index in (0..self.blocks.len() as u64).rev() {
            let block = self.block(index);
            if block == 0 {
                continue;
            }
            let counts = read_at(file, block, self.cluster)?;
            let used = (0..self.per_block())
                .rev()
                .find(|at| self.get(&counts, *at) != 0);
            if let Some(used) = used {
                return Ok(index * self.per_block() + used + 1);
            }
        }
        Ok(0)
    }

    /// What has to be there for `count` clusters from `first` on.
    pub(super) fn plan(&self, first: u64, count: u64) -> Result<Plan, NotStored> {
        let (mut new_blocks, mut table_clusters) = (0, 0);
        loop {
            let end = first + count + new_blocks + table_clusters;
            let touched = first / self.per_block()..end.div_ceil(self.per_block());
            let last = touched.end;
            let missing: Vec<u64> = touched.filter(|index| self.block(*index) == 0).collect();
            let needed = if missing.is_empty() {
                0
            } else {
                let before = (8 * self.blocks.len() as u64) / self.cluster;
                before.max((8 * last).div_ceil(self.cluster))
            };
            if needed * self.cluster > TABLE_MAX {
                return Err(NotStored::NoRoom(
                    "it has as many clusters as can be counted",
                ));
            }
            if (missing.len() as u64, needed) != (new_blocks, table_clusters) {
                // Neither ever becomes less.
                (new_blocks, table_clusters) = (missing.len() as u64, needed);
                continue;
            }
            let blocks: Vec<_> = missing.into_iter().zip(first + count..).collect();
            let table = (needed > 0).then(|| self.new_table(&blocks, end - needed, needed));
            return Ok(Plan {
                clusters: first..end,
                blocks,
                table,
            });
        }
    }

    fn new_table(&self, added: &[(u64, u64)], at: u64, clusters: u64) -> NewTable {
        let mut blocks = self.blocks.clone();
        blocks.resize((clusters * self.cluster / 8) as usize, 0);
        for (index, place) in added {
            blocks[*index as usize] = place * self.cluster;
        }
        NewTable {
            offset: at * self.cluster,
            clusters,
            blocks,
        }
    }

    /// Counts all clusters of `plan` once: in the blocks that there are, where all other counts stay as
    /// they are, and in new ones, which nobody looks for before the table is named that is returned.
    pub(super) fn count_in(&self, file: &File, plan: &Plan) -> Result<Option<NewTable>, NotStored> {
        let per_block = self.per_block();
        let Range { start, end } = plan.clusters;
        for index in start / per_block..end.div_ceil(per_block) {
            let added = plan.blocks.iter().find(|(added, _)| *added == index);
            let (place, mut counts) = if let Some((_, place)) = added {
                (place * self.cluster, vec![0; self.cluster as usize])
            } else {
                let place = self.block(index);
                (place, read_at(file, place, self.cluster)?)
            };
            let base = index * per_block;
            for at in start.max(base)..end.min(base + per_block) {
                if self.get(&counts, at - base) != 0 {
                    return Err(NotStored::Damaged("a cluster behind its end is in use"));
                }
                self.set(&mut counts, at - base, 1);
            }
            file.write_all_at(&counts, place)?;
        }
        if let Some(table) = &plan.table {
            let bytes: Vec<u8> = table
                .blocks
                .iter()
                .flat_map(|at| at.to_be_bytes())
                .collect();
            write_padded(file, table.offset, &bytes, self.cluster)?;
        }
        Ok(plan.table.clone())
    }

    /// Goes on with a table that is named now; where the one before was.
    pub(super) fn moved_to(&mut self, table: &NewTable) -> Range<u64> {
        let first = self.offset / self.cluster;
        let old = first..first + 8 * self.blocks.len() as u64 / self.cluster;
        self.blocks.clone_from(&table.blocks);
        self.offset = table.offset;
        old
    }

    /// Those of `clusters` that may be given back: they are counted once, and nothing of the image's own
    /// is in them.
    pub(super) fn used_once(
        &self,
        file: &File,
        head: &Head,
        clusters: Vec<Range<u64>>,
    ) -> Result<Vec<Range<u64>>, NotStored> {
        if clusters.is_empty() {
            return Ok(clusters);
        }
        let table = 8 * self.blocks.len() as u64;
        let (first_at, first_bytes) = head.first_table();
        if first_bytes > FIRST_TABLE_MAX {
            return Err(NotStored::Damaged("its first table is too long"));
        }
        let mut own = vec![
            (0, self.cluster),
            (self.offset, table),
            (first_at, first_bytes),
        ];
        own.extend(self.blocks.iter().map(|block| (*block, self.cluster)));
        let first_table = read_at(file, first_at, first_bytes)?;
        let second_tables = first_table.chunks_exact(8);
        own.extend(second_tables.map(|entry| (be64(entry, 0) & TABLE_OFFSET, self.cluster)));
        let own: BTreeSet<u64> = own
            .into_iter()
            .flat_map(|(at, length)| at / self.cluster..(at + length).div_ceil(self.cluster))
            .collect();
        let mut open: Option<(u64, Vec<u8>)> = None;
        let mut found = Vec::new();
        for at in clusters.into_iter().flatten() {
            let block = self.block(at / self.per_block());
            if block == 0 || own.contains(&at) {
                continue;
            }
            if open.as_ref().is_none_or(|(known, _)| *known != block) {
                open = Some((block, read_at(file, block, self.cluster)?));
            }
            let (_, counts) = open.as_ref().expect("it was opened a moment ago");
            if self.get(counts, at % self.per_block()) == 1 {
                found.push(at..at + 1);
            }
        }
        Ok(found)
    }

    /// Counts clusters once less that nothing names any more.
    pub(super) fn give_back(
        &self,
        file: &File,
        clusters: impl Iterator<Item = Range<u64>>,
    ) -> Result<(), NotStored> {
        let mut open: Option<(u64, Vec<u8>)> = None;
        for at in clusters.flatten() {
            let block = self.block(at / self.per_block());
            if block == 0 {
                continue;
            }
            if open.as_ref().is_none_or(|(known, _)| *known != block) {
                store(file, open.take())?;
                open = Some((block, read_at(file, block, self.cluster)?));
            }
            let (_, counts) = open.as_mut().expect("it was opened a moment ago");
            let within = at % self.per_block();
            let left = self.get(counts, within).saturating_sub(1);
            self.set(counts, within, left);
        }
        Ok(store(file, open)?)
    }

    fn block(&self, index: u64) -> u64 {
        self.blocks.get(index as usize).copied().unwrap_or(0)
    }

    /// How many clusters a block counts.
    fn per_block(&self) -> u64 {
        (8 * self.cluster) >> self.order
    }

    fn get(&self, counts: &[u8], at: u64) -> u64 {
        let bits = 1 << self.order;
        let bit = at * bits;
        let byte = (bit / 8) as usize;
        if bits < 8 {
            // The first is in the lowest bits.
            return u64::from(counts[byte]) >> (bit % 8) & ((1 << bits) - 1);
        }
        let bytes = counts[byte..byte + bits as usize / 8].iter();
        bytes.fold(0, |sum, byte| sum << 8 | u64::from(*byte))
    }

    fn set(&self, counts: &mut [u8], at: u64, count: u64) {
        let bits = 1 << self.order;
        let bit = at * bits;
        let byte = (bit / 8) as usize;
        if bits < 8 {
            let mask = (((1_u64 << bits) - 1) << (bit % 8)) as u8;
            counts[byte] = counts[byte] & !mask | (count << (bit % 8)) as u8;
            return;
        }
        let length = bits as usize / 8;
        counts[byte..byte + length].copy_from_slice(&count.to_be_bytes()[8 - length..]);
    }
}

fn store(file: &File, block: Option<(u64, Vec<u8>)>) -> io::Result<()> {
    block.map_or(Ok(()), |(at, counts)| file.write_all_at(&counts, at))
}

/// Of a second table, in the first: bits 9 to 55.
const TABLE_OFFSET: u64 = OFFSET_MAX & !511;

/// QEMU's, for the first table of a disk.
const FIRST_TABLE_MAX: u64 = 32 << 20;

/// QEMU's, for the table.
const TABLE_MAX: u64 = 8 << 20;
