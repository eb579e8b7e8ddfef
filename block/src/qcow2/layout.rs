//! Where everything lies in a file of which it is known what it is to hold.

use std::ops::Range;

use thiserror::Error;

use super::places::Places;

/// Where everything lies in a qcow2 file that is written once.
///
/// In this order, each from a cluster of its own on: the header; the refcount table; the refcount
/// blocks; the L1 table; the L2 tables of stretches that hold something; the data, in the order of
/// the disk and without gaps. The file ends with a whole cluster.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Layout {
    pub(super) size: u64,
    pub(super) cluster: u64,
    pub(super) refcount_table: u64,
    pub(super) refcount_blocks: u64,
    pub(super) l1_clusters: u64,
    /// Those of the L1 entries that have an L2 table.
    pub(super) tables: Places,
    /// Those of the disk's clusters that have data.
    pub(super) data: Places,
    /// Those that read as zeroes whatever the backing file has.
    pub(super) zero: Places,
    pub(super) backing: Option<String>,
}

/// Why there is no such file.
#[derive(Clone, Debug, Eq, Error, PartialEq)]
#[non_exhaustive]
pub enum LayoutError {
    /// The cluster size is none.
    #[error("a cluster size of {0}, which is no power of two from 4 KiB to 2 MiB")]
    ClusterSize(u64),
    /// The size is none.
    #[error("a size of {0}, which is no multiple of 512 from 512 on")]
    Size(u64),
    /// The format has tables of limited length.
    #[error("a size of {size} is too large for clusters of {cluster_size}")]
    TooLarge {
        /// Of the disk.
        size: u64,
        /// That it was to have.
        cluster_size: u64,
    },
    /// Runs overlap, or are empty, out of order, beyond the end, or not of whole clusters.
    #[error("runs that are not whole clusters in order")]
    Runs,
    /// The name of the backing file does not fit.
    #[error("a name of the backing file of {0} bytes")]
    Backing(usize),
}

/// What lies at a place of the file.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum Part {
    /// The header, with what belongs to it.
    Header,
    /// The table of refcount blocks.
    RefcountTable,
    /// Refcounts.
    RefcountBlock,
    /// The table of L2 tables.
    L1Table,
    /// A table of where this stretch of the disk lies.
    L2Table(Range<u64>),
    /// The byte of the disk at this offset.
    Data(u64),
    /// Nothing: what is left of a cluster.
    Padding,
}

impl Layout {
    /// The layout for a disk of `size` bytes, of which `data` is to lie in the file, and `zero` reads
    /// as zeroes whatever a backing file has. The runs ascend, and are of whole clusters, but for the
    /// end of the disk.
    pub fn new(
        size: u64,
        cluster_size: u64,
        data: &[Range<u64>],
        zero: &[Range<u64>],
    ) -> Result<Self, LayoutError> {
        if !cluster_size.is_power_of_two() || !CLUSTER_SIZES.contains(&cluster_size) {
            return Err(LayoutError::ClusterSize(cluster_size));
        }
        if size == 0 || !size.is_multiple_of(512) || i64::try_from(size).is_err() {
            return Err(LayoutError::Size(size));
        }
        let too_large = || LayoutError::TooLarge { size, cluster_size };
        let entries = cluster_size / ENTRY;
        let l1_entries = size.div_ceil(cluster_size * entries);
        if l1_entries * ENTRY > L1_MAX {
            return Err(too_large());
        }

        let clusters = |runs: &[Range<u64>]| clusters(runs, size, cluster_size);
        let (data, zero) = (clusters(data)?, clusters(zero)?);
        if data.runs().any(|run| zero.within(run).next().is_some()) {
            return Err(LayoutError::Runs);
        }
        let tables = tables(&data, &zero, entries);

        let l1_clusters = (l1_entries * ENTRY).div_ceil(cluster_size);
        let others = 1 + l1_clusters + tables.count() + data.count();
        let (refcount_table, refcount_blocks) = refcounts(others, cluster_size);
        if refcount_table * cluster_size > REFCOUNT_TABLE_MAX {
            return Err(too_large());
        }
        Ok(Self {
            size,
            cluster: cluster_size,
            refcount_table,
            refcount_blocks,
            l1_clusters,
            tables,
            data,
            zero,
            backing: None,
        })
    }

    /// The same with a backing file, a qcow2 file too, by the name under which it is found from
    /// where this one lies.
    pub fn with_backing(self, name: &str) -> Result<Self, LayoutError> {
        if name.is_empty() || name.len() > BACKING_MAX {
            return Err(LayoutError::Backing(name.len()));
        }
        let backing = Some(name.to_owned());
        Ok(Self { backing, ..self })
    }

    /// The size of the disk.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// How long the file is.
    pub fn file_size(&self) -> u64 {
        self.metadata_size() + self.data.count() * self.cluster
    }

    /// How much of that comes before the data.
    pub fn metadata_size(&self) -> u64 {
        (self.first_table() + self.tables.count()) * self.cluster
    }

    /// Where in the file a byte of the disk lies, if it does.
    ///
    /// What is adjacent among the data is adjacent in the file, also where the disk has something
    /// else in between.
    pub fn host_offset(&self, guest: u64) -> Option<u64> {
        if guest >= self.size {
            return None;
        }
        let place = self.data.place_of(guest / self.cluster)?;
        Some(self.metadata_size() + place * self.cluster + guest % self.cluster)
    }

    /// What lies at an offset of the file; beyond its end nothing does.
    pub fn part_at(&self, host: u64) -> Part {
        let (cluster, within) = (host / self.cluster, host % self.cluster);
        let used = |from: u64, bytes: u64| (cluster - from) * self.cluster + within < bytes;
        let first = self.first_table();
        if cluster == 0 {
            return part_if(within < self.header().len() as u64, Part::Header);
        }
        if cluster <= self.refcount_table {
            return part_if(used(1, self.refcount_blocks * ENTRY), Part::RefcountTable);
        }
        if cluster < first - self.l1_clusters {
            return Part::RefcountBlock;
        }
        if cluster < first {
            let bytes = self.l1_entries() * ENTRY;
            return part_if(used(first - self.l1_clusters, bytes), Part::L1Table);
        }
        let covered = self.cluster / ENTRY * self.cluster;
        if let Some(table) = self.tables.number_at(cluster - first) {
            let start = table * covered;
            let entry = start + within / ENTRY * self.cluster;
            let range = start..(start + covered).min(self.size);
            return part_if(entry < self.size, Part::L2Table(range));
        }
        let place = cluster - first - self.tables.count();
        let guest = self.data.number_at(place);
        let guest = guest.map(|number| number * self.cluster + within);
        guest
            .filter(|guest| *guest < self.size)
            .map_or(Part::Padding, Part::Data)
    }

    pub(super) fn l1_entries(&self) -> u64 {
        self.size.div_ceil(self.cluster / ENTRY * self.cluster)
    }

    /// The cluster of the first L2 table.
    pub(super) fn first_table(&self) -> u64 {
        1 + self.refcount_table + self.refcount_blocks + self.l1_clusters
    }
}

fn part_if(is_used: bool, part: Part) -> Part {
    if is_used { part } else { Part::Padding }
}

/// Runs of bytes as runs of clusters.
fn clusters(runs: &[Range<u64>], size: u64, cluster: u64) -> Result<Places, LayoutError> {
    let is_whole = |run: &Range<u64>| {
        let is_end = run.end.is_multiple_of(cluster) || run.end == size;
        run.start.is_multiple_of(cluster) && is_end && run.end <= size
    };
    if !runs.iter().all(is_whole) {
        return Err(LayoutError::Runs);
    }
    let runs = runs
        .iter()
        .map(|run| run.start / cluster..run.end.div_ceil(cluster));
    Places::new(runs).ok_or(LayoutError::Runs)
}

/// The L2 tables for these clusters.
fn tables(data: &Places, zero: &Places, entries: u64) -> Places {
    let table = |run: Range<u64>| run.start / entries..(run.end - 1) / entries + 1;
    let mut tables: Vec<_> = data.runs().chain(zero.runs()).map(table).collect();
    tables.sort_unstable_by_key(|run| run.start);
    let mut merged: Vec<Range<u64>> = Vec::new();
    for run in tables {
        match merged.last_mut() {
            Some(last) if last.end >= run.start => last.end = last.end.max(run.end),
            _ => merged.push(run),
        }
    }
    Places::new(merged).expect("they are in order")
}

/// How many clusters the refcount table and the refcount blocks take, for so many other clusters:
/// they count themselves too.
fn refcounts(others: u64, cluster: u64) -> (u64, u64) {
    let (mut table, mut blocks) = (0, 0);
    loop {
        let blocks_now = (others + table + blocks).div_ceil(cluster / REFCOUNT);
        let table_now = (blocks_now * ENTRY).div_ceil(cluster);
        if (table_now, blocks_now) == (table, blocks) {
            return (table, blocks);
        }
        (table, blocks) = (table_now, blocks_now);
    }
}

/// From what a page of the page cache holds to what the format allows.
const CLUSTER_SIZES: std::ops::RangeInclusive<u64> = 4 << 10..=2 << 20;

/// Of an entry of a table, and of a refcount.
pub(super) const ENTRY: u64 = 8;
pub(super) const REFCOUNT: u64 = 2;

/// What QEMU opens.
const L1_MAX: u64 = 32 << 20;
const REFCOUNT_TABLE_MAX: u64 = 8 << 20;
const BACKING_MAX: usize = 1023;

#[cfg(test)]
mod tests {
    use super::*;

    const K: u64 = 1 << 10;

    #[test]
    fn data_lies_in_the_order_of_the_disk_without_gaps() {
        let data = [64 * K..192 * K, (1 << 40)..(1 << 40) + 64 * K];
        let layout = Layout::new(2 << 40, 64 * K, &data, &[0..64 * K]).unwrap();
        let first = layout.metadata_size();
        // Header, refcount table and block, L1 table, two L2 tables.
        assert_eq!(first, 6 * 64 * K);
        assert_eq!(layout.host_offset(64 * K), Some(first));
        assert_eq!(layout.host_offset(192 * K - 1), Some(first + 128 * K - 1));
        assert_eq!(layout.host_offset(1 << 40), Some(first + 128 * K));
        assert_eq!(layout.host_offset(0), None);
        assert_eq!(layout.host_offset(192 * K), None);
        assert_eq!(layout.file_size(), first + 192 * K);
    }

    #[test]
    fn every_byte_is_a_part_of_something() {
        let size = 3 * 4 * K + 512;
        let data = [0..4 * K, 8 * K..size];
        let layout = Layout::new(size, 4 * K, &data, &[4 * K..8 * K]).unwrap();
        let part = |cluster: u64, within: u64| layout.part_at(cluster * 4 * K + within);
        assert_eq!(part(0, 0), Part::Header);
        assert_eq!(part(0, 112), Part::Padding);
        assert_eq!(part(1, 7), Part::RefcountTable);
        assert_eq!(part(1, 8), Part::Padding);
        assert_eq!(part(2, 4095), Part::RefcountBlock);
        assert_eq!(part(3, 0), Part::L1Table);
        assert_eq!(part(3, 8), Part::Padding);
        assert_eq!(part(4, 31), Part::L2Table(0..size));
        assert_eq!(part(4, 32), Part::Padding);
        assert_eq!(part(5, 1), Part::Data(1));
        assert_eq!(part(6, 1), Part::Data(8 * K + 1));
        assert_eq!(part(7, 511), Part::Data(size - 1));
        assert_eq!(part(7, 512), Part::Padding);
        assert_eq!(layout.file_size(), 8 * 4 * K);
        assert_eq!(part(8, 0), Part::Padding);
    }

    #[test]
    fn what_the_format_cannot_hold_is_refused() {
        let new = |size, cluster| Layout::new(size, cluster, &[], &[]).map(|_| ());
        assert_eq!(new(1 << 20, 3000), Err(LayoutError::ClusterSize(3000)));
        assert_eq!(new(1 << 20, 2048), Err(LayoutError::ClusterSize(2048)));
        for size in [0, 511, 1000, u64::MAX / 512 * 512] {
            assert_eq!(new(size, 4 * K), Err(LayoutError::Size(size)), "{size}");
        }
        assert!(new(8 << 40, 4 * K).is_ok());
        let too_large = (8 << 40) + 512;
        assert!(matches!(
            new(too_large, 4 * K),
            Err(LayoutError::TooLarge { .. })
        ));
        let runs = |data: &[Range<u64>], zero: &[Range<u64>]| {
            Layout::new(64 * K, 4 * K, data, zero).map(|_| ())
        };
        let refused = Err(LayoutError::Runs);
        assert_eq!(runs(&[0..8 * K, 4 * K..12 * K], &[]), refused);
        assert_eq!(runs(&[0..4 * K], &[0..8 * K]), refused);
        assert_eq!(runs(&[1..4 * K], &[]), refused);
        assert_eq!(runs(&[0..512], &[]), refused);
        assert_eq!(runs(&[60 * K..68 * K], &[]), refused);
        let layout = Layout::new(64 * K, 4 * K, &[], &[]).unwrap();
        assert!(layout.with_backing(&"x".repeat(1024)).is_err());
    }
}
