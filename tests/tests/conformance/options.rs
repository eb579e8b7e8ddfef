//! Options, and what is answered to them.

use stillpoint_tests::raw_nbd::{OptionReply, info, option, rep};

use crate::peer::{EXPORT, Peer};
use crate::rows::rows;
use crate::talk::{ask, context_data, haggles_on, info_data, is_error, verdict};

rows![
    (
        "options-1",
        "Baseline; NBD_REP_ERR_UNSUP",
        "An unknown option gets ERR_UNSUP, its data is read past, and the next option is understood",
        Any(unknown_options_are_drained_and_declined)
    ),
    (
        "options-2",
        "NBD_REP_ACK",
        "An acknowledgement carries no data",
        Any(acknowledgements_are_empty)
    ),
    (
        "options-3",
        "NBD_OPT_ABORT",
        "ABORT is acknowledged, and data that came with it are ignored",
        Any(data_of_an_abort_are_ignored)
    ),
    (
        "options-4",
        "NBD_OPT_LIST; NBD_REP_SERVER",
        "LIST names each export, in replies that are well formed, and ends with an acknowledgement",
        Any(a_list_names_what_can_be_entered)
    ),
    (
        "options-5",
        "NBD_OPT_LIST",
        "LIST with data is ERR_INVALID",
        Any(a_list_takes_no_data)
    ),
    (
        "options-6",
        "NBD_OPT_STRUCTURED_REPLY",
        "STRUCTURED_REPLY is acknowledged",
        Any(structured_replies_can_be_had)
    ),
    (
        "options-7",
        "NBD_OPT_STRUCTURED_REPLY",
        "STRUCTURED_REPLY with data is ERR_INVALID, and is then not negotiated",
        Any(structured_replies_take_no_data)
    ),
    (
        "options-8",
        "Fixed newstyle negotiation",
        "STRUCTURED_REPLY a second time is acknowledged or ERR_INVALID, and stays negotiated",
        Any(structured_replies_may_be_asked_for_twice)
    ),
    (
        "options-9",
        "Option reply types",
        "An error has bit 31 set, and its data is a text that can be shown: UTF-8 without NUL, of \
         at most 4096 bytes",
        Any(errors_come_with_a_text_or_nothing)
    ),
    (
        "options-10",
        "Conventions",
        "A name with NUL, of bad UTF-8 or of more than 4096 bytes is refused, and not echoed",
        Any(what_is_no_string_is_refused_and_not_echoed)
    ),
    (
        "options-11",
        "NBD_OPT_INFO and NBD_OPT_GO",
        "INFO or GO of which the lengths do not add up is ERR_INVALID",
        Any(questions_that_do_not_add_up_are_invalid)
    ),
    (
        "options-12",
        "NBD_REP_ERR_TOO_BIG",
        "More data than an option can mean something with is read past, and the haggling goes on",
        Any(options_that_are_too_long_are_drained)
    ),
    (
        "options-13",
        "NBD_OPT_EXPORT_NAME; Conventions",
        "Names of up to 4096 bytes are understood, if only to say that there is no such export",
        Any(the_longest_name_is_understood)
    ),
];

fn unknown_options_are_drained_and_declined(peer: Peer) {
    let server = peer.serve();
    let mut nbd = server.connect();
    // The last has options for data.
    let options = b"IHAVEOPT\0\0\0\x02\0\0\0\0".repeat(100);
    for option in [0, 4, 99, u32::MAX] {
        for data in [&[][..], &[0; 1000], &options] {
            let replies = ask(&mut nbd, option, data);
            assert_eq!(replies.len(), 1, "option {option}");
            assert_eq!(replies[0].kind, rep::ERR_UNSUP, "option {option}");
        }
    }
    haggles_on(&mut nbd);
}

fn acknowledgements_are_empty(peer: Peer) {
    let server = peer.serve();
    let mut nbd = server.connect();
    let none = context_data(EXPORT.as_bytes(), &[]);
    for (option, data) in [
        (option::LIST, vec![]),
        (option::STRUCTURED_REPLY, vec![]),
        (option::INFO, info_data(EXPORT.as_bytes(), &[])),
        (option::LIST_META_CONTEXT, none.clone()),
        (option::SET_META_CONTEXT, none),
        (option::GO, info_data(EXPORT.as_bytes(), &[])),
    ] {
        let replies = ask(&mut nbd, option, &data);
        let last = replies.last().expect("there is one");
        assert_eq!(last.kind, rep::ACK, "option {option}");
        assert_eq!(last.data, [0; 0], "option {option}");
    }
    let mut nbd = server.connect();
    assert_eq!(ask(&mut nbd, option::ABORT, &[])[0].data, [0; 0]);
}

fn data_of_an_abort_are_ignored(peer: Peer) {
    let server = peer.serve();
    let mut nbd = server.connect();
    assert_eq!(verdict(&mut nbd, option::ABORT, b"bye"), rep::ACK);
    assert!(nbd.is_closed());
}

fn a_list_names_what_can_be_entered(peer: Peer) {
    let server = peer.serve();
    let mut nbd = server.connect();
    let replies = ask(&mut nbd, option::LIST, &[]);
    let (last, exports) = replies.split_last().expect("there is one");
    assert_eq!((last.kind, exports.len()), (rep::ACK, 1));
    for export in exports {
        assert_eq!(export.kind, rep::SERVER);
        let (length, rest) = export.data.split_at(4);
        let length = u32::from_be_bytes(length.try_into().expect("four bytes"));
        assert!(length as usize <= rest.len(), "{export:?}");
        let name = str::from_utf8(&rest[..length as usize]).expect("UTF-8");
        assert_eq!(name, EXPORT);
        server.connect().go(name).expect("what is listed is there");
    }
}

fn a_list_takes_no_data(peer: Peer) {
    let server = peer.serve();
    let mut nbd = server.connect();
    assert_eq!(verdict(&mut nbd, option::LIST, b"data"), rep::ERR_INVALID);
    haggles_on(&mut nbd);
}

fn structured_replies_can_be_had(peer: Peer) {
    let server = peer.serve();
    let mut nbd = server.structured();
    nbd.go(EXPORT).unwrap();
    // The reader of replies asserts that a read is not answered by a simple one.
    assert_eq!(nbd.read(0, 512), Ok(vec![0; 512]));
}

fn structured_replies_take_no_data(peer: Peer) {
    let server = peer.serve();
    let mut nbd = server.connect();
    let kind = verdict(&mut nbd, option::STRUCTURED_REPLY, b"x");
    assert_eq!(kind, rep::ERR_INVALID);
    // Neither does the reader take chunks now.
    haggles_on(&mut nbd);
}

fn structured_replies_may_be_asked_for_twice(peer: Peer) {
    let server = peer.serve();
    let mut nbd = server.structured();
    let kind = verdict(&mut nbd, option::STRUCTURED_REPLY, &[]);
    assert!([rep::ACK, rep::ERR_INVALID].contains(&kind), "{kind:#x}");
    haggles_on(&mut nbd);
}

fn errors_come_with_a_text_or_nothing(peer: Peer) {
    let server = peer.serve();
    let mut nbd = server.connect();
    for (option, data) in [
        (option::INFO, info_data(b"nothing", &[])),
        (option::GO, info_data(&[b'x'; 4096], &[])),
        (
            option::INFO,
            info_data("\u{e9}".repeat(2000).as_bytes(), &[]),
        ),
        (option::GO, vec![]),
        (option::LIST, vec![1]),
        (option::STARTTLS, vec![]),
        (option::SET_META_CONTEXT, context_data(b"vda", &[])),
        (99, vec![]),
    ] {
        let last = ask(&mut nbd, option, &data).pop().expect("there is one");
        assert!(is_error(last.kind), "option {option}: {:#x}", last.kind);
        is_a_string(&last);
    }
}

#[track_caller]
fn is_a_string(reply: &OptionReply) {
    assert!(reply.data.len() <= 4096, "{} bytes", reply.data.len());
    let text = str::from_utf8(&reply.data).expect("UTF-8");
    assert!(!text.contains('\0'), "{text:?}");
}

fn what_is_no_string_is_refused_and_not_echoed(peer: Peer) {
    let server = peer.serve();
    let mut nbd = server.structured();
    let long = [b'x'; 4097];
    for name in [&b"vda\0"[..], b"v\0da", b"\xffvda", b"vda\xc3", &long] {
        let contexts = context_data(name, &[b"base:allocation"]);
        for (option, data) in [
            (option::INFO, info_data(name, &[info::NAME])),
            (option::GO, info_data(name, &[info::NAME])),
            (option::LIST_META_CONTEXT, contexts.clone()),
            (option::SET_META_CONTEXT, contexts),
        ] {
            let replies = ask(&mut nbd, option, &data);
            let shown = String::from_utf8_lossy(&name[..name.len().min(8)]).into_owned();
            assert_eq!(replies.len(), 1, "option {option}, {shown:?}");
            let refused = &replies[0];
            assert!(
                is_error(refused.kind),
                "option {option}, {shown:?} is there"
            );
            is_a_string(refused);
            assert!(
                !refused.data.windows(name.len()).any(|part| part == name),
                "option {option}, {shown:?} is echoed"
            );
        }
    }
    haggles_on(&mut nbd);
}

fn questions_that_do_not_add_up_are_invalid(peer: Peer) {
    let server = peer.serve();
    let mut nbd = server.connect();
    let mut trailing = info_data(b"vda", &[info::NAME]);
    trailing.push(0);
    let cases: [&[u8]; 7] = [
        b"",
        b"\0\0\0",
        b"\0\0\0\x09v\0\0",
        b"\xff\xff\xff\xffvda\0\0",
        b"\0\0\0\x03vda",
        b"\0\0\0\x03vda\0\x09\0\x01",
        &trailing,
    ];
    for option in [option::INFO, option::GO] {
        for data in cases {
            let kind = verdict(&mut nbd, option, data);
            assert_eq!(
                kind,
                rep::ERR_INVALID,
                "option {option}, {data:?}: {kind:#x}"
            );
        }
    }
    haggles_on(&mut nbd);
}

fn options_that_are_too_long_are_drained(peer: Peer) {
    let server = peer.serve();
    let mut nbd = server.structured();
    for option in [
        option::LIST,
        option::INFO,
        option::GO,
        option::SET_META_CONTEXT,
        99,
    ] {
        let kind = verdict(&mut nbd, option, &vec![255; 100_000]);
        assert!(is_error(kind), "option {option}: {kind:#x}");
    }
    haggles_on(&mut nbd);
}

fn the_longest_name_is_understood(peer: Peer) {
    let server = peer.serve();
    let mut nbd = server.connect();
    for name in ["x".repeat(256), "x".repeat(4096), "\u{e9}".repeat(2048)] {
        let replies = ask(&mut nbd, option::INFO, &info_data(name.as_bytes(), &[]));
        let kinds: Vec<_> = replies.iter().map(|reply| reply.kind).collect();
        assert_eq!(kinds, [rep::ERR_UNKNOWN], "{} bytes", name.len());
    }
    haggles_on(&mut nbd);
}
