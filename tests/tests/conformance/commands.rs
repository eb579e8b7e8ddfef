//! Requests, and what they do.

use std::fs;
use std::os::unix::fs::MetadataExt as _;

use stillpoint_tests::raw_nbd::{can, command, errno, flag};
use stillpoint_tests::{CHUNK, GIB, MIB, Server, Syncs};

use crate::peer::{Peer, SIZE};
use crate::rows::rows;
use crate::talk::in_step;

rows![
    (
        "commands-1",
        "NBD_CMD_WRITE",
        "What is written is read back, at any alignment",
        Any(what_is_written_is_read_back)
    ),
    (
        "commands-2",
        "NBD_CMD_READ; NBD_CMD_WRITE; NBD_CMD_TRIM; NBD_CMD_WRITE_ZEROES; NBD_CMD_BLOCK_STATUS",
        "A request of length zero does not end the connection",
        Any(requests_of_nothing_end_nothing)
    ),
    (
        "commands-3",
        "NBD_CMD_FLUSH; Ordering of messages and writes",
        "FLUSH is answered after everything answered before it is durable",
        Ours(a_flush_reaches_the_device)
    ),
    (
        "commands-4",
        "NBD_CMD_FLAG_FUA; Ordering of messages and writes",
        "A write, trim or zeroing with FUA is answered after it is durable",
        Ours(a_forced_write_reaches_the_device)
    ),
    (
        "commands-5",
        "NBD_FLAG_CAN_MULTI_CONN",
        "What one connection was told is written is seen by all, and a FLUSH on any covers it",
        Any(connections_see_what_the_others_wrote)
    ),
    (
        "commands-6",
        "NBD_CMD_WRITE_ZEROES",
        "What was zeroed reads as zeroes, and what lies beside it stays",
        Any(what_was_zeroed_reads_as_zeroes)
    ),
    (
        "commands-7",
        "NBD_CMD_FLAG_NO_HOLE",
        "NO_HOLE leaves the range with its space",
        Ours(no_hole_keeps_the_space)
    ),
    (
        "commands-8",
        "NBD_CMD_FLAG_FAST_ZERO",
        "FAST_ZERO succeeds, or is ENOTSUP and changes nothing; it is never EOVERFLOW",
        Any(fast_zeroes_are_fast_or_change_nothing)
    ),
    (
        "commands-9",
        "NBD_CMD_WRITE_ZEROES; Error values",
        "Zeroing without FAST_ZERO is never ENOTSUP",
        Any(slow_zeroes_are_supported)
    ),
    (
        "commands-10",
        "NBD_CMD_TRIM",
        "TRIM succeeds and leaves alone what lies outside its range",
        Any(a_trim_keeps_to_its_range)
    ),
    (
        "commands-11",
        "NBD_CMD_CACHE",
        "CACHE changes nothing that can be seen, and its unknown flags are refused",
        Any(cache_changes_nothing)
    ),
    (
        "commands-12",
        "Size constraints",
        "Requests without payload are not bound by the largest payload",
        Any(requests_without_payload_may_be_long)
    ),
];

fn what_is_written_is_read_back(peer: Peer) {
    let server = peer.serve();
    for mut nbd in [server.open(), server.open_simple()] {
        for (offset, length) in [
            (0, 1),
            (511, 2),
            (4095, 8194),
            (CHUNK - 1, 2),
            (SIZE - 1, 1),
        ] {
            for byte in [7, 8] {
                let bytes = vec![byte; length as usize];
                nbd.write(offset, &bytes).unwrap();
                assert_eq!(
                    nbd.read(offset, length).unwrap(),
                    bytes,
                    "{offset}+{length}"
                );
            }
        }
        assert_eq!(nbd.read(0, 2), Ok(vec![8, 0]));
        nbd.write(0, &[0]).unwrap();
    }
}

fn requests_of_nothing_end_nothing(peer: Peer) {
    let server = peer.serve();
    for mut nbd in [server.open(), server.open_simple()] {
        for command in [
            command::READ,
            command::WRITE,
            command::TRIM,
            command::WRITE_ZEROES,
            command::CACHE,
            command::BLOCK_STATUS,
        ] {
            for offset in [0, 512, SIZE] {
                nbd.call((command, 0), offset, 0, &[]);
            }
            in_step(&mut nbd);
        }
    }
}

/// More than anything but a flush or a forced write would cause.
const SYNCS: usize = 20;

fn a_flush_reaches_the_device() {
    let server = Server::with_disk(SIZE);
    let trace = Syncs::of(&server);
    let (mut one, mut other) = (server.open_live("vda"), server.open_live("vda"));
    for _ in 0..SYNCS {
        one.write(0, &[1; 512]).unwrap();
        other.flush().unwrap();
    }
    let why = "a flush on the other connection";
    trace.reaches(&server.image("vda"), SYNCS, why);
}

fn a_forced_write_reaches_the_device() {
    let server = Server::with_disk(SIZE);
    let trace = Syncs::of(&server);
    let mut nbd = server.open_live("vda");
    let forced = [
        (command::WRITE, &[1; 4096][..]),
        (command::WRITE_ZEROES, &[]),
        (command::TRIM, &[]),
    ];
    for (done, (command, payload)) in (1..).zip(forced) {
        for _ in 0..SYNCS {
            let answer = nbd.call((command, flag::FUA), 0, 4096, payload);
            assert_eq!(answer.error, 0, "command {command}");
        }
        let why = format!("command {command}");
        trace.reaches(&server.image("vda"), done * SYNCS, &why);
    }
}

fn connections_see_what_the_others_wrote(peer: Peer) {
    let server = peer.serve();
    let (mut one, mut other) = (server.open(), server.open());
    assert_eq!(one.export().flags & can::MULTI_CONN, can::MULTI_CONN);
    for round in 1..20u8 {
        let at = u64::from(round) * 512;
        one.write(at, &[round; 512]).unwrap();
        other.flush().unwrap();
        assert_eq!(other.read(at, 512), Ok(vec![round; 512]));
        one.zeroes(at, 256, flag::FUA).unwrap();
        assert_eq!(other.read(at, 256), Ok(vec![0; 256]));
    }
}

fn what_was_zeroed_reads_as_zeroes(peer: Peer) {
    let server = peer.serve();
    let mut nbd = server.open();
    for flags in [0, flag::NO_HOLE, flag::NO_HOLE | flag::FUA] {
        nbd.write(0, &vec![1; MIB as usize]).unwrap();
        nbd.zeroes(4096 - 7, CHUNK as u32, flags).unwrap();
        let mut expected = vec![1; MIB as usize];
        expected[4096 - 7..][..CHUNK as usize].fill(0);
        assert!(
            nbd.read(0, MIB as u32).unwrap() == expected,
            "flags {flags}"
        );
    }
}

fn no_hole_keeps_the_space() {
    let server = Server::with_disk(SIZE);
    let mut nbd = server.open_live("vda");
    nbd.zeroes(0, MIB as u32, flag::NO_HOLE).unwrap();
    // Not by the map: a file system may show reserved space that was never written as a hole.
    let space = || fs::metadata(server.image("vda")).unwrap().blocks() * 512;
    assert!(space() >= MIB, "{} bytes written without a hole", space());
    nbd.trim(0, MIB as u32).unwrap();
    assert!(space() < MIB, "{} bytes after a trim", space());
    assert_eq!(nbd.map("base:allocation"), [(0, SIZE, 3)]);
}

fn fast_zeroes_are_fast_or_change_nothing(peer: Peer) {
    let server = peer.serve();
    let mut nbd = server.open();
    if nbd.export().flags & can::FAST_ZERO == 0 {
        assert_ne!(peer, Peer::Stillpoint, "ours offers it");
        return;
    }
    for (offset, length) in [(0, CHUNK as u32), (CHUNK + 7, 100), (0, SIZE as u32)] {
        for flags in [flag::FAST_ZERO, flag::FAST_ZERO | flag::NO_HOLE] {
            nbd.write(offset, &vec![1; length as usize]).unwrap();
            let byte = match nbd.zeroes(offset, length, flags) {
                Ok(()) => 0,
                Err(error) => {
                    assert_eq!(error, errno::ENOTSUP, "{offset}+{length}");
                    1
                }
            };
            let found = nbd.read(offset, length).unwrap();
            assert!(found == vec![byte; length as usize], "{offset}+{length}");
        }
    }
}

fn slow_zeroes_are_supported(peer: Peer) {
    let server = peer.serve();
    let mut nbd = server.open();
    for (offset, length) in [(0, SIZE as u32), (1, 1), (4095, 4098)] {
        for flags in [0, flag::NO_HOLE, flag::FUA] {
            assert_eq!(nbd.zeroes(offset, length, flags), Ok(()));
        }
    }
}

fn a_trim_keeps_to_its_range(peer: Peer) {
    let server = peer.serve();
    let mut nbd = server.open();
    nbd.write(0, &vec![1; MIB as usize]).unwrap();
    for (offset, length) in [(5, 1), (4095, 4098), (CHUNK, CHUNK), (CHUNK - 1, 3 * CHUNK)] {
        nbd.trim(offset, length as u32).unwrap();
        let found = nbd.read(0, MIB as u32).unwrap();
        assert!(found[(4 * CHUNK) as usize..].iter().all(|byte| *byte == 1));
        assert!(found[..5].iter().all(|byte| *byte == 1));
        let end = (offset + length) as usize;
        assert_eq!(found[end], 1, "{offset}+{length}");
    }
}

fn cache_changes_nothing(peer: Peer) {
    let server = peer.serve();
    let mut nbd = server.open();
    nbd.write(0, &vec![1; MIB as usize]).unwrap();
    for (offset, length) in [(0, SIZE as u32), (1, 511), (SIZE - 1, 1)] {
        assert_eq!(nbd.cache(offset, length), Ok(()), "{offset}+{length}");
    }
    assert!(nbd.read(0, MIB as u32).unwrap() == vec![1; MIB as usize]);
    for bit in 1..16 {
        let answer = nbd.call((command::CACHE, 1 << bit), 0, 4096, &[]);
        assert_eq!(answer.error, errno::EINVAL, "bit {bit}");
    }
    in_step(&mut nbd);
}

fn requests_without_payload_may_be_long(peer: Peer) {
    let server = peer.serve_size(3 * GIB);
    let mut nbd = server.open();
    let length = (3 * GIB) as u32;
    for command in [
        command::WRITE_ZEROES,
        command::TRIM,
        command::CACHE,
        command::BLOCK_STATUS,
    ] {
        let error = nbd.call((command, 0), 0, length, &[]).error;
        // They may be too much for a server, which then says so.
        let declined = [errno::EINVAL, errno::EOVERFLOW].contains(&error);
        let ours = peer == Peer::Stillpoint;
        assert!(
            error == 0 || declined && !ours,
            "command {command}: error {error}"
        );
    }
    if nbd.export().flags & can::FAST_ZERO != 0 {
        let fast = nbd.zeroes(0, length, flag::FAST_ZERO);
        assert!(fast.is_ok() || fast == Err(errno::ENOTSUP), "{fast:?}");
    }
    in_step(&mut nbd);
}
