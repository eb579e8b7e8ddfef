//! A server with an image in memory that does what servers do at their worst.
//!
//! It answers in any order, late or never, fails in the middle of a write, is killed and forgets what
//! was not flushed, comes back as another, and performs what a lost connection has left behind at any
//! time later. All of it is drawn from a seed, on a clock that does not wait.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::io;
use std::ops::Range;
use std::rc::Rc;
use std::time::Duration;

use proto::Headers;
use proto::client::{Error, Haggling};
use rand::{Rng as _, SeedableRng as _};
use rand_chacha::ChaCha8Rng;
use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream, ReadHalf, duplex, split};
use tokio::sync::mpsc;
use tokio::task::AbortHandle;
use tokio::time::sleep;

use super::connect::{Dial, Link};

/// How it is told of, and what it does for its clients.
#[derive(Clone, Copy, Debug)]
pub(super) struct Kind {
    pub(super) size: u64,
    /// The smallest block and the longest request, in bytes.
    pub(super) blocks: [u32; 2],
    pub(super) flags: u16,
}

#[derive(Clone)]
pub(super) struct FakeBase(Rc<RefCell<State>>);

struct State {
    rng: ChaCha8Rng,
    kind: Kind,
    /// How long a client waits, at most.
    patience: Duration,
    image: Image,
    appears: Appears,
    connections: Vec<AbortHandle>,
    /// How often all connections were lost.
    life: u64,
    troubles: bool,
    /// How many requests were performed when their connection was gone.
    late: u64,
    others_written: u64,
}

#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Appears {
    AsItself,
    /// It cannot be reached.
    Not,
    /// As a server with another image of this size. One that has another size than its own begins as
    /// its own does.
    AsAnother(u64),
}

/// What is read now, and of each sector that was changed since the last flush what it was since then.
struct Image {
    bytes: Vec<u8>,
    since_flush: BTreeMap<usize, Vec<Vec<u8>>>,
}

struct Asked {
    flags: u16,
    kind: u16,
    cookie: u64,
    range: Range<u64>,
    data: Vec<u8>,
}

/// What becomes of a request.
struct Fate {
    delay: Duration,
    fails: bool,
    /// What it is about is performed, and nobody is told.
    is_silent: bool,
    /// After it all connections are lost.
    cuts: bool,
}

impl FakeBase {
    pub(super) fn new(seed: u64, kind: Kind, patience: Duration) -> Self {
        Self(Rc::new(RefCell::new(State {
            rng: ChaCha8Rng::seed_from_u64(seed),
            kind,
            patience,
            image: Image {
                bytes: vec![0; kind.size as usize],
                since_flush: BTreeMap::new(),
            },
            appears: Appears::AsItself,
            connections: Vec::new(),
            life: 0,
            troubles: false,
            late: 0,
            others_written: 0,
        })))
    }

    /// What is in its image now.
    pub(super) fn bytes(&self) -> Vec<u8> {
        self.0.borrow().image.bytes.clone()
    }

    pub(super) fn late(&self) -> u64 {
        self.0.borrow().late
    }

    /// How often something was written to an image that was another.
    pub(super) fn others_written(&self) -> u64 {
        self.0.borrow().others_written
    }

    /// All connections are lost. What was asked over them may still be performed.
    pub(super) fn cut(&self, appears: Appears) {
        let mut state = self.0.borrow_mut();
        state.life += 1;
        state.appears = appears;
        for connection in state.connections.drain(..) {
            connection.abort();
        }
    }

    /// The same, and of what was not flushed any of it is lost, sector by sector.
    pub(super) fn kill(&self, appears: Appears) {
        self.cut(appears);
        let state = &mut *self.0.borrow_mut();
        for (sector, mut found) in std::mem::take(&mut state.image.since_flush) {
            let place = sector * SECTOR..(sector + 1) * SECTOR;
            found.push(state.image.bytes[place.clone()].to_vec());
            let left = &found[state.rng.random_range(0..found.len())];
            state.image.bytes[place].copy_from_slice(left);
        }
    }

    /// From here on it does its worst.
    pub(super) fn trouble(&self) {
        self.0.borrow_mut().troubles = true;
    }

    /// From here on it is reached, and does what it is asked to.
    pub(super) fn heal(&self) {
        let mut state = self.0.borrow_mut();
        state.troubles = false;
        state.appears = Appears::AsItself;
    }

    async fn converse(self, mut stream: DuplexStream, appears: Appears) -> io::Result<()> {
        let kind = self.0.borrow().kind;
        let size = match appears {
            Appears::AsAnother(size) => size,
            Appears::AsItself | Appears::Not => kind.size,
        };
        stream.write_all(b"NBDMAGICIHAVEOPT\0\x03").await?;
        stream.read_u32().await?;
        loop {
            stream.read_u64().await?;
            let (option, length) = (stream.read_u32().await?, stream.read_u32().await?);
            stream.read_exact(&mut vec![0; length as usize]).await?;
            if option == GO {
                break;
            }
            stream.write_all(&answer(option, ERR_UNSUP, &[])).await?;
        }
        let export = [&[0, 0][..], &size.to_be_bytes(), &kind.flags.to_be_bytes()];
        let [smallest, longest] = kind.blocks.map(u32::to_be_bytes);
        let preferred = 4096_u32.to_be_bytes();
        let blocks = [&[0, 3][..], &smallest, &preferred, &longest];
        for (kind, data) in [
            (INFO, export.concat()),
            (INFO, blocks.concat()),
            (ACK, Vec::new()),
        ] {
            stream.write_all(&answer(GO, kind, &data)).await?;
        }

        let (mut reader, mut writer) = split(stream);
        let (tell, mut told) = mpsc::unbounded_channel();
        let life = self.0.borrow().life;
        let listen = async {
            loop {
                let asked = Asked::receive(&mut reader).await?;
                if asked.kind == DISCONNECT {
                    return io::Result::Ok(());
                }
                let (base, tell) = (self.clone(), tell.clone());
                tokio::task::spawn_local(base.treat(asked, appears, life, tell));
            }
        };
        let speak = async {
            while let Some(bytes) = told.recv().await {
                let bytes: Vec<u8> = bytes;
                writer.write_all(&bytes).await?;
            }
            io::Result::Ok(())
        };
        tokio::select! { ended = listen => ended, ended = speak => ended }
    }

    /// Performs a request, or does not, and answers it, or does not.
    async fn treat(
        self,
        asked: Asked,
        appears: Appears,
        life: u64,
        tell: mpsc::UnboundedSender<Vec<u8>>,
    ) {
        let fate = self.0.borrow_mut().fate();
        sleep(fate.delay).await;
        if self.0.borrow().life != life {
            let landing = {
                let mut state = self.0.borrow_mut();
                let lands = asked.kind == READ || state.rng.random_bool(0.5);
                let longest = 10 * state.patience.as_millis() as u64;
                lands.then(|| Duration::from_millis(state.rng.random_range(0..longest)))
            };
            let Some(delay) = landing else {
                return;
            };
            sleep(delay).await;
            self.0.borrow_mut().late += u64::from(asked.kind != READ);
        }
        let (error, data) = self.0.borrow_mut().perform(&asked, appears, fate.fails);
        if !fate.is_silent {
            let error = error.to_be_bytes();
            let head = [
                &0x6744_6698_u32.to_be_bytes()[..],
                &error,
                &asked.cookie.to_be_bytes(),
            ];
            // It may have gone.
            let _ = tell.send([&head.concat()[..], &data].concat());
        }
        if fate.cuts && self.0.borrow().life == life {
            let appears = self.0.borrow().appears;
            self.cut(appears);
        }
    }
}

impl Dial for FakeBase {
    async fn dial(&self) -> Result<Link, Error> {
        let appears = self.0.borrow().appears;
        if appears == Appears::Not {
            return Err(Error::Closed);
        }
        let (near, far) = duplex(64 << 10);
        let base = self.clone();
        let served = tokio::task::spawn_local(async move {
            // Whoever talks to it sees how it ends.
            let _ = base.converse(far, appears).await;
        });
        self.0.borrow_mut().connections.push(served.abort_handle());
        let haggling = Haggling::begin(near).await?.at_most(Headers::Simple);
        let (client, connection) = haggling.enter("", &[]).await?;
        Ok(Link::carried(client, connection))
    }
}

impl State {
    fn fate(&mut self) -> Fate {
        let patience = self.patience.as_millis() as u64;
        let mut one_in = |many: u32| self.troubles && self.rng.random_ratio(1, many);
        let (fails, is_silent, cuts, is_slow) = (one_in(12), one_in(40), one_in(60), one_in(10));
        let longest = if is_slow { patience } else { patience / 50 };
        Fate {
            delay: Duration::from_millis(self.rng.random_range(0..=longest)),
            fails,
            is_silent,
            cuts,
        }
    }

    /// The error that is told, and what was read.
    fn perform(&mut self, asked: &Asked, appears: Appears, fails: bool) -> (u32, Vec<u8>) {
        let place = asked.range.start as usize..asked.range.end as usize;
        if let Appears::AsAnother(size) = appears {
            self.others_written += u64::from(asked.kind != READ && asked.kind != FLUSH);
            let other = 0xdead_beef_dead_beef_u64.to_le_bytes();
            return match asked.kind {
                READ if size == self.kind.size => (0, other.repeat(place.len() / other.len())),
                READ => (0, self.image.bytes[place].to_vec()),
                _ => (0, Vec::new()),
            };
        }
        match asked.kind {
            READ if fails => (EIO, Vec::new()),
            READ => (0, self.image.bytes[place].to_vec()),
            FLUSH => {
                self.image.since_flush.clear();
                (0, Vec::new())
            }
            WRITE | WRITE_ZEROES => {
                let zeroes = vec![0; place.len()];
                let data = if asked.kind == WRITE {
                    &asked.data
                } else {
                    &zeroes
                };
                let sectors = place.len() / SECTOR;
                let done = if fails {
                    self.rng.random_range(0..=sectors)
                } else {
                    sectors
                };
                for (number, sector) in data.chunks(SECTOR).take(done).enumerate() {
                    self.image.put(
                        place.start / SECTOR + number,
                        sector,
                        asked.flags & FUA != 0,
                    );
                }
                (if fails { EIO } else { 0 }, Vec::new())
            }
            other => panic!("request {other}"),
        }
    }
}

impl Image {
    fn put(&mut self, sector: usize, data: &[u8], durably: bool) {
        let place = sector * SECTOR..(sector + 1) * SECTOR;
        if durably {
            self.since_flush.remove(&sector);
        } else {
            let before = self.bytes[place.clone()].to_vec();
            self.since_flush.entry(sector).or_default().push(before);
        }
        self.bytes[place].copy_from_slice(data);
    }
}

impl Asked {
    async fn receive(reader: &mut ReadHalf<DuplexStream>) -> io::Result<Self> {
        reader.read_u32().await?;
        let (flags, kind) = (reader.read_u16().await?, reader.read_u16().await?);
        let (cookie, start) = (reader.read_u64().await?, reader.read_u64().await?);
        let length = reader.read_u32().await?;
        let mut data = vec![0; if kind == WRITE { length as usize } else { 0 }];
        reader.read_exact(&mut data).await?;
        Ok(Self {
            flags,
            kind,
            cookie,
            range: start..start + u64::from(length),
            data,
        })
    }
}

fn answer(option: u32, kind: u32, data: &[u8]) -> Vec<u8> {
    let length = data.len() as u32;
    let numbers = [option, kind, length].map(u32::to_be_bytes).concat();
    [&0x0003_e889_0455_65a9_u64.to_be_bytes()[..], &numbers, data].concat()
}

pub(super) const SECTOR: usize = 512;

const READ: u16 = 0;
const WRITE: u16 = 1;
const DISCONNECT: u16 = 2;
const FLUSH: u16 = 3;
const WRITE_ZEROES: u16 = 6;
const FUA: u16 = 1;
const EIO: u32 = 5;

const GO: u32 = 7;
const ACK: u32 = 1;
const INFO: u32 = 3;
const ERR_UNSUP: u32 = 0x8000_0001;
