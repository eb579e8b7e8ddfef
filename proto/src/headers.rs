//! The forms that messages take in transmission.

/// What was negotiated about the heads of requests and of replies; it holds for both directions.
///
/// From the oldest to the newest.
#[derive(Clone, Copy, Debug, Default, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub enum Headers {
    /// Compact requests, and replies that are one number and perhaps data.
    #[default]
    Simple,
    /// Compact requests, and replies in chunks.
    Structured,
    /// Requests and chunks with heads of 32 bytes and lengths of 64 bits; nothing else.
    Extended,
}

impl Headers {
    /// Whether replies come in chunks, so that a reply can be more than data or an error.
    pub fn has_chunks(self) -> bool {
        self != Self::Simple
    }
}
