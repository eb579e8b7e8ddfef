//! Somebody at the terminal, or a service manager, wants us to stop.

use std::pin::pin;

use tokio::signal::unix::{Signal, SignalKind, signal};

use crate::cli::problem::Problem;

/// Hears of signals to stop. While there is one of these, they do not end the process.
pub(super) struct Stop {
    interrupt: Signal,
    terminate: Signal,
    is_stopped: bool,
}

impl Stop {
    pub(super) fn listen() -> Result<Self, Problem> {
        let listen = |kind| {
            signal(kind).map_err(|error| {
                Problem::new("signals", format!("cannot wait for signals: {error}"))
            })
        };
        Ok(Self {
            interrupt: listen(SignalKind::interrupt())?,
            terminate: listen(SignalKind::terminate())?,
            is_stopped: false,
        })
    }

    /// What comes of some work, unless it is given up for a signal.
    pub(super) async fn unless_stopped<T>(&mut self, work: impl Future<Output = T>) -> Option<T> {
        if self.is_stopped {
            return None;
        }
        let work = pin!(work);
        tokio::select! {
            biased;
            _ = self.interrupt.recv() => {}
            _ = self.terminate.recv() => {}
            outcome = work => return Some(outcome),
        }
        self.is_stopped = true;
        None
    }

    /// What comes of some work that can be told to stop, and ends soon after.
    pub(super) async fn telling<T>(&mut self, work: impl Future<Output = T>, tell: impl Fn()) -> T {
        if self.is_stopped {
            tell();
        }
        let mut work = pin!(work);
        if let Some(outcome) = self.unless_stopped(work.as_mut()).await {
            return outcome;
        }
        tell();
        work.await
    }
}
