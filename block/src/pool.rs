//! System calls that may take long, away from the runtime's thread.

use std::io;

/// Runs `work` on a thread that may block. Dropping the future does not stop the work.
pub(crate) async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> io::Result<T> + Send + 'static,
) -> io::Result<T> {
    match tokio::task::spawn_blocking(work).await {
        Ok(result) => result,
        // The pool is shutting down, or the work panicked: either way it was not done.
        Err(gone) => Err(io::Error::other(gone)),
    }
}
