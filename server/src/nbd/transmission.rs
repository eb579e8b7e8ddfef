//! Requests and replies, once an export has been chosen.

use std::cell::Cell;
use std::os::fd::AsFd;
use std::pin::Pin;
use std::rc::Rc;
use std::sync::atomic::Ordering;
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use proto::{Admission, Command, Errno, Incoming, Origin, Refusal, Request, RequestDecoder};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, copy, sink};
use tokio::sync::Semaphore;
use tokio::time::{Instant, sleep, timeout};

use super::budget::Share;
use super::catalog::Exports;
use super::entrance::Entrance;
use super::line::Line;
use super::output::{Output, Reply};
use super::perform::Target;
use super::progress::{Lapse, Owed, Progress};
use super::under_way::{Pending, UnderWay, weight};
use super::vigil::Vigil;
use super::{Ended, INPUT_PIECE};
use crate::clients::Seat;
use crate::export::Role;
use crate::limits::Limits;

/// Serves requests until the client leaves or is told to; returns when all that was begun has ended.
pub(super) async fn run<S: AsyncRead + AsyncWrite + AsFd + Unpin>(
    stream: S,
    session: proto::Session<Exports>,
    input: BytesMut,
    peer: String,
    (entrance, mut seat): (&Entrance, Seat),
) -> Result<(), Ended> {
    let connection = Connection::new(session, input, peer, entrance);
    let _connected = Connected::to(Rc::clone(&connection.target));
    let line = Line::of(&stream);
    connection.run((stream, line), &mut seat).await
}

/// Waits until the server has been about to stop for as long as it waits for anybody.
async fn dismissed_for_good(seat: &mut Seat) {
    seat.dismissed().await;
    sleep(GOODBYE_MAX).await;
}

/// Waits until `moment`, or for ever where there is none.
async fn until(moment: Option<Instant>) {
    match moment {
        Some(moment) => tokio::time::sleep_until(moment).await,
        None => std::future::pending().await,
    }
}

struct Connection {
    role: Role,
    target: Rc<Target>,
    admission: Admission,
    decoder: RequestDecoder,
    input: BytesMut,
    /// Replies that have not been sent yet.
    output: Output,
    under_way: Rc<UnderWay>,
    /// Nothing more is taken in; what is under way is answered.
    last_words: bool,
    /// Why whatever is asked now is refused, if so.
    refuses: Option<&'static str>,
    /// Nobody hears an answer any more.
    hung_up: bool,
    /// A request for which there is no memory yet. None is taken in after it.
    postponed: Option<(Origin, Command)>,
    /// The last request that was begun was answered at once, and did not wait for a device or others.
    is_at_once: bool,
    /// What all of this may take.
    share: Share,
    progress: Progress,
    vigil: Vigil,
    limits: Limits,
}

impl Connection {
    fn new(
        session: proto::Session<Exports>,
        input: BytesMut,
        peer: String,
        entrance: &Entrance,
    ) -> Self {
        Self {
            role: entrance.role,
            admission: session.admission(),
            decoder: session.requests(),
            target: Rc::new(Target {
                peer,
                replies: session.replies(),
                name: session.info.name,
                contexts: session.contexts,
                export: session.export,
                leaving: Cell::new(false),
                asking: Semaphore::new(1),
            }),
            input,
            output: Output::default(),
            under_way: UnderWay::new(&entrance.waiting),
            vigil: Vigil::new(&entrance.waiting),
            last_words: false,
            refuses: None,
            hung_up: false,
            postponed: None,
            is_at_once: false,
            share: Share::new(&entrance.budget),
            progress: Progress::new(&entrance.limits, entrance.role == Role::Live),
            limits: entrance.limits.clone(),
        }
    }

    async fn run<S: AsyncRead + AsyncWrite + Unpin>(
        mut self,
        stream: (S, Line),
        seat: &mut Seat,
    ) -> Result<(), Ended> {
        let result = self.exchange(stream, seat).await;
        self.target.leaving.set(true);
        self.target.asking.close();
        // Nobody hears the answers any more, but what was begun is ended. Only that still holds memory.
        (self.input, self.output, self.postponed) = Default::default();
        self.share.give_up();
        let under_way = &self.under_way;
        loop {
            under_way.ended.borrow_mut().clear();
            self.share.fit(under_way.bytes.get());
            if under_way.count.get() == 0 {
                return result;
            }
            under_way.news.notified().await;
        }
    }

    async fn exchange<S: AsyncRead + AsyncWrite + Unpin>(
        &mut self,
        (stream, line): (S, Line),
        seat: &mut Seat,
    ) -> Result<(), Ended> {
        let (mut reader, mut writer) = tokio::io::split(stream);
        let under_way = Rc::clone(&self.under_way);
        let target = Rc::clone(&self.target);
        let mut withdrawn = std::pin::pin!(target.export.withdrawn());
        let mut looking = std::pin::pin!(sleep(Duration::ZERO));
        let (mut look, mut give_up) = (None, None);
        let (mut dismissed, mut is_withdrawn) = (false, false);
        loop {
            // First: what is neither under way nor in the output counts as given back.
            self.collect_replies();
            let listens = self.take_requests()?;
            if dismissed && give_up.is_none() && under_way.count.get() == 0 {
                // What is under way is waited for in any case.
                give_up = Some(Instant::now() + GOODBYE_MAX);
            }
            if self.last_words && self.output.is_sent() && under_way.count.get() == 0 {
                // A client that sees the end has seen every answer.
                let farewell = async {
                    let _ = timeout(self.limits.stall, writer.shutdown()).await;
                    if dismissed && line.takes_back() {
                        let _ = copy(&mut reader, &mut sink()).await;
                    }
                };
                tokio::select! {
                    () = farewell => {}
                    () = until(give_up) => {}
                    () = dismissed_for_good(seat) => {}
                }
                return Ok(());
            }
            if listens {
                self.make_room();
            }
            let owed = self.owed(listens);
            let hush = give_up
                .filter(|_| !self.last_words)
                .map(|end| end - GOODBYE_MAX / 2);
            if look.is_none() {
                look = self.progress.next_look(owed, Instant::now);
                if let Some(at) = look {
                    looking.as_mut().reset(at);
                }
            }
            tokio::select! {
                written = self.output.send(&mut writer), if !self.output.is_sent() => {
                    self.progress.took(written?, self.output.is_sent());
                }
                received = reader.read_buf(&mut self.input), if listens => {
                    let received = received?;
                    if received == 0 {
                        self.last_words = true;
                        self.target.leaving.set(true);
                    }
                    self.progress.sent(received);
                    self.vigil.end(Instant::now());
                }
                () = self.vigil.keep(), if owed.nothing => {}
                () = under_way.news.notified(), if under_way.count.get() > 0 => {}
                () = self.share.granted() => {}
                () = line.hung_up(), if self.share.is_waiting() && !self.hung_up => {
                    self.hung_up = true;
                    self.target.leaving.set(true);
                }
                () = &mut looking, if look.is_some() => {
                    look = None;
                    self.progress.look(owed, Instant::now())?;
                }
                why = seat.dismissed(), if !dismissed => {
                    (dismissed, give_up) = (true, None);
                    self.dismiss(why);
                }
                _ = &mut withdrawn, if !is_withdrawn && !dismissed => {
                    is_withdrawn = true;
                    give_up.get_or_insert_with(|| Instant::now() + GOODBYE_MAX);
                }
                () = until(hush), if self.refuses.is_some() => self.last_words = true,
                () = until(give_up) => {
                    if dismissed {
                        return Ok(());
                    }
                    if !self.output.is_sent() {
                        return Err(Lapse::Deaf(GOODBYE_MAX).into());
                    }
                    give_up = None;
                }
            }
        }
    }

    /// Begins every request that has arrived whole, as far as there is room; says whether there is
    /// room for what has not arrived.
    fn take_requests(&mut self) -> Result<bool, Ended> {
        while !self.last_words {
            if self.refuses.is_some() {
                self.decoder.skip_payload();
            }
            if self.hung_up {
                self.postponed.take_if(|(_, command)| is_question(command));
            }
            let (held, next) = (self.held(), self.next());
            let has_room = self.under_way.count.get() < self.limits.requests
                && held < self.limits.request_bytes
                && self.output.len() < self.output_max()
                && self.share.covers(held, next);
            if !has_room {
                self.share.fit(held);
                return Ok(false);
            }
            if let Some((origin, command)) = self.postponed.take() {
                self.perform(origin, command);
                continue;
            }
            match self.decoder.decode(&mut self.input)? {
                // Its payload has just become known.
                None if self.next() != next => {}
                None => {
                    self.share.fit(held + next);
                    return Ok(true);
                }
                Some(Incoming::Disconnect) => self.last_words = true,
                Some(Incoming::Request(request)) => self.begin(request),
            }
        }
        self.share.fit(self.held());
        Ok(false)
    }

    fn output_max(&self) -> usize {
        if self.is_at_once {
            OUTPUT_AT_ONCE_MAX
        } else {
            OUTPUT_MAX
        }
    }

    /// What requests and their replies take that have been taken in.
    fn held(&self) -> usize {
        self.under_way.bytes.get() + self.output.memory()
    }

    /// What the next one takes, as far as that is known.
    fn next(&self) -> usize {
        let postponed = self.postponed.as_ref();
        postponed.map_or_else(|| self.decoder.payload(), |(_, command)| weight(command))
    }

    fn owed(&self, listens: bool) -> Owed {
        let takes = !self.output.is_sent();
        let sends = listens && (self.decoder.is_within() || !self.input.is_empty());
        Owed {
            takes,
            sends,
            nothing: listens && !takes && !sends && self.under_way.count.get() == 0,
            in_the_way: self.share.is_in_the_way(),
        }
    }

    /// Makes room for what is received next.
    fn make_room(&mut self) {
        let payload = self.decoder.payload().saturating_sub(self.input.len());
        if payload > 0 {
            // Once and for all, instead of by doubling.
            self.input.reserve(payload);
        } else if self.input.capacity() - self.input.len() < INPUT_PIECE / 4 {
            self.input.reserve(INPUT_PIECE);
        }
    }

    /// Performs nothing more. A backup's client hears of each request from now on why. A guest does not:
    /// it would take that for an error of its disk, while it asks once more over another connection what
    /// was not answered on this one.
    fn dismiss(&mut self, why: &'static str) {
        self.target.leaving.set(true);
        let postponed = self.postponed.take();
        if self.role == Role::Live {
            self.last_words = true;
            return;
        }
        self.refuses = Some(why);
        if let Some((origin, _)) = postponed {
            self.refuse(origin, leave(why));
        }
    }

    fn refuse(&mut self, origin: Origin, refusal: Refusal) {
        tracing::debug!(%refusal, "a request was refused");
        let replies = self.target.replies;
        replies.error(self.output.end(), origin, refusal.errno, refusal.reason);
    }

    fn begin(&mut self, request: Request) {
        self.progress.completed();
        self.vigil.asked();
        if request.data.len() > INPUT_PIECE {
            // Or what comes next would keep the memory of this, which is no longer counted once it is
            // written or refused.
            self.input = BytesMut::from(&self.input[..]);
        }
        let origin = request.origin();
        let admitted = match self.refuses {
            Some(why) => Err(leave(why)),
            None => self.admission.admit(request),
        };
        match admitted {
            Ok(command) => self.postponed = Some((origin, command)),
            Err(refusal) => self.refuse(origin, refusal),
        }
    }

    /// Performs a request: at once if it need not wait, else beside the others.
    fn perform(&mut self, origin: Origin, mut command: Command) {
        let weight = weight(&command);
        let is_slice = self.is_slice(&mut command);
        // The reply is written behind the others, and is one with them if it is ready at once. Who is
        // not keeps the memory of those before it: that is for one at a time.
        let reply = match self.under_way.count.get() {
            0 => self.output.begin(),
            _ => Reply::default(),
        };
        let target = Rc::clone(&self.target);
        let mut work: Pin<Box<dyn Future<Output = Reply>>> =
            Box::pin(async move { target.perform(origin, command, reply).await });
        // Whoever is not ready is polled again by its own task, with a waker that wakes.
        let polled = work.as_mut().poll(&mut Context::from_waker(Waker::noop()));
        self.is_at_once = polled.is_ready();
        match polled {
            Poll::Ready(reply) => self.output.push(reply),
            Poll::Pending => {
                let pending = Pending::new(&self.under_way, self.target.replies, origin, weight);
                let target = Rc::clone(&self.target);
                let under_way = Rc::clone(&self.under_way);
                if is_slice {
                    under_way.has_slice.set(true);
                }
                tokio::task::spawn_local(async move {
                    let reply = tokio::select! {
                        biased;
                        reply = work => reply,
                        // What is withdrawn is never written, so that giving up loses nothing.
                        error = target.export.withdrawn() => target.failed(origin, &error),
                    };
                    if is_slice {
                        under_way.has_slice.set(false);
                    }
                    pending.answer(reply);
                });
            }
        }
    }

    /// Whether it has a short payload that keeps all of the piece that it was received in. One such is
    /// under way at a time: where storage is so slow that there would be more, those are copied.
    fn is_slice(&self, command: &mut Command) -> bool {
        match command {
            Command::Write { data, .. } if data.len() < SLICE_MIN => {
                let is_one_too_many = self.under_way.has_slice.get();
                if is_one_too_many {
                    *data = Bytes::copy_from_slice(data);
                }
                !is_one_too_many
            }
            _ => false,
        }
    }

    fn collect_replies(&mut self) {
        for reply in self.under_way.ended.borrow_mut().drain(..) {
            self.output.push(reply);
        }
    }
}

/// What a client is told that is to leave.
fn leave(reason: &'static str) -> Refusal {
    Refusal {
        errno: Errno::Shutdown,
        reason,
    }
}

/// Whether nothing comes of it but an answer.
fn is_question(command: &Command) -> bool {
    matches!(command, Command::Read { .. } | Command::BlockStatus { .. })
}

/// A client that is counted for as long as this lives.
struct Connected(Rc<Target>);

impl Connected {
    fn to(target: Rc<Target>) -> Self {
        if let Some(usage) = target.export.usage() {
            usage.clients.fetch_add(1, Ordering::Relaxed);
        }
        Self(target)
    }
}

impl Drop for Connected {
    fn drop(&mut self) {
        if let Some(usage) = self.0.export.usage() {
            usage.clients.fetch_sub(1, Ordering::Relaxed);
        }
    }
}

/// How long clients have to take what they were answered, when the server stops or the export is
/// withdrawn: whoever wants it has it by then, and a second is what all of it may take. When the server
/// stops, who may still ask has half of it for that.
pub(super) const GOODBYE_MAX: Duration = Duration::from_millis(500);

/// A payload that is longer keeps little besides itself, and to copy it would cost more than that.
const SLICE_MIN: usize = INPUT_PIECE / 4;

/// No more requests are begun while so much is to be sent: what the socket takes at once.
const OUTPUT_MAX: usize = 1 << 20;

/// The same where requests are answered at once. More would be read while what was read before leaves
/// the processor's cache, from which it is to be sent.
const OUTPUT_AT_ONCE_MAX: usize = 256 << 10;

#[cfg(test)]
mod tests;
