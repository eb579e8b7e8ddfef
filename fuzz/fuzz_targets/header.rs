//! Any bytes as a `header`: what is accepted is read the same after it was written again.
#![no_main]

use libfuzzer_sys::fuzz_target;
use stillpoint_fuzz::sealed;

fuzz_target!(|data: &[u8]| {
    stillpoint::fuzzing::header(data);
    stillpoint::fuzzing::header(&sealed(data));
});
