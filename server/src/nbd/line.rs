//! A connection as such, besides what goes through it.

use std::future::pending;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream as StdUnixStream;

use rustix::net::{AddressFamily, getsockname};
use tokio::io::Interest;
use tokio::net::UnixStream;

/// Tells when nobody is at the other end any more, while nothing is read that would.
///
/// That is when both ways are closed at once: who has closed only its own may wait for what it asked.
/// Over TCP a client that hangs up has closed no more than that, unless it left something unread.
#[derive(Default)]
pub(super) struct Line(Option<OwnedFd>);

impl Line {
    /// Where no descriptor is left for it, nothing is told.
    pub(super) fn of(stream: &impl AsFd) -> Self {
        Self(stream.as_fd().try_clone_to_owned().ok())
    }

    /// Whether the other end loses what it has not read yet if this is closed before all has been read that
    /// it has sent: so it is with TCP.
    pub(super) fn takes_back(&self) -> bool {
        let address = self.0.as_ref().map(getsockname);
        address.is_some_and(|found| {
            found.is_ok_and(|address| address.address_family() != AddressFamily::UNIX)
        })
    }

    /// Waits until nobody hears any more what is sent. Where that cannot be told, it never ends.
    pub(super) async fn hung_up(&self) {
        if let Some(socket) = &self.0
            && is_closed(socket).await.unwrap_or(false)
        {
            return;
        }
        pending::<()>().await;
    }
}

/// Waits until nothing more comes; whether nothing is heard any more either.
async fn is_closed(socket: &OwnedFd) -> io::Result<bool> {
    // It is only looked at, so that it does not matter of which kind it is.
    let socket = UnixStream::from_std(StdUnixStream::from(socket.try_clone()?))?;
    // Data that waits to be read does not end this: it is not what is asked for.
    socket.ready(Interest::PRIORITY).await?;
    let ready = socket.ready(Interest::WRITABLE).await?;
    Ok(ready.is_write_closed())
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;
    use std::net::Shutdown;
    use std::time::Duration;

    use tokio::time::timeout;

    use super::*;

    fn pair() -> (StdUnixStream, StdUnixStream) {
        let (client, server) = StdUnixStream::pair().unwrap();
        server.set_nonblocking(true).unwrap();
        (client, server)
    }

    async fn tells(line: &Line, patience: Duration) -> bool {
        timeout(patience, line.hung_up()).await.is_ok()
    }

    #[tokio::test]
    async fn an_end_is_told_whatever_has_not_been_read() {
        for unread in [0, 1000] {
            let (mut client, server) = pair();
            let line = Line::of(&server);
            client.write_all(&vec![7; unread]).unwrap();
            assert!(!tells(&line, SOON).await, "{unread}");
            drop(client);
            assert!(tells(&line, PATIENCE).await, "{unread}");
        }
    }

    #[tokio::test]
    async fn who_has_said_all_may_still_listen() {
        let (client, server) = pair();
        let line = Line::of(&server);
        client.shutdown(Shutdown::Write).unwrap();
        assert!(!tells(&line, SOON).await);
    }

    /// The executor has looked at its sockets by then.
    const SOON: Duration = Duration::from_millis(20);

    const PATIENCE: Duration = Duration::from_secs(20);
}
