use std::collections::BTreeMap;

use crate::simulation::sim::Sim;

/// A file as a power cut may leave it: each sector keeps every state since it was last synced.
///
/// A sync is two events. What was stored before it began is durable once it has ended; what was
/// stored in between may be, or not. What is not durable may still reach the disk at any time, each
/// sector by itself and in any of its states.
pub(super) struct Medium {
    /// The bytes of a sector.
    unit: usize,
    now: Vec<u8>,
    /// Of each sector that is not durable: what it may be, oldest first, and since when.
    loose: BTreeMap<usize, Vec<(u64, Vec<u8>)>>,
    clock: u64,
}

impl Medium {
    /// A durable file of `size` zeroes.
    pub(super) fn new(unit: usize, size: usize) -> Self {
        Self {
            unit,
            now: vec![0; size],
            loose: BTreeMap::new(),
            clock: 0,
        }
    }

    /// A new file beside it, as long, which is durable as soon as it has a name.
    pub(super) fn successor(&self) -> Self {
        Self::new(self.unit, self.now.len())
    }

    /// What whoever reads it sees.
    pub(super) fn now(&self) -> &[u8] {
        &self.now
    }

    pub(super) fn load(&self, offset: usize, bytes: &mut [u8]) {
        bytes.fill(0);
        let found = self.now.get(offset..).unwrap_or_default();
        let length = found.len().min(bytes.len());
        bytes[..length].copy_from_slice(&found[..length]);
    }

    pub(super) fn store(&mut self, offset: usize, bytes: &[u8]) {
        let end = (offset + bytes.len()).next_multiple_of(self.unit);
        if self.now.len() < end {
            self.now.resize(end, 0);
        }
        self.clock += 1;
        let mut at = 0;
        while at < bytes.len() {
            let sector = (offset + at) / self.unit;
            let length = ((sector + 1) * self.unit - offset - at).min(bytes.len() - at);
            let whole = sector * self.unit..(sector + 1) * self.unit;
            let states = self
                .loose
                .entry(sector)
                .or_insert_with(|| vec![(0, self.now[whole.clone()].to_vec())]);
            self.now[offset + at..offset + at + length].copy_from_slice(&bytes[at..at + length]);
            states.push((self.clock, self.now[whole].to_vec()));
            at += length;
        }
    }

    /// A sync begins now; what is returned is to be given back when it ends.
    pub(super) fn begin_sync(&self) -> u64 {
        self.clock
    }

    /// The sync that began at `begun` has ended.
    pub(super) fn end_sync(&mut self, begun: u64) {
        self.loose.retain(|_, states| {
            let floor = states.iter().rposition(|(stored, _)| *stored <= begun);
            states.drain(..floor.unwrap_or(0));
            states.len() > 1
        });
    }

    /// What is at `offset` is not what was stored there any more.
    pub(super) fn damage(&mut self, offset: usize, bytes: &[u8]) {
        self.now[offset..offset + bytes.len()].copy_from_slice(bytes);
    }

    /// A sync has failed: what is not durable may be what it is now, or not, and the kernel does not
    /// try again. A sector that is stored anew is like any other.
    pub(super) fn fail_sync(&mut self) {
        for states in self.loose.values_mut() {
            for (stored, _) in states {
                *stored = u64::MAX;
            }
        }
    }

    /// Everything that is there is durable.
    pub(super) fn settle(&mut self) {
        self.loose.clear();
    }

    /// The power is cut, and is back.
    pub(super) fn lose_power(&mut self, sim: &Sim) {
        // Often all of a file is late, or all of it is there: few others would be as telling.
        let habit = sim.below(4);
        for (sector, states) in std::mem::take(&mut self.loose) {
            let last = states.len() - 1;
            let left = match habit {
                0 => 0,
                1 => last,
                2 => sim.one_of(&[0, last]),
                _ => sim.below(states.len() as u64) as usize,
            };
            let whole = sector * self.unit..(sector + 1) * self.unit;
            self.now[whole].copy_from_slice(&states[left].1);
        }
    }
}
