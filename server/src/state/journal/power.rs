//! Kills, power cuts and faults, drawn from a seed, at every step of a journal's life.
//!
//! What was acknowledged is there afterwards. What was not may be there or not, and what once was
//! undone does not come back.

mod storage;

use std::rc::Rc;

use uuid::Uuid;

use self::storage::{Machine, SimFile};
use super::super::ledger::Ledger;
use super::*;

#[test]
fn whatever_is_cut_off_what_was_acknowledged_is_there_and_what_was_undone_is_not() {
    let mut tally = Tally::default();
    for seed in 1..=SEEDS {
        Life::play(seed, &mut tally);
    }
    // A simulation in which nothing happens proves nothing.
    assert!(
        tally.crashes > SEEDS && tally.rewritings > SEEDS,
        "{tally:?}"
    );
    assert!(
        tally.faults > SEEDS && tally.maybes_found > SEEDS / 10,
        "{tally:?}"
    );
    assert!(tally.maybes_lost > SEEDS / 10, "{tally:?}");
}

#[derive(Debug, Default)]
struct Tally {
    crashes: u64,
    rewritings: u64,
    faults: u64,
    maybes_found: u64,
    maybes_lost: u64,
}

/// Something that was said to a journal.
struct Said {
    record: Record,
    standing: Standing,
}

#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Standing {
    /// It was acknowledged, or there when something later was.
    Sure,
    /// It is in the ledger, and durable when the next call succeeds.
    Owed,
    /// It failed: never said, once the next call has succeeded.
    Failed,
}

/// The servers of one machine, one after the other.
struct Life {
    seed: u64,
    machine: Rc<Machine>,
    said: Vec<Said>,
    next: u32,
}

impl Life {
    fn play(seed: u64, tally: &mut Tally) {
        let mut life = Self {
            seed,
            machine: Machine::new(seed),
            said: Vec::new(),
            next: 1,
        };
        for _ in 0..=life.machine.below(6) {
            life.serve(tally);
            let power_cut = life.machine.one_in(2);
            life.machine.crash(power_cut);
            tally.crashes += 1;
        }
        life.machine.heal();
        life.found(tally);
        tally.faults += life.machine.faults();
    }

    /// A server, from its start to its sudden end.
    fn serve(&mut self, tally: &mut Tally) {
        self.machine.draw();
        let mut journal = self.found(tally);
        let started = Record::Started { era: self.number() };
        // As a start does it, before anything is appended.
        if now(journal.log.sync_place()).is_err() {
            return;
        }
        let mut alive = self.append(&mut journal, started, false);
        for _ in 0..self.machine.below(30) {
            let unsure = self
                .said
                .iter()
                .filter(|said| said.standing != Standing::Sure);
            if self.machine.is_over() || !alive || unsure.count() >= UNSURE_MAX {
                break;
            }
            let before = journal.log.number();
            match self.machine.below(12) {
                0 => {
                    let result = now(journal.tidy());
                    self.ended(result.is_ok() && !journal.in_doubt);
                }
                1 => {
                    let result = now(journal.settle());
                    self.ended(result.is_ok());
                }
                2 => {
                    let record = self.record();
                    journal.owe(&record);
                    self.say(record, Standing::Owed);
                }
                3 | 4 => {
                    let record = self.record();
                    alive = self.append(&mut journal, record, true) || self.machine.one_in(2);
                }
                _ => {
                    let record = self.record();
                    self.append(&mut journal, record, false);
                }
            }
            tally.rewritings += u64::from(journal.log.number() != before);
        }
    }

    /// Whether it succeeded.
    fn append(&mut self, journal: &mut Journal<SimFile>, record: Record, owes: bool) -> bool {
        let result = if owes {
            now(journal.append_or_owe(&record))
        } else {
            now(journal.append(&record))
        };
        let standing = match (&result, owes) {
            (Ok(()), _) | (Err(_), true) => Standing::Owed,
            (Err(_), false) => Standing::Failed,
        };
        self.say(record, standing);
        self.ended(result.is_ok());
        assert!(
            result.is_ok() || self.machine.may_fail(),
            "seed {}: {result:?}",
            self.seed
        );
        result.is_ok()
    }

    fn say(&mut self, record: Record, standing: Standing) {
        self.said.push(Said { record, standing });
    }

    /// A call has ended that makes everything durable if it succeeds.
    fn ended(&mut self, succeeded: bool) {
        if succeeded {
            self.said.retain(|said| said.standing != Standing::Failed);
            self.said
                .iter_mut()
                .for_each(|said| said.standing = Standing::Sure);
        }
    }

    /// Opens the journal, and compares what it says with what was said.
    fn found(&mut self, tally: &mut Tally) -> Journal<SimFile> {
        let seed = self.seed;
        let (journal, damage) = Journal::read(self.machine.open()).expect("reading does not fail");
        let open: Vec<usize> = (0..self.said.len())
            .filter(|at| self.said[*at].standing != Standing::Sure)
            .collect();
        // Those that are there, as bits; as many as possible first.
        let matching = (0..1_u32 << open.len()).rev().find(|there| {
            let is_there = |at: &usize| {
                let open = open.iter().position(|other| other == at);
                open.is_none_or(|bit| there & 1 << bit != 0)
            };
            let records = (0..self.said.len()).filter(is_there);
            let ledger: Ledger = records.map(|at| &self.said[at].record).collect();
            says_the_same(&ledger, journal.ledger())
        });
        assert_eq!(damage.within, 0, "seed {seed}: a crash is taken for damage");
        let there = matching.unwrap_or_else(|| {
            panic!("seed {seed}: what was acknowledged is not there, or what was undone is")
        });
        for (bit, at) in open.into_iter().enumerate() {
            // The next server goes by what it finds.
            self.said[at].standing = if there & 1 << bit == 0 {
                tally.maybes_lost += 1;
                Standing::Failed
            } else {
                tally.maybes_found += 1;
                Standing::Owed
            };
        }
        journal
    }

    fn record(&mut self) -> Record {
        let number = self.number();
        let known = Uuid::from_u128(self.machine.below(number.into()).into());
        match self.machine.below(4) {
            0 => Record::Deleted {
                uuid: known,
                disks: Vec::new(),
            },
            1 => Record::Aborted { uuid: known },
            _ => Record::Checkpoint(CheckpointRecord {
                name: Name::parse(&format!("cp{number}")).expect("it is one"),
                uuid: Uuid::from_u128(number.into()),
                created: number.into(),
                era: number,
                // Some take several sectors.
                disks: vec![Uuid::max(); self.machine.below(40) as usize],
                automatic: false,
            }),
        }
    }

    fn number(&mut self) -> u32 {
        self.next += 2;
        self.next
    }
}

/// Whether both say the same, but for presumed changes that nobody can ask for any more.
fn says_the_same(expected: &Ledger, found: &Ledger) -> bool {
    let whole: Ledger = expected.records().iter().collect();
    let kept = |era: &u32| found.presumed.contains(era);
    let found = Ledger {
        presumed: whole.presumed.clone(),
        ..found.clone()
    };
    whole.presumed.iter().all(kept)
        && found
            == Ledger {
                presumed: whole.presumed.clone(),
                ..expected.clone()
            }
}

/// What comes of `future`, which never waits.
fn now<F: Future>(future: F) -> F::Output {
    let mut future = std::pin::pin!(future);
    let mut context = std::task::Context::from_waker(std::task::Waker::noop());
    match future.as_mut().poll(&mut context) {
        std::task::Poll::Ready(output) => output,
        std::task::Poll::Pending => unreachable!("nothing waits here"),
    }
}

/// Every set of them is tried.
const UNSURE_MAX: usize = 6;

const SEEDS: u64 = 3000;
