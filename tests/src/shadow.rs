//! What a disk may hold and must have marked, told from what clients asked for and were answered.
//!
//! Time is a counter. A change happened somewhere between its being issued and its being answered;
//! one that was never answered happened, or not, before the server ended. So of each sector we know a
//! set of stamps that it may hold, and of each span between two instants the chunks that must be
//! dirty and those that may be.

use std::collections::BTreeSet;

use crate::Extent;

/// When something happened: after the first, and before the second.
pub type Instant = (u64, u64);

/// What a client asked for.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Change {
    /// Fill with a stamp, or with zeroes if it is zero.
    Fill(u64),
    /// Forget: what is there is old or zero.
    Trim,
}

/// A change of some sectors of one disk.
#[derive(Clone, Copy, Debug)]
pub struct Event {
    /// In bytes, at a sector's start.
    pub offset: u64,
    /// In bytes, whole sectors.
    pub length: u64,
    /// What was asked for.
    pub change: Change,
    /// Before it was sent.
    pub issued: u64,
    /// After it was answered, or the server had ended.
    pub ended: u64,
    /// Whether the server said that it was done.
    pub acknowledged: bool,
}

/// Everything that was asked of one disk. Changes of one sector are never in flight together.
#[derive(Clone, Debug)]
pub struct Shadow {
    size: u64,
    chunk: u64,
    events: Vec<Event>,
}

impl Shadow {
    /// A disk of zeroes with chunks of this size.
    pub fn new(size: u64, chunk: u64) -> Self {
        Self {
            size,
            chunk,
            events: Vec::new(),
        }
    }

    /// The size of the disk.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// Adds what happened meanwhile.
    pub fn add(&mut self, events: impl IntoIterator<Item = Event>) {
        self.events.extend(events);
        self.events.sort_by_key(|event| event.issued);
    }

    /// Sees that `bytes` is what the disk may have held at `instant`.
    #[track_caller]
    pub fn check_bytes(&self, bytes: &[u8], instant: Instant, what: &str) {
        assert_eq!(bytes.len() as u64, self.size, "{what}: the size");
        let mut sectors = vec![vec![0_u64]; (self.size / SECTOR) as usize];
        for event in self.events.iter().filter(|event| event.issued < instant.1) {
            let sure = event.acknowledged && event.ended < instant.0;
            let first = (event.offset / SECTOR) as usize;
            let count = (event.length / SECTOR) as usize;
            for may_hold in &mut sectors[first..first + count] {
                let stamp = match event.change {
                    Change::Fill(stamp) if sure => {
                        *may_hold = vec![stamp];
                        continue;
                    }
                    Change::Fill(stamp) => stamp,
                    Change::Trim => 0,
                };
                if !may_hold.contains(&stamp) {
                    may_hold.push(stamp);
                }
            }
        }
        for (number, (held, may_hold)) in bytes.chunks(SECTOR as usize).zip(&sectors).enumerate() {
            let stamp = u64::from_le_bytes(held[..8].try_into().expect("eight bytes"));
            let whole = held.chunks(8).all(|part| part == &held[..8]);
            assert!(
                whole && may_hold.contains(&stamp),
                "{what}: sector {number} holds {stamp} (whole: {whole}), may hold {may_hold:?}"
            );
        }
    }

    /// Sees that `map` has every chunk that changed between `since` and `until`, and no chunk for
    /// which that was not even asked.
    #[track_caller]
    pub fn check_map(&self, map: &[Extent], (since, until): (Instant, Instant), what: &str) {
        let dirty = self.dirty(map);
        let (must, may) = self.must_and_may(since, until);
        let missing: Vec<_> = must.difference(&dirty).collect();
        assert!(missing.is_empty(), "{what}: chunks {missing:?} are clean");
        if crate::base::is_elsewhere() {
            // After a kill of the server what was being written counts as changed.
            return;
        }
        let surplus: Vec<_> = dirty.difference(&may).collect();
        assert!(surplus.is_empty(), "{what}: chunks {surplus:?} are dirty");
    }

    /// The chunks that must be dirty, and those that may be.
    pub fn must_and_may(&self, since: Instant, until: Instant) -> (BTreeSet<u64>, BTreeSet<u64>) {
        let (mut must, mut may) = (BTreeSet::new(), BTreeSet::new());
        for event in &self.events {
            let first = event.offset / self.chunk;
            let last = (event.offset + event.length - 1) / self.chunk;
            if event.ended > since.0 && event.issued < until.1 {
                may.extend(first..=last);
            }
            if event.acknowledged && event.issued > since.1 && event.ended < until.0 {
                must.extend(first..=last);
            }
        }
        (must, may)
    }

    /// The chunks that a map says are dirty.
    pub fn dirty(&self, map: &[Extent]) -> BTreeSet<u64> {
        map.iter()
            .filter(|extent| extent.2 == 1)
            .flat_map(|extent| extent.0 / self.chunk..(extent.0 + extent.1).div_ceil(self.chunk))
            .collect()
    }
}

/// What storage writes whole or not at all.
pub const SECTOR: u64 = 512;

#[cfg(test)]
mod tests {
    use super::*;

    fn write(stamp: u64, (issued, ended): Instant, acknowledged: bool) -> Event {
        Event {
            offset: 0,
            length: SECTOR,
            change: Change::Fill(stamp),
            issued,
            ended,
            acknowledged,
        }
    }

    #[test]
    fn a_change_that_was_not_answered_may_or_may_not_have_happened() {
        let mut shadow = Shadow::new(8192, 4096);
        shadow.add([write(5, (1, 2), true), write(6, (3, 4), false)]);
        let mut bytes = vec![0; 8192];
        for stamp in [5_u8, 6] {
            bytes[..512].copy_from_slice(&[stamp, 0, 0, 0, 0, 0, 0, 0].repeat(64));
            shadow.check_bytes(&bytes, (9, 9), "either");
        }
        let (must, may) = shadow.must_and_may((0, 0), (9, 9));
        assert_eq!((must.len(), may.len()), (1, 1));
        let (must, may) = shadow.must_and_may((2, 2), (9, 9));
        assert_eq!((must.len(), may.len()), (0, 1));
    }

    #[test]
    #[should_panic(expected = "sector 0 holds 0")]
    fn an_acknowledged_write_that_is_missing_is_seen() {
        let mut shadow = Shadow::new(4096, 4096);
        shadow.add([write(5, (1, 2), true)]);
        shadow.check_bytes(&[0; 4096], (9, 9), "lost");
    }
}
