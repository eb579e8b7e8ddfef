//! The control socket: QMP, as QEMU speaks it.
//!
//! One conversation has three parts. Commands are read and carried out one after the other; events
//! are queued as they come; one writer takes replies and events from a queue that is never long. A
//! client that does not read stops its own commands, then loses its connection, and nobody else
//! notices.

pub(crate) mod answers;
mod arguments;
pub(crate) mod bitmaps;
mod carry;
mod decoder;
mod disk_arguments;
mod execute;
#[cfg(feature = "fuzzing")]
pub(crate) mod fuzzing;
pub(crate) mod jobs;
pub(crate) mod messages;
mod request;

use std::io::Write;
use std::path::PathBuf;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use serde::Serialize;
use time::OffsetDateTime;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};
use tokio::sync::broadcast::error::RecvError;
use tokio::sync::{Notify, OwnedSemaphorePermit, Semaphore, broadcast, mpsc, watch};
use tokio::task::{JoinHandle, spawn_local};

use crate::failure::Failure;
use crate::listeners::Endpoint;
use crate::push::Jobs;
use crate::service::{Event, Opening, Service};
use decoder::{Decoder, Malformed};
use execute::execute;
use messages::{Greeting, Notice, Reply};
use request::{Command, Refusal, Request};

/// What clients of the control socket can do something to.
pub(crate) struct Control {
    /// Disks, checkpoints and backups.
    pub(crate) service: Arc<Service>,
    /// Where frozen exports are offered.
    pub(crate) backup_addresses: Vec<Endpoint>,
    /// Where live exports are offered.
    pub(crate) live_addresses: Vec<Endpoint>,
    /// Where the sockets are.
    pub(crate) run_dir: PathBuf,
    /// How disks are opened.
    pub(crate) opening: Opening,
    /// What is being copied by the server itself.
    pub(crate) jobs: Rc<Jobs>,
    /// True as soon as the server is to stop.
    pub(crate) stop: watch::Sender<bool>,
}

/// The control socket's name in the run directory.
pub(crate) const SOCKET: &str = "control.sock";

/// Talks to one client until it hangs up or the server stops.
///
/// Runs on a [`LocalSet`](tokio::task::LocalSet). A command that has begun runs to its end, whether
/// or not anyone waits for its reply.
pub(crate) async fn converse(stream: UnixStream, context: Rc<Control>) {
    let (reader, writer) = stream.into_split();
    let (queue, messages) = mpsc::channel(MESSAGES_MAX);
    let mut writer = spawn_local(write_all(writer, messages));
    let overflow = Rc::new(Notify::new());
    let mut conversation = Conversation {
        reader,
        buffer: vec![0; READ_MAX].into(),
        unread: 0..0,
        decoder: Decoder::default(),
        queue: queue.clone(),
        replies: Arc::new(Semaphore::new(REPLIES_MAX)),
        stopping: context.stop.subscribe(),
        overflow: Rc::clone(&overflow),
        events: None,
        control: Rc::clone(&context),
    };
    let end = tokio::select! {
        end = conversation.run() => end,
        () = overflow.notified() => End::Over,
        () = queue.closed() => End::Over,
    };
    drop((conversation, queue));
    // What has been said is still delivered, to whoever takes it.
    if tokio::time::timeout(FAREWELL_MAX, &mut writer)
        .await
        .is_err()
    {
        writer.abort();
    }
    if end == End::Quit {
        context.stop.send_replace(true);
    }
}

/// Tells a client that `most` others are there already, and hangs up.
pub(crate) fn turn_away(stream: UnixStream, most: usize) {
    let message = format!("{most} clients use the control socket already");
    let failure = Failure::new("too-many-clients", message).hint("try again when one has gone");
    tracing::warn!(most, "a control client is turned away");
    // It fits into the buffer of a new socket; and who does not listen learns by the end.
    if let Ok(stream) = stream.into_std() {
        let _ = (&stream).write(&line(&Reply::failure(&failure, None)));
    }
}

/// Why a conversation is over.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum End {
    /// The client has gone, or is not worth waiting for, or the server stops.
    Over,
    /// The client wants the server to stop.
    Quit,
}

struct Conversation {
    reader: OwnedReadHalf,
    buffer: Box<[u8]>,
    /// What of the buffer has been read and not yet decoded.
    unread: std::ops::Range<usize>,
    decoder: Decoder,
    queue: mpsc::Sender<Message>,
    /// Room for replies that have not been taken.
    replies: Arc<Semaphore>,
    stopping: watch::Receiver<bool>,
    overflow: Rc<Notify>,
    events: Option<Forwarding>,
    control: Rc<Control>,
}

/// Something that is said to a client.
struct Message {
    line: Vec<u8>,
    /// Of a reply, for as long as it takes memory.
    _room: Option<OwnedSemaphorePermit>,
}

impl Conversation {
    async fn run(&mut self) -> End {
        // Errors mean that there is nobody to tell.
        self.talk().await.unwrap_or(End::Over)
    }

    async fn talk(&mut self) -> Result<End, HungUp> {
        self.send(&Greeting::current()).await?;
        loop {
            let text = match self.next_value().await? {
                Ok(text) => text,
                Err(wrong) => {
                    let failure = Failure::new("bad-request", wrong.to_string());
                    self.send(&Reply::failure(&failure, None)).await?;
                    if wrong == Malformed::Length {
                        return Ok(End::Over);
                    }
                    continue;
                }
            };
            // A reply may be long, and a client that takes none makes us remember one.
            drop(self.room().await?);
            let Request { id, command } = Request::parse(&text);
            let reply = match command {
                Ok(Command::Capabilities) if self.events.is_none() => {
                    let reply = self.carry_out(Command::Capabilities, id).await;
                    self.send(&reply).await?;
                    self.events = Some(self.forward_events());
                    continue;
                }
                Ok(Command::Capabilities) => Reply::not_found(
                    "Capabilities negotiation is already complete, command ignored",
                    id,
                ),
                Ok(_) | Err(Refusal::NotFound(_)) if self.events.is_none() => Reply::not_found(
                    "Expecting capabilities negotiation with 'qmp_capabilities'",
                    id,
                ),
                Ok(Command::Quit) => {
                    let reply = self.carry_out(Command::Quit, id).await;
                    self.send(&reply).await?;
                    return Ok(End::Quit);
                }
                Ok(command) => self.carry_out(command, id).await,
                Err(refusal) => refusal.reply(id),
            };
            self.send(&reply).await?;
        }
    }

    async fn carry_out(&self, command: Command, id: Option<serde_json::Value>) -> Reply {
        // On its own, so that it goes on when this conversation does not.
        let outcome = spawn_local(execute(Rc::clone(&self.control), command)).await;
        match outcome {
            Ok(Ok(value)) => Reply::Success { value, id },
            Ok(Err(failure)) => Reply::failure(&failure, id),
            Err(error) => {
                tracing::error!(%error, "a command came to no end");
                let failure = Failure::new("internal", "the command came to no end");
                Reply::failure(&failure, id)
            }
        }
    }

    /// The next value that the client sends, or what is wrong with it.
    async fn next_value(&mut self) -> Result<Result<Vec<u8>, Malformed>, HungUp> {
        loop {
            let mut input = &self.buffer[self.unread.clone()];
            let found = self.decoder.next(&mut input);
            self.unread.start = self.unread.end - input.len();
            if let Some(found) = found {
                return Ok(found);
            }
            let length = tokio::select! {
                read = self.reader.read(&mut self.buffer) => read.map_err(|_| HungUp)?,
                _ = self.stopping.wait_for(|stop| *stop) => return Err(HungUp),
            };
            if length == 0 {
                return Err(HungUp);
            }
            self.unread = 0..length;
        }
    }

    async fn send(&self, message: &impl Serialize) -> Result<(), HungUp> {
        let room = Some(self.room().await?);
        let message = Message {
            line: line(message),
            _room: room,
        };
        let mut stopping = self.stopping.clone();
        // Waiting here holds up nobody but the client that does not read; nor is a stop held up.
        tokio::select! {
            biased;
            sent = self.queue.send(message) => sent.map_err(|_| HungUp),
            _ = stopping.wait_for(|stop| *stop) => Err(HungUp),
        }
    }

    /// Waits until there is room for a reply.
    async fn room(&self) -> Result<OwnedSemaphorePermit, HungUp> {
        let mut stopping = self.stopping.clone();
        tokio::select! {
            biased;
            room = Arc::clone(&self.replies).acquire_owned() => room.map_err(|_| HungUp),
            _ = stopping.wait_for(|stop| *stop) => Err(HungUp),
        }
    }

    fn forward_events(&self) -> Forwarding {
        let events = self.control.service.events();
        let (queue, overflow) = (self.queue.clone(), Rc::clone(&self.overflow));
        Forwarding(spawn_local(forward(events, queue, overflow)))
    }
}

/// Nobody listens any more.
#[derive(Debug)]
struct HungUp;

/// The task that queues events; it ends with the conversation.
struct Forwarding(JoinHandle<()>);

impl Drop for Forwarding {
    fn drop(&mut self) {
        self.0.abort();
    }
}

async fn forward(
    mut events: broadcast::Receiver<Event>,
    queue: mpsc::Sender<Message>,
    overflow: Rc<Notify>,
) {
    loop {
        let event = match events.recv().await {
            Ok(event) => event,
            Err(RecvError::Lagged(count)) => {
                tracing::warn!(count, "a control client missed events");
                continue;
            }
            Err(RecvError::Closed) => return,
        };
        let notice = Notice::new(event, OffsetDateTime::now_utc());
        let message = Message {
            line: line(&notice),
            _room: None,
        };
        if queue.try_send(message).is_err() {
            overflow.notify_one();
            return;
        }
    }
}

async fn write_all(mut writer: OwnedWriteHalf, mut messages: mpsc::Receiver<Message>) {
    while let Some(message) = messages.recv().await {
        match tokio::time::timeout(WRITE_MAX, writer.write_all(&message.line)).await {
            Ok(Ok(())) => {}
            // The client has gone, or might as well have.
            Ok(Err(_)) | Err(_) => return,
        }
    }
}

fn line(message: &impl Serialize) -> Vec<u8> {
    let mut line = serde_json::to_vec(message).expect("messages have texts for keys");
    line.extend(b"\r\n");
    line
}

/// Replies and events that a client has not taken yet: more than anyone who reads ever has.
const MESSAGES_MAX: usize = 64;

/// Replies that a client has not taken yet. With thousands of checkpoints one has some MiB.
const REPLIES_MAX: usize = 1;

/// Commands are short; more is read when this much has been understood.
const READ_MAX: usize = 4096;

/// A client that takes nothing for this long is not there.
const WRITE_MAX: Duration = Duration::from_secs(30);

/// How long the last messages may take when a conversation is over: no longer than a stop may.
const FAREWELL_MAX: Duration = Duration::from_millis(500);

#[cfg(test)]
mod tests;
