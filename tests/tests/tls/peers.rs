//! Who is let in.

use std::fs;
use std::path::PathBuf;

use stillpoint_tests::raw_nbd::option;
use stillpoint_tests::tls::{Authority, Holder, VERSIONS, Wire, client_config};

use super::Realm;

/// Whether a client with this outfit opens the disk.
fn is_let_in(port: u16, outfit: &std::path::Path) -> bool {
    let opened = VERSIONS.map(|version| {
        let mut wire = Wire::connect(port);
        assert_eq!(wire.option(option::STARTTLS, &[]), Ok(vec![]));
        // In TLS 1.3 a client hears that it was refused when it goes on.
        let Ok(mut wire) = wire.begin_tls(&client_config(outfit, version)) else {
            return false;
        };
        wire.send_option(option::LIST, &[]).is_ok() && wire.option_reply().is_ok()
    });
    assert_eq!(opened[0], opened[1], "the versions differ");
    opened[0]
}

/// Takes the authority of `realm` for the server, whoever signed the client's own certificate.
fn trusting(realm: &Realm, outfit: PathBuf) -> PathBuf {
    fs::write(outfit.join("ca-cert.pem"), realm.authority.pem()).unwrap();
    outfit
}

#[test]
fn only_certificates_of_the_authority_are_let_in_and_the_log_says_whose_or_why_not() {
    let realm = Realm::new();
    let other = Realm::of("another authority");
    let server = realm.serve(&["--tls-verify-peer"]);
    let port = server.port("live");

    let nightly = realm.outfit(Holder::Client, "nightly");
    assert!(is_let_in(port, &nightly));
    server.wait_for_log("subject=\"CN=nightly\"", 2);

    let without = realm.outfit(Holder::Client, "without");
    fs::remove_file(without.join("client-key.pem")).unwrap();
    let of_a_server = realm.outfit(Holder::Client, "server-as-client");
    let (certificate, key) = realm.authority.sign(Holder::Server, "server");
    fs::write(of_a_server.join("client-cert.pem"), certificate).unwrap();
    fs::write(of_a_server.join("client-key.pem"), key).unwrap();
    for (outfit, why) in [
        (without, "peer sent no certificates"),
        (
            trusting(&realm, other.outfit(Holder::Client, "stranger")),
            "UnknownIssuer",
        ),
        (realm.outfit(Holder::ExpiredClient, "late"), "expired"),
        (of_a_server, "extended key usage"),
    ] {
        assert!(!is_let_in(port, &outfit), "{why}");
        server.wait_for_log(why, 2);
    }
    assert!(is_let_in(port, &nightly));
}

#[test]
fn without_verify_peer_nobody_is_asked_for_a_certificate_and_the_log_warns_of_it_on_a_network() {
    let realm = Realm::new();
    let server = realm.serve(&["--live-listen=tcp:0.0.0.0:0"]);
    let other = Realm::of("another authority");
    let stranger = trusting(&realm, other.outfit(Holder::Client, "stranger"));
    assert!(is_let_in(server.port("live"), &stranger));
    server.wait_for_log("without a certificate", 1);
    let server = realm.serve(&["--live-listen=tcp:0.0.0.0:0", "--tls-verify-peer"]);
    assert!(!server.stderr().contains("without a certificate"));
    let server = realm.serve(&[]);
    assert!(!server.stderr().contains("without a certificate"));
}

#[test]
fn whoever_is_on_the_revocation_list_is_refused_from_the_next_sighup_on() {
    let realm = Realm::new();
    let server = realm.serve(&["--tls-verify-peer"]);
    let (good, bad) = (
        realm.outfit(Holder::Client, "good"),
        realm.outfit(Holder::Client, "bad"),
    );
    assert!(is_let_in(server.port("live"), &bad));
    let list = realm.directory.path().join("server/ca-crl.pem");
    fs::write(list, realm.authority.revoke("bad")).unwrap();
    server.signal(rustix::process::Signal::HUP);
    server.wait_for_log("read again", 1);
    assert!(!is_let_in(server.port("live"), &bad));
    server.wait_for_log("Revoked", 2);
    assert!(is_let_in(server.port("live"), &good));
}

#[test]
fn a_server_that_the_client_does_not_believe_is_left_and_goes_on() {
    let realm = Realm::new();
    let server = realm.serve(&[]);
    let doubting = realm.outfit(Holder::Client, "doubting");
    let other = Authority::new("an authority");
    fs::write(doubting.join("ca-cert.pem"), other.pem()).unwrap();
    assert!(!is_let_in(server.port("live"), &doubting));
    server.wait_for_log("the TLS handshake failed", 2);
    server.is_well();
}
