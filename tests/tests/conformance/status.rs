//! Block status, and what `base:allocation` says.

use std::collections::{BTreeMap, BTreeSet};

use stillpoint_tests::raw_nbd::{chunk, command, errno, flag};
use stillpoint_tests::{CHUNK, KIB, MIB, Mount, RawNbd, Server};

use crate::peer::{EXPORT, Peer, SIZE, Served};
use crate::rows::rows;
use crate::talk::in_step;

rows![
    (
        "status-1",
        "NBD_CMD_BLOCK_STATUS; NBD_REPLY_TYPE_BLOCK_STATUS",
        "Each selected context has exactly one chunk in a reply, of one extent or more",
        Any(each_context_has_one_chunk)
    ),
    (
        "status-2",
        "NBD_REPLY_TYPE_BLOCK_STATUS",
        "No extent is empty, and only the last may pass the end of the request",
        Any(only_the_last_extent_may_pass_the_end)
    ),
    (
        "status-3",
        "NBD_CMD_FLAG_REQ_ONE",
        "With REQ_ONE each context has one extent, no longer than the request",
        Any(one_extent_is_one_extent)
    ),
    (
        "status-4",
        "NBD_CMD_BLOCK_STATUS",
        "Neighbouring extents differ",
        Any(neighbours_differ)
    ),
    (
        "status-5",
        "NBD_CMD_BLOCK_STATUS",
        "Extents begin and end at multiples of 512 where the request does",
        Any(extents_are_cut_at_sectors)
    ),
    (
        "status-6",
        "NBD_CMD_BLOCK_STATUS",
        "A reply has at most 2^20 extents; ours at most 2^16",
        Ours(a_reply_has_a_largest_number_of_extents)
    ),
    (
        "status-7",
        "NBD_CMD_BLOCK_STATUS",
        "A block status past the end is EINVAL, in a structured reply",
        Any(past_the_end_is_invalid)
    ),
    (
        "status-8",
        "The base:allocation metadata context",
        "No flags but HOLE and ZERO are set",
        Any(allocation_has_two_flags)
    ),
    (
        "status-9",
        "The base:allocation metadata context",
        "What is told to be zero reads as zeroes, and what was never written is",
        Any(what_is_told_to_be_zero_is)
    ),
    (
        "status-10",
        "The base:allocation metadata context",
        "Where HOLE is clear a write does not run out of space",
        Ours(what_is_allocated_can_be_written_on_a_full_file_system)
    ),
    (
        "status-11",
        "NBD_CMD_BLOCK_STATUS",
        "A client that asks again where a reply ended comes to the end of the export",
        Any(a_client_makes_progress)
    ),
    (
        "status-12",
        "NBD_REPLY_TYPE_BLOCK_STATUS",
        "All contexts of a reply cover the same length, never past the request: more than the \
         protocol asks for",
        Ours(all_contexts_cover_the_same_length)
    ),
];

type Status = BTreeMap<u32, Vec<(u32, u32)>>;

/// An export of data and holes, and a client that has selected every context.
fn with_holes(peer: Peer) -> (Served, RawNbd) {
    let server = peer.serve();
    let mut nbd = server.structured();
    let all = nbd.list_contexts(EXPORT, &[]).expect("contexts");
    let all: Vec<&str> = all.iter().map(String::as_str).collect();
    nbd.set_contexts(EXPORT, &all).expect("contexts");
    nbd.go(EXPORT).expect("the export");
    for at in (0..SIZE).step_by(MIB as usize) {
        nbd.write(at + 256 * KIB, &vec![1; 256 * KIB as usize])
            .unwrap();
    }
    (server, nbd)
}

/// What a block status says of some ranges, aligned and not.
fn looks(nbd: &mut RawNbd, flags: u16) -> Vec<(u64, u64, Status)> {
    let ranges = [
        (0, SIZE),
        (1, 100),
        (300_000, MIB),
        (SIZE - 1, 1),
        (512, 2 * MIB - 512),
    ];
    let each = ranges.map(|(offset, length)| {
        let status = nbd.block_status(offset, length as u32, flags).unwrap();
        (offset, length, status)
    });
    each.into()
}

fn each_context_has_one_chunk(peer: Peer) {
    let (server, mut nbd) = with_holes(peer);
    let contexts = server.structured().list_contexts(EXPORT, &[]).unwrap();
    for (offset, length, status) in looks(&mut nbd, 0) {
        // That none comes twice is asserted where they are collected.
        assert_eq!(status.len(), contexts.len(), "{offset}+{length}");
    }
    let answer = nbd.call((command::BLOCK_STATUS, 0), 0, SIZE as u32, &[]);
    for part in answer
        .chunks
        .iter()
        .filter(|part| part.kind == chunk::BLOCK_STATUS)
    {
        let length = part.payload.len();
        assert!(length > 4 && (length - 4).is_multiple_of(8), "{length}");
    }
}

fn only_the_last_extent_may_pass_the_end(peer: Peer) {
    let (_server, mut nbd) = with_holes(peer);
    for (offset, length, status) in looks(&mut nbd, 0) {
        for extents in status.values() {
            assert!(extents.iter().all(|extent| extent.0 > 0), "{extents:?}");
            let (_, before) = extents.split_last().expect("there is one");
            let before: u64 = before.iter().map(|extent| u64::from(extent.0)).sum();
            assert!(before < length, "{offset}+{length}: {extents:?}");
        }
    }
}

fn one_extent_is_one_extent(peer: Peer) {
    let (_server, mut nbd) = with_holes(peer);
    for (offset, length, status) in looks(&mut nbd, flag::REQ_ONE) {
        for extents in status.values() {
            assert_eq!(extents.len(), 1, "{offset}+{length}");
            assert!(u64::from(extents[0].0) <= length, "{offset}+{length}");
        }
    }
}

fn neighbours_differ(peer: Peer) {
    let (_server, mut nbd) = with_holes(peer);
    for (offset, length, status) in looks(&mut nbd, 0) {
        for extents in status.values() {
            let differ = extents.windows(2).all(|two| two[0].1 != two[1].1);
            assert!(differ, "{offset}+{length}: {extents:?}");
        }
    }
}

fn extents_are_cut_at_sectors(peer: Peer) {
    let (_server, mut nbd) = with_holes(peer);
    for (offset, length, status) in looks(&mut nbd, 0) {
        for extents in status.values() {
            let mut at = offset;
            for (size, _) in extents {
                at += u64::from(*size);
                let cut = at.is_multiple_of(512) || at == offset + length;
                assert!(cut, "{offset}+{length}: {extents:?}");
            }
        }
    }
}

fn a_reply_has_a_largest_number_of_extents() {
    const WRITES: u64 = 40_000;
    let builder = Server::builder();
    let image = builder.path("vda.raw");
    stillpoint_tests::tools::sparse_file(&image, WRITES * 8192);
    let disk = format!("vda={},granularity=4k", image.display());
    let server = builder.disk_as(&disk).start();
    server.checkpoint("cp1");
    let mut guest = server.open_live("vda");
    let (sender, receiver) = guest.halves();
    for cookie in 0..WRITES {
        let write = (command::WRITE, 0);
        sender
            .request(write, cookie, cookie * 8192, 1, &[1])
            .unwrap();
        if cookie >= 64 {
            assert_eq!(receiver.answer().unwrap().error, 0);
        }
    }
    while (0..64).any(|_| receiver.answer().unwrap().cookie == WRITES) {}
    server.begin("b1", &["--since", "cp1"]);
    let context = "qemu:dirty-bitmap:cp1";
    let mut nbd = server.open_frozen("vda@b1", &[context]);
    let status = nbd.block_status(0, (WRITES * 8192) as u32, 0).unwrap();
    assert_eq!(status[&nbd.context(context)].len(), 1 << 16);
    assert_eq!(nbd.map(context).len() as u64, 2 * WRITES);
}

fn past_the_end_is_invalid(peer: Peer) {
    let server = peer.serve();
    let mut nbd = server.open();
    for (offset, length) in [
        (SIZE, 1),
        (SIZE - 1, 2),
        (0, SIZE as u32 + 1),
        (u64::MAX, 2),
    ] {
        let answer = nbd.call((command::BLOCK_STATUS, 0), offset, length, &[]);
        assert_eq!(answer.error, errno::EINVAL, "{offset}+{length}");
        assert!(
            !answer.chunks[0].simple,
            "{offset}+{length}: a simple reply"
        );
        in_step(&mut nbd);
    }
}

fn allocation_has_two_flags(peer: Peer) {
    let server = peer.serve();
    let mut nbd = server.open();
    nbd.write(MIB, &[1; 4096]).unwrap();
    let map = nbd.map("base:allocation");
    assert!(map.iter().all(|extent| extent.2 <= 3), "{map:?}");
}

fn what_is_told_to_be_zero_is(peer: Peer) {
    let server = peer.serve();
    let mut nbd = server.open();
    nbd.write(MIB, &vec![1; MIB as usize]).unwrap();
    nbd.trim(MIB + CHUNK, CHUNK as u32).unwrap();
    nbd.zeroes(MIB + 4 * CHUNK, CHUNK as u32, flag::NO_HOLE)
        .unwrap();
    let map = nbd.map("base:allocation");
    assert_eq!(map[0], (0, MIB, 3), "what was never written: {map:?}");
    for (offset, length, flags) in map {
        let zero = nbd.read(offset, length as u32).unwrap() == vec![0; length as usize];
        assert!(flags & 2 == 0 || zero, "{offset}+{length} is not zero");
    }
}

fn what_is_allocated_can_be_written_on_a_full_file_system() {
    let mount = Mount::ext4(32 * MIB);
    let image = mount.path().join("vda.raw");
    stillpoint_tests::tools::sparse_file(&image, 8 * MIB);
    let builder = Server::builder();
    let state = builder.path("state");
    let disk = format!("vda={},state={}", image.display(), state.display());
    let server = builder.disk_as(&disk).start();
    let mut nbd = server.open_live("vda");
    nbd.write(0, &vec![1; 2 * MIB as usize]).unwrap();
    nbd.zeroes(2 * MIB, MIB as u32, flag::NO_HOLE).unwrap();
    nbd.flush().unwrap();
    let _full = mount.fill();
    for (offset, length, flags) in nbd.map("base:allocation") {
        let outcome = nbd.write(offset, &vec![2; length as usize]);
        if flags & 1 == 0 {
            assert_eq!(outcome, Ok(()), "{offset}+{length} is allocated");
        } else {
            assert_eq!(outcome, Err(errno::ENOSPC), "{offset}+{length} is a hole");
        }
    }
}

fn a_client_makes_progress(peer: Peer) {
    let (_server, mut nbd) = with_holes(peer);
    for step in [SIZE, 70_000, 512] {
        let mut at = 0;
        while at < SIZE {
            let length = step.min(SIZE - at) as u32;
            let status = nbd.block_status(at, length, 0).unwrap();
            let covered =
                |extents: &Vec<(u32, u32)>| extents.iter().map(|extent| u64::from(extent.0)).sum();
            let least: u64 = status.values().map(covered).min().expect("a context");
            assert!(least > 0, "{at}+{length}");
            at += least;
        }
        assert!(step > 512 || at >= SIZE);
    }
}

fn all_contexts_cover_the_same_length() {
    let server = Server::with_disk(SIZE);
    let mut guest = server.open_live("vda");
    guest.write(0, &vec![1; MIB as usize]).unwrap();
    server.checkpoint("cp1");
    guest.write(3 * CHUNK, &[2; 4096]).unwrap();
    server.begin("b1", &["--since", "cp1"]);
    let contexts = [
        "base:allocation",
        "qemu:allocation-depth",
        "qemu:dirty-bitmap:cp1",
    ];
    let mut nbd = server.open_frozen("vda@b1", &contexts);
    for (offset, length) in [(0, SIZE), (1, 100), (3 * CHUNK + 1, CHUNK), (SIZE - 1, 1)] {
        for flags in [0, flag::REQ_ONE] {
            let status = nbd.block_status(offset, length as u32, flags).unwrap();
            assert_eq!(status.len(), contexts.len());
            let sum = |extents: &Vec<(u32, u32)>| extents.iter().map(|e| u64::from(e.0)).sum();
            let covered: BTreeSet<u64> = status.values().map(sum).collect();
            assert_eq!(covered.len(), 1, "{offset}+{length} {flags}: {status:?}");
            assert!(covered.iter().all(|total| (1..=length).contains(total)));
        }
    }
}
