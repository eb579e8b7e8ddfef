use std::io;
use std::sync::{Arc, Mutex, PoisonError};

/// One sync for all who wait, and none that began before someone asked.
///
/// A sync makes durable what was written before it *began*; whoever asks while one is under way
/// cannot share it, but shares the next with everyone else who came meanwhile. That one begins as
/// soon as the other has ended, and before those who waited for the other go on: where all of them
/// are tasks of one thread, the device has its work while the thread does theirs.
#[derive(Debug, Default)]
pub struct SharedSync {
    /// The round that whoever asks takes part in.
    next: Mutex<Arc<Round>>,
    /// Held while a sync is under way.
    turn: tokio::sync::Mutex<()>,
}

/// Those who share a sync, and how it ended. Who holds this makes it, if it was not made yet; should
/// that be given up, the next of them does.
type Round = tokio::sync::Mutex<Option<Result<(), io::ErrorKind>>>;

impl SharedSync {
    /// Returns when a sync that began after this call has ended, with its result.
    pub async fn run<F: Future<Output = io::Result<()>>>(
        &self,
        sync: impl FnOnce() -> F,
    ) -> io::Result<()> {
        let round = self.join();
        let mut outcome = round.lock().await;
        if let Some(outcome) = *outcome {
            return outcome.map_err(io::Error::from);
        }
        let turn = self.turn.lock().await;
        self.close(&round);
        let result = sync().await;
        *outcome = Some(result.as_ref().copied().map_err(io::Error::kind));
        // Whoever makes the next sync is woken first, and then those who shared this.
        drop(turn);
        drop(outcome);
        result
    }

    fn join(&self) -> Arc<Round> {
        Arc::clone(&self.next.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Nobody takes part in `round` any more.
    fn close(&self, round: &Arc<Round>) {
        let mut next = self.next.lock().unwrap_or_else(PoisonError::into_inner);
        // Not so where it was closed before, by someone who gave up.
        if Arc::ptr_eq(&next, round) {
            *next = Arc::default();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::cell::RefCell;
    use std::rc::Rc;

    use tokio::sync::Semaphore;
    use tokio::task::{JoinHandle, LocalSet, spawn_local, yield_now};

    use super::*;

    /// Tasks of one thread that ask for a sync. Each one ends when the test lets it.
    struct Bench {
        shared: SharedSync,
        may_end: Semaphore,
        fails: bool,
        events: RefCell<Vec<String>>,
    }

    impl Bench {
        fn new(fails: bool) -> Rc<Self> {
            Rc::new(Self {
                shared: SharedSync::default(),
                may_end: Semaphore::new(0),
                fails,
                events: RefCell::default(),
            })
        }

        async fn ask(self: &Rc<Self>, name: &'static str) -> JoinHandle<io::Result<()>> {
            let bench = Rc::clone(self);
            let task = spawn_local(async move {
                let result = bench.shared.run(|| bench.sync(name)).await;
                bench.note(format!("{name} goes on"));
                result
            });
            settle().await;
            task
        }

        async fn sync(&self, name: &str) -> io::Result<()> {
            self.note(format!("{name} syncs"));
            let permit = self.may_end.acquire().await;
            permit.expect("it is never closed").forget();
            if self.fails {
                return Err(io::ErrorKind::StorageFull.into());
            }
            Ok(())
        }

        async fn end_sync(&self) {
            self.may_end.add_permits(1);
            settle().await;
        }

        fn note(&self, event: String) {
            self.events.borrow_mut().push(event);
        }

        fn events(&self) -> String {
            self.events.borrow().join(", ")
        }
    }

    /// Returns when every task has come as far as it can: none needs as many turns.
    async fn settle() {
        for _ in 0..16 {
            yield_now().await;
        }
    }

    #[tokio::test]
    async fn who_asks_during_a_sync_shares_the_next_which_begins_before_others_go_on() {
        let test = async {
            let bench = Bench::new(false);
            for name in ["a", "b", "c"] {
                bench.ask(name).await;
            }
            assert_eq!(bench.events(), "a syncs");
            bench.end_sync().await;
            assert_eq!(bench.events(), "a syncs, a goes on, b syncs");
            for name in ["d", "e"] {
                bench.ask(name).await;
            }
            bench.events.borrow_mut().clear();
            bench.end_sync().await;
            assert_eq!(bench.events(), "b goes on, d syncs, c goes on");
            bench.end_sync().await;
            assert_eq!(
                bench.events(),
                "b goes on, d syncs, c goes on, d goes on, e goes on"
            );
        };
        LocalSet::new().run_until(test).await;
    }

    #[tokio::test]
    async fn who_gives_up_a_sync_leaves_it_to_those_who_shared_it() {
        let test = async {
            let bench = Bench::new(false);
            bench.ask("a").await;
            let gives_up = bench.ask("b").await;
            bench.ask("c").await;
            bench.end_sync().await;
            bench.ask("d").await;
            assert_eq!(bench.events(), "a syncs, a goes on, b syncs");
            gives_up.abort();
            settle().await;
            bench.events.borrow_mut().clear();
            bench.end_sync().await;
            bench.end_sync().await;
            assert_eq!(bench.events(), "d goes on, c syncs, c goes on");
        };
        LocalSet::new().run_until(test).await;
    }

    #[tokio::test]
    async fn a_failure_reaches_everyone_who_shared_the_sync() {
        let test = async {
            let bench = Bench::new(true);
            let a = bench.ask("a").await;
            let (b, c) = (bench.ask("b").await, bench.ask("c").await);
            bench.end_sync().await;
            bench.end_sync().await;
            for task in [a, b, c] {
                let result = task.await.expect("it ran to its end");
                assert_eq!(result.unwrap_err().kind(), io::ErrorKind::StorageFull);
            }
            assert_eq!(
                bench.events(),
                "a syncs, a goes on, b syncs, b goes on, c goes on"
            );
        };
        LocalSet::new().run_until(test).await;
    }
}
