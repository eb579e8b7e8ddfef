use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use bitmap::Kept;
use block::SharedSync;
use scratch::Durable;

/// Syncs of one file that is kept in memory too: after one that failed, none is believed until the
/// file has been written anew.
#[derive(Debug, Default)]
pub(super) struct SoundSync {
    shared: SharedSync,
    failed: AtomicBool,
}

impl SoundSync {
    /// Returns when what was stored before the call is durable.
    pub(super) async fn run<P: Durable>(&self, kept: &impl Kept<Store = P>) -> io::Result<()> {
        self.shared
            .run(|| async {
                if !self.has_failed() {
                    let Err(error) = kept.store().sync().await else {
                        return Ok(());
                    };
                    tracing::error!(%error, "a sync of the state failed: the file is written anew");
                    self.failed.store(true, Ordering::Release);
                }
                write_anew(kept).await?;
                self.failed.store(false, Ordering::Release);
                Ok(())
            })
            .await
    }

    /// Whether a sync has failed, and the file has not been written anew since.
    pub(super) fn has_failed(&self) -> bool {
        self.failed.load(Ordering::Acquire)
    }
}

/// Writes a new file from memory, while stores go into both, and puts it in the place of the old.
///
/// A process killed on the way leaves the old file or the new one, and both have everything that was
/// stored. A power cut leaves the old one, of which no sync has been believed since one failed; or
/// the new one, which is durable.
async fn write_anew<P: Durable>(kept: &impl Kept<Store = P>) -> io::Result<()> {
    let next = Arc::new(kept.store().successor()?);
    kept.begin_anew(Arc::clone(&next));
    let renamed = async {
        for part in 0..kept.parts() {
            kept.copy_part(part)?;
            if part % PARTS_AT_ONCE == 0 {
                tokio::task::yield_now().await;
            }
        }
        next.sync().await?;
        next.succeed()
    };
    let renamed = renamed.await;
    // Once it has the name it is the one that is found after a kill, whatever else fails.
    kept.end_anew(renamed.is_ok());
    renamed?;
    next.sync_place().await
}

/// So much is copied before others have their turn.
const PARTS_AT_ONCE: u64 = 64;
