//! Kills and power cuts drawn from a seed, against copies of the whole disk.
//!
//! `STILLPOINT_POWER_CUTS` says how many schedules, `STILLPOINT_SEED` the first seed; the others
//! follow it.

use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};

use stillpoint_tests::seeds;
use stillpoint_tests::simulation::power::{PowerTally, play};

#[test]
fn whatever_is_killed_or_loses_power_no_change_is_reported_clean() {
    let first = seeds::number("STILLPOINT_SEED", 1);
    let count = seeds::number("STILLPOINT_POWER_CUTS", 20_000);
    let mut total = PowerTally::default();
    for seed in first..first + count {
        if let Err(panic) = catch_unwind(AssertUnwindSafe(|| play(seed, &mut total))) {
            eprintln!("seed {seed} failed; to see it again:");
            eprintln!(
                "  STILLPOINT_SEED={seed} STILLPOINT_POWER_CUTS=1 cargo test -p stillpoint-tests \
                 --test power_cut"
            );
            resume_unwind(panic);
        }
    }
    println!("{total}");
    // A simulation in which nothing happens proves nothing.
    if count >= 1000 {
        assert!(total.kills > count && total.power_cuts > count && total.recoveries > count / 2);
        assert!(total.interrupted_starts > count / 2 && total.clean_ends > count / 3);
        assert!(total.rots > count / 8 && total.rots_found > total.rots / 8);
        let surplus = total.median_surplus();
        assert!(
            surplus <= total.median_active(),
            "a median surplus of {surplus} bytes"
        );
    }
}
