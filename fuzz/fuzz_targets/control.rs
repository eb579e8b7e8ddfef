//! Any bytes on the control socket: where the stream is cut makes no difference, and every value in
//! it is a command or has an answer.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| stillpoint::fuzzing::control(data));
