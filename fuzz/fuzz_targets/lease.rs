//! Any bytes as a `lease`: a time is believed only with its sum.
#![no_main]

use bitmap::MemoryPages;
use libfuzzer_sys::fuzz_target;
use stillpoint::disk::Lease;

fuzz_target!(|data: &[u8]| {
    check(data);
    let mut sealed = data.to_vec();
    for sector in sealed.chunks_mut(512).filter(|sector| sector.len() >= 12) {
        let sum = crc32fast::hash(&sector[..8]).to_le_bytes();
        sector[8..12].copy_from_slice(&sum);
    }
    check(&sealed);
});

fn check(data: &[u8]) {
    let (_, record) = Lease::open(MemoryPages::from(data.to_vec())).expect("memory does not fail");
    assert_eq!(record.end, time(data, 0));
    assert_eq!(record.clock, time(data, 512));
}

fn time(data: &[u8], at: usize) -> Option<u64> {
    let mut bytes = [0; 12];
    let found = data.get(at..).unwrap_or_default();
    let length = found.len().min(12);
    bytes[..length].copy_from_slice(&found[..length]);
    let (time, sum) = bytes.split_at(8);
    let whole = crc32fast::hash(time).to_le_bytes() == *sum;
    whole.then(|| u64::from_le_bytes(time.try_into().expect("eight bytes")))
}
