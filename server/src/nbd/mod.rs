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
use tokio::time::{Instant, timeout_at};

pub(crate) use workers::{Client, Stream, Workers};

use crate::export::Role;
use crate::service::Service;
use crate::tls::Tls;
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
    #[error("the TLS handshake failed: {0}")]
    Tls(io::Error),
    #[error("no export was chosen within {HANDSHAKE_MAX:?}")]
    TooSlow,
}

/// Speaks with one client until it leaves or the server stops.
async fn converse<S: AsyncRead + AsyncWrite + Unpin>(
    mut stream: S,
    service: Arc<Service>,
    (role, tls): (Role, Tls),
    peer: &str,
    mut stop: watch::Receiver<bool>,
) -> Result<(), Ended> {
    let deadline = Instant::now() + HANDSHAKE_MAX;
    let mut input = BytesMut::with_capacity(INPUT_PIECE);
    let mut negotiation = Negotiation::with_tls(Exports::new(service, role), tls.mode());
    let greeting = BytesMut::from(&GREETING[..]);
    let negotiated = negotiate(&mut stream, &mut negotiation, &mut input, greeting);
    match in_time(deadline, &mut stop, negotiated).await? {
        Some(Chosen::Export(session)) => transmission::run(stream, session, input, stop).await,
        Some(Chosen::Tls) => {
            let secured = async {
                let mut stream = tls.accept(stream).await.map_err(Ended::Tls)?;
                tell_who(peer, stream.subject());
                let nothing = BytesMut::new();
                let chosen = negotiate(&mut stream, &mut negotiation, &mut input, nothing).await;
                Ok((stream, chosen?))
            };
            match in_time(deadline, &mut stop, secured).await? {
                Some((stream, Chosen::Export(session))) => {
                    transmission::run(stream, session, input, stop).await
                }
                _ => Ok(()),
            }
        }
        Some(Chosen::Goodbye) | None => Ok(()),
    }
}

/// What comes of a part of the handshake; `None` if the server stops meanwhile.
async fn in_time<T>(
    deadline: Instant,
    stop: &mut watch::Receiver<bool>,
    handshake: impl Future<Output = Result<T, Ended>>,
) -> Result<Option<T>, Ended> {
    tokio::select! {
        biased;
        _ = stop.wait_for(|stop| *stop) => Ok(None),
        done = timeout_at(deadline, handshake) => done.map_err(|_| Ended::TooSlow)?.map(Some),
    }
}

/// What a client wants once it has asked enough.
enum Chosen {
    Export(proto::Session<Exports>),
    Tls,
    Goodbye,
}

/// Answers a client's options, after what is to be said first.
async fn negotiate<S: AsyncRead + AsyncWrite + Unpin>(
    stream: &mut S,
    negotiation: &mut Negotiation<Exports>,
    input: &mut BytesMut,
    mut output: BytesMut,
) -> Result<Chosen, Ended> {
    loop {
        stream.write_all_buf(&mut output).await?;
        match negotiation.advance(input, &mut output)? {
            Step::WriteFirst => continue,
            Step::NeedMore => stream.write_all_buf(&mut output).await?,
            Step::StartTls => {
                stream.write_all_buf(&mut output).await?;
                return Ok(Chosen::Tls);
            }
            Step::Ready(session) => {
                stream.write_all_buf(&mut output).await?;
                return Ok(Chosen::Export(session));
            }
            Step::Abort => {
                stream.write_all_buf(&mut output).await?;
                return Ok(Chosen::Goodbye);
            }
            Step::Hangup(reason) => return Err(Ended::Declined(reason.into_owned())),
        }
        if stream.read_buf(input).await? == 0 {
            return Ok(Chosen::Goodbye);
        }
    }
}

/// Logs whom a client's certificate names; its address or process was told before.
fn tell_who(peer: &str, subject: Option<String>) {
    if let Some(subject) = subject {
        tracing::info!(peer, subject, "TLS with a client certificate");
    } else {
        tracing::debug!(peer, "TLS");
    }
}

/// Long enough for a person who types the handshake, short enough that nobody holds a place.
const HANDSHAKE_MAX: Duration = Duration::from_secs(30);

/// What is read from a socket at once: some tens of requests, or a good part of a large one.
const INPUT_PIECE: usize = 256 << 10;
