//! Requests and replies as messages, whatever they are about.

use std::collections::BTreeSet;
use std::io::{Read as _, Write as _};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;

use stillpoint_tests::killer::Killer;
use stillpoint_tests::raw_nbd::{command, errno};
use stillpoint_tests::{MIB, Server};

use crate::peer::{EXPORT, Peer, SIZE};
use crate::rows::rows;
use crate::talk::{in_step, request};

rows![
    (
        "transmission-1",
        "Transmission",
        "Every reply has the cookie of its request, whatever it is",
        Any(cookies_come_back_as_they_were)
    ),
    (
        "transmission-2",
        "Transmission",
        "Each of many requests in flight is answered once",
        Any(many_in_flight_are_each_answered_once)
    ),
    (
        "transmission-3",
        "NBD_CMD_DISC; Terminating the transmission phase",
        "DISC is not answered; what is outstanding is, and then the connection is closed",
        Any(what_is_outstanding_at_a_good_bye_is_answered)
    ),
    (
        "transmission-4",
        "Size constraints",
        "A payload of 32 MiB is taken, and sent, whatever the size told as the largest",
        Any(thirty_two_mib_go_both_ways)
    ),
    (
        "transmission-5",
        "Size constraints",
        "A write that is longer than the largest payload is an error, changes nothing, and its \
         payload is read past",
        Any(a_payload_that_is_too_long_is_read_past)
    ),
    (
        "transmission-6",
        "Request message",
        "What is no request ends that connection, and no other",
        Any(what_is_no_request_ends_the_connection_alone)
    ),
    (
        "transmission-7",
        "Request message",
        "A payload of 4 GiB is a denial of service, and ends the connection",
        Any(an_absurd_payload_ends_the_connection_alone)
    ),
    (
        "transmission-8",
        "Transmission",
        "What is ready does not wait for what is not",
        Ours(what_is_ready_does_not_wait)
    ),
    (
        "transmission-9",
        "Terminating the transmission phase",
        "A client that stops sending and still listens gets its answers: more than the protocol asks for",
        Ours(a_client_that_has_said_all_is_answered)
    ),
];

fn cookies_come_back_as_they_were(peer: Peer) {
    let server = peer.serve();
    for mut nbd in [server.open(), server.open_simple()] {
        let (sender, receiver) = nbd.halves();
        for cookie in [0, 1, u64::MAX, 0x0102_0304_0506_0708] {
            for (command, length) in [(command::READ, 512), (command::FLUSH, 0), (99, 0)] {
                sender
                    .request((command, 0), cookie, 0, length, &[])
                    .unwrap();
                assert_eq!(receiver.answer().unwrap().cookie, cookie);
            }
        }
    }
}

fn many_in_flight_are_each_answered_once(peer: Peer) {
    let server = peer.serve();
    let mut nbd = server.open();
    let (sender, receiver) = nbd.halves();
    let mut expected = BTreeSet::new();
    for number in 0..400u64 {
        let (command, payload) = match number % 5 {
            0 | 1 => (command::READ, &[][..]),
            2 | 3 => (command::WRITE, &[7; 3000][..]),
            _ => (command::BLOCK_STATUS, &[][..]),
        };
        let cookie = number << 40 | 5;
        let offset = number * 7919 % (SIZE - 3000);
        sender
            .request((command, 0), cookie, offset, 3000, payload)
            .unwrap();
        expected.insert(cookie);
        // So that neither side waits for the other with full buffers.
        while expected.len() >= 16 || number == 399 && !expected.is_empty() {
            let answer = receiver.answer().unwrap();
            assert_eq!(answer.error, 0);
            assert!(expected.remove(&answer.cookie), "answered twice");
        }
    }
    in_step(&mut nbd);
}

fn what_is_outstanding_at_a_good_bye_is_answered(peer: Peer) {
    let server = peer.serve();
    let (mut sender, mut receiver) = server.open().split();
    for cookie in 1..=64 {
        sender
            .request((command::WRITE, 0), cookie, cookie * 4096, 4096, &[1; 4096])
            .unwrap();
    }
    sender.disconnect().unwrap();
    let answers: Vec<_> = (0..64).map_while(|_| receiver.answer().ok()).collect();
    assert_eq!(answers.len(), 64, "not everything is answered");
    assert!(receiver.answer().is_err(), "the server hangs up");
    let mut nbd = server.open();
    for answer in answers {
        assert_eq!(answer.error, 0, "what is outstanding is given up");
        assert_eq!(nbd.read(answer.cookie * 4096, 4096), Ok(vec![1; 4096]));
    }
}

fn thirty_two_mib_go_both_ways(peer: Peer) {
    const LENGTH: usize = 32 << 20;
    let server = peer.serve_size(64 * MIB);
    for mut nbd in [server.open(), server.open_simple()] {
        nbd.write(1, &vec![5; LENGTH]).unwrap();
        assert!(nbd.read(1, LENGTH as u32).unwrap() == vec![5; LENGTH]);
    }
}

fn a_payload_that_is_too_long_is_read_past(peer: Peer) {
    let server = peer.serve_size(64 * MIB);
    let mut nbd = server.open();
    let [.., maximum] = server.block_sizes();
    let payload = vec![6; maximum as usize + 1];
    let (sender, receiver) = nbd.halves();
    let sent = sender.request((command::WRITE, 0), 1, 0, maximum + 1, &payload);
    sent.expect("the payload is taken");
    let error = receiver.answer().expect("an answer").error;
    // Others may be able to take it.
    let is_taken = error == 0 && peer != Peer::Stillpoint;
    assert!(is_taken || error == errno::EINVAL, "error {error}");
    let byte = if is_taken { 6 } else { 0 };
    assert_eq!(nbd.read(0, 1), Ok(vec![byte]));
    in_step(&mut nbd);
}

fn what_is_no_request_ends_the_connection_alone(peer: Peer) {
    let server = peer.serve();
    let mut other = server.open();
    let mut extended = 0x21e4_1c71u32.to_be_bytes().to_vec();
    extended.extend([0; 28]);
    for garbage in [
        &[0; 28][..],
        b"GET / HTTP/1.1\r\nHost: there\r\n\r\n",
        &extended,
    ] {
        let mut nbd = server.open();
        nbd.send_raw(garbage).unwrap();
        // Others may try to go on.
        assert!(peer != Peer::Stillpoint || nbd.is_closed(), "{garbage:?}");
    }
    in_step(&mut other);
}

fn an_absurd_payload_ends_the_connection_alone(peer: Peer) {
    let server = peer.serve();
    let mut other = server.open();
    let mut nbd = server.open();
    let head = request((command::WRITE, 0), 1, (0, u32::MAX), &[]);
    nbd.send_raw(&head).unwrap();
    // Some say so first.
    let (_, receiver) = nbd.halves();
    while receiver.answer().is_ok() {}
    in_step(&mut other);
}

fn what_is_ready_does_not_wait() {
    let server = Server::with_disk(SIZE);
    let mut nbd = server.open_live(EXPORT);
    nbd.write(0, &vec![1; SIZE as usize]).unwrap();
    let _slow = Killer::slowing(&server, "fdatasync", &server.image(EXPORT), 1_000_000);
    // Both arrive at once, and the first takes longer.
    let both = [
        request((command::FLUSH, 0), 1, (0, 0), &[]),
        request((command::READ, 0), 2, (0, 512), &[]),
    ];
    nbd.send_raw(&both.concat()).unwrap();
    let (_, receiver) = nbd.halves();
    let answered: Vec<_> = (0..2).map(|_| receiver.chunk().unwrap()).collect();
    assert!(answered.iter().all(|answer| answer.error == 0));
    assert_eq!([answered[0].cookie, answered[1].cookie], [2, 1]);
}

fn a_client_that_has_said_all_is_answered() {
    let server = Server::with_disk(SIZE);
    let mut stream = UnixStream::connect(server.live()).unwrap();
    let mut words = 3u32.to_be_bytes().to_vec();
    words.extend(b"IHAVEOPT\0\0\0\x01\0\0\0\x03vda");
    for cookie in 1..=8 {
        let at = (cookie * 4096, 4096);
        words.extend(request((command::WRITE, 0), cookie, at, &[9; 4096]));
    }
    stream.write_all(&words).unwrap();
    stream.shutdown(Shutdown::Write).unwrap();
    let mut said = Vec::new();
    stream.read_to_end(&mut said).expect("answers and an end");
    assert_eq!(said.len(), 18 + 10 + 8 * 16, "greeting, export and answers");
    assert_eq!(server.open_live(EXPORT).read(4096, 4096), Ok(vec![9; 4096]));
}
