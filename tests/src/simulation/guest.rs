use std::io;
use std::rc::Rc;

use block::Zeroing;
use bytes::Bytes;
use scratch::OnError;

use super::GRANULE;
use super::executor::pause;
use super::history::contents_of;
use super::sim::Place;
use super::stage::{Stage, Subject};

/// Writes, zeroes, trims and flushes, and checks what it is told.
pub(super) async fn guest(stage: Rc<Stage>) {
    for _ in 0..5 + stage.sim.below(20) {
        let subject = &stage.disks[stage.sim.below(stage.disks.len() as u64) as usize];
        if stage.sim.one_in(12) {
            flush(&stage, subject).await;
        } else {
            change(&stage, subject).await;
        }
        if stage.sim.one_in(4) {
            pause(&stage.sim).await;
        }
    }
}

async fn change(stage: &Stage, subject: &Subject) {
    let sim = &stage.sim;
    let length_max = sim.one_of(&[GRANULE, 3 * GRANULE, 12 * GRANULE]);
    let range = stage.stretch(subject.size, length_max);
    let zeroing = sim.one_in(3).then(|| sim.one_of(&ZEROINGS));
    let issued = sim.tick();
    let number = stage.operation(subject.index, range.clone(), zeroing.is_some(), issued);
    let first_era = subject.image.contents().era;

    let result = if let Some(how) = zeroing {
        subject.disk.zero(range.clone(), how).await
    } else {
        let data = Bytes::from(contents_of(number, &range, false));
        subject.disk.write(range.start, data).await
    };

    stage.operations.borrow_mut()[number].completed = Some(sim.tick());
    stage.operations.borrow_mut()[number].succeeded = result.is_ok();
    stage.count(|tally| tally.operations += 1);
    if result.is_err() {
        stage.count(|tally| tally.failed_operations += 1);
        let eras = first_era..subject.image.contents().era + 1;
        subject.failed.borrow_mut().push((range.clone(), eras));
    }
    check_outcome(stage, issued, zeroing, &result);
    let wrote = |place| matches!(place, Place::ImageWrite(_));
    if result.is_err() && zeroing.is_none() && !sim.failed_here(issued, wrote) {
        let bytes = &subject.image.contents().bytes[range.start as usize..range.end as usize];
        let ours = contents_of(number, &range, false);
        assert!(
            !bytes
                .chunks_exact(4)
                .zip(ours.chunks_exact(4))
                .any(|(a, b)| a == b),
            "seed {}: something is written of a write that was refused",
            sim.seed
        );
    }
}

/// A guest is told of the faults of its own disk and map; of those of a snapshot only if that could
/// not even be given up, or if the write is to give way.
fn check_outcome(stage: &Stage, issued: u64, zeroing: Option<Zeroing>, result: &io::Result<()>) {
    let concerns = |place| {
        matches!(
            place,
            Place::ImageWrite(_) | Place::Map(_) | Place::Record(_)
        )
    };
    let expected = stage.sim.failed_here(issued, concerns);
    let seed = stage.sim.seed;
    match result {
        Ok(()) => assert!(!expected, "seed {seed}: a guest was not told of a fault"),
        Err(error) if error.kind() == io::ErrorKind::Unsupported => {
            assert!(
                zeroing.is_some_and(Zeroing::fast),
                "seed {seed}: unsupported"
            );
        }
        Err(error) => {
            let gives_way = stage.on_error == OnError::FailGuestWrite;
            let kept = |place| {
                matches!(
                    place,
                    Place::ImageRead(_)
                        | Place::ScratchWrite(_)
                        | Place::States(_)
                        | Place::Second(_)
                        | Place::Aside(_)
                )
            };
            let full = stage.limits_scratch && error.kind() == io::ErrorKind::StorageFull;
            let refused = gives_way && (full || stage.sim.failed_here(issued, kept));
            stage.count(|tally| tally.refused += u64::from(refused));
            assert!(
                expected || refused,
                "seed {seed}: a guest's write failed for no reason: {error}"
            );
        }
    }
}

async fn flush(stage: &Stage, subject: &Subject) {
    let seed = stage.sim.seed;
    let called = stage.sim.tick();
    let result = subject.disk.flush().await;
    stage.count(|tally| tally.flushes += 1);
    let syncs = &subject.image.contents().syncs;
    let first_failure = syncs
        .iter()
        .find(|(_, succeeded)| !succeeded)
        .map(|(at, _)| *at);
    if result.is_ok() {
        // One that took effect after a failure proves nothing.
        let good = |at: u64| at > called && first_failure.is_none_or(|failure| at < failure);
        let proven = syncs.iter().any(|(at, succeeded)| *succeeded && good(*at));
        assert!(proven, "seed {seed}: a flush succeeded that proves nothing");
        return;
    }
    assert!(
        first_failure.is_some() || subject.image.contents().unreachable > 0,
        "seed {seed}: a flush failed for no reason"
    );
    check_given_up(stage, subject);
}

/// Nothing can be relied on that is kept of a disk of which a sync has failed.
pub(super) fn check_given_up(stage: &Stage, subject: &Subject) {
    if !subject.disk.sync_failed() {
        return;
    }
    for kept in stage
        .open()
        .iter()
        .filter(|kept| kept.disk == subject.index)
    {
        let whole = kept.snapshot().broken().is_none();
        assert!(
            !whole,
            "{}: a sync failed, and it is still offered",
            kept.title(stage.sim.seed)
        );
    }
}

const ZEROINGS: [Zeroing; 4] = [
    Zeroing::MayUnmap,
    Zeroing::Keep,
    Zeroing::FastMayUnmap,
    Zeroing::FastKeep,
];
