//! Any bytes as the `states`, `states2` and `eras` of an open backup: they are damaged, or it is opened,
//! broken or not, and every question about it has an answer.
//!
//! The record is summed up here, or hardly any bytes would get past its sum.
#![no_main]

use std::io;
use std::ops::Range;
use std::sync::Arc;

use bitmap::{Era, EraMap, Granularity, MemoryPages, Salt};
use block::{Extent, Storage, Zeroing};
use bytes::Bytes;
use libfuzzer_sys::fuzz_target;
use scratch::{Frozen, Snapshot, SnapshotFiles, Terms, Unpaced, World};
use stillpoint_fuzz::now;

const SIZE: u64 = 64 * 4096 + 512;

struct Memory;

impl World for Memory {
    type Image = Filled;
    type Scratch = Filled;
    type Pages = MemoryPages;
    type Pace = Unpaced;
}

/// So many times the same byte.
struct Filled(u8);

impl Storage for Filled {
    fn size(&self) -> u64 {
        SIZE
    }

    async fn read(&self, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
        assert!(offset + buffer.len() as u64 <= SIZE);
        buffer.fill(self.0);
        Ok(())
    }

    async fn write(&self, _: u64, _: &Bytes) -> io::Result<()> {
        unreachable!("nobody writes here")
    }

    async fn zero(&self, _: Range<u64>, _: Zeroing) -> io::Result<()> {
        unreachable!("nobody writes here")
    }

    async fn sync(&self) -> io::Result<()> {
        Ok(())
    }

    async fn extents(&self, range: Range<u64>) -> io::Result<Vec<Extent>> {
        Ok(vec![Extent { range, hole: false }])
    }
}

const IMAGE: u8 = 1;
const SCRATCH: u8 = 2;

fuzz_target!(|data: &[u8]| {
    let count = SIZE.div_ceil(4096) as usize;
    let (states, rest) = data.split_at(data.len().min(4096 + count));
    let (second, eras) = rest.split_at(rest.len().min(count));
    let mut states = states.to_vec();
    if let Some(record) = states.get_mut(..512) {
        let sum = crc32fast::hash(&record[4..]);
        record[..4].copy_from_slice(&sum.to_le_bytes());
    }
    let granularity = Granularity::new(4096).expect("4 KiB is a granularity");
    let live = EraMap::new(
        SIZE,
        granularity,
        Salt::from_number(7),
        MemoryPages::default(),
    );
    let frozen_in = Era::from_number(3);
    let written = live.mark(&(8..40), frozen_in);
    written.expect("memory does not fail");
    let files = SnapshotFiles {
        scratch: Filled(SCRATCH),
        states: MemoryPages::from(states),
        second: MemoryPages::from(second.to_vec()),
        eras: MemoryPages::from(eras.to_vec()),
    };
    let terms = Terms::endless();
    let Ok(snapshot) = Snapshot::<Memory>::reopen(Arc::new(live), frozen_in, files, terms) else {
        return;
    };
    let snapshot = Arc::new(snapshot);
    assert!(snapshot.scratch_used() <= SIZE.next_multiple_of(4096));

    let changes = snapshot.eras().changes(0..SIZE, Era::from_number(2));
    let end = changes.fold(0, |end, run| {
        assert_eq!(run.range.start, end, "runs are adjacent");
        run.range.end
    });
    assert_eq!(end, SIZE);

    let broken = snapshot.broken().is_some();
    let frozen = Frozen::new(Arc::new(Filled(IMAGE)), snapshot, Arc::new(Unpaced));
    let mut buffer = vec![9; SIZE as usize];
    let read = now(frozen.read(0, &mut buffer));
    assert_eq!(read.is_err(), broken, "only what is broken cannot be read");
    if !broken {
        let known = [0, IMAGE, SCRATCH];
        assert!(buffer.iter().all(|byte| known.contains(byte)));
    }
});
