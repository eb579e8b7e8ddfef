//! Who has the connection to another server, and sees every request through.
//!
//! One task owns what is known of the other side. A change is sent when no other change of its blocks
//! is under way, and it is recorded before that it is ([`GivenUp`]). What a lost connection leaves
//! unanswered is sent again on the next one, with the same bytes, after everything that a server which
//! was killed may have lost ([`Unsynced`]), and before anything newer of the same blocks; nobody is
//! told of it before the new answer. The old connection's server may still perform it, now or much
//! later: so its range is [given up](GivenUp::lose_all) too, and stays marked and preserved whenever
//! an era begins.

use std::collections::{BTreeMap, VecDeque};
use std::io;
use std::ops::Range;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use block::Unreachable;
use proto::Errno;
use proto::client::{Client, Error, Failure};
use tokio::sync::{mpsc, oneshot};
use tokio::time::{Instant, sleep, sleep_until, timeout};

use super::again::Again;
use super::connect::{Abilities, Dial, Link, error_of, told};
use super::given_up::{GivenUp, SLOTS};
use super::request::{Answer, Finished, Pending, Performed, Request, Task, perform_task};
use super::unsynced::{Change, Unsynced, meets};
use super::witnesses::Witnesses;

/// The other side, as it is seen from all threads.
#[derive(Debug)]
pub(super) struct Side {
    /// How large it is for us.
    pub(super) size: AtomicU64,
    pub(super) given_up: GivenUp,
}

pub(super) struct Keeper<D> {
    pub(super) name: String,
    pub(super) dialer: Rc<D>,
    pub(super) patience: Duration,
    pub(super) can: Abilities,
    pub(super) side: Arc<Side>,
    pub(super) requests: mpsc::UnboundedReceiver<Request>,
    /// In the order in which they came, and not sent on this connection yet.
    pub(super) waiting: VecDeque<Pending>,
    pub(super) under_way: BTreeMap<u64, Pending>,
    pub(super) unsynced: Unsynced,
    pub(super) witnesses: Witnesses,
    /// Nothing that is not durable is believed any more, and nothing kept.
    pub(super) sync_failed: bool,
    /// Since when nobody answers.
    pub(super) gone_since: Option<Instant>,
    /// Another size that it may come back with, as somebody says.
    pub(super) expected: Option<u64>,
    /// Who waits for it to come back, with that size or as it was.
    pub(super) expecting: Option<(Instant, oneshot::Sender<io::Result<Answer>>)>,
    /// The size that its server has given it, as somebody says, and who waits for that.
    pub(super) growing: Option<Growing>,
    pub(super) numbers: u64,
}

/// A size that is to be found on the next connection.
pub(super) struct Growing {
    size: u64,
    deadline: Instant,
    answer: oneshot::Sender<io::Result<Answer>>,
}

/// Why a connection is of no more use.
enum Lost {
    Connection(Error),
    /// Nothing was answered for too long.
    Silence,
    /// The base is to have another size, which only a new connection tells.
    Grown,
    /// Nobody asks for anything any more.
    Over,
}

impl<D: Dial> Keeper<D> {
    pub(super) async fn run(mut self, first: Link) {
        let mut link = first;
        loop {
            let lost = self.serve(&link).await;
            self.side_is_lost().await;
            let reason = match lost {
                Lost::Over => {
                    let _ = timeout(GOODBYE_MAX, link.client.clone().disconnect()).await;
                    return;
                }
                Lost::Grown => "its size is asked for".to_owned(),
                Lost::Connection(error) => told(&error),
                Lost::Silence => SILENT.to_owned(),
            };
            tracing::warn!(disk = self.name, reason, "the base is connected to anew");
            self.gone_since = Some(Instant::now());
            // Before another is made: a server may take one at a time.
            drop(link);
            match self.linked().await {
                Some(next) => link = next,
                None => return,
            }
            self.gone_since = None;
            if let Some((_, answer)) = self.expecting.take() {
                let _ = answer.send(Ok(Answer::Done));
            }
            tracing::info!(disk = self.name, "the base is back");
        }
    }

    /// A connection on which everything is as it was on the one before; `None` when nobody asks any
    /// more.
    async fn linked(&mut self) -> Option<Link> {
        let mut pause = Duration::ZERO;
        let mut last = None;
        loop {
            let why = match self.dial(pause).await? {
                Ok(link) => match self.restore(&link).await? {
                    Ok(()) => return Some(link),
                    Err(why) => why,
                },
                Err(why) => why,
            };
            pause = (2 * pause).clamp(PAUSE_MIN, PAUSE_MAX);
            if last.as_ref() != Some(&why) {
                tracing::warn!(disk = self.name, why, "the base cannot be gone on with");
                last = Some(why);
            }
        }
    }

    /// Connects, after a pause.
    async fn dial(&mut self, pause: Duration) -> Option<Result<Link, String>> {
        let dialer = Rc::clone(&self.dialer);
        let longest = DIAL_MAX.min(self.patience);
        let dial = async move {
            sleep(pause).await;
            match timeout(longest, dialer.dial()).await {
                Ok(dialled) => dialled.map_err(|error| told(&error)),
                Err(_) => Err("no connection in time".to_owned()),
            }
        };
        self.meanwhile(dial).await
    }

    /// Sees that the other side is the one that it was, and gives it everything that it may have lost.
    async fn restore(&mut self, link: &Link) -> Option<Result<(), String>> {
        let now = Abilities::of(link.client.info());
        if let Some(Growing { size, answer, .. }) = self.growing.take() {
            if now.size == size {
                self.can.size = size;
                self.side.size.store(size, Ordering::Release);
                let _ = answer.send(Ok(Answer::Done));
            } else {
                let message = format!("it has {} bytes, and is to have {size}", now.size);
                let _ = answer.send(Err(io::Error::other(message)));
            }
        }
        let own = self.side.size.load(Ordering::Acquire);
        let mut can = self.can;
        if now.size == own || Some(now.size) == self.expected {
            can.size = now.size;
        }
        if let Some(why) = can.differ(&now) {
            return Some(Err(why));
        }
        let (client, patience) = (link.client.clone(), self.patience);
        let witnesses = self.witnesses.outside(&self.side.given_up.ranges());
        // Before anything is written to what may be another image.
        let held = async move {
            let held = timeout(patience, witnesses.are_held(&client, &can)).await;
            held.unwrap_or_else(|_| Err(SILENT.to_owned()))
        };
        if let Err(why) = self.meanwhile(held).await? {
            return Some(Err(why));
        }
        self.can = can;
        let again = Again {
            client: link.client.clone(),
            can,
            side: Arc::clone(&self.side),
            patience,
        };
        let given = self
            .meanwhile(again.give(self.unsynced.runs(SLOTS)))
            .await?;
        if let Err(error) = given {
            self.side_is_lost().await;
            return Some(Err(format!(
                "it did not take what it may have lost: {error}"
            )));
        }
        Some(Ok(()))
    }

    /// Waits for `work`. What is asked for meanwhile is taken in, and what has waited for too long is
    /// answered; `None` when nobody asks any more.
    async fn meanwhile<T>(&mut self, work: impl Future<Output = T>) -> Option<T> {
        tokio::pin!(work);
        loop {
            let deadline = self.next_deadline();
            tokio::select! {
                biased;
                done = &mut work => return Some(done),
                request = self.requests.recv() => self.take(request?),
                () = at(deadline) => self.expire(),
            }
        }
    }

    /// Everything under way waits for the next connection, in the old order; where it was a change,
    /// nobody knows what becomes of it here.
    async fn side_is_lost(&mut self) {
        if let Err(error) = self.side.given_up.lose_all().await {
            tracing::error!(disk = self.name, %error, "what was given up cannot be recorded");
        }
        while let Some((_, mut pending)) = self.under_way.pop_last() {
            pending.slot = None;
            self.waiting.push_front(pending);
        }
        self.expire();
    }

    async fn serve(&mut self, link: &Link) -> Lost {
        let (finish, mut finished) = mpsc::unbounded_channel();
        loop {
            self.send(&link.client, &finish);
            let deadline = self.next_deadline();
            tokio::select! {
                biased;
                Some((number, outcome)) = finished.recv() => {
                    if let Err(error) = self.finish(number, outcome) {
                        // What else was answered before counts.
                        while let Ok((number, outcome)) = finished.try_recv() {
                            let _ = self.finish(number, outcome);
                        }
                        return Lost::Connection(error);
                    }
                }
                request = self.requests.recv() => match request {
                    Some(request) => self.take(request),
                    None => return Lost::Over,
                },
                () = at(deadline) => return Lost::Silence,
                () = link.gone.notified() => return Lost::Connection(Error::Closed),
            }
            if self.growing.is_some() && self.under_way.is_empty() {
                return Lost::Grown;
            }
        }
    }

    /// Takes in what is asked for; what can only wait in vain is answered at once.
    fn take(&mut self, request: Request) {
        let begun = Instant::now();
        self.numbers += 1;
        if let Task::Expect(size) = request.task {
            self.expected = Some(size);
            match self.gone_since {
                None => drop(request.answer.send(Ok(Answer::Done))),
                Some(_) => self.expecting = Some((begun + self.patience, request.answer)),
            }
            return;
        }
        if let Task::Grow(size) = request.task {
            if self.can.size == size && self.gone_since.is_none() {
                // It came back so.
                self.side.size.store(size, Ordering::Release);
                let _ = request.answer.send(Ok(Answer::Done));
                return;
            }
            self.growing = Some(Growing {
                size,
                deadline: begun + self.patience,
                answer: request.answer,
            });
            return;
        }
        let pending = Pending {
            number: self.numbers,
            task: request.task,
            answer: Some(request.answer),
            deadline: self.gone_since.map_or(begun, |gone| gone.min(begun)) + self.patience,
            slot: None,
            mark: 0,
        };
        if self.sync_failed && matches!(pending.task, Task::Sync) {
            pending.answer(Err(io::Error::other("an earlier flush of the base failed")));
        } else if pending.deadline <= begun {
            pending.give_up();
        } else {
            self.waiting.push_back(pending);
        }
    }

    /// Sends what may be sent.
    fn send(&mut self, client: &Client, finish: &mpsc::UnboundedSender<Finished>) {
        if self.growing.is_some() {
            return;
        }
        if self.unsynced.is_long() && !self.has_own_sync() {
            self.begin_own_sync();
        }
        let mut held: Vec<Range<u64>> = Vec::new();
        for _ in 0..self.waiting.len() {
            let Some(mut pending) = self.waiting.pop_front() else {
                break;
            };
            match self.prepare(&mut pending, &mut held) {
                Ok(true) => {}
                // What waits for it waits behind it.
                Ok(false) => {
                    self.waiting.push_back(pending);
                    continue;
                }
                Err(error) => {
                    pending.answer(Err(error));
                    continue;
                }
            }
            let (number, task) = (pending.number, pending.task.clone());
            self.under_way.insert(number, pending);
            let (client, can, finish) = (client.clone(), self.can, finish.clone());
            tokio::task::spawn_local(async move {
                let outcome = perform_task(&client, &can, task).await;
                // Nobody listens any more when the connection was given up.
                let _ = finish.send((number, outcome));
            });
        }
    }

    /// Whether `pending` may be sent now; if it is a change, it is recorded then that it is.
    fn prepare(&mut self, pending: &mut Pending, held: &mut Vec<Range<u64>>) -> io::Result<bool> {
        if self.under_way.len() >= SLOTS {
            held.extend(pending.changes(self.can.block));
            return Ok(false);
        }
        pending.mark = self.unsynced.mark();
        let Some(range) = pending.changes(self.can.block) else {
            return Ok(true);
        };
        let under_way = self.under_way.values();
        let mut others = under_way.filter_map(|other| other.changes(self.can.block));
        let must_wait = self.unsynced.is_full()
            || held.iter().any(|other| meets(&range, other))
            || others.any(|other| meets(&range, &other));
        if must_wait {
            held.push(range);
            return Ok(false);
        }
        pending.slot = Some(self.side.given_up.begin(&range)?);
        self.witnesses.forget(&range);
        Ok(true)
    }

    /// Answers a request; an error says that the connection is of no more use, and that the request is
    /// still to be answered.
    fn finish(&mut self, number: u64, outcome: Result<Performed, Error>) -> Result<(), Error> {
        let outcome = match outcome {
            Ok(performed) => Ok(performed),
            // It has not been performed, and will not be here.
            Err(Error::Failed(Failure {
                errno: Errno::Shutdown,
                ..
            })) => return Err(Error::Leaving),
            Err(error @ (Error::Failed(_) | Error::Refused(_))) => Err(error_of(error)),
            Err(error) => return Err(error),
        };
        let Some(pending) = self.under_way.remove(&number) else {
            return Ok(());
        };
        let answer = outcome.map(|performed| match performed {
            Performed::Answered(answer) => answer,
            Performed::Changed(changes) => {
                // What is durable already, or cannot be made so, is not kept.
                if self.can.flush && !self.sync_failed {
                    for change in changes {
                        self.unsynced.push(change);
                    }
                }
                Answer::Done
            }
        });
        if matches!(pending.task, Task::Sync) {
            if answer.is_ok() {
                let durable = self.unsynced.synced(pending.mark);
                self.remember(&durable);
                if self.unsynced.all().next().is_none() {
                    self.witnesses.all_is_durable();
                }
            } else {
                self.sync_failed = true;
                self.unsynced = Unsynced::default();
                self.witnesses = Witnesses::default();
            }
        }
        if let (Err(_), Some(range)) = (&answer, pending.changes(self.can.block)) {
            self.witnesses.doubt(range);
        }
        if let Some(slot) = pending.slot {
            self.side.given_up.end(slot);
        }
        pending.answer(answer);
        Ok(())
    }

    /// Remembers some of what has become durable, of what is left as it is.
    fn remember(&mut self, durable: &[Change]) {
        let block = self.can.block;
        let under_way: Vec<_> = self
            .under_way
            .values()
            .filter_map(|pending| pending.changes(block))
            .collect();
        for (place, change) in durable.iter().enumerate().rev().take(Witnesses::LATEST) {
            let mut newer = durable[place + 1..].iter().chain(self.unsynced.all());
            let is_changed = newer.any(|newer| newer.touches(&change.range))
                || under_way.iter().any(|other| change.touches(other));
            if !is_changed {
                self.witnesses.add(change);
            }
        }
    }

    fn has_own_sync(&self) -> bool {
        let all = self.under_way.values().chain(&self.waiting);
        all.into_iter().any(|pending| pending.answer.is_none())
    }

    /// So that what is kept does not become too much.
    fn begin_own_sync(&mut self) {
        self.numbers += 1;
        let begun = Instant::now();
        self.waiting.push_front(Pending {
            number: self.numbers,
            task: Task::Sync,
            answer: None,
            deadline: begun + self.patience,
            slot: None,
            mark: 0,
        });
    }

    fn next_deadline(&self) -> Option<Instant> {
        let all = self.under_way.values().chain(&self.waiting);
        let growing = self.growing.iter().map(|growing| growing.deadline);
        let expecting = self.expecting.iter().map(|(deadline, _)| *deadline);
        let all = all.map(|pending| pending.deadline);
        all.chain(growing).chain(expecting).min()
    }

    /// Answers what has waited for too long. Nothing of it is under way.
    fn expire(&mut self) {
        let now = Instant::now();
        if let Some(growing) = self.growing.take_if(|growing| growing.deadline <= now) {
            let _ = growing.answer.send(Err(io::Error::other(Unreachable)));
        }
        if let Some((_, answer)) = self.expecting.take_if(|(deadline, _)| *deadline <= now) {
            let _ = answer.send(Err(io::Error::other(Unreachable)));
        }
        let all = std::mem::take(&mut self.waiting);
        for pending in all {
            if pending.deadline <= now {
                pending.give_up();
            } else {
                self.waiting.push_back(pending);
            }
        }
    }
}

async fn at(deadline: Option<Instant>) {
    match deadline {
        Some(deadline) => sleep_until(deadline).await,
        None => std::future::pending().await,
    }
}

/// Between two attempts to connect, at first and at last.
const PAUSE_MIN: Duration = Duration::from_millis(20);
const PAUSE_MAX: Duration = Duration::from_secs(1);

pub(super) const SILENT: &str = "it does not answer";

/// A connection that takes longer is tried again.
const DIAL_MAX: Duration = Duration::from_secs(10);

/// Nobody waits for what a server says to a goodbye for longer.
const GOODBYE_MAX: Duration = Duration::from_secs(1);
