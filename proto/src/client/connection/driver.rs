//! The task that carries the requests of one connection.

use std::collections::HashMap;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use bytes::BytesMut;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::sync::{mpsc, oneshot};
use tokio_util::io::poll_read_buf;

use super::error::Error;
use super::requests::Client;
use super::sending::Sending;
use super::shared::{Shared, Submission, Submissions, Waiter};
use crate::client::{Completion, Failure, Session};
use crate::errno::Errno;

/// What carries requests to the server and brings answers back: a future, to be spawned or polled
/// beside them.
///
/// It ends when every [`Client`] is gone or one has disconnected, everything under way has been
/// answered and the server has been told goodbye; or with the error that all unanswered requests
/// have, too. Dropped early, it takes the connection with it.
#[derive(Debug)]
#[must_use = "requests get nowhere without it"]
pub struct Connection<S> {
    stream: S,
    session: Session,
    input: BytesMut,
    sending: Sending,
    submissions: Submissions,
    waiters: HashMap<u64, Waiter>,
    shared: Arc<Shared>,
    stage: Stage,
    goodbyes: Vec<oneshot::Sender<Result<(), Error>>>,
}

#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Stage {
    /// Requests are taken.
    Open,
    /// They no longer are; those under way are waited for.
    Leaving,
    /// Nothing is under way, and the last message is being sent.
    Goodbye,
    /// All has been sent.
    ShuttingDown,
    Over,
}

impl<S> Connection<S> {
    pub(super) fn new(stream: S, session: Session, input: BytesMut) -> (Client, Self) {
        let shared = Arc::new(Shared::new(
            session.info().clone(),
            session.headers(),
            session.contexts().to_vec(),
        ));
        // Bounded by the permits that each request has.
        let (submit, submissions) = mpsc::unbounded_channel();
        let connection = Self {
            stream,
            session,
            input,
            sending: Sending::default(),
            submissions,
            waiters: HashMap::new(),
            shared: Arc::clone(&shared),
            stage: Stage::Open,
            goodbyes: Vec::new(),
        };
        (Client::new(shared, submit), connection)
    }

    /// Takes no more requests. Those that have not been sent never will be.
    fn leave(&mut self, why: Error) {
        if self.stage == Stage::Open {
            self.stage = Stage::Leaving;
        }
        self.shared.end(why);
        self.submissions.close();
        while let Ok(submission) = self.submissions.try_recv() {
            match submission {
                Submission::Request(_, waiter) => {
                    // Whoever does not wait any more does not mind.
                    let _ = waiter.answer.send(Err(self.shared.why()));
                }
                Submission::Disconnect(goodbye) => self.goodbyes.push(goodbye),
            }
        }
    }

    /// Tells everyone who waits how it ended.
    fn end(&mut self, result: Result<(), Error>) -> Result<(), Error> {
        self.stage = Stage::Over;
        self.leave(result.clone().err().unwrap_or(Error::Ended));
        let why = self.shared.why();
        for (_, waiter) in self.waiters.drain() {
            let _ = waiter.answer.send(Err(why.clone()));
        }
        for goodbye in self.goodbyes.drain(..) {
            let _ = goodbye.send(result.clone());
        }
        result
    }

    /// Puts into bytes what has been asked for.
    fn submit(&mut self, submission: Submission) {
        match submission {
            // Nobody waits for it, and it has not been sent.
            Submission::Request(_, waiter) if waiter.answer.is_closed() => {}
            Submission::Request(command, waiter) => {
                match self.session.submit(command, self.sending.tail()) {
                    Ok(submitted) => {
                        self.sending.push(submitted.payload);
                        self.waiters.insert(submitted.cookie.0, waiter);
                    }
                    Err(refusal) => {
                        let _ = waiter.answer.send(Err(refusal.into()));
                    }
                }
            }
            Submission::Disconnect(goodbye) => {
                self.goodbyes.push(goodbye);
                self.leave(Error::Ended);
            }
        }
    }

    /// Hands what came of a request to whoever waits for it, if anyone still does.
    fn complete(&mut self, completion: Completion) {
        let leaving = matches!(
            &completion.result,
            Err(Failure {
                errno: Errno::Shutdown,
                ..
            })
        );
        if let Some(waiter) = self.waiters.remove(&completion.cookie.0) {
            let _ = waiter.answer.send(completion.result.map_err(Error::from));
        }
        if leaving {
            // The protocol wants us to say goodbye now.
            self.leave(Error::Leaving);
        }
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin> Connection<S> {
    fn poll_end(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Error>> {
        loop {
            self.take_submissions(cx);
            let sent = self.sending.poll_sent(&mut self.stream, cx)?;
            let received = self.poll_receive(cx)?;
            match self.stage {
                // A server that closes now has heard enough.
                Stage::Goodbye | Stage::ShuttingDown if received == Received::Closed => {
                    return Poll::Ready(Ok(()));
                }
                Stage::Leaving if received == Received::Closed && self.session.under_way() == 0 => {
                    return Poll::Ready(Ok(()));
                }
                _ if received == Received::Closed => return Poll::Ready(Err(Error::Closed)),
                // Answers may have made room for more, or ended it.
                _ if received == Received::Answers => {}
                Stage::Leaving if self.session.under_way() == 0 => {
                    self.stage = Stage::Goodbye;
                    self.session.disconnect(self.sending.tail());
                }
                Stage::Goodbye if sent.is_ready() => self.stage = Stage::ShuttingDown,
                Stage::ShuttingDown => {
                    return Pin::new(&mut self.stream)
                        .poll_shutdown(cx)
                        .map_err(Error::from);
                }
                _ => return Poll::Pending,
            }
        }
    }

    fn take_submissions(&mut self, cx: &mut Context<'_>) {
        while self.stage == Stage::Open {
            match self.submissions.poll_recv(cx) {
                Poll::Ready(Some(submission)) => self.submit(submission),
                Poll::Ready(None) => self.leave(Error::Ended),
                Poll::Pending => return,
            }
        }
    }

    /// Receives until there is nothing more to be had.
    fn poll_receive(&mut self, cx: &mut Context<'_>) -> Result<Received, Error> {
        let mut received = Received::Nothing;
        loop {
            while let Some(completion) = self.session.receive(&mut self.input)? {
                self.complete(completion);
                received = Received::Answers;
            }
            match self.poll_read(cx)? {
                Poll::Pending => return Ok(received),
                Poll::Ready(0) => return Ok(Received::Closed),
                Poll::Ready(_) => {}
            }
        }
    }

    /// Reads as much as there is room for: what the next reply needs, which has been checked
    /// against what was asked for, and at least a little.
    fn poll_read(&mut self, cx: &mut Context<'_>) -> Result<Poll<usize>, Error> {
        let wanted = self.session.wanted(&self.input);
        let room = wanted.saturating_sub(self.input.len()).max(READ_SIZE);
        self.input.reserve(room);
        match poll_read_buf(Pin::new(&mut self.stream), cx, &mut self.input) {
            Poll::Pending => Ok(Poll::Pending),
            Poll::Ready(length) => Ok(Poll::Ready(length?)),
        }
    }
}

#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Received {
    Nothing,
    Answers,
    Closed,
}

impl<S: AsyncRead + AsyncWrite + Unpin> Future for Connection<S> {
    type Output = Result<(), Error>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let this = &mut *self;
        if this.stage == Stage::Over {
            return Poll::Ready(Err(this.shared.why()));
        }
        this.poll_end(cx).map(|result| this.end(result))
    }
}

impl<S> Drop for Connection<S> {
    fn drop(&mut self) {
        if self.stage != Stage::Over {
            // Nobody waits for ever.
            let _ = self.end(Err(Error::Ended));
        }
    }
}

/// What is received at once: many small replies, or a piece of a long one.
const READ_SIZE: usize = 64 << 10;
