//! What is to be sent: short replies one behind the other, and long data where it was read.

use std::collections::VecDeque;
use std::future::poll_fn;
use std::io::{self, IoSlice};
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use bytes::{Buf, Bytes, BytesMut};
use tokio::io::AsyncWrite;

/// The answer to one request: heads, and between them data.
#[derive(Default)]
pub(super) struct Reply {
    first: BytesMut,
    /// Data, and what comes behind it.
    rest: Vec<(Piece, BytesMut)>,
}

/// Bytes, and the memory that is free when the last of them has been sent.
struct Piece {
    bytes: Bytes,
    memory: usize,
}

/// Replies that have not been sent yet.
#[derive(Default)]
pub(super) struct Output {
    ready: VecDeque<Piece>,
    ready_bytes: usize,
    ready_memory: usize,
    /// What comes behind those: replies are appended here, and need no memory of their own.
    tail: BytesMut,
    /// The stream has taken in what it has not passed on yet, as one with TLS may.
    is_held_back: bool,
}

impl Reply {
    /// One that begins with what is in `first`.
    pub(super) fn new(first: BytesMut) -> Self {
        let rest = Vec::new();
        Self { first, rest }
    }

    /// Where heads, and what is short, are appended.
    pub(super) fn end(&mut self) -> &mut BytesMut {
        self.rest
            .last_mut()
            .map_or(&mut self.first, |last| &mut last.1)
    }

    /// Appends data without copying it. So much `memory` is free when it has been sent: none, if what
    /// follows is in the same buffer.
    pub(super) fn append(&mut self, data: Bytes, memory: usize) {
        let piece = Piece {
            bytes: data,
            memory,
        };
        self.rest.push((piece, BytesMut::new()));
    }

    /// How long it is before any data.
    pub(super) fn first_bytes(&self) -> usize {
        self.first.len()
    }

    /// Forgets all but the first bytes.
    pub(super) fn truncate(&mut self, first_bytes: usize) {
        self.rest.clear();
        self.first.truncate(first_bytes);
    }

    /// All of it in one piece.
    #[cfg(any(test, feature = "benches"))]
    pub(super) fn into_one(mut self) -> BytesMut {
        for (data, head) in self.rest {
            self.first.extend_from_slice(&data.bytes);
            self.first.extend_from_slice(&head);
        }
        self.first
    }
}

impl Output {
    /// In bytes.
    pub(super) fn len(&self) -> usize {
        self.ready_bytes + self.tail.len()
    }

    /// Whether there is nothing that the client has yet to take.
    pub(super) fn is_sent(&self) -> bool {
        self.len() == 0 && !self.is_held_back
    }

    /// What it holds in memory, in bytes: of a buffer all, until the last of it has been sent.
    pub(super) fn memory(&self) -> usize {
        self.ready_memory + self.tail.len()
    }

    /// Where replies that are ready at once are appended.
    pub(super) fn end(&mut self) -> &mut BytesMut {
        &mut self.tail
    }

    /// A reply whose short parts find their place behind the others, if it is pushed next.
    pub(super) fn begin(&mut self) -> Reply {
        self.tail.reserve(HEADS);
        Reply::new(self.tail.split_off(self.tail.len()))
    }

    /// Sends `reply` behind all others.
    pub(super) fn push(&mut self, reply: Reply) {
        self.append(reply.first);
        for (data, head) in reply.rest {
            let before = self.tail.split().freeze();
            let before = Piece {
                memory: before.len(),
                bytes: before,
            };
            for piece in [before, data] {
                if !piece.bytes.is_empty() {
                    self.ready_bytes += piece.bytes.len();
                    self.ready_memory += piece.memory;
                    self.ready.push_back(piece);
                }
            }
            self.append(head);
        }
    }

    fn append(&mut self, bytes: BytesMut) {
        if self.tail.is_empty() {
            self.tail = bytes;
        } else {
            self.tail.unsplit(bytes);
        }
    }

    /// Hands over what `stream` takes at once of it, and says how much that was: nothing, if `stream` has
    /// passed on what it held back, and there is no more. If the future is dropped before, nothing was.
    pub(super) async fn send<S: AsyncWrite + Unpin>(
        &mut self,
        stream: &mut S,
    ) -> io::Result<usize> {
        poll_fn(|context| {
            let mut sent = 0;
            if self.len() > 0 {
                sent = ready!(self.poll_write(Pin::new(&mut *stream), context))?;
                self.advance(sent);
            }
            let flushed = Pin::new(&mut *stream).poll_flush(context)?;
            self.is_held_back = flushed.is_pending();
            if self.is_held_back && sent == 0 {
                return Poll::Pending;
            }
            Poll::Ready(Ok(sent))
        })
        .await
    }

    fn poll_write<S: AsyncWrite>(
        &self,
        stream: Pin<&mut S>,
        context: &mut Context<'_>,
    ) -> Poll<io::Result<usize>> {
        let mut pieces = [IoSlice::new(&[]); PIECES_MAX];
        let all = self
            .ready
            .iter()
            .map(|piece| &piece.bytes[..])
            .chain([&self.tail[..]]);
        let mut count = 0;
        for (place, piece) in pieces.iter_mut().zip(all) {
            *place = IoSlice::new(piece);
            count += 1;
        }
        stream.poll_write_vectored(context, &pieces[..count])
    }

    fn advance(&mut self, mut sent: usize) {
        while let Some(first) = self.ready.front_mut() {
            let part = sent.min(first.bytes.len());
            first.bytes.advance(part);
            self.ready_bytes -= part;
            sent -= part;
            if !first.bytes.is_empty() {
                return;
            }
            self.ready_memory -= first.memory;
            self.ready.pop_front();
        }
        self.tail.advance(sent);
    }
}

/// Room for replies without data, so that most find their place behind the others.
const HEADS: usize = 8 << 10;

/// How many pieces the kernel is handed at once. Long data is few, and each is a piece.
const PIECES_MAX: usize = 16;

#[cfg(test)]
mod tests {
    use super::*;

    /// Takes so many bytes at a time.
    struct Slow(Vec<u8>, usize);

    impl AsyncWrite for Slow {
        fn poll_write(
            self: Pin<&mut Self>,
            context: &mut Context<'_>,
            bytes: &[u8],
        ) -> Poll<io::Result<usize>> {
            self.poll_write_vectored(context, &[IoSlice::new(bytes)])
        }

        fn poll_write_vectored(
            mut self: Pin<&mut Self>,
            _: &mut Context<'_>,
            pieces: &[IoSlice<'_>],
        ) -> Poll<io::Result<usize>> {
            let all: Vec<u8> = pieces
                .iter()
                .flat_map(|piece| piece.iter().copied())
                .collect();
            let taken = all.len().min(self.1);
            self.0.extend_from_slice(&all[..taken]);
            Poll::Ready(Ok(taken))
        }

        fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
            Poll::Ready(Ok(()))
        }

        fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
            Poll::Ready(Ok(()))
        }
    }

    /// A reply with the number `number`, so much data, and something behind it.
    fn fill(reply: &mut Reply, number: u8, data: usize) -> Vec<u8> {
        reply.end().extend_from_slice(&[number; 3]);
        if data > 0 {
            reply.append(vec![number; data].into(), data);
            reply.end().extend_from_slice(&[number; 2]);
        }
        vec![number; if data > 0 { data + 5 } else { 3 }]
    }

    #[tokio::test]
    async fn all_replies_are_sent_in_order_however_little_is_taken_at_a_time() {
        for taken in [1, 2, 3, 7, 64, 4096] {
            let mut output = Output::default();
            let mut expected = Vec::new();
            // Those made in place and those made elsewhere, in any order.
            for number in 0..50 {
                let data = usize::from(number % 4) * 10;
                let mut reply = match number % 3 {
                    0 => Reply::default(),
                    _ => output.begin(),
                };
                expected.extend(fill(&mut reply, number, data));
                output.push(reply);
                output.end().extend_from_slice(&[255]);
                expected.push(255);
            }
            assert_eq!(output.len(), expected.len());
            let mut stream = Slow(Vec::new(), taken);
            while !output.is_sent() {
                let before = output.len();
                let sent = output.send(&mut stream).await.unwrap();
                assert_eq!(output.len(), before - sent);
            }
            assert_eq!(stream.0, expected, "{taken} at a time");
            assert_eq!(output.memory(), 0);
        }
    }

    #[tokio::test]
    async fn a_buffer_counts_whole_until_the_last_of_it_is_sent() {
        let mut output = Output::default();
        let data = Bytes::from(vec![7; 1000]);
        let mut reply = output.begin();
        reply.end().extend_from_slice(b"head");
        reply.append(data.slice(..10), 0);
        reply.end().extend_from_slice(b"hole");
        reply.append(data.slice(900..910), data.len());
        output.push(reply);
        let mut stream = Slow(Vec::new(), 1);
        while !output.is_sent() {
            assert!(output.memory() >= data.len(), "{} left", output.len());
            output.send(&mut stream).await.unwrap();
        }
        assert_eq!(output.memory(), 0);
    }

    #[test]
    fn a_reply_that_is_cut_has_nothing_of_its_data() {
        let mut reply = Reply::new(BytesMut::from(&b"before"[..]));
        let begun = reply.first_bytes();
        fill(&mut reply, 1, 10);
        reply.truncate(begun);
        reply.end().extend_from_slice(b", and after");
        assert_eq!(&reply.into_one()[..], b"before, and after");
    }
}
