//! Replies of the wrong form, to the wrong request, or at the wrong time.

use bytes::BytesMut;

use crate::entered::*;
use crate::proto::client::{ERROR_CHUNK_MAX, Outcome, ServerViolation};
use crate::proto::{Command, Cookie, Errno, Headers};
use crate::wire::*;

#[test]
fn whatever_is_not_a_read_may_be_answered_simply_or_in_a_chunk() {
    let mut session = session(Headers::Structured, &[]);
    let first = submit(&mut session, write(0, b"hello"));
    let second = submit(&mut session, Command::Flush);
    let third = submit(&mut session, write(9, b"x"));
    let server = [
        chunk(second, DONE, NONE, b""),
        simple(first, 0, b""),
        simple(third, 28, b""),
    ];
    let completions = receive(&mut session, &server.concat()).unwrap();
    assert_eq!(completions[0].cookie, Cookie(second));
    assert_eq!(completions[0].result, Ok(Outcome::Done));
    assert_eq!(completions[1].result, Ok(Outcome::Done));
    let failure = completions[2].result.clone().unwrap_err();
    assert_eq!(failure.errno, Errno::NoSpc);
    assert_eq!(session.under_way(), 0);
}

#[test]
fn a_simple_reply_to_a_read_is_a_violation_where_replies_are_structured() {
    for error in [0, 5] {
        let mut session = session(Headers::Structured, &[]);
        let cookie = submit(&mut session, read(0, 1));
        assert_eq!(
            violation(&mut session, &simple(cookie, error, b"x")),
            ServerViolation::ReplyForm("simple")
        );
    }
}

#[test]
fn a_block_status_cannot_succeed_simply() {
    let mut failing = session(Headers::Structured, &["base:allocation"]);
    let cookie = submit(&mut failing, block_status(0, 1, 1));
    let completions = receive(&mut failing, &simple(cookie, 22, b"")).unwrap();
    assert!(completions[0].result.is_err());

    let mut session = session(Headers::Structured, &["base:allocation"]);
    let cookie = submit(&mut session, block_status(0, 1, 1));
    assert_eq!(
        violation(&mut session, &simple(cookie, 0, b"")),
        ServerViolation::ReplyForm("simple")
    );
}

#[test]
fn a_reply_of_a_form_that_was_not_agreed_on_is_a_violation() {
    // The cookie of the first request.
    let cookie = 1;
    let extended = extended(cookie, 0, DONE, NONE, b"");
    let structured = chunk(cookie, DONE, NONE, b"");
    let simple = simple(cookie, 0, b"");
    for (headers, reply) in [
        (Headers::Simple, &structured),
        (Headers::Simple, &extended),
        (Headers::Structured, &extended),
        (Headers::Extended, &structured),
        (Headers::Extended, &simple),
    ] {
        let mut session = session(headers, &[]);
        assert_eq!(submit(&mut session, write(0, b"x")), cookie);
        let found = violation(&mut session, reply);
        assert!(matches!(found, ServerViolation::Framing(_)), "{headers:?}");
    }
}

#[test]
fn a_reply_without_a_request_is_a_violation() {
    let mut session = session(Headers::Structured, &[]);
    let cookie = submit(&mut session, write(0, b"x"));
    let other = cookie + 1;
    for server in [
        simple(other, 0, b""),
        chunk(other, DONE, NONE, b""),
        chunk_header(other, 0, OFFSET_DATA, 9),
    ] {
        assert_eq!(
            violation(&mut session, &server),
            ServerViolation::UnknownCookie(Cookie(other))
        );
    }
}

#[test]
fn a_second_reply_to_one_request_is_a_violation() {
    for again in [simple, |cookie, _, _: &[u8]| chunk(cookie, DONE, NONE, b"")] {
        let mut session = session(Headers::Structured, &[]);
        let cookie = submit(&mut session, write(0, b"x"));
        let server = [chunk(cookie, DONE, NONE, b""), again(cookie, 0, b"")];
        assert_eq!(
            violation(&mut session, &server.concat()),
            ServerViolation::UnknownCookie(Cookie(cookie))
        );
    }
}

#[test]
fn a_chunk_after_the_last_is_a_violation() {
    let mut session = session(Headers::Structured, &[]);
    let cookie = submit(&mut session, read(0, 2));
    let server = [data(cookie, DONE, 0, b"ab"), data(cookie, DONE, 0, b"ab")];
    assert_eq!(
        violation(&mut session, &server.concat()),
        ServerViolation::UnknownCookie(Cookie(cookie))
    );
}

#[test]
fn a_chunk_that_says_that_nothing_follows_is_the_last() {
    let mut session = session(Headers::Structured, &[]);
    let cookie = submit(&mut session, write(0, b"x"));
    assert_eq!(
        violation(&mut session, &chunk(cookie, 0, NONE, b"")),
        ServerViolation::EmptyChunk
    );
}

#[test]
fn chunks_fit_what_was_asked() {
    let contexts = ["base:allocation"];
    for (command, kind) in [
        (write(0, b"x"), OFFSET_DATA),
        (write(0, b"x"), OFFSET_HOLE),
        (write(0, b"x"), BLOCK_STATUS),
        (read(0, 100), BLOCK_STATUS),
        (block_status(0, 100, 1), OFFSET_DATA),
        (block_status(0, 100, 1), OFFSET_HOLE),
        (read(0, 100), 77),
        (Command::Flush, 3),
    ] {
        let mut session = session(Headers::Structured, &contexts);
        let cookie = submit(&mut session, command.clone());
        let found = violation(&mut session, &chunk(cookie, DONE, kind, &[1; 12]));
        assert!(
            matches!(found, ServerViolation::ChunkKind { kind: k, .. } if k == kind),
            "{command:?}: {found}"
        );
    }
}

#[test]
fn an_unknown_error_is_an_error() {
    let mut session = session(Headers::Structured, &[]);
    let cookie = submit(&mut session, read(0, 2));
    let payload = [
        &1_u32.to_be_bytes()[..],
        &2_u16.to_be_bytes(),
        b"hm",
        &[0; 40],
    ]
    .concat();
    let server = chunk(cookie, DONE, 0x8123, &payload);
    let completions = receive(&mut session, &server).unwrap();
    let failure = completions[0].result.clone().unwrap_err();
    assert_eq!((failure.errno, &failure.text[..]), (Errno::Perm, "hm"));
}

#[test]
fn a_text_longer_than_its_chunk_or_than_any_text_is_a_violation() {
    let text = |announced: u16, length: usize| {
        let head = [&5_u32.to_be_bytes()[..], &announced.to_be_bytes()].concat();
        [head, vec![b'x'; length]].concat()
    };
    for payload in [
        text(3, 2),
        text(u16::MAX, 0),
        vec![0; 5],
        text(10, ERROR_CHUNK_MAX as usize),
    ] {
        let mut session = session(Headers::Structured, &[]);
        let cookie = submit(&mut session, read(0, 2));
        let server = chunk(cookie, DONE, ERROR, &payload);
        assert!(matches!(
            violation(&mut session, &server),
            ServerViolation::Framing(_)
        ));
    }
}

#[test]
fn a_text_that_is_no_string_is_left_out_and_control_characters_are_not_shown() {
    for (bytes, shown) in [
        (&b"\xff\xfe"[..], "input/output error"),
        (b"a\0b", "input/output error"),
        (b"a\x1b[31mb\n", "input/output error: a\u{fffd}[31mb"),
    ] {
        let mut session = session(Headers::Structured, &[]);
        let cookie = submit(&mut session, read(0, 2));
        let length = (bytes.len() as u16).to_be_bytes();
        let payload = [&5_u32.to_be_bytes()[..], &length, bytes].concat();
        let completions = receive(&mut session, &chunk(cookie, DONE, ERROR, &payload)).unwrap();
        assert_eq!(
            completions[0].result.clone().unwrap_err().to_string(),
            shown
        );
    }
}

#[test]
fn errors_without_end_are_a_violation() {
    let mut session = session(Headers::Structured, &[]);
    let cookie = submit(&mut session, write(0, b"x"));
    let server = error(cookie, 0, 5, "again").repeat(1000);
    assert_eq!(
        violation(&mut session, &server),
        ServerViolation::TooManyChunks
    );
}

#[test]
fn bytes_that_are_no_reply_are_a_violation() {
    for form in [Headers::Simple, Headers::Structured, Headers::Extended] {
        let mut session = session(form, &[]);
        submit(&mut session, read(0, 2));
        for server in [
            &[0; 64][..],
            &[0xff; 64],
            b"HTTP/1.1 200 OK\r\n\r\n\0\0\0\0",
        ] {
            assert!(matches!(
                violation(&mut session, server),
                ServerViolation::Framing(_)
            ));
        }
    }
}

#[test]
fn where_the_stream_is_cut_makes_no_difference() {
    let script = |cut: usize| {
        let mut session = session(Headers::Structured, &["base:allocation", "qemu:x"]);
        let first = submit(&mut session, read(0, 20));
        let second = submit(&mut session, block_status(0, 1000, 2));
        let third = submit(&mut session, write(0, b"x"));
        let server = [
            data(first, 0, 10, &[7; 10]),
            status(second, 0, 2, &[(100, 0), (900, 1)]),
            simple(third, 5, b""),
            hole(first, DONE, 0, 10),
            status(second, DONE, 1, &[(1000, 3)]),
        ]
        .concat();
        let (mut input, mut found) = (BytesMut::new(), Vec::new());
        for piece in [&server[..cut], &server[cut..]] {
            for byte in piece.chunks(if cut == 0 { 1 } else { server.len() }) {
                input.extend_from_slice(byte);
                while let Some(completion) = session.receive(&mut input).unwrap() {
                    found.push(completion);
                }
            }
        }
        (found, server.len())
    };
    let (bytewise, length) = script(0);
    assert_eq!(bytewise.len(), 3);
    for cut in 1..length {
        assert_eq!(script(cut).0, bytewise, "cut at {cut}");
    }
}

#[test]
fn what_a_server_could_only_refuse_is_not_sent() {
    let sizes = [512, 4096, 1 << 20];
    let flags = HAS_FLAGS | READ_ONLY;
    let mut session = session_with(Headers::Structured, &[], flags, sizes);
    for (command, reason) in [
        (read(0, 513), "aligned"),
        (read(1, 513), "aligned"),
        (read(SIZE, SIZE + 512), "past the end"),
        (read(u64::MAX - 511, u64::MAX), "past the end"),
        (read(512, 0), "ends before"),
        (read(0, 2 << 20), "longer than the maximum"),
        (write(0, &[0; 512]), "read-only"),
        (Command::Flush, "not offered"),
        (block_status(0, 512, 0), "without a metadata context"),
        (Command::Cache { range: 0..SIZE }, "32 bits"),
    ] {
        let mut output = BytesMut::new();
        let refusal = session.submit(command.clone(), &mut output).unwrap_err();
        assert!(refusal.reason.contains(reason), "{command:?}: {refusal}");
        assert!(output.is_empty(), "{command:?}");
    }
    assert_eq!(session.under_way(), 0);
}
