//! From the greeting to the end of the haggling.

use std::os::unix::fs::MetadataExt as _;
use std::process::{Command, Stdio};

use stillpoint_tests::process::KilledOnDrop;
use stillpoint_tests::raw_nbd::{can, command, errno, flag, info, option, rep};
use stillpoint_tests::tools::path;
use stillpoint_tests::{MIB, RawNbd, Server};

use crate::peer::{EXPORT, Peer};
use crate::rows::rows;
use crate::talk::{ask, haggles_on, in_step, info_data, request, verdict};

rows![
    (
        "handshake-1",
        "Newstyle negotiation; Handshake flags",
        "The server greets with both magic numbers and sets FIXED_NEWSTYLE and NO_ZEROES, and no \
         other flag",
        Any(the_greeting_is_fixed_newstyle)
    ),
    (
        "handshake-2",
        "Client flags",
        "A client that sets a flag which was not offered loses the connection",
        Any(unknown_client_flags_end_the_connection)
    ),
    (
        "handshake-3",
        "Newstyle negotiation; Client flags",
        "A client that does not know fixed newstyle can enter an export by its name",
        Any(a_client_without_fixed_newstyle_enters_by_name)
    ),
    (
        "handshake-4",
        "Newstyle negotiation; NBD_FLAG_C_NO_ZEROES",
        "124 zeroes follow the answer to EXPORT_NAME, unless they were declined",
        Any(the_padding_after_an_export_name_can_be_declined)
    ),
    (
        "handshake-5",
        "Newstyle negotiation; NBD_OPT_EXPORT_NAME",
        "An EXPORT_NAME that cannot be had ends the session",
        Any(an_export_name_that_is_unknown_ends_the_session)
    ),
    (
        "handshake-6",
        "Fixed newstyle negotiation",
        "Every reply to an option has the magic of replies, the number of the option as it was \
         sent, and the length of its data",
        Any(replies_name_the_option_that_they_answer)
    ),
    (
        "handshake-7",
        "Termination of the session during option haggling",
        "An option that fails is answered with an error, and the haggling goes on",
        Any(refused_options_do_not_end_the_session)
    ),
    (
        "handshake-8",
        "Termination of the session during option haggling; NBD_OPT_ABORT",
        "A client that aborts gets its acknowledgement, and one that does not wait for it does no \
         harm",
        Any(an_abort_is_acknowledged_whether_or_not_anyone_listens)
    ),
    (
        "handshake-9",
        "Baseline",
        "INFO, GO, ABORT and LIST are there, and so are READ, WRITE and DISC with simple replies",
        Any(the_baseline_is_there)
    ),
    (
        "handshake-10",
        "Maximum interoperability",
        "EXPORT_NAME is there beside GO, and FLUSH and FUA are",
        Any(what_older_clients_need_is_there)
    ),
    (
        "handshake-11",
        "NOTLS mode",
        "Where there is no TLS, STARTTLS gets an error that is not TLS_REQD, and so does nothing \
         else get TLS_REQD",
        Any(without_tls_nobody_is_sent_there)
    ),
    (
        "handshake-12",
        "Protocol phases",
        "Nagle's algorithm is off on TCP connections",
        Ours(tcp_connections_have_no_delay)
    ),
    (
        "handshake-13",
        "Fixed newstyle negotiation",
        "A message may come in any pieces, and what follows the end of the handshake in the same \
         packet is the first request",
        Any(a_whole_session_may_come_in_one_packet_or_in_bytes)
    ),
    (
        "handshake-14",
        "Fixed newstyle negotiation",
        "What is no option ends that session, and no other",
        Any(what_is_no_option_ends_the_session_alone)
    ),
    (
        "handshake-15",
        "Termination of the session during option haggling",
        "Four GiB announced as the data of an option are a denial of service, and end the session; \
         ours says ERR_TOO_BIG before",
        Any(an_absurd_option_ends_the_session_alone)
    ),
];

fn the_greeting_is_fixed_newstyle(peer: Peer) {
    let server = peer.serve();
    let mut nbd = RawNbd::connect_silently(server.socket());
    let greeting = nbd.receive_raw(18).expect("a greeting");
    assert_eq!(&greeting[..16], b"NBDMAGICIHAVEOPT");
    assert_eq!(greeting[16..], [0, 3]);
}

fn unknown_client_flags_end_the_connection(peer: Peer) {
    let server = peer.serve();
    for flags in [1u32 << 2, 3 | 1 << 9, 1 << 31] {
        let mut nbd = RawNbd::connect_silently(server.socket());
        nbd.receive_raw(18).expect("a greeting");
        nbd.send_raw(&flags.to_be_bytes()).unwrap();
        // Whoever goes on in spite of it has something to say to this.
        let _ = nbd.send_raw(b"IHAVEOPT\0\0\0\x03\0\0\0\0");
        assert!(nbd.is_closed(), "flags {flags:#x} are accepted");
    }
    server.is_well();
}

fn a_client_without_fixed_newstyle_enters_by_name(peer: Peer) {
    let server = peer.serve();
    let mut nbd = RawNbd::connect_silently(server.socket());
    nbd.receive_raw(18).expect("a greeting");
    nbd.send_raw(&0u32.to_be_bytes()).unwrap();
    let export = nbd.export_name(EXPORT).expect("the export");
    assert_eq!(export.size, server.size());
    assert_eq!(nbd.receive_raw(124).unwrap(), [0; 124]);
    in_step(&mut nbd);
}

fn the_padding_after_an_export_name_can_be_declined(peer: Peer) {
    let server = peer.serve();
    for (flags, padding) in [(3u32, 0), (2, 0), (1, 124), (0, 124)] {
        let mut nbd = RawNbd::connect_silently(server.socket());
        nbd.receive_raw(18).expect("a greeting");
        nbd.send_raw(&flags.to_be_bytes()).unwrap();
        let export = nbd.export_name(EXPORT).expect("the export");
        assert_eq!(export.size, server.size(), "flags {flags}");
        assert_eq!(nbd.receive_raw(padding).unwrap(), vec![0; padding]);
        in_step(&mut nbd);
    }
}

fn an_export_name_that_is_unknown_ends_the_session(peer: Peer) {
    let server = peer.serve();
    for name in [&b"nothing"[..], b"vda\0", b"\xff", &[b'x'; 4097]] {
        let mut nbd = server.connect();
        nbd.send_option(option::EXPORT_NAME, name);
        let shown = String::from_utf8_lossy(&name[..name.len().min(8)]).into_owned();
        assert!(nbd.is_closed(), "there was an answer to {shown:?}");
    }
    server.is_well();
}

fn replies_name_the_option_that_they_answer(peer: Peer) {
    let server = peer.serve();
    let mut nbd = server.connect();
    for option in [option::LIST, option::STARTTLS, 99, u32::MAX] {
        // The magic is asserted, and that each length is right, by what is found after it.
        ask(&mut nbd, option, &[]);
    }
    haggles_on(&mut nbd);
}

fn refused_options_do_not_end_the_session(peer: Peer) {
    let server = peer.serve();
    let mut nbd = server.connect();
    for (option, data) in [
        (option::GO, info_data(b"nothing", &[])),
        (option::GO, vec![]),
        (option::GO, info_data(b"vda\0", &[])),
        (option::INFO, vec![255; 100]),
        (option::LIST, vec![1]),
        (option::SET_META_CONTEXT, vec![]),
        (option::STARTTLS, vec![1, 2, 3]),
        (12345, vec![0; 1000]),
    ] {
        let kind = verdict(&mut nbd, option, &data);
        assert!(kind & 1 << 31 != 0, "option {option} {data:?}: {kind:#x}");
    }
    haggles_on(&mut nbd);
}

fn an_abort_is_acknowledged_whether_or_not_anyone_listens(peer: Peer) {
    let server = peer.serve();
    let mut nbd = server.connect();
    let replies = ask(&mut nbd, option::ABORT, &[]);
    assert_eq!((replies.len(), replies[0].kind), (1, rep::ACK));
    assert!(nbd.is_closed());
    let mut nbd = server.connect();
    nbd.send_option(option::ABORT, &[]);
    nbd.hang_up();
    server.is_well();
}

fn the_baseline_is_there(peer: Peer) {
    let server = peer.serve();
    let mut nbd = server.connect();
    assert!(nbd.list().is_ok());
    assert_eq!(nbd.info(EXPORT).expect("it is there").size, server.size());
    nbd.go(EXPORT).expect("it is there");
    nbd.write(512, &[7; 1024]).unwrap();
    assert_eq!(nbd.read(0, 2048).unwrap()[512..1536], [7; 1024]);
    let mut nbd = server.connect();
    assert_eq!(verdict(&mut nbd, option::ABORT, &[]), rep::ACK);
}

fn what_older_clients_need_is_there(peer: Peer) {
    let server = peer.serve();
    let mut nbd = server.connect();
    let export = nbd.export_name(EXPORT).expect("it is there");
    let durable = can::FLUSH | can::FUA;
    assert_eq!(export.flags & durable, durable, "{:#x}", export.flags);
    assert_eq!(nbd.flush(), Ok(()));
    let forced = nbd.call((command::WRITE, flag::FUA), 0, 512, &[1; 512]);
    assert_eq!(forced.error, 0);
    assert_eq!(nbd.read(server.size(), 512), Err(errno::EINVAL));
}

fn without_tls_nobody_is_sent_there(peer: Peer) {
    const TLS_REQD: u32 = 1 << 31 | 5;
    let server = peer.serve();
    let mut nbd = server.connect();
    for (option, data) in [
        (option::STARTTLS, vec![]),
        (option::STARTTLS, vec![1]),
        (option::INFO, info_data(b"nothing", &[info::NAME])),
        (option::GO, info_data(b"nothing", &[])),
        (99, vec![]),
    ] {
        let kind = verdict(&mut nbd, option, &data);
        assert!(
            kind & 1 << 31 != 0 && kind != TLS_REQD,
            "option {option}: {kind:#x}"
        );
    }
    haggles_on(&mut nbd);
}

fn tcp_connections_have_no_delay() {
    let server = Server::builder()
        .disk("vda", MIB)
        .arg("--live-listen=tcp:127.0.0.1:0")
        .start();
    let log = server.path("options");
    let mut strace = Command::new("strace");
    strace.args(["-f", "-e", "trace=setsockopt", "-o", path(&log)]);
    strace.arg(format!("--attach={}", server.pid()));
    let mut strace = KilledOnDrop::spawn(strace.stderr(Stdio::piped()));
    let told = strace.child.stderr.take().expect("it was asked for");
    strace.wait_until_readable(&told);
    let disks = server.cli_json(&["status"]);
    let uris = disks["disks"][0]["live_uris"].as_array().expect("uris");
    let mut uris = uris.iter().filter_map(|uri| uri.as_str());
    let uri = uris.find(|uri| uri.starts_with("nbd://"));
    let uri = uri.expect("one of TCP").to_owned();
    let info = stillpoint_tests::tools::tool("nbdinfo", &["--size", &uri]);
    assert_eq!(info.ok().trim(), MIB.to_string());
    drop(strace);
    assert!(log.metadata().expect("a log").size() > 0);
    let log = std::fs::read_to_string(&log).expect("a log");
    assert!(log.contains("TCP_NODELAY, [1], 4) = 0"), "{log}");
}

fn a_whole_session_may_come_in_one_packet_or_in_bytes(peer: Peer) {
    let server = peer.serve();
    server.open().write(0, b"abc").unwrap();
    let go = info_data(EXPORT.as_bytes(), &[]);
    let mut words = 3u32.to_be_bytes().to_vec();
    words.extend(b"IHAVEOPT\0\0\0\x07\0\0\0");
    words.push(go.len() as u8);
    words.extend(go);
    words.extend(request((command::READ, 0), 7, (0, 4), &[]));
    for piece in [words.len(), 1] {
        let mut nbd = RawNbd::connect_silently(server.socket());
        for bytes in words.chunks(piece) {
            nbd.send_raw(bytes).unwrap();
        }
        nbd.receive_raw(18).expect("a greeting");
        while nbd.option_reply().expect("replies").kind != rep::ACK {}
        let mut expected = 0x6744_6698u32.to_be_bytes().to_vec();
        expected.extend([0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 7, b'a', b'b', b'c', 0]);
        assert_eq!(nbd.receive_raw(20).unwrap(), expected, "{piece} at a time");
    }
}

fn what_is_no_option_ends_the_session_alone(peer: Peer) {
    let server = peer.serve();
    let mut other = server.open();
    for garbage in [&b"GET / HTTP/1.1\r\n\r\n"[..], &[0; 64], &[255; 64]] {
        let mut nbd = server.connect();
        nbd.send_raw(garbage).unwrap();
        assert!(nbd.is_closed(), "{garbage:?}");
    }
    in_step(&mut other);
}

fn an_absurd_option_ends_the_session_alone(peer: Peer) {
    let server = peer.serve();
    let mut other = server.open();
    for option in [option::GO, option::LIST, 99] {
        let mut nbd = server.connect();
        let header = [&b"IHAVEOPT"[..], &option.to_be_bytes(), &[255; 4]].concat();
        nbd.send_raw(&header).unwrap();
        if let Ok(reply) = nbd.option_reply() {
            assert_eq!((reply.option, reply.kind), (option, rep::ERR_TOO_BIG));
        } else {
            assert_ne!(peer, Peer::Stillpoint, "option {option}: no answer");
        }
        assert!(nbd.is_closed(), "option {option} of 4 GiB");
    }
    in_step(&mut other);
}
