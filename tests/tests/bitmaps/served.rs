//! Dirty bitmaps that a backup serves.

use serde_json::{Value, json};
use stillpoint_tests::bitmap::{bitmap, change, map_now};
use stillpoint_tests::tools::{nbdinfo_map, qemu_img_dirty_map};
use stillpoint_tests::{CHUNK, Guest, RawNbd, Server};

use crate::{SIZE, add, map, refused, write};

#[test]
fn a_bitmap_that_a_backup_serves_stays_as_it_was_and_is_nobody_elses() {
    let server = Server::with_disk(SIZE);
    let (mut guest, mut qmp) = (Guest::new(&server, "vda"), server.qmp());
    add(&mut qmp, "vda", "a", &json!({}));
    add(&mut qmp, "vda", "b", &json!({"disabled": true}));
    write(&mut guest, 1);
    let begun = server.begin("b1", &["--bitmap", "a"]);
    let contexts = &begun["disks"][0]["contexts"];
    let listed = json!([
        "base:allocation",
        "qemu:allocation-depth",
        "qemu:dirty-bitmap:a"
    ]);
    assert_eq!(*contexts, listed);
    write(&mut guest, 1);
    write(&mut guest, 2);
    let context = "qemu:dirty-bitmap:a";
    assert_eq!(
        nbdinfo_map(&server.frozen_uri("vda@b1"), context),
        map(&[1..2])
    );
    assert_eq!(
        qemu_img_dirty_map(&server.frozen(), "vda@b1", context),
        map(&[1..2])
    );
    assert_eq!(bitmap(&mut qmp, "vda", "a")["busy"], true);
    assert_eq!(bitmap(&mut qmp, "vda", "a")["count"], 2 * CHUNK);

    let busy = "Bitmap 'a' is currently in use by another operation and cannot be used";
    for verb in ["remove", "clear", "enable", "disable"] {
        assert_eq!(
            change(&mut qmp, verb, "vda", "a"),
            Err(busy.to_owned()),
            "{verb}"
        );
    }
    for (target, source) in [("a", "b"), ("b", "a")] {
        let arguments = json!({"node": "vda", "target": target, "bitmaps": [source]});
        refused(&mut qmp, "block-dirty-bitmap-merge", &arguments, busy);
    }
    refused(
        &mut qmp,
        "backup-begin",
        &json!({"id": "b2", "bitmaps": ["a"]}),
        busy,
    );
    // The reply may have been lost, and is given again.
    assert_eq!(
        server.begin("b1", &["--bitmap", "a"])["uuid"],
        begun["uuid"]
    );
    server
        .cli(&["backup", "begin", "--id", "b1", "--bitmap", "b"])
        .refused("other arguments");
    let other = server.begin("b3", &["--bitmap", "b"]);
    assert_eq!(other["state"], "open");
    let mut nbd = RawNbd::connect(&server.frozen());
    nbd.structured_replies();
    // A bitmap is served by the backup that asked for it, and by no other.
    assert_eq!(
        nbd.list_contexts("vda@b1", &[context]),
        Ok(vec![context.to_owned()])
    );
    assert_eq!(nbd.list_contexts("vda@b3", &[context]), Ok(vec![]));

    server.commit("b1");
    assert_eq!(bitmap(&mut qmp, "vda", "a")["busy"], false);
    assert_eq!(map_now(&server, "vda", "a"), map(&[1..3]));
    change(&mut qmp, "clear", "vda", "a").unwrap();
}

#[test]
fn a_backup_serves_bitmaps_that_exist_and_that_cannot_be_taken_for_checkpoints() {
    let server = Server::builder()
        .disk("vda", SIZE)
        .disk("vdb", SIZE)
        .start();
    let mut qmp = server.qmp();
    server.checkpoint("cp1");
    for name in ["cp1", "cp2", "backup-vda", "one"] {
        add(&mut qmp, "vda", name, &json!({}));
    }
    let begin = |arguments: &Value| server.qmp().try_execute("backup-begin", arguments);
    let unknown = begin(&json!({"bitmaps": ["none"]})).unwrap_err();
    assert_eq!(unknown, "Dirty bitmap 'none' not found");
    let elsewhere = begin(&json!({"disks": ["vdb"], "bitmaps": ["one"]})).unwrap_err();
    assert_eq!(elsewhere, "Dirty bitmap 'one' not found");
    for arguments in [
        json!({"bitmaps": ["cp1"]}),
        json!({"bitmaps": ["cp2"], "checkpoint": "cp2"}),
        json!({"bitmaps": ["backup-vda"], "since": "cp1"}),
    ] {
        let refused = begin(&arguments).unwrap_err();
        assert!(
            refused.contains("could not tell which"),
            "{arguments}: {refused}"
        );
    }
    assert_eq!(
        begin(&json!({"id": "b1", "bitmaps": ["one", "backup-vda"]})).unwrap()["id"],
        "b1"
    );
    let contexts = server.backup("b1")["disks"].clone();
    assert!(
        contexts[0]["contexts"]
            .to_string()
            .contains("dirty-bitmap:one"),
        "{contexts}"
    );
    assert!(
        !contexts[1]["contexts"]
            .to_string()
            .contains("dirty-bitmap:one"),
        "{contexts}"
    );
    // Neither commands of one kind touch what is of the other.
    assert_eq!(change(&mut qmp, "remove", "vda", "cp1"), Ok(json!({})));
    assert_eq!(server.dirty_bytes("cp1", "vda"), 0);
    server
        .cli(&["checkpoint", "delete", "cp2"])
        .refused("there is no checkpoint 'cp2'");
}
