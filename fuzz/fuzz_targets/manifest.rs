//! Any bytes as a manifest of a point: what is accepted says where all of its data lies.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| stillpoint::fuzzing::manifest(data));
