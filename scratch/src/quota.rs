use std::sync::atomic::{AtomicU64, Ordering};

/// How many bytes are in use, and how many may be.
#[derive(Debug)]
pub struct Quota {
    used: AtomicU64,
    /// What would be in use if everything were kept that may have to be.
    most: AtomicU64,
    limit: Option<u64>,
}

impl Quota {
    /// Nothing is in use of `limit` bytes, or of as many as there are.
    pub fn new(limit: Option<u64>) -> Self {
        Self {
            used: AtomicU64::new(0),
            most: AtomicU64::new(0),
            limit,
        }
    }

    /// In bytes.
    pub fn used(&self) -> u64 {
        self.used.load(Ordering::Relaxed)
    }

    /// In bytes.
    pub fn limit(&self) -> Option<u64> {
        self.limit
    }

    /// Takes `bytes`, all of them or none.
    pub(crate) fn take(&self, bytes: u64) -> bool {
        let fits = |used: u64| {
            used.checked_add(bytes)
                .filter(|sum| self.limit.is_none_or(|limit| *sum <= limit))
        };
        self.used
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, fits)
            .is_ok()
    }

    /// Counts what is in use already, whether or not it may be.
    pub(crate) fn add(&self, bytes: u64) {
        self.used.fetch_add(bytes, Ordering::Relaxed);
    }

    /// Up to `bytes` more may come into use.
    pub(crate) fn expect(&self, bytes: u64) {
        self.most.fetch_add(bytes, Ordering::Relaxed);
    }

    /// They will not, or they have gone.
    pub(crate) fn expect_no_more(&self, bytes: u64) {
        self.most.fetch_sub(bytes, Ordering::Relaxed);
    }

    /// In bytes.
    pub(crate) fn most(&self) -> u64 {
        self.most.load(Ordering::Relaxed)
    }

    /// Whether that would fit twice.
    pub(crate) fn holds_all(&self) -> bool {
        self.limit
            .is_none_or(|limit| self.most().saturating_mul(2) <= limit)
    }

    pub(crate) fn give_back(&self, bytes: u64) {
        self.used.fetch_sub(bytes, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_byte_can_be_taken_and_the_next_cannot() {
        let quota = Quota::new(Some(10));
        assert!(quota.take(4) && quota.take(6) && !quota.take(1));
        quota.give_back(6);
        assert!(!quota.take(7) && quota.take(6));
        assert_eq!(quota.used(), 10);
        // What an earlier server let someone use may be more than this one would.
        quota.add(5);
        assert!(!quota.take(1));
        assert!(Quota::new(None).take(u64::MAX));
    }
}
