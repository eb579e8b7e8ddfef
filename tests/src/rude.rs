//! A client that leaves out what others rely on: over either kind of socket, at any pace, and never
//! waiting for longer than it says.

use std::fs;
use std::io::{self, Read, Write};
use std::net::{Ipv4Addr, TcpStream};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fd::{AsFd, BorrowedFd};

use crate::Server;
use crate::raw_nbd::option;
use crate::tools::proc_number;

/// Where a server listens.
#[derive(Clone, Debug)]
pub enum Address {
    /// A Unix socket.
    Unix(PathBuf),
    /// A port of this machine.
    Tcp(u16),
}

impl Address {
    /// A Unix socket.
    pub fn unix(path: &Path) -> Self {
        Self::Unix(path.to_path_buf())
    }

    /// The port that a server got when it was told to listen on port 0 of 127.0.0.1, for the exports
    /// that its table calls so: `live` or `backups`.
    #[track_caller]
    pub fn tcp(server: &Server, exports: &str) -> Self {
        let table = server.stdout();
        let mut lines = table.lines().map(str::trim);
        let port = lines.find_map(|line| {
            let uri = line.strip_prefix(exports)?.trim();
            let port = uri.strip_prefix("nbd://127.0.0.1:")?.split('/').next()?;
            port.parse().ok()
        });
        Self::Tcp(port.unwrap_or_else(|| panic!("no port for {exports} in\n{table}")))
    }
}

/// A connection.
#[derive(Debug)]
pub struct Rude {
    stream: Stream,
}

#[derive(Debug)]
enum Stream {
    Unix(UnixStream),
    Tcp(TcpStream),
}

/// What came of waiting.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum Heard {
    /// So many bytes, as asked for.
    Bytes(Vec<u8>),
    /// The server hung up after these.
    End(Vec<u8>),
    /// Only these, in the time there was.
    Silence(Vec<u8>),
}

impl Rude {
    /// Connects, and neither says nor reads anything.
    #[track_caller]
    pub fn connect(address: &Address) -> Self {
        Self::try_connect(address).unwrap_or_else(|error| panic!("{address:?}: {error}"))
    }

    /// The same where it may fail.
    pub fn try_connect(address: &Address) -> io::Result<Self> {
        let stream = match address {
            Address::Unix(path) => {
                let stream = UnixStream::connect(path)?;
                stream.set_nonblocking(true)?;
                Stream::Unix(stream)
            }
            Address::Tcp(port) => {
                let stream = TcpStream::connect((Ipv4Addr::LOCALHOST, *port))?;
                stream.set_nonblocking(true)?;
                stream.set_nodelay(true)?;
                Stream::Tcp(stream)
            }
        };
        Ok(Self { stream })
    }

    /// Connects and agrees to the flags of the handshake.
    #[track_caller]
    pub fn greeted(address: &Address) -> Self {
        let mut rude = Self::connect(address);
        let greeting = rude.hear(18, SOON);
        assert!(matches!(greeting, Heard::Bytes(_)), "{greeting:?}");
        rude.say(&3u32.to_be_bytes());
        rude
    }

    /// Opens an export, with structured replies if there are contexts.
    #[track_caller]
    pub fn open(address: &Address, name: &str, contexts: &[&str]) -> Self {
        let mut rude = Self::greeted(address);
        let mut words = Vec::new();
        if !contexts.is_empty() {
            words.extend(option_message(option::STRUCTURED_REPLY, &[]));
            let mut data = sized(name);
            data.extend((contexts.len() as u32).to_be_bytes());
            data.extend(contexts.iter().flat_map(|context| sized(context)));
            words.extend(option_message(option::SET_META_CONTEXT, &data));
        }
        words.extend(go(name));
        rude.say(&words);
        loop {
            let Heard::Bytes(head) = rude.hear(20, SOON) else {
                panic!("{name} cannot be opened");
            };
            let word = |at: usize| u32::from_be_bytes(head[at..at + 4].try_into().expect("four"));
            let (option, kind, length) = (word(8), word(12), word(16));
            rude.hear(length as usize, SOON);
            assert_eq!(kind >> 31, 0, "option {option} for {name}: {kind:#x}");
            if (option, kind) == (option::GO, 1) {
                return rude;
            }
        }
    }

    /// Says something that the server has room for.
    #[track_caller]
    pub fn say(&mut self, bytes: &[u8]) {
        let said = self.push(bytes, SOON);
        assert_eq!(said, bytes.len(), "the server does not listen");
    }

    /// Says as much as the server takes, until it takes no more for so long, or hangs up; returns how
    /// much that was.
    pub fn push(&mut self, bytes: &[u8], patience: Duration) -> usize {
        let mut said = 0;
        while said < bytes.len() && self.wait(PollFlags::OUT, Instant::now() + patience) {
            match self.stream.write(&bytes[said..]) {
                Ok(length) => said += length,
                Err(error) if is_only_later(&error) => {}
                Err(_) => break,
            }
        }
        said
    }

    /// Asks for something; returns how many bytes of the question were taken at once.
    pub fn ask(&mut self, command: u16, offset: u64, length: u32) -> usize {
        self.push(&request(command, 0, offset, length), Duration::ZERO)
    }

    /// Hears so many bytes, unless the server hangs up or is silent for too long.
    pub fn hear(&mut self, length: usize, patience: Duration) -> Heard {
        let deadline = Instant::now() + patience;
        let mut heard = Vec::new();
        while heard.len() < length {
            if !self.wait(PollFlags::IN, deadline) {
                return Heard::Silence(heard);
            }
            let mut piece = vec![0; (length - heard.len()).min(1 << 16)];
            match self.stream.read(&mut piece) {
                Ok(0) => return Heard::End(heard),
                Ok(read) => heard.extend(&piece[..read]),
                Err(error) if is_only_later(&error) => {}
                Err(_) => return Heard::End(heard),
            }
        }
        Heard::Bytes(heard)
    }

    fn wait(&self, flags: PollFlags, deadline: Instant) -> bool {
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            let left = Timespec::try_from(left).expect("a short time");
            match poll(
                &mut [PollFd::from_borrowed_fd(self.as_fd(), flags)],
                Some(&left),
            ) {
                Err(rustix::io::Errno::INTR) => {}
                Err(error) => panic!("poll: {error}"),
                Ok(ready) => return ready > 0,
            }
        }
    }
}

impl AsFd for Rude {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match &self.stream {
            Stream::Unix(stream) => stream.as_fd(),
            Stream::Tcp(stream) => stream.as_fd(),
        }
    }
}

impl Stream {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match self {
            Self::Unix(stream) => stream.write(bytes),
            Self::Tcp(stream) => stream.write(bytes),
        }
    }

    fn read(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        match self {
            Self::Unix(stream) => stream.read(bytes),
            Self::Tcp(stream) => stream.read(bytes),
        }
    }
}

/// A request as it is sent, without a payload.
pub fn request(command: u16, cookie: u64, offset: u64, length: u32) -> Vec<u8> {
    let mut message = 0x2560_9513u32.to_be_bytes().to_vec();
    message.extend(0u16.to_be_bytes());
    message.extend(command.to_be_bytes());
    message.extend(cookie.to_be_bytes());
    message.extend(offset.to_be_bytes());
    message.extend(length.to_be_bytes());
    message
}

/// An option as it is sent.
pub fn option_message(option: u32, data: &[u8]) -> Vec<u8> {
    let mut message = b"IHAVEOPT".to_vec();
    message.extend(option.to_be_bytes());
    message.extend((data.len() as u32).to_be_bytes());
    message.extend(data);
    message
}

/// The option that opens an export.
pub fn go(name: &str) -> Vec<u8> {
    option_message(option::GO, &[sized(name), vec![0, 0]].concat())
}

/// What a process holds in memory that is nobody else's, in bytes.
#[track_caller]
pub fn private_memory(pid: u32) -> u64 {
    proc_number(pid, "status", "RssAnon") << 10
}

/// How many descriptors a process has open.
#[track_caller]
pub fn descriptors(pid: u32) -> usize {
    let open = fs::read_dir(format!("/proc/{pid}/fd")).expect("a live process");
    open.count()
}

/// A text with its length before it.
pub fn sized(text: &str) -> Vec<u8> {
    [&(text.len() as u32).to_be_bytes()[..], text.as_bytes()].concat()
}

fn is_only_later(error: &io::Error) -> bool {
    use io::ErrorKind::{Interrupted, WouldBlock};
    matches!(error.kind(), Interrupted | WouldBlock)
}

/// Longer than a server takes for anything that it does at once.
const SOON: Duration = Duration::from_secs(30);
