//! Block states: for every context that was selected, about what was asked.

use crate::entered::*;
use crate::proto::client::{BlockStatus, Outcome, ServerViolation, Session};
use crate::proto::{Command, ContextId, Extent, Headers};
use crate::wire::*;

#[test]
fn contexts_are_shortened_to_what_all_of_them_say() {
    let mut session = two_contexts();
    let cookie = submit(&mut session, block_status(1000, 2000, 2));
    let server = [
        status(cookie, 0, 2, &[(300, 1), (100, 0), (100, 1)]),
        status(cookie, DONE, 1, &[(350, 3), (60, 0)]),
    ];
    let status = block_state(&mut session, &server.concat());
    assert_eq!(status.range, 1000..1410);
    assert_eq!(pairs(&status, 1), [(350, 3), (60, 0)]);
    assert_eq!(pairs(&status, 2), [(300, 1), (100, 0), (10, 1)]);
    assert_eq!(status.extents(ContextId(3)), None);
}

#[test]
fn only_the_last_extent_may_go_on_behind_the_end_and_is_cut_off_there() {
    let mut session = one_context();
    let cookie = submit(&mut session, block_status(0, 100, 1));
    let server = status(cookie, DONE, 1, &[(60, 0), (u32::MAX, 1)]);
    let found = block_state(&mut session, &server);
    assert_eq!(found.range, 0..100);
    assert_eq!(pairs(&found, 1), [(60, 0), (40, 1)]);

    for extents in [&[(100, 0), (1, 1)][..], &[(60, 0), (50, 0), (1, 0)]] {
        let mut session = one_context();
        let cookie = submit(&mut session, block_status(0, 100, 1));
        assert_eq!(
            violation(&mut session, &status(cookie, DONE, 1, extents)),
            ServerViolation::ExtentsBeyond(100)
        );
    }
}

#[test]
fn one_extent_is_one_extent_within_the_request() {
    for extents in [&[(50, 0), (50, 1)][..], &[(101, 0)]] {
        let mut session = one_context();
        let range = 0..100;
        let cookie = submit(
            &mut session,
            Command::BlockStatus {
                range,
                contexts: vec![ContextId(1)],
                one: true,
            },
        );
        let server = status(cookie, DONE, 1, extents);
        assert!(
            matches!(
                violation(&mut session, &server),
                ServerViolation::ExtentsBeyond(100) | ServerViolation::Framing(_)
            ),
            "{extents:?}"
        );
    }
}

#[test]
fn an_extent_of_nothing_makes_no_progress() {
    for extents in [&[(0, 0)][..], &[(10, 0), (0, 1)], &[]] {
        let mut session = one_context();
        let cookie = submit(&mut session, block_status(0, 100, 1));
        assert!(matches!(
            violation(&mut session, &status(cookie, DONE, 1, extents)),
            ServerViolation::Framing(_)
        ));
    }
}

#[test]
fn extents_are_whole_blocks_but_at_the_end_of_the_export() {
    let sizes = [4096, 4096, 1 << 20];
    let entered = || session_with(Headers::Structured, &["base:allocation"], EVERYTHING, sizes);
    let mut session = entered();
    let cookie = submit(&mut session, block_status(0, 1 << 20, 1));
    assert_eq!(
        violation(
            &mut session,
            &status(cookie, DONE, 1, &[(4096, 0), (4097, 1)])
        ),
        ServerViolation::ExtentUnaligned(4097)
    );

    let mut session = entered();
    let cookie = submit(&mut session, block_status(SIZE - 8192, SIZE, 1));
    let server = status(cookie, DONE, 1, &[(4096, 0), (5000, 1)]);
    assert_eq!(block_state(&mut session, &server).range, SIZE - 8192..SIZE);
}

#[test]
fn every_context_answers_once() {
    for (ids, expected) in [
        (&[1][..], ServerViolation::StatusMissing(ContextId(2))),
        (&[], ServerViolation::StatusMissing(ContextId(1))),
        (&[1, 1], ServerViolation::StatusTwice(ContextId(1))),
        (&[2, 3], ServerViolation::ContextNotSelected(ContextId(3))),
        (&[0], ServerViolation::ContextNotSelected(ContextId(0))),
    ] {
        let mut session = two_contexts();
        let cookie = submit(&mut session, block_status(0, 100, 2));
        let mut server = Vec::new();
        for id in ids {
            server.extend(status(cookie, 0, *id, &[(100, 0)]));
        }
        server.extend(chunk(cookie, DONE, NONE, b""));
        assert_eq!(violation(&mut session, &server), expected, "{ids:?}");
    }
}

#[test]
fn half_an_extent_is_a_violation() {
    for length in [0, 3, 4, 5, 8, 11, 13] {
        let mut session = one_context();
        let cookie = submit(&mut session, block_status(0, 100, 1));
        let server = chunk(cookie, DONE, BLOCK_STATUS, &[1; 13][..length]);
        assert!(
            matches!(
                violation(&mut session, &server),
                ServerViolation::Framing(_)
            ),
            "{length} bytes"
        );
    }
}

#[test]
fn more_extents_than_the_request_has_bytes_are_not_waited_for() {
    let mut session = one_context();
    let cookie = submit(&mut session, block_status(0, 100, 1));
    let server = chunk_header(cookie, 0, BLOCK_STATUS, 4 + 8 * 101);
    assert!(matches!(
        violation(&mut session, &server),
        ServerViolation::Framing(_)
    ));

    let mut session = one_context();
    let cookie = submit(&mut session, block_status(0, 1 << 31, 1));
    let server = chunk_header(cookie, 0, BLOCK_STATUS, 4 + 8 * ((1 << 20) + 1));
    assert!(matches!(
        violation(&mut session, &server),
        ServerViolation::Framing(_)
    ));
}

#[test]
fn an_error_beats_whatever_was_said_before() {
    let mut session = two_contexts();
    let cookie = submit(&mut session, block_status(0, 100, 2));
    let server = [
        status(cookie, 0, 1, &[(100, 0)]),
        error(cookie, DONE, 5, ""),
    ];
    let completion = receive(&mut session, &server.concat()).unwrap().pop();
    assert!(completion.unwrap().result.is_err());
}

fn one_context() -> Session {
    session(Headers::Structured, &["base:allocation"])
}

fn two_contexts() -> Session {
    session(
        Headers::Structured,
        &["base:allocation", "qemu:dirty-bitmap:cp1"],
    )
}

fn block_state(session: &mut Session, server: &[u8]) -> BlockStatus {
    let completion = receive(session, server).unwrap().pop().expect("all of it");
    match completion.result {
        Ok(Outcome::BlockStatus(status)) => status,
        other => panic!("{other:?}"),
    }
}

fn pairs(status: &BlockStatus, context: u32) -> Vec<(u64, u64)> {
    let extents = status.extents(ContextId(context)).expect("it was selected");
    extents
        .iter()
        .map(|Extent { length, flags }| (*length, *flags))
        .collect()
}
