//! Bytes that wait to be sent.

use std::collections::VecDeque;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use bytes::{Buf, Bytes, BytesMut};
use tokio::io::AsyncWrite;

/// Headers and payloads in the order in which they go out. What is in here is bounded by what may
/// be under way.
#[derive(Debug, Default)]
pub(super) struct Sending {
    ready: VecDeque<Bytes>,
    /// Behind all of `ready`.
    last: BytesMut,
    unflushed: bool,
}

impl Sending {
    /// Where to append headers.
    pub(super) fn tail(&mut self) -> &mut BytesMut {
        &mut self.last
    }

    /// Appends a payload.
    pub(super) fn push(&mut self, payload: Bytes) {
        if payload.len() < COPIED_BELOW {
            self.last.extend_from_slice(&payload);
        } else {
            self.seal();
            self.ready.push_back(payload);
        }
    }

    /// Ready when everything has been sent, and flushed.
    pub(super) fn poll_sent<S: AsyncWrite + Unpin>(
        &mut self,
        stream: &mut S,
        cx: &mut Context<'_>,
    ) -> Poll<std::io::Result<()>> {
        self.seal();
        while let Some(first) = self.ready.front_mut() {
            let sent = ready!(Pin::new(&mut *stream).poll_write(cx, first))?;
            if sent == 0 {
                return Poll::Ready(Err(std::io::ErrorKind::WriteZero.into()));
            }
            self.unflushed = true;
            first.advance(sent);
            if first.is_empty() {
                self.ready.pop_front();
            }
        }
        if self.unflushed {
            ready!(Pin::new(stream).poll_flush(cx))?;
            self.unflushed = false;
        }
        Poll::Ready(Ok(()))
    }

    fn seal(&mut self) {
        if !self.last.is_empty() {
            self.ready.push_back(self.last.split().freeze());
        }
    }
}

/// One system call more costs as much as copying so much.
const COPIED_BELOW: usize = 16 << 10;
