//! Requests on their way to another server.

use std::io;
use std::ops::Range;

use block::{Extent, Unreachable};
use bytes::Bytes;
use proto::client::{Client, Error};
use tokio::sync::oneshot;
use tokio::time::Instant;

use super::connect::Abilities;
use super::perform::{self, around};
use super::unsynced::Change;

/// What is asked of another server, and who waits for it.
pub(super) struct Request {
    pub(super) task: Task,
    pub(super) answer: oneshot::Sender<io::Result<Answer>>,
}

#[derive(Clone, Debug)]
pub(super) enum Task {
    Read(Range<u64>),
    Change(Change),
    Sync,
    Extents(Range<u64>),
    /// It may come back with this size, which its server has given it. Nobody is told of it yet.
    Expect(u64),
    /// It is to have this size from here on, which its server has given it.
    Grow(u64),
}

#[derive(Debug)]
pub(super) enum Answer {
    Done,
    Data(Bytes),
    Extents(Vec<Extent>),
}

/// A request that has not been answered.
pub(super) struct Pending {
    pub(super) number: u64,
    pub(super) task: Task,
    /// Nobody waits for a flush that is our own.
    pub(super) answer: Option<oneshot::Sender<io::Result<Answer>>>,
    pub(super) deadline: Instant,
    /// Where it is recorded that this change is under way.
    pub(super) slot: Option<usize>,
    /// What a flush covers.
    pub(super) mark: u64,
}

/// What came of a request on one connection.
pub(super) type Finished = (u64, Result<Performed, Error>);

pub(super) enum Performed {
    Answered(Answer),
    Changed(Vec<Change>),
}

impl Pending {
    /// What it changes, in whole blocks.
    pub(super) fn changes(&self, block: u64) -> Option<Range<u64>> {
        match &self.task {
            Task::Change(change) => Some(around(&change.range, block)),
            _ => None,
        }
    }

    pub(super) fn answer(self, answer: io::Result<Answer>) {
        if let Some(waiter) = self.answer {
            // Whoever does not wait any more does not mind.
            let _ = waiter.send(answer);
        }
    }

    pub(super) fn give_up(self) {
        self.answer(Err(io::Error::other(Unreachable)));
    }
}

pub(super) async fn perform_task(
    client: &Client,
    can: &Abilities,
    task: Task,
) -> Result<Performed, Error> {
    Ok(match task {
        Task::Read(range) => {
            Performed::Answered(Answer::Data(perform::read(client, can, &range).await?))
        }
        Task::Change(change) => Performed::Changed(perform::change(client, can, change).await?),
        Task::Extents(range) => {
            let extents = perform::extents(client, can, &range).await?;
            Performed::Answered(Answer::Extents(extents))
        }
        Task::Sync => {
            if can.flush {
                client.flush().await?;
            }
            Performed::Answered(Answer::Done)
        }
        Task::Expect(_) | Task::Grow(_) => Performed::Answered(Answer::Done),
    })
}
