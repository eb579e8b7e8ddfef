//! Having an image alone.

use std::fs::File;
use std::path::Path;
use std::time::Duration;

use block::{ImageLock, LockError};
use tokio::time::{Instant, sleep};

use crate::failure::Failure;

/// How long what an ended process had asked of a device is waited for. A disk that is well answers
/// within this, also when it is busy.
const LAST_REQUESTS: Duration = Duration::from_secs(5);

/// How often it is tried meanwhile.
const RETRY: Duration = Duration::from_millis(10);

/// Locks the image at `path`, which `file` is.
///
/// The lock of a process that was killed lasts until its last request has ended, and nobody may write
/// before that. So a server that is started again at once finds the image locked, and nobody who has
/// it; for that it waits a little.
pub(super) async fn lock(path: &Path, file: &File) -> Result<(), Failure> {
    let mut until = None;
    loop {
        let Err(error) = ImageLock::take(file) else {
            return Ok(());
        };
        let nobody = matches!(error, LockError::Held { pid: None });
        let until = *until.get_or_insert_with(|| {
            if nobody {
                let path = path.display();
                tracing::info!(%path, "locked, but nobody has it open: it may soon be free");
            }
            Instant::now() + LAST_REQUESTS
        });
        if !nobody || Instant::now() >= until {
            let message = format!("cannot use '{}': {error}", path.display());
            return Err(Failure::new("image-locked", message));
        }
        sleep(RETRY).await;
    }
}
