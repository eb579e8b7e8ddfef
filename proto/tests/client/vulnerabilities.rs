//! What other clients were found to do wrong, each under the number that it became known by.

use bytes::BytesMut;

use crate::entered::*;
use crate::proto::Headers;
use crate::proto::client::{Answer, Handshake, Outcome, Question, ServerViolation};
use crate::wire::*;

/// libnbd wrote data behind its buffer when a chunk's offset lay outside of the read.
#[test]
fn cve_2019_14842_a_chunk_outside_of_the_read_is_never_stored() {
    for (offset, length) in [(4096, 4096), (8192, 1), (0, 4096), (u64::MAX - 4095, 4096)] {
        let mut session = session(Headers::Structured, &[]);
        let cookie = submit(&mut session, read(4096, 4096 + 512));
        let server = data(cookie, DONE, offset, &vec![7; length]);
        assert!(
            matches!(
                violation(&mut session, &server),
                ServerViolation::OutsideRequest { .. } | ServerViolation::Framing(_)
            ),
            "{length} bytes at {offset}"
        );
    }
}

/// libnbd ended the program when a server went away, or failed, in the middle of the negotiation.
#[test]
fn cve_2021_20286_a_server_that_ends_or_fails_at_any_byte_of_the_handshake_is_an_error() {
    let whole = [
        greeting(FIXED),
        answer(STRUCTURED_REPLY, ACK, b""),
        context(SET_META_CONTEXT, 1, "base:allocation"),
        answer(SET_META_CONTEXT, ACK, b""),
        info_export(GO, 4096, 1),
        answer(GO, ACK, b""),
    ]
    .concat();
    let questions = || {
        [
            Question::Agree(Headers::Structured),
            Question::Enter {
                export: "vda".into(),
                contexts: vec!["base:allocation".into()],
            },
        ]
    };
    for end in 0..=whole.len() {
        for garbage in [None, Some(0x55), Some(0xff)] {
            let mut input = BytesMut::from(&whole[..end]);
            if let Some(byte) = garbage {
                input.resize(end + 40, byte);
            }
            let mut handshake = Handshake::new();
            let mut output = BytesMut::new();
            let mut questions = questions().into_iter();
            let mut entered = false;
            while let Ok(Some(answer)) = handshake.advance(&mut input, &mut output) {
                entered |= matches!(answer, Answer::Entered(_));
                match questions.next() {
                    Some(question) => handshake.ask(question, &mut output).unwrap(),
                    None => break,
                }
            }
            assert_eq!(entered, end == whole.len(), "{end} bytes, then {garbage:?}");
        }
    }
}

/// nbdcopy took what asynchronous reads left in their buffers for data, errors or not.
#[test]
fn cve_2022_0485_there_is_no_data_but_that_of_a_read_that_succeeded() {
    let mut session = session(Headers::Structured, &[]);
    let cookie = submit(&mut session, read(0, 4));
    let server = [data(cookie, 0, 0, b"junk"), error(cookie, DONE, 5, "")];
    let completion = receive(&mut session, &server.concat()).unwrap().remove(0);
    // The data is in the outcome, and there is none.
    let failure: Result<Outcome, _> = completion.result;
    assert!(failure.is_err());
}

/// libnbd took an export of 2^63 bytes and more for a negative size, and that for an error number.
#[test]
fn cve_2023_5215_an_export_has_no_negative_size() {
    let question = Question::Info {
        export: String::new(),
    };
    for size in [1 << 63, u64::MAX, u64::MAX - 4095] {
        assert_eq!(
            asked(question.clone(), &info_export(INFO, size, 1)).unwrap_err(),
            ServerViolation::ExportSize(size)
        );
    }
    let largest = [
        info_export(INFO, i64::MAX as u64, 1),
        answer(INFO, ACK, b""),
    ];
    assert!(matches!(
        asked(question, &largest.concat()),
        Ok(Some(Answer::Info(_)))
    ));
}

/// libnbd ended the program when a block status had flags of more than 32 bits.
#[test]
fn cve_2023_5871_flags_that_no_context_has_are_flags() {
    let mut session = session(Headers::Extended, &["base:allocation"]);
    let cookie = submit(&mut session, block_status(0, 100, 1));
    let server = extended_status(cookie, (0, DONE), 1, &[(100, u64::MAX)]);
    let completion = receive(&mut session, &server).unwrap().remove(0);
    let Ok(Outcome::BlockStatus(status)) = completion.result else {
        panic!("{completion:?}");
    };
    assert_eq!(status.contexts[0].1[0].flags, u64::MAX);
}
