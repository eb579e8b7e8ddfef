//! A handshake with a server by hand, and a session after one.

use bytes::{Bytes, BytesMut};

use crate::proto::client::{
    Answer, Completion, Handshake, Question, ServerViolation, Session, Submitted,
};
use crate::proto::{Command, ContextId, Headers};
use crate::wire::*;

/// The size of the exports here.
pub(crate) const SIZE: u64 = 1 << 40;

/// What comes of server's bytes, in a handshake that asks one question.
pub(crate) fn asked(question: Question, server: &[u8]) -> Result<Option<Answer>, ServerViolation> {
    let mut handshake = greeted(FIXED | NO_ZEROES);
    handshake.ask(question, &mut BytesMut::new()).unwrap();
    handshake.advance(&mut BytesMut::from(server), &mut BytesMut::new())
}

/// A handshake after the greeting.
pub(crate) fn greeted(flags: u16) -> Handshake {
    let mut handshake = Handshake::new();
    hear(&mut handshake, &greeting(flags)).unwrap();
    handshake
}

/// The same, with structured replies agreed on.
pub(crate) fn structured() -> Handshake {
    let mut handshake = greeted(FIXED | NO_ZEROES);
    let question = Question::Agree(Headers::Structured);
    handshake.ask(question, &mut BytesMut::new()).unwrap();
    hear(&mut handshake, &answer(STRUCTURED_REPLY, ACK, b"")).unwrap();
    handshake
}

/// The answers to a GO of an export with these flags.
pub(crate) fn entered(flags: u16) -> Vec<u8> {
    [info_export(GO, 4096, flags), answer(GO, ACK, b"")].concat()
}

/// Enters an export without contexts.
pub(crate) fn enter(export: &str) -> Question {
    Question::Enter {
        export: export.into(),
        contexts: vec![],
    }
}

/// Asks about an export.
pub(crate) fn info_of(export: &str) -> Question {
    Question::Info {
        export: export.into(),
    }
}

/// Hands in bytes, all of which have to be needed.
pub(crate) fn hear(handshake: &mut Handshake, server: &[u8]) -> Result<Answer, ServerViolation> {
    let mut input = BytesMut::from(server);
    let answer = handshake.advance(&mut input, &mut BytesMut::new())?;
    assert!(input.is_empty(), "{} bytes are left", input.len());
    Ok(answer.expect("these bytes are all of an answer"))
}

/// A session on an export that does everything, with these contexts, from id 1 on.
pub(crate) fn session(form: Headers, contexts: &[&str]) -> Session {
    session_with(form, contexts, EVERYTHING, [1, 4096, 32 << 20])
}

pub(crate) fn session_with(
    form: Headers,
    contexts: &[&str],
    flags: u16,
    block_sizes: [u32; 3],
) -> Session {
    let mut handshake = greeted(FIXED | NO_ZEROES);
    let mut output = BytesMut::new();
    handshake.ask(Question::Agree(form), &mut output).unwrap();
    let agreed = match form {
        Headers::Simple => vec![],
        Headers::Structured => answer(STRUCTURED_REPLY, ACK, b""),
        Headers::Extended => answer(EXTENDED_HEADERS, ACK, b""),
    };
    hear(&mut handshake, &agreed).unwrap();
    let mut server = Vec::new();
    if !contexts.is_empty() {
        for (name, id) in contexts.iter().zip(1..) {
            server.extend(context(SET_META_CONTEXT, id, name));
        }
        server.extend(answer(SET_META_CONTEXT, ACK, b""));
    }
    server.extend(info_export(GO, SIZE, flags));
    server.extend(info_block_size(GO, block_sizes));
    server.extend(answer(GO, ACK, b""));
    let question = Question::Enter {
        export: "vda".to_owned(),
        contexts: contexts.iter().map(|name| (*name).to_owned()).collect(),
    };
    handshake.ask(question, &mut output).unwrap();
    match hear(&mut handshake, &server) {
        Ok(Answer::Entered(session)) => *session,
        other => panic!("{other:?}"),
    }
}

/// Submits a command; its cookie.
pub(crate) fn submit(session: &mut Session, command: Command) -> u64 {
    let Submitted { cookie, .. } = session.submit(command, &mut BytesMut::new()).unwrap();
    cookie.0
}

pub(crate) fn read(start: u64, end: u64) -> Command {
    Command::Read {
        range: start..end,
        do_not_fragment: false,
    }
}

pub(crate) fn write(offset: u64, data: &'static [u8]) -> Command {
    Command::Write {
        range: offset..offset + data.len() as u64,
        data: Bytes::from_static(data),
        fua: false,
    }
}

/// Of all the contexts that [`session`] was given so many of.
pub(crate) fn block_status(start: u64, end: u64, contexts: u32) -> Command {
    Command::BlockStatus {
        range: start..end,
        contexts: (1..=contexts).map(ContextId).collect(),
        one: false,
    }
}

/// Hands in what a server replies; all completions up to the end or to a violation.
pub(crate) fn receive(
    session: &mut Session,
    server: &[u8],
) -> Result<Vec<Completion>, ServerViolation> {
    let mut input = BytesMut::from(server);
    let mut completions = Vec::new();
    while let Some(completion) = session.receive(&mut input)? {
        completions.push(completion);
    }
    Ok(completions)
}

/// The violation in what a server replies to one command.
#[track_caller]
pub(crate) fn violation(session: &mut Session, server: &[u8]) -> ServerViolation {
    match receive(session, server) {
        Err(violation) => violation,
        Ok(completions) => panic!("taken for good: {completions:?}"),
    }
}
