//! Any bytes as a list of extents: what is dirty by it is on the disk, and is written as it was read.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| stillpoint::fuzzing::extents(data));
