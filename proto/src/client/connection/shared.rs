//! What the requests of a connection and the task that carries them have in common.

use std::sync::{Arc, OnceLock};

use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc, oneshot};

use super::error::Error;
use super::requests::{BYTES_MAX, REQUESTS_MAX};
use crate::admission::Command;
use crate::client::Outcome;
use crate::export::ExportInfo;
use crate::extents::ContextId;
use crate::headers::Headers;

/// What both ends know.
#[derive(Debug)]
pub(super) struct Shared {
    pub(super) info: ExportInfo,
    pub(super) headers: Headers,
    pub(super) contexts: Vec<(ContextId, String)>,
    /// How many requests may still be sent before one is answered.
    pub(super) requests: Arc<Semaphore>,
    /// How many bytes they may still be about.
    pub(super) bytes: Arc<Semaphore>,
    /// Why no request gets anywhere any more.
    end: OnceLock<Error>,
}

/// What is sent to the task.
#[derive(Debug)]
pub(super) enum Submission {
    Request(Command, Waiter),
    /// Answered when the goodbye has been sent.
    Disconnect(oneshot::Sender<Result<(), Error>>),
}

/// Whoever waits for a request, and what the request takes of the limits until it is answered.
#[derive(Debug)]
pub(super) struct Waiter {
    pub(super) answer: oneshot::Sender<Result<Outcome, Error>>,
    pub(super) _permits: (OwnedSemaphorePermit, OwnedSemaphorePermit),
}

pub(super) type Submissions = mpsc::UnboundedReceiver<Submission>;

impl Shared {
    pub(super) fn new(
        info: ExportInfo,
        headers: Headers,
        contexts: Vec<(ContextId, String)>,
    ) -> Self {
        Self {
            info,
            headers,
            contexts,
            requests: Arc::new(Semaphore::new(REQUESTS_MAX)),
            bytes: Arc::new(Semaphore::new(BYTES_MAX)),
            end: OnceLock::new(),
        }
    }

    /// Takes no more requests, for this reason or for the one that there was before.
    pub(super) fn end(&self, why: Error) {
        // The first reason is the reason.
        let _ = self.end.set(why);
        self.requests.close();
        self.bytes.close();
    }

    /// Why no more requests are taken.
    pub(super) fn why(&self) -> Error {
        self.end.get().cloned().unwrap_or(Error::Ended)
    }
}
