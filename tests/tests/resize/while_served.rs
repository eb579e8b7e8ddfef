//! With guests that write, backups that are open, and bitmaps that record.

use std::fs;
use std::sync::atomic::{AtomicBool, Ordering};

use serde_json::json;
use stillpoint_tests::bitmap::{bitmap, change, map_now};
use stillpoint_tests::guest::dirty_map;
use stillpoint_tests::tools::{nbdcopy_sha256, nbdinfo_map, sha256, sparse_file, tool};
use stillpoint_tests::{CHUNK, Guest, LoopDevice, MIB, Server};

use super::{AFTER, BEFORE, WRITTEN, changed_since, grown_map, prepared, resize, size_of};

const NO_SPACE: u32 = 28;

#[test]
fn a_disk_grows_while_a_guest_writes_and_open_backups_stay_as_they_are() {
    let mut server = prepared();
    let then = server.open_live("vda").read_all();
    server.begin("b1", &["--since", "cp1"]);
    let map = nbdinfo_map(&server.frozen_uri("vda@b1"), "qemu:dirty-bitmap:cp1");
    let stop = AtomicBool::new(false);
    let mut old = server.open_live("vda");
    std::thread::scope(|scope| {
        let mut busy = server.open_live("vda");
        let stop = &stop;
        scope.spawn(move || {
            for number in 0_u64.. {
                let place = 8 * CHUNK + number % 16 * 4096;
                busy.write(place, &[number as u8; 4096]).unwrap();
                // And where the disk ends.
                busy.write(BEFORE - 512, &[number as u8; 512]).unwrap();
                if stop.load(Ordering::Relaxed) {
                    return;
                }
            }
        });
        let grown = resize(&server, AFTER);
        let expected = json!({"disk": "vda", "size_before": BEFORE, "size": AFTER});
        assert_eq!(grown, expected);
        stop.store(true, Ordering::Relaxed);
    });
    assert_eq!(size_of(&server), AFTER);
    assert_eq!(fs::metadata(server.image("vda")).unwrap().len(), AFTER);

    // Who is there keeps to the size that it was told.
    assert_eq!(old.write(BEFORE, &[1; 512]), Err(NO_SPACE));
    old.write(BEFORE - 512, &[7; 512]).unwrap();
    let mut new = server.open_live("vda");
    assert_eq!(new.export().size, AFTER);
    assert!(
        new.read(BEFORE, 4096)
            .unwrap()
            .iter()
            .all(|byte| *byte == 0)
    );
    for place in [BEFORE, 62 * MIB, AFTER - 512] {
        new.write(place, &[9; 512]).unwrap();
    }

    let check = |server: &Server, how: &str| {
        let mut frozen = server.open_frozen("vda@b1", &[]);
        assert_eq!(frozen.export().size, BEFORE, "{how}");
        assert!(frozen.read_all() == then, "{how}");
        let uri = server.frozen_uri("vda@b1");
        let found = nbdinfo_map(&uri, "qemu:dirty-bitmap:cp1");
        assert_eq!(found, map, "{how}");
    };
    check(&server, "after the resize");
    let written = [WRITTEN, 8];
    let found = changed_since(&server, "i1", "cp1", "after the resize");
    assert_eq!(found, grown_map(&written));
    server.kill();
    server.start();
    check(&server, "after a kill");
    let found = changed_since(&server, "i2", "cp1", "after a kill");
    assert_eq!(found, grown_map(&written));
    server.stop();
    server.start();
    check(&server, "after a stop");
    server.commit("b1");
    let found = changed_since(&server, "i3", "cp1", "after a stop");
    assert_eq!(found, grown_map(&written));
}

#[test]
fn a_chain_goes_on_over_a_resize() {
    let server = prepared();
    let path = |name: &str| server.path(name).display().to_string();
    let (full, incremental) = (path("full.qcow2"), path("incremental.qcow2"));
    server.begin("b1", &["--checkpoint", "cp2"]);
    let from = server.frozen_uri("vda@b1");
    let convert = ["convert", "-f", "raw", "-O", "qcow2"];
    tool("qemu-img", &[&convert[..], &[&from, &full]].concat()).ok();
    server.commit("b1");
    resize(&server, AFTER);
    let mut guest = Guest::new(&server, "vda");
    guest.disk = server.open_live("vda").read_all();
    guest.write(30 * MIB + 17, &[5; 9000]);
    guest.write(BEFORE - 100, &[6; 200]);
    server.begin("b2", &["--since", "cp2", "--checkpoint", "cp3"]);
    guest.write(60 * MIB, &[7; 5]);
    // The base grows first, as for any image that has grown.
    let bytes = AFTER.to_string();
    tool("qemu-img", &["resize", &full, &bytes]).ok();
    let from = server.frozen_uri("vda@cp2..b2");
    let backed = ["-B", &full, "-F", "qcow2", &from, &incremental];
    tool("qemu-img", &[&convert[..], &backed].concat()).ok();
    let restored = path("restored.raw");
    tool(
        "qemu-img",
        &["convert", "-O", "raw", &incremental, &restored],
    )
    .ok();
    let whole = nbdcopy_sha256(&server.frozen_uri("vda@b2"), server.directory());
    assert_eq!(sha256(&fs::read(restored).unwrap()), whole);
    server.commit("b2");
    // What is new is new once.
    let found = changed_since(&server, "i1", "cp3", "after the backup");
    assert_eq!(found, dirty_map(&[60 * MIB / CHUNK].into(), AFTER));
}

#[test]
fn what_is_new_is_dirty_in_bitmaps_that_record_and_in_no_other() {
    let mut server = Server::with_disk(BEFORE);
    let mut qmp = server.qmp();
    for (name, disabled) in [("on", false), ("off", true), ("coarse", false)] {
        let granularity = if name == "coarse" { MIB } else { CHUNK };
        let arguments = json!({"node": "vda", "name": name, "persistent": true,
            "disabled": disabled, "granularity": granularity});
        qmp.execute("block-dirty-bitmap-add", &arguments);
    }
    server.open_live("vda").write(0, &[1; 512]).unwrap();
    resize(&server, AFTER);
    for how in ["after the resize", "after a kill"] {
        assert_eq!(map_now(&server, "vda", "on"), grown_map(&[0]), "{how}");
        assert_eq!(map_now(&server, "vda", "off"), [(0, AFTER, 0)], "{how}");
        let coarse: Vec<u64> = (0..16).collect();
        assert_eq!(
            map_now(&server, "vda", "coarse"),
            grown_map(&coarse),
            "{how}"
        );
        server.kill();
        server.start();
    }
    let mut qmp = server.qmp();
    change(&mut qmp, "enable", "vda", "off").unwrap();
    server
        .open_live("vda")
        .write(AFTER - 512, &[1; 512])
        .unwrap();
    let last = AFTER / CHUNK;
    let expected = dirty_map(&[last].into(), AFTER);
    assert_eq!(map_now(&server, "vda", "off"), expected);
    assert_eq!(bitmap(&mut qmp, "vda", "off")["count"], CHUNK);
}

#[test]
fn resizes_and_instants_that_come_together_take_turns() {
    let server = prepared();
    let sizes = [60 * MIB, AFTER, 62 * MIB, 64 * MIB];
    std::thread::scope(|scope| {
        for size in sizes {
            let mut qmp = server.qmp();
            scope.spawn(move || {
                let arguments = json!({"disk": "vda", "size": size});
                match qmp.try_execute("disk-resize", &arguments) {
                    Ok(answer) => assert_eq!(answer["size"], size),
                    Err(error) => assert!(error.contains("cannot be made"), "{error}"),
                }
            });
            let mut qmp = server.qmp();
            scope.spawn(move || {
                let begun = qmp.execute("backup-begin", &json!({"since": "cp1"}));
                qmp.execute("checkpoint-create", &json!({"name": format!("c{size}")}));
                qmp.execute("backup-commit", &json!({"id": begun["id"]}));
            });
        }
    });
    assert_eq!(size_of(&server), AFTER);
    let found = changed_since(&server, "i1", "cp1", "at the end");
    assert_eq!(found, grown_map(&[WRITTEN]));
}

#[test]
fn a_block_device_grows_to_the_size_that_it_has() {
    let builder = Server::builder();
    let backing = builder.path("backing");
    sparse_file(&backing, BEFORE);
    let device = LoopDevice::new(&backing);
    let state = builder.path("state");
    let disk = format!("vda={},state={}", device.path().display(), state.display());
    let mut server = builder.disk_as(&disk).start();
    super::write(&server);
    let refusal = server.cli(&["disk", "resize", "vda", &AFTER.to_string()]);
    let error = refusal.error(1);
    for size in [BEFORE, AFTER] {
        assert!(error.contains(&size.to_string()), "{error}");
    }

    sparse_file(&backing, AFTER);
    device.update_size();
    server.cli(&["disk", "resize", "vda", "60M"]).error(1);
    server
        .cli(&["disk", "resize", "vda", &AFTER.to_string()])
        .ok();
    let found = changed_since(&server, "i1", "cp1", "enlarged");
    assert_eq!(found, grown_map(&[WRITTEN]));
    let mut guest = Guest::new(&server, "vda");
    guest.write(AFTER - 512, &[3; 512]);
    guest.flush();
    server.stop();
    server.start();
    let found = changed_since(&server, "i2", "cp1", "after a stop");
    assert_eq!(found, grown_map(&[WRITTEN]));
}
