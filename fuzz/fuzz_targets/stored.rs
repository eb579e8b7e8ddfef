//! Any bytes as a qcow2 image with dirty bitmaps.
#![no_main]

use libfuzzer_sys::fuzz_target;
use stillpoint_fuzz::images::{bitmaps, with_image};

fuzz_target!(|data: &[u8]| with_image(data, bitmaps));
