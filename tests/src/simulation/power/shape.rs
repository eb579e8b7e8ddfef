use std::ops::Range;

use bitmap::Granularity;

use crate::simulation::sim::Sim;

/// How large the disk of one schedule is, and where its guests write.
pub(super) struct Shape {
    /// At first.
    pub(super) size: u64,
    /// And at most.
    pub(super) largest: u64,
    /// Around these places.
    spots: Vec<u64>,
}

impl Shape {
    pub(super) fn draw(sim: &Sim) -> Self {
        let size = match sim.below(3) {
            0 => PAGE + REGION + sim.below(REGION / SECTOR) * SECTOR,
            _ => REGION + SECTOR + sim.below(3 * REGION / SECTOR) * SECTOR,
        };
        let largest = size + sim.below(PAGE / SECTOR) * SECTOR;
        let spot = |_| match sim.below(5) {
            0 => sim.below(largest),
            4 => size,
            1 if size > PAGE => PAGE,
            _ => sim.below(size / REGION + 1) * REGION,
        };
        let spots = (0..=sim.below(4)).map(spot).collect();
        Self {
            size,
            largest,
            spots,
        }
    }

    /// Where a guest of a disk of `size` bytes writes next.
    pub(super) fn stretch(&self, sim: &Sim, size: u64) -> Range<u64> {
        let sectors = size / SECTOR;
        let spot = sim.one_of(&self.spots) / SECTOR;
        let longest = if sim.one_in(24) {
            REGION / SECTOR + 40
        } else {
            12
        };
        let start = (spot + sim.below(24)).saturating_sub(12);
        let start = start.min(sectors - 1);
        let end = (start + 1 + sim.below(longest)).min(sectors);
        start * SECTOR..end * SECTOR
    }

    /// How large a disk of `size` bytes becomes next.
    pub(super) fn larger(&self, sim: &Sim, size: u64) -> Option<u64> {
        let sectors = (self.largest - size) / SECTOR;
        (sectors > 0).then(|| size + (1 + sim.below(sectors)) * SECTOR)
    }

    pub(super) fn sectors(&self) -> u64 {
        self.largest / SECTOR
    }

    /// Of the disk at its largest.
    pub(super) fn chunks(&self) -> u64 {
        self.largest.div_ceil(CHUNK)
    }

    pub(super) fn pages(&self) -> u64 {
        self.size.div_ceil(PAGE)
    }

    /// The chunks on the page of the map that `chunk` is on, of those that there are.
    pub(super) fn page_of(&self, chunk: u64) -> Range<usize> {
        let first = chunk / bitmap::ERAS_PER_PAGE * bitmap::ERAS_PER_PAGE;
        first as usize..(first + bitmap::ERAS_PER_PAGE).min(self.chunks()) as usize
    }

    /// Of each chunk, whether a region is active that it is in, as `table` has it.
    pub(super) fn active(&self, table: &[u8]) -> Vec<bool> {
        let active = |chunk: u64| {
            let region = chunk * CHUNK / REGION;
            bits(table, region / 16, ACTIVE) >> (region % 16) & 1 == 1
        };
        (0..self.chunks()).map(active).collect()
    }

    /// Whether no region is active on the page of the map that `chunk` is on, also behind the end of
    /// the disk: then a sum tells whether the page is what was stored.
    pub(super) fn is_calm(table: &[u8], chunk: u64) -> bool {
        bits(table, chunk / bitmap::ERAS_PER_PAGE, ACTIVE) == 0
    }

    /// Whether the whole sector of the map that `chunk` is in counts: of a region that was never
    /// filled nobody reads what is there, before another of its page is used.
    pub(super) fn is_filled(table: &[u8], chunk: u64) -> bool {
        let entries = 512 / 8;
        let first = chunk / entries * entries;
        [first, first + entries - 1].into_iter().all(|chunk| {
            let region = chunk * CHUNK / REGION;
            bits(table, region / 16, FILLED) >> (region % 16) & 1 == 1
        })
    }
}

/// A bit for each region of page number `page`, as `table` has it: records of eight bytes, 63 to a
/// sector after a head of eight, with the bits at `place`.
fn bits(table: &[u8], page: u64, place: u64) -> u16 {
    let at = (page / 63 * 512 + 8 + page % 63 * 8 + place) as usize;
    // There is room for what is new when the disk is about to grow.
    let byte = |at: usize| table.get(at).copied().unwrap_or(0);
    u16::from_le_bytes([byte(at), byte(at + 1)])
}

const ACTIVE: u64 = 4;
const FILLED: u64 = 6;

/// The smallest granularity there is.
pub(super) fn granularity() -> Granularity {
    Granularity::new(CHUNK).expect("4 KiB is a granularity")
}

pub(super) const SECTOR: u64 = 512;
pub(super) const CHUNK: u64 = 4096;
/// What one page of the map tells of, and a sixteenth of that.
const PAGE: u64 = bitmap::ERAS_PER_PAGE * CHUNK;
pub(super) const REGION: u64 = PAGE / 16;
