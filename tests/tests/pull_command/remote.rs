//! Other people's servers, and ours over a network.

use std::fs;

use serde_json::json;
use stillpoint_tests::peers::OtherServer;
use stillpoint_tests::process::run;
use stillpoint_tests::qemu::QemuDaemon;
use stillpoint_tests::server::{binary, temporary_directory, uri};
use stillpoint_tests::tls::{Authority, Holder};
use stillpoint_tests::tools::{path, sha256_of_file, tool};
use stillpoint_tests::{CHUNK, Guest, MIB, RawNbd, Server};

use crate::folder::{Folder, Pulled};

const SIZE: u64 = 8 * MIB;

/// A pull of any server's export.
#[track_caller]
fn pull(folder: &Folder, uri: &str, args: &[&str]) -> Pulled {
    let mut command = std::process::Command::new(binary());
    command
        .args(["pull", "--to", path(folder.path()), "--json", "--uri", uri])
        .args(args);
    Pulled::from(run(&mut command))
}

#[test]
fn qemu_nbd_with_a_bitmap_is_pulled_in_full_and_then_what_is_dirty() {
    let directory = temporary_directory();
    let image = directory.path().join("a.qcow2");
    let image = path(&image);
    let io = |command: &str| {
        tool("qemu-io", &["-f", "qcow2", "-c", command, image])
            .ok()
            .len()
    };
    tool("qemu-img", &["create", "-q", "-f", "qcow2", image, "8M"]).ok();
    io("write -P 1 1M 1M");
    tool(
        "qemu-img",
        &["bitmap", "--add", "-g", "64k", image, "since1"],
    )
    .ok();

    let folder = Folder::new();
    let args = ["-r", "-f", "qcow2", "-x", "vda"];
    let server = OtherServer::qemu_nbd(&[&args[..], &["-B", "since1", image]].concat());
    let first = pull(
        &folder,
        &uri(&server.socket(), "vda"),
        &["--bitmap", "since1"],
    );
    let disk = first.disk(0, "vda");
    assert_eq!(
        (&disk["mode"], &disk["copied_bytes"]),
        (&json!("full"), &json!(MIB)),
        "{disk}"
    );
    assert_eq!(first.result(0)["vouched"], false);
    drop(server);

    io("write -P 2 1536k 1k");
    io("write -z 1M 64k");
    let server = OtherServer::qemu_nbd(&[&args[..], &["-B", "since1", image]].concat());
    let second = pull(
        &folder,
        &uri(&server.socket(), "vda"),
        &["--bitmap", "since1"],
    );
    let disk = second.disk(0, "vda");
    assert_eq!(
        (&disk["mode"], &disk["parent"]),
        (&json!("incremental"), &json!(1)),
        "{disk}"
    );
    assert_eq!(
        (&disk["copied_bytes"], &disk["zero_bytes"]),
        (&json!(CHUNK), &json!(CHUNK))
    );
    let raw = directory.path().join("expected.raw");
    tool(
        "qemu-img",
        &["convert", "-f", "qcow2", "-O", "raw", image, path(&raw)],
    )
    .ok();
    folder.holds(2, "vda", &fs::read(raw).expect("a copy"), "qemu-nbd -B");

    let missing = pull(
        &folder,
        &uri(&server.socket(), "vda"),
        &["--bitmap", "since2"],
    );
    let (_, message) = missing.error(1);
    assert!(message.contains("since2"), "{message}");
    assert_eq!(folder.points(), [1, 2]);
    drop(server);

    tool("qemu-img", &["resize", "-q", image, "9M"]).ok();
    let server = OtherServer::qemu_nbd(&[&args[..], &["-B", "since1", image]].concat());
    let third = pull(
        &folder,
        &uri(&server.socket(), "vda"),
        &["--bitmap", "since1"],
    );
    let reason = third.disk(3, "vda")["reason"].clone();
    assert!(
        reason
            .as_str()
            .is_some_and(|text| text.contains("its size was 8388608")),
        "{reason}"
    );
}

#[test]
fn a_storage_daemon_is_pulled_by_its_bitmap() {
    let daemon = QemuDaemon::start(&[("vda", SIZE)]);
    let mut qmp = daemon.qmp();
    let folder = Folder::new();
    let mut nbd = RawNbd::open(&daemon.nbd(), "vda", &[]);
    let mut expected = vec![0; SIZE as usize];
    let mut write = |nbd: &mut RawNbd, offset: u64, bytes: &[u8]| {
        nbd.write(offset, bytes).expect("a write");
        expected[offset as usize..][..bytes.len()].copy_from_slice(bytes);
        expected.clone()
    };
    write(&mut nbd, 0, &vec![1; MIB as usize]);
    let bitmap = json!({"node": "vda", "name": "b", "granularity": 4096});
    let export = json!({"id": "look", "type": "nbd", "node-name": "vda", "name": "look",
        "bitmaps": ["b"], "writable": true});
    let look = uri(&daemon.nbd(), "look");
    for round in 0..4_u8 {
        if round == 0 {
            qmp.execute("block-dirty-bitmap-add", &bitmap);
        }
        qmp.execute("block-export-add", &export);
        let pulled = pull(&folder, &look, &["vda", "--bitmap", "b"]);
        let disk = pulled.disk(0, "vda");
        assert_eq!(
            disk["copied_bytes"],
            if round == 0 { MIB } else { 8192 },
            "{disk}"
        );
        let expected = write(&mut nbd, 0, &[]);
        folder.holds(u64::from(round) + 1, "vda", &expected, "a storage daemon");
        qmp.execute("block-export-del", &json!({"id": "look", "mode": "hard"}));
        qmp.event("BLOCK_EXPORT_DELETED");
        qmp.execute(
            "block-dirty-bitmap-clear",
            &json!({"node": "vda", "name": "b"}),
        );
        // Two blocks of the bitmap, and of the finest cluster.
        write(&mut nbd, u64::from(round) * MIB + 6000, &[round + 2; 3000]);
    }
}

#[test]
fn a_server_without_any_context_is_pulled_whole() {
    let directory = temporary_directory();
    let image = directory.path().join("a.raw");
    fs::write(&image, vec![5; 51_200]).expect("an image");
    let server = OtherServer::nbdkit(&["--filter=nozero", "file", path(&image)]);
    let folder = Folder::new();
    let pulled = pull(&folder, &uri(&server.socket(), ""), &["--quiet"]);
    assert_eq!(pulled.disk(0, "disk")["size"], 51_200);
    folder.holds(1, "disk", &vec![5; 51_200], "nbdkit");
}

#[test]
fn over_tcp_with_tls_the_server_has_to_be_who_it_says() {
    let authority = Authority::new("ours");
    let directory = temporary_directory();
    let outfit = |holder, name| authority.outfit(&directory.path().join(name), holder, name);
    let (creds, own) = (
        outfit(Holder::Server, "server"),
        outfit(Holder::Client, "client"),
    );
    let server = Server::builder()
        .disk("vda", SIZE)
        .arg("--backup-listen=tcp:127.0.0.1:0")
        .arg(&format!("--tls-creds={}", path(&creds)))
        .arg("--tls-verify-peer")
        .start();
    let mut guest = Guest::new(&server, "vda");
    guest.write(CHUNK, &vec![1; 3 * CHUNK as usize]);
    server.begin("b1", &["--checkpoint", "cp1"]);
    let at = |scheme: &str, export: &str| {
        format!("{scheme}://localhost:{}/{export}", server.port("backups"))
    };
    let folder = Folder::new();

    let (code, _) = pull(&folder, &at("nbds", "vda@b1"), &[]).error(1);
    assert_eq!(code, "tls-credentials");
    pull(&folder, &at("nbd", "vda@b1"), &[]).error(1);
    let stranger = Authority::new("theirs");
    let strange = stranger.outfit(&directory.path().join("strange"), Holder::Client, "strange");
    pull(
        &folder,
        &at("nbds", "vda@b1"),
        &["--tls-creds", path(&strange)],
    )
    .error(1);
    assert!(folder.points().is_empty());

    let with = ["--tls-creds", path(&own)];
    let first = pull(&folder, &at("nbds", "vda@b1"), &with);
    assert_eq!(first.disk(0, "vda")["copied_bytes"], 3 * CHUNK);
    server.commit("b1");
    guest.write(2 * CHUNK, &[2; 512]);
    server.begin("b2", &["--since", "cp1"]);
    let args = [&with[..], &["--bitmap", "cp1"]].concat();
    let second = pull(&folder, &at("nbds", "vda@b2"), &args);
    assert_eq!(second.disk(0, "vda")["copied_bytes"], CHUNK);
    folder.holds(2, "vda", &guest.disk, "over TLS");
    assert_eq!(
        sha256_of_file(&server.image("vda")),
        stillpoint_tests::tools::sha256(&guest.disk)
    );
}
