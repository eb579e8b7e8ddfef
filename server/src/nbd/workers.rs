use std::io;
use std::net::TcpStream as StdTcpStream;
use std::os::unix::net::UnixStream as StdUnixStream;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

use rustix::net::sockopt;
use rustix::process::{getpriority_process, setpriority_process};
use tokio::net::{TcpStream, UnixStream};
use tokio::sync::{mpsc, watch};
use tokio::task::LocalSet;

use super::converse;
use super::entrance::Visitor;
use crate::export::Role;
use crate::service::Service;
use crate::tls::Tls;

/// Threads that serve clients, each with a runtime of its own, and for one role: so a guest never
/// waits for what a thread does for backups, and those for backups leave the processor to it.
pub(crate) struct Workers {
    live: Queues,
    backup: Queues,
    threads: Vec<JoinHandle<()>>,
}

/// The ways to the threads of one role.
#[derive(Default)]
struct Queues {
    /// Never longer than there are handshakes.
    all: Vec<mpsc::UnboundedSender<Client>>,
    next: usize,
}

/// Someone who has connected.
pub(crate) struct Client {
    /// The connection, not yet tied to a runtime.
    pub(crate) stream: Stream,
    /// Who it is, and what it came for.
    pub(crate) visitor: Visitor,
    /// Whether it may, or must, ask for TLS there.
    pub(crate) tls: Tls,
}

/// A connection of either kind.
pub(crate) enum Stream {
    /// Over a Unix socket.
    Unix(StdUnixStream),
    /// Over TCP.
    Tcp(StdTcpStream),
}

impl Workers {
    /// Starts `count` threads for each role.
    pub(crate) fn start(
        count: usize,
        service: &Arc<Service>,
        stop: &watch::Receiver<bool>,
    ) -> io::Result<Self> {
        let (mut live, mut backup) = (Queues::default(), Queues::default());
        let mut threads = Vec::new();
        for number in 0..2 * count {
            let (queues, role, nice) = match number % 2 {
                0 => (&mut live, "live", 0),
                _ => (&mut backup, "backup", BACKUP_NICE),
            };
            let (queue, clients) = mpsc::unbounded_channel();
            let runtime = tokio::runtime::Builder::new_current_thread()
                .enable_all()
                .max_blocking_threads(BLOCKING_THREADS_MAX)
                .build()?;
            let (service, stop) = (Arc::clone(service), stop.clone());
            let thread = std::thread::Builder::new()
                .name(format!("{role}-{}", number / 2))
                .spawn(move || {
                    step_back(nice);
                    LocalSet::new().block_on(&runtime, work(clients, service, stop));
                })?;
            queues.all.push(queue);
            threads.push(thread);
        }
        Ok(Self {
            live,
            backup,
            threads,
        })
    }

    /// Gives a client to the next thread in turn.
    pub(crate) fn serve(&mut self, client: Client) {
        let queues = match client.visitor.entrance.role {
            Role::Live => &mut self.live,
            Role::Backup => &mut self.backup,
        };
        queues.next = (queues.next + 1) % queues.all.len();
        if queues.all[queues.next].send(client).is_err() {
            tracing::error!("a worker is gone; the client is turned away");
        }
    }

    /// Waits until every client has been served to its end.
    pub(crate) fn join(self) {
        drop((self.live, self.backup));
        for thread in self.threads {
            if thread.join().is_err() {
                tracing::error!("a worker panicked");
            }
        }
    }
}

/// Lets others have the processor first: this thread, and those that it will start for what may
/// block.
pub(crate) fn step_back(nice: i32) {
    // Without a process it is this thread whose value is asked for and changed.
    let changed = getpriority_process(None)
        .and_then(|now| setpriority_process(None, (now + nice).min(NICE_MAX)));
    if let Err(error) = changed {
        tracing::warn!(%error, "backups get as much of the processor as the guest");
    }
}

async fn work(
    mut clients: mpsc::UnboundedReceiver<Client>,
    service: Arc<Service>,
    stop: watch::Receiver<bool>,
) {
    let mut connections = tokio::task::JoinSet::new();
    while let Some(client) = clients.recv().await {
        connections.spawn_local(serve(client, Arc::clone(&service), stop.clone()));
        // Those that are over already need no place.
        while connections.try_join_next().is_some() {}
    }
    while connections.join_next().await.is_some() {}
}

async fn serve(client: Client, service: Arc<Service>, stop: watch::Receiver<bool>) {
    let Client {
        stream,
        visitor,
        tls,
    } = client;
    let (peer, role) = (visitor.peer, visitor.entrance.role);
    let ended = match tied(stream) {
        Ok(Tied::Unix(stream)) => converse(stream, service, (visitor, tls), stop).await,
        Ok(Tied::Tcp(stream)) => converse(stream, service, (visitor, tls), stop).await,
        Err(error) => Err(error.into()),
    };
    match ended {
        Ok(()) => tracing::info!(%peer, ?role, "disconnected"),
        Err(error) => tracing::info!(%peer, ?role, %error, "connection ended"),
    }
}

enum Tied {
    Unix(UnixStream),
    Tcp(TcpStream),
}

fn tied(stream: Stream) -> io::Result<Tied> {
    match stream {
        Stream::Unix(stream) => {
            sockopt::set_socket_send_buffer_size(&stream, SEND_BUFFER)?;
            stream.set_nonblocking(true)?;
            UnixStream::from_std(stream).map(Tied::Unix)
        }
        Stream::Tcp(stream) => {
            sockopt::set_socket_send_buffer_size(&stream, SEND_BUFFER)?;
            stream.set_nodelay(true)?;
            sockopt::set_socket_keepalive(&stream, true)?;
            sockopt::set_tcp_keepidle(&stream, ALIVE_ASKED_AFTER)?;
            sockopt::set_tcp_keepintvl(&stream, ALIVE_ASKED_EVERY)?;
            sockopt::set_tcp_keepcnt(&stream, ALIVE_ASKED_TIMES)?;
            stream.set_nonblocking(true)?;
            TcpStream::from_std(stream).map(Tied::Tcp)
        }
    }
}

/// A batch of replies should fit: with the default of 208 KiB batching can lose.
const SEND_BUFFER: usize = 1 << 20;

/// A machine that has vanished does not keep its place: two minutes after it was last heard of its connection ends. One that is
/// idle answers, and stays.
const ALIVE_ASKED_AFTER: Duration = Duration::from_secs(60);
const ALIVE_ASKED_EVERY: Duration = Duration::from_secs(15);
const ALIVE_ASKED_TIMES: u32 = 4;

/// By how much backups are nicer than guests: a third of the processor where both want all of it. A
/// guest that waits for a lock that a backup holds still has it soon.
pub(crate) const BACKUP_NICE: i32 = 5;

/// The nicest there is.
const NICE_MAX: i32 = 19;

/// Each may wait for a device at the same time; more than a device takes at once gain nothing.
const BLOCKING_THREADS_MAX: usize = 32;
