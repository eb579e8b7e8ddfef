//! The memory that requests and replies take, of which there is never more than was agreed.
//!
//! Each connection has some of its own. For more than that it takes from what all connections of
//! its role share, before a payload is read or a reply is made, and waits in turn if there is not
//! enough. Nobody keeps what it has for want of more: a request that waits holds nothing, and
//! what has been answered is given back as the client takes it. Who does not take it, while others
//! have nothing, loses its connection: see [`progress`](super::progress).

use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use crate::limits::OWN_BYTES;

/// What all connections of one role share.
#[derive(Debug)]
pub(crate) struct Budget {
    /// In units of [`UNIT`].
    common: Arc<Semaphore>,
    in_all: usize,
    /// Connections that hold nothing, and wait.
    starving: AtomicUsize,
}

/// What one connection may hold.
pub(super) struct Share {
    budget: Arc<Budget>,
    /// What it has of the common part.
    taken: Option<OwnedSemaphorePermit>,
    waiting: Option<Waiting>,
}

struct Waiting {
    granted: Pin<Box<dyn Future<Output = Option<OwnedSemaphorePermit>>>>,
    starving: Option<Starving>,
}

/// Counted among those that hold nothing, for as long as this lives.
struct Starving(Arc<Budget>);

impl Budget {
    pub(crate) fn new(bytes: usize) -> Arc<Self> {
        let in_all = (bytes / UNIT)
            .min(Semaphore::MAX_PERMITS)
            .min(u32::MAX as usize);
        Arc::new(Self {
            common: Arc::new(Semaphore::new(in_all)),
            in_all,
            starving: AtomicUsize::new(0),
        })
    }

    /// Whether someone holds nothing and waits.
    pub(super) fn is_short(&self) -> bool {
        self.starving.load(Ordering::Relaxed) > 0
    }
}

impl Share {
    pub(super) fn new(budget: &Arc<Budget>) -> Self {
        Self {
            budget: Arc::clone(budget),
            taken: None,
            waiting: None,
        }
    }

    /// Whether `more` bytes may be held besides `held`. If not, they are waited for.
    pub(super) fn covers(&mut self, held: usize, more: usize) -> bool {
        // What is more than there is at all is allowed to whoever has all there is.
        let need = units_beyond_own(held + more).min(self.budget.in_all);
        let taken = self.taken();
        if need <= taken {
            self.waiting = None;
            return true;
        }
        if self.waiting.is_none() {
            let common = Arc::clone(&self.budget.common);
            if let Ok(permit) = Arc::clone(&common).try_acquire_many_owned(permits(need - taken)) {
                self.add(permit);
                return true;
            }
            // What it does not need while it waits is given back now: counted on, it would be missing
            // when its turn has come.
            self.fit(held);
            let need = (need + GROWTH).min(self.budget.in_all);
            let missing = permits(need - self.taken());
            self.waiting = Some(Waiting {
                granted: Box::pin(async move { common.acquire_many_owned(missing).await.ok() }),
                starving: None,
            });
        }
        if let Some(waiting) = &mut self.waiting {
            let starves = held == 0;
            if starves != waiting.starving.is_some() {
                waiting.starving = starves.then(|| Starving::counted(&self.budget));
            }
        }
        false
    }

    /// Waits for what is waited for; for ever, if that is nothing.
    pub(super) async fn granted(&mut self) {
        let Some(waiting) = &mut self.waiting else {
            return std::future::pending().await;
        };
        let permit = waiting.granted.as_mut().await;
        self.waiting = None;
        if let Some(permit) = permit {
            self.add(permit);
        }
    }

    /// Whether there is something to wait for.
    pub(super) fn is_waiting(&self) -> bool {
        self.waiting.is_some()
    }

    /// Waits for nothing any more.
    pub(super) fn give_up(&mut self) {
        self.waiting = None;
    }

    /// Gives back what is not needed for `held` bytes.
    pub(super) fn fit(&mut self, held: usize) {
        let Some(taken) = &mut self.taken else {
            return;
        };
        let surplus = taken.num_permits().saturating_sub(units_beyond_own(held));
        drop(taken.split(surplus));
        if taken.num_permits() == 0 {
            self.taken = None;
        }
    }

    /// Whether it holds what others wait for.
    pub(super) fn is_in_the_way(&self) -> bool {
        self.taken.is_some() && self.budget.is_short()
    }

    fn taken(&self) -> usize {
        let taken = self.taken.as_ref();
        taken.map_or(0, OwnedSemaphorePermit::num_permits)
    }

    fn add(&mut self, permit: OwnedSemaphorePermit) {
        match &mut self.taken {
            Some(taken) => taken.merge(permit),
            None => self.taken = Some(permit),
        }
    }
}

impl Starving {
    fn counted(budget: &Arc<Budget>) -> Self {
        budget.starving.fetch_add(1, Ordering::Relaxed);
        Self(Arc::clone(budget))
    }
}

impl Drop for Starving {
    fn drop(&mut self) {
        self.0.starving.fetch_sub(1, Ordering::Relaxed);
    }
}

fn units_beyond_own(bytes: usize) -> usize {
    bytes.saturating_sub(OWN_BYTES).div_ceil(UNIT)
}

fn permits(units: usize) -> u32 {
    u32::try_from(units).unwrap_or(u32::MAX)
}

/// What is asked for besides what is missing, in units: while a request waits, what is held may grow by
/// the heads of 256 replies, and by rounding. Who is short all the same waits for another turn.
const GROWTH: usize = 4;

/// Coarse enough that 32 bits count any memory, fine enough that nothing is lost by rounding.
const UNIT: usize = 4 << 10;

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use tokio::time::timeout;

    use super::*;

    const MIB: usize = 1 << 20;

    async fn is_granted(share: &mut Share) -> bool {
        timeout(Duration::ZERO, share.granted()).await.is_ok()
    }

    #[tokio::test]
    async fn everyone_has_some_of_its_own_whatever_the_others_hold() {
        let budget = Budget::new(4 * MIB);
        let mut hog = Share::new(&budget);
        assert!(hog.covers(0, 4 * MIB + OWN_BYTES));
        for _ in 0..3 {
            let mut other = Share::new(&budget);
            assert!(other.covers(0, OWN_BYTES));
            assert!(!other.covers(OWN_BYTES, 1));
            assert!(
                !hog.is_in_the_way(),
                "the other has something to go on with"
            );
        }
    }

    #[tokio::test]
    async fn who_waits_gets_what_is_given_back_in_turn() {
        let budget = Budget::new(4 * MIB);
        let [mut hog, mut large, mut small] = [(); 3].map(|()| Share::new(&budget));
        assert!(hog.covers(0, 4 * MIB));
        assert!(!large.covers(0, 3 * MIB));
        assert!(hog.is_in_the_way());
        assert!(!small.covers(0, MIB), "it came later");
        assert!(!is_granted(&mut large).await && !is_granted(&mut small).await);

        hog.fit(MIB);
        assert!(is_granted(&mut large).await);
        assert!(large.covers(0, 3 * MIB));
        hog.fit(0);
        assert!(is_granted(&mut small).await);
        assert!(!budget.is_short());
        drop((hog, large, small));
        assert_eq!(budget.common.available_permits(), budget.in_all);
    }

    #[tokio::test]
    async fn more_than_there_is_goes_to_one_at_a_time() {
        let budget = Budget::new(MIB);
        let [mut one, mut other] = [(); 2].map(|()| Share::new(&budget));
        assert!(one.covers(0, 32 * MIB));
        assert!(!other.covers(0, 32 * MIB));
        drop(one);
        assert!(is_granted(&mut other).await && other.covers(0, 32 * MIB));
    }

    #[tokio::test]
    async fn who_had_more_than_it_held_goes_on_at_its_first_turn() {
        let budget = Budget::new(4 * MIB);
        let [mut hog, mut one, mut other] = [(); 3].map(|()| Share::new(&budget));
        // Most of what it held has been sent since.
        assert!(one.covers(0, 2 * MIB));
        assert!(hog.covers(0, 2 * MIB));
        assert!(!one.covers(MIB, 2 * MIB));
        one.fit(MIB);
        assert!(!other.covers(0, 4 * MIB));
        assert!(!is_granted(&mut one).await && !is_granted(&mut other).await);
        hog.fit(0);
        assert!(is_granted(&mut one).await);
        assert!(!is_granted(&mut other).await, "another still waits");
        assert!(one.covers(MIB, 2 * MIB));
    }

    #[tokio::test]
    async fn heads_and_rounding_cost_nobody_its_turn() {
        let (least, head) = (OWN_BYTES + UNIT, 32);
        for (then, now) in [
            (least, least + 256 * head),
            (least + 1, least),
            (0, 256 * head),
        ] {
            let budget = Budget::new(4 * MIB);
            let [mut hog, mut one, mut other] = [(); 3].map(|()| Share::new(&budget));
            assert!(one.covers(0, then));
            assert!(hog.covers(0, 4 * MIB));
            assert!(!one.covers(then, MIB - 1));
            assert!(!is_granted(&mut one).await);
            assert!(!other.covers(0, 4 * MIB));
            assert!(!is_granted(&mut other).await);
            one.fit(now);
            hog.fit(0);
            assert!(is_granted(&mut one).await);
            assert!(!is_granted(&mut other).await);
            assert!(one.covers(now, MIB - 1), "{then}, then {now}");
        }
    }

    #[tokio::test]
    async fn who_gives_up_waiting_leaves_the_queue() {
        let budget = Budget::new(MIB);
        let [mut hog, mut waits, mut next] = [(); 3].map(|()| Share::new(&budget));
        assert!(hog.covers(0, MIB));
        assert!(!waits.covers(0, MIB + OWN_BYTES));
        assert!(!is_granted(&mut waits).await);
        drop(waits);
        assert!(!budget.is_short());
        assert!(!next.covers(0, MIB));
        hog.fit(0);
        assert!(is_granted(&mut next).await);
    }
}
