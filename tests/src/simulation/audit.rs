use std::ops::Range;

use bitmap::Era;
use scratch::Snapshot;

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
    let explained = stage
        .sim
        .failed(|fault| kept.may_break_by(fault, stage.guests));
    assert!(explained, "{title} broke for no reason: {reason}");
    let recorded = kept.states.byte(0) != 0 || kept.states.byte(1) != 0;
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
    for granule in 0..kept.frozen.size().div_ceil(GRANULE) {
        let range = granule_range(granule, kept.frozen.size());
        let bytes = range.start as usize..range.end as usize;
        let kind = kept
            .states
            .byte(Snapshot::<SimWorld>::RECORD_BYTES + granule);
        let right = match kind {
            0 => today.bytes[bytes.clone()] == then[bytes.clone()],
            1 => scratch.bytes[bytes.clone()] == then[bytes.clone()],
            _ => then[bytes.clone()].iter().all(|byte| *byte == 0),
        };
        let title = kept.title(stage.sim.seed);
        assert!(
            right,
            "{title}: a kill would lose granule {granule}, whose state is {kind}"
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
    for kept in stage.open() {
        // After a break that could not be recorded the write failed, and the next one copies again.
        let again = stage
            .sim
            .failed(|fault| fault.place == Place::Record(kept.index));
        if again || kept.snapshot().broken().is_some() {
            continue;
        }
        let states = Snapshot::<SimWorld>::RECORD_BYTES;
        let granules = 0..kept.frozen.size().div_ceil(GRANULE);
        let in_scratch = granules.filter(|granule| kept.states.byte(states + granule) == 1);
        assert_eq!(
            kept.snapshot().scratch_used(),
            in_scratch.count() as u64 * GRANULE,
            "{}: old bytes were not stored once each",
            kept.title(stage.sim.seed),
        );
    }
}

pub(super) fn granule_range(granule: u64, size: u64) -> Range<u64> {
    granule * GRANULE..((granule + 1) * GRANULE).min(size)
}

fn chunk_range(subject: &Subject, chunk: usize) -> Range<usize> {
    let chunk_bytes = subject.chunk as usize;
    chunk * chunk_bytes..((chunk + 1) * chunk_bytes).min(subject.size as usize)
}
