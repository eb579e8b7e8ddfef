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
mod line;
mod transmission;
mod under_way;

mod block_status;
mod budget;
mod output;
mod perform;
mod progress;
mod vigil;

#[cfg(feature = "benches")]
pub(crate) mod benches;

use std::io;
use std::os::fd::AsFd;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use bytes::BytesMut;
use proto::{GREETING, Negotiation, Step, Violation};
use thiserror::Error;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::sync::watch;
use tokio::time::{Instant, sleep, timeout_at};

pub(crate) use entrance::Entrance;
pub(crate) use peer::Peer;
pub(crate) use perform::zero_runs;
pub(crate) use workers::{BACKUP_NICE, Client, Stream, Workers, step_back};

use crate::service::Service;
use crate::tls::Tls;
use catalog::Exports;
use entrance::Visitor;
use progress::Lapse;
use transmission::GOODBYE_MAX;

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
    #[error("no export was chosen within {0:?}")]
    TooSlow(Duration),
    #[error("no export was chosen, and others wait")]
    Displaced,
    #[error(transparent)]
    Lapse(#[from] Lapse),
}

/// Speaks with one client until it leaves or the server stops.
async fn converse<S: AsyncRead + AsyncWrite + AsFd + Unpin>(
    mut stream: S,
    service: Arc<Service>,
    (visitor, tls): (Visitor, Tls),
    stop: watch::Receiver<bool>,
) -> Result<(), Ended> {
    let visitor = Rc::new(visitor);
    let mut handshake = Handshake {
        deadline: Instant::now() + visitor.entrance.limits.handshake,
        visitor: Rc::clone(&visitor),
        stop: stop.clone(),
    };
    let mut input = BytesMut::with_capacity(HANDSHAKE_PIECE);
    let exports = Exports::new(service, Rc::clone(&visitor));
    let mut negotiation = Negotiation::with_tls(exports, tls.mode());
    let greeting = BytesMut::from(&GREETING[..]);
    let telling = (greeting, stop.clone());
    let negotiated = negotiate(&mut stream, &mut negotiation, &mut input, telling);
    match handshake.in_time(negotiated).await? {
        Some(Chosen::Export(session)) => serve(stream, session, input, &visitor).await,
        Some(Chosen::Tls) => {
            let secured = async {
                let mut stream = tls.accept(stream).await.map_err(Ended::Tls)?;
                tell_who(visitor.peer, stream.subject());
                let telling = (BytesMut::new(), stop.clone());
                let chosen = negotiate(&mut stream, &mut negotiation, &mut input, telling).await;
                Ok((stream, chosen?))
            };
            match handshake.in_time(secured).await? {
                Some((stream, Chosen::Export(session))) => {
                    serve(stream, session, input, &visitor).await
                }
                _ => Ok(()),
            }
        }
        Some(Chosen::Goodbye) | None => Ok(()),
    }
}

/// Performs what a client asks of the export that it has chosen.
async fn serve<S: AsyncRead + AsyncWrite + AsFd + Unpin>(
    stream: S,
    session: proto::Session<Exports>,
    input: BytesMut,
    visitor: &Visitor,
) -> Result<(), Ended> {
    visitor.is_served();
    let (peer, role) = (visitor.peer, visitor.entrance.role);
    let Some(seat) = session.export.clients().enter(role, peer.to_string()) else {
        // The disk has gone since it was chosen, or the server stops.
        return Ok(());
    };
    tracing::info!(%peer, ?role, export = session.info.name, "connected");
    let peer = peer.to_string();
    transmission::run(stream, session, input, peer, (&visitor.entrance, seat)).await
}

/// How long a client may choose.
struct Handshake {
    deadline: Instant,
    visitor: Rc<Visitor>,
    stop: watch::Receiver<bool>,
}

impl Handshake {
    /// What comes of a part of it; `None` if the server stops meanwhile, and the client has had its
    /// time to hear of it.
    async fn in_time<T>(
        &mut self,
        part: impl Future<Output = Result<T, Ended>>,
    ) -> Result<Option<T>, Ended> {
        let patience = self.visitor.entrance.limits.handshake;
        tokio::select! {
            biased;
            () = goodbye(&mut self.stop) => Ok(None),
            () = self.visitor.displaced() => Err(Ended::Displaced),
            done = timeout_at(self.deadline, part) => {
                done.map_err(|_| Ended::TooSlow(patience))?.map(Some)
            }
        }
    }
}

/// Waits until the server has been about to stop for as long as it waits for anybody.
async fn goodbye(stop: &mut watch::Receiver<bool>) {
    let _ = stop.wait_for(|stop| *stop).await;
    sleep(GOODBYE_MAX).await;
}

/// What a client wants once it has asked enough.
enum Chosen {
    Export(proto::Session<Exports>),
    Tls,
    Goodbye,
}

/// Answers a client's options, after what is to be said first; others have their turn in between.
/// When the server stops the answer to each is that it does, until the client leaves.
async fn negotiate<S: AsyncRead + AsyncWrite + Unpin>(
    stream: &mut S,
    negotiation: &mut Negotiation<Exports>,
    input: &mut BytesMut,
    (mut output, mut shutdown): (BytesMut, watch::Receiver<bool>),
) -> Result<Chosen, Ended> {
    let mut stopping = false;
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
            Step::WriteFirst => {
                tokio::task::yield_now().await;
                continue;
            }
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
            Step::Hangup(reason) => {
                stream.write_all_buf(&mut output).await?;
                return Err(Ended::Declined(reason.into_owned()));
            }
        }
        tokio::task::yield_now().await;
        tokio::select! {
            biased;
            _ = shutdown.wait_for(|stop| *stop), if !stopping => {
                stopping = true;
                negotiation.shut_down();
            }
            read = stream.read_buf(input) => {
                if read? == 0 {
                    return Ok(Chosen::Goodbye);
                }
            }
        }
    }
}

/// Logs whom a client's certificate names; its address or process is told when it is served.
fn tell_who(peer: Peer, subject: Option<String>) {
    if let Some(subject) = subject {
        tracing::info!(%peer, subject, "TLS with a client certificate");
    } else {
        tracing::debug!(%peer, "TLS");
    }
}

/// What is read at once before an export is chosen: most of what tools ask, and as many options as
/// are answered in some hundred microseconds.
const HANDSHAKE_PIECE: usize = 1 << 10;

/// What is read from a socket at once: some tens of requests, or a good part of a large one.
const INPUT_PIECE: usize = 256 << 10;
