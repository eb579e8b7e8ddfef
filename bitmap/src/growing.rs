use std::sync::OnceLock;
use std::sync::atomic::{AtomicUsize, Ordering};

/// A list that can grow while others look into it: what is in it never moves.
///
/// What was there from the beginning is one slice, so that looking costs a comparison more than in a
/// list that cannot grow. Behind it come slices that each double what is there.
#[derive(Debug)]
pub(crate) struct Growing<T> {
    first: Box<[T]>,
    later: Box<[OnceLock<Box<[T]>>]>,
    length: AtomicUsize,
}

impl<T> Growing<T> {
    /// How many there are.
    pub(crate) fn len(&self) -> usize {
        self.length.load(Ordering::Acquire)
    }

    /// The one with this number, which is less than [`len`](Self::len).
    pub(crate) fn at(&self, number: usize) -> &T {
        match self.first.get(number) {
            Some(found) => found,
            None => self.later_at(number),
        }
    }

    #[cold]
    fn later_at(&self, number: usize) -> &T {
        let (slice, begin) = self.place(number);
        let slice = self.later[slice].get().expect("it is within the length");
        &slice[number - begin]
    }

    /// Makes it `length` long, if it is shorter, with what `make` makes. One at a time may call this.
    pub(crate) fn grow(&self, length: usize, make: impl Fn() -> T) {
        while self.len() < length {
            let (slice, begin) = self.place(self.len().max(self.first.len()));
            let end = begin * 2;
            self.later[slice].get_or_init(|| (begin..end).map(|_| make()).collect());
            self.length.store(length.min(end), Ordering::Release);
        }
    }

    /// Which of the later slices has `number`, and the number that it begins with.
    fn place(&self, number: usize) -> (usize, usize) {
        let doubled = (number / self.first.len()).ilog2();
        (doubled as usize, self.first.len() << doubled)
    }
}

impl<T> FromIterator<T> for Growing<T> {
    /// One that is to grow must begin with at least one.
    fn from_iter<I: IntoIterator<Item = T>>(items: I) -> Self {
        let first: Box<[T]> = items.into_iter().collect();
        Self {
            length: AtomicUsize::new(first.len()),
            later: (0..LATER).map(|_| OnceLock::new()).collect(),
            first,
        }
    }
}

/// No list is longer than what 64 bits can count.
const LATER: usize = usize::BITS as usize;

#[cfg(test)]
mod tests {
    use std::cell::Cell;

    use super::*;

    #[test]
    fn what_is_in_it_stays_where_it_is_and_what_is_new_is_behind() {
        let next = Cell::new(0);
        let make = || next.replace(next.get() + 1);
        for first in 1..6 {
            next.set(0);
            let list: Growing<usize> = (0..first).map(|_| make()).collect();
            let before = std::ptr::from_ref(list.at(0));
            for length in [first, first + 1, 3 * first, 3 * first - 1, 100, 101] {
                let longest = length.max(list.len());
                list.grow(length, make);
                assert_eq!(list.len(), longest);
                for number in 0..longest {
                    assert_eq!(*list.at(number), number, "{first} of {longest}");
                }
            }
            assert_eq!(std::ptr::from_ref(list.at(0)), before);
        }
    }
}
