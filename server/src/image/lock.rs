//! Having an image alone.

use std::fs::{self, File};
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::time::Duration;

use block::{ImageLock, LockError};
use tokio::time::{Instant, sleep};

use super::cannot_open;
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
            return is_still_at(path, file);
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

/// Whoever replaces an image has it locked until another is at its place, and what was there then has
/// no name: a server on it would lose all that its guests write.
fn is_still_at(path: &Path, file: &File) -> Result<(), Failure> {
    let found = fs::metadata(path).and_then(|there| Ok((there, file.metadata()?)));
    let (there, opened) = found.map_err(|error| cannot_open(path, &error))?;
    if (there.dev(), there.ino()) == (opened.dev(), opened.ino()) {
        return Ok(());
    }
    let message = format!("'{}' was replaced while it was opened", path.display());
    Err(Failure::new("image-locked", message).hint("try again"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn an_image_that_was_replaced_while_it_was_opened_is_not_used() {
        let folder = tempfile::tempdir().expect("a directory");
        let (path, new) = (folder.path().join("a"), folder.path().join("b"));
        let file = File::create_new(&path).expect("a file");
        lock(&path, &file).await.expect("nobody has it");
        File::create_new(&new).expect("another");
        fs::rename(&new, &path).expect("the place");
        let failure = lock(&path, &file).await.expect_err("it has no name");
        assert!(failure.message.contains("was replaced"), "{failure:?}");
    }
}
