//! What can become of a request, and of a connection.

use std::io;
use std::sync::Arc;

use thiserror::Error;

use crate::admission::Refusal;
use crate::client::{Declined, Failure, ServerViolation, Unaskable};

/// Why there is no answer, or none that was hoped for.
///
/// [`Failed`](Self::Failed) and [`Refused`](Self::Refused) are about one request, and
/// [`Declined`](Self::Declined), [`Unaskable`](Self::Unaskable) and
/// [`NoSuchContext`](Self::NoSuchContext) about one question. After any other the connection is
/// gone, and every request on it has the same error. What was written and not flushed by then may
/// or may not have been done.
///
/// Timeouts are the caller's: every future here can be dropped.
#[derive(Clone, Debug, Error)]
pub enum Error {
    /// The server says that the request failed.
    #[error(transparent)]
    Failed(#[from] Failure),
    /// The request was not sent, because the server could only have refused it.
    #[error("not sent: {0}")]
    Refused(#[from] Refusal),
    /// The server does not do what was asked during the handshake.
    #[error(transparent)]
    Declined(#[from] Declined),
    /// The question cannot be put.
    #[error(transparent)]
    Unaskable(#[from] Unaskable),
    /// The export has no metadata context of this name, or none that was selected.
    #[error("the export has no metadata context {0:?}")]
    NoSuchContext(String),

    /// The server closed the connection without a word.
    #[error("the server closed the connection")]
    Closed,
    /// The server is about to stop, and takes no more requests.
    #[error("the server is shutting down")]
    Leaving,
    /// The server left the protocol.
    #[error("the server left the protocol")]
    Violation(#[from] ServerViolation),
    /// The stream failed.
    #[error("the connection failed")]
    Io(#[source] Arc<io::Error>),
    /// We have disconnected, or the [`Connection`](super::Connection) has been dropped.
    #[error("the connection has ended")]
    Ended,
}

impl Error {
    /// Whether it is about one request, and the connection goes on.
    pub(super) fn is_of_one_request(&self) -> bool {
        matches!(self, Self::Failed(_) | Self::Refused(_))
    }
}

impl From<io::Error> for Error {
    fn from(error: io::Error) -> Self {
        if error.kind() == io::ErrorKind::UnexpectedEof {
            return Self::Closed;
        }
        Self::Io(Arc::new(error))
    }
}
