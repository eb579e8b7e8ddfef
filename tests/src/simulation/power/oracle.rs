use std::collections::BTreeMap;
use std::ops::Range;

use bitmap::{Era, EraMap};

use super::machine::File;
use super::shape::{CHUNK, SECTOR, Shape};

/// What must be true, told from what was written and from copies of the whole disk.
pub(super) struct Oracle {
    seed: u64,
    /// Of each chunk, when a write to it was last issued.
    issued: Vec<u64>,
    /// The same, or when a write ended in a crash that may have marked it.
    touched: Vec<u64>,
    /// What guests have begun and not ended.
    open: BTreeMap<u64, Range<u64>>,
    checkpoints: BTreeMap<u32, Checkpoint>,
    /// A checkpoint that is being made.
    making: Option<(u32, Era)>,
    client: Client,
    /// There was a power cut after which no start has ended, unless the end before it was clean.
    pub(super) in_doubt: bool,
    /// Since the last start has ended there was an end after which everything may be lost.
    pub(super) may_lose: bool,
    lost: Era,
    /// Eras in which nothing is written.
    pub(super) presumed: Vec<Era>,
    /// Whether nothing was in doubt when the server that runs started.
    sure: bool,
    /// When it had started.
    started: u64,
}

struct Checkpoint {
    era: Era,
    at: u64,
    /// The disk at its instant.
    copy: Vec<u8>,
    /// Someone was told of it, so it must not be lost.
    told: bool,
    /// Of each chunk, whether a power cut since may have left it in doubt.
    doubtful: Vec<bool>,
}

/// A backup client's chain: what it has, and of which checkpoint.
#[derive(Default)]
struct Client {
    copy: Vec<u8>,
    of: Option<u32>,
}

impl Oracle {
    pub(super) fn new(seed: u64, shape: &Shape) -> Self {
        let never = vec![0; shape.chunks() as usize];
        Self {
            seed,
            issued: never.clone(),
            touched: never,
            open: BTreeMap::new(),
            checkpoints: BTreeMap::new(),
            making: None,
            client: Client::default(),
            in_doubt: false,
            may_lose: false,
            lost: Era::NEVER,
            presumed: Vec::new(),
            sure: true,
            started: 0,
        }
    }

    pub(super) fn is_making(&self) -> bool {
        self.making.is_some()
    }

    /// The disk is to be larger, and what is new may be marked from now on.
    pub(super) fn grows(&mut self, new: &Range<u64>, now: u64) {
        self.may_be_marked(new, now);
    }

    /// This may be marked from now on, whoever writes there.
    pub(super) fn may_be_marked(&mut self, range: &Range<u64>, now: u64) {
        self.touched[chunks(range)].fill(now);
    }

    pub(super) fn begun(&mut self, number: u64, range: Range<u64>) {
        self.open.insert(number, range);
    }

    pub(super) fn ended(&mut self, number: u64) {
        self.open.remove(&number);
    }

    /// A write failed: it may have been marked.
    pub(super) fn failed(&mut self, number: u64, now: u64) {
        if let Some(range) = self.open.remove(&number) {
            self.touched[chunks(&range)].fill(now);
        }
    }

    pub(super) fn lost_era(&self) -> Era {
        self.lost
    }

    pub(super) fn issued(&mut self, range: &Range<u64>, now: u64) {
        self.issued[chunks(range)].fill(now);
        self.touched[chunks(range)].fill(now);
    }

    pub(super) fn crashed(&mut self, now: u64) {
        for range in std::mem::take(&mut self.open).into_values() {
            self.touched[chunks(&range)].fill(now);
        }
        self.making = None;
    }

    pub(super) fn power_cut(&mut self, active: &[bool], clean: bool) {
        if clean {
            return;
        }
        self.in_doubt = true;
        for checkpoint in self.checkpoints.values_mut() {
            for (doubtful, active) in checkpoint.doubtful.iter_mut().zip(active) {
                *doubtful |= active;
            }
        }
    }

    /// The map is damaged on a page: nothing on it need be believed, and a start that is interrupted
    /// believes nothing that is `active`.
    pub(super) fn rotted(&mut self, page: &Range<usize>, active: &[bool]) {
        let mut doubt = active.to_vec();
        doubt[page.clone()].fill(true);
        self.power_cut(&doubt, false);
    }

    /// What is left of the journal: only of this is anything known.
    pub(super) fn found_journal(&mut self, journal: &[u8]) {
        let found: Vec<u32> = records(journal)
            .filter(|record| record.kind == CHECKPOINT)
            .map(|record| record.id)
            .collect();
        let seed = self.seed;
        self.checkpoints.retain(|id, checkpoint| {
            let survived = found.contains(id);
            assert!(
                survived || !checkpoint.told,
                "seed {seed}: checkpoint {id} is lost"
            );
            survived
        });
    }

    /// A server that starts says that nothing of this era and before is known.
    pub(super) fn lost(&mut self, era: Era) {
        let seed = self.seed;
        assert!(
            era == self.lost || self.may_lose,
            "seed {seed}: everything up to {era:?} is given up for no reason"
        );
        self.lost = era;
        self.checkpoints
            .retain(|_, checkpoint| checkpoint.era > era);
    }

    pub(super) fn started(&mut self, sure: bool, now: u64) {
        self.in_doubt = false;
        self.may_lose = false;
        self.sure = sure;
        self.started = now;
        // Its record is durable, so whoever asks is told of it.
        for checkpoint in self.checkpoints.values_mut() {
            checkpoint.told = true;
        }
    }

    /// A checkpoint is to begin with `era`; its id.
    pub(super) fn make(&mut self, id: u32, era: Era) {
        self.making = Some((id, era));
    }

    /// It was not made.
    pub(super) fn unmake(&mut self, id: u32) {
        self.making = None;
        self.checkpoints.remove(&id);
    }

    /// The gate is closed.
    pub(super) fn captured(&mut self, map: &EraMap<File>, disk: &[u8], now: u64) {
        let (id, era) = self.making.take().expect("a checkpoint is being made");
        self.check(map, disk);
        let made = Checkpoint {
            era,
            at: now,
            copy: disk.to_vec(),
            told: false,
            doubtful: vec![false; self.issued.len()],
        };
        // A client's chain would go on by what is marked at this instant.
        let base = self.client.of.and_then(|id| self.checkpoints.get(&id));
        if let Some(base) = base {
            let mut copy = self.client.copy.clone();
            // What is new the client has from nowhere else.
            copy.resize(disk.len(), 0xee);
            for chunk in (0..count(disk)).filter(|c| map.era(*c as u64) >= base.era) {
                let place = place(chunk, disk);
                copy[place.clone()].copy_from_slice(&disk[place]);
            }
            let seed = self.seed;
            assert!(
                copy == disk,
                "seed {seed}: the chain up to checkpoint {id} does not restore its instant"
            );
        }
        self.checkpoints.insert(id, made);
    }

    /// Someone is told of checkpoint `id`, and a client has what it needs of it.
    pub(super) fn told(&mut self, id: u32) {
        let made = self.checkpoints.get_mut(&id).expect("it was made");
        made.told = true;
        self.client.copy.clone_from(&made.copy);
        self.client.of = Some(id);
        while self.checkpoints.len() > KEPT_MAX {
            self.checkpoints.pop_first();
        }
    }

    /// Compares what `map` says with what is on the disk. The bytes that this start presumed
    /// dirty, and that were not written since the newest checkpoint, if there is one.
    pub(super) fn check(&self, map: &EraMap<File>, disk: &[u8]) -> Option<u64> {
        let mut surplus = 0;
        for chunk in 0..count(disk) {
            let era = map.era(chunk as u64);
            let was_there = |c: &Checkpoint| (chunk + 1) * CHUNK_BYTES <= c.copy.len();
            let is_old = self.checkpoints.values().all(was_there);
            if era == Era::NEVER && self.issued[chunk] == 0 && is_old {
                continue;
            }
            let presumed = self.presumed.contains(&era);
            let seed = self.seed;
            assert!(
                !presumed || self.issued[chunk] <= self.started || era <= self.lost,
                "seed {seed}: chunk {chunk} was written, and counts as presumed"
            );
            assert!(
                !self.sure || self.presumed.last() != Some(&era),
                "seed {seed}: chunk {chunk} counts as presumed, when nothing was in doubt"
            );
            for (id, checkpoint) in &self.checkpoints {
                let dirty = era >= checkpoint.era;
                self.check_chunk(chunk, era, disk, *id, checkpoint);
                if !dirty || self.touched[chunk] > checkpoint.at {
                    continue;
                }
                assert!(
                    checkpoint.doubtful[chunk],
                    "seed {seed}: chunk {chunk} is dirty since checkpoint {id}, and was neither \
                     written nor in doubt"
                );
                assert!(
                    presumed,
                    "seed {seed}: chunk {chunk} is presumed dirty, and counts as written"
                );
                let newest = self.checkpoints.last_key_value().map(|(id, _)| id);
                if newest == Some(id) && self.presumed.last() == Some(&era) {
                    surplus += CHUNK;
                }
            }
        }
        (!self.checkpoints.is_empty()).then_some(surplus)
    }

    /// The same, while guests write: of what differs that it is dirty.
    pub(super) fn check_covered(&self, map: &EraMap<File>, disk: &[u8]) {
        for chunk in 0..count(disk) {
            let era = map.era(chunk as u64);
            for (id, checkpoint) in &self.checkpoints {
                self.check_chunk(chunk, era, disk, *id, checkpoint);
            }
        }
    }

    fn check_chunk(&self, chunk: usize, era: Era, disk: &[u8], id: u32, checkpoint: &Checkpoint) {
        let then = &checkpoint.copy[place(chunk, &checkpoint.copy)];
        let same = disk[place(chunk, disk)] == *then;
        assert!(
            same || era >= checkpoint.era,
            "seed {}: chunk {chunk} differs from checkpoint {id} (era {:?}) and is clean ({era:?})",
            self.seed,
            checkpoint.era
        );
    }

    pub(super) fn checkpoint_count(&self) -> usize {
        self.checkpoints.len()
    }
}

fn chunks(range: &Range<u64>) -> Range<usize> {
    (range.start / CHUNK) as usize..range.end.div_ceil(CHUNK) as usize
}

/// Where the sectors of `chunk` are; nowhere on a disk that is too small.
fn place(chunk: usize, disk: &[u8]) -> Range<usize> {
    (chunk * CHUNK_BYTES).min(disk.len())..((chunk + 1) * CHUNK_BYTES).min(disk.len())
}

/// How many chunks a disk has.
fn count(disk: &[u8]) -> usize {
    disk.len().div_ceil(CHUNK_BYTES)
}

/// As four bytes for each sector.
const CHUNK_BYTES: usize = (CHUNK / SECTOR) as usize * 4;

/// A record of the journal.
#[derive(Clone, Copy)]
pub(super) struct Record {
    pub(super) kind: u32,
    pub(super) id: u32,
    pub(super) era: u32,
}

impl Record {
    pub(super) fn bytes(self) -> Vec<u8> {
        let words = [self.kind, self.id, self.era, 0];
        words.into_iter().flat_map(u32::to_le_bytes).collect()
    }
}

/// The records that are whole.
pub(super) fn records(journal: &[u8]) -> impl Iterator<Item = Record> + '_ {
    let word = |bytes: &[u8]| u32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]);
    let record = move |bytes: &[u8]| Record {
        kind: word(bytes),
        id: word(&bytes[4..]),
        era: word(&bytes[8..]),
    };
    journal.chunks_exact(16).map(record).filter(|r| r.kind != 0)
}

pub(super) const STARTED: u32 = 1;
pub(super) const CHECKPOINT: u32 = 2;
/// Older ones are deleted.
const KEPT_MAX: usize = 5;
