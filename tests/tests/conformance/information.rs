//! What is told about an export before it is entered.

use stillpoint_tests::raw_nbd::{OptionReply, can, command, errno, flag, info, option, rep};
use stillpoint_tests::{GIB, MIB, RawNbd, Server};

use crate::peer::{EXPORT, Peer, SIZE};
use crate::rows::rows;
use crate::talk::{ask, haggles_on, in_step, info_data};

rows![
    (
        "information-1",
        "NBD_REP_INFO; NBD_INFO_EXPORT",
        "A success of INFO or GO tells size and flags, in 12 bytes, whether or not they were asked \
         for",
        Any(size_and_flags_are_always_told)
    ),
    (
        "information-2",
        "NBD_OPT_INFO and NBD_OPT_GO",
        "Requests for information that are not understood are ignored",
        Any(unknown_requests_for_information_are_ignored)
    ),
    (
        "information-3",
        "NBD_REP_ERR_UNKNOWN",
        "An export that does not exist is ERR_UNKNOWN, with no information before it",
        Any(an_unknown_export_is_unknown)
    ),
    (
        "information-4",
        "NBD_OPT_INFO and NBD_OPT_GO",
        "GO right after an INFO of the same words tells the same",
        Any(go_tells_what_info_told)
    ),
    (
        "information-5",
        "NBD_OPT_INFO and NBD_OPT_GO",
        "Nothing follows the acknowledgement of GO, whether or not zeroes were declined",
        Any(no_padding_follows_go)
    ),
    (
        "information-6",
        "NBD_INFO_NAME",
        "The name that is told is one that LIST has, byte for byte",
        Any(the_name_told_is_the_one_listed)
    ),
    (
        "information-7",
        "NBD_INFO_DESCRIPTION",
        "The description that is told is the one that LIST has",
        Any(the_description_told_is_the_one_listed)
    ),
    (
        "information-8",
        "NBD_REP_INFO",
        "No kind of information comes twice",
        Any(no_information_comes_twice)
    ),
    (
        "information-9",
        "NBD_OPT_EXPORT_NAME",
        "The empty name is the default export",
        Ours(the_empty_name_is_the_only_disk)
    ),
    (
        "information-10",
        "Size constraints; NBD_INFO_BLOCK_SIZE",
        "Block sizes are told in 14 bytes, if not asked for too: powers of two, the smallest of at most 64 \
         KiB, the preferred of at least 512, the largest not below it nor below 1 MiB",
        Any(block_sizes_are_told_and_legal)
    ),
    (
        "information-11",
        "Size constraints; NBD_REP_ERR_BLOCK_SIZE_REQD",
        "Who does not ask for block sizes enters all the same, and may use any byte",
        Any(nobody_has_to_ask_for_block_sizes)
    ),
    (
        "information-12",
        "Size constraints",
        "The size is a multiple of the smallest block",
        Any(the_last_bytes_can_be_reached)
    ),
    (
        "information-13",
        "Transmission flags",
        "HAS_FLAGS is set, and no flag of an extension that was not negotiated",
        Any(flags_have_flags_and_no_extension)
    ),
    (
        "information-14",
        "NBD_FLAG_SEND_DF",
        "SEND_DF is set after structured replies were negotiated, and clear before",
        Any(df_needs_structured_replies)
    ),
    (
        "information-15",
        "NBD_FLAG_SEND_FAST_ZERO",
        "SEND_FAST_ZERO is set if the flag is understood, and only beside SEND_WRITE_ZEROES",
        Any(fast_zero_needs_write_zeroes)
    ),
    (
        "information-16",
        "Transmission flags",
        "What a flag offers is there",
        Any(what_is_offered_is_there)
    ),
    (
        "information-17",
        "NBD_FLAG_READ_ONLY",
        "A read-only export says so, and offers nothing that would change it",
        Any(read_only_is_told)
    ),
    (
        "information-18",
        "NBD_OPT_EXPORT_NAME; NBD_REP_INFO",
        "EXPORT_NAME tells the size and flags that GO tells",
        Any(the_old_way_in_tells_the_same)
    ),
];

/// Successful replies to INFO as kinds and data, the acknowledgement left out.
#[track_caller]
fn told(replies: &[OptionReply]) -> Vec<(u16, Vec<u8>)> {
    let (last, before) = replies.split_last().expect("there is one");
    assert_eq!(last.kind, rep::ACK, "{:#x}", last.kind);
    let each = before.iter().map(|reply| {
        assert_eq!(reply.kind, rep::INFO);
        let (kind, data) = reply.data.split_at(2);
        (u16::from_be_bytes([kind[0], kind[1]]), data.to_vec())
    });
    each.collect()
}

fn size_and_flags_are_always_told(peer: Peer) {
    let server = peer.serve();
    let mut nbd = server.connect();
    for items in [&[][..], &[info::NAME], &[info::EXPORT]] {
        let data = info_data(EXPORT.as_bytes(), items);
        let told = told(&ask(&mut nbd, option::INFO, &data));
        let export = told.iter().find(|(kind, _)| *kind == info::EXPORT);
        let (_, data) = export.expect("it is told");
        assert_eq!(data.len(), 10);
        assert_eq!(data[..8], SIZE.to_be_bytes());
    }
    haggles_on(&mut nbd);
}

fn unknown_requests_for_information_are_ignored(peer: Peer) {
    let server = peer.serve();
    let mut nbd = server.connect();
    let known = [info::NAME, info::DESCRIPTION, info::BLOCK_SIZE];
    let all: Vec<u16> = known.into_iter().chain([4, 77, u16::MAX]).collect();
    for option in [option::INFO, option::GO] {
        let told = told(&ask(&mut nbd, option, &info_data(EXPORT.as_bytes(), &all)));
        assert!(told.iter().all(|(kind, _)| *kind <= 3), "{told:?}");
    }
}

fn an_unknown_export_is_unknown(peer: Peer) {
    let server = peer.serve();
    let mut nbd = server.connect();
    for name in ["nothing", "vda ", "VDA", "../vda", "vda/", "vd"] {
        for option in [option::INFO, option::GO] {
            let items = [info::NAME, info::BLOCK_SIZE];
            let replies = ask(&mut nbd, option, &info_data(name.as_bytes(), &items));
            let kinds: Vec<_> = replies.iter().map(|reply| reply.kind).collect();
            assert_eq!(kinds, [rep::ERR_UNKNOWN], "{name:?}");
        }
    }
    haggles_on(&mut nbd);
}

fn go_tells_what_info_told(peer: Peer) {
    let server = peer.serve();
    for structured in [false, true] {
        for items in [&[][..], &[1, 2, 3], &[3, 1]] {
            let mut nbd = server.connect();
            if structured {
                nbd.structured_replies();
            }
            let data = info_data(EXPORT.as_bytes(), items);
            let mut info = told(&ask(&mut nbd, option::INFO, &data));
            let mut go = told(&ask(&mut nbd, option::GO, &data));
            info.sort();
            go.sort();
            assert_eq!(info, go);
        }
    }
}

fn no_padding_follows_go(peer: Peer) {
    let server = peer.serve();
    for flags in [1u32, 3] {
        let mut nbd = RawNbd::connect_silently(server.socket());
        nbd.receive_raw(18).expect("a greeting");
        nbd.send_raw(&flags.to_be_bytes()).unwrap();
        nbd.go(EXPORT).unwrap();
        in_step(&mut nbd);
    }
}

fn the_name_told_is_the_one_listed(peer: Peer) {
    let server = peer.serve();
    let mut nbd = server.connect();
    let listed: Vec<_> = nbd.list().unwrap().into_iter().map(|each| each.0).collect();
    for asked in [EXPORT, ""] {
        let data = info_data(asked.as_bytes(), &[info::NAME]);
        let replies = ask(&mut nbd, option::INFO, &data);
        if replies[replies.len() - 1].kind != rep::ACK {
            assert_eq!(asked, "", "the export is there");
            continue;
        }
        for (kind, name) in told(&replies) {
            let name = String::from_utf8(name);
            let right = kind != info::NAME || listed.contains(name.as_ref().expect("UTF-8"));
            assert!(right, "{asked:?} is {name:?}, which is not in {listed:?}");
        }
    }
}

fn the_description_told_is_the_one_listed(peer: Peer) {
    let server = peer.serve();
    let mut nbd = server.connect();
    let listed = nbd.list().unwrap();
    let description = nbd.info(EXPORT).unwrap().description;
    assert_eq!(description.unwrap_or_default(), listed[0].1);
}

fn no_information_comes_twice(peer: Peer) {
    let server = peer.serve();
    let mut nbd = server.connect();
    let told = told(&ask(
        &mut nbd,
        option::INFO,
        &info_data(EXPORT.as_bytes(), &[0, 1, 2, 3]),
    ));
    let mut kinds: Vec<_> = told.iter().map(|(kind, _)| *kind).collect();
    kinds.sort_unstable();
    let count = kinds.len();
    kinds.dedup();
    assert_eq!(kinds.len(), count, "{told:?}");
}

fn the_empty_name_is_the_only_disk() {
    let server = Server::with_disk(SIZE);
    let mut nbd = RawNbd::connect(&server.live());
    assert_eq!(nbd.go("").unwrap().size, SIZE);
    nbd.write(0, &[1]).unwrap();
    assert_eq!(server.open_live("vda").read(0, 1), Ok(vec![1]));
    let mut nbd = RawNbd::connect(&server.live());
    assert_eq!(nbd.export_name("").unwrap().size, SIZE);

    let two = Server::builder().disk("vda", MIB).disk("vdb", MIB).start();
    assert_eq!(RawNbd::connect(&two.live()).go(""), Err(rep::ERR_UNKNOWN));
}

fn block_sizes_are_told_and_legal(peer: Peer) {
    for server in [peer.serve(), peer.serve_read_only()] {
        let [minimum, preferred, maximum] = server.block_sizes();
        let told = format!("{minimum}, {preferred}, {maximum}");
        assert!(minimum.is_power_of_two() && minimum <= 65536, "{told}");
        assert!(preferred.is_power_of_two(), "{told}");
        assert!(preferred >= minimum.max(512), "{told}");
        assert!(maximum >= preferred && maximum >= MIB as u32, "{told}");
        let data = info_data(EXPORT.as_bytes(), &[info::BLOCK_SIZE]);
        let replies = ask(&mut server.connect(), option::GO, &data);
        let is_told = replies.iter().find(|reply| reply.data.starts_with(&[0, 3]));
        assert!(is_told.is_none_or(|reply| reply.data.len() == 14));
        // Nobody has to tell those that may be presumed; we do.
        assert!(is_told.is_some() || peer != Peer::Stillpoint);
    }
}

fn nobody_has_to_ask_for_block_sizes(peer: Peer) {
    let server = peer.serve();
    let mut nbd = server.connect();
    told(&ask(&mut nbd, option::GO, &info_data(b"vda", &[])));
    let (sender, receiver) = nbd.halves();
    for (cookie, offset, length) in [(1, 511, 2), (2, 4095, 1), (3, SIZE - 1, 1), (4, 1, 8191)] {
        let bytes = vec![7; length as usize];
        sender
            .request((command::WRITE, 0), cookie, offset, length, &bytes)
            .unwrap();
        assert_eq!(receiver.answer().unwrap().error, 0, "{offset}+{length}");
    }
    let mut nbd = server.connect();
    nbd.export_name(EXPORT).expect("it is there");
    assert_eq!(nbd.read(SIZE - 2, 2), Ok(vec![0, 7]));
}

fn the_last_bytes_can_be_reached(peer: Peer) {
    let server = peer.serve_size(MIB + 512);
    let [minimum, ..] = server.block_sizes();
    let (last, size) = (u64::from(minimum), server.size());
    assert_eq!(size, MIB + 512);
    assert_eq!(size % last, 0, "{size} in blocks of {minimum}");
    let found = server.open().read(size - last, minimum);
    assert_eq!(found, Ok(vec![0; last as usize]));
}

fn flags_have_flags_and_no_extension(peer: Peer) {
    for server in [peer.serve(), peer.serve_read_only()] {
        let flags = server.structured().info(EXPORT).unwrap().flags;
        assert_eq!(flags & can::HAS_FLAGS, can::HAS_FLAGS);
        assert_eq!(flags & !0xfff, 0, "{flags:#x} has more than are known");
        assert_eq!(flags & 1 << 9, 0, "{flags:#x} has RESIZE");
    }
}

fn df_needs_structured_replies(peer: Peer) {
    let server = peer.serve();
    let mut nbd = server.connect();
    assert_eq!(nbd.info(EXPORT).unwrap().flags & can::DF, 0);
    nbd.structured_replies();
    assert_eq!(nbd.go(EXPORT).unwrap().flags & can::DF, can::DF);
    let mut nbd = server.connect();
    assert_eq!(nbd.export_name(EXPORT).unwrap().flags & can::DF, 0);
}

fn fast_zero_needs_write_zeroes(peer: Peer) {
    for server in [peer.serve(), peer.serve_read_only()] {
        let mut nbd = server.open();
        let flags = nbd.export().flags;
        let zeroes = flags & can::WRITE_ZEROES != 0;
        let fast = flags & can::FAST_ZERO != 0;
        assert!(zeroes || !fast, "{flags:#x}");
        let answer = nbd.zeroes(0, 4096, flag::FAST_ZERO);
        if fast {
            let fits = [Ok(()), Err(errno::ENOTSUP)];
            assert!(fits.contains(&answer), "{answer:?}");
        } else {
            assert!(answer.is_err(), "{flags:#x}: not offered, and taken");
        }
    }
}

fn what_is_offered_is_there(peer: Peer) {
    let server = peer.serve_size(GIB);
    let mut nbd = server.open();
    let flags = nbd.export().flags;
    let offered = |each: u16| flags & each == each;
    for (offer, request) in [
        (can::FLUSH, (command::FLUSH, 0)),
        (can::TRIM, (command::TRIM, 0)),
        (can::WRITE_ZEROES, (command::WRITE_ZEROES, 0)),
        (can::WRITE_ZEROES, (command::WRITE_ZEROES, flag::NO_HOLE)),
        (can::FUA | can::TRIM, (command::TRIM, flag::FUA)),
        (can::CACHE, (command::CACHE, 0)),
        (can::MULTI_CONN, (command::READ, 0)),
        (can::DF, (command::READ, flag::DF)),
    ] {
        // Nothing has to be offered; we do.
        assert!(offered(offer) || peer != Peer::Stillpoint, "{flags:#x}");
        let length = if request.0 == command::FLUSH { 0 } else { 4096 };
        let answer = nbd.call(request, 0, length, &[]);
        assert!(answer.error == 0 || !offered(offer), "{request:?}");
    }
}

fn read_only_is_told(peer: Peer) {
    let server = peer.serve_read_only();
    let flags = server.open().export().flags;
    assert_eq!(flags & can::READ_ONLY, can::READ_ONLY, "{flags:#x}");
    let changes = can::TRIM | can::WRITE_ZEROES | can::FAST_ZERO;
    assert_eq!(flags & changes, 0, "{flags:#x}");
    assert_eq!(peer.serve().open().export().flags & can::READ_ONLY, 0);
}

fn the_old_way_in_tells_the_same(peer: Peer) {
    for server in [peer.serve(), peer.serve_read_only()] {
        let go = server.connect().go(EXPORT).unwrap();
        let name = server.connect().export_name(EXPORT).unwrap();
        assert_eq!((name.size, name.flags), (go.size, go.flags));
    }
}
