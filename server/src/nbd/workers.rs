use std::io;
use std::net::TcpStream as StdTcpStream;
use std::os::unix::net::UnixStream as StdUnixStream;
use std::sync::Arc;
use std::thread::JoinHandle;

use rustix::net::sockopt;
use tokio::net::{TcpStream, UnixStream};
use tokio::sync::{OwnedSemaphorePermit, mpsc, watch};
use tokio::task::LocalSet;

use super::converse;
use crate::export::Role;
use crate::service::Service;
use crate::tls::Tls;

/// Threads that serve clients, each with a runtime of its own.
pub(crate) struct Workers {
    /// Never longer than there are places for clients.
    queues: Vec<mpsc::UnboundedSender<Client>>,
    threads: Vec<JoinHandle<()>>,
    next: usize,
}

/// Someone who has connected.
pub(crate) struct Client {
    /// The connection, not yet tied to a runtime.
    pub(crate) stream: Stream,
    /// What the socket that it came to offers.
    pub(crate) role: Role,
    /// Whether it may, or must, ask for TLS there.
    pub(crate) tls: Tls,
    /// Who it is, for the log.
    pub(crate) peer: String,
    /// Its place among those that are served at once.
    pub(crate) place: OwnedSemaphorePermit,
}

/// A connection of either kind.
pub(crate) enum Stream {
    /// Over a Unix socket.
    Unix(StdUnixStream),
    /// Over TCP.
    Tcp(StdTcpStream),
}

impl Workers {
    /// Starts `count` threads.
    pub(crate) fn start(
        count: usize,
        service: &Arc<Service>,
        stop: &watch::Receiver<bool>,
    ) -> io::Result<Self> {
        let (mut queues, mut threads) = (Vec::new(), Vec::new());
        for number in 0..count {
            let (queue, clients) = mpsc::unbounded_channel();
            let runtime = tokio::runtime::Builder::new_current_thread()
                .enable_all()
                .max_blocking_threads(BLOCKING_THREADS_MAX)
                .build()?;
            let (service, stop) = (Arc::clone(service), stop.clone());
            let thread = std::thread::Builder::new()
                .name(format!("worker-{number}"))
                .spawn(move || LocalSet::new().block_on(&runtime, work(clients, service, stop)))?;
            queues.push(queue);
            threads.push(thread);
        }
        Ok(Self {
            queues,
            threads,
            next: 0,
        })
    }

    /// Gives a client to the next thread in turn.
    pub(crate) fn serve(&mut self, client: Client) {
        self.next = (self.next + 1) % self.queues.len();
        if self.queues[self.next].send(client).is_err() {
            tracing::error!("a worker is gone; the client is turned away");
        }
    }

    /// Waits until every client has been served to its end.
    pub(crate) fn join(self) {
        drop(self.queues);
        for thread in self.threads {
            if thread.join().is_err() {
                tracing::error!("a worker panicked");
            }
        }
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
        role,
        tls,
        peer,
        place: _place,
    } = client;
    tracing::debug!(peer, ?role, "connected");
    let ended = match tied(stream) {
        Ok(Tied::Unix(stream)) => converse(stream, service, (role, tls), &peer, stop).await,
        Ok(Tied::Tcp(stream)) => converse(stream, service, (role, tls), &peer, stop).await,
        Err(error) => Err(error.into()),
    };
    match ended {
        Ok(()) => tracing::debug!(peer, "disconnected"),
        Err(error) => tracing::info!(peer, %error, "connection ended"),
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
            stream.set_nonblocking(true)?;
            TcpStream::from_std(stream).map(Tied::Tcp)
        }
    }
}

/// A batch of replies should fit: with the default of 208 KiB batching can lose.
const SEND_BUFFER: usize = 1 << 20;

/// Each may wait for a device at the same time; more than a device takes at once gain nothing.
const BLOCKING_THREADS_MAX: usize = 32;
