//! The files of the server: what is wrong with them, and how they are replaced.

use std::fs;
use std::os::unix::fs::PermissionsExt;

use rustix::process::Signal;
use stillpoint_tests::raw_nbd::command;
use stillpoint_tests::tls::{Authority, Holder, VERSIONS, Wire, client_config};

use super::Realm;

#[test]
fn files_that_cannot_be_used_are_refused_by_name() {
    let realm = Realm::new();
    let (certificate, key) = realm.authority.sign(Holder::Server, "server");
    let (_, other_key) = realm.authority.sign(Holder::Server, "other");
    let encrypted = key.replace("PRIVATE", "ENCRYPTED PRIVATE");
    let cut = &certificate[..certificate.len() / 2];
    for (file, content, told) in [
        ("server-cert.pem", None, "No such file"),
        ("server-key.pem", None, "No such file"),
        ("ca-cert.pem", None, "No such file"),
        ("server-cert.pem", Some(""), "no certificate"),
        ("server-cert.pem", Some("certainly"), "no certificate"),
        ("server-cert.pem", Some(&*key), "no certificate"),
        ("server-cert.pem", Some(cut), "cannot be read"),
        ("server-key.pem", Some(&*certificate), "no private key"),
        ("server-key.pem", Some(&*encrypted), "passphrase"),
        ("server-key.pem", Some(&*other_key), "does not belong"),
        ("ca-cert.pem", Some("\0"), "no certificate"),
        ("ca-crl.pem", Some(&*certificate), "no revocation list"),
    ] {
        let builder = realm.builder(&["--tls-verify-peer"]);
        let path = realm.directory.path().join("server").join(file);
        match content {
            None => fs::remove_file(&path).unwrap(),
            Some(content) => fs::write(&path, content).unwrap(),
        }
        let output = builder.start_and_fail();
        let why = output.error(1);
        assert!(why.contains(told), "{told}: {output}");
        assert!(why.contains(&*path.to_string_lossy()), "{output}");
        assert!(output.stderr.contains("\nhint: "), "{output}");
        let _ = fs::remove_file(path);
    }
}

#[test]
fn options_that_need_a_certificate_say_where_it_is_looked_for() {
    for option in [
        "--tls=require",
        "--tls=on",
        "--tls-unix=on",
        "--tls-verify-peer",
    ] {
        let builder = stillpoint_tests::Server::builder().disk("vda", 1 << 20);
        let output = builder.arg(option).start_and_fail();
        output.error(2);
        assert!(output.stderr.contains("--tls-creds DIR"), "{output}");
    }
}

#[test]
fn a_key_that_everyone_may_read_is_warned_of() {
    let realm = Realm::new();
    let warns = |mode| {
        let builder = realm.builder(&[]);
        let key = realm.directory.path().join("server/server-key.pem");
        fs::set_permissions(&key, fs::Permissions::from_mode(mode)).unwrap();
        let server = builder.start();
        server.stderr().contains("everyone on this machine")
    };
    assert!(warns(0o644));
    assert!(!warns(0o640), "a group is somebody's choice");
    assert!(!warns(0o600));
}

#[test]
fn sighup_gives_new_connections_the_new_certificate_and_leaves_the_others() {
    let realm = Realm::new();
    let server = realm.serve(&[]);
    let port = server.port("live");
    let client = realm.outfit(Holder::Client, "client");
    let before = client_config(&client, VERSIONS[1]);
    let mut old = Wire::connect(port).start_tls(&before);
    old.go("vda").unwrap();

    let next = Authority::new("the next authority");
    let creds = realm.directory.path().join("server");
    next.outfit(&creds, Holder::Server, "server");
    fs::write(client.join("ca-cert.pem"), next.pem()).unwrap();
    let after = client_config(&client, VERSIONS[1]);
    server.signal(Signal::HUP);
    server.wait_for_log("read again", 1);
    Wire::connect(port).start_tls(&after).go("vda").unwrap();

    // What cannot be used changes nothing, and the log says so.
    fs::write(creds.join("server-cert.pem"), realm.authority.pem()).unwrap();
    server.signal(Signal::HUP);
    server.wait_for_log("stays as it was", 1);
    assert!(server.stderr().contains("does not belong"));
    Wire::connect(port).start_tls(&after).go("vda").unwrap();

    old.request(command::READ, 1, 0, 512);
    assert_eq!(old.reply(512), (1, vec![0; 512]));
}

#[test]
fn sighup_does_not_end_a_server_that_has_no_certificate() {
    let server = stillpoint_tests::Server::with_disk(1 << 20);
    server.signal(Signal::HUP);
    server.wait_for_log("SIGHUP", 1);
    server.is_well();
}
