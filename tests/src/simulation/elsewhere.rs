//! Disks on another machine, which may perform at any time what was given up.

use std::ops::Range;
use std::rc::Rc;

use block::Storage as _;
use scratch::{Kept as State, Snapshot};

use super::GRANULE;
use super::audit::granule_range;
use super::executor::pause;
use super::stage::{Stage, Subject};
use super::storage::{Contents, SimStorage};
use super::world::SimWorld;

/// Performs what was given up or has been performed already, now and then.
pub(super) async fn lands(stage: Rc<Stage>) {
    for _ in 0..stage.sim.below(400) {
        pause(&stage.sim).await;
        let subject = &stage.disks[stage.sim.below(stage.disks.len() as u64) as usize];
        // No disk is compared with itself meanwhile.
        let is_time = stage.sim.one_in(4) && !stage.capture.borrow().is_taking();
        if is_time && subject.image.land() {
            stage.count(|tally| tally.landings += 1);
        }
    }
}

/// What of a disk may change by itself when an instant has just been taken: in the era that began
/// then, that it is marked is no surprise.
pub(super) fn may_change(subject: &Subject, era: u32) -> Vec<Range<u64>> {
    let unsettled = subject.image.unsettled();
    let marked = unsettled.iter().map(|range| (range.clone(), era..era + 1));
    subject.failed.borrow_mut().extend(marked);
    unsettled
}

/// What is kept of what may change by itself is what was there at the instant, be it that it landed
/// before or after: nobody has read it yet. In the copy of the instant it becomes so.
pub(super) fn settle_copy(
    (stage, subject): (&Stage, &Subject),
    copy: &mut Contents,
    (snapshot, scratch): (&Snapshot<SimWorld>, &SimStorage),
    unsettled: &[Range<u64>],
) {
    let seed = stage.sim.seed;
    let touched = |range: &Range<u64>| range.start / GRANULE..range.end.div_ceil(GRANULE);
    for granule in unsettled.iter().flat_map(touched) {
        if snapshot.is_over() {
            return;
        }
        let range = granule_range(granule, subject.size);
        let place = range.start as usize..range.end as usize;
        let kept = snapshot.kept(granule);
        let bytes = match kept {
            State::Not => panic!(
                "seed {seed}, disk {}: granule {granule} may change by itself, and is not kept",
                subject.index
            ),
            State::Data => scratch.contents().bytes[place.clone()].to_vec(),
            State::Zero | State::Hole => vec![0; place.len()],
        };
        let both = bytes.iter().zip(&copy.bytes[place]);
        for (at, (byte, then)) in (range.start..).zip(both) {
            assert!(
                byte == then || subject.image.may_have_landed(at, *byte),
                "seed {seed}, disk {}: what is kept at {at} was never there",
                subject.index
            );
        }
        copy.take(&range, &bytes, kept == State::Hole);
    }
}
