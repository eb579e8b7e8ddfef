//! Clients that read and write disks.
//!
//! A connection belongs to one worker thread for life. It takes requests as they come, has many
//! under way at once, and answers in the order in which they end. What was begun is ended, also
//! when the client goes away meanwhile: a write that landed after the next instant would be a lie.

mod block_status;
mod catalog;
mod perform;
mod transmission;
mod workers;

use std::io;
use std::sync::Arc;
use std::time::Duration;

use bytes::BytesMut;
use proto::{GREETING, Negotiation, Step, Violation};
use thiserror::Error;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::sync::watch;
use tokio::time::timeout;

pub(crate) use workers::{Client, Stream, Workers};

use crate::export::Role;
use crate::service::Service;
use catalog::Exports;

/// Why a connection ended early.
#[derive(Debug, Error)]
enum Ended {
    #[error(transparent)]
    Io(#[from] io::Error),
    #[error("the client left the protocol: {0}")]
    Violation(#[from] Violation),
    #[error("{0}")]
    Declined(String),
    #[error("no export was chosen within {HANDSHAKE_MAX:?}")]
    TooSlow,
}

/// Speaks with one client until it leaves or the server stops.
async fn converse<S: AsyncRead + AsyncWrite + Unpin>(
    mut stream: S,
    service: Arc<Service>,
    role: Role,
    mut stop: watch::Receiver<bool>,
) -> Result<(), Ended> {
    let mut input = BytesMut::with_capacity(INPUT_PIECE);
    let exports = Exports::new(service, role);
    let negotiated = tokio::select! {
        biased;
        _ = stop.wait_for(|stop| *stop) => return Ok(()),
        negotiated = timeout(HANDSHAKE_MAX, negotiate(&mut stream, &mut input, exports)) => {
            negotiated.map_err(|_| Ended::TooSlow)??
        }
    };
    match negotiated {
        Some(session) => transmission::run(stream, session, input, stop).await,
        None => Ok(()),
    }
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
        match negotiation.advance(input, &mut output)? {
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

/// Long enough for a person who types the handshake, short enough that nobody holds a place.
const HANDSHAKE_MAX: Duration = Duration::from_secs(30);

/// What is read from a socket at once: some tens of requests, or a good part of a large one.
const INPUT_PIECE: usize = 256 << 10;
