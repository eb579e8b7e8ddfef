//! Which points may go.

use std::collections::{BTreeMap, BTreeSet};

use time::OffsetDateTime;

use super::error::ArchiveError;
use super::folder::Archive;
use super::manifest::Point;

/// How many points to keep, by each rule; a point that any of them keeps stays.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct Keep {
    /// The newest.
    pub last: u64,
    /// The last of each of so many days that have points.
    pub daily: u64,
    /// The last of each week, by ISO 8601.
    pub weekly: u64,
    /// The last of each month.
    pub monthly: u64,
    /// The last of each year.
    pub yearly: u64,
}

/// What becomes of a point.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Fate {
    /// A rule keeps it, or it is the newest.
    Kept,
    /// No rule keeps it, but this point builds on it.
    Needed(u64),
    /// It goes.
    Pruned,
}

/// What becomes of each point, ascending.
///
/// The newest stays whatever the rules are: the next one builds on it. Days, weeks, months and years are those
/// of UTC.
pub fn fates(points: &[Point], keep: &Keep) -> Vec<(u64, Fate)> {
    let mut kept: BTreeSet<u64> = points
        .last()
        .map(|newest| newest.number)
        .into_iter()
        .collect();
    kept.extend(
        points
            .iter()
            .rev()
            .take(keep.last as usize)
            .map(|point| point.number),
    );
    keep_one_each(points, keep.daily, |t| (t.year(), t.ordinal()), &mut kept);
    keep_one_each(
        points,
        keep.weekly,
        |t| (t.to_iso_week_date().0, t.iso_week().into()),
        &mut kept,
    );
    keep_one_each(
        points,
        keep.monthly,
        |t| (t.year(), u8::from(t.month()).into()),
        &mut kept,
    );
    keep_one_each(points, keep.yearly, |t| (t.year(), 0), &mut kept);

    // What a point builds on is older than it: one pass downwards finds all that is needed.
    let mut needed = BTreeMap::new();
    for point in points.iter().rev() {
        if kept.contains(&point.number) || needed.contains_key(&point.number) {
            let parents = point.disks.iter().filter_map(|disk| disk.parent.as_ref());
            for parent in parents {
                needed.entry(parent.point).or_insert(point.number);
            }
        }
    }
    let fate = |point: &Point| match needed.get(&point.number) {
        _ if kept.contains(&point.number) => Fate::Kept,
        Some(by) => Fate::Needed(*by),
        None => Fate::Pruned,
    };
    points
        .iter()
        .map(|point| (point.number, fate(point)))
        .collect()
}

/// Keeps the last point of each of the newest `count` periods that have points.
fn keep_one_each(
    points: &[Point],
    count: u64,
    period: impl Fn(OffsetDateTime) -> (i32, u16),
    kept: &mut BTreeSet<u64>,
) {
    let mut last = BTreeMap::new();
    for point in points {
        let instant = point.instant.to_offset(time::UtcOffset::UTC);
        last.insert(period(instant), point.number);
    }
    kept.extend(last.into_values().rev().take(count as usize));
}

impl Archive {
    /// Removes these points, none of which another one may need.
    ///
    /// What builds on others goes first, so that whatever interrupts it leaves no point without what it
    /// builds on. One that was begun to be removed is not there any more.
    pub fn prune(&self, numbers: &[u64]) -> Result<(), ArchiveError> {
        let mut numbers = numbers.to_vec();
        numbers.sort_unstable_by(|one, other| other.cmp(one));
        self.remove(&numbers)
    }
}

#[cfg(test)]
mod tests {
    use time::macros::datetime;

    use super::super::digest::Digest;
    use super::super::manifest::{DiskEntry, Parent};
    use super::super::plan::{Mode, Origin};
    use super::*;

    fn point(number: u64, instant: OffsetDateTime, parent: Option<u64>) -> Point {
        let disk = DiskEntry {
            name: "vda".into(),
            uuid: None,
            size: 512,
            mode: parent.map_or(Mode::Full, |_| Mode::Incremental),
            reason: None,
            since: None,
            parent: parent.map(|point| Parent {
                point,
                blake3: Digest::of(b""),
            }),
            file: "vda.qcow2".into(),
            file_size: 0,
            blake3: Digest::of(b""),
            cluster_size: 4096,
            chunk_size: 1 << 20,
            data_bytes: 0,
            zero_bytes: 0,
        };
        Point {
            number,
            instant,
            origin: Origin {
                place: String::new(),
                vouched: true,
            },
            backup: None,
            checkpoint: None,
            held_us: None,
            disks: vec![disk],
        }
    }

    fn pruned(points: &[Point], keep: Keep) -> Vec<u64> {
        let fates = fates(points, &keep).into_iter();
        let pruned = fates.filter(|(_, fate)| *fate == Fate::Pruned);
        pruned.map(|(number, _)| number).collect()
    }

    #[test]
    fn what_a_kept_point_builds_on_stays() {
        let day = datetime!(2026-11-20 12:00 UTC);
        let chain = [
            (1, None),
            (2, Some(1)),
            (3, None),
            (4, Some(3)),
            (5, Some(4)),
            (6, Some(4)),
        ];
        let points = chain.map(|(number, parent)| point(number, day, parent));
        let last = |last| Keep {
            last,
            ..Keep::default()
        };
        assert_eq!(pruned(&points, last(1)), [1, 2, 5]);
        assert_eq!(pruned(&points, last(2)), [1, 2]);
        assert_eq!(pruned(&points, last(5)), [] as [u64; 0]);
        let all = fates(&points, &last(1));
        assert_eq!(all[2], (3, Fate::Needed(4)));
        assert_eq!(all[3], (4, Fate::Needed(6)));
        assert_eq!(all[5], (6, Fate::Kept));
        // Without any rule the newest stays.
        assert_eq!(pruned(&points, Keep::default()), [1, 2, 5]);
        assert!(fates(&[], &last(1)).is_empty());
    }

    #[test]
    fn the_last_of_each_day_week_month_and_year_is_kept() {
        let times = [
            datetime!(2024-12-31 23:59 UTC),    // 1: week 1 of 2025
            datetime!(2025-01-01 00:00 UTC),    // 2: the same week
            datetime!(2025-01-01 12:00 UTC),    // 3: the same day
            datetime!(2025-01-31 12:00 UTC),    // 4
            datetime!(2025-02-01 01:00 +02:00), // 5: the day before, in UTC
            datetime!(2025-02-03 12:00 UTC),    // 6
        ];
        let numbered = times.into_iter().zip(1..);
        let points: Vec<_> = numbered
            .map(|(time, number)| point(number, time, None))
            .collect();
        let check = |keep: fn(&mut Keep), expected: &[u64]| {
            let mut rule = Keep::default();
            keep(&mut rule);
            assert_eq!(pruned(&points, rule), expected, "{rule:?}");
        };
        check(|keep| keep.daily = 2, &[1, 2, 3, 4]);
        check(|keep| keep.daily = 3, &[1, 2, 4]);
        check(|keep| keep.weekly = 3, &[1, 2, 4]);
        check(|keep| keep.weekly = 2, &[1, 2, 3, 4]);
        check(|keep| keep.monthly = 2, &[1, 2, 3, 4]);
        check(|keep| keep.monthly = 9, &[2, 3, 4]);
        check(|keep| keep.yearly = 9, &[2, 3, 4, 5]);
        check(|keep| keep.yearly = 1, &[1, 2, 3, 4, 5]);
    }
}
