//! Guests write and backups read at the same time, in an order drawn from a seed.
//!
//! What runs is the server's own disk, maps, gates and snapshots; storage, faults and time are
//! passed in, with a point at every step of the contract where someone else may go on. The model is
//! the simplest thing that can be right: a copy of the whole disk taken at the moment when the gates
//! are closed. Some disks are on another machine, which performs late what it was asked for. Whatever the interleaving, a frozen read equals that copy, every byte that differs
//! from it today is marked, and a process killed at that very point would have left it so.

mod audit;
mod capture;
mod elsewhere;
mod executor;
mod guest;
mod history;
pub mod power;
mod reader;
mod sim;
mod stage;
mod steward;
mod storage;
mod tally;
mod world;

use std::rc::Rc;
use std::sync::Arc;

use executor::Executor;
use sim::Sim;
use stage::Stage;

pub use tally::Tally;

/// Plays the schedule that `seed` draws; panics, naming the seed, where something does not hold.
pub fn play(seed: u64) -> Tally {
    let sim = Arc::new(Sim::new(seed));
    let stage = Rc::new(Stage::new(&sim));
    let mut executor = Executor::new(&sim);
    for index in 0..stage.guests {
        executor.spawn(format!("guest {index}"), guest::guest(Rc::clone(&stage)));
    }
    executor.spawn("steward".to_owned(), steward::steward(Rc::clone(&stage)));
    for index in 0..2 + sim.below(3) {
        executor.spawn(format!("reader {index}"), reader::reader(Rc::clone(&stage)));
    }
    executor.spawn("elsewhere".to_owned(), elsewhere::lands(Rc::clone(&stage)));
    executor.run(|| {
        if sim.one_in(AUDIT) {
            audit::audit(&stage);
        }
    });

    // Whatever failed does so no more, and what is still kept is read from end to end.
    sim.heal();
    executor.spawn(
        "last reader".to_owned(),
        reader::read_everything(Rc::clone(&stage)),
    );
    let last = Rc::clone(&stage);
    executor.spawn("last release".to_owned(), async move {
        steward::release(&last).await;
    });
    executor.run(|| {});
    audit::audit(&stage);
    audit::kept_once(&stage);
    for subject in &stage.disks {
        guest::check_given_up(&stage, subject);
    }
    history::check_moments(&stage);
    stage.count(|tally| tally.end(&stage));
    stage.tally.get()
}

/// The unit of scratch, in bytes.
const GRANULE: u64 = scratch::GRANULE;
/// What holds at every moment is checked once in so many steps.
const AUDIT: u64 = 16;
