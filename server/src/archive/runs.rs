//! Runs of bytes: ascending, not empty, without overlaps.

use std::ops::Range;

/// Whether these are runs of a disk of `size` bytes.
pub(super) fn are_runs(runs: &[Range<u64>], size: u64) -> bool {
    runs.iter()
        .all(|run| run.start < run.end && run.end <= size)
        && runs.is_sorted_by(|one, next| one.end <= next.start)
}

/// How many bytes are in them.
pub(super) fn bytes(runs: &[Range<u64>]) -> u64 {
    runs.iter().map(|run| run.end - run.start).sum()
}

/// What is in any of these ranges, in any order.
pub(super) fn union(ranges: impl IntoIterator<Item = Range<u64>>) -> Vec<Range<u64>> {
    let mut ranges: Vec<_> = ranges.into_iter().filter(|run| !run.is_empty()).collect();
    ranges.sort_unstable_by_key(|run| run.start);
    let mut runs: Vec<Range<u64>> = Vec::new();
    for range in ranges {
        match runs.last_mut() {
            Some(last) if last.end >= range.start => last.end = last.end.max(range.end),
            _ => runs.push(range),
        }
    }
    runs
}

/// What is in `runs` and not in `others`.
pub(super) fn difference(runs: &[Range<u64>], others: &[Range<u64>]) -> Vec<Range<u64>> {
    let mut left = Vec::new();
    let mut others = others.iter().peekable();
    for run in runs {
        let mut at = run.start;
        while let Some(other) = others.peek().filter(|other| other.start < run.end) {
            if other.start > at {
                left.push(at..other.start);
            }
            at = at.max(other.end);
            if other.end > run.end {
                // It may reach into the next run.
                break;
            }
            others.next();
        }
        if at < run.end {
            left.push(at..run.end);
        }
    }
    left
}

/// What is in `runs` and in `others`.
pub(super) fn intersection(runs: &[Range<u64>], others: &[Range<u64>]) -> Vec<Range<u64>> {
    let mut both = Vec::new();
    let (mut one, mut other) = (0, 0);
    while let (Some(run), Some(next)) = (runs.get(one), others.get(other)) {
        let (start, end) = (run.start.max(next.start), run.end.min(next.end));
        if start < end {
            both.push(start..end);
        }
        if run.end <= next.end {
            one += 1;
        } else {
            other += 1;
        }
    }
    both
}

/// What is in `runs` within `range`.
pub(super) fn within<'a>(
    runs: &'a [Range<u64>],
    range: &Range<u64>,
) -> impl Iterator<Item = Range<u64>> + use<'a> {
    let range = range.clone();
    let first = runs.partition_point(|run| run.end <= range.start);
    let clipped = runs[first..]
        .iter()
        .map(move |run| run.start.max(range.start)..run.end.min(range.end));
    clipped.take_while(|run| run.start < run.end)
}

/// Grows a range outwards to multiples of `alignment`, on a disk of `size` bytes.
pub(super) fn align_out(range: &Range<u64>, alignment: u64, size: u64) -> Range<u64> {
    let end = range.end.checked_next_multiple_of(alignment);
    range.start / alignment * alignment..end.unwrap_or(size).min(size)
}

/// Shrinks a range to multiples of `alignment`; the end of the disk is one. May be empty.
pub(super) fn align_in(range: &Range<u64>, alignment: u64, size: u64) -> Range<u64> {
    let start = range.start.checked_next_multiple_of(alignment);
    let end = if range.end == size {
        size
    } else {
        range.end / alignment * alignment
    };
    start.unwrap_or(end).min(end)..end
}

/// As they stand in JSON: pairs of start and length.
pub(super) mod pairs {
    use std::ops::Range;

    use serde::de::Error;
    use serde::{Deserializer, Serializer};

    use crate::archive::bounded;

    pub(in crate::archive) fn serialize<S: Serializer>(
        runs: &[Range<u64>],
        serializer: S,
    ) -> Result<S::Ok, S::Error> {
        serializer.collect_seq(runs.iter().map(|run| [run.start, run.end - run.start]))
    }

    pub(in crate::archive) fn deserialize<'de, D: Deserializer<'de>>(
        deserializer: D,
    ) -> Result<Vec<Range<u64>>, D::Error> {
        bounded::list(
            deserializer,
            super::RUNS_MAX,
            |[start, length]: [u64; 2]| {
                let end = start.checked_add(length);
                end.map(|end| start..end)
                    .ok_or_else(|| D::Error::custom("a run beyond all numbers"))
            },
        )
    }
}

/// Of data, or of zeroes, of one disk in one point: 32 MiB of manifest. What is more fragmented is
/// copied with some of what lies between.
pub(super) const RUNS_MAX: usize = 1 << 20;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sets_of_bytes_are_what_a_list_of_bytes_says() {
        // Every set of eight bytes, against every other.
        let runs_of = |set: u32| union((0..8).filter(|at| set >> at & 1 == 1).map(|at| at..at + 1));
        let set_of = |runs: &[Range<u64>]| {
            runs.iter()
                .cloned()
                .flatten()
                .fold(0, |set, at| set | 1u32 << at)
        };
        for one in 0..256 {
            let runs = runs_of(one);
            assert!(are_runs(&runs, 8), "{runs:?}");
            assert_eq!(set_of(&runs), one);
            assert_eq!(bytes(&runs), u64::from(one.count_ones()));
            for other in 0..256 {
                let others = runs_of(other);
                let left = difference(&runs, &others);
                assert!(are_runs(&left, 8), "{left:?}");
                assert_eq!(set_of(&left), one & !other, "{runs:?} without {others:?}");
                let both = intersection(&runs, &others);
                assert!(are_runs(&both, 8), "{both:?}");
                assert_eq!(set_of(&both), one & other, "{runs:?} and {others:?}");
            }
            for (start, end) in [(0, 8), (2, 5), (3, 3), (7, 8)] {
                let clipped: Vec<_> = within(&runs, &(start..end)).collect();
                let mask = (1 << end) - (1 << start);
                assert_eq!(set_of(&clipped), one & mask, "{runs:?} in {start}..{end}");
            }
        }
    }

    #[test]
    fn the_end_of_a_disk_is_aligned() {
        assert_eq!(align_out(&(5..9), 4, 10), 4..10);
        assert_eq!(align_out(&(5..7), 4, 10), 4..8);
        assert_eq!(align_in(&(5..10), 4, 10), 8..10);
        assert_eq!(align_in(&(5..9), 4, 10), 8..8);
        assert!(align_in(&(5..7), 4, 10).is_empty());
    }

    #[test]
    fn what_is_no_run_is_told() {
        for wrong in [
            vec![0..0],
            vec![Range { start: 4, end: 2 }],
            vec![0..9],
            vec![2..4, 0..1],
            vec![0..3, 2..4],
        ] {
            assert!(!are_runs(&wrong, 8), "{wrong:?}");
        }
        assert!(are_runs(&[0..2, 2..8], 8));
    }
}
