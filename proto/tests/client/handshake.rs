//! Servers old and new, and servers that lie before an export has been entered.

use bytes::BytesMut;

use crate::entered::*;
use crate::proto::client::{Answer, Handshake, Question, Reason, ServerViolation, Unaskable};
use crate::proto::{Headers, TransmissionFlags};
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
