//! Which engine does what waits for a device.

use block::Engine;

use crate::failure::Failure;

/// What the user wants.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum IoEngine {
    /// What there is.
    Auto,
    /// A ring of the kernel's, or nothing.
    IoUring,
    /// A pool of threads.
    Threads,
}

impl IoEngine {
    /// Finds out what there is.
    pub(crate) fn choose(self) -> Result<Engine, Failure> {
        match (self, Engine::io_uring()) {
            (Self::Threads, _) => Ok(Engine::Threads),
            (_, Ok(engine)) => Ok(engine),
            (Self::Auto, Err(error)) => {
                tracing::info!(%error, "io_uring cannot be used here: threads do the same");
                Ok(Engine::Threads)
            }
            (Self::IoUring, Err(error)) => {
                let message = format!("io_uring cannot be used here: {error}");
                let hint = "see that kernel.io_uring_disabled is 0 and that no seccomp filter refuses it, \
                            or leave --io-engine out";
                Err(Failure::new("no-io-uring", message).hint(hint))
            }
        }
    }
}
