use std::ops::Range;

/// A stretch of a disk that is either wholly dirty or wholly clean.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Run {
    /// In bytes.
    pub range: Range<u64>,
    /// Whether it changed.
    pub dirty: bool,
}
