//! Requests whose length takes more than 32 bits.

use stillpoint_tests::raw_nbd::{command, errno, flag};
use stillpoint_tests::{CHUNK, GIB, RawNbd, Server};

use crate::{ALLOCATION, open};

const LARGE: u64 = 16 * GIB;
const MARKS: [u64; 4] = [0, 4 * GIB, 9 * GIB, 12 * GIB];

fn marked() -> (Server, RawNbd) {
    let server = Server::with_disk(LARGE);
    let mut nbd = open(&server, &[ALLOCATION]);
    for mark in MARKS {
        nbd.write(mark, &[1; 8192]).unwrap();
    }
    (server, nbd)
}

fn check_marks(nbd: &mut RawNbd, expected: [[u8; 2]; 4]) {
    for (mark, expected) in MARKS.into_iter().zip(expected) {
        let found = [nbd.read(mark, 1), nbd.read(mark + 8191, 1)];
        assert_eq!(found, expected.map(|byte| Ok(vec![byte])), "at {mark}");
    }
}

#[test]
fn zeroes_of_64_bits_reach_to_their_end_and_no_further() {
    let (_server, mut nbd) = marked();
    let asked = (command::WRITE_ZEROES, flag::FUA);
    let answer = nbd.call_extended(asked, 4096, 9 * GIB, &[]);
    assert_eq!(answer.done(), Ok(()));
    check_marks(&mut nbd, [[1, 0], [0, 0], [0, 1], [1, 1]]);
}

#[test]
fn a_trim_of_64_bits_reaches_to_its_end_and_no_further() {
    let (_server, mut nbd) = marked();
    let answer = nbd.call_extended((command::TRIM, 0), 4096, 9 * GIB, &[]);
    assert_eq!(answer.done(), Ok(()));
    // This file system can punch holes.
    check_marks(&mut nbd, [[1, 0], [0, 0], [0, 1], [1, 1]]);
}

#[test]
fn fast_zeroes_do_not_overflow() {
    let (_server, mut nbd) = marked();
    let asked = (command::WRITE_ZEROES, flag::FAST_ZERO);
    let answer = nbd.call_extended(asked, 0, LARGE, &[]);
    assert_eq!(answer.done(), Ok(()));
    check_marks(&mut nbd, [[0, 0]; 4]);
}

#[test]
fn a_cache_request_may_be_of_the_whole_disk() {
    let (_server, mut nbd) = marked();
    let answer = nbd.call_extended((command::CACHE, 0), 0, LARGE, &[]);
    assert_eq!(answer.done(), Ok(()));
}

#[test]
fn past_the_end_is_no_space_for_zeroes_and_invalid_for_the_rest() {
    let (_server, mut nbd) = marked();
    for (offset, length) in [
        (0, LARGE + 1),
        (LARGE, 1 << 32),
        (512, u64::MAX - 511),
        (512, u64::MAX),
        (u64::MAX, u64::MAX),
    ] {
        for (command, expected) in [
            (command::WRITE_ZEROES, errno::ENOSPC),
            (command::TRIM, errno::EINVAL),
            (command::CACHE, errno::EINVAL),
            (command::BLOCK_STATUS, errno::EINVAL),
        ] {
            let answer = nbd.call_extended((command, 0), offset, length, &[]);
            assert_eq!(answer.error, expected, "{command} of {offset}+{length}");
        }
    }
    check_marks(&mut nbd, [[1, 1]; 4]);
}

#[test]
fn what_was_changed_by_a_request_of_64_bits_is_in_the_map() {
    let (server, mut nbd) = marked();
    server.checkpoint("cp1");
    let (start, length) = (4 * GIB - 4096, 5 * GIB + 4097);
    nbd.call_extended((command::WRITE_ZEROES, 0), start, length, &[])
        .done()
        .unwrap();
    server.begin("b1", &["--since", "cp1"]);
    let context = "qemu:dirty-bitmap:cp1";
    let mut frozen = RawNbd::open_extended(&server.frozen(), "vda@b1", &[context]);
    let map = frozen.extended_status(0, LARGE, 0).unwrap();
    let dirty = 5 * GIB + 2 * CHUNK;
    let (before, after) = (4 * GIB - CHUNK, LARGE - 9 * GIB - CHUNK);
    let expected = vec![(before, 0), (dirty, 1), (after, 0)];
    assert_eq!(map[&frozen.context(context)], expected);
}

#[test]
fn a_long_zeroing_is_no_hindrance_to_instants_nor_to_a_stop() {
    const HUGE: u64 = 12 << 40;
    let mut server = Server::with_disk(HUGE);
    let (mut one, mut other) = (open(&server, &[]), open(&server, &[]));
    one.write(0, &[1]).unwrap();
    let (sender, receiver) = one.halves();
    sender
        .extended((command::WRITE_ZEROES, 0), 1, 0, HUGE, &[])
        .unwrap();
    // It has begun when its first piece can be seen.
    while other.read(0, 1) != Ok(vec![0]) {}
    server.checkpoint("cp1");
    other.write(HUGE - 1, &[2]).unwrap();
    other.hang_up();
    // The end of the process is waited for, and for no minute.
    server.stop();
    let answer = receiver.answer().expect("an answer before the end");
    assert_eq!(answer.error, errno::ESHUTDOWN, "{answer:?}");
    server.start();
    let mut nbd = server.open_live("vda");
    assert_eq!(nbd.read(HUGE - 1, 1), Ok(vec![2]), "it went on to the end");
}
