use std::ops::Range;

use thiserror::Error;

/// One period in the life of a disk; every named instant begins the next.
///
/// Eras are never lowered or reused. The null era, [`Era::NEVER`], is that of a chunk that has not
/// changed since tracking began.
#[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub struct Era(u32);

impl Era {
    /// Of a chunk that has not changed since tracking began.
    pub const NEVER: Self = Self(0);
    /// The era before the first named instant. A change in it is older than any checkpoint.
    pub const FIRST: Self = Self(1);

    /// The era with this number.
    pub const fn from_number(number: u32) -> Self {
        Self(number)
    }

    /// The number that is stored.
    pub const fn number(self) -> u32 {
        self.0
    }

    /// The era that begins when this one ends, or `None` when the numbers are used up.
    pub const fn next(self) -> Option<Self> {
        match self.0.checked_add(1) {
            Some(number) => Some(Self(number)),
            None => None,
        }
    }
}

/// Chunks by index, first to one past the last.
pub type Chunks = Range<u64>;

/// A chunk size: a power of two, 4 KiB to 2 MiB.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Granularity(u64);

impl Granularity {
    /// 64 KiB, QEMU's default too.
    pub const DEFAULT: Self = Self(64 << 10);

    /// Refuses all but a power of two from 4 KiB to 2 MiB.
    pub fn new(bytes: u64) -> Result<Self, GranularityError> {
        if bytes.is_power_of_two() && (4 << 10..=2 << 20).contains(&bytes) {
            Ok(Self(bytes))
        } else {
            Err(GranularityError(bytes))
        }
    }

    /// The chunk size in bytes.
    pub const fn bytes(self) -> u64 {
        self.0
    }

    /// The chunks that `range`, in bytes, touches.
    pub fn chunks(self, range: &Range<u64>) -> Chunks {
        if range.is_empty() {
            return 0..0;
        }
        range.start / self.0..range.end.div_ceil(self.0)
    }

    /// The bytes of `chunks` on a disk of `size` bytes, whose last chunk may be a partial one.
    #[inline]
    pub fn range(self, chunks: &Chunks, size: u64) -> Range<u64> {
        (chunks.start * self.0).min(size)..chunks.end.saturating_mul(self.0).min(size)
    }
}

/// A chunk size that no map can have.
#[derive(Clone, Copy, Debug, Eq, Error, PartialEq)]
#[error("granularity {0} is not a power of two from 4 KiB to 2 MiB")]
pub struct GranularityError(pub u64);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_range_touches_every_chunk_it_overlaps() {
        let granularity = Granularity::DEFAULT;
        assert_eq!(granularity.chunks(&(0..1)), 0..1);
        assert_eq!(granularity.chunks(&(65_535..65_537)), 0..2);
        assert_eq!(granularity.chunks(&(65_536..131_072)), 1..2);
        assert!(granularity.chunks(&(70_000..70_000)).is_empty());
    }

    #[test]
    fn the_last_chunk_ends_with_the_disk() {
        assert_eq!(Granularity::DEFAULT.range(&(1..2), 66_048), 65_536..66_048);
    }

    #[test]
    fn only_powers_of_two_from_4_kib_to_2_mib_are_granularities() {
        for good in [4096, 65_536, 2 << 20] {
            assert_eq!(Granularity::new(good).map(Granularity::bytes), Ok(good));
        }
        for bad in [0, 1, 2048, 65_535, 4 << 20, u64::MAX] {
            assert_eq!(Granularity::new(bad), Err(GranularityError(bad)));
        }
    }

    #[test]
    fn the_last_era_has_no_successor() {
        assert_eq!(Era::FIRST.next(), Some(Era::from_number(2)));
        assert_eq!(Era::from_number(u32::MAX).next(), None);
    }
}
