//! What a point is to hold, decided before the first byte is copied.

use std::ops::Range;

use block::qcow2::{Layout, LayoutError};
use serde::{Deserialize, Serialize};
use time::OffsetDateTime;
use uuid::Uuid;

use super::runs;
use crate::names::Name;

/// A point that is to be made.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
pub struct Plan {
    /// Where the disks are copied from.
    pub origin: Origin,
    /// The backup of the server that holds the instant, if the server has such.
    pub backup: Option<Identity>,
    /// The instant that is copied.
    #[serde(with = "time::serde::rfc3339")]
    pub instant: OffsetDateTime,
    /// The checkpoint that the server made of it, if any.
    pub checkpoint: Option<Identity>,
    /// For how long hooks held the machine for it, in microseconds, if there were any.
    pub held_us: Option<u64>,
    /// The disks, each of its own name.
    pub disks: Vec<DiskPlan>,
}

/// Where disks were copied from.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub struct Origin {
    /// The run directory of the server, or a URI.
    pub place: String,
    /// Whether the server vouches that what it calls unchanged has not changed.
    pub vouched: bool,
}

/// What has a name, and a uuid that is never used again.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub struct Identity {
    /// The name, or id.
    pub name: String,
    /// The uuid.
    pub uuid: Uuid,
}

/// One disk of a point.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub struct DiskPlan {
    /// Its name: by the rules for names of disks.
    pub name: String,
    /// Its uuid, if the server told one.
    pub uuid: Option<Uuid>,
    /// How large it is, in bytes.
    pub size: u64,
    /// Whether all of it is copied.
    pub mode: Mode,
    /// Why it is a full, in words, where an incremental could have been expected.
    pub reason: Option<String>,
    /// The checkpoint since which changes are known; of an incremental.
    pub since: Option<Since>,
    /// The number of the point that an incremental builds on.
    pub parent: Option<u64>,
    /// How finely changes are known, in bytes.
    pub granularity: u64,
    /// What is to be copied; ascending, without overlaps. It need not be aligned to anything: chunks
    /// come rounded out to clusters, and then the rest of a cluster is read from the source too.
    #[serde(with = "runs::pairs")]
    pub data: Vec<Range<u64>>,
    /// What reads as zeroes: of a full, all that is no data; of an incremental, what changed to them.
    #[serde(with = "runs::pairs")]
    pub zero: Vec<Range<u64>>,
}

/// A checkpoint as a server without uuids can tell of it too.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub struct Since {
    /// The name of the checkpoint or dirty bitmap.
    pub name: String,
    /// The uuid, if it has one.
    pub uuid: Option<Uuid>,
}

/// How much of a disk a point holds.
#[derive(Clone, Copy, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Mode {
    /// All of it.
    Full,
    /// What has changed since the point before.
    Incremental,
}

impl DiskPlan {
    /// What is wrong with it, if anything is.
    pub(super) fn check(&self) -> Result<(), String> {
        Name::parse(&self.name).map_err(|error| error.to_string())?;
        let Self { name, size, .. } = self;
        if !runs::are_runs(&self.data, *size) || !runs::are_runs(&self.zero, *size) {
            return Err(format!("the runs of {name} are not in order"));
        }
        let both = runs::bytes(&self.zero) - runs::bytes(&runs::difference(&self.zero, &self.data));
        if both > 0 {
            return Err(format!("{both} bytes of {name} are both data and zeroes"));
        }
        let known = runs::bytes(&self.data) + runs::bytes(&self.zero);
        // What a full does not mention would be restored as zeroes.
        if self.mode == Mode::Full && known != *size {
            let left_out = size - known;
            return Err(format!("a full of {name} leaves out {left_out} bytes"));
        }
        if (self.mode == Mode::Incremental) != self.parent.is_some() {
            return Err(format!(
                "{name} needs a parent if it is incremental, and only then"
            ));
        }
        Ok(())
    }

    /// How large clusters are: as fine as changes are known, so that no more is stored than changed,
    /// but for tables that would be larger than that is worth.
    pub(super) fn cluster_size(&self) -> u64 {
        if self.mode == Mode::Full {
            return CLUSTER_SIZE_MAX;
        }
        let finest = self.granularity.clamp(CLUSTER_SIZE_MIN, CLUSTER_SIZE_MAX);
        let mut cluster = finest.next_power_of_two();
        // An entry of the L1 table stands for as many clusters as a cluster has entries.
        while self.size / (cluster * cluster / 8) > L1_ENTRIES_WANTED && cluster < CLUSTER_SIZE_MAX
        {
            cluster *= 2;
        }
        cluster
    }

    /// Data and zeroes by whole clusters. What is zero in part of a cluster only is data, as is what
    /// lies between data that is more fragmented than a manifest is to list.
    pub(super) fn by_clusters(&self) -> (Vec<Range<u64>>, Vec<Range<u64>>) {
        let mut alignment = self.cluster_size();
        loop {
            let (data, zero) = self.aligned(alignment);
            if data.len().max(zero.len()) <= runs::RUNS_MAX {
                return (data, zero);
            }
            alignment *= 2;
        }
    }

    fn aligned(&self, alignment: u64) -> (Vec<Range<u64>>, Vec<Range<u64>>) {
        let out = |range: &Range<u64>| runs::align_out(range, alignment, self.size);
        let data = self.data.iter().map(out);
        if self.mode == Mode::Full {
            return (runs::union(data), Vec::new());
        }
        let all_zero = runs::union(self.zero.iter().cloned());
        let whole = all_zero.iter();
        let whole = whole.map(|range| runs::align_in(range, alignment, self.size));
        let whole = runs::union(whole);
        let edges = runs::difference(&all_zero, &whole);
        let data = runs::union(data.chain(edges.iter().map(out)));
        let zero = runs::difference(&whole, &data);
        (data, zero)
    }
}

/// The layout of the file of a disk in a point.
pub(super) fn layout(
    disk: &str,
    size: u64,
    cluster_size: u64,
    parent: Option<u64>,
    (data, zero): (&[Range<u64>], &[Range<u64>]),
) -> Result<Layout, LayoutError> {
    let layout = Layout::new(size, cluster_size, data, zero)?;
    match parent {
        None => Ok(layout),
        Some(point) => layout.with_backing(&format!("../{point}/{}", file_name(disk))),
    }
}

/// The name of the file of a disk.
pub(super) fn file_name(disk: &str) -> String {
    format!("{disk}.qcow2")
}

/// What QEMU has by default, and what the server's finest granularity is.
const CLUSTER_SIZE_MAX: u64 = 64 << 10;
const CLUSTER_SIZE_MIN: u64 = 4 << 10;

/// 4 MiB of table.
const L1_ENTRIES_WANTED: u64 = 1 << 19;

#[cfg(test)]
mod tests {
    use super::*;

    const K: u64 = 1 << 10;

    fn plan(mode: Mode, data: Vec<Range<u64>>, zero: Vec<Range<u64>>) -> DiskPlan {
        DiskPlan {
            name: "vda".into(),
            uuid: None,
            size: 100 * K,
            mode,
            reason: None,
            since: None,
            parent: (mode == Mode::Incremental).then_some(1),
            granularity: 4 * K,
            data,
            zero,
        }
    }

    #[test]
    fn a_full_says_of_every_byte_what_it_is() {
        let full = |data, zero| plan(Mode::Full, data, zero).check();
        assert_eq!(full(vec![0..50 * K], vec![50 * K..100 * K]), Ok(()));
        assert!(full(vec![0..50 * K], vec![50 * K..99 * K]).is_err());
        assert!(full(vec![0..50 * K], vec![49 * K..99 * K]).is_err());
        assert!(full(vec![0..50 * K, 40 * K..100 * K], vec![]).is_err());
    }

    #[test]
    fn clusters_that_are_zero_in_part_are_data() {
        let plan = plan(
            Mode::Incremental,
            vec![K..2 * K, 40 * K..44 * K],
            vec![2 * K..9 * K, 9 * K..17 * K, 44 * K..48 * K, 90 * K..100 * K],
        );
        plan.check().unwrap();
        let (data, zero) = plan.by_clusters();
        assert_eq!(
            data,
            [0..4 * K, 16 * K..20 * K, 40 * K..44 * K, 88 * K..92 * K]
        );
        assert_eq!(zero, [4 * K..16 * K, 44 * K..48 * K, 92 * K..100 * K]);
    }

    #[test]
    fn what_is_too_fragmented_is_copied_with_what_lies_between() {
        let mut plan = plan(Mode::Incremental, vec![], vec![]);
        plan.size = 64 << 30;
        let count = runs::RUNS_MAX as u64 + 1;
        plan.data = (0..count).map(|at| at * 8 * K..at * 8 * K + 512).collect();
        let (data, _) = plan.by_clusters();
        assert_eq!(data, [0..count * 8 * K]);
    }

    #[test]
    fn clusters_are_as_fine_as_changes_are_known() {
        let mut plan = plan(Mode::Incremental, vec![], vec![]);
        for (granularity, size, expected) in [
            (512, K, 4 * K),
            (4 * K, 1 << 40, 4 * K),
            (4 * K, 2 << 40, 8 * K),
            (16 * K, 2 << 40, 16 * K),
            (2 << 20, 1 << 40, 64 * K),
            (4 * K, 64 << 40, 32 * K),
        ] {
            (plan.granularity, plan.size) = (granularity, size);
            assert_eq!(plan.cluster_size(), expected, "{granularity} {size}");
            assert!(Layout::new(size, expected, &[], &[]).is_ok());
        }
        plan.mode = Mode::Full;
        assert_eq!(plan.cluster_size(), 64 * K);
    }
}
