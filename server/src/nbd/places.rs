//! How many clients are served at once, in all and of each peer.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::peer::Origin;

/// The places for clients of one role.
#[derive(Debug)]
pub(crate) struct Places {
    in_all: usize,
    for_each: usize,
    /// How many each has. Held only to count.
    taken: Mutex<BTreeMap<Origin, usize>>,
}

/// A place, for as long as this lives.
#[derive(Debug)]
pub(crate) struct Place {
    places: Arc<Places>,
    origin: Origin,
}

impl Places {
    pub(crate) fn new(in_all: usize, for_each: usize) -> Arc<Self> {
        Arc::new(Self {
            in_all,
            for_each,
            taken: Mutex::default(),
        })
    }

    /// Takes a place, or says why there is none.
    pub(crate) fn take(self: &Arc<Self>, origin: Origin) -> Result<Place, String> {
        let mut taken = self.taken();
        if taken.values().sum::<usize>() >= self.in_all {
            return Err(format!("{} clients are served already", self.in_all));
        }
        let own = taken.entry(origin).or_default();
        if *own >= self.for_each {
            let most = self.for_each;
            return Err(format!("{most} clients of {origin} are served already"));
        }
        *own += 1;
        drop(taken);
        Ok(Place {
            places: Arc::clone(self),
            origin,
        })
    }

    fn taken(&self) -> MutexGuard<'_, BTreeMap<Origin, usize>> {
        self.taken.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut taken = self.places.taken();
        if let Some(own) = taken.get_mut(&self.origin) {
            *own -= 1;
            if *own == 0 {
                taken.remove(&self.origin);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places_are_limited_in_all_and_for_each_and_are_given_back() {
        let places = Places::new(3, 2);
        let one = Origin::User(1);
        let mut held = vec![places.take(one).unwrap(), places.take(one).unwrap()];
        let why = places.take(one).unwrap_err();
        assert_eq!(why, "2 clients of uid 1 are served already");
        held.push(places.take(Origin::User(2)).unwrap());
        let why = places.take(Origin::User(3)).unwrap_err();
        assert_eq!(why, "3 clients are served already");

        drop(held.remove(0));
        held.push(places.take(one).unwrap());
        drop(held);
        assert!(places.taken().is_empty());
    }
}
