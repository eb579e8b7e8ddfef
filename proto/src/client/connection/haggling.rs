//! From a stream to a client.

use bytes::BytesMut;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

use super::driver::Connection;
use super::error::Error;
use super::requests::Client;
use crate::client::{Answer, Handshake, Question};
use crate::export::{ExportInfo, Listed};
use crate::headers::Headers;

/// A connection on which no export has been entered yet.
///
/// What fails with [`Error::Declined`] leaves it usable. A future of its methods that is dropped does
/// not: the answer is still to come, and every further question is
/// [out of turn](crate::client::Unaskable::OutOfTurn).
#[derive(Debug)]
pub struct Haggling<S> {
    stream: S,
    handshake: Handshake,
    input: BytesMut,
    headers: Headers,
    agreed: bool,
}

/// The handshake while the caller sets up TLS.
#[derive(Debug)]
#[must_use = "the handshake goes on inside of TLS"]
pub struct AfterTls {
    handshake: Handshake,
    headers: Headers,
}

impl AfterTls {
    /// Goes on, on the stream inside of TLS.
    pub fn go_on<S: AsyncRead + AsyncWrite + Unpin>(self, stream: S) -> Haggling<S> {
        Haggling {
            stream,
            handshake: self.handshake,
            input: BytesMut::new(),
            headers: self.headers,
            agreed: false,
        }
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin> Haggling<S> {
    /// Waits for the server's greeting on a new stream.
    ///
    /// A TCP stream had better have `TCP_NODELAY` set.
    pub async fn begin(stream: S) -> Result<Self, Error> {
        let mut haggling = Self {
            stream,
            handshake: Handshake::new(),
            input: BytesMut::new(),
            headers: Headers::Extended,
            agreed: false,
        };
        let mut output = BytesMut::new();
        match haggling.answer(&mut output).await? {
            Answer::Greeting { .. } => Ok(haggling),
            _ => Err(Error::Ended),
        }
    }

    /// Asks for no newer form of requests and replies than this one. Without it the newest is asked for that is
    /// known here; servers that do not know it are asked for an older one in either case.
    #[must_use]
    pub fn at_most(mut self, headers: Headers) -> Self {
        self.headers = headers;
        self
    }

    /// Asks for TLS. If the server agrees, the stream is handed back, for the caller to do the TLS
    /// handshake on it and to [go on](AfterTls::go_on) inside.
    ///
    /// To be called first. Whoever wants TLS must not go on without it when this fails: somebody
    /// between here and the server can make it fail.
    pub async fn start_tls(mut self) -> Result<(S, AfterTls), Error> {
        match self.ask(Question::StartTls).await {
            Ok(_) => Ok((
                self.stream,
                AfterTls {
                    handshake: self.handshake,
                    headers: self.headers,
                },
            )),
            Err(error) => Err(self.leave(error).await),
        }
    }

    /// The exports that the server lists; it may have others.
    pub async fn list(&mut self) -> Result<Vec<Listed>, Error> {
        match self.ask(Question::List).await? {
            Answer::Exports(exports) => Ok(exports),
            _ => Err(Error::Ended),
        }
    }

    /// The metadata contexts of an export that the server lists for `queries`: full names, or
    /// beginnings up to a colon. No query asks for all.
    pub async fn contexts(&mut self, export: &str, queries: &[&str]) -> Result<Vec<String>, Error> {
        self.agree().await?;
        let question = Question::ListContexts {
            export: export.to_owned(),
            queries: owned(queries),
        };
        match self.ask(question).await? {
            Answer::Contexts(names) => Ok(names),
            _ => Err(Error::Ended),
        }
    }

    /// What an export is like.
    pub async fn info(&mut self, export: &str) -> Result<ExportInfo, Error> {
        self.agree().await?;
        let export = export.to_owned();
        match self.ask(Question::Info { export }).await? {
            Answer::Info(info) => Ok(info),
            _ => Err(Error::Ended),
        }
    }

    /// Enters an export, with those of the `contexts` that it has: [`Client::context`] says which.
    ///
    /// The [`Connection`] is a future, to be spawned or awaited beside the requests: without it
    /// none of them gets anywhere. If the server declines, it is told goodbye.
    pub async fn enter(
        mut self,
        export: &str,
        contexts: &[&str],
    ) -> Result<(Client, Connection<S>), Error> {
        let question = Question::Enter {
            export: export.to_owned(),
            contexts: owned(contexts),
        };
        let answer = match self.agree().await {
            Ok(()) => self.ask(question).await,
            Err(error) => Err(error),
        };
        match answer {
            Ok(Answer::Entered(session)) => Ok(Connection::new(self.stream, *session, self.input)),
            Ok(_) => Err(Error::Ended),
            Err(error) => Err(self.leave(error).await),
        }
    }

    /// Says goodbye.
    pub async fn abort(mut self) -> Result<(), Error> {
        match self.ask(Question::Abort).await {
            // Some servers close at once, or know no goodbye.
            Ok(_) | Err(Error::Closed | Error::Declined(_)) => {}
            Err(error) => return Err(error),
        }
        Ok(self.stream.shutdown().await?)
    }

    /// Says goodbye after the server has said no, without waiting for an answer.
    async fn leave(mut self, error: Error) -> Error {
        let mut output = BytesMut::new();
        if self.handshake.ask(Question::Abort, &mut output).is_ok() {
            // The error that counts is the one before.
            let _ = self.send(&mut output).await;
            let _ = self.stream.shutdown().await;
        }
        error
    }

    /// Agrees on the form of replies, once.
    async fn agree(&mut self) -> Result<(), Error> {
        if self.agreed {
            return Ok(());
        }
        match self.ask(Question::Agree(self.headers)).await {
            Ok(_) => {}
            // One that knows no options has simple replies.
            Err(Error::Declined(declined)) if !declined.ends_all() => {}
            Err(error) => return Err(error),
        }
        self.agreed = true;
        Ok(())
    }

    async fn ask(&mut self, question: Question) -> Result<Answer, Error> {
        let mut output = BytesMut::new();
        self.handshake.ask(question, &mut output)?;
        match self.answer(&mut output).await? {
            Answer::Declined(declined) => Err(declined.into()),
            answer => Ok(answer),
        }
    }

    async fn answer(&mut self, output: &mut BytesMut) -> Result<Answer, Error> {
        loop {
            let answer = self.handshake.advance(&mut self.input, output)?;
            self.send(output).await?;
            if let Some(answer) = answer {
                return Ok(answer);
            }
            self.input.reserve(READ_SIZE);
            if self.stream.read_buf(&mut self.input).await? == 0 {
                return Err(match self.handshake.closed() {
                    Some(declined) => declined.into(),
                    None => Error::Closed,
                });
            }
        }
    }

    async fn send(&mut self, output: &mut BytesMut) -> Result<(), Error> {
        if !output.is_empty() {
            self.stream.write_all_buf(output).await?;
            self.stream.flush().await?;
        }
        Ok(())
    }
}

fn owned(texts: &[&str]) -> Vec<String> {
    texts.iter().map(|text| (*text).to_owned()).collect()
}

/// More than most answers take.
const READ_SIZE: usize = 4 << 10;
