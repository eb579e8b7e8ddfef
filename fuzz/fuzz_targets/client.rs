//! Any bytes from a server, and any requests to it: nothing is returned that was not sent, nothing
//! is missing, no more is kept than was asked for, and where the stream is cut makes no difference.
#![no_main]

use bytes::BytesMut;
use libfuzzer_sys::fuzz_target;
use proto::client::{Answer, Completion, Handshake, Outcome, Piece, Question, Session};
use proto::{Command, ContextId, Headers};

/// More than a request may be about, so that the limits are within reach of few bytes.
const READ_MAX: u64 = 4096;

fuzz_target!(|data: &[u8]| {
    // What is asked: a byte that says how many requests, three for each; then the server's part.
    let Some((&count, rest)) = data.split_first() else {
        return;
    };
    let asked = usize::from(count % 8) * 3;
    if rest.len() < asked {
        return;
    }
    let (asked, server) = rest.split_at(asked);
    let headers = match count >> 6 {
        0 => Headers::Simple,
        1 | 2 => Headers::Structured,
        _ => Headers::Extended,
    };
    let at_once = talk(headers, asked, server, server.len().max(1));
    let bytewise = talk(headers, asked, server, 1);
    assert_eq!(at_once, bytewise);
});

/// All that is learnt, and how it ends.
fn talk(headers: Headers, asked: &[u8], server: &[u8], step: usize) -> (Vec<String>, String) {
    let mut handshake = Handshake::new();
    let (mut input, mut output, mut learnt) = (BytesMut::new(), BytesMut::new(), Vec::new());
    let mut questions = [
        Question::List,
        Question::Agree(headers),
        Question::ListContexts {
            export: "vda".to_owned(),
            queries: Vec::new(),
        },
        Question::Info {
            export: "vda".to_owned(),
        },
        Question::Enter {
            export: "vda".to_owned(),
            contexts: vec!["base:allocation".to_owned(), "qemu:".to_owned()],
        },
    ]
    .into_iter();
    let mut transmission: Option<Transmission> = None;
    for piece in server.chunks(step) {
        input.extend_from_slice(piece);
        loop {
            if let Some(transmission) = &mut transmission {
                match transmission.receive(&mut input, server) {
                    Ok(Some(completion)) => learnt.push(completion),
                    Ok(None) => break,
                    Err(violation) => return (learnt, violation),
                }
                continue;
            }
            match handshake.advance(&mut input, &mut output) {
                Ok(None) => break,
                Err(violation) => return (learnt, violation.to_string()),
                Ok(Some(Answer::Entered(session))) => {
                    assert!(i64::try_from(session.info().size).is_ok());
                    transmission = Some(Transmission::begin(*session, asked));
                }
                Ok(Some(answer)) => {
                    learnt.push(format!("{answer:?}"));
                    let Some(question) = questions.next() else {
                        return (learnt, "no more questions".to_owned());
                    };
                    // A server may let nobody ask: then there is nothing to learn.
                    if handshake.ask(question, &mut output).is_err() {
                        return (learnt, "out of turn".to_owned());
                    }
                }
            }
        }
    }
    (learnt, String::new())
}

struct Transmission {
    session: Session,
    /// What has been asked, by its cookie.
    asked: Vec<(u64, Command)>,
    most: usize,
}

impl Transmission {
    /// Asks all there is to ask.
    fn begin(mut session: Session, requests: &[u8]) -> Self {
        let contexts: Vec<ContextId> = session.contexts().iter().map(|(id, _)| *id).collect();
        let size = session.info().size;
        let minimum = u64::from(session.info().block_size.minimum());
        let mut asked = Vec::new();
        for request in requests.chunks_exact(3) {
            let start = u64::from(request[1]) * minimum;
            let length = (u64::from(request[2]) * 16).min(READ_MAX) / minimum * minimum;
            let range = start.min(size)..(start + length).min(size);
            let command = match request[0] % 5 {
                0 => Command::Flush,
                1 => Command::BlockStatus {
                    range,
                    contexts: contexts.clone(),
                    one: request[0] >= 128,
                },
                kind => Command::Read {
                    range,
                    do_not_fragment: kind == 4,
                },
            };
            let mut output = BytesMut::new();
            if let Ok(submitted) = session.submit(command.clone(), &mut output) {
                asked.push((submitted.cookie.0, command));
            }
        }
        Self {
            session,
            asked,
            // A chunk of the longest kind, with its header: data, extents of both contexts, a text.
            most: 32 + 16 + 2 * 16 * READ_MAX as usize,
        }
    }

    fn receive(&mut self, input: &mut BytesMut, server: &[u8]) -> Result<Option<String>, String> {
        let received = self.session.receive(input);
        let Some(completion) = received.map_err(|violation| violation.to_string())? else {
            assert!(
                self.session.wanted(input) <= self.most,
                "waits for too much"
            );
            return Ok(None);
        };
        let cookie = completion.cookie.0;
        let place = self.asked.iter().position(|(asked, _)| *asked == cookie);
        let (_, command) = self
            .asked
            .remove(place.expect("it was asked, and not answered yet"));
        check(&completion, &command, server);
        Ok(Some(format!("{completion:?}")))
    }
}

fn check(completion: &Completion, command: &Command, server: &[u8]) {
    match (&completion.result, command) {
        (Err(_), _) | (Ok(Outcome::Done), Command::Flush) => {}
        (Ok(Outcome::Data(pieces)), Command::Read { range, .. }) => {
            let mut at = range.start;
            for piece in pieces {
                assert_eq!(piece.range().start, at, "a gap or an overlap");
                at = piece.range().end;
                if let Piece::Data { data, .. } = piece {
                    let mut windows = server.windows(data.len());
                    assert!(windows.any(|sent| sent == data), "nobody sent this");
                }
            }
            assert_eq!(at, range.end, "bytes are missing");
        }
        (Ok(Outcome::BlockStatus(status)), Command::BlockStatus { range, .. }) => {
            assert_eq!(status.range.start, range.start);
            assert!(status.range.end > range.start && status.range.end <= range.end);
            for (_, extents) in &status.contexts {
                let told: u64 = extents.iter().map(|extent| extent.length).sum();
                assert_eq!(told, status.range.end - range.start);
                assert!(extents.iter().all(|extent| extent.length > 0));
            }
        }
        (outcome, command) => panic!("{outcome:?} to {command:?}"),
    }
}
