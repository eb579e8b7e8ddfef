//! Schedules drawn from a seed, against a plain copy of the disk.
//!
//! `STILLPOINT_SCHEDULES` says how many, `STILLPOINT_SEED` the first seed; the others follow it.

use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};

use stillpoint_tests::seeds;
use stillpoint_tests::simulation::{Tally, play};

#[test]
fn whatever_the_order_the_past_stays_as_it_was() {
    let first = seeds::number("STILLPOINT_SEED", 1);
    let count = seeds::number("STILLPOINT_SCHEDULES", 1000);
    let mut total = Tally::default();
    for seed in first..first + count {
        match catch_unwind(AssertUnwindSafe(|| play(seed))) {
            Ok(tally) => total += tally,
            Err(panic) => {
                eprintln!("seed {seed} failed; to see it again:");
                eprintln!(
                    "  STILLPOINT_SEED={seed} STILLPOINT_SCHEDULES=1 cargo test \
                     -p stillpoint-tests --test simulation"
                );
                resume_unwind(panic);
            }
        }
    }
    println!("{total}");
    // A simulation in which nothing happens proves nothing.
    if count >= 1000 {
        assert!(total.freezes > count && total.reads > count && total.operations > 10 * count);
        assert!(total.breaks > count / 20 && total.busy > count / 20 && total.faults > count / 2);
        assert!(total.landings > count && total.ahead > count / 2);
    }
}
