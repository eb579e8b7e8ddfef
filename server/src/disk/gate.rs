use std::ops::Deref;
use std::sync::{Arc, PoisonError, RwLock};

use tokio::sync::Notify;

use crate::sync::{AtomicBool, AtomicUsize, Ordering, fence};

/// What everyone enters who changes something, and what can be closed to have a moment without
/// change.
///
/// Whoever is inside sees one value of `T` throughout. Entering is counting and looking; closing is
/// setting a flag and waiting for the count to fall to zero.
pub struct Gate<T> {
    inside: AtomicUsize,
    closed: AtomicBool,
    /// Replaced only while closed and empty, or by [`replace`](Self::replace).
    current: RwLock<Arc<T>>,
    left: Notify,
    reopened: Notify,
}

/// Leave to be inside, until it is dropped.
pub struct Pass<'a, T> {
    gate: &'a Gate<T>,
    current: Arc<T>,
}

/// A gate that nobody is inside of and nobody can enter, until this is dropped.
pub struct Closed<'a, T> {
    gate: &'a Gate<T>,
}

impl<T> Gate<T> {
    /// An open gate.
    pub fn new(current: T) -> Self {
        Self {
            inside: AtomicUsize::new(0),
            closed: AtomicBool::new(false),
            current: RwLock::new(Arc::new(current)),
            left: Notify::new(),
            reopened: Notify::new(),
        }
    }

    /// Waits while the gate is closed, and enters.
    pub async fn enter(&self) -> Pass<'_, T> {
        loop {
            let reopened = self.reopened.notified();
            tokio::pin!(reopened);
            reopened.as_mut().enable();
            if self.try_enter() {
                return Pass {
                    gate: self,
                    current: self.current(),
                };
            }
            reopened.await;
        }
    }

    fn try_enter(&self) -> bool {
        self.inside.fetch_add(1, Ordering::SeqCst);
        // Either we see the flag here, or whoever sets it sees us in the count.
        fence(Ordering::SeqCst);
        if !self.closed.load(Ordering::SeqCst) {
            return true;
        }
        self.leave();
        false
    }

    fn leave(&self) {
        if self.inside.fetch_sub(1, Ordering::SeqCst) == 1 {
            self.left.notify_waiters();
        }
    }

    /// Keeps everyone out who is not inside yet. Only one at a time may close a gate.
    ///
    /// What is returned reopens the gate when it is dropped, also before anyone waited for
    /// [`emptied`](Closed::emptied).
    pub fn close(&self) -> Closed<'_, T> {
        let was_closed = self.closed.swap(true, Ordering::SeqCst);
        assert!(!was_closed, "instants are taken one after the other");
        fence(Ordering::SeqCst);
        Closed { gate: self }
    }

    /// What whoever enters now will see.
    pub fn current(&self) -> Arc<T> {
        Arc::clone(&self.current.read().unwrap_or_else(PoisonError::into_inner))
    }

    /// Puts `next` in place without closing: whoever is inside goes on with what it saw.
    pub fn replace(&self, next: Arc<T>) {
        *self.current.write().unwrap_or_else(PoisonError::into_inner) = next;
    }
}

impl<T> Deref for Pass<'_, T> {
    type Target = T;

    fn deref(&self) -> &T {
        &self.current
    }
}

impl<T> Drop for Pass<'_, T> {
    fn drop(&mut self) {
        self.gate.leave();
    }
}

impl<T> Closed<'_, T> {
    /// Returns when nobody is inside any more.
    pub async fn emptied(&self) {
        loop {
            let left = self.gate.left.notified();
            tokio::pin!(left);
            left.as_mut().enable();
            if self.gate.inside.load(Ordering::SeqCst) == 0 {
                return;
            }
            left.await;
        }
    }

    /// What whoever enters after the gate has been reopened will see.
    pub fn set(&self, next: Arc<T>) {
        *self
            .gate
            .current
            .write()
            .unwrap_or_else(PoisonError::into_inner) = next;
    }
}

impl<T> Drop for Closed<'_, T> {
    fn drop(&mut self) {
        self.gate.closed.store(false, Ordering::SeqCst);
        self.gate.reopened.notify_waiters();
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    const NOW: Duration = Duration::ZERO;

    #[tokio::test]
    async fn a_closed_gate_waits_for_those_inside_and_lets_nobody_in() {
        let gate = Gate::new(1);
        let inside = gate.enter().await;
        let closed = gate.close();
        assert!(tokio::time::timeout(NOW, closed.emptied()).await.is_err());
        assert!(tokio::time::timeout(NOW, gate.enter()).await.is_err());
        drop(inside);
        closed.emptied().await;

        closed.set(Arc::new(2));
        let waiting = gate.enter();
        tokio::pin!(waiting);
        assert!(tokio::time::timeout(NOW, waiting.as_mut()).await.is_err());
        drop(closed);
        assert_eq!(*waiting.await, 2);
    }

    #[tokio::test]
    async fn a_pass_sees_one_value_whatever_is_put_in_place_meanwhile() {
        let gate = Gate::new(1);
        let pass = gate.enter().await;
        gate.replace(Arc::new(2));
        assert_eq!(*pass, 1);
        assert_eq!(*gate.enter().await, 2);
    }
}

#[cfg(all(test, feature = "loom"))]
#[path = "gate/loom.rs"]
mod loom_tests;
