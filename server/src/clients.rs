//! Who has a disk open, and how they are told to leave it.
//!
//! Whoever performs requests, on a disk or on what a backup keeps of it, has a seat there. Once all are told
//! to leave nobody gets one any more, and a seat is given back when all that was begun on it has
//! ended: with the last one, nothing is read or written any more.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::{Notify, watch};

use crate::export::Role;

/// The clients of one disk.
pub(crate) struct Clients {
    /// Held only to look and to count, and when everybody is told to leave.
    taken: Mutex<Taken>,
    /// Why everybody is to leave, if so.
    leave: watch::Sender<Option<&'static str>>,
    left: Notify,
}

#[derive(Default)]
struct Taken {
    /// What each has open, and who it is.
    seats: BTreeMap<u64, (Role, String)>,
    next: u64,
}

/// Leave to be a client, until it is dropped.
pub(crate) struct Seat {
    clients: Arc<Clients>,
    number: u64,
    leave: watch::Receiver<Option<&'static str>>,
}

impl Clients {
    /// None yet.
    pub(crate) fn new() -> Arc<Self> {
        Arc::new(Self {
            taken: Mutex::default(),
            leave: watch::Sender::new(None),
            left: Notify::new(),
        })
    }

    /// Takes a seat for `peer`, unless everybody is to leave.
    pub(crate) fn enter(self: &Arc<Self>, role: Role, peer: String) -> Option<Seat> {
        let mut taken = self.taken();
        // Under the lock: either whoever tells us to leave is seen here, or we are seen there.
        if self.leave.borrow().is_some() {
            return None;
        }
        let number = taken.next;
        taken.next += 1;
        taken.seats.insert(number, (role, peer));
        Some(Seat {
            clients: Arc::clone(self),
            number,
            leave: self.leave.subscribe(),
        })
    }

    /// Tells everybody to leave, and why.
    pub(crate) fn dismiss(&self, why: &'static str) {
        let _taken = self.taken();
        self.leave.send_replace(Some(why));
    }

    /// The same, unless the disk itself is open: then it says by whom, and nothing has happened.
    pub(crate) fn dismiss_unless_used(&self, why: &'static str) -> Result<(), Vec<String>> {
        let taken = self.taken();
        let live = taken.seats.values().filter(|(role, _)| *role == Role::Live);
        let peers: Vec<String> = live.map(|(_, peer)| peer.clone()).collect();
        if !peers.is_empty() {
            return Err(peers);
        }
        self.leave.send_replace(Some(why));
        Ok(())
    }

    /// Waits until there are none.
    pub(crate) async fn gone(&self) {
        loop {
            let left = self.left.notified();
            tokio::pin!(left);
            left.as_mut().enable();
            if self.taken().seats.is_empty() {
                return;
            }
            left.await;
        }
    }

    fn taken(&self) -> MutexGuard<'_, Taken> {
        self.taken.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Seat {
    /// Waits until everybody is to leave, and says why.
    pub(crate) async fn dismissed(&mut self) -> &'static str {
        let why = self.leave.wait_for(Option::is_some).await;
        let why = why.ok().and_then(|why| *why);
        why.expect("whoever could say it no more goes after us")
    }
}

impl Drop for Seat {
    fn drop(&mut self) {
        self.clients.taken().seats.remove(&self.number);
        self.clients.left.notify_waiters();
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use tokio::time::timeout;

    use super::*;

    fn enter(clients: &Arc<Clients>, role: Role) -> Option<Seat> {
        clients.enter(role, format!("{role:?}"))
    }

    #[tokio::test]
    async fn nobody_enters_once_all_are_told_to_leave_and_the_last_one_ends_it() {
        let clients = Clients::new();
        let mut seats: Vec<Seat> = [Role::Live, Role::Backup]
            .iter()
            .filter_map(|role| enter(&clients, *role))
            .collect();
        assert_eq!(seats.len(), 2);
        clients.dismiss("over");
        assert!(enter(&clients, Role::Live).is_none());
        for seat in &mut seats {
            assert_eq!(seat.dismissed().await, "over");
        }
        drop(seats.pop());
        assert!(timeout(Duration::ZERO, clients.gone()).await.is_err());
        drop(seats);
        clients.gone().await;
    }

    #[tokio::test]
    async fn only_who_has_the_disk_itself_is_in_the_way() {
        let clients = Clients::new();
        let live = enter(&clients, Role::Live);
        let mut frozen = enter(&clients, Role::Backup).unwrap();
        let found = clients.dismiss_unless_used("over");
        assert_eq!(found, Err(vec!["Live".to_owned()]));
        assert!(timeout(Duration::ZERO, frozen.dismissed()).await.is_err());
        drop(live);
        clients.dismiss_unless_used("over").unwrap();
        assert_eq!(frozen.dismissed().await, "over");
    }
}
