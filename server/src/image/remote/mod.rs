//! Disks that another NBD server has.
//!
//! [`RemoteStorage`] hands every request to a thread of its own, where a [`Keeper`] has the one
//! connection, makes a new one when it is lost, and sees each request through or answers it with an
//! error in time. What a server that is killed may have lost it is given again; what may still be
//! performed after it was given up is [told](RemoteStorage::unsettled).

mod connect;

mod given_up;
mod keeper;

mod again;
mod perform;
mod request;
mod unsynced;
mod witnesses;

#[cfg(test)]
mod fake_base;
#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, VecDeque};
use std::io;
use std::ops::Range;
use std::path::Path;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use block::{Extent, Zeroing};
use bytes::Bytes;
use proto::client::Error;
use tokio::runtime;
use tokio::sync::{mpsc, oneshot};
use tokio::task::LocalSet;
use tokio::time::timeout;

pub(crate) use connect::RemoteSpec;

use crate::failure::Failure;
use connect::{Abilities, Dial, Dialer, Link};
use given_up::GivenUp;
use keeper::{Keeper, Side};
use request::{Answer, Request, Task};
use unsynced::{Change, Unsynced, What};
use witnesses::Witnesses;

/// An export of another server, as storage.
#[derive(Debug)]
pub(crate) struct RemoteStorage {
    side: Arc<Side>,
    can: Abilities,
    /// Closed first when this is dropped, so that the thread ends.
    requests: Option<mpsc::UnboundedSender<Request>>,
    thread: Option<JoinHandle<()>>,
}

impl RemoteStorage {
    /// Connects to the export of `spec`, for the disk `name`.
    pub(crate) async fn open(name: &str, spec: &RemoteSpec) -> Result<Self, Failure> {
        let dialer = Dialer::new(spec)?;
        let (requests, queue) = mpsc::unbounded_channel();
        let (tell, told) = oneshot::channel();
        let (disk, patience) = (name.to_owned(), spec.patience);
        let life = move || {
            let runtime = runtime::Builder::new_current_thread().enable_all().build();
            let Ok(runtime) = runtime.inspect_err(|error| tracing::error!(%error, "no runtime"))
            else {
                return;
            };
            LocalSet::new().block_on(&runtime, async move {
                let dialer = Rc::new(dialer);
                let (link, witnesses) = match timeout(patience, first(&*dialer)).await {
                    Ok(Ok(first)) => first,
                    Ok(Err(error)) => {
                        let code = if connect::is_absence(&error) {
                            "base-unreachable"
                        } else {
                            "cannot-connect"
                        };
                        return drop(tell.send(Err((code, connect::told(&error)))));
                    }
                    Err(_) => {
                        let why = "no answer in time".to_owned();
                        return drop(tell.send(Err(("base-unreachable", why))));
                    }
                };
                let (keeper, side, can) = keeper(disk, dialer, patience, queue, (&link, witnesses));
                // Whoever does not wait any more closes the queue too.
                let _ = tell.send(Ok((side, can)));
                keeper.run(link).await;
            });
        };
        let cannot =
            |(code, why)| Failure::new(code, format!("cannot connect to '{}': {why}", spec.uri));
        let ours = |why: &dyn std::error::Error| cannot(("cannot-connect", why.to_string()));
        let thread = std::thread::Builder::new().name(format!("base-{name}"));
        let thread = thread.spawn(life).map_err(|error| ours(&error))?;
        let told = told.await.map_err(|error| ours(&error))?;
        let (side, can) = told.map_err(cannot)?;
        Ok(Self {
            side,
            can,
            requests: Some(requests),
            thread: Some(thread),
        })
    }

    /// Keeps account of what is under way, and of what was given up, in the folder `state`. Nothing can
    /// be changed before. Whether the state is new says what it means that nothing is there.
    pub(crate) async fn keep_account_in(&self, state: &Path, is_new: bool) -> io::Result<()> {
        let path = state.join(GIVEN_UP);
        self.side.given_up.keep_at(&path, is_new).await
    }

    /// Nobody may change it.
    pub(crate) fn is_read_only(&self) -> bool {
        self.can.read_only
    }

    /// What requests are made of at least, in bytes.
    pub(crate) fn block(&self) -> u64 {
        self.can.block
    }

    /// Whether what was written can be made durable.
    pub(crate) fn can_sync(&self) -> bool {
        self.can.flush || self.can.fua
    }

    /// More that may change by itself.
    pub(crate) async fn add_unsettled(&self, ranges: Vec<Range<u64>>) -> io::Result<()> {
        self.side.given_up.add(ranges).await
    }

    /// Somebody knows that the other side has ended all that was given up so far.
    pub(crate) fn settle(&self) -> io::Result<()> {
        self.side.given_up.settle()
    }

    /// What was given up, and may still be performed.
    pub(crate) fn unsettled(&self) -> Vec<Range<u64>> {
        let size = self.size();
        let ranges = self.side.given_up.ranges().into_iter();
        ranges
            .map(|range| range.start.min(size)..range.end.min(size))
            .filter(|range| !range.is_empty())
            .collect()
    }

    pub(super) fn size(&self) -> u64 {
        self.side.size.load(Ordering::Acquire)
    }

    /// It may come back with that size, by the doing of its server, and is gone on with at the size that
    /// it has for us. Returns when it is there.
    pub(crate) async fn expect(&self, size: u64) -> io::Result<()> {
        self.ask(Task::Expect(size)).await.map(drop)
    }

    /// It must have that size by now, by the doing of its server.
    pub(super) async fn grow(&self, size: u64) -> io::Result<()> {
        self.ask(Task::Grow(size)).await.map(drop)
    }

    pub(super) async fn read(&self, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
        let range = offset..offset + buffer.len() as u64;
        match self.ask(Task::Read(range)).await? {
            Answer::Data(data) if data.len() == buffer.len() => {
                buffer.copy_from_slice(&data);
                Ok(())
            }
            _ => Err(out_of_turn()),
        }
    }

    pub(super) async fn write(&self, offset: u64, data: &Bytes) -> io::Result<()> {
        let change = Change {
            range: offset..offset + data.len() as u64,
            what: What::Write(data.clone()),
        };
        self.change(change).await
    }

    pub(super) async fn zero(&self, range: Range<u64>, how: Zeroing) -> io::Result<()> {
        let fast = self.can.fast_zero;
        if how.fast() && !fast {
            return Err(io::ErrorKind::Unsupported.into());
        }
        let what = What::Zero(how);
        self.change(Change { range, what }).await
    }

    async fn change(&self, change: Change) -> io::Result<()> {
        if change.range.is_empty() {
            return Ok(());
        }
        self.ask(Task::Change(change)).await.map(drop)
    }

    pub(super) async fn sync(&self) -> io::Result<()> {
        self.ask(Task::Sync).await.map(drop)
    }

    pub(super) async fn extents(&self, range: Range<u64>) -> io::Result<Vec<Extent>> {
        match self.ask(Task::Extents(range)).await? {
            Answer::Extents(extents) => Ok(extents),
            _ => Err(out_of_turn()),
        }
    }

    async fn ask(&self, task: Task) -> io::Result<Answer> {
        let (answer, answered) = oneshot::channel();
        let request = Request { task, answer };
        let gone = || io::Error::other("the thread of the base has ended");
        let requests = self.requests.as_ref().ok_or_else(gone)?;
        requests.send(request).map_err(|_| gone())?;
        answered.await.map_err(|_| gone())?
    }
}

impl Drop for RemoteStorage {
    fn drop(&mut self) {
        self.requests = None;
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::error!("the thread of a base panicked");
        }
    }
}

/// The first connection, and what is known of the image by it.
async fn first(dialer: &impl Dial) -> Result<(Link, Witnesses), Error> {
    let link = dialer.dial().await?;
    let witnesses = Witnesses::of(&link.client, &Abilities::of(link.client.info())).await?;
    Ok((link, witnesses))
}

fn keeper<D: Dial>(
    name: String,
    dialer: Rc<D>,
    patience: Duration,
    requests: mpsc::UnboundedReceiver<Request>,
    (link, witnesses): (&Link, Witnesses),
) -> (Keeper<D>, Arc<Side>, Abilities) {
    let can = Abilities::of(link.client.info());
    let side = Arc::new(Side {
        size: AtomicU64::new(can.size),
        given_up: GivenUp::default(),
    });
    let keeper = Keeper {
        name,
        dialer,
        patience,
        can,
        side: Arc::clone(&side),
        requests,
        waiting: VecDeque::new(),
        under_way: BTreeMap::new(),
        unsynced: Unsynced::default(),
        witnesses,
        sync_failed: false,
        gone_since: None,
        expected: None,
        expecting: None,
        growing: None,
        numbers: 0,
    };
    (keeper, side, can)
}

fn out_of_turn() -> io::Error {
    io::Error::other("the base answered something else")
}

/// In the state of the disk.
const GIVEN_UP: &str = "given-up";
