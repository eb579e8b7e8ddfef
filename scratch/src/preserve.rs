use std::io;
use std::ops::Range;
use std::sync::Arc;

use block::{Storage, is_zero};
use bytes::{Bytes, BytesMut};

use crate::ahead::ahead;
use crate::allocation::allocation;
use crate::claims::Claims;
use crate::granules::{GRANULE, bytes, granules};
use crate::preserved::Kept;
use crate::snapshot::Snapshot;
use crate::sync::{Ordering, fence};
use crate::world::{Pace, Step, World};

/// Returns once a write to `range` can no longer be seen by anyone who reads one of `snapshots`.
///
/// What a snapshot cannot keep breaks it, and the others are not touched by that; or, on
/// [other terms](crate::OnError), fails the write. An error means that the write must not be issued:
/// on those terms, or because a break could not be recorded.
pub async fn preserve<W: World>(
    range: &Range<u64>,
    image: &W::Image,
    snapshots: &[Arc<Snapshot<W>>],
    claims: &Claims,
    pace: &W::Pace,
) -> io::Result<()> {
    let wanted = granules(range);
    if !lacking(snapshots, &wanted) {
        // Whoever sees the guest's write sees the bits too, although another writer has set them.
        fence(Ordering::Release);
        return Ok(());
    }
    let more = ahead(snapshots, &wanted);
    // Only writers meet here: whoever comes second finds the bits set and has nothing to copy.
    let _alone = claims.claim(more.clone().unwrap_or(wanted.clone())).await;
    in_order(snapshots, &wanted).for_each(|snapshot| snapshot.count_copying_write());
    if let Some(hull) = more.and_then(|more| hull(&lacking_runs(snapshots, &more))) {
        // If that fails, what is wanted of it is tried again, and decides.
        pace.step(Step::CopyAhead).await;
        let no_more = |snapshot: &Snapshot<W>, _: &str, _: &io::Error| {
            snapshot.failed_ahead();
            Err(io::ErrorKind::Other.into())
        };
        let _ = copy(&hull, image, snapshots, pace, no_more).await;
    }
    let give_way =
        |snapshot: &Snapshot<W>, what: &str, error: &io::Error| snapshot.cannot_keep(what, error);
    for run in lacking_runs(snapshots, &wanted) {
        pace.step(Step::Copy).await;
        copy(&run, image, snapshots, pace, give_way).await?;
    }
    // What was copied is stored before the guest's write: that is what a reader relies on.
    fence(Ordering::Release);
    Ok(())
}

/// Copies what each snapshot lacks of `run`, which the caller has claimed. `failed` says what comes of
/// it if one cannot keep its part.
async fn copy<W: World>(
    run: &Range<u64>,
    image: &W::Image,
    snapshots: &[Arc<Snapshot<W>>],
    pace: &W::Pace,
    failed: impl Fn(&Snapshot<W>, &str, &io::Error) -> io::Result<()>,
) -> io::Result<()> {
    let range = bytes(run, image.size());
    let old = match read_old(image, &range).await {
        Ok(old) => old,
        Err(error) => {
            let mut lacking = in_order(snapshots, run);
            return lacking.try_for_each(|s| failed(s, "old contents cannot be read", &error));
        }
    };
    for snapshot in in_order(snapshots, run) {
        if let Err(error) = keep(snapshot, run, &old, pace).await {
            failed(snapshot, "scratch", &error)?;
        }
    }
    pace.step(Step::Release).await;
    Ok(())
}

/// The old contents of a stretch of granules.
struct Old {
    data: Bytes,
    /// Granule by granule, from the first: what its contents are.
    kept: Vec<Kept>,
}

async fn read_old<S: Storage>(image: &S, range: &Range<u64>) -> io::Result<Old> {
    let mut data = BytesMut::zeroed((range.end - range.start) as usize);
    image.read(range.start, &mut data).await?;
    let data = data.freeze();
    let mut kept: Vec<Kept> = data.chunks(GRANULE as usize).map(kind_of).collect();
    if kept.contains(&Kept::Zero) {
        find_holes(image, range, &mut kept).await?;
    }
    Ok(Old { data, kept })
}

fn kind_of(granule: &[u8]) -> Kept {
    if is_zero(granule) {
        Kept::Zero
    } else {
        Kept::Data
    }
}

/// Tells holes from zeroes that were written: who reads the past is told of the former only.
async fn find_holes<S: Storage>(
    image: &S,
    range: &Range<u64>,
    kept: &mut [Kept],
) -> io::Result<()> {
    let mut at = range.start;
    while at < range.end {
        for extent in allocation(image, at..range.end).await? {
            at = extent.range.end;
            let first = ((extent.range.start - range.start) / GRANULE) as usize;
            let end = (extent.range.end - range.start).div_ceil(GRANULE) as usize;
            let zeroes = kept[first..end]
                .iter_mut()
                .filter(|state| **state == Kept::Zero);
            zeroes
                .filter(|_| extent.hole)
                .for_each(|state| *state = Kept::Hole);
        }
    }
    Ok(())
}

/// Keeps, for one snapshot, what it lacks of `run`.
async fn keep<W: World>(
    snapshot: &Snapshot<W>,
    run: &Range<u64>,
    old: &Old,
    pace: &W::Pace,
) -> io::Result<()> {
    let Some(_keeping) = snapshot.enter() else {
        // Broken or ended meanwhile, it needs nothing any more.
        return Ok(());
    };
    let missing: Vec<Range<u64>> = snapshot
        .preserved
        .runs(run.clone())
        .filter(|part| part.kept == Kept::Not)
        .map(|part| part.granules)
        .collect();
    let Some(hull) = hull(&missing) else {
        return Ok(());
    };
    let in_scratch: Vec<Range<u64>> = missing
        .into_iter()
        .flat_map(|part| data(part, run.start, &old.kept))
        .collect();
    let count: u64 = in_scratch.iter().map(|part| part.end - part.start).sum();
    // What takes no room is kept also where there is none.
    let taken = (count > 0).then(|| snapshot.allowance().take(count * GRANULE));
    let taken = taken.transpose()?;
    for part in &in_scratch {
        let range = bytes(part, snapshot.size());
        let from = (range.start - run.start * GRANULE) as usize;
        let length = (range.end - range.start) as usize;
        let data = old.data.slice(from..from + length);
        snapshot.scratch.write(range.start, &data).await?;
    }
    pace.step(Step::Keep).await;
    let from = (hull.start - run.start) as usize;
    snapshot.preserved.keep(hull, &old.kept[from..])?;
    if let Some(taken) = taken {
        taken.stored();
        snapshot.count_scratch(count);
    }
    Ok(())
}

/// The parts of `granules` whose old contents, listed in `kept` from granule `first` on, go to
/// scratch.
fn data(granules: Range<u64>, first: u64, kept: &[Kept]) -> impl Iterator<Item = Range<u64>> {
    let mut at = granules.start;
    let is_data = move |granule: u64| kept.get((granule - first) as usize) == Some(&Kept::Data);
    std::iter::from_fn(move || {
        let start = (at..granules.end).find(|granule| is_data(*granule))?;
        at = (start..granules.end)
            .find(|granule| !is_data(*granule))
            .unwrap_or(granules.end);
        Some(start..at)
    })
}

/// From the first to the last of `runs`.
fn hull(runs: &[Range<u64>]) -> Option<Range<u64>> {
    Some(runs.first()?.start..runs.last()?.end)
}

pub(crate) fn lacks<W: World>(snapshot: &Snapshot<W>, granules: &Range<u64>) -> bool {
    !snapshot.is_over() && !snapshot.preserved.covers(granules)
}

fn lacking<W: World>(snapshots: &[Arc<Snapshot<W>>], granules: &Range<u64>) -> bool {
    snapshots.iter().any(|snapshot| lacks(snapshot, granules))
}

/// The stretches of `granules` that some snapshot lacks.
fn lacking_runs<W: World>(
    snapshots: &[Arc<Snapshot<W>>],
    granules: &Range<u64>,
) -> Vec<Range<u64>> {
    let mut runs: Vec<Range<u64>> = Vec::new();
    for granule in granules.clone() {
        if !lacking(snapshots, &(granule..granule + 1)) {
            continue;
        }
        match runs.last_mut() {
            Some(run) if run.end == granule => run.end += 1,
            _ => runs.push(granule..granule + 1),
        }
    }
    runs
}

/// Those that lack something of `run`, first those for which the write rather fails: a write that is
/// not issued breaks nobody.
fn in_order<'a, W: World>(
    snapshots: &'a [Arc<Snapshot<W>>],
    run: &Range<u64>,
) -> impl Iterator<Item = &'a Arc<Snapshot<W>>> {
    let lacking = move |first: bool| {
        let run = run.clone();
        snapshots
            .iter()
            .filter(move |s| s.comes_first() == first && lacks(s, &run))
    };
    lacking(true).chain(lacking(false))
}

#[cfg(all(test, feature = "loom"))]
#[path = "preserve/loom.rs"]
mod loom_tests;
