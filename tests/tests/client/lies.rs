//! A server that answers like one, until it does not: cut short, said twice, left out, about
//! something else, with bits that flip.
//!
//! What it sends as data is never zero. So whatever a client returns that is zero has to have come as
//! a hole, and whatever it returns at all, to have come; and every future ends, because every server
//! ends.
//!
//! `STILLPOINT_LIES` sets how many servers are drawn; `STILLPOINT_SEED` picks one.

use std::sync::{Arc, Mutex};

use rand::Rng as _;
use stillpoint_tests::MIB;
use stillpoint_tests::seeds::{self, Rng};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufStream, DuplexStream, duplex};
use tokio::task::JoinSet;

use crate::client::{Client, Durability, Error, Haggling, Piece};
use crate::connected::run;
use crate::wire::*;

const SERVERS: u64 = 1000;
const REQUESTS: u64 = 12;
const SIZE: u64 = 4 * MIB;

#[test]
fn no_lie_is_taken_for_data_and_none_keeps_anyone_waiting() {
    let (mut good, mut bad) = (0, 0);
    let servers = seeds::number("STILLPOINT_LIES", SERVERS);
    let seeds = seeds::seeds(&(0..servers).collect::<Vec<_>>());
    for seed in seeds.iter().copied() {
        let (near, far) = duplex(16 << 10);
        let sent = Sent::default();
        let lies = Liar::new(seed, far, &sent).serve();
        let (outcomes, ()) = run(async { tokio::join!(client(seed, near, &sent), lies) });
        good += outcomes.good;
        bad += outcomes.bad;
    }
    println!("{good} requests answered, {bad} failed");
    // Neither a server that nobody believes nor one that never lies would show anything.
    assert!(
        (seeds.len() as u64) < SERVERS || good > 500 && bad > 500,
        "{good}, {bad}"
    );
}

/// All that a server has said.
type Sent = Arc<Mutex<Vec<u8>>>;

#[derive(Default)]
struct Outcomes {
    good: u64,
    bad: u64,
}

/// Enters the export, if it can, and asks for all kinds of things at once.
async fn client(seed: u64, stream: DuplexStream, sent: &Sent) -> Outcomes {
    let mut outcomes = Outcomes::default();
    let entered = async {
        let mut haggling = Haggling::begin(stream).await?;
        haggling.list().await?;
        haggling.enter("vda", &["base:allocation"]).await
    };
    let Ok((client, connection)) = entered.await else {
        outcomes.bad += 1;
        return outcomes;
    };
    let carrying = tokio::spawn(connection);
    let mut requests = JoinSet::new();
    for index in 0..REQUESTS {
        requests.spawn(request(client.clone(), seed, index, Arc::clone(sent)));
    }
    drop(client);
    while let Some(outcome) = requests.join_next().await {
        match outcome.expect("no panic") {
            Ok(()) => outcomes.good += 1,
            Err(_) => outcomes.bad += 1,
        }
    }
    // How it ends does not matter, only that it does.
    let _ = carrying.await.expect("no panic");
    outcomes
}

async fn request(client: Client, seed: u64, index: u64, sent: Sent) -> Result<(), Error> {
    let mut random = seeds::rng(seed << 8 | index);
    let size = client.info().size.min(SIZE);
    let start = random.random_range(0..size.max(1));
    let end = random.random_range(start..=size.min(start + 100_000).max(start));
    match random.random_range(0..6) {
        0 => {
            client
                .write(start, vec![1; 100].into(), Durability::Later)
                .await
        }
        1 => client.flush().await,
        2 => {
            let status = client.block_status(start..end).await?;
            assert!(
                status.range.start == start && status.range.end <= end,
                "seed {seed}"
            );
            for (_, extents) in &status.contexts {
                let told: u64 = extents.iter().map(|extent| extent.length).sum();
                assert_eq!(told, status.range.end - start, "seed {seed}");
                assert!(
                    extents.iter().all(|extent| extent.length > 0),
                    "seed {seed}"
                );
            }
            Ok(())
        }
        _ => {
            let mut at = start;
            for piece in client.read_pieces(start..end).await? {
                assert_eq!(piece.range().start, at, "seed {seed}: a gap");
                at = piece.range().end;
                if let Piece::Data { data, .. } = piece {
                    assert!(was_sent(&sent, &data), "seed {seed}: nobody sent these");
                }
            }
            assert_eq!(at, end, "seed {seed}: bytes are missing");
            Ok(())
        }
    }
}

/// What is sent as data is never zero; but a head that lies can make the next one look like data.
fn was_sent(sent: &Sent, data: &[u8]) -> bool {
    let sent = sent.lock().unwrap();
    !data.contains(&0) || sent.windows(data.len()).any(|window| window == data)
}

/// A server with a seed for a character.
struct Liar {
    random: Rng,
    stream: BufStream<DuplexStream>,
    sent: Sent,
    /// After a lie it does not wait for a client that waits for it.
    lied: bool,
    held_back: Vec<Vec<u8>>,
    /// How many messages in a thousand are lies.
    lies: u32,
    extended: bool,
}

struct Asked {
    kind: u16,
    cookie: u64,
    offset: u64,
    length: u64,
}

impl Liar {
    fn new(seed: u64, stream: DuplexStream, sent: &Sent) -> Self {
        let mut random = seeds::rng(seed);
        Self {
            lies: [0, 10, 50, 200][random.random_range(0..4)],
            extended: random.random(),
            random,
            stream: BufStream::new(stream),
            lied: false,
            held_back: Vec::new(),
            sent: Arc::clone(sent),
        }
    }

    /// Until the client goes, or until it says nothing more that makes sense.
    async fn serve(mut self) {
        if self.handshake().await.is_none() {
            return;
        }
        while let Some(asked) = self.request().await {
            let replies = self.replies(&asked);
            self.held_back.extend(replies);
            // Some replies come late, after others.
            let speaks = self.random.random_ratio(3, 4);
            if speaks && self.say_all().await.is_none() || asked.kind == 2 {
                return;
            }
        }
    }

    async fn handshake(&mut self) -> Option<()> {
        self.say(greeting(FIXED | NO_ZEROES)).await?;
        self.take(4).await?;
        loop {
            let header = self.take(16).await?;
            let option = u32::from_be_bytes(header[8..12].try_into().unwrap());
            let length = u32::from_be_bytes(header[12..].try_into().unwrap());
            self.take(length as usize).await?;
            let ack = answer(option, ACK, b"");
            let messages = match option {
                LIST => vec![listed(b"vda", b"a disk"), ack],
                EXTENDED_HEADERS if !self.extended => vec![answer(option, ERR_UNSUP, b"")],
                SET_META_CONTEXT => vec![context(option, 1, "base:allocation"), ack],
                GO => vec![
                    info_export(GO, SIZE, EVERYTHING),
                    info_block_size(GO, [1, 4096, 32 << 20]),
                    ack,
                ],
                _ => vec![ack],
            };
            for message in messages {
                self.say(message).await?;
            }
            if option == GO {
                return Some(());
            }
        }
    }

    async fn request(&mut self) -> Option<Asked> {
        let header = self.take(if self.extended { 32 } else { 28 }).await?;
        let number = |at: usize, size: usize| {
            let bytes = header[at..at + size].iter();
            bytes.fold(0, |number, byte| number << 8 | u64::from(*byte))
        };
        let asked = Asked {
            kind: number(6, 2) as u16,
            cookie: number(8, 8),
            offset: number(16, 8),
            length: number(24, header.len() - 24),
        };
        if asked.kind == 1 {
            self.take(asked.length as usize).await?;
        }
        Some(asked)
    }

    fn replies(&mut self, asked: &Asked) -> Vec<Vec<u8>> {
        let (start, end) = (asked.offset, asked.offset + asked.length);
        if asked.kind == 7 {
            return vec![self.block_status(asked)];
        }
        let mut messages = Vec::new();
        if asked.kind == 0 {
            let mut at = start;
            while at < end {
                let next = end.min(at + self.random.random_range(1000..40_000));
                messages.push(self.piece(asked, at, next - at));
                at = next;
            }
        }
        messages.push(self.chunk(asked, DONE, NONE, b""));
        messages
    }

    fn piece(&mut self, asked: &Asked, at: u64, length: u64) -> Vec<u8> {
        if self.random.random_ratio(1, 4) {
            let payload = [&at.to_be_bytes()[..], &(length as u32).to_be_bytes()].concat();
            return self.chunk(asked, 0, OFFSET_HOLE, &payload);
        }
        let payload = [&at.to_be_bytes()[..], &vec![0xaa; length as usize]].concat();
        self.chunk(asked, 0, OFFSET_DATA, &payload)
    }

    fn block_status(&mut self, asked: &Asked) -> Vec<u8> {
        let mut extents = Vec::new();
        let mut left = asked.length;
        while left > 0 && extents.len() < 20 {
            let length = left.min(self.random.random_range(1..50_000));
            extents.push((length, u64::from(self.random.random::<u8>() & 3)));
            left -= length;
        }
        if self.extended {
            return extended_status(asked.cookie, (asked.offset, DONE), 1, &extents);
        }
        let compact: Vec<_> = extents
            .iter()
            .map(|(l, f)| (*l as u32, *f as u32))
            .collect();
        status(asked.cookie, DONE, 1, &compact)
    }

    fn chunk(&self, asked: &Asked, flags: u16, kind: u16, payload: &[u8]) -> Vec<u8> {
        if self.extended {
            extended(asked.cookie, asked.offset, flags, kind, payload)
        } else {
            chunk(asked.cookie, flags, kind, payload)
        }
    }

    async fn say_all(&mut self) -> Option<()> {
        for message in std::mem::take(&mut self.held_back) {
            self.say(message).await?;
        }
        Some(())
    }

    /// Says something, or something else. `None` if that was the end.
    async fn say(&mut self, message: Vec<u8>) -> Option<()> {
        if !self.random.random_ratio(self.lies, 1000) {
            return self.send(&message).await;
        }
        self.lied = true;
        let mut lie = message;
        match self.random.random_range(0..6) {
            // Heads only: what is sent as data stays what it is.
            0 => {
                let at = self.random.random_range(0..lie.len().min(36));
                lie[at] ^= 1 << self.random.random_range(0..8);
            }
            1 => {
                let at = self.random.random_range(0..lie.len().min(36));
                lie[at] = [0, 1, 0x7f, 0x80, 0xff][self.random.random_range(0..5)];
            }
            2 => lie = lie.repeat(2),
            3 => return Some(()),
            4 => {
                lie.truncate(self.random.random_range(0..lie.len()));
                let _ = self.send(&lie).await;
                return None;
            }
            _ => {
                let garbage: [u8; 64] = self.random.random();
                lie.extend(garbage);
            }
        }
        self.send(&lie).await
    }

    /// Whether something has come, or the end, once everyone has had their turn.
    async fn is_spoken_to(&mut self) -> bool {
        tokio::select! {
            biased;
            _ = self.stream.fill_buf() => true,
            () = turns() => false,
        }
    }

    async fn send(&mut self, bytes: &[u8]) -> Option<()> {
        self.sent.lock().unwrap().extend(bytes);
        self.stream.write_all(bytes).await.ok()?;
        self.stream.flush().await.ok()
    }

    async fn take(&mut self, length: usize) -> Option<Vec<u8>> {
        // Nothing comes while everyone waits for what has been held back, or for what has never been
        // said.
        if length > 0 && !self.is_spoken_to().await {
            self.say_all().await?;
            if self.lied && !self.is_spoken_to().await {
                return None;
            }
        }
        let mut bytes = vec![0; length];
        self.stream.read_exact(&mut bytes).await.ok()?;
        Some(bytes)
    }
}

async fn turns() {
    for _ in 0..100 {
        tokio::task::yield_now().await;
    }
}
