use std::io;
use std::ops::Range;

use block::{Extent, Storage};

use crate::granules::GRANULE;

/// What of `range` takes space, granule by granule, from its start on: at least one granule.
///
/// A granule is a hole only if all of it is. File systems may know smaller blocks; a snapshot keeps
/// whole granules, and its answer must be the same before and after.
///
/// `range` begins at a granule, and ends at one or with the disk.
pub(crate) async fn allocation<S: Storage>(
    image: &S,
    range: Range<u64>,
) -> io::Result<Vec<Extent>> {
    let mut known = image.extents(range.clone()).await?;
    loop {
        let end = known.last().map_or(range.start, |extent| extent.range.end);
        // The last granule can be judged only when all of it is known.
        if end >= range.end || (end > range.start && end.is_multiple_of(GRANULE)) {
            return Ok(by_granule(known, range.end));
        }
        known.extend(image.extents(end..range.end).await?);
    }
}

fn by_granule(known: Vec<Extent>, range_end: u64) -> Vec<Extent> {
    let mut extents = Vec::with_capacity(known.len());
    for extent in merged(known) {
        let Range { start, end } = extent.range;
        let whole = if end == range_end {
            end
        } else {
            end / GRANULE * GRANULE
        };
        let hole = start.next_multiple_of(GRANULE)..whole;
        if extent.hole && !hole.is_empty() {
            extents.push(Extent {
                range: start..hole.start,
                hole: false,
            });
            extents.push(Extent {
                range: hole.clone(),
                hole: true,
            });
            extents.push(Extent {
                range: hole.end..end,
                hole: false,
            });
        } else {
            extents.push(Extent {
                range: start..end,
                hole: false,
            });
        }
    }
    merged(extents)
}

fn merged(extents: Vec<Extent>) -> Vec<Extent> {
    let mut merged: Vec<Extent> = Vec::with_capacity(extents.len());
    for extent in extents
        .into_iter()
        .filter(|extent| !extent.range.is_empty())
    {
        match merged.last_mut() {
            Some(last) if last.hole == extent.hole => last.range.end = extent.range.end,
            _ => merged.push(extent),
        }
    }
    merged
}

#[cfg(test)]
mod tests {
    use super::*;

    fn extents(parts: &[(u64, bool)]) -> Vec<Extent> {
        let mut at = 0;
        let next = |&(end, hole): &(u64, bool)| {
            let range = at..end;
            at = end;
            Extent { range, hole }
        };
        parts.iter().map(next).collect()
    }

    #[test]
    fn a_granule_that_is_a_hole_in_part_is_none() {
        let found = by_granule(
            extents(&[(1024, false), (9216, true), (12_288, false)]),
            12_288,
        );
        assert_eq!(
            found,
            extents(&[(4096, false), (8192, true), (12_288, false)])
        );
    }

    #[test]
    fn a_hole_told_in_two_parts_is_one() {
        let found = by_granule(extents(&[(1024, true), (4096, true)]), 8192);
        assert_eq!(found, extents(&[(4096, true)]));
    }

    #[test]
    fn the_last_granule_ends_with_the_disk() {
        let found = by_granule(extents(&[(4096, false), (8704, true)]), 8704);
        assert_eq!(found, extents(&[(4096, false), (8704, true)]));
    }
}
