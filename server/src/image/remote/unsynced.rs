use std::collections::VecDeque;
use std::ops::Range;

use block::Zeroing;
use bytes::Bytes;

/// A change of an export, in whole blocks of it.
#[derive(Clone, Debug)]
pub(super) struct Change {
    /// In bytes.
    pub(super) range: Range<u64>,
    /// What becomes of it.
    pub(super) what: What,
}

/// What becomes of a range.
#[derive(Clone, Debug)]
pub(super) enum What {
    Write(Bytes),
    Zero(Zeroing),
}

/// Changes that were answered, and that a server which is killed may lose: what they wrote, until a
/// flush that was sent after their answers has succeeded.
///
/// A server that comes back is given all of it again, in this order, before anything else is asked of
/// it. So no byte that a guest has been told of is lost with a server that had it in memory.
#[derive(Debug, Default)]
pub(super) struct Unsynced {
    changes: VecDeque<Change>,
    bytes: usize,
    /// How many have been dropped from the front.
    dropped: u64,
}

impl Unsynced {
    /// Adds what has been answered just now.
    pub(super) fn push(&mut self, mut change: Change) {
        if let What::Write(data) = &mut change.what
            && data.len() < COPIED_BELOW
        {
            *data = Bytes::copy_from_slice(data);
        }
        self.bytes += change.cost();
        self.changes.push_back(change);
    }

    /// What a flush that is sent now covers.
    pub(super) fn mark(&self) -> u64 {
        self.dropped + self.changes.len() as u64
    }

    /// The flush that was sent at `mark` has succeeded. Returns what is durable with it.
    pub(super) fn synced(&mut self, mark: u64) -> Vec<Change> {
        let mut durable = Vec::new();
        while self.dropped < mark
            && let Some(change) = self.changes.pop_front()
        {
            self.bytes -= change.cost();
            self.dropped += 1;
            durable.push(change);
        }
        durable
    }

    /// From the oldest to the latest.
    pub(super) fn all(&self) -> impl Iterator<Item = &Change> {
        self.changes.iter()
    }

    /// Whether it is time for a flush that nobody has asked for.
    pub(super) fn is_long(&self) -> bool {
        self.bytes > BYTES_WANTED || self.changes.len() > CHANGES_WANTED
    }

    /// Whether nothing more is to be added before a flush.
    pub(super) fn is_full(&self) -> bool {
        self.bytes > 2 * BYTES_WANTED || self.changes.len() > 2 * CHANGES_WANTED
    }

    /// All of it in order, in runs of at most `limit` changes that do not touch each other.
    pub(super) fn runs(&self, limit: usize) -> Vec<Vec<Change>> {
        let mut runs: Vec<Vec<Change>> = Vec::new();
        for change in &self.changes {
            match runs.last_mut() {
                Some(run) if run.len() < limit && !run.iter().any(|c| c.touches(&change.range)) => {
                    run.push(change.clone());
                }
                _ => runs.push(vec![change.clone()]),
            }
        }
        runs
    }
}

impl Change {
    /// Whether it changes anything of `range`.
    pub(super) fn touches(&self, range: &Range<u64>) -> bool {
        meets(&self.range, range)
    }

    fn cost(&self) -> usize {
        match &self.what {
            What::Write(data) => data.len(),
            What::Zero(_) => 0,
        }
    }
}

/// Whether two ranges have a byte in common.
pub(super) fn meets(one: &Range<u64>, other: &Range<u64>) -> bool {
    one.start < other.end && other.start < one.end
}

/// So much is kept before a flush is sent for the sake of memory alone: more than guests write between
/// two flushes of their own, mostly.
const BYTES_WANTED: usize = 16 << 20;

/// The same in changes, with what each takes beside its data.
const CHANGES_WANTED: usize = 4096;

/// A small write would keep alive all that was received with it.
const COPIED_BELOW: usize = 64 << 10;

#[cfg(test)]
mod tests {
    use super::*;

    fn write(start: u64) -> Change {
        let data = Bytes::from_static(&[1; 512]);
        let range = start..start + data.len() as u64;
        let what = What::Write(data);
        Change { range, what }
    }

    #[test]
    fn a_flush_covers_what_was_answered_before_it_was_sent() {
        let mut unsynced = Unsynced::default();
        unsynced.push(write(0));
        let mark = unsynced.mark();
        unsynced.push(write(512));
        unsynced.synced(mark);
        assert_eq!(unsynced.changes.len(), 1);
        assert_eq!(unsynced.changes[0].range.start, 512);
        unsynced.synced(mark);
        assert_eq!((unsynced.changes.len(), unsynced.bytes), (1, 512));
    }

    #[test]
    fn what_touches_is_never_in_one_run() {
        let mut unsynced = Unsynced::default();
        for start in [0, 512, 100, 4096, 0] {
            unsynced.push(write(start));
        }
        let starts: Vec<Vec<u64>> = unsynced
            .runs(8)
            .iter()
            .map(|run| run.iter().map(|change| change.range.start).collect())
            .collect();
        assert_eq!(starts, [vec![0, 512], vec![100, 4096], vec![0]]);
        assert_eq!(unsynced.runs(1).len(), 5);
    }
}
