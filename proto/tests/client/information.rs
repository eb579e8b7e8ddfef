//! What servers tell of their exports and contexts, and what of it is believed.

use bytes::BytesMut;

use crate::entered::*;
use crate::proto::client::{
    ANSWER_DATA_MAX, ANSWERS_LENGTH_MAX, ANSWERS_MAX, Answer, Handshake, Question, ServerViolation,
};
use crate::proto::{ContextId, TransmissionFlags};
use crate::wire::*;

#[test]
fn all_that_is_told_about_an_export_is_known() {
    let server = [
        info(INFO, 1, b"the real name"),
        info(INFO, 77, b"from the future"),
        info_export(INFO, 4096, EVERYTHING | 1 << 15),
        info_block_size(INFO, [512, 4096, u32::MAX]),
        info(INFO, 2, b"a disk"),
        answer(INFO, ACK, b""),
    ];
    let Ok(Some(Answer::Info(info))) = asked(info_of("alias"), &server.concat()) else {
        panic!("no info");
    };
    assert_eq!(info.name, "the real name");
    assert_eq!(info.description.as_deref(), Some("a disk"));
    assert_eq!(info.size, 4096);
    assert_eq!(info.block_size.minimum(), 512);
    assert_eq!(info.block_size.maximum(), u32::MAX);
}

#[test]
fn flags_that_contradict_each_other_are_not_believed() {
    for (flags, not_believed) in [
        (EVERYTHING & !HAS_FLAGS, EVERYTHING & !HAS_FLAGS),
        (EVERYTHING & !SEND_WRITE_ZEROES, SEND_FAST_ZERO),
        (EVERYTHING, SEND_DF),
    ] {
        let server = [info_export(INFO, 1, flags), answer(INFO, ACK, b"")].concat();
        let Ok(Some(Answer::Info(info))) = asked(info_of(""), &server) else {
            panic!("no info");
        };
        assert_eq!(info.flags.bits() & not_believed, 0, "{flags:#x}");
    }
    let server = [info_export(INFO, 1, READ_ONLY), answer(INFO, ACK, b"")].concat();
    let Ok(Some(Answer::Info(info))) = asked(info_of(""), &server) else {
        panic!("no info");
    };
    assert!(info.flags.contains(TransmissionFlags::READ_ONLY));
}

#[test]
fn an_export_that_cannot_be_is_a_violation() {
    let negative = 1 << 63;
    for (server, expected) in [
        (vec![answer(INFO, ACK, b"")], ServerViolation::NoExport),
        (
            vec![info_export(INFO, negative, 1)],
            ServerViolation::ExportSize(negative),
        ),
        (
            vec![info_export(INFO, u64::MAX, 1)],
            ServerViolation::ExportSize(u64::MAX),
        ),
        (
            vec![info_export(INFO, 1, 1), info_export(INFO, 2, 1)],
            ServerViolation::Contradiction(0),
        ),
        (
            vec![info(INFO, 1, b"a"), info(INFO, 1, b"b")],
            ServerViolation::Contradiction(1),
        ),
        (
            vec![info_block_size(INFO, [0, 512, 512])],
            ServerViolation::BlockSize {
                minimum: 0,
                preferred: 512,
                maximum: 512,
            },
        ),
        (
            vec![info_block_size(INFO, [512, 512, 0])],
            ServerViolation::BlockSize {
                minimum: 512,
                preferred: 512,
                maximum: 0,
            },
        ),
        (vec![info(INFO, 1, b"\xff")], ServerViolation::Name),
        (
            vec![info(INFO, 0, b"short")],
            ServerViolation::AnswerLength {
                kind: REP_INFO,
                length: 7,
            },
        ),
        (
            vec![answer(INFO, REP_INFO, b"x")],
            ServerViolation::AnswerLength {
                kind: REP_INFO,
                length: 1,
            },
        ),
    ] {
        assert_eq!(
            asked(info_of("vda"), &server.concat()).unwrap_err(),
            expected
        );
    }
    // By name, too.
    let mut handshake = greeted(NO_ZEROES);
    handshake.ask(enter("vda"), &mut BytesMut::new()).unwrap();
    assert_eq!(
        hear(&mut handshake, &[0xff; 10]).unwrap_err(),
        ServerViolation::ExportSize(u64::MAX)
    );
}

#[test]
fn a_list_is_names_and_perhaps_descriptions() {
    let server = [
        listed(b"vda", b"a disk"),
        listed(b"", b""),
        listed("\u{e9}".as_bytes(), b"\xff no text"),
        answer(LIST, ACK, b""),
    ];
    let Ok(Some(Answer::Exports(exports))) = asked(Question::List, &server.concat()) else {
        panic!("no list");
    };
    let found: Vec<_> = exports
        .iter()
        .map(|listed| (&listed.name[..], listed.description.as_deref()))
        .collect();
    assert_eq!(
        found,
        [("vda", Some("a disk")), ("", None), ("\u{e9}", None)]
    );
}

#[test]
fn a_list_that_cannot_be_read_is_a_violation() {
    for (server, expected) in [
        (listed(b"\xff", b""), ServerViolation::Name),
        (listed(b"a\0b", b""), ServerViolation::Name),
        (listed(&[b'x'; 4097], b""), ServerViolation::Name),
        (
            answer(LIST, REP_SERVER, b"\0\0\0\x05four"),
            ServerViolation::AnswerLength {
                kind: REP_SERVER,
                length: 8,
            },
        ),
        (
            answer(LIST, REP_SERVER, b"\0\0"),
            ServerViolation::AnswerLength {
                kind: REP_SERVER,
                length: 2,
            },
        ),
        (
            answer(LIST, ACK, b"data"),
            ServerViolation::AnswerLength {
                kind: ACK,
                length: 4,
            },
        ),
        (
            answer(LIST, REP_INFO, b"\0\0"),
            ServerViolation::AnswerKind {
                option: LIST,
                kind: REP_INFO,
            },
        ),
        (
            answer(GO, ACK, b""),
            ServerViolation::AnswerTo {
                expected: LIST,
                found: GO,
            },
        ),
        (vec![0; 20], ServerViolation::AnswerMagic(0)),
    ] {
        assert_eq!(asked(Question::List, &server).unwrap_err(), expected);
    }
}

#[test]
fn answers_without_end_are_not_kept() {
    let mut handshake = greeted(FIXED);
    handshake.ask(Question::List, &mut BytesMut::new()).unwrap();
    let end = flood(&mut handshake, &listed(b"x", b""), ANSWERS_MAX);
    assert_eq!(end, ServerViolation::TooManyAnswers(ANSWERS_MAX));

    let mut handshake = greeted(FIXED);
    handshake.ask(Question::List, &mut BytesMut::new()).unwrap();
    let long = listed(&[b'x'; 4096], &[b'y'; 4096]);
    let end = flood(&mut handshake, &long, ANSWERS_MAX);
    assert_eq!(end, ServerViolation::TooLongAnswers(ANSWERS_LENGTH_MAX));

    // What is passed over counts, too.
    let mut handshake = greeted(FIXED);
    handshake.ask(info_of(""), &mut BytesMut::new()).unwrap();
    let end = flood(&mut handshake, &info(INFO, 99, b""), ANSWERS_MAX);
    assert_eq!(end, ServerViolation::TooManyAnswers(ANSWERS_MAX));
}

#[test]
fn an_answer_longer_than_any_is_not_waited_for() {
    let mut server = answer(LIST, REP_SERVER, b"");
    server.truncate(16);
    server.extend((ANSWER_DATA_MAX + 1).to_be_bytes());
    assert_eq!(
        asked(Question::List, &server).unwrap_err(),
        ServerViolation::AnswerLength {
            kind: REP_SERVER,
            length: ANSWER_DATA_MAX + 1
        }
    );
}

#[test]
fn only_contexts_that_were_asked_for_are_selected_and_each_once() {
    for (selected, expected) in [
        (
            &[(1, "base:else")][..],
            ServerViolation::ContextNotAsked("base:else".into()),
        ),
        (
            &[(1, "base:allocation"), (2, "base:allocation")],
            ServerViolation::ContextTwice("base:allocation".into()),
        ),
        (
            &[(7, "base:allocation"), (7, "qemu:dirty-bitmap:a")],
            ServerViolation::ContextIdTwice(ContextId(7)),
        ),
        (
            &[(1, "qemu:allocation-depth")],
            ServerViolation::ContextNotAsked("qemu:allocation-depth".into()),
        ),
    ] {
        let mut handshake = structured();
        handshake
            .ask(with_contexts(), &mut BytesMut::new())
            .unwrap();
        let server: Vec<u8> = selected
            .iter()
            .flat_map(|(id, name)| context(SET_META_CONTEXT, *id, name))
            .collect();
        assert_eq!(hear(&mut handshake, &server).unwrap_err(), expected);
    }
}

#[test]
fn contexts_that_an_export_lacks_are_not_selected_and_that_is_no_error() {
    let mut handshake = structured();
    handshake
        .ask(with_contexts(), &mut BytesMut::new())
        .unwrap();
    let server = [
        context(SET_META_CONTEXT, 9, "qemu:dirty-bitmap:a"),
        answer(SET_META_CONTEXT, ACK, b""),
        entered(EVERYTHING),
    ];
    let Ok(Answer::Entered(session)) = hear(&mut handshake, &server.concat()) else {
        panic!("not entered");
    };
    let expected = [(ContextId(9), "qemu:dirty-bitmap:a".to_owned())];
    assert_eq!(session.contexts(), expected);
}

#[test]
fn a_server_that_knows_no_contexts_is_entered_without() {
    let mut handshake = structured();
    handshake
        .ask(with_contexts(), &mut BytesMut::new())
        .unwrap();
    let server = [
        context(SET_META_CONTEXT, 9, "qemu:dirty-bitmap:a"),
        answer(SET_META_CONTEXT, ERR_UNSUP, b""),
        entered(EVERYTHING),
    ];
    let Ok(Answer::Entered(session)) = hear(&mut handshake, &server.concat()) else {
        panic!("not entered");
    };
    assert!(session.contexts().is_empty());
}

#[test]
fn contexts_are_listed_whatever_their_ids() {
    let question = Question::ListContexts {
        export: "vda".into(),
        queries: vec![],
    };
    let server = [
        context(LIST_META_CONTEXT, 0, "base:allocation"),
        context(LIST_META_CONTEXT, 0, "qemu:"),
        answer(LIST_META_CONTEXT, ACK, b""),
    ];
    let Ok(Some(Answer::Contexts(names))) = asked(question, &server.concat()) else {
        panic!("no list");
    };
    assert_eq!(names, ["base:allocation", "qemu:"]);
}

/// Hands in the same answer until it is too much.
fn flood(handshake: &mut Handshake, server: &[u8], most: u32) -> ServerViolation {
    let mut input = BytesMut::new();
    for _ in 0..=most {
        input.extend_from_slice(server);
        match handshake.advance(&mut input, &mut BytesMut::new()) {
            Ok(None) => assert!(input.is_empty()),
            Ok(Some(answer)) => panic!("{answer:?}"),
            Err(violation) => return violation,
        }
    }
    panic!("still listening");
}

fn with_contexts() -> Question {
    Question::Enter {
        export: "vda".into(),
        contexts: vec!["base:allocation".into(), "qemu:dirty-bitmap:".into()],
    }
}
