//! Chunks: what is fetched, hashed and stored together.

use std::ops::Range;

use super::runs;

/// What is fetched, hashed and stored together.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Chunk {
    /// Which one of the disk: its place divided by the chunk size.
    pub index: u64,
    /// The data in it, by whole clusters; at most a chunk size in all.
    pub runs: Vec<Range<u64>>,
}

impl Chunk {
    /// How many bytes are in it.
    pub fn bytes(&self) -> u64 {
        runs::bytes(&self.runs)
    }
}

/// The chunks that these runs have data in, ascending.
pub(super) fn chunks(
    data: &[Range<u64>],
    chunk_size: u64,
) -> impl Iterator<Item = Chunk> + use<'_> {
    let mut next = 0;
    std::iter::from_fn(move || {
        let run = &data[data.partition_point(|run| run.end <= next)..].first()?;
        let index = run.start.max(next) / chunk_size;
        // The last chunk of all numbers has no end.
        let end = (index + 1).saturating_mul(chunk_size);
        next = end;
        let runs = runs::within(data, &(index * chunk_size..end)).collect();
        Some(Chunk { index, runs })
    })
}

/// The size of chunks of a disk of `size` bytes: small enough that little is lost with one, large
/// enough that a manifest does not list more than some hundred thousand.
pub(super) fn chunk_size(size: u64) -> u64 {
    let chunks = CHUNK_SIZE_MIN * CHUNKS_WANTED;
    let times = size.div_ceil(chunks).max(1).next_power_of_two();
    (CHUNK_SIZE_MIN.saturating_mul(times)).min(CHUNK_SIZE_MAX)
}

/// Up to 256 GiB; then they grow with the disk.
const CHUNK_SIZE_MIN: u64 = 1 << 20;
const CHUNKS_WANTED: u64 = 1 << 18;

/// What is held in memory for each chunk that is being fetched or checked.
pub(super) const CHUNK_SIZE_MAX: u64 = 16 << 20;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn chunks_hold_all_the_data_and_end_where_the_next_begins() {
        let data = [3..5, 9..10, 12..30, 100..101];
        let found: Vec<_> = chunks(&data, 8).collect();
        let chunk = |index, runs: &[Range<u64>]| Chunk {
            index,
            runs: runs.to_vec(),
        };
        let expected = [
            chunk(0, &[3..5]),
            chunk(1, &[9..10, 12..16]),
            chunk(2, &[16..24]),
            chunk(3, &[24..30]),
            chunk(12, &[100..101]),
        ];
        assert_eq!(found, expected);
        assert_eq!(found[1].bytes(), 5);
        assert_eq!(chunks(&[], 8).next(), None);
    }

    #[test]
    fn chunks_grow_with_the_disk() {
        assert_eq!(chunk_size(1), 1 << 20);
        assert_eq!(chunk_size(256 << 30), 1 << 20);
        assert_eq!(chunk_size((256 << 30) + 1), 2 << 20);
        assert_eq!(chunk_size(1 << 40), 4 << 20);
        assert_eq!(chunk_size(64 << 40), 16 << 20);
        assert_eq!(chunk_size(u64::MAX), 16 << 20);
    }
}
