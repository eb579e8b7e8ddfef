//! Staying awake for a client that is about to ask again.
//!
//! Who asks one request after the other waits for two threads to be woken each time: the server's and
//! its own. On a virtual machine, whose processors halt when they have nothing to do, that is most of
//! the time. So a client that asked again soon the last time finds the thread awake. Meanwhile the
//! processor is for whoever else wants it, and the thread for its other connections.
//!
//! A thread that does not sleep has used up its turn when others come, and then waits for its next one
//! longer than one that was asleep. So nobody stays awake while requests wait for other threads, or when
//! another has just wanted this processor.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use tokio::time::Instant;

/// How many requests, of all connections, wait for a device or for another thread.
#[derive(Debug, Default)]
pub(crate) struct Waiting(AtomicUsize);

/// Whether the client of a connection is worth staying awake for.
#[derive(Debug)]
pub(super) struct Vigil {
    waiting: Arc<Waiting>,
    /// When it had all its answers.
    begun: Option<Instant>,
    /// It asked again soon, the last time.
    is_worth_it: bool,
    /// How many requests it has asked since all answers were there.
    asked: u32,
    /// How soon is soon.
    awake_max: Duration,
    /// Until then the processor is left to others.
    rests: Option<Instant>,
}

impl Vigil {
    pub(super) fn new(waiting: &Arc<Waiting>) -> Self {
        Self {
            waiting: Arc::clone(waiting),
            begun: None,
            is_worth_it: false,
            asked: 0,
            awake_max: AWAKE_MAX,
            rests: None,
        }
    }

    /// Waits for ever; at first awake, if that is worth it.
    pub(super) async fn keep(&mut self) {
        let mut now = Instant::now();
        while self.goes_on(now) {
            std::thread::yield_now();
            self.came_back(now, Instant::now());
            tokio::task::yield_now().await;
            now = Instant::now();
        }
        std::future::pending::<()>().await;
    }

    /// The client asks a request.
    pub(super) fn asked(&mut self) {
        self.asked = self.asked.saturating_add(1);
    }

    /// The client sends something.
    pub(super) fn end(&mut self, now: Instant) {
        let soon = |begun| now.saturating_duration_since(begun) < self.awake_max;
        self.is_worth_it = self.begun.take().is_some_and(soon);
    }

    fn goes_on(&mut self, now: Instant) -> bool {
        let begun = *self.begun.get_or_insert_with(|| {
            self.awake_max = match std::mem::take(&mut self.asked) {
                1 => AWAKE_FOR_ONE_MAX,
                _ => AWAKE_MAX,
            };
            now
        });
        self.is_worth_it &= now.saturating_duration_since(begun) < self.awake_max;
        self.is_worth_it && !self.waiting.any() && self.rests.is_none_or(|until| until <= now)
    }

    /// The processor was given away, and is had again.
    fn came_back(&mut self, gave: Instant, now: Instant) {
        if now.saturating_duration_since(gave) > NOBODY_ELSE {
            self.rests = Some(now + REST);
        }
    }
}

impl Waiting {
    pub(super) fn begin(&self) {
        self.0.fetch_add(1, Ordering::Relaxed);
    }

    pub(super) fn end(&self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }

    fn any(&self) -> bool {
        self.0.load(Ordering::Relaxed) > 0
    }
}

/// Longer than it takes to wake both threads, so that a client that does nothing else is noticed while
/// the server's still sleeps; and no longer, as it is what is wasted when a client stops.
const AWAKE_FOR_ONE_MAX: Duration = Duration::from_micros(150);

/// For who asks many requests at a time: they share what waking costs, and come in larger batches to
/// who sleeps.
const AWAKE_MAX: Duration = Duration::from_micros(60);

/// Giving a processor away that nobody else wants takes less.
const NOBODY_ELSE: Duration = Duration::from_micros(20);

/// As long as others are likely to want it again. With 10 ms a client at depth 1 is hardly ever waited for
/// awake where two processors are all there are.
const REST: Duration = Duration::from_millis(1);

#[cfg(test)]
mod tests {
    use super::*;

    /// A moment, in microseconds since `start`.
    fn at(start: Instant, us: u64) -> Instant {
        start + Duration::from_micros(us)
    }

    /// One whose client has asked again soon.
    fn quick(start: Instant) -> (Vigil, Arc<Waiting>) {
        let waiting = Arc::default();
        let mut vigil = Vigil::new(&waiting);
        assert!(!vigil.goes_on(start), "nothing is known of it");
        vigil.end(at(start, 59));
        (vigil, waiting)
    }

    #[test]
    fn only_who_asked_again_soon_is_waited_for_awake_and_not_for_long() {
        let start = Instant::now();
        let at = |us| at(start, us);
        let (mut vigil, _) = quick(start);
        assert!(vigil.goes_on(at(100)) && vigil.goes_on(at(159)));
        assert!(!vigil.goes_on(at(160)), "it has not asked soon");
        vigil.end(at(170));
        assert!(!vigil.goes_on(at(200)), "it took its time");
        vigil.end(at(210));
        assert!(vigil.goes_on(at(300)), "it is quick again");
        vigil.end(at(310));
        vigil.end(at(320));
        assert!(!vigil.goes_on(at(330)), "it asks before it is answered");
    }

    #[test]
    fn who_asks_one_request_at_a_time_is_waited_for_longer() {
        for (requests, longest) in [(1, AWAKE_FOR_ONE_MAX), (2, AWAKE_MAX), (32, AWAKE_MAX)] {
            let start = Instant::now();
            let (mut vigil, _) = quick(start);
            (0..requests).for_each(|_| vigil.asked());
            let begun = at(start, 100);
            assert!(vigil.goes_on(begun), "{requests} requests");
            let last = begun + longest - Duration::from_micros(1);
            assert!(vigil.goes_on(last), "{requests} requests");
            assert!(!vigil.goes_on(begun + longest), "{requests} requests");
        }
    }

    #[test]
    fn while_requests_wait_for_other_threads_nobody_stays_awake() {
        let start = Instant::now();
        let (mut vigil, waiting) = quick(start);
        waiting.begin();
        assert!(!vigil.goes_on(at(start, 100)));
        waiting.end();
        assert!(vigil.goes_on(at(start, 101)));
    }

    #[test]
    fn a_processor_that_another_wanted_is_left_to_others_for_a_while() {
        let start = Instant::now();
        let (mut vigil, _) = quick(start);
        assert!(vigil.goes_on(at(start, 100)));
        vigil.came_back(at(start, 100), at(start, 120));
        assert!(vigil.goes_on(at(start, 121)), "nobody else ran");
        vigil.came_back(at(start, 121), at(start, 150));
        assert!(!vigil.goes_on(at(start, 151)));
        vigil.end(at(start, 152));
        assert!(!vigil.goes_on(at(start, 160)));
        vigil.end(at(start, 1140));
        vigil.goes_on(at(start, 1141));
        vigil.end(at(start, 1149));
        assert!(vigil.goes_on(at(start, 1150)));
    }
}
