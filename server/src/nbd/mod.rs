//! Clients that read and write disks.
//!
//! A connection belongs to one worker thread for life. It takes requests as they come, has many
//! under way at once, and answers in the order in which they end. What was begun is ended, also
//! when the client goes away meanwhile: a write that landed after the next instant would be a lie.

mod workers;

mod entrance;
mod handshakes;
mod peer;
mod places;

mod catalog;
mod transmission;

mod block_status;
mod budget;
mod perform;
mod progress;

use std::io;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use bytes::BytesMut;
use proto::{GREETING, Negotiation, Step, Violation};
use thiserror::Error;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::sync::watch;
use tokio::time::timeout;

pub(crate) use entrance::Entrance;
pub(crate) use peer::Peer;
pub(crate) use workers::{Client, Stream, Workers};

use crate::service::Service;
use catalog::Exports;
use entrance::Visitor;
use progress::Lapse;

/// Why a connection ended early.
#[derive(Debug, Error)]
enum Ended {
    #[error(transparent)]
    Io(#[from] io::Error),
    #[error("the client left the protocol: {0}")]
    Violation(#[from] Violation),
    #[error("{0}")]
    Declined(String),
    #[error("no export was chosen within {0:?}")]
    TooSlow(Duration),
    #[error("no export was chosen, and others wait")]
    Displaced,
    #[error(transparent)]
    Lapse(#[from] Lapse),
}

/// Speaks with one client until it leaves or the server stops.
async fn converse<S: AsyncRead + AsyncWrite + Unpin>(
    mut stream: S,
    service: Arc<Service>,
    visitor: Visitor,
    mut stop: watch::Receiver<bool>,
) -> Result<(), Ended> {
    let mut input = BytesMut::with_capacity(HANDSHAKE_PIECE);
    let visitor = Rc::new(visitor);
    let exports = Exports::new(service, Rc::clone(&visitor));
    let patience = visitor.entrance.limits.handshake;
    let negotiated = tokio::select! {
        biased;
        _ = stop.wait_for(|stop| *stop) => return Ok(()),
        () = visitor.displaced() => return Err(Ended::Displaced),
        negotiated = timeout(patience, negotiate(&mut stream, &mut input, exports)) => {
            negotiated.map_err(|_| Ended::TooSlow(patience))??
        }
    };
    let Some(session) = negotiated else {
        return Ok(());
    };
    visitor.is_served();
    let (peer, role) = (visitor.peer, visitor.entrance.role);
    tracing::info!(%peer, ?role, export = session.info.name, "connected");
    transmission::run(stream, session, input, (&visitor.entrance, stop)).await
}

/// Lets the client choose an export; `None` if it says goodbye instead.
async fn negotiate<S: AsyncRead + AsyncWrite + Unpin>(
    stream: &mut S,
    input: &mut BytesMut,
    exports: Exports,
) -> Result<Option<proto::Session<Exports>>, Ended> {
    let mut negotiation = Negotiation::new(exports);
    let mut output = BytesMut::from(&GREETING[..]);
    loop {
        stream.write_all_buf(&mut output).await?;
        let step = match negotiation.advance(input, &mut output) {
            Ok(step) => step,
            Err(violation) => {
                // What was said before it still holds.
                stream.write_all_buf(&mut output).await?;
                return Err(violation.into());
            }
        };
        match step {
            Step::WriteFirst => continue,
            Step::NeedMore => stream.write_all_buf(&mut output).await?,
            Step::Ready(session) => {
                stream.write_all_buf(&mut output).await?;
                return Ok(Some(session));
            }
            Step::Abort => {
                stream.write_all_buf(&mut output).await?;
                return Ok(None);
            }
            Step::Hangup(reason) => return Err(Ended::Declined(reason.into_owned())),
        }
        if stream.read_buf(input).await? == 0 {
            return Ok(None);
        }
    }
}

/// What is read at once before an export is chosen: most of what tools ask.
const HANDSHAKE_PIECE: usize = 4 << 10;

/// What is read from a socket at once: some tens of requests, or a good part of a large one.
const INPUT_PIECE: usize = 256 << 10;
