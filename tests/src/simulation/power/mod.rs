//! Servers that are killed, and machines that lose power, at moments drawn from a seed.
//!
//! What runs is the server's own disk, regions, lease and recovery, on storage in which every sector
//! keeps each state that it had since it was last synced, and falls back to any of them when the
//! power is cut. After every start, and at every instant that is taken, the map is compared with the
//! disk: what differs from the copy of a checkpoint is dirty since that checkpoint; what is dirty
//! was written, or lay in a region that was active when the power was cut. Some images are on another
//! machine, which may be killed together with a server and loses
//! then what was not synced. Now and then the stored
//! map is damaged in between; then what is on that page may be dirty, and what changed must be.

mod life;
mod machine;
mod medium;
mod oracle;
mod shape;

use std::cell::RefCell;
use std::fmt;
use std::rc::Rc;
use std::sync::Arc;

use stillpoint::disk::Ending;

use super::executor::Executor;
use super::sim::Sim;
use life::{Header, Life};
use machine::{Crash, Machine};

/// What happened in some schedules.
#[derive(Debug, Default)]
pub struct PowerTally {
    /// Servers that were killed.
    pub kills: u64,
    /// Power cuts.
    pub power_cuts: u64,
    /// Those of both that met a server that had not started yet.
    pub interrupted_starts: u64,
    /// Ends in good order.
    pub clean_ends: u64,
    /// Starts after a power cut.
    pub recoveries: u64,
    /// Maps that were damaged, and of these how many were found to be.
    pub rots: u64,
    /// The others were damaged where nothing is, or where everything counted as changed anyway.
    pub rots_found: u64,
    /// Checkpoints that a start was compared with.
    pub compared: u64,
    /// After each power cut: how many bytes are dirty without having been written, and how many lay
    /// in active regions.
    pub surplus: Vec<(u64, u64)>,
}

impl PowerTally {
    /// The bytes that half of all power cuts leave in doubt, or less.
    pub fn median_surplus(&self) -> u64 {
        median(self.surplus.iter().map(|(bytes, _)| *bytes).collect())
    }

    /// The bytes that lie in active regions at half of all power cuts, or less.
    pub fn median_active(&self) -> u64 {
        median(self.surplus.iter().map(|(_, active)| *active).collect())
    }
}

fn median(mut numbers: Vec<u64>) -> u64 {
    numbers.sort_unstable();
    numbers.get(numbers.len() / 2).copied().unwrap_or(0)
}

impl fmt::Display for PowerTally {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{} kills, {} power cuts, {} of both during a start, {} clean ends, {} recoveries, \
             {} damaged maps of which {} were found, {} comparisons with a checkpoint; median surplus {} KiB of {} KiB in active regions",
            self.kills,
            self.power_cuts,
            self.interrupted_starts,
            self.clean_ends,
            self.recoveries,
            self.rots,
            self.rots_found,
            self.compared,
            self.median_surplus() >> 10,
            self.median_active() >> 10,
        )
    }
}

/// Plays the schedule that `seed` draws; panics, naming the seed, where something does not hold.
pub fn play(seed: u64, tally: &mut PowerTally) {
    let sim = Arc::new(Sim::new(seed));
    let machine = Rc::new(Machine::new(&sim));
    Header::new(machine.shape.size).store(&machine);
    machine.header.medium().settle();

    for _ in 0..2 + sim.below(9) {
        if sim.one_in(8) {
            crash(&machine, Crash::PowerCut, tally);
        }
        // A start that has damage to mark is more often interrupted in the middle of that.
        let patience = match sim.below(3) {
            0 => sim.below(60),
            1 if machine.rotten.get() => 5 + sim.below(8),
            _ => ENOUGH,
        };
        let Some(life) = start(&machine, patience, tally) else {
            tally.interrupted_starts += 1;
            continue;
        };
        serve(&life, tally);
    }
    let life = start(&machine, ENOUGH, tally).expect("nothing interrupts it");
    let mut executor = Executor::new(&sim);
    executor.spawn("last steward".to_owned(), life::steward(life, 1));
    executor.run(|| {});
    // Its disk has the machine, and the machine it: a million of them are not to stay.
    *machine.disk.borrow_mut() = None;
}

/// Starts a server; `None` if it was interrupted after so many steps.
fn start(machine: &Rc<Machine>, patience: u64, tally: &mut PowerTally) -> Option<Rc<Life>> {
    let active = machine.shape.active(machine.table.open().medium().now());
    let slot = Rc::new(RefCell::new(None));
    let mut executor = Executor::new(&machine.sim);
    let starting = {
        let (slot, machine) = (Rc::clone(&slot), Rc::clone(machine));
        async move { *slot.borrow_mut() = Some(Rc::new(life::start(machine).await)) }
    };
    executor.spawn("start".to_owned(), starting);
    if !executor.run_for(patience) {
        drop(executor);
        crash_somehow(machine, tally);
        return None;
    }
    let life: Rc<Life> = slot.take().expect("it has started");
    let surplus = life.check();
    tally.compared += machine.oracle.borrow().checkpoint_count() as u64;
    tally.rots_found += u64::from(life.damaged);
    if life.ending == Ending::PowerCut && !life.rotten {
        tally.recoveries += 1;
        let active = active.iter().filter(|active| **active).count() as u64 * shape::CHUNK;
        assert!(
            surplus.is_none_or(|bytes| bytes <= active),
            "seed {}: {surplus:?} bytes are presumed dirty, of {active} in active regions",
            machine.sim.seed
        );
        tally.surplus.extend(surplus.map(|bytes| (bytes, active)));
    }
    Some(life)
}

/// Lets guests write until something ends it.
fn serve(life: &Rc<Life>, tally: &mut PowerTally) {
    let sim = &life.machine.sim;
    let mut executor = Executor::new(sim);
    for index in 0..=sim.below(4) {
        executor.spawn(format!("guest {index}"), life::guest(Rc::clone(life)));
    }
    let instants = sim.below(6);
    executor.spawn(
        "steward".to_owned(),
        life::steward(Rc::clone(life), instants),
    );
    for index in 0..=sim.below(2) {
        executor.spawn(format!("retirer {index}"), life::retirer(Rc::clone(life)));
    }
    let steps = sim.one_of(&[20, 100, 300, 1000]);
    executor.run_for(1 + sim.below(steps));

    if sim.one_in(3) {
        life.stopping.set(true);
        life.machine.faults.heal();
        executor.run(|| {});
        executor.spawn("close".to_owned(), life::close(Rc::clone(life)));
        let patience = if sim.one_in(2) { sim.below(40) } else { ENOUGH };
        if executor.run_for(patience) {
            tally.clean_ends += 1;
            // Its process is gone; what it stored is there.
            life.machine.crash(Crash::Kill);
            rot_sometimes(&life.machine, 8, tally);
            return;
        }
    }
    drop(executor);
    crash_somehow(&life.machine, tally);
}

fn crash_somehow(machine: &Machine, tally: &mut PowerTally) {
    let crash_now = machine.sim.one_of(&[Crash::Kill, Crash::PowerCut]);
    crash(machine, crash_now, tally);
}

fn crash(machine: &Machine, crash: Crash, tally: &mut PowerTally) {
    match crash {
        Crash::Kill => tally.kills += 1,
        Crash::PowerCut => tally.power_cuts += 1,
    }
    machine.crash(crash);
    rot_sometimes(machine, 32, tally);
}

fn rot_sometimes(machine: &Machine, one_in: u64, tally: &mut PowerTally) {
    if machine.sim.one_in(one_in) {
        machine.rot();
        tally.rots += 1;
    }
}

/// Steps that no start and no end takes.
const ENOUGH: u64 = 100_000;
