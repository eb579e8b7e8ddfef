//! Any bytes as an exported state: what is accepted is packed as it was unpacked.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| stillpoint::fuzzing::parcel(data));
