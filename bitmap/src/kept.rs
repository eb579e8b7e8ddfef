use std::io;
use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use crate::PageStore;

/// What is in memory as well as in a store, so that it can be stored anew in another one.
///
/// Of a file whose sync has failed nobody knows what is in it, and a later sync that succeeds proves
/// nothing: the kernel may have dropped what it could not write. Another file can take its place.
/// From [`begin_anew`](Self::begin_anew) on whatever is stored goes into both; each part is
/// [copied](Self::copy_part) from memory; and with [`end_anew`](Self::end_anew) one of the two goes.
pub trait Kept {
    /// What it is kept in.
    type Store: PageStore;

    /// The store, to be synced.
    fn store(&self) -> Arc<Self::Store>;

    /// How many parts there are to copy.
    fn parts(&self) -> u64;

    /// Stores everything in `next` too from now on.
    fn begin_anew(&self, next: Arc<Self::Store>);

    /// Copies a part from memory to the next store.
    fn copy_part(&self, part: u64) -> io::Result<()>;

    /// From now on there is one store again: the next one if it has `succeeded`.
    fn end_anew(&self, succeeded: bool);
}

/// Where things are stored, and while another store is to take its place, that one too.
#[derive(Debug)]
pub(crate) struct Stores<P>(RwLock<Both<P>>);

#[derive(Debug)]
pub(crate) struct Both<P> {
    current: Arc<P>,
    pub(crate) next: Option<Arc<P>>,
}

impl<P: PageStore> Both<P> {
    /// Counts as stored only if it is in both.
    pub(crate) fn store(&self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        self.current.store(offset, bytes)?;
        self.next
            .as_ref()
            .map_or(Ok(()), |next| next.store(offset, bytes))
    }

    /// In both.
    pub(crate) fn make_room(&self, length: u64) -> io::Result<()> {
        let mut both = [Some(&self.current), self.next.as_ref()].into_iter();
        both.try_for_each(|store| store.map_or(Ok(()), |store| store.make_room(length)))
    }
}

impl<P> Stores<P> {
    pub(crate) fn new(store: P) -> Self {
        Self(RwLock::new(Both {
            current: Arc::new(store),
            next: None,
        }))
    }

    /// Held while something is stored, until it is in memory as well.
    pub(crate) fn shared(&self) -> RwLockReadGuard<'_, Both<P>> {
        self.0.read().unwrap_or_else(PoisonError::into_inner)
    }

    /// Held while nothing is stored and memory is what is stored.
    pub(crate) fn alone(&self) -> RwLockWriteGuard<'_, Both<P>> {
        self.0.write().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn current(&self) -> Arc<P> {
        Arc::clone(&self.shared().current)
    }

    pub(crate) fn begin(&self, next: Arc<P>) {
        self.alone().next = Some(next);
    }

    pub(crate) fn end(&self, succeeded: bool) {
        let mut both = self.alone();
        if let Some(next) = both.next.take().filter(|_| succeeded) {
            both.current = next;
        }
    }
}
