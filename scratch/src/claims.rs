use std::ops::Range;
use std::sync::PoisonError;

use tokio::sync::Notify;

use crate::sync::{Mutex, MutexGuard};

/// Who is copying which granules of a disk.
///
/// Holding a claim means that nobody else copies, or is about to copy, any granule of it. A writer
/// holds at most one claim, over all it lacks, so no two can wait for each other.
#[derive(Debug, Default)]
pub struct Claims {
    held: Mutex<Vec<Range<u64>>>,
    dropped: Notify,
}

/// Granules that one writer copies alone, until this is dropped.
#[derive(Debug)]
pub(crate) struct Claim<'a> {
    claims: &'a Claims,
    granules: Range<u64>,
}

impl Claims {
    /// Waits until none of `granules` is claimed, and claims them all.
    pub(crate) async fn claim(&self, granules: Range<u64>) -> Claim<'_> {
        loop {
            let dropped = self.dropped.notified();
            tokio::pin!(dropped);
            // Counted as waiting before the look, or a claim dropped in between would go unnoticed.
            dropped.as_mut().enable();
            if self.try_claim(&granules) {
                return Claim {
                    claims: self,
                    granules,
                };
            }
            dropped.await;
        }
    }

    fn try_claim(&self, granules: &Range<u64>) -> bool {
        let mut held = self.held();
        let free = held
            .iter()
            .all(|h| h.end <= granules.start || granules.end <= h.start);
        if free {
            held.push(granules.clone());
        }
        free
    }

    fn held(&self) -> MutexGuard<'_, Vec<Range<u64>>> {
        self.held.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Claim<'_> {
    fn drop(&mut self) {
        let mut held = self.claims.held();
        if let Some(at) = held.iter().position(|h| *h == self.granules) {
            held.swap_remove(at);
        }
        drop(held);
        self.claims.dropped.notify_waiters();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn overlapping_claims_wait_and_others_do_not() {
        let claims = Claims::default();
        let first = claims.claim(0..10).await;
        let beside = claims.claim(10..20).await;

        let overlapping = claims.claim(9..11);
        tokio::pin!(overlapping);
        assert!(poll(overlapping.as_mut()).is_none());
        drop(first);
        assert!(poll(overlapping.as_mut()).is_none(), "10..20 is still held");
        drop(beside);
        overlapping.await;
        assert!(claims.held().is_empty());
    }

    fn poll<F: Future>(future: std::pin::Pin<&mut F>) -> Option<F::Output> {
        let mut context = std::task::Context::from_waker(std::task::Waker::noop());
        match future.poll(&mut context) {
            std::task::Poll::Ready(output) => Some(output),
            std::task::Poll::Pending => None,
        }
    }
}
