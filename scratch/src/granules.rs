use std::ops::Range;

/// The unit of scratch, in bytes: a small guest write costs a copy of its own size, whatever the
/// granularity of the bitmaps.
pub const GRANULE: u64 = 4096;

/// The granules that `range`, in bytes, touches: first to one past the last.
pub(crate) fn granules(range: &Range<u64>) -> Range<u64> {
    if range.is_empty() {
        return 0..0;
    }
    range.start / GRANULE..range.end.div_ceil(GRANULE)
}

/// The bytes of `granules` on a disk of `size` bytes, whose last granule may be a partial one.
pub(crate) fn bytes(granules: &Range<u64>, size: u64) -> Range<u64> {
    (granules.start * GRANULE).min(size)..(granules.end * GRANULE).min(size)
}
