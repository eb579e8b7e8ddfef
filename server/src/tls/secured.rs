//! A connection inside TLS, as good as a plain one.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
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

impl<S: AsyncRead + AsyncWrite + AsFd + Unpin> AsFd for Secured<S> {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.get_ref().0.as_fd()
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin> Drop for Secured<S> {
    fn drop(&mut self) {
        // Where the socket has no room for a goodbye nobody waits for it.
        let mut now = Context::from_waker(Waker::noop());
        let _ = Pin::new(&mut self.0).poll_shutdown(&mut now);
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::time::Duration;

    use rustls::pki_types::{PrivateKeyDer, ServerName};
    use rustls::{ClientConfig, RootCertStore, ServerConfig};
    use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream, duplex};
    use tokio_rustls::{TlsAcceptor, TlsConnector, client};

    use super::*;

    /// Both ends of a connection whose pipe holds so much.
    async fn pair(room: usize) -> (Secured<DuplexStream>, client::TlsStream<DuplexStream>) {
        let own = rcgen::generate_simple_self_signed(["localhost".to_owned()]).unwrap();
        let key = PrivateKeyDer::try_from(own.signing_key.serialize_der()).unwrap();
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let server = ServerConfig::builder_with_provider(Arc::clone(&provider))
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_no_client_auth()
            .with_single_cert(vec![own.cert.der().clone()], key)
            .unwrap();
        let mut roots = RootCertStore::empty();
        roots.add(own.cert.der().clone()).unwrap();
        let client = ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_root_certificates(roots)
            .with_no_client_auth();
        let (here, there) = duplex(room);
        let name = ServerName::try_from("localhost").unwrap();
        let (server, client) = tokio::join!(
            TlsAcceptor::from(Arc::new(server)).accept(here),
            TlsConnector::from(Arc::new(client)).connect(name, there),
        );
        (Secured::new(server.unwrap()), client.unwrap())
    }

    #[tokio::test(start_paused = true)]
    async fn the_end_of_an_answer_goes_out_while_the_next_request_is_awaited() {
        let (mut server, mut client) = pair(1024).await;
        let answer = [7; 5000];
        let taken = server.write(&answer).await.unwrap();
        assert_eq!(taken, answer.len(), "more than the pipe holds");
        let mut found = [0; 5000];
        tokio::select! {
            _ = server.read_u8() => panic!("nothing is asked"),
            read = client.read_exact(&mut found) => assert_eq!(read.unwrap(), answer.len()),
            () = tokio::time::sleep(Duration::from_secs(60)) => panic!("the end does not come"),
        }
        assert_eq!(found, answer);
    }

    #[tokio::test(start_paused = true)]
    async fn the_other_side_is_told_of_every_end() {
        let (server, mut client) = pair(64 << 10).await;
        drop(server);
        // A cut would be an error.
        assert_eq!(client.read(&mut [0; 1]).await.unwrap(), 0);
    }
}
