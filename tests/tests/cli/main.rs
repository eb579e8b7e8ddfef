//! What a person types, and what they are told.

mod start;

mod usage;

mod errors;

mod checkpoints;

mod backups;

mod status;

use std::process::Command;

use stillpoint_tests::process::{Output, run};
use stillpoint_tests::server;

const BAD_NAMES: [&str; 12] = [
    "", "-a", ".a", "_a", "a/b", "a b", "a..b", "a.", "last", "latest", "auto", "none",
];

fn stillpoint(args: &[&str]) -> Output {
    run(Command::new(server::binary()).args(args))
}
