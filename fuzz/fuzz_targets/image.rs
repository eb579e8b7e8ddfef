//! Any bytes as a qcow2 image and one behind it: what is read of it is the same however it is asked for,
//! and from no other file.
#![no_main]

use libfuzzer_sys::fuzz_target;
use stillpoint_fuzz::images::{read, with_image};

fuzz_target!(|data: &[u8]| with_image(data, read));
