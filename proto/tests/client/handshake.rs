//! Servers old and new, and servers that lie before an export has been entered.

use bytes::BytesMut;

use crate::entered::*;
use crate::proto::client::{
    ANSWER_DATA_MAX, ANSWERS_LENGTH_MAX, ANSWERS_MAX, Answer, Handshake, Question, Reason,
    ServerViolation, Unaskable,
};
use crate::proto::{ContextId, Headers, TransmissionFlags};
use crate::wire::*;

#[test]
fn what_does_not_greet_like_a_server_is_none() {
    let oldstyle = [
        &b"NBDMAGIC\0\0\x42\x02\x81\x86\x12\x53"[..],
        &[0; 8 + 4 + 124],
    ]
    .concat();
    for (greeting, expected) in [
        (&oldstyle[..], ServerViolation::Oldstyle),
        (
            b"SSH-2.0-OpenSSH_9.2",
            ServerViolation::NotNbd(u64::from_be_bytes(*b"SSH-2.0-")),
        ),
        (
            b"NBDMAGICWHATEVER\0\x03",
            ServerViolation::UnknownHandshake(u64::from_be_bytes(*b"WHATEVER")),
        ),
    ] {
        let mut handshake = Handshake::new();
        assert_eq!(hear(&mut handshake, greeting).unwrap_err(), expected);
        // Nothing more comes of it.
        let again = handshake.advance(&mut BytesMut::from(greeting), &mut BytesMut::new());
        assert!(matches!(again, Ok(None)));
    }
}

#[test]
fn a_client_agrees_to_what_it_knows_of_what_is_offered() {
    for (offered, agreed) in [(0, 0), (1, 1), (2, 2), (3, 3), (0xfffc, 0), (0xffff, 3)] {
        let mut output = BytesMut::new();
        let answer = Handshake::new()
            .advance(&mut BytesMut::from(&greeting(offered)[..]), &mut output)
            .unwrap();
        assert_eq!(output, [0, 0, 0, agreed][..]);
        assert!(
            matches!(answer, Some(Answer::Greeting { knows_options }) if knows_options == (offered & 1 == 1))
        );
    }
}

#[test]
fn a_server_without_options_can_only_be_entered() {
    let mut handshake = greeted(0);
    let mut output = BytesMut::new();
    for question in [
        Question::List,
        Question::StartTls,
        Question::Agree(Headers::Structured),
        info_of("vda"),
        Question::Abort,
    ] {
        handshake.ask(question, &mut output).unwrap();
        assert!(output.is_empty());
        let Ok(Answer::Declined(declined)) = hear(&mut handshake, b"") else {
            panic!("not declined");
        };
        assert_eq!(declined.reason, Reason::Unsupported);
    }

    handshake.ask(enter("vda"), &mut output).unwrap();
    assert_eq!(&output[..], b"IHAVEOPT\0\0\0\x01\0\0\0\x03vda");
    let mut server = 1024_u64.to_be_bytes().to_vec();
    server.extend((HAS_FLAGS | READ_ONLY).to_be_bytes());
    server.extend([0; 124]);
    let Ok(Answer::Entered(session)) = hear(&mut handshake, &server) else {
        panic!("not entered");
    };
    assert_eq!(session.info().size, 1024);
    assert_eq!(session.headers(), Headers::Simple);
}

#[test]
fn a_server_without_go_is_entered_by_name_and_keeps_structured_replies() {
    let mut handshake = greeted(FIXED | NO_ZEROES);
    let mut output = BytesMut::new();
    let question = Question::Agree(Headers::Structured);
    handshake.ask(question, &mut output).unwrap();
    hear(&mut handshake, &answer(STRUCTURED_REPLY, ACK, b"")).unwrap();
    handshake.ask(enter("vda"), &mut output).unwrap();
    output.clear();

    let mut input = BytesMut::from(&answer(GO, ERR_UNSUP, b"what?")[..]);
    assert!(
        handshake
            .advance(&mut input, &mut output)
            .unwrap()
            .is_none()
    );
    assert_eq!(&output[..], b"IHAVEOPT\0\0\0\x01\0\0\0\x03vda");
    assert!(handshake.closed().is_some());
    let server = [&1024_u64.to_be_bytes()[..], &EVERYTHING.to_be_bytes()].concat();
    let Ok(Answer::Entered(session)) = hear(&mut handshake, &server) else {
        panic!("not entered");
    };
    assert_eq!(session.headers(), Headers::Structured);
    assert!(session.info().flags.contains(TransmissionFlags::SEND_DF));
}

#[test]
fn a_server_without_structured_replies_has_simple_ones_and_no_contexts() {
    let mut handshake = greeted(FIXED);
    let mut output = BytesMut::new();
    let question = Question::Agree(Headers::Structured);
    handshake.ask(question, &mut output).unwrap();
    let heard = hear(&mut handshake, &answer(STRUCTURED_REPLY, ERR_UNSUP, b""));
    assert!(matches!(heard, Ok(Answer::Agreed(Headers::Simple))));

    output.clear();
    let question = Question::Enter {
        export: "vda".into(),
        contexts: vec!["base:allocation".into()],
    };
    handshake.ask(question, &mut output).unwrap();
    assert_eq!(output[8..12], GO.to_be_bytes());
    let Ok(Answer::Entered(session)) = hear(&mut handshake, &entered(EVERYTHING)) else {
        panic!("not entered");
    };
    assert!(session.contexts().is_empty());
    assert!(!session.info().flags.contains(TransmissionFlags::SEND_DF));
}

#[test]
fn a_refusal_that_means_everything_is_no_answer_about_replies() {
    let found = asked(
        Question::Agree(Headers::Structured),
        &answer(STRUCTURED_REPLY, ERR_TLS_REQD, b"not in the clear"),
    );
    let Ok(Some(Answer::Declined(declined))) = found else {
        panic!("{found:?}");
    };
    assert_eq!(declined.reason, Reason::TlsRequired);
    assert_eq!(
        declined.to_string(),
        "the server requires TLS: not in the clear"
    );
}

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
fn another_question_can_follow_one_that_was_declined() {
    let mut handshake = structured();
    let mut output = BytesMut::new();
    handshake.ask(enter("no"), &mut output).unwrap();
    let found = hear(
        &mut handshake,
        &answer(GO, ERR_UNKNOWN, b"no such disk\x07"),
    );
    let Ok(Answer::Declined(declined)) = found else {
        panic!("{found:?}");
    };
    assert_eq!(
        declined.to_string(),
        "the server has no such export: no such disk\u{fffd}"
    );
    handshake.ask(enter("vda"), &mut output).unwrap();
    assert!(matches!(
        hear(&mut handshake, &entered(EVERYTHING)),
        Ok(Answer::Entered(_))
    ));
}

#[test]
fn plain_text_after_the_agreement_to_start_tls_is_a_violation() {
    let server = [answer(STARTTLS, ACK, b""), answer(LIST, ACK, b"")].concat();
    assert_eq!(
        asked(Question::StartTls, &server).unwrap_err(),
        ServerViolation::PlaintextAfterStartTls(20)
    );
}

#[test]
fn what_was_agreed_before_tls_is_forgotten() {
    let mut handshake = structured();
    let mut output = BytesMut::new();
    handshake.ask(Question::StartTls, &mut output).unwrap();
    let heard = hear(&mut handshake, &answer(STARTTLS, ACK, b""));
    assert!(matches!(heard, Ok(Answer::StartTls)));
    assert_eq!(handshake.headers(), Headers::Simple);

    output.clear();
    let question = Question::Agree(Headers::Structured);
    handshake.ask(question, &mut output).unwrap();
    assert_eq!(output[8..12], STRUCTURED_REPLY.to_be_bytes());
}

#[test]
fn questions_are_put_one_at_a_time_and_only_if_they_can_be() {
    let mut output = BytesMut::new();
    let mut handshake = Handshake::new();
    assert_eq!(
        handshake.ask(Question::List, &mut output),
        Err(Unaskable::OutOfTurn)
    );
    let mut handshake = greeted(FIXED);
    for name in ["a\0b".to_owned(), "x".repeat(4097)] {
        assert_eq!(
            handshake.ask(enter(&name), &mut output),
            Err(Unaskable::Name)
        );
    }
    let question = Question::ListContexts {
        export: String::new(),
        queries: vec!["base:".into(); 257],
    };
    assert_eq!(
        handshake.ask(question, &mut output),
        Err(Unaskable::TooManyContexts)
    );
    assert!(output.is_empty());
    handshake.ask(Question::List, &mut output).unwrap();
    assert_eq!(
        handshake.ask(Question::List, &mut output),
        Err(Unaskable::OutOfTurn)
    );
}

#[test]
fn a_server_lets_go() {
    for end in [answer(ABORT, ACK, b""), answer(ABORT, ERR_UNSUP, b"")] {
        assert!(matches!(
            asked(Question::Abort, &end),
            Ok(Some(Answer::Aborted))
        ));
    }
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

fn structured() -> Handshake {
    let mut handshake = greeted(FIXED | NO_ZEROES);
    let question = Question::Agree(Headers::Structured);
    handshake.ask(question, &mut BytesMut::new()).unwrap();
    hear(&mut handshake, &answer(STRUCTURED_REPLY, ACK, b"")).unwrap();
    handshake
}

fn entered(flags: u16) -> Vec<u8> {
    [info_export(GO, 4096, flags), answer(GO, ACK, b"")].concat()
}

fn enter(export: &str) -> Question {
    Question::Enter {
        export: export.into(),
        contexts: vec![],
    }
}

fn with_contexts() -> Question {
    Question::Enter {
        export: "vda".into(),
        contexts: vec!["base:allocation".into(), "qemu:dirty-bitmap:".into()],
    }
}

fn info_of(export: &str) -> Question {
    Question::Info {
        export: export.into(),
    }
}
