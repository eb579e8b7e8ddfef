//! A server by hand on a stream in memory.

use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream, duplex};
use tokio::task::JoinHandle;

use crate::proto::Headers;
use crate::proto::client::{Client, Error, Haggling};
use crate::wire::*;

pub(crate) const SIZE: u64 = 1 << 40;

/// The server's end.
pub(crate) struct Server {
    stream: DuplexStream,
}

/// A request as it came.
#[derive(Debug, Eq, PartialEq)]
pub(crate) struct Asked {
    pub(crate) kind: u16,
    pub(crate) cookie: u64,
    pub(crate) offset: u64,
    pub(crate) length: u64,
    pub(crate) payload: Vec<u8>,
}

pub(crate) type Carrying = JoinHandle<Result<(), Error>>;

/// Both ends of an export that has been entered, with structured replies.
pub(crate) async fn entered(contexts: &[&str]) -> (Client, Carrying, Server) {
    entered_with(contexts, [1, 4096, 32 << 20]).await
}

pub(crate) async fn entered_with(
    contexts: &[&str],
    block_sizes: [u32; 3],
) -> (Client, Carrying, Server) {
    let (near, far) = duplex(64 << 10);
    let mut server = Server { stream: far };
    let handshake = async {
        server.greet().await;
        server.option(STRUCTURED_REPLY).await;
        server.send(&answer(STRUCTURED_REPLY, ACK, b"")).await;
        if !contexts.is_empty() {
            server.option(SET_META_CONTEXT).await;
            for (name, id) in contexts.iter().zip(1..) {
                server.send(&context(SET_META_CONTEXT, id, name)).await;
            }
            server.send(&answer(SET_META_CONTEXT, ACK, b"")).await;
        }
        server.option(GO).await;
        server.send(&info_export(GO, SIZE, EVERYTHING)).await;
        server.send(&info_block_size(GO, block_sizes)).await;
        server.send(&answer(GO, ACK, b"")).await;
    };
    let client = async {
        let haggling = Haggling::begin(near).await?.at_most(Headers::Structured);
        haggling.enter("vda", contexts).await
    };
    let ((), entered) = tokio::join!(handshake, client);
    let (client, connection) = entered.expect("the server lets us in");
    (client, tokio::spawn(connection), server)
}

impl Server {
    pub(crate) fn new(stream: DuplexStream) -> Self {
        Self { stream }
    }

    pub(crate) async fn greet(&mut self) {
        self.send(&greeting(FIXED | NO_ZEROES)).await;
        assert_eq!(self.take(4).await, [0, 0, 0, 3]);
    }

    /// Waits for an option; its data.
    pub(crate) async fn option(&mut self, expected: u32) -> Vec<u8> {
        let header = self.take(16).await;
        assert_eq!(header[..8], *b"IHAVEOPT");
        assert_eq!(header[8..12], expected.to_be_bytes(), "option {expected}");
        let length = u32::from_be_bytes(header[12..].try_into().unwrap());
        self.take(length as usize).await
    }

    /// Waits for a request.
    pub(crate) async fn request(&mut self) -> Asked {
        let header = self.take(28).await;
        assert_eq!(header[..4], *b"\x25\x60\x95\x13");
        let number = |at: usize, size: usize| {
            let bytes = header[at..at + size].iter();
            bytes.fold(0, |number, byte| number << 8 | u64::from(*byte))
        };
        let (kind, length) = (number(6, 2) as u16, number(24, 4));
        let payload = if kind == 1 { length } else { 0 };
        Asked {
            kind,
            cookie: number(8, 8),
            offset: number(16, 8),
            length,
            payload: self.take(payload as usize).await,
        }
    }

    /// Answers a request that is done.
    pub(crate) async fn done(&mut self, asked: &Asked) {
        self.send(&chunk(asked.cookie, DONE, NONE, b"")).await;
    }

    /// Answers a read with bytes that say where they are from.
    pub(crate) async fn answer_read(&mut self, asked: &Asked) {
        assert_eq!(asked.kind, 0, "no read: {asked:?}");
        let bytes = contents(asked.offset, asked.length);
        self.send(&data(asked.cookie, DONE, asked.offset, &bytes))
            .await;
    }

    /// Sends anything. A client that has gone does not mind.
    pub(crate) async fn send(&mut self, bytes: &[u8]) {
        let _ = self.stream.write_all(bytes).await;
    }

    /// Waits for the end of what the client sends; what came until then.
    pub(crate) async fn rest(mut self) -> Vec<u8> {
        let mut rest = Vec::new();
        self.stream.read_to_end(&mut rest).await.unwrap();
        rest
    }

    async fn take(&mut self, length: usize) -> Vec<u8> {
        let mut bytes = vec![0; length];
        let read = self.stream.read_exact(&mut bytes);
        let patience = Duration::from_secs(60);
        let read = tokio::time::timeout(patience, read).await;
        read.expect("the client has something to say").unwrap();
        bytes
    }
}

/// What the export holds.
pub(crate) fn contents(offset: u64, length: u64) -> Vec<u8> {
    (offset..offset + length)
        .map(|at| (at / 512) as u8)
        .collect()
}

/// Whether anything is sent, once everyone has had their turn.
pub(crate) async fn is_silent(server: &mut Server) -> bool {
    for _ in 0..100 {
        tokio::task::yield_now().await;
    }
    let mut byte = [0];
    let read = server.stream.read(&mut byte);
    tokio::select! {
        biased;
        _ = read => false,
        () = std::future::ready(()) => true,
    }
}
