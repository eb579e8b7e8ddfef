//! Disks of every kind.

use std::fs::{self, File};

use stillpoint_tests::tools::{nbdcopy_sha256, path, sha256, sha256_of_file, sparse_file, tool};
use stillpoint_tests::{CHUNK, Guest, LoopDevice, NbdBase, Server};

use super::{SIZE, builder, changed, disks, map_of, remove};

fn add_as(server: &Server, disk: &str) -> serde_json::Value {
    server.cli_json(&["disk", "add", disk])
}

#[test]
fn an_export_of_another_server_comes_and_goes() {
    let server = builder().start();
    let base = NbdBase::file(&server.image("vdb"));
    let disk = format!(
        "vdb={},state={},reconnect=5s",
        base.uri(),
        path(&server.path("state"))
    );
    for round in 0..3 {
        let answer = add_as(&server, &disk);
        assert_eq!(answer["path"], base.uri(), "{answer}");
        let mut guest = Guest::new(&server, "vdb");
        if round == 0 {
            server.checkpoint("cp1");
        }
        guest.write(round * CHUNK, &[1 + round as u8; 4096]);
        let written: Vec<u64> = (0..=round).collect();
        let found = changed(&server, &format!("i{round}"), "vdb", "cp1");
        assert_eq!(found, map_of(&written), "round {round}");
        drop(guest);
        remove(&server, "vdb");
        // Nobody is connected there any more: it could be somebody else's.
        tool("nbdinfo", &["--size", &base.uri()]).ok();
    }
    // Its address twice would be two disks on one image, which nothing locks.
    add_as(&server, &disk);
    let again = format!("vdc={},state={}", base.uri(), path(&server.path("state2")));
    let refused = server.cli(&["disk", "add", &again]);
    assert!(refused.error(1).contains("disk 'vdb' already"), "{refused}");
}

#[test]
fn a_base_that_is_gone_is_in_the_way_of_a_removal_unless_forced() {
    let server = builder().start();
    let mut base = NbdBase::file(&server.image("vdb"));
    let disk = format!(
        "vdb={},state={},reconnect=3s",
        base.uri(),
        path(&server.path("state"))
    );
    add_as(&server, &disk);
    server.checkpoint("cp1");
    server.open_live("vdb").write(CHUNK, &[1; 4096]).unwrap();
    base.kill();
    let refused = loop {
        let refused = server.cli(&["disk", "remove", "vdb"]);
        if !refused.stderr.contains("in use by") {
            break refused;
        }
    };
    assert!(
        refused.error(1).contains("cannot be made durable"),
        "{refused}"
    );
    assert_eq!(disks(&server), ["vda", "vdb"]);
    let removed = server.cli(&["disk", "remove", "vdb", "--force"]);
    assert!(
        removed.error(1).contains("'vdb' is removed, but"),
        "{removed}"
    );
    assert_eq!(disks(&server), ["vda"]);
    base.start();
    add_as(&server, &disk);
    // Whether that write has got there is not known; that it may have is.
    let found = stillpoint_tests::state::begin_since(&server, "i1", "vdb", "cp1");
    let stillpoint_tests::state::Begun::Incremental { map, .. } = found else {
        panic!("{found:?}");
    };
    assert!(
        map.iter()
            .any(|e| e.2 == 1 && e.0 <= CHUNK && CHUNK < e.0 + e.1),
        "{map:?}"
    );
}

#[test]
fn a_base_that_cannot_be_reached_leaves_nothing() {
    let server = builder().start();
    let state = server.path("state");
    let disk = format!(
        "vdb=nbd+unix:///?socket=/nowhere,state={},reconnect=1s",
        path(&state)
    );
    let refused = server.cli(&["disk", "add", &disk]);
    assert!(refused.error(1).contains("cannot connect"), "{refused}");
    assert!(!state.exists() && disks(&server) == ["vda"]);
}

#[test]
fn a_qcow2_image_comes_with_its_bitmaps_and_is_not_touched() {
    let server = builder().start();
    let image = server.path("vdc.qcow2");
    let size = SIZE.to_string();
    tool("qemu-img", &["create", "-f", "qcow2", path(&image), &size]).ok();
    tool(
        "qemu-img",
        &["bitmap", "--add", "-g", "64k", path(&image), "old"],
    )
    .ok();
    tool(
        "qemu-io",
        &["-f", "qcow2", "-c", "write -P 5 1M 64k", path(&image)],
    )
    .ok();
    let before = sha256_of_file(&image);
    let writable = format!("vdc={},format=qcow2", path(&image));
    let refused = server.cli(&["disk", "add", &writable]);
    assert!(refused.error(1).contains("never written"), "{refused}");
    assert!(!server.path("vdc.qcow2.stillpoint").exists());

    let answer = add_as(&server, &format!("{writable},read-only"));
    assert_eq!(answer["format"], "qcow2");
    server.begin("b1", &["--disk", "vdc"]);
    let context = "qemu:dirty-bitmap:old";
    let map = server.open_frozen("vdc@b1", &[context]).map(context);
    assert_eq!(map, map_of(&[16]));
    server.commit("b1");
    let resized = server.cli(&["disk", "resize", "vdc", "+1M"]);
    assert!(
        resized.error(1).contains("disk 'vdc' is read-only"),
        "{resized}"
    );
    remove(&server, "vdc");
    assert_eq!(sha256_of_file(&image), before);
    tool("qemu-img", &["check", path(&image)]).ok();
}

#[test]
fn qcow2_images_name_what_the_server_was_told_they_may() {
    let folder = stillpoint_tests::server::temporary_directory();
    let backing = folder.path().join("backing.raw");
    sparse_file(&backing, SIZE);
    for allowed in [true, false] {
        let mut builder = builder();
        if allowed {
            builder = builder.arg(&format!("--allow-backing={}", path(folder.path())));
        }
        let server = builder.start();
        let image = server.path("vdc.qcow2");
        let create = ["create", "-f", "qcow2", "-F", "raw", "-b", path(&backing)];
        tool("qemu-img", &[&create[..], &[path(&image)]].concat()).ok();
        let disk = format!("vdc={},format=qcow2,read-only", path(&image));
        let added = server.cli(&["disk", "add", &disk]);
        if allowed {
            added.ok();
        } else {
            assert!(added.error(1).contains("backing.raw"), "{added}");
        }
    }
}

#[test]
fn a_block_device_comes_and_goes() {
    let server = builder().start();
    let device = LoopDevice::new(&server.image("vdb"));
    let state = server.path("state");
    let disk = format!("vdb={},state={}", path(device.path()), path(&state));
    add_as(&server, &disk);
    server.checkpoint("cp1");
    server
        .open_live("vdb")
        .write(3 * CHUNK, &[1; 4096])
        .unwrap();
    // The same device, or the same node of it, is one image.
    let again = format!(
        "vdc={},state={}",
        path(device.path()),
        path(&server.path("state2"))
    );
    let refused = server.cli(&["disk", "add", &again]);
    assert!(refused.error(1).contains("disk 'vdb' already"), "{refused}");
    remove(&server, "vdb");
    add_as(&server, &disk);
    assert_eq!(changed(&server, "i1", "vdb", "cp1"), map_of(&[3]));
}

#[test]
fn a_disk_takes_the_size_that_its_server_was_started_anew_with() {
    let server = builder().start();
    let image = server.image("vdb");
    let mut base = NbdBase::file(&image);
    let state = server.path("state");
    add_as(
        &server,
        &format!("vdb={},state={}", base.uri(), path(&state)),
    );
    let mut guest = Guest::new(&server, "vdb");
    guest.write(0, &[1; 4096]);
    server.checkpoint("cp1");
    // Not flushed: the new server is given it again.
    guest.write(2 * CHUNK, &[2; 4096]);
    base.kill();
    let larger = 2 * SIZE;
    File::options()
        .write(true)
        .open(&image)
        .unwrap()
        .set_len(larger)
        .unwrap();
    base.start();
    let resized = server.cli_json(&["disk", "resize", "vdb", &larger.to_string()]);
    assert_eq!(
        (&resized["size_before"], &resized["size"]),
        (&SIZE.into(), &larger.into())
    );
    guest.write(CHUNK, &[3; 512]);
    let mut grown = server.open_live("vdb");
    assert_eq!(grown.export().size, larger);
    grown.write(larger - 512, &[4; 512]).unwrap();
    server.begin("b1", &["--since", "cp1", "--disk", "vdb"]);
    let context = "qemu:dirty-bitmap:cp1";
    let map = server.open_frozen("vdb@b1", &[context]).map(context);
    let expected = [
        (0, CHUNK, 0),
        (CHUNK, 2 * CHUNK, 1),
        (3 * CHUNK, SIZE - 3 * CHUNK, 0),
    ];
    assert_eq!(map, [&expected[..], &[(SIZE, SIZE, 1)]].concat());
    let mut bytes = guest.disk.clone();
    bytes.resize(larger as usize, 0);
    bytes[larger as usize - 512..].fill(4);
    let uri = server.frozen_uri("vdb@b1");
    assert_eq!(nbdcopy_sha256(&uri, server.directory()), sha256(&bytes));
    server.commit("b1");
    // From there on it is its size, also for the next connection.
    base.kill();
    base.start();
    guest.write(CHUNK, &[5; 512]);
    drop((guest, grown));
    remove(&server, "vdb");
    assert_eq!(fs::metadata(&image).unwrap().len(), larger);
}

#[test]
fn a_server_of_another_size_than_asked_for_is_not_used() {
    let server = builder().start();
    let image = server.image("vdb");
    let mut base = NbdBase::file(&image);
    let disk = format!(
        "vdb={},state={},reconnect=2s",
        base.uri(),
        path(&server.path("state"))
    );
    add_as(&server, &disk);
    let mut live = server.open_live("vdb");
    live.write(0, &[1; 512]).unwrap();
    base.kill();
    let file = File::options().write(true).open(&image).unwrap();
    file.set_len(2 * SIZE).unwrap();
    base.start();
    let refused = server.cli(&["disk", "resize", "vdb", &(3 * SIZE).to_string()]);
    refused.error(1);
    assert!(
        live.write(0, &[2; 512]).is_err(),
        "nobody has said that it is the right one"
    );
    server
        .cli(&["disk", "resize", "vdb", &(2 * SIZE).to_string()])
        .ok();
    live.write(0, &[3; 512]).unwrap();
}
