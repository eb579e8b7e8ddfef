//! A network that lies between a client and an NBD server, and can keep things to itself for a while.

use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;

use rustix::io::ioctl_fionread;
use tempfile::TempDir;

/// Passes on what is sent to a server, unless it is told to hold it.
///
/// What is held on a connection arrives when it is released, also if whoever sent it has gone by then:
/// so a server performs a write that its client has long given up.
#[derive(Debug)]
pub struct Relay {
    state: Arc<State>,
    directory: TempDir,
}

#[derive(Debug, Default)]
struct State {
    held: Mutex<Held>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct Held {
    /// Connections with a number below this one hold what is sent.
    below: u64,
    /// How many there have been.
    connections: u64,
    /// Those that the server has ended.
    ended: Vec<u64>,
    /// How much is held of what has been taken.
    bytes: u64,
    clients: Vec<UnixStream>,
}

impl Relay {
    /// Between whoever connects and the server on this socket.
    #[track_caller]
    pub fn to(server: &Path) -> Self {
        let directory = crate::server::temporary_directory();
        let listener = UnixListener::bind(directory.path().join("socket")).expect("a socket");
        let (state, server) = (Arc::new(State::default()), server.to_owned());
        let of_relay = Arc::clone(&state);
        // Ends with the test's process: nobody can wait for an accept to end.
        thread::spawn(move || {
            for client in listener.incoming().flatten() {
                let Ok(upstream) = UnixStream::connect(&server) else {
                    continue;
                };
                let clones = [client.try_clone(), client.try_clone(), upstream.try_clone()];
                let [Ok(kept), Ok(from), Ok(to)] = clones else {
                    continue;
                };
                let mut held = of_relay.lock();
                let number = held.connections;
                held.connections += 1;
                held.clients.push(kept);
                drop(held);
                let state = Arc::clone(&of_relay);
                thread::spawn(move || state.pass(from, to, number));
                let of_answers = Arc::clone(&of_relay);
                thread::spawn(move || of_answers.answer(upstream, client, number));
            }
        });
        Self { state, directory }
    }

    /// Holds what is sent from here on over the connections that there are.
    pub fn hold(&self) {
        let mut held = self.state.lock();
        held.below = held.connections;
    }

    /// Returns when so many bytes are held, or wait to be taken.
    pub fn wait_until_held(&self, length: u64) {
        loop {
            let held = self.state.lock();
            let clients = &held.clients[..held.below as usize];
            let waiting = clients.iter().map(|it| ioctl_fionread(it).unwrap_or(0));
            if held.bytes + waiting.sum::<u64>() >= length {
                return;
            }
            drop(held);
            thread::yield_now();
        }
    }

    /// Hangs up on the clients whose connections are held. What they sent is held all the same.
    pub fn hang_up(&self) {
        let held = self.state.lock();
        for client in &held.clients[..held.below as usize] {
            // It may have gone by itself.
            let _ = client.shutdown(Shutdown::Both);
        }
    }

    /// Lets it all go on to the server, and returns when the connections that were given up meanwhile
    /// have been read to their end by it.
    pub fn release(&self) {
        let mut held = self.state.lock();
        let given_up = held.below;
        held.below = 0;
        self.state.changed.notify_all();
        while (0..given_up).any(|number| !held.ended.contains(&number)) {
            let waited = self.state.changed.wait(held);
            held = waited.unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Where it listens.
    pub fn socket(&self) -> PathBuf {
        self.directory.path().join("socket")
    }
}

impl State {
    fn lock(&self) -> MutexGuard<'_, Held> {
        self.held.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What the client sends, to the server.
    fn pass(&self, mut client: UnixStream, mut server: UnixStream, number: u64) {
        let mut bytes = vec![0; 64 << 10];
        while let Ok(length @ 1..) = client.read(&mut bytes) {
            self.wait(number, length);
            if server.write_all(&bytes[..length]).is_err() {
                break;
            }
        }
        self.wait(number, 0);
        // The server reads what there is, performs it and closes.
        let _ = server.shutdown(Shutdown::Write);
    }

    /// What the server answers, to the client, if that is still there.
    fn answer(&self, mut server: UnixStream, mut client: UnixStream, number: u64) {
        let mut bytes = vec![0; 64 << 10];
        while let Ok(length @ 1..) = server.read(&mut bytes) {
            // One that has gone does not keep the server from answering.
            let _ = client.write_all(&bytes[..length]);
        }
        let _ = client.shutdown(Shutdown::Both);
        self.lock().ended.push(number);
        self.changed.notify_all();
    }

    fn wait(&self, number: u64, length: usize) {
        let mut held = self.lock();
        if number < held.below {
            held.bytes += length as u64;
        }
        self.changed.notify_all();
        while number < held.below {
            let waited = self.changed.wait(held);
            held = waited.unwrap_or_else(PoisonError::into_inner);
        }
    }
}
