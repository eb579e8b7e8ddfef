//! Any bytes as the bits of a dirty bitmap: what is accepted is what would be written of it.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    stillpoint::fuzzing::bits(data);
    stillpoint::fuzzing::bits(&sealed(data));
});

/// The sum is right, whatever it is of.
fn sealed(data: &[u8]) -> Vec<u8> {
    let mut bytes = data.to_vec();
    if let Some(summed) = bytes.get(16..) {
        let sum = crc32fast::hash(summed).to_le_bytes();
        bytes[12..16].copy_from_slice(&sum);
    }
    bytes
}
