use std::io;

use thiserror::Error;

/// Storage elsewhere has not answered in time.
///
/// What was asked for may have been done or not, or may yet be. Of a sync it says only that it was not
/// heard of: whatever has not been made durable is still at hand, and a later sync that succeeds covers
/// it.
#[derive(Clone, Copy, Debug, Error)]
#[error("the storage has not answered in time")]
pub struct Unreachable;

impl Unreachable {
    /// Whether `error` is this.
    pub fn is(error: &io::Error) -> bool {
        let inner = error.get_ref();
        inner
            .and_then(|inner| inner.downcast_ref::<Self>())
            .is_some()
    }
}
