//! Any bytes as a `journal`: what is replayed is replayed again after it was written again.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    stillpoint::fuzzing::journal(data);
    stillpoint::fuzzing::journal(&sealed(data));
});

/// Every block that begins like a record has the right sum, if there is a record's length.
fn sealed(data: &[u8]) -> Vec<u8> {
    let mut bytes = data.to_vec();
    for at in (0..bytes.len()).step_by(512) {
        let Some(head) = bytes.get(at..at + 24).filter(|head| head[..4] == *b"SPJR") else {
            continue;
        };
        let length = u64::from_le_bytes(head[16..24].try_into().expect("eight bytes"));
        let end = usize::try_from(length)
            .ok()
            .and_then(|l| l.checked_add(at + 24));
        let Some(summed) = end.and_then(|end| bytes.get(at + 8..end)) else {
            continue;
        };
        let sum = crc32fast::hash(summed).to_le_bytes();
        bytes[at + 4..at + 8].copy_from_slice(&sum);
    }
    bytes
}
