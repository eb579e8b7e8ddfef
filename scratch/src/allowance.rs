use std::io;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::Notify;

use crate::quota::Quota;
use crate::room::Room;

/// What one backup uses of scratch, on all its disks, and what it may use.
#[derive(Debug)]
pub struct Budget {
    own: Quota,
    /// Of all backups together.
    all: Arc<Quota>,
    /// How many of [`WATERMARKS`] have been reached.
    level: AtomicUsize,
    /// What was used when each of them was.
    reached: Mutex<Vec<Use>>,
    rising: Notify,
}

/// A use, and the limit that it comes nearest to.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Use {
    /// In bytes.
    pub used: u64,
    /// In bytes.
    pub limit: u64,
}

/// From what one snapshot takes its scratch.
#[derive(Clone, Debug)]
pub struct Allowance {
    /// Its backup's.
    pub budget: Arc<Budget>,
    /// That of the file system that its scratch is on.
    pub room: Arc<Room>,
}

/// Bytes that were taken for something that is to be stored; given back unless it
/// [is](Self::stored).
#[derive(Debug)]
pub(crate) struct Taken<'a> {
    from: &'a Allowance,
    bytes: u64,
    stored: bool,
}

impl Budget {
    /// For a backup that may use `limit` bytes of those that `all` may.
    pub fn new(limit: Option<u64>, all: Arc<Quota>) -> Self {
        Self {
            own: Quota::new(limit),
            all,
            level: AtomicUsize::new(0),
            reached: Mutex::default(),
            rising: Notify::new(),
        }
    }

    /// What the backup uses and may use.
    pub fn own(&self) -> &Quota {
        &self.own
    }

    /// Waits until more than `known` of [`WATERMARKS`] have been reached, and says what was used when
    /// each of the others was.
    ///
    /// One waits at a time.
    pub async fn rises(&self, known: usize) -> Vec<Use> {
        loop {
            if self.level() > known {
                return self.reached()[known..].to_vec();
            }
            self.rising.notified().await;
        }
    }

    /// How many of [`WATERMARKS`] have been reached.
    pub fn level(&self) -> usize {
        self.level.load(Ordering::Relaxed)
    }

    fn reached(&self) -> MutexGuard<'_, Vec<Use>> {
        self.reached.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The limit that is nearest, if there is one: the backup's own, that of all, or the end of the
    /// `room`.
    fn nearest(&self, room: Option<u64>) -> Option<Use> {
        let of = |quota: &Quota| {
            let used = quota.used();
            quota.limit().map(|limit| Use { used, limit })
        };
        let used = self.own.used();
        let room = room.map(|left| Use {
            used,
            limit: used.saturating_add(left),
        });
        [of(&self.own), of(&self.all), room]
            .into_iter()
            .flatten()
            .reduce(|a, b| if b.is_nearer_than(a) { b } else { a })
    }

    /// Notes which watermarks have been reached.
    fn note(&self, room: Option<u64>) {
        let Some(nearest) = self.nearest(room) else {
            return;
        };
        let level = WATERMARKS
            .iter()
            .take_while(|percent| nearest.has_reached(**percent))
            .count();
        if level <= self.level() {
            return;
        }
        let mut reached = self.reached();
        if level > reached.len() {
            reached.resize(level, nearest);
            self.level.store(level, Ordering::Relaxed);
            self.rising.notify_one();
        }
    }
}

impl Use {
    fn is_nearer_than(self, other: Self) -> bool {
        let parts = |part: u64, whole: u64| u128::from(part) * u128::from(whole);
        parts(self.used, other.limit) > parts(other.used, self.limit)
    }

    fn has_reached(self, percent: u64) -> bool {
        u128::from(self.used) * 100 >= u128::from(self.limit) * u128::from(percent)
    }
}

impl Allowance {
    /// As much as anyone wants.
    pub fn endless() -> Self {
        Self {
            budget: Arc::new(Budget::new(None, Arc::new(Quota::new(None)))),
            room: Arc::new(Room::endless()),
        }
    }

    /// Takes `bytes` before they are stored. An error says which limit they would exceed.
    pub(crate) fn take(&self, bytes: u64) -> io::Result<Taken<'_>> {
        let Budget { own, all, .. } = &*self.budget;
        if !own.take(bytes) {
            return Err(full("the backup's scratch limit", own.limit()));
        }
        if !all.take(bytes) {
            own.give_back(bytes);
            return Err(full("the scratch limit of all backups", all.limit()));
        }
        self.room.kept.add(bytes);
        // From here on the bytes go back when this is dropped.
        let taken = Taken {
            from: self,
            bytes,
            stored: false,
        };
        if !self.room.take(bytes)? {
            return Err(full("the reserve of free space", Some(self.room.reserve())));
        }
        self.budget.note(self.room.left());
        Ok(taken)
    }

    /// A snapshot may come to need `bytes` of scratch.
    pub(crate) fn expect(&self, bytes: u64) {
        self.budget.own.expect(bytes);
        self.budget.all.expect(bytes);
        self.room.expect(bytes);
    }

    /// It needs none any more.
    pub(crate) fn expect_no_more(&self, bytes: u64) {
        for quota in self.quotas() {
            quota.expect_no_more(bytes);
        }
    }

    /// Whether there is room for twice all that the open snapshots could come to need: for
    /// themselves, and for others like them that begin later. So none breaks for what is kept
    /// without need.
    pub(crate) fn holds_all(&self) -> bool {
        self.quotas().iter().all(|quota| quota.holds_all()) && self.room.holds_all()
    }

    fn quotas(&self) -> [&Quota; 3] {
        [&self.budget.own, &self.budget.all, &self.room.kept]
    }

    /// Counts what is stored already, of which nobody is told again.
    pub(crate) fn add(&self, bytes: u64) {
        for quota in self.quotas() {
            quota.add(bytes);
        }
        self.budget.note(None);
    }

    /// Others may take `bytes` that are about to go.
    pub(crate) fn let_go(&self, bytes: u64) {
        self.room.going(bytes);
        self.give_back(bytes);
    }

    fn give_back(&self, bytes: u64) {
        for quota in self.quotas() {
            quota.give_back(bytes);
        }
    }
}

impl Taken<'_> {
    /// It is stored, and stays.
    pub(crate) fn stored(mut self) {
        self.stored = true;
    }
}

impl Drop for Taken<'_> {
    fn drop(&mut self) {
        self.from.room.landed(self.bytes);
        if !self.stored {
            self.from.give_back(self.bytes);
        }
    }
}

fn full(which: &str, bytes: Option<u64>) -> io::Error {
    let bytes = bytes.unwrap_or(u64::MAX);
    io::Error::new(
        io::ErrorKind::StorageFull,
        format!("{which}, {bytes} bytes, is reached"),
    )
}

/// Percentages of the nearest limit at which someone is told, once each: when there is time to plan,
/// when there is time to act, and when there is hardly any.
pub const WATERMARKS: [u64; 3] = [50, 75, 90];

#[cfg(test)]
mod tests {
    use super::*;

    fn allowance(own: Option<u64>, all: &Arc<Quota>) -> Allowance {
        Allowance {
            budget: Arc::new(Budget::new(own, Arc::clone(all))),
            room: Arc::new(Room::endless()),
        }
    }

    #[test]
    fn what_was_taken_for_nothing_goes_back_to_everyone() {
        let all = Arc::new(Quota::new(Some(100)));
        let [first, second] = [Some(80), None].map(|limit| allowance(limit, &all));
        first.take(80).unwrap().stored();
        drop(second.take(20).unwrap());
        assert_eq!((second.budget.own().used(), all.used()), (0, 80));
        let error = first.take(1).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::StorageFull);
        assert!(error.to_string().contains("80 bytes"), "{error}");
        let error = second.take(21).unwrap_err();
        assert!(error.to_string().contains("all backups"), "{error}");
        assert_eq!((second.budget.own().used(), all.used()), (0, 80));
    }

    #[tokio::test]
    async fn each_watermark_of_the_nearest_limit_is_reached_once() {
        let all = Arc::new(Quota::new(Some(1000)));
        let one = allowance(Some(100), &all);
        one.take(49).unwrap().stored();
        assert_eq!(one.budget.level(), 0);
        one.take(1).unwrap().stored();
        let use_of = |used, limit| Use { used, limit };
        assert_eq!(one.budget.rises(0).await, [use_of(50, 100)]);
        // What others use counts where the limit of all is nearer.
        allowance(None, &all).take(860).unwrap().stored();
        one.take(1).unwrap().stored();
        assert_eq!(one.budget.rises(1).await, [use_of(911, 1000); 2]);
        one.give_back(51);
        one.take(50).unwrap().stored();
        assert_eq!(one.budget.level(), 3);
    }
}
