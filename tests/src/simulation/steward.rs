use std::cell::Cell;
use std::io;
use std::rc::Rc;
use std::sync::Arc;

use bitmap::Era;
use block::Storage as _;
use scratch::{Allowance, Budget, Room, Snapshot, SnapshotFiles, Terms};
use stillpoint::disk::{Cover, Freeze, freeze};

use super::executor::pause;
use super::sim::Place;
use super::stage::{Instant, Kept, Moment, Stage, Subject};
use super::storage::{Contents, SimStorage};
use super::world::{SimPages, SimWorld};
use super::{GRANULE, elsewhere};

/// Takes checkpoints, begins backups and ends them, one after the other.
pub(super) async fn steward(stage: Rc<Stage>) {
    for _ in 0..2 + stage.sim.below(8) {
        for _ in 0..stage.sim.below(60) {
            pause(&stage.sim).await;
        }
        release(&stage).await;
        let open = stage.open();
        if !open.is_empty() && (open.len() >= OPEN_MAX || stage.sim.one_in(4)) {
            let ended: Rc<Kept> = stage.sim.one_of(&open);
            end(&stage, &ended);
        } else {
            instant(&stage).await;
        }
    }
}

/// Commit and abort are alike to a disk: nobody needs the instant any more.
fn end(stage: &Stage, kept: &Kept) {
    kept.ended.set(true);
    kept.snapshot().end();
    stage.disks[kept.disk].disk.forget(kept.snapshot());
}

/// Gives back what is over.
pub(super) async fn release(stage: &Stage) {
    let over: Vec<Rc<Kept>> = stage
        .snapshots
        .borrow()
        .iter()
        .filter(|kept| kept.snapshot().is_over() && !kept.released.get())
        .cloned()
        .collect();
    for kept in over {
        kept.snapshot().quiet().await;
        pause(&stage.sim).await;
        kept.released.set(true);
        kept.scratch.release();
        kept.snapshot().released();
        stage.count(|tally| tally.releases += 1);
    }
}

/// A snapshot that is about to begin.
struct Planned {
    snapshot: Arc<Snapshot<SimWorld>>,
    index: usize,
    scratch: SimStorage,
    states: SimPages,
    second: SimPages,
    aside: SimPages,
}

/// Freezes one disk or all of them, to keep the instant or only to begin an era.
async fn instant(stage: &Stage) {
    let sim = &stage.sim;
    let frozen: Vec<&Subject> = if sim.one_in(3) {
        vec![&stage.disks[sim.below(stage.disks.len() as u64) as usize]]
    } else {
        stage.disks.iter().collect()
    };
    if frozen.iter().any(|subject| subject.disk.sync_failed()) {
        return;
    }
    let begun = sim.tick();
    let keep = !sim.one_in(3);
    let mut plans = Vec::new();
    let mut freezes = Vec::new();
    let first = stage.snapshots.borrow().len();
    for (place, subject) in frozen.iter().enumerate() {
        let era = subject.last_era.get() + 1 + sim.below(2) as u32;
        subject.last_era.set(era);
        let planned = if keep {
            // It could not even be recorded that it begins.
            let Ok(planned) = plan(stage, subject, era, first + place) else {
                return;
            };
            Some(planned)
        } else {
            None
        };
        let snapshot = planned
            .as_ref()
            .map(|planned| Arc::clone(&planned.snapshot));
        freezes.push(Freeze {
            disk: Arc::clone(&subject.disk),
            next: subject
                .disk
                .tracking()
                .followed_by(Era::from_number(era), snapshot),
        });
        plans.push((*subject, era, planned));
    }
    let images = plans
        .iter()
        .map(|(subject, era, _)| (subject.image.clone(), *era));
    stage.capture.borrow_mut().arm(sim.seed, images.collect());
    let before: Vec<_> = frozen
        .iter()
        .map(|subject| subject.disk.tracking().era)
        .collect();

    let cover = Cover::of(&freezes);
    let result = freeze(freezes, patience(stage)).await;

    let mut copies = stage.capture.borrow_mut().disarm();
    if result.is_err() {
        let after: Vec<_> = frozen
            .iter()
            .map(|subject| subject.disk.tracking().era)
            .collect();
        assert!(
            copies.is_empty() && before == after,
            "seed {}: half a freeze",
            sim.seed
        );
        return stage.count(|tally| tally.busy += 1);
    }
    assert_eq!(
        copies.len(),
        plans.len(),
        "seed {}: a freeze without its moment",
        sim.seed
    );
    if !covered(stage, cover, &plans, &mut copies).await {
        return;
    }
    let copies: Vec<_> = copies.into_iter().map(Rc::new).collect();
    stage.count(|tally| tally.freezes += 1);
    for ((subject, era, planned), copy) in plans.into_iter().zip(&copies) {
        let instant = Instant {
            era,
            copy: Rc::clone(copy),
        };
        subject.instants.borrow_mut().push(instant.clone());
        if let Some(planned) = planned {
            let kept = Rc::new(planned.begin(subject, instant, begun));
            stage.snapshots.borrow_mut().push(kept);
            stage.count(|tally| tally.snapshots += 1);
        }
    }
    stage.moments.borrow_mut().push(Moment {
        begun,
        returned: sim.tick(),
        // What lands by itself has no place in the order of what guests do.
        copies: frozen
            .iter()
            .zip(copies)
            .filter(|(subject, _)| !subject.image.is_elsewhere())
            .map(|(subject, copy)| (subject.index, copy))
            .collect(),
    });
}

/// Ends a freeze where disks are on another machine; says whether that succeeded. In `copies` is then what
/// the instant holds.
async fn covered(
    stage: &Stage,
    cover: Cover<SimWorld>,
    plans: &[(&Subject, u32, Option<Planned>)],
    copies: &mut [Contents],
) -> bool {
    let unsettled: Vec<_> = plans
        .iter()
        .map(|(subject, era, _)| elsewhere::may_change(subject, *era))
        .collect();
    if cover.finish(Ok(())).await.is_err() {
        return false;
    }
    for (((subject, era, planned), ranges), copy) in plans.iter().zip(unsettled).zip(copies) {
        subject.image.changed_in(*era, &ranges);
        if let Some(Planned {
            snapshot, scratch, ..
        }) = planned
        {
            let kept = (snapshot.as_ref(), scratch);
            elsewhere::settle_copy((stage, *subject), copy, kept, &ranges);
        }
    }
    true
}

fn plan(stage: &Stage, subject: &Subject, era: u32, index: usize) -> io::Result<Planned> {
    let sim = &stage.sim;
    let scratch = SimStorage::scratch(sim, index, subject.size);
    let states = SimPages::new(sim, Place::States(index));
    let second = SimPages::new(sim, Place::Second(index));
    let aside = SimPages::new(sim, Place::Aside(index));
    let limit = stage
        .limits_scratch
        .then(|| (1 + sim.below(20)) * GRANULE)
        .filter(|_| sim.one_in(2));
    let terms = Terms {
        allowance: Allowance {
            budget: Arc::new(Budget::new(limit, Arc::clone(&stage.scratch))),
            room: Arc::new(Room::endless()),
        },
        on_error: stage.on_error,
    };
    let files = SnapshotFiles {
        scratch: scratch.clone(),
        states: states.clone(),
        second: second.clone(),
        eras: aside.clone(),
    };
    let live = Arc::clone(subject.disk.map());
    #[expect(
        clippy::arc_with_non_send_sync,
        reason = "the server's API, on one thread here"
    )]
    let snapshot = Arc::new(Snapshot::new(
        live,
        Era::from_number(era),
        files,
        terms,
        index as u64,
    )?);
    Ok(Planned {
        snapshot,
        index,
        scratch,
        states,
        second,
        aside,
    })
}

impl Planned {
    fn begin(self, subject: &Subject, instant: Instant, opened: u64) -> Kept {
        Kept {
            index: self.index,
            disk: subject.index,
            instant,
            frozen: subject.disk.frozen(self.snapshot),
            scratch: self.scratch,
            states: self.states,
            second: self.second,
            aside: self.aside,
            opened,
            ended: Cell::new(false),
            released: Cell::new(false),
        }
    }
}

/// How long writes in flight may take to end: now and then hardly any time, or all there is.
async fn patience(stage: &Stage) {
    if stage.sim.one_in(3) {
        std::future::pending::<()>().await;
    }
    let length = if stage.sim.one_in(4) { 10 } else { 2000 };
    for _ in 0..stage.sim.below(length) {
        pause(&stage.sim).await;
    }
}

/// How many instants are kept at most.
const OPEN_MAX: usize = 5;
