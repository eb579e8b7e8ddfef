//! A read returns what the server sent, all of it, or nothing.

use bytes::Bytes;
use rand::seq::SliceRandom;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

use crate::entered::*;
use crate::proto::client::{FRAGMENT_MIN, FRAGMENTS_FREE, Outcome, Piece};
use crate::proto::client::{ServerViolation, Session, into_bytes};
use crate::proto::{Command, Errno, Headers};
use crate::wire::*;

#[test]
fn pieces_come_in_any_order_and_are_put_together() {
    let mut session = structured();
    let cookie = submit(&mut session, read(1000, 1010));
    let server = [
        data(cookie, 0, 1008, b"ij"),
        hole(cookie, 0, 1003, 5),
        data(cookie, DONE, 1000, b"abc"),
    ];
    let pieces = pieces(&mut session, &server.concat()).unwrap();
    let expected = [
        Piece::Data {
            offset: 1000,
            data: Bytes::from_static(b"abc"),
        },
        Piece::Hole {
            offset: 1003,
            length: 5,
        },
        Piece::Data {
            offset: 1008,
            data: Bytes::from_static(b"ij"),
        },
    ];
    assert_eq!(pieces, expected);
    assert_eq!(into_bytes(pieces), &b"abc\0\0\0\0\0ij"[..]);
}

#[test]
fn a_simple_reply_has_all_the_data_at_once() {
    let mut session = session(Headers::Simple, &[]);
    let first = submit(&mut session, read(0, 3));
    let second = submit(&mut session, read(5, 7));
    let server = [simple(second, 0, b"de"), simple(first, 0, b"abc")].concat();
    let completions = receive(&mut session, &server).unwrap();
    let cookies: Vec<u64> = completions.iter().map(|c| c.cookie.0).collect();
    assert_eq!(cookies, [second, first]);
    let Ok(Outcome::Data(pieces)) = completions[1].result.clone() else {
        panic!("{completions:?}");
    };
    assert_eq!(into_bytes(pieces), &b"abc"[..]);
}

#[test]
fn missing_bytes_are_never_zeroes() {
    let cases: [&[(u64, u64)]; 5] = [
        &[],
        &[(0, 99)],
        &[(1, 100)],
        &[(0, 50), (51, 100)],
        &[(0, 1)],
    ];
    for parts in cases {
        let mut session = structured();
        let cookie = submit(&mut session, read(0, 100));
        let mut server = Vec::new();
        for (start, end) in parts {
            server.extend(data(cookie, 0, *start, &vec![7; (end - start) as usize]));
        }
        server.extend(chunk(cookie, DONE, NONE, b""));
        let missing = 100 - parts.iter().map(|(start, end)| end - start).sum::<u64>();
        assert_eq!(
            violation(&mut session, &server),
            ServerViolation::MissingData(missing),
            "{parts:?}"
        );
    }
}

#[test]
fn nothing_outside_of_the_request_is_accepted() {
    for (offset, length) in [
        (99, 1),
        (99, 2),
        (199, 2),
        (200, 1),
        (0, 1),
        (u64::MAX, 1),
        (u64::MAX - 1, 50),
    ] {
        for as_hole in [false, true] {
            let mut session = structured();
            let cookie = submit(&mut session, read(100, 200));
            let server = if as_hole {
                hole(cookie, 0, offset, length as u32)
            } else {
                data(cookie, 0, offset, &vec![7; length as usize])
            };
            assert_eq!(
                violation(&mut session, &server),
                ServerViolation::OutsideRequest { offset, length },
                "a hole: {as_hole}"
            );
        }
    }
}

#[test]
fn nothing_comes_twice() {
    for (offset, length) in [(110, 10), (105, 10), (119, 1), (115, 10), (100, 30)] {
        let mut session = structured();
        let cookie = submit(&mut session, read(100, 200));
        let server = [
            data(cookie, 0, 110, &[7; 10]),
            hole(cookie, 0, offset, length),
        ];
        assert_eq!(
            violation(&mut session, &server.concat()),
            ServerViolation::Overlap {
                offset,
                length: u64::from(length)
            }
        );
    }
}

#[test]
fn what_was_to_be_one_piece_is() {
    let mut session = structured();
    let range = 0..2;
    let do_not_fragment = true;
    let command = Command::Read {
        range,
        do_not_fragment,
    };
    let cookie = submit(&mut session, command);
    let server = [data(cookie, 0, 0, b"a"), data(cookie, DONE, 1, b"b")];
    assert_eq!(
        violation(&mut session, &server.concat()),
        ServerViolation::Fragmented
    );
}

#[test]
fn data_longer_than_the_request_is_not_waited_for() {
    let mut session = structured();
    let cookie = submit(&mut session, read(0, 512));
    assert!(receive(&mut session, &chunk_header(cookie, 0, OFFSET_DATA, 8 + 512)).is_ok());

    // What has come already is not to come again.
    let mut session = structured();
    let cookie = submit(&mut session, read(0, 512));
    let server = [
        data(cookie, 0, 0, &[7; 256]),
        chunk_header(cookie, 0, OFFSET_DATA, 8 + 257),
    ];
    assert!(matches!(
        violation(&mut session, &server.concat()),
        ServerViolation::Framing(_)
    ));
}

#[test]
fn a_read_in_crumbs_ends_the_connection() {
    let mut session = structured();
    let length = 64 * FRAGMENT_MIN;
    let cookie = submit(&mut session, read(0, length));
    let mut server = Vec::new();
    for offset in 0..=length / FRAGMENT_MIN + FRAGMENTS_FREE {
        server.extend(data(cookie, 0, offset * 2, b"x"));
    }
    assert_eq!(
        violation(&mut session, &server),
        ServerViolation::TooManyChunks
    );
}

#[test]
fn an_error_is_an_error_whatever_else_was_sent() {
    let (mut before, mut after, mut at) = (structured(), structured(), structured());
    let cookie = submit(&mut before, read(0, 4));
    let server = [
        data(cookie, 0, 0, b"good"),
        error(cookie, DONE, 5, "bad disk"),
    ]
    .concat();
    assert_eq!(
        failure(&mut before, &server),
        (Errno::Io, "bad disk".into(), None)
    );

    let cookie = submit(&mut after, read(0, 4));
    let server = [
        error(cookie, 0, 12, "no room"),
        error(cookie, 0, 5, "second"),
        data(cookie, DONE, 0, b"good"),
    ];
    assert_eq!(
        failure(&mut after, &server.concat()),
        (Errno::NoMem, "no room".into(), None)
    );

    let cookie = submit(&mut at, read(0, 4));
    let server = [
        data(cookie, 0, 0, b"good"),
        error_at(cookie, 0, 5, "here", 2),
        chunk(cookie, DONE, NONE, b""),
    ];
    assert_eq!(
        failure(&mut at, &server.concat()),
        (Errno::Io, "here".into(), Some(2))
    );
}

#[test]
fn an_error_elsewhere_is_a_violation() {
    let mut session = structured();
    let cookie = submit(&mut session, read(0, 4));
    assert_eq!(
        violation(&mut session, &error_at(cookie, DONE, 5, "", 4)),
        ServerViolation::OutsideRequest {
            offset: 4,
            length: 0
        }
    );
}

#[test]
fn any_cut_of_a_disk_into_pieces_is_the_disk() {
    for seed in 0..200 {
        let mut random = ChaCha8Rng::seed_from_u64(seed);
        let disk: Vec<u8> = (0..20_000)
            .map(|at| {
                if at / 1000 % 3 == 0 {
                    0
                } else {
                    random.random()
                }
            })
            .collect();
        let mut session = structured();
        let mut server = Vec::new();
        let mut reads = Vec::new();
        for _ in 0..random.random_range(1..5) {
            let start = random.random_range(0..disk.len());
            let end = random.random_range(start + 1..=disk.len());
            let cookie = submit(&mut session, read(start as u64, end as u64));
            reads.push((cookie, start..end));
            server.extend(replies(&mut random, &disk, cookie, start..end));
        }
        // Chunks of one reply keep no order but that of the last.
        server.shuffle(&mut random);
        server.sort_by_key(|(last, _)| *last);
        let server: Vec<u8> = server.into_iter().flat_map(|(_, bytes)| bytes).collect();

        let completions = receive(&mut session, &server)
            .unwrap_or_else(|violation| panic!("seed {seed}: {violation}"));
        assert_eq!(completions.len(), reads.len(), "seed {seed}");
        for completion in completions {
            let (_, range) = reads
                .iter()
                .find(|(cookie, _)| *cookie == completion.cookie.0)
                .unwrap();
            let Ok(Outcome::Data(pieces)) = completion.result else {
                panic!("seed {seed}: {:?}", completion.result);
            };
            assert!(
                into_bytes(pieces) == disk[range.clone()],
                "seed {seed}, {range:?}"
            );
        }
    }
}

/// Chunks that are a disk's contents, each with whether it is the last.
fn replies(
    random: &mut ChaCha8Rng,
    disk: &[u8],
    cookie: u64,
    range: std::ops::Range<usize>,
) -> Vec<(bool, Vec<u8>)> {
    let mut chunks = Vec::new();
    let mut start = range.start;
    while start < range.end {
        let end = range.end.min(start + random.random_range(600..4000));
        let bytes = &disk[start..end];
        let at = start as u64;
        chunks.push((
            false,
            if bytes.iter().all(|byte| *byte == 0) {
                hole(cookie, 0, at, bytes.len() as u32)
            } else {
                data(cookie, 0, at, bytes)
            },
        ));
        start = end;
    }
    chunks.push((true, chunk(cookie, DONE, NONE, b"")));
    chunks
}

fn structured() -> Session {
    session(Headers::Structured, &[])
}

fn pieces(session: &mut Session, server: &[u8]) -> Result<Vec<Piece>, ServerViolation> {
    let completion = receive(session, server)?.pop().expect("a completion");
    match completion.result {
        Ok(Outcome::Data(pieces)) => Ok(pieces),
        other => panic!("{other:?}"),
    }
}

fn failure(session: &mut Session, server: &[u8]) -> (Errno, String, Option<u64>) {
    let completion = receive(session, server)
        .unwrap()
        .pop()
        .expect("a completion");
    let failure = completion.result.unwrap_err();
    (failure.errno, failure.text, failure.offset)
}
