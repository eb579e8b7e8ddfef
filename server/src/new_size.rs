/// How large a disk is to be.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum NewSize {
    /// So many bytes.
    Exactly(u64),
    /// So many more.
    Larger(u64),
    /// So many fewer, which no disk can be.
    Smaller(u64),
}

impl NewSize {
    /// In bytes, for a disk of `size`; `None` where there is no such number.
    pub(crate) fn from(self, size: u64) -> Option<u64> {
        match self {
            Self::Exactly(bytes) => Some(bytes),
            Self::Larger(bytes) => size.checked_add(bytes),
            Self::Smaller(bytes) => size.checked_sub(bytes),
        }
    }
}
