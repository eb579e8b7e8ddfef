//! What extended headers change for a client.

use bytes::{Buf, BytesMut};

use crate::entered::*;
use crate::proto::client::{Outcome, ServerViolation, Submitted, into_bytes};
use crate::proto::{Command, ContextId, Headers};
use crate::wire::*;

#[test]
fn replies_repeat_where_the_request_starts() {
    let mut session = session(Headers::Extended, &[]);
    let cookie = submit(&mut session, read(4096, 8192));
    let payload = [&4096_u64.to_be_bytes()[..], &[7; 4096]].concat();
    let server = extended(cookie, 4096, DONE, OFFSET_DATA, &payload);
    let completion = receive(&mut session, &server).unwrap().remove(0);
    let Ok(Outcome::Data(pieces)) = completion.result else {
        panic!("{completion:?}");
    };
    assert_eq!(into_bytes(pieces), &[7; 4096][..]);

    let cookie = submit(&mut session, read(4096, 8192));
    let server = extended(cookie, 0, DONE, OFFSET_DATA, &payload);
    assert_eq!(
        violation(&mut session, &server),
        ServerViolation::RequestOffset {
            expected: 4096,
            found: 0
        }
    );
}

#[test]
fn a_length_of_64_bits_is_not_waited_for() {
    for kind in [OFFSET_DATA, OFFSET_HOLE, ERROR, NONE] {
        for length in [u64::MAX, 1 << 32, 8 + 513] {
            let mut session = session(Headers::Extended, &[]);
            let cookie = submit(&mut session, read(0, 512));
            let server = extended_header(cookie, 0, DONE, kind, length);
            if kind == ERROR && length == 8 + 513 {
                assert!(receive(&mut session, &server).is_ok());
                continue;
            }
            assert!(
                matches!(
                    violation(&mut session, &server),
                    ServerViolation::Framing(_)
                ),
                "{length} bytes of {kind}"
            );
        }
    }
}

#[test]
fn a_map_of_the_whole_export_is_one_request() {
    let mut session = session(Headers::Extended, &["base:allocation"]);
    let mut output = BytesMut::new();
    let command = block_status(0, SIZE, 1);
    let Submitted { cookie, payload } = session.submit(command, &mut output).unwrap();
    assert!(payload.is_empty());
    assert_eq!((&output[24..]).get_u64(), SIZE);

    let server = extended_status(cookie.0, (0, DONE), 1, &[(1 << 39, 0), (u64::MAX, 3)]);
    let completion = receive(&mut session, &server).unwrap().remove(0);
    let Ok(Outcome::BlockStatus(status)) = completion.result else {
        panic!("{completion:?}");
    };
    assert_eq!(status.range, 0..SIZE);
    assert_eq!(status.contexts[0].1[1].length, SIZE - (1 << 39));
}

#[test]
fn extents_of_the_other_form_are_a_violation() {
    let contexts = ["base:allocation"];
    let mut extended_headers = session(Headers::Extended, &contexts);
    let cookie = submit(&mut extended_headers, block_status(0, 100, 1));
    let compact = [&[0, 0, 0, 1][..], &[0, 0, 0, 100], &[0; 4]].concat();
    let server = extended(cookie, 0, DONE, BLOCK_STATUS, &compact);
    assert!(matches!(
        violation(&mut extended_headers, &server),
        ServerViolation::Framing(_) | ServerViolation::ChunkKind { .. }
    ));

    let mut structured = session(Headers::Structured, &contexts);
    let cookie = submit(&mut structured, block_status(0, 100, 1));
    let server = chunk(cookie, DONE, BLOCK_STATUS_EXT, &compact);
    assert!(matches!(
        violation(&mut structured, &server),
        ServerViolation::Framing(_) | ServerViolation::ChunkKind { .. }
    ));
}

#[test]
fn a_count_of_extents_that_is_not_theirs_is_a_violation() {
    for count in [0, 2, u32::MAX] {
        let mut session = session(Headers::Extended, &["base:allocation"]);
        let cookie = submit(&mut session, block_status(0, 100, 1));
        let payload = [&[0, 0, 0, 1][..], &count.to_be_bytes(), &[1; 16]].concat();
        let server = extended(cookie, 0, DONE, BLOCK_STATUS_EXT, &payload);
        assert!(
            matches!(
                violation(&mut session, &server),
                ServerViolation::Framing(_)
            ),
            "{count}"
        );
    }
}

#[test]
fn extents_add_up_to_more_than_any_number() {
    let mut session = session(Headers::Extended, &["base:allocation"]);
    let cookie = submit(&mut session, block_status(0, 100, 1));
    let extents = [(99, 0), (u64::MAX, 1), (1, 0)];
    let server = extended_status(cookie, (0, DONE), 1, &extents);
    assert_eq!(
        violation(&mut session, &server),
        ServerViolation::ExtentsBeyond(100)
    );
}

#[test]
fn some_contexts_are_asked_for_by_a_payload_and_only_they_answer() {
    let contexts = ["base:allocation", "qemu:a", "qemu:b"];
    let some = Command::BlockStatus {
        range: 4096..8192,
        contexts: vec![ContextId(3)],
        one: false,
    };
    let mut session_asked = session(Headers::Extended, &contexts);
    let mut output = BytesMut::new();
    let submitted = session_asked.submit(some.clone(), &mut output).unwrap();
    assert_eq!(submitted.payload, &b"\0\0\0\0\0\0\x10\0\0\0\0\x03"[..]);
    assert_eq!((&output[24..]).get_u64(), 12);

    let cookie = submitted.cookie.0;
    let server = extended_status(cookie, (4096, DONE), 3, &[(4096, 1)]);
    let completion = receive(&mut session_asked, &server).unwrap().remove(0);
    let Ok(Outcome::BlockStatus(status)) = completion.result else {
        panic!("{completion:?}");
    };
    assert_eq!(status.contexts.len(), 1);

    let mut session_asked = session(Headers::Extended, &contexts);
    let cookie = submit(&mut session_asked, some.clone());
    let server = extended_status(cookie, (4096, DONE), 1, &[(4096, 1)]);
    assert_eq!(
        violation(&mut session_asked, &server),
        ServerViolation::ContextNotSelected(ContextId(1))
    );

    // Where it was not offered it is not sent.
    let refusal = session(Headers::Structured, &contexts).submit(some, &mut BytesMut::new());
    assert!(refusal.is_err());
}

#[test]
fn a_write_says_that_it_has_a_payload() {
    let mut session = session(Headers::Extended, &[]);
    let mut output = BytesMut::new();
    let submitted = session.submit(write(0, b"hello"), &mut output).unwrap();
    assert_eq!(submitted.payload, &b"hello"[..]);
    assert_eq!(output[..8], *b"\x21\xe4\x1c\x71\0\x20\0\x01");
}
