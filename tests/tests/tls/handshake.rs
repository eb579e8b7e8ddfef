//! Byte by byte: what is answered before TLS, what is left of it after, and how it ends.

use std::io::{ErrorKind, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::time::{Duration, Instant};

use stillpoint_tests::process::PATIENCE;
use stillpoint_tests::raw_nbd::{command, option, rep};
use stillpoint_tests::tls::{
    Holder, Tapped, VERSIONS, Wire, client_config, export_named, option_bytes, records,
};
use stillpoint_tests::{Guest, MIB};

use super::Realm;

#[test]
fn where_tls_is_required_everything_else_is_told_so() {
    let realm = Realm::new();
    let server = realm.serve(&[]);
    let mut wire = Wire::connect(server.port("live"));
    for unanswered in [
        option::LIST,
        option::INFO,
        option::GO,
        option::STRUCTURED_REPLY,
        option::LIST_META_CONTEXT,
        option::SET_META_CONTEXT,
        0x7777_7777,
    ] {
        for data in [vec![], export_named("vda"), vec![7; 100_000]] {
            let answer = wire.option(unanswered, &data);
            assert_eq!(answer, Err(rep::ERR_TLS_REQD), "option {unanswered}");
        }
    }
    assert_eq!(wire.option(option::ABORT, &[]), Ok(vec![]));
    assert!(wire.rest().0.is_empty());

    let mut wire = Wire::connect(server.port("backups"));
    wire.send_option(option::EXPORT_NAME, b"vda").unwrap();
    assert!(wire.rest().0.is_empty(), "there is no other refusal");
    server.is_well();
}

#[test]
fn starttls_takes_no_data_and_comes_once() {
    let realm = Realm::new();
    let server = realm.serve(&[]);
    let config = client_config(&realm.outfit(Holder::Client, "client"), VERSIONS[1]);
    let mut wire = Wire::connect(server.port("live"));
    assert_eq!(wire.option(option::STARTTLS, b"x"), Err(rep::ERR_INVALID));
    let mut wire = wire.start_tls(&config);
    assert_eq!(wire.option(option::STARTTLS, &[]), Err(rep::ERR_INVALID));
    assert_eq!(wire.option(0x7777, &[]), Err(rep::ERR_UNSUP));
    assert_eq!(wire.go("vda"), Ok(()));
}

#[test]
fn where_tls_is_off_it_is_declined_and_where_it_is_on_both_are_served() {
    let realm = Realm::new();
    let config = client_config(&realm.outfit(Holder::Client, "client"), VERSIONS[1]);
    let server = realm.serve(&["--tls=off"]);
    let mut wire = Wire::connect(server.port("live"));
    assert_eq!(wire.option(option::STARTTLS, &[]), Err(rep::ERR_POLICY));
    assert_eq!(wire.go("vda"), Ok(()));

    let server = realm.serve(&["--tls=on"]);
    assert_eq!(Wire::connect(server.port("live")).go("vda"), Ok(()));
    let wire = Wire::connect(server.port("live"));
    assert_eq!(wire.start_tls(&config).go("vda"), Ok(()));
}

/// CVE-2021-3716: nbdkit did not forget it, so that whoever stood in between could agree to something.
#[test]
fn what_was_agreed_before_tls_is_forgotten() {
    let realm = Realm::new();
    let server = realm.serve(&["--tls=on"]);
    let config = client_config(&realm.outfit(Holder::Client, "client"), VERSIONS[1]);
    let mut query = export_named("vda")[..7].to_vec();
    query.extend(1u32.to_be_bytes());
    query.extend(15u32.to_be_bytes());
    query.extend(b"base:allocation");
    let mut wire = Wire::connect(server.port("live"));
    assert_eq!(wire.option(option::STRUCTURED_REPLY, &[]), Ok(vec![]));
    let chosen = wire.option(option::SET_META_CONTEXT, &query);
    assert_eq!(chosen.map(|all| all.len()), Ok(1));
    let mut extended = Wire::connect(server.port("live"));
    assert_eq!(extended.option(option::EXTENDED_HEADERS, &[]), Ok(vec![]));
    for wire in [wire, extended] {
        let mut wire = wire.start_tls(&config);
        let refused = wire.option(option::LIST_META_CONTEXT, &query);
        assert_eq!(refused, Err(rep::ERR_INVALID));
        assert_eq!(wire.go("vda"), Ok(()));
        wire.request(command::READ, 5, 0, 512);
        assert_eq!(
            wire.reply(512),
            (5, vec![0; 512]),
            "requests are compact and replies simple again"
        );
    }
}

#[test]
fn without_fixed_newstyle_there_is_no_tls() {
    let realm = Realm::new();
    let server = realm.serve(&["--tls=on"]);
    for flags in [0u32, 2] {
        let mut wire = Wire(TcpStream::connect(("127.0.0.1", server.port("live"))).unwrap());
        wire.bytes(18).unwrap();
        wire.0.write_all(&flags.to_be_bytes()).unwrap();
        wire.send_option(option::STARTTLS, &[]).unwrap();
        let (answer, _) = wire.rest();
        assert!(answer.is_empty(), "flags {flags}: {answer:?}");
    }
    server.is_well();
}

#[test]
fn versions_before_tls_1_2_are_refused() {
    let realm = Realm::new();
    let server = realm.serve(&[]);
    for version in [[3, 0], [3, 1], [3, 2]] {
        let mut wire = Wire::connect(server.port("live"));
        assert_eq!(wire.option(option::STARTTLS, &[]), Ok(vec![]));
        wire.0.write_all(&hello(version)).unwrap();
        let (answer, _) = wire.rest();
        assert_eq!(records(&answer), [21], "{version:?}: {answer:?}");
        assert_eq!(
            answer[5..],
            [2, 70],
            "{version:?}: not because of the version"
        );
    }
}

/// A `ClientHello` of one cipher suite, with one extension: how its signatures may be made.
fn hello(version: [u8; 2]) -> Vec<u8> {
    let mut hello = vec![22, 3, 1, 0, 55, 1, 0, 0, 51];
    hello.extend(version);
    hello.extend([7; 32]);
    hello.extend([0, 0, 2, 0, 47, 1, 0]);
    hello.extend([0, 8, 0, 13, 0, 4, 0, 2, 4, 3]);
    hello
}

#[test]
fn plain_text_that_was_sent_ahead_is_not_acted_on() {
    let realm = Realm::new();
    let server = realm.serve(&["--tls=on"]);
    let ahead = option_bytes(option::STRUCTURED_REPLY, &[]);

    // In one piece with the wish for TLS: that is not acknowledged.
    let mut wire = Wire::connect(server.port("live"));
    let both = [option_bytes(option::STARTTLS, &[]), ahead.clone()].concat();
    wire.0.write_all(&both).unwrap();
    let (answer, _) = wire.rest();
    assert!(answer.is_empty(), "{answer:?}");
    server.wait_for_log("16 bytes of plain text where TLS begins", 1);

    // After the acknowledgement, where only TLS may stand.
    let mut wire = Wire::connect(server.port("live"));
    assert_eq!(wire.option(option::STARTTLS, &[]), Ok(vec![]));
    wire.0.write_all(&ahead).unwrap();
    let (answer, _) = wire.rest();
    assert_eq!(records(&answer), [21], "an alert, and nothing else");
    server.wait_for_log("the TLS handshake failed", 1);
    server.is_well();
}

/// A client inside TLS that keeps all that came since the acknowledgement.
fn tapped(
    port: u16,
    config: &std::sync::Arc<rustls::ClientConfig>,
) -> Wire<stillpoint_tests::tls::Inside<Tapped>> {
    let mut wire = Wire::connect(port);
    assert_eq!(wire.option(option::STARTTLS, &[]), Ok(vec![]));
    let tapped = Tapped {
        stream: wire.0,
        came: Vec::new(),
    };
    Wire(tapped).begin_tls(config).expect("TLS")
}

#[test]
fn nothing_is_said_in_plain_text_after_the_acknowledgement_and_every_end_is_announced() {
    let realm = Realm::new();
    let mut server = realm.serve(&[]);
    let port = server.port("live");
    for version in VERSIONS {
        let config = client_config(&realm.outfit(Holder::Client, "client"), version);
        let mut ends = Vec::new();

        let mut wire = tapped(port, &config);
        wire.go("vda").unwrap();
        wire.request(command::READ, 1, 0, MIB as u32);
        wire.reply(MIB as usize);
        wire.request(command::DISC, 2, 0, 0);
        ends.push(("a goodbye", wire));

        let mut wire = tapped(port, &config);
        assert_eq!(wire.option(option::ABORT, &[]), Ok(vec![]));
        ends.push(("a goodbye in the handshake", wire));

        let mut wire = tapped(port, &config);
        wire.0.write_all(b"no option at all").unwrap();
        ends.push(("a violation in the handshake", wire));

        let mut wire = tapped(port, &config);
        wire.go("vda").unwrap();
        wire.0.write_all(&[0; 28]).unwrap();
        ends.push(("a violation", wire));

        for (what, mut wire) in ends {
            let (rest, end) = wire.rest();
            assert!(rest.is_empty(), "{what}: {rest:?}");
            assert!(end.is_ok(), "{what}: {end:?}");
            records(&wire.0.sock.came);
        }
    }

    let config = client_config(&realm.outfit(Holder::Client, "client"), VERSIONS[1]);
    let mut idle = tapped(port, &config);
    idle.go("vda").unwrap();
    let mut asking = tapped(port, &config);
    asking.option(option::LIST, &[]).unwrap();
    server.stop();
    for mut wire in [idle, asking] {
        let (rest, end) = wire.rest();
        assert!(rest.is_empty() && end.is_ok(), "a stop: {rest:?} {end:?}");
        records(&wire.0.sock.came);
    }
}

#[test]
fn a_client_that_vanishes_inside_tls_is_the_end_of_its_connection_alone() {
    let realm = Realm::new();
    let server = realm.serve(&[]);
    let config = client_config(&realm.outfit(Holder::Client, "client"), VERSIONS[1]);
    let mut stays = Wire::connect(server.port("live")).start_tls(&config);
    stays.go("vda").unwrap();
    let mut goes = Wire::connect(server.port("live")).start_tls(&config);
    goes.go("vda").unwrap();
    goes.0.sock.shutdown(Shutdown::Both).unwrap();
    server.wait_for_log("connection ended", 1);
    stays.request(command::READ, 1, 0, 512);
    assert_eq!(stays.reply(512), (1, vec![0; 512]));
}

#[test]
fn large_answers_come_whole_in_both_versions() {
    let realm = Realm::new();
    let server = realm.serve(&[]);
    let mut guest = Guest::new(&server, "vda");
    let bytes: Vec<u8> = (0..8 * MIB).map(|at| (at % 251) as u8 + 1).collect();
    guest.write(0, &bytes);
    for version in VERSIONS {
        let config = client_config(&realm.outfit(Holder::Client, "client"), version);
        let mut wire = Wire::connect(server.port("live")).start_tls(&config);
        wire.go("vda").unwrap();
        for round in 0..8 {
            wire.request(command::READ, round, 0, bytes.len() as u32);
            let (cookie, found) = wire.reply(bytes.len());
            assert!(cookie == round && found == bytes, "round {round}");
        }
    }
}

#[test]
fn a_stop_does_not_wait_for_a_client_that_stalls_in_the_tls_handshake() {
    let realm = Realm::new();
    let mut server = realm.serve(&[]);
    let mut wire = Wire::connect(server.port("live"));
    assert_eq!(wire.option(option::STARTTLS, &[]), Ok(vec![]));
    // The first bytes of a record of a handshake, and no more.
    wire.0.write_all(&[22, 3, 1, 1]).unwrap();
    server.stop();
    let (rest, end) = wire.rest();
    let is_end = end.is_ok() || end.is_err_and(|e| e.kind() == ErrorKind::ConnectionReset);
    assert!(rest.is_empty() && is_end, "{rest:?}");
}

#[test]
fn the_time_for_choosing_an_export_goes_on_in_the_tls_handshake() {
    let realm = Realm::new();
    let server = realm.serve(&["--handshake-timeout=3s"]);
    let mut guest = Guest::new(&server, "vda");
    let [mut silent, mut dribbles] = [(); 2].map(|()| {
        let mut wire = Wire::connect(server.port("live"));
        assert_eq!(wire.option(option::STARTTLS, &[]), Ok(vec![]));
        wire
    });
    // The head of a record, whose 16 KiB then come byte by byte.
    dribbles.0.write_all(&[22, 3, 1, 0x40, 0]).unwrap();
    let pause = Some(Duration::from_millis(20));
    dribbles.0.set_read_timeout(pause).unwrap();
    let begun = Instant::now();
    let end = loop {
        assert!(begun.elapsed() < PATIENCE, "it may dribble for ever");
        match dribbles
            .0
            .write_all(&[1])
            .and_then(|()| dribbles.0.read(&mut [0]))
        {
            Err(error) if error.kind() == ErrorKind::WouldBlock => {}
            end => break end,
        }
    };
    // The end, or that there is nobody any more to write to.
    assert!(!matches!(end, Ok(1..)), "{end:?}");
    silent.0.set_read_timeout(Some(PATIENCE)).unwrap();
    let (rest, end) = silent.rest();
    assert!(rest.is_empty() && end.is_ok(), "{rest:?}, {end:?}");
    server.wait_for_log("no export was chosen within 3s", 2);
    guest.write(0, &[1; 512]);
}
