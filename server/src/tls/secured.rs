//! A connection inside TLS, as good as a plain one.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, Waker, ready};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio_rustls::server::TlsStream;

use super::subject::subject;

/// A connection inside TLS.
///
/// What is written to it is on its way without a flush, as with a socket, as long as it is read from
/// or written to. However it ends, the other side is told that this is the end and not a cut.
pub(crate) struct Secured<S: AsyncRead + AsyncWrite + Unpin>(TlsStream<S>);

impl<S: AsyncRead + AsyncWrite + Unpin> Secured<S> {
    pub(super) fn new(stream: TlsStream<S>) -> Self {
        Self(stream)
    }

    /// Whom the certificate of the client names, if it showed one.
    pub(crate) fn subject(&self) -> Option<String> {
        let (_, session) = self.0.get_ref();
        session.peer_certificates()?.first().map(subject)
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin> AsyncRead for Secured<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        // The end of an answer may still wait for room in the socket, and the client for that end:
        // it would ask nothing more, and nobody would write.
        if let Poll::Ready(Err(error)) = Pin::new(&mut self.0).poll_flush(cx) {
            return Poll::Ready(Err(error));
        }
        Pin::new(&mut self.0)
            .poll_read(cx, buffer)
            .map_err(|error| match error.kind() {
                // The library's words are for programmers.
                io::ErrorKind::UnexpectedEof => {
                    io::Error::new(error.kind(), "the client was cut off")
                }
                _ => error,
            })
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin> AsyncWrite for Secured<S> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        data: &[u8],
    ) -> Poll<io::Result<usize>> {
        // What was taken in before goes first, so that no more than one piece waits in here.
        ready!(Pin::new(&mut self.0).poll_flush(cx))?;
        Pin::new(&mut self.0).poll_write(cx, data)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_shutdown(cx)
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin> Drop for Secured<S> {
    fn drop(&mut self) {
        // Where the socket has no room for a goodbye nobody waits for it.
        let mut now = Context::from_waker(Waker::noop());
        let _ = Pin::new(&mut self.0).poll_shutdown(&mut now);
    }
}
