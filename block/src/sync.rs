use std::io;
use std::sync::atomic::{AtomicU64, Ordering};

use tokio::sync::Mutex;

/// One sync for all who wait, and none that began before someone asked.
///
/// A sync makes durable what was written before it *began*; whoever asks while one is under way
/// cannot share it, but shares the next with everyone else who came meanwhile.
#[derive(Debug, Default)]
pub struct SharedSync {
    /// How many syncs have begun.
    begun: AtomicU64,
    /// Held while a sync is under way: the number of the last that has ended, and how.
    ended: Mutex<(u64, Option<io::ErrorKind>)>,
}

impl SharedSync {
    /// Returns when a sync that began after this call has ended, with its result.
    pub async fn run<F: Future<Output = io::Result<()>>>(
        &self,
        sync: impl FnOnce() -> F,
    ) -> io::Result<()> {
        let before = self.begun.load(Ordering::SeqCst);
        let mut ended = self.ended.lock().await;
        if ended.0 > before {
            return ended.1.map_or(Ok(()), |kind| Err(kind.into()));
        }
        let number = self.begun.fetch_add(1, Ordering::SeqCst) + 1;
        let result = sync().await;
        *ended = (number, result.as_ref().err().map(io::Error::kind));
        result
    }
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;

    use super::*;

    #[tokio::test]
    async fn who_asks_during_a_sync_shares_the_next_one_only() {
        let shared = SharedSync::default();
        let syncs = Cell::new(0);
        let (open, gate) = tokio::sync::oneshot::channel::<()>();

        let first = shared.run(|| async {
            syncs.set(syncs.get() + 1);
            gate.await.expect("the test opens the gate");
            Ok(())
        });
        let another = || {
            shared.run(|| async {
                syncs.set(syncs.get() + 1);
                Ok(())
            })
        };
        let opens = async { open.send(()).expect("the first sync waits") };
        let (a, b, c, ()) = tokio::join!(first, another(), another(), opens);
        assert!(a.is_ok() && b.is_ok() && c.is_ok());
        assert_eq!(
            syncs.get(),
            2,
            "one for the first, one for both who came during it"
        );
    }

    #[tokio::test]
    async fn a_failure_reaches_everyone_who_shared_the_sync() {
        let shared = SharedSync::default();
        let fail = || shared.run(|| async { Err(io::ErrorKind::StorageFull.into()) });
        let (a, b) = tokio::join!(fail(), fail());
        assert_eq!(a.unwrap_err().kind(), io::ErrorKind::StorageFull);
        assert_eq!(b.unwrap_err().kind(), io::ErrorKind::StorageFull);
    }
}
