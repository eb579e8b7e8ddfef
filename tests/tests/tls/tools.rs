//! Other people's clients: libnbd, QEMU, and what URIs they are given.

use std::fs;
use std::path::Path;

use serde_json::Value;
use stillpoint_tests::process::Output;
use stillpoint_tests::tls::Holder;
use stillpoint_tests::tools::{path, sha256_of_file, tool};
use stillpoint_tests::{Guest, MIB, Server};

use super::Realm;

/// A URI for libnbd, with the files of a client.
fn with_files(uri: &str, outfit: &Path) -> String {
    let mark = if uri.contains('?') { '&' } else { '?' };
    format!("{uri}{mark}tls-certificates={}", outfit.display())
}

/// The URI that `backup begin` gives for a backup of `vda` and begins with this.
#[track_caller]
fn uri_of(begun: &Value, scheme: &str) -> String {
    let uris = begun["disks"][0]["uris"].as_array().expect("a list");
    let mut uris = uris.iter().filter_map(Value::as_str);
    let found = uris.find(|uri| uri.starts_with(scheme));
    found
        .unwrap_or_else(|| panic!("no {scheme} in {begun}"))
        .to_owned()
}

fn qemu_options(server: &Server, role: &str, export: &str) -> String {
    let port = server.port(role);
    format!("driver=nbd,host=localhost,port={port},export={export},tls-creds=tls0")
}

fn qemu_creds(outfit: &Path) -> String {
    format!(
        "tls-creds-x509,id=tls0,endpoint=client,dir={}",
        path(outfit)
    )
}

#[track_caller]
fn refused(output: &Output) {
    assert_ne!(output.code(), 0, "{output}");
}

#[test]
fn libnbd_pulls_a_backup_and_is_refused_without_its_certificate() {
    let realm = Realm::new();
    let server = realm.serve(&["--tls-verify-peer"]);
    Guest::new(&server, "vda").write(MIB, &[7; 5000]);
    let client = realm.outfit(Holder::Client, "client");
    let uri = uri_of(&server.begin("b1", &[]), "nbds://127.0.0.1:");

    let info = tool("nbdinfo", &[&with_files(&uri, &client)]);
    assert!(info.ok().contains("with TLS"), "{info}");
    let copy = server.path("copy");
    tool("nbdcopy", &[&with_files(&uri, &client), path(&copy)]).ok();
    assert_eq!(sha256_of_file(&copy), sha256_of_file(&server.image("vda")));

    let without = realm.outfit(Holder::Client, "without");
    for file in ["client-cert.pem", "client-key.pem"] {
        fs::remove_file(without.join(file)).unwrap();
    }
    refused(&tool("nbdinfo", &[&with_files(&uri, &without)]));
    server.wait_for_log("peer sent no certificates", 1);
    refused(&tool("nbdinfo", &[&uri.replace("nbds:", "nbd:")]));
    server.is_well();
}

#[test]
fn nbdcopy_writes_a_disk_over_tls() {
    let realm = Realm::new();
    let server = realm.serve(&[]);
    let source = server.path("source");
    let bytes: Vec<u8> = (0..64 * MIB).map(|at| (at / 4096 % 255) as u8).collect();
    fs::write(&source, &bytes).unwrap();
    let client = realm.outfit(Holder::Client, "client");
    let uri = format!("nbds://localhost:{}/vda", server.port("live"));
    tool("nbdcopy", &[path(&source), &with_files(&uri, &client)]).ok();
    assert!(fs::read(server.image("vda")).unwrap() == bytes);
}

#[test]
fn qemu_reads_and_writes_and_is_refused_without_its_certificate() {
    let realm = Realm::new();
    let server = realm.serve(&["--tls-verify-peer"]);
    let client = qemu_creds(&realm.outfit(Holder::Client, "client"));
    let live = qemu_options(&server, "live", "vda");
    let write = ["-c", "write -P 9 1M 64k", "-c", "flush"];
    let args = [&["--object", &client, "--image-opts", &live][..], &write].concat();
    tool("qemu-io", &args).ok();
    server.begin("b1", &[]);
    let frozen = qemu_options(&server, "backups", "vda@b1");
    let copy = server.path("copy");
    let args = [
        "convert",
        "--object",
        &client,
        "-O",
        "raw",
        "--image-opts",
        &frozen,
        path(&copy),
    ];
    tool("qemu-img", &args).ok();
    assert_eq!(
        fs::read(&copy).unwrap()[MIB as usize..][..65536],
        vec![9; 65536]
    );

    let other = Realm::of("another authority");
    let stranger = other.outfit(Holder::Client, "stranger");
    fs::write(stranger.join("ca-cert.pem"), realm.authority.pem()).unwrap();
    // Without its own check it would not even try.
    let stranger = qemu_creds(&stranger) + ",sanity-check=off";
    refused(&tool(
        "qemu-img",
        &["info", "--object", &stranger, "--image-opts", &live],
    ));
    server.wait_for_log("the TLS handshake failed", 1);
    let plain = live.replace(",tls-creds=tls0", "");
    refused(&tool("qemu-img", &["info", "--image-opts", &plain]));
}

#[test]
fn unix_sockets_are_plain_unless_told_otherwise() {
    let realm = Realm::new();
    let server = realm.serve(&[]);
    tool("nbdinfo", &["--size", &server.live_uri("vda")]).ok();

    let server = realm.serve(&["--tls-unix=require"]);
    let client = realm.outfit(Holder::Client, "client");
    refused(&tool("nbdinfo", &["--size", &server.live_uri("vda")]));
    let uri = uri_of(&server.begin("b1", &[]), "nbds+unix:///vda@b1?socket=");
    assert!(server.stdout().contains("nbds+unix:///vda?socket="));
    let mut args = with_files(&uri, &client);
    // On a Unix socket nothing else says whose certificate it should be.
    args.push_str("&tls-hostname=localhost");
    let info = tool("nbdinfo", &[&args]);
    assert!(info.ok().contains("with TLS"), "{info}");
}

#[test]
fn only_required_tls_opens_a_network() {
    let realm = Realm::new();
    let open = "--live-listen=tcp:0.0.0.0:0";
    realm.builder(&[open]).start().is_well();
    for weak in ["--tls=on", "--tls=off"] {
        let refused = realm.builder(&[open, weak]).start_and_fail();
        refused.refused("unencrypted");
        // The certificate is there; what lacks is that it is asked for.
        assert!(refused.stderr.contains("--tls require"), "{refused}");
        assert!(!refused.stderr.contains("--tls-creds"), "{refused}");
        let allowed = realm.builder(&[open, weak, "--allow-plaintext"]).start();
        allowed.is_well();
    }
}
