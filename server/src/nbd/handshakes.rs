//! Clients that have not chosen an export yet, of whom there are never too many.
//!
//! Who is quick is served however many there are who are not: when all places are taken, one that has
//! been given its time makes room for the next.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::Notify;
use tokio::time::{Instant, timeout_at};

use super::peer::Origin;

/// The handshakes that go on at the sockets of one role.
#[derive(Debug)]
pub(crate) struct Handshakes {
    most: usize,
    /// Held only to look and to count.
    open: Mutex<Open>,
    /// One has ended.
    left: Notify,
}

#[derive(Debug, Default)]
struct Open {
    /// In the order in which they began.
    entries: BTreeMap<u64, Entry>,
    next: u64,
}

#[derive(Debug)]
struct Entry {
    origin: Origin,
    begun: Instant,
    displaced: Arc<Notify>,
}

/// A handshake, for as long as this lives.
#[derive(Debug)]
pub(crate) struct Handshake {
    all: Arc<Handshakes>,
    number: u64,
    displaced: Arc<Notify>,
}

impl Handshakes {
    pub(crate) fn new(most: usize) -> Arc<Self> {
        Arc::new(Self {
            most,
            open: Mutex::default(),
            left: Notify::new(),
        })
    }

    /// Waits until there is room for one more, which is never long.
    pub(crate) async fn room(&self) {
        loop {
            let until = {
                let mut open = self.open();
                if open.entries.len() < self.most {
                    return;
                }
                match open.oldest_of_the_most() {
                    None => return,
                    Some((number, begun)) if begun.elapsed() >= GRACE => {
                        if let Some(entry) = open.entries.remove(&number) {
                            entry.displaced.notify_one();
                        }
                        return;
                    }
                    Some((_, begun)) => begun + GRACE,
                }
            };
            // Either way there is something to be found.
            let _ = timeout_at(until, self.left.notified()).await;
        }
    }

    /// Begins one.
    pub(crate) fn begin(self: &Arc<Self>, origin: Origin) -> Handshake {
        let displaced = Arc::new(Notify::new());
        let mut open = self.open();
        let number = open.next;
        open.next += 1;
        let entry = Entry {
            origin,
            begun: Instant::now(),
            displaced: Arc::clone(&displaced),
        };
        open.entries.insert(number, entry);
        drop(open);
        Handshake {
            all: Arc::clone(self),
            number,
            displaced,
        }
    }

    fn open(&self) -> MutexGuard<'_, Open> {
        self.open.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Open {
    /// The oldest of those of whoever has most: who comes alone is not displaced by a crowd.
    fn oldest_of_the_most(&self) -> Option<(u64, Instant)> {
        let mut counts: BTreeMap<Origin, usize> = BTreeMap::new();
        for entry in self.entries.values() {
            *counts.entry(entry.origin).or_default() += 1;
        }
        let (crowd, _) = counts.into_iter().max_by_key(|(_, count)| *count)?;
        let mut entries = self.entries.iter();
        let (number, entry) = entries.find(|(_, entry)| entry.origin == crowd)?;
        Some((*number, entry.begun))
    }
}

impl Handshake {
    /// Waits until it has to make room for another.
    pub(crate) fn displaced(&self) -> impl Future<Output = ()> + use<> {
        let displaced = Arc::clone(&self.displaced);
        async move { displaced.notified().await }
    }
}

impl Drop for Handshake {
    fn drop(&mut self) {
        self.all.open().entries.remove(&self.number);
        self.all.left.notify_one();
    }
}

/// What every client is given, also when others wait: many times what a tool takes.
const GRACE: Duration = Duration::from_millis(250);

#[cfg(test)]
mod tests {
    use tokio::time::timeout;

    use super::*;

    async fn is_displaced(handshake: &Handshake) -> bool {
        timeout(Duration::ZERO, handshake.displaced()).await.is_ok()
    }

    #[tokio::test(start_paused = true)]
    async fn the_oldest_of_the_crowd_makes_room_after_its_time() {
        let all = Handshakes::new(3);
        let alone = all.begin(Origin::User(1));
        let crowd = [2, 2].map(|uid| all.begin(Origin::User(uid)));
        let begun = Instant::now();
        all.room().await;
        assert_eq!(begun.elapsed(), GRACE);
        assert!(is_displaced(&crowd[0]).await);
        assert!(!is_displaced(&crowd[1]).await && !is_displaced(&alone).await);
    }

    #[tokio::test(start_paused = true)]
    async fn who_ends_makes_room_at_once() {
        let all = Handshakes::new(2);
        let mut open = vec![all.begin(Origin::User(1)), all.begin(Origin::User(1))];
        let begun = Instant::now();
        drop(open.pop());
        all.room().await;
        assert!(begun.elapsed().is_zero());
        assert!(!is_displaced(&open[0]).await);
    }
}
