//! Guests on a base that does its worst, drawn from a seed, against the set of what each sector may
//! hold.
//!
//! What runs is all that lies between a disk and another server's connection. A sector may hold what
//! was acknowledged last, and until that was read again after a flush also what failed since. Only what
//! was given up, or repeated, may hold anything that was ever written there; and that is told.
//! `STILLPOINT_REMOTE_SCHEDULES` says how many schedules, `STILLPOINT_SEED` the first seed.

use std::cell::RefCell;
use std::collections::BTreeSet;
use std::env;
use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::path::Path;

use rand::{Rng as _, SeedableRng as _};
use rand_chacha::ChaCha8Rng;
use tokio::time::{Instant, sleep};

use super::fake_base::{Appears, FakeBase, Kind, SECTOR};
use super::*;

#[test]
fn whatever_a_base_does_only_what_is_told_of_changes_by_itself() {
    let number = |name: &str, otherwise| {
        let found = env::var(name).ok();
        found.map_or(otherwise, |text| text.parse().expect("a number"))
    };
    let first = number("STILLPOINT_SEED", 1);
    let count = number("STILLPOINT_REMOTE_SCHEDULES", 200);
    let mut total = Tally::default();
    for seed in first..first + count {
        match catch_unwind(AssertUnwindSafe(|| play(seed))) {
            Ok(tally) => total.add(&tally),
            Err(panic) => {
                eprintln!("seed {seed} failed; to see it again, STILLPOINT_SEED={seed}");
                resume_unwind(panic);
            }
        }
    }
    println!("{total:?}");
    // A simulation in which nothing happens proves nothing.
    if count >= 200 {
        assert!(total.exact > 20 * count && total.failed > count && total.losses > 2 * count);
        assert!(
            total.late > count / 2 && total.flushes > 2 * count,
            "{total:?}"
        );
    }
}

#[derive(Clone, Copy, Debug, Default)]
struct Tally {
    operations: u64,
    failed: u64,
    flushes: u64,
    /// Sectors that were read and could only be what they were, or one of what had failed.
    exact: u64,
    /// Sectors that were read and could be anything that was ever there.
    unsettled: u64,
    /// How often the base was killed, cut off, or another.
    losses: u64,
    /// Requests that were performed when their connection was gone.
    late: u64,
}

impl Tally {
    fn add(&mut self, other: &Self) {
        self.operations += other.operations;
        self.failed += other.failed;
        self.flushes += other.flushes;
        self.exact += other.exact;
        self.unsettled += other.unsettled;
        self.losses += other.losses;
        self.late += other.late;
    }
}

/// What a sector may hold.
#[derive(Clone, Default)]
struct Sector {
    may_be: BTreeSet<u64>,
    ever: BTreeSet<u64>,
    /// Nothing was begun here since a flush that has succeeded.
    is_durable: bool,
}

struct Play {
    seed: u64,
    patience: Duration,
    storage: RemoteStorage,
    sectors: RefCell<Vec<Sector>>,
    tally: RefCell<Tally>,
}

fn play(seed: u64) -> Tally {
    let runtime = runtime::Builder::new_current_thread()
        .enable_all()
        .start_paused(true)
        .build();
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join(GIVEN_UP);
    LocalSet::new().block_on(&runtime.expect("a runtime"), act(seed, &path))
}

async fn act(seed: u64, path: &Path) -> Tally {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let patience = Duration::from_millis(rng.random_range(200..5000));
    let kind = Kind {
        size: SIZE,
        blocks: [
            [1, 512, 4096][rng.random_range(0..3)],
            [4096, 8192, 32 << 20][rng.random_range(0..3)],
        ],
        flags: FLAGS[rng.random_range(0..FLAGS.len())],
    };
    let base = FakeBase::new(rng.random(), kind, patience);
    let dialer = Rc::new(base.clone());
    let (link, witnesses) = first(&*dialer).await.expect("it does nothing bad yet");
    let (requests, queue) = mpsc::unbounded_channel();
    let (keeper, side, can) = keeper(
        "vda".to_owned(),
        dialer,
        patience,
        queue,
        (&link, witnesses),
    );
    side.given_up
        .keep_at(path, true)
        .await
        .expect("there is room");
    let keeping = tokio::task::spawn_local(keeper.run(link));
    let play = Rc::new(Play {
        seed,
        patience,
        storage: RemoteStorage {
            side,
            can,
            requests: Some(requests),
            thread: None,
        },
        sectors: RefCell::new(vec![Sector::empty(); SIZE as usize / SECTOR]),
        tally: RefCell::default(),
    });

    let guests: Vec<_> = (0..GUESTS)
        .map(|guest| {
            let rng = ChaCha8Rng::seed_from_u64(rng.random());
            tokio::task::spawn_local(Rc::clone(&play).guest(guest, rng))
        })
        .collect();
    base.trouble();
    let trouble = trouble(Rc::clone(&play), base.clone(), rng);
    let trouble = tokio::task::spawn_local(trouble);
    for guest in guests {
        guest
            .await
            .unwrap_or_else(|ended| resume_unwind(ended.into_panic()));
    }
    trouble.abort();
    base.heal();
    let mut attempts = 0;
    while let Err(error) = play.storage.sync().await {
        attempts += 1;
        assert!(attempts < 100, "seed {seed}: it does not come back");
        assert!(block::Unreachable::is(&error), "seed {seed}: {error}");
        sleep(patience).await;
    }
    play.all_is_durable(|_| true);
    play.check(
        0..SIZE,
        &play.read(0..SIZE).await.expect("nothing fails any more"),
    );
    play.check(0..SIZE, &base.bytes());
    assert_eq!(
        base.others_written(),
        0,
        "seed {seed}: another image was written"
    );
    let told = play.storage.unsettled();
    let after = GivenUp::default();
    after.keep_at(path, false).await.expect("it is there");
    let covered = |range: &Range<u64>| {
        let mut found = after.ranges().into_iter();
        found.any(|it| it.start <= range.start && range.end <= it.end)
    };
    assert!(
        told.iter().all(covered),
        "seed {seed}: a kill would forget what was given up"
    );
    let mut tally = *play.tally.borrow();
    tally.late = base.late();
    drop(play);
    keeping.await.expect("it ends when nobody asks");
    tally
}

/// The base is cut off, killed, away, and another.
async fn trouble(play: Rc<Play>, base: FakeBase, mut rng: ChaCha8Rng) {
    let longest = play.patience.as_millis() as u64;
    loop {
        let calm = rng.random_range(0..3 * longest);
        sleep(Duration::from_millis(calm)).await;
        play.count(|tally| tally.losses += 1);
        let next = match rng.random_range(0..6) {
            0 => Appears::Not,
            1 => Appears::AsAnother(SIZE),
            2 => Appears::AsAnother(SIZE / 2),
            _ => Appears::AsItself,
        };
        if rng.random_bool(0.6) {
            base.kill(next);
        } else {
            base.cut(next);
        }
        if next != Appears::AsItself {
            let away = rng.random_range(0..longest * 3 / 2);
            sleep(Duration::from_millis(away)).await;
            base.cut(Appears::AsItself);
        }
    }
}

impl Play {
    async fn guest(self: Rc<Self>, guest: u64, mut rng: ChaCha8Rng) {
        for number in 0..OPERATIONS {
            let stamp = (guest + 1) << 32 | (number + 1);
            let range = stretch(guest, &mut rng);
            let begun = Instant::now();
            let result = match rng.random_range(0..10) {
                0..3 => match self.read(range.clone()).await {
                    Ok(bytes) => {
                        self.check(range, &bytes);
                        Ok(())
                    }
                    Err(error) => Err(error),
                },
                3 => {
                    let result = self.storage.sync().await;
                    if result.is_ok() {
                        self.count(|tally| tally.flushes += 1);
                        self.all_is_durable(|sector| owner(sector) == guest);
                    }
                    result
                }
                4 => {
                    let how = [Zeroing::MayUnmap, Zeroing::Keep, Zeroing::FastKeep];
                    let how = how[rng.random_range(0..how.len())];
                    self.begin(&range, 0);
                    let result = self.storage.zero(range.clone(), how).await;
                    self.end(&range, 0, result.is_ok());
                    result
                }
                _ => {
                    let words = (range.end - range.start) as usize / 8;
                    let data = Bytes::from(stamp.to_le_bytes().repeat(words));
                    self.begin(&range, stamp);
                    let result = self.storage.write(range.start, &data).await;
                    self.end(&range, stamp, result.is_ok());
                    result
                }
            };
            let (taken, seed) = (begun.elapsed(), self.seed);
            let longest = self.patience + Duration::from_millis(5);
            assert!(taken <= longest, "seed {seed}: an answer after {taken:?}");
            self.count(|tally| {
                tally.operations += 1;
                tally.failed += u64::from(result.is_err());
            });
            // Where nobody answers, an error takes no time.
            if result.is_err() || rng.random_bool(0.3) {
                let pause = rng.random_range(0..self.patience.as_millis() as u64 / 2 + 1);
                sleep(Duration::from_millis(pause)).await;
            }
        }
    }

    fn count(&self, what: impl FnOnce(&mut Tally)) {
        what(&mut self.tally.borrow_mut());
    }

    async fn read(&self, range: Range<u64>) -> io::Result<Vec<u8>> {
        let mut bytes = vec![0; (range.end - range.start) as usize];
        self.storage.read(range.start, &mut bytes).await?;
        Ok(bytes)
    }

    fn begin(&self, range: &Range<u64>, stamp: u64) {
        for sector in &mut self.sectors.borrow_mut()[sectors(range)] {
            sector.may_be.insert(stamp);
            sector.ever.insert(stamp);
            sector.is_durable = false;
        }
    }

    fn end(&self, range: &Range<u64>, stamp: u64, done: bool) {
        for sector in &mut self.sectors.borrow_mut()[sectors(range)] {
            if done {
                sector.may_be = BTreeSet::from([stamp]);
            }
        }
    }

    /// A flush has succeeded that began when nothing was under way on those sectors.
    fn all_is_durable(&self, which: impl Fn(u64) -> bool) {
        for (number, sector) in (0..).zip(&mut *self.sectors.borrow_mut()) {
            sector.is_durable |= which(number);
        }
    }

    /// What was read when nobody was changing it.
    fn check(&self, range: Range<u64>, bytes: &[u8]) {
        let seed = self.seed;
        let unsettled = self.storage.unsettled();
        let mut all = self.sectors.borrow_mut();
        let mut tally = self.tally.borrow_mut();
        for (number, found) in sectors(&range).zip(bytes.chunks(SECTOR)) {
            let word = u64::from_le_bytes(found[..8].try_into().expect("eight"));
            let is_whole = found.chunks(8).all(|other| other == &found[..8]);
            assert!(is_whole, "seed {seed}: sector {number} is torn");
            let at = (number * SECTOR) as u64;
            let sector = &mut all[number];
            if unsettled.iter().any(|range| range.contains(&at)) {
                tally.unsettled += 1;
                let was = sector.ever.contains(&word);
                assert!(
                    was,
                    "seed {seed}: sector {number} holds {word:#x}, which was never there"
                );
                continue;
            }
            tally.exact += 1;
            let may = sector.may_be.contains(&word);
            let expected = &sector.may_be;
            assert!(
                may,
                "seed {seed}: sector {number} holds {word:#x} and not {expected:x?}"
            );
            if sector.is_durable {
                sector.may_be = BTreeSet::from([word]);
            }
        }
    }
}

impl Sector {
    fn empty() -> Self {
        let zero = BTreeSet::from([0]);
        Self {
            may_be: zero.clone(),
            ever: zero,
            is_durable: true,
        }
    }
}

/// Somewhere in what belongs to this guest: small places by turns, so that several have one block, or
/// a long one.
fn stretch(guest: u64, rng: &mut ChaCha8Rng) -> Range<u64> {
    let sector = SECTOR as u64;
    let (place, length) = if rng.random_bool(0.7) {
        let place = rng.random_range(0..SHARED / UNIT / GUESTS) * GUESTS + guest;
        (place * UNIT, UNIT)
    } else {
        (SHARED + guest * LONG, LONG)
    };
    let first = rng.random_range(0..length / sector);
    let count = rng.random_range(1..=length / sector - first);
    place + first * sector..place + (first + count) * sector
}

/// Which guest a sector belongs to.
fn owner(sector: u64) -> u64 {
    let at = sector * SECTOR as u64;
    if at < SHARED {
        at / UNIT % GUESTS
    } else {
        (at - SHARED) / LONG
    }
}

fn sectors(range: &Range<u64>) -> Range<usize> {
    range.start as usize / SECTOR..range.end as usize / SECTOR
}

const GUESTS: u64 = 4;
const OPERATIONS: u64 = 40;
/// What the guests have by turns.
const SHARED: u64 = 64 << 10;
const UNIT: u64 = 1024;
/// What each has besides.
const LONG: u64 = 32 << 10;
/// Nobody writes here, so that one image is always told from another.
const CALM: u64 = 8 << 10;
const SIZE: u64 = SHARED + GUESTS * LONG + CALM;

/// What servers tell that they can: flush, or write through, or both; and zero, or zero fast.
const FLAGS: [u16; 4] = [
    HAS_FLAGS | FLUSH,
    HAS_FLAGS | FLUSH | ZEROES,
    HAS_FLAGS | FLUSH | FUA | ZEROES | FAST_ZERO,
    HAS_FLAGS | FUA | ZEROES,
];
const HAS_FLAGS: u16 = 1;
const FLUSH: u16 = 1 << 2;
const FUA: u16 = 1 << 3;
const ZEROES: u16 = 1 << 6;
const FAST_ZERO: u16 = 1 << 11;
