use std::ops::Range;

use std::sync::Arc;

use bitmap::Era;
use block::Storage as _;
use scratch::{Kept as State, OnError, Snapshot, SnapshotFiles, Terms};

use super::GRANULE;
use super::sim::Place;
use super::stage::{Kept, Stage, Subject};
use super::world::SimWorld;

/// Checks, between any two steps, what holds at every moment.
pub(super) fn audit(stage: &Stage) {
    stage.count(|tally| tally.audits += 1);
    for subject in &stage.disks {
        live_map_covers_the_truth(stage, subject);
    }
    for kept in stage.open() {
        breaks_have_a_reason_and_a_record(stage, &kept);
        if kept.snapshot().broken().is_none() {
            killed_now_the_instant_is_whole(stage, &kept);
            killed_now_the_frozen_map_is_right(stage, &kept);
        }
    }
}

fn live_map_covers_the_truth(stage: &Stage, subject: &Subject) {
    let seed = stage.sim.seed;
    let now = subject.image.contents();
    let mut under_way = vec![false; subject.size.div_ceil(subject.chunk) as usize];
    for operation in &*stage.operations.borrow() {
        if operation.disk == subject.index && operation.completed.is_none() {
            under_way[subject.chunks(&operation.range)].fill(true);
        }
    }
    for instant in &*subject.instants.borrow() {
        let since = instant.era;
        let changed = subject.changed(&(since..u32::MAX));
        let whole = 0..subject.size;
        for run in subject.disk.map().changes(whole, Era::from_number(since)) {
            for chunk in subject.chunks(&run.range) {
                let range = chunk_range(subject, chunk);
                let differs = now.bytes[range.clone()] != instant.copy.bytes[range];
                let stored = subject.map.number(chunk as u64) >= since;
                let must = differs || changed.surely[chunk];
                assert!(
                    !must || run.dirty && stored,
                    "seed {seed}, disk {}: chunk {chunk} changed since era {since} and is clean",
                    subject.index,
                );
                let may = must || changed.perhaps[chunk] || under_way[chunk];
                assert!(
                    may || !run.dirty,
                    "seed {seed}, disk {}: chunk {chunk} is dirty since era {since} for no reason",
                    subject.index,
                );
            }
        }
    }
}

fn breaks_have_a_reason_and_a_record(stage: &Stage, kept: &Kept) {
    let Some(reason) = kept.snapshot().broken() else {
        return;
    };
    let title = kept.title(stage.sim.seed);
    let gives_way = stage.on_error == OnError::BreakBackup;
    // The steward comes behind the guests, and writes, as it were, what changes by itself.
    let writers = stage.guests + usize::from(stage.disks[kept.disk].image.is_elsewhere());
    let failed = stage.sim.failed(|fault| match fault.place {
        // This is not for the sake of a guest's write.
        Place::ImageSync(disk) => disk == kept.disk,
        _ => gives_way && kept.may_break_by(fault, writers),
    });
    let full = gives_way && stage.limits_scratch && reason.contains("scratch limit");
    assert!(failed || full, "{title} broke for no reason: {reason}");
    let recorded = Snapshot::<SimWorld>::recorded_break(&kept.states);
    let recorded = recorded.is_ok_and(|reason| reason.is_some());
    // After a sync that failed nothing kept is relied on, record or not.
    let sync_failed = stage.disks[kept.disk].disk.sync_failed();
    assert!(
        recorded || sync_failed,
        "{title} is broken and a kill would forget it"
    );
}

/// Reads the instant from what a process that is killed now would leave.
fn killed_now_the_instant_is_whole(stage: &Stage, kept: &Kept) {
    let then = &kept.instant.copy.bytes;
    let today = stage.disks[kept.disk].image.contents();
    let scratch = kept.scratch.contents();
    let title = kept.title(stage.sim.seed);
    let files = SnapshotFiles {
        scratch: kept.scratch.clone(),
        states: kept.states.left_by_a_kill(),
        second: kept.second.left_by_a_kill(),
        eras: kept.aside.left_by_a_kill(),
    };
    let live = Arc::clone(stage.disks[kept.disk].disk.map());
    let era = Era::from_number(kept.instant.era);
    let left = Snapshot::<SimWorld>::reopen(live, era, files, Terms::endless());
    let left = left.unwrap_or_else(|error| panic!("{title}: a kill is taken for damage: {error}"));
    for granule in 0..kept.frozen.size().div_ceil(GRANULE) {
        let range = granule_range(granule, kept.frozen.size());
        let bytes = range.start as usize..range.end as usize;
        let found = left.kept(granule);
        let right = match found {
            State::Not => today.bytes[bytes.clone()] == then[bytes.clone()],
            State::Data => scratch.bytes[bytes.clone()] == then[bytes.clone()],
            State::Zero | State::Hole => then[bytes.clone()].iter().all(|byte| *byte == 0),
        };
        assert!(
            right,
            "{title}: a kill would lose granule {granule}, which is kept as {found:?}"
        );
    }
}

fn killed_now_the_frozen_map_is_right(stage: &Stage, kept: &Kept) {
    let subject = &stage.disks[kept.disk];
    let frozen_in = kept.instant.era;
    for since in subject.bases(frozen_in) {
        let changed = subject.changed(&(since..frozen_in));
        for (chunk, surely) in changed.surely.iter().enumerate() {
            let live = subject.map.number(chunk as u64);
            let aside = kept.aside.number(chunk as u64);
            let dirty = if live < frozen_in {
                live >= since
            } else {
                aside >= since || aside == 0
            };
            assert!(
                dirty == *surely || changed.perhaps[chunk],
                "{}: after a kill chunk {chunk} would be dirty since {since}: {dirty}",
                kept.title(stage.sim.seed),
            );
        }
    }
}

/// Checks, when all is quiet, that old bytes were copied by one writer only.
pub(super) fn kept_once(stage: &Stage) {
    let mut used = 0;
    for kept in &*stage.snapshots.borrow() {
        used += kept.snapshot().scratch_used();
        if kept.snapshot().is_over() {
            continue;
        }
        let granules = 0..kept.frozen.size().div_ceil(GRANULE);
        let in_scratch = granules.filter(|g| kept.snapshot().kept(*g) == State::Data);
        assert_eq!(
            kept.snapshot().scratch_used(),
            in_scratch.count() as u64 * GRANULE,
            "{}: old bytes were not stored once each",
            kept.title(stage.sim.seed),
        );
    }
    let seed = stage.sim.seed;
    assert_eq!(stage.scratch.used(), used, "seed {seed}: scratch in use");
}

pub(super) fn granule_range(granule: u64, size: u64) -> Range<u64> {
    granule * GRANULE..((granule + 1) * GRANULE).min(size)
}

fn chunk_range(subject: &Subject, chunk: usize) -> Range<usize> {
    let chunk_bytes = subject.chunk as usize;
    chunk * chunk_bytes..((chunk + 1) * chunk_bytes).min(subject.size as usize)
}
