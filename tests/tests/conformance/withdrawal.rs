//! An export, or the whole server, goes away under its clients.

use std::time::{Duration, Instant};

use rustix::process::Signal;
use stillpoint_tests::raw_nbd::{command, errno, option, rep};
use stillpoint_tests::{MIB, RawNbd, Server};

use crate::peer::SIZE;
use crate::rows::rows;

rows![
    (
        "withdrawal-1",
        "Terminating the transmission phase",
        "At a stop, what was taken in is answered before the connection is closed",
        Ours(what_was_taken_in_is_answered_at_a_stop)
    ),
    (
        "withdrawal-2",
        "Terminating the transmission phase; Termination of the session during option haggling",
        "At a stop, clients that are idle or in mid-handshake are told or cut off within a second",
        Ours(nobody_waits_for_a_server_that_stops)
    ),
    (
        "withdrawal-3",
        "Error values; Terminating the transmission phase",
        "When a backup ends, requests on open connections are ESHUTDOWN, and the connection goes on",
        Ours(an_export_that_has_ended_says_so)
    ),
    (
        "withdrawal-4",
        "Error values",
        "When a backup breaks, requests on open connections are EIO, and the connection goes on",
        Ours(an_export_that_is_broken_says_so)
    ),
    (
        "withdrawal-5",
        "NBD_REP_ERR_UNKNOWN",
        "An export that went away during the haggling is ERR_UNKNOWN",
        Ours(an_export_that_went_away_is_unknown)
    ),
    (
        "withdrawal-6",
        "Termination of the session during option haggling; NBD_REP_ERR_SHUTDOWN",
        "At a stop, further options are ERR_SHUTDOWN, the rest of one that is under way too, and \
         an ABORT is acknowledged",
        Ours(what_is_asked_at_a_stop_is_told_so)
    ),
    (
        "withdrawal-7",
        "Terminating the transmission phase",
        "At a stop, what is asked of a backup is ESHUTDOWN, until its client says good-bye",
        Ours(what_is_asked_of_a_backup_at_a_stop_is_eshutdown)
    ),
];

fn server_with_backup() -> Server {
    let server = Server::with_disk(SIZE);
    let mut guest = server.open_live("vda");
    guest.write(0, &vec![1; MIB as usize]).unwrap();
    server.checkpoint("cp1");
    server.begin("b1", &["--since", "cp1", "--scratch-limit", "64k"]);
    server
}

const EXPORTS: [&str; 4] = ["vda@b1", "vda", "", "vda@cp1..b1"];

fn what_was_taken_in_is_answered_at_a_stop() {
    let mut server = server_with_backup();
    let (mut sender, mut receiver) = server.open_live("vda").split();
    let mut other = server.open_live("vda");
    for cookie in 0..64 {
        let at = cookie * 4096;
        sender
            .request((command::WRITE, 0), cookie, at, 4096, &[9; 4096])
            .unwrap();
    }
    // Then the last has been taken in.
    while other.read(63 * 4096, 1) != Ok(vec![9]) {}
    server.signal(Signal::TERM);
    for _ in 0..64 {
        assert_eq!(receiver.answer().expect("an answer").error, 0);
    }
    assert!(receiver.answer().is_err(), "the server hangs up");
    assert!(server.wait().success());
}

fn what_is_asked_of_a_backup_at_a_stop_is_eshutdown() {
    let mut server = server_with_backup();
    let mut nbd = server.open_frozen("vda@b1", &["base:allocation"]);
    nbd.read(0, 512).unwrap();
    server.signal(Signal::TERM);
    // The workers hear of it later.
    while nbd.read(0, 512).is_ok() {}
    assert_eq!(nbd.read(0, 512), Err(errno::ESHUTDOWN));
    assert_eq!(nbd.block_status(0, 512, 0), Err(errno::ESHUTDOWN));
    assert_eq!(nbd.write(0, &[1; 4096]), Err(errno::ESHUTDOWN));
    nbd.disconnect();
    assert!(server.wait().success());
}

fn nobody_waits_for_a_server_that_stops() {
    let mut server = server_with_backup();
    let mut idle = [server.open_live("vda"), server.open_frozen("vda@b1", &[])];
    let mut haggling = [
        RawNbd::connect(&server.live()),
        RawNbd::connect(&server.frozen()),
    ];
    haggling[0].structured_replies();
    let mut silent = RawNbd::connect_silently(&server.frozen());
    silent.receive_raw(18).expect("a greeting");
    let begun = Instant::now();
    server.signal(Signal::TERM);
    for nbd in idle.iter_mut().chain(&mut haggling).chain([&mut silent]) {
        assert!(nbd.is_closed(), "the server says something unasked");
    }
    let took = begun.elapsed();
    assert!(took < Duration::from_secs(5), "{took:?}");
    assert!(server.wait().success());
}

fn what_is_asked_at_a_stop_is_told_so() {
    let mut server = server_with_backup();
    let mut nbd = RawNbd::connect(&server.frozen());
    let mut other = RawNbd::connect(&server.live());
    let half_said = [&b"IHAVEOPT\0\0\0\x07\0\0\0\x06\0\0"[..], &[0; 4]].concat();
    other.send_raw(&half_said[..17]).unwrap();
    server.signal(Signal::TERM);
    server.wait_for_log("stopping", 1);
    // The log says it before the workers know.
    while let Ok(none) = nbd.option(option::STRUCTURED_REPLY, &[]) {
        assert!(none.is_empty());
    }
    for option in [option::LIST, option::GO, option::STARTTLS, 99] {
        let refused = nbd.option(option, &half_said);
        assert_eq!(refused, Err(rep::ERR_SHUTDOWN), "option {option}");
    }
    assert_eq!(nbd.option(option::ABORT, &[]), Ok(vec![]));
    assert!(nbd.is_closed());
    other.send_raw(&half_said[17..]).unwrap();
    let reply = other.option_reply().expect("a reply");
    assert_eq!((reply.option, reply.kind), (option::GO, rep::ERR_SHUTDOWN));
    assert!(other.is_closed(), "who does not leave is left");
    assert!(server.wait().success());
}

fn an_export_that_has_ended_says_so() {
    for end in [Server::commit, Server::abort] {
        let server = server_with_backup();
        let context = ["base:allocation"];
        let mut open = EXPORTS.map(|export| server.open_frozen(export, &context));
        end(&server, "b1");
        for (nbd, export) in open.iter_mut().zip(EXPORTS) {
            assert_eq!(nbd.read(0, 512), Err(errno::ESHUTDOWN), "{export:?}");
            assert_eq!(nbd.cache(0, 512), Err(errno::ESHUTDOWN), "{export:?}");
            let status = nbd.block_status(0, 512, 0);
            assert_eq!(status, Err(errno::ESHUTDOWN), "{export:?}");
        }
        for nbd in open {
            nbd.disconnect();
        }
    }
}

fn an_export_that_is_broken_says_so() {
    let server = server_with_backup();
    let context = ["base:allocation"];
    let mut open = EXPORTS.map(|export| server.open_frozen(export, &context));
    let mut guest = server.open_live("vda");
    guest.write(0, &vec![2; MIB as usize]).unwrap();
    for (nbd, export) in open.iter_mut().zip(EXPORTS) {
        assert_eq!(nbd.read(0, 512), Err(errno::EIO), "{export:?}");
        assert_eq!(nbd.cache(0, 512), Err(errno::EIO), "{export:?}");
        assert_eq!(nbd.block_status(0, 512, 0), Err(errno::EIO), "{export:?}");
    }
    for nbd in open {
        nbd.disconnect();
    }
}

fn an_export_that_went_away_is_unknown() {
    let server = server_with_backup();
    let mut nbd = RawNbd::connect(&server.frozen());
    nbd.info("vda@b1").unwrap();
    server.abort("b1");
    for export in EXPORTS {
        assert_eq!(nbd.info(export), Err(rep::ERR_UNKNOWN), "{export:?}");
        assert_eq!(nbd.go(export), Err(rep::ERR_UNKNOWN), "{export:?}");
    }
}
