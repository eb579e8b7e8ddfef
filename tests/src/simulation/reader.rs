use std::ops::Range;
use std::rc::Rc;

use bitmap::{Era, Run};
use block::Extent;
use scratch::FrozenError;

use super::executor::pause;
use super::sim::Place;
use super::stage::{Kept, Stage};
use super::{GRANULE, audit};

/// Reads what is frozen while others change the disk, and compares it with the copy.
pub(super) async fn reader(stage: Rc<Stage>) {
    for _ in 0..10 + stage.sim.below(40) {
        pause(&stage.sim).await;
        let open = stage.open();
        if open.is_empty() {
            continue;
        }
        let kept = stage.sim.one_of(&open);
        let range = stage.stretch(stage.disks[kept.disk].size, 12 * GRANULE);
        match stage.sim.below(3) {
            0 => read_bytes(&stage, &kept, range).await,
            1 => drop(read_extents(&stage, &kept, range).await),
            _ => read_changes(&stage, &kept, &range),
        }
    }
}

/// Reads all that is still kept.
pub(super) async fn read_everything(stage: Rc<Stage>) {
    for kept in stage.open() {
        let whole = 0..stage.disks[kept.disk].size;
        read_bytes(&stage, &kept, whole.clone()).await;
        let mut at = 0;
        while at < whole.end {
            let told = read_extents(&stage, &kept, at..whole.end).await;
            at = told.unwrap_or(whole.end);
        }
        read_changes(&stage, &kept, &whole);
    }
}

async fn read_bytes(stage: &Stage, kept: &Kept, range: Range<u64>) {
    let call = Call::begin(stage, kept);
    let mut buffer = vec![0xee; (range.end - range.start) as usize];
    let result = kept.frozen.read(range.start, &mut buffer).await;
    if call.holds(result).is_some() {
        let then = &kept.instant.copy.bytes[range.start as usize..range.end as usize];
        assert!(
            buffer == then,
            "{}: bytes of {range:?} are not those of then",
            call.title()
        );
    }
}

/// Returns up to where it was told.
async fn read_extents(stage: &Stage, kept: &Kept, range: Range<u64>) -> Option<u64> {
    let call = Call::begin(stage, kept);
    let result = kept.frozen.extents(range.clone(), usize::MAX).await;
    let extents = call.holds(result)?;
    let title = call.title();
    let mut at = range.start;
    for Extent { range: told, hole } in extents {
        assert!(
            told.start == at && told.end > at,
            "{title}: extents are not adjacent"
        );
        at = told.end;
        for granule in told.start / GRANULE..told.end.div_ceil(GRANULE) {
            let size = kept.frozen.size();
            let was = kept
                .instant
                .copy
                .is_hole(&audit::granule_range(granule, size));
            assert_eq!(hole, was, "{title}: whether granule {granule} is a hole");
        }
    }
    assert!(
        at > range.start && at <= range.end,
        "{title}: extents of {range:?} end at {at}"
    );
    Some(at)
}

fn read_changes(stage: &Stage, kept: &Kept, range: &Range<u64>) {
    let subject = &stage.disks[kept.disk];
    for since in subject.bases(kept.instant.era) {
        let call = Call::begin(stage, kept);
        let result = kept
            .frozen
            .changes(range.clone(), Era::from_number(since), usize::MAX);
        let Some(runs) = call.holds(result) else {
            return;
        };
        let title = call.title();
        let changed = subject.changed(&(since..kept.instant.era));
        let mut at = range.start;
        for Run { range: told, dirty } in runs {
            assert!(
                told.start == at && told.end > at,
                "{title}: runs are not adjacent"
            );
            at = told.end;
            for chunk in subject.chunks(&told) {
                let right = dirty == changed.surely[chunk] || changed.perhaps[chunk];
                assert!(
                    right,
                    "{title}: chunk {chunk} is dirty since {since}: {dirty}"
                );
            }
        }
        assert_eq!(at, range.end, "{title}: runs of {range:?}");
    }
}

/// A question about a snapshot, from its beginning on.
struct Call<'a> {
    stage: &'a Stage,
    kept: &'a Kept,
    begun: u64,
    was_broken: bool,
}

impl<'a> Call<'a> {
    fn begin(stage: &'a Stage, kept: &'a Kept) -> Self {
        stage.count(|tally| tally.reads += 1);
        Self {
            stage,
            kept,
            begun: stage.sim.tick(),
            was_broken: kept.snapshot().broken().is_some(),
        }
    }

    /// The answer, if there is one that must be right.
    fn holds<T>(&self, answer: Result<T, FrozenError>) -> Option<T> {
        let title = self.title();
        let ended = self.kept.ended.get();
        let broken = self.kept.snapshot().broken().is_some();
        match answer {
            Ok(answer) => {
                assert!(!broken && !ended, "{title}: an answer from what is over");
                Some(answer)
            }
            Err(FrozenError::Broken(reason)) => {
                assert!(broken, "{title}: called broken and is not: {reason}");
                None
            }
            Err(FrozenError::Ended) => {
                assert!(ended, "{title}: called ended and is not");
                None
            }
            Err(FrozenError::Io(error)) => {
                let reads = |place| matches!(place, Place::ImageRead(_) | Place::ScratchRead(_));
                let explained = self.stage.sim.failed_here(self.begun, reads);
                assert!(explained && !self.was_broken, "{title}: {error}");
                None
            }
        }
    }

    fn title(&self) -> String {
        self.kept.title(self.stage.sim.seed)
    }
}
