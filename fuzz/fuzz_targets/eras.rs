//! A map on which things are marked, and which is then damaged: whatever is done to what is stored,
//! an entry says what it said, or that it is damaged.
#![no_main]

use bitmap::{ERAS_PER_PAGE, Era, Eras, MemoryPages, PageStore, Salt};
use libfuzzer_sys::fuzz_target;

const CHUNKS: u64 = ERAS_PER_PAGE + 100;
const SALT: Salt = Salt::from_number(0x51ab_0e77);

fuzz_target!(|data: &[u8]| {
    let (marks, damage) = data.split_at(data.len() / 2);
    let eras = Eras::new(CHUNKS, SALT, MemoryPages::default());
    eras.fill(&(0..CHUNKS)).expect("memory does not fail");
    for mark in marks.chunks_exact(8) {
        let chunks = place(mark) % CHUNKS..(place(mark) + u64::from(mark[2])) % CHUNKS;
        let era = Era::from_number(number(&mark[4..]).max(1));
        eras.set(&chunks, era).expect("memory does not fail");
    }
    let stored = damaged(&eras.store().contents(), damage);
    let loaded = Eras::new(CHUNKS, SALT, MemoryPages::from(stored));
    for page in 0..loaded.page_count() {
        let lacking = loaded.load_page(page).expect("memory does not fail");
        for chunk in Eras::<MemoryPages>::chunks_of_page(page).take_while(|chunk| *chunk < CHUNKS) {
            if lacking.iter().any(|run| run.contains(&chunk)) {
                assert_eq!(loaded.era(chunk), Era::NEVER, "chunk {chunk}");
            } else {
                let era = eras.era(chunk).max(Era::FIRST);
                assert_eq!(loaded.era(chunk), era, "chunk {chunk}");
            }
        }
    }
});

/// Flips bits, zeroes stretches, and copies one stretch over another: what storage does.
fn damaged(stored: &[u8], how: &[u8]) -> Vec<u8> {
    let damaged = MemoryPages::from(stored.to_vec());
    for part in how.chunks_exact(8) {
        let at = place(part) * 8 % stored.len() as u64;
        let length = 1 + usize::from(part[3]);
        let mut bytes = match part[2] % 3 {
            // Two bits of one entry; more could make another entry of it.
            0 => {
                let mut entry = stored[at as usize..][..8].to_vec();
                entry[usize::from(part[4] % 8)] ^= 1 << (part[5] % 8);
                entry[usize::from(part[6] % 8)] ^= 1 << (part[7] % 8);
                entry
            }
            1 => vec![0; length],
            _ => {
                let from = place(&part[4..]) * 8 % stored.len() as u64;
                stored[from as usize..]
                    .iter()
                    .copied()
                    .take(length)
                    .collect()
            }
        };
        bytes.truncate(stored.len() - at as usize);
        damaged.store(at, &bytes).expect("memory does not fail");
    }
    damaged.contents()
}

fn place(bytes: &[u8]) -> u64 {
    u64::from(u16::from_le_bytes([bytes[0], bytes[1]]))
}

fn number(bytes: &[u8]) -> u32 {
    u32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]])
}
