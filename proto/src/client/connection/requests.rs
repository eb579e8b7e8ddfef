//! Requests, as one makes them.

use std::ops::Range;
use std::sync::Arc;

use bytes::Bytes;
use tokio::sync::{mpsc, oneshot};

use super::error::Error;
use super::map::Map;
use super::shared::{Shared, Submission, Waiter};
use crate::admission::Command;
use crate::client::{BlockStatus, EXTENTS_ACCEPTED_MAX, Outcome, Piece, into_bytes};
use crate::export::{ExportInfo, TransmissionFlags as Flags};
use crate::extents::{ContextId, Extent};
use crate::headers::Headers;
use crate::request::PAYLOAD_MAX;

/// How many requests are sent before one is answered; others wait. Servers take as many and more,
/// and a device is as fast as it gets with fewer.
pub const REQUESTS_MAX: usize = 128;

/// How many bytes these requests are about: data that is written or read, and room for extents. It
/// bounds what is kept in memory for a server that is slow, and holds two of the longest requests.
pub const BYTES_MAX: usize = 64 << 20;

/// An export that has been entered, for any number of requests at once.
///
/// Clones share the connection. Requests are sent in the order in which their futures are first
/// polled, and answered in any order; a range that is being written is not to be read, nor written
/// again, until there is an answer. When the last clone is gone, the server is told goodbye.
///
/// A request's future can be dropped. If the request has been sent, what the server has to say
/// about it is received and thrown away, so that the connection stays in step; a write may have
/// been done or not. If it has not, it never will be.
///
/// Reads and writes longer than the server takes are cut into several requests, as are other ranges
/// that are longer than a request can say. If one of them fails, the whole fails when all have been
/// answered, and the others may have been done: that can be undone by nobody, and is the same as for
/// any write that fails.
#[derive(Clone, Debug)]
pub struct Client {
    shared: Arc<Shared>,
    submissions: mpsc::UnboundedSender<Submission>,
}

/// When a change is to be durable.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub enum Durability {
    /// After the next [`flush`](Client::flush).
    #[default]
    Later,
    /// When it is answered. Refused where the server does not offer it.
    Now,
}

/// How a range becomes zero.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct Zeroing {
    /// When it is durable.
    pub durability: Durability,
    /// Whether the range stays allocated.
    pub no_hole: bool,
    /// Whether to fail with [`Errno::NotSup`](crate::Errno::NotSup) rather than be as slow as a write.
    pub fast: bool,
}

impl Client {
    pub(super) fn new(shared: Arc<Shared>, submissions: mpsc::UnboundedSender<Submission>) -> Self {
        Self {
            shared,
            submissions,
        }
    }

    /// What has been entered: size, what it can do, the sizes of requests that suit it.
    pub fn info(&self) -> &ExportInfo {
        &self.shared.info
    }

    /// The form of requests and replies.
    pub fn headers(&self) -> Headers {
        self.shared.headers
    }

    /// The metadata contexts that were asked for and that the export has.
    pub fn contexts(&self) -> &[(ContextId, String)] {
        &self.shared.contexts
    }

    /// What a block status calls the context of this name.
    pub fn context(&self, name: &str) -> Result<ContextId, Error> {
        let mut contexts = self.shared.contexts.iter();
        match contexts.find(|(_, other)| other == name) {
            Some((id, _)) => Ok(*id),
            None => Err(Error::NoSuchContext(name.to_owned())),
        }
    }

    /// Reads a range; holes are zeroes.
    pub async fn read(&self, range: Range<u64>) -> Result<Bytes, Error> {
        Ok(into_bytes(self.read_pieces(range).await?))
    }

    /// Reads a range as it is sent: the pieces follow each other without gaps, and a hole takes no
    /// memory.
    ///
    /// Each byte is in a piece that the server has sent. A reply that leaves any out is a violation
    /// of the protocol.
    pub async fn read_pieces(&self, range: Range<u64>) -> Result<Vec<Piece>, Error> {
        self.read_ranges(std::slice::from_ref(&range)).await
    }

    /// Reads several ranges at once, as [`read_pieces`](Self::read_pieces) reads one. The pieces of
    /// each range follow those of the range before it.
    pub async fn read_ranges(&self, ranges: &[Range<u64>]) -> Result<Vec<Piece>, Error> {
        let mut pieces = Vec::new();
        let longest = self.payload_max();
        let parts = ranges.iter().flat_map(|range| self.parts(range, longest));
        let requests = parts.map(|range| Command::Read {
            range,
            do_not_fragment: false,
        });
        // Collected, since the compiler cannot see that a future which holds this is `Send`.
        let requests: Vec<Command> = requests.collect();
        for outcome in self.perform(requests).await? {
            match outcome {
                Outcome::Data(part) => pieces.extend(part),
                Outcome::Done | Outcome::BlockStatus(_) => return Err(Error::Ended),
            }
        }
        Ok(pieces)
    }

    /// Writes to a range that starts at `offset`.
    pub async fn write(
        &self,
        offset: u64,
        data: Bytes,
        durability: Durability,
    ) -> Result<(), Error> {
        let range = offset..offset.saturating_add(data.len() as u64);
        let requests = self.parts(&range, self.payload_max()).map(|part| {
            let start = (part.start - offset) as usize;
            let length = (part.end - part.start) as usize;
            Command::Write {
                range: part,
                data: data.slice(start..(start + length).min(data.len())),
                fua: durability == Durability::Now,
            }
        });
        self.perform(requests).await.map(drop)
    }

    /// Makes a range read as zeroes.
    pub async fn write_zeroes(&self, range: Range<u64>, how: Zeroing) -> Result<(), Error> {
        let requests = self
            .parts(&range, EFFECT_MAX)
            .map(|range| Command::WriteZeroes {
                range,
                fua: how.durability == Durability::Now,
                no_hole: how.no_hole,
                fast: how.fast,
            });
        self.perform(requests).await.map(drop)
    }

    /// Says that a range is no longer needed; what it reads as then is the server's choice.
    pub async fn trim(&self, range: Range<u64>, durability: Durability) -> Result<(), Error> {
        let requests = self
            .parts(&range, self.effect_max())
            .map(|range| Command::Trim {
                range,
                fua: durability == Durability::Now,
            });
        self.perform(requests).await.map(drop)
    }

    /// Says that a range will be read soon.
    pub async fn cache(&self, range: Range<u64>) -> Result<(), Error> {
        let parts = self.parts(&range, self.effect_max());
        let requests = parts.map(|range| Command::Cache { range });
        self.perform(requests).await.map(drop)
    }

    /// Makes durable every write that was answered before.
    pub async fn flush(&self) -> Result<(), Error> {
        self.perform([Command::Flush]).await.map(drop)
    }

    /// What the selected contexts say about the beginning of a range.
    ///
    /// How much of it is the server's choice, and in the [`BlockStatus`]; [`map`](Self::map) goes
    /// on to the end.
    pub async fn block_status(&self, range: Range<u64>) -> Result<BlockStatus, Error> {
        let all: Vec<ContextId> = self.contexts().iter().map(|(id, _)| *id).collect();
        self.block_status_of(range, &all).await
    }

    /// What some of the selected contexts say about the beginning of a range. Where a server cannot
    /// be asked for some, it is asked for all.
    pub async fn block_status_of(
        &self,
        range: Range<u64>,
        contexts: &[ContextId],
    ) -> Result<BlockStatus, Error> {
        let selected = self.contexts().iter().map(|(id, _)| *id);
        let may_filter = self.info().flags.contains(Flags::BLOCK_STATUS_PAYLOAD);
        let command = Command::BlockStatus {
            range: range.start..range.end.min(range.start.saturating_add(self.effect_max())),
            contexts: if may_filter {
                contexts.to_vec()
            } else {
                selected.collect()
            },
            one: false,
        };
        match self.perform([command]).await?.pop() {
            Some(Outcome::BlockStatus(status)) => Ok(status),
            _ => Err(Error::Ended),
        }
    }

    /// What the selected contexts say about a range, a stretch at a time.
    pub fn map(&self, range: Range<u64>) -> Map<'_> {
        Map::new(self, range)
    }

    /// Says goodbye when everything under way has been answered. Requests made after this, on any
    /// clone, fail.
    pub async fn disconnect(self) -> Result<(), Error> {
        let (answer, answered) = oneshot::channel();
        let submission = Submission::Disconnect(answer);
        self.submissions
            .send(submission)
            .map_err(|_| self.shared.why())?;
        answered.await.map_err(|_| self.shared.why())?
    }

    /// Sends these requests, as many at once as the limits allow, and waits for all the outcomes: also
    /// where one has failed, since what has not been answered may still be done.
    async fn perform(
        &self,
        requests: impl IntoIterator<Item = Command>,
    ) -> Result<Vec<Outcome>, Error> {
        let mut answers = Vec::new();
        for command in requests {
            answers.push(self.submit(command).await?);
        }
        let mut outcomes = Vec::with_capacity(answers.len());
        let mut failed: Option<Error> = None;
        for answer in answers {
            match answer.await.unwrap_or_else(|_| Err(self.shared.why())) {
                Ok(outcome) => outcomes.push(outcome),
                // That the connection is gone says more: then some were not answered at all.
                Err(error) if failed.is_none() || !error.is_of_one_request() => {
                    failed = Some(error);
                }
                Err(_) => {}
            }
        }
        failed.map_or(Ok(outcomes), Err)
    }

    async fn submit(
        &self,
        command: Command,
    ) -> Result<oneshot::Receiver<Result<Outcome, Error>>, Error> {
        let shared = &self.shared;
        let request = Arc::clone(&shared.requests).acquire_owned().await;
        let request = request.map_err(|_| shared.why())?;
        let bytes = Arc::clone(&shared.bytes).acquire_many_owned(cost(&command));
        let bytes = bytes.await.map_err(|_| shared.why())?;

        let (answer, answered) = oneshot::channel();
        let waiter = Waiter {
            answer,
            _permits: (request, bytes),
        };
        self.submissions
            .send(Submission::Request(command, waiter))
            .map_err(|_| shared.why())?;
        Ok(answered)
    }

    /// The longest read or write that the server takes, whole blocks of it.
    fn payload_max(&self) -> u64 {
        let sizes = self.shared.info.block_size;
        let minimum = u64::from(sizes.minimum());
        PAYLOAD_MAX.min(u64::from(sizes.maximum())) / minimum * minimum
    }

    /// The longest range without data that a request can say, in blocks of any size.
    fn effect_max(&self) -> u64 {
        match self.shared.headers {
            Headers::Extended => u64::MAX,
            Headers::Structured | Headers::Simple => EFFECT_MAX,
        }
    }

    /// A range in parts of at most `longest`. Nothing is one empty part if it lies outside of the
    /// export, so that it is refused like something would be.
    fn parts(&self, range: &Range<u64>, longest: u64) -> impl Iterator<Item = Range<u64>> + use<> {
        let (mut start, end) = (range.start, range.end);
        let size = self.shared.info.size;
        // Backwards or beyond the end: one request, which will be refused in whole.
        let wrong = (start > end || end > size).then_some(start..end);
        if wrong.is_some() {
            start = end;
        }
        let parts = std::iter::from_fn(move || {
            let part = start..end.min(start.saturating_add(longest));
            start = part.end;
            (part.start < part.end).then_some(part)
        });
        wrong.into_iter().chain(parts)
    }
}

/// What a request takes of [`BYTES_MAX`].
fn cost(command: &Command) -> u32 {
    let bytes = match command {
        Command::Read { range, .. } | Command::Write { range, .. } => {
            range.end.saturating_sub(range.start)
        }
        Command::BlockStatus { .. } => EXTENTS_MEMORY,
        _ => 0,
    };
    // What is longer than a request can be will be refused.
    bytes.min(PAYLOAD_MAX) as u32
}

/// What the extents of one reply take at most.
const EXTENTS_MEMORY: u64 = (EXTENTS_ACCEPTED_MAX * size_of::<Extent>()) as u64;

/// What 32 bits can say, in blocks of any size.
const EFFECT_MAX: u64 = (1 << 32) - (64 << 10);
