//! Dirty bitmaps as QEMU has them: what each command does, what it refuses, and what outlives whom.

#![expect(
    clippy::single_range_in_vec_init,
    reason = "what is dirty is a list of ranges, however short"
)]

use std::fs;
use std::path::PathBuf;

use serde_json::{Value, json};
use stillpoint_tests::bitmap::{action, bitmap, bitmaps, change, frozen_map, map_now};
use stillpoint_tests::state::{self, pretend_power_cut};
use stillpoint_tests::tools::{nbdinfo_map, qemu_img_dirty_map, sparse_file};
use stillpoint_tests::{CHUNK, Extent, Guest, KIB, MIB, Qmp, RawNbd, Server};

const SIZE: u64 = 8 * MIB;

/// A map in which only `dirty` chunks are.
fn map(dirty: &[std::ops::Range<u64>]) -> Vec<Extent> {
    let mut map: Vec<Extent> = Vec::new();
    let mut at = 0;
    for chunks in dirty {
        let (start, end) = (chunks.start * CHUNK, (chunks.end * CHUNK).min(SIZE));
        if at < start {
            map.push((at, start - at, 0));
        }
        map.push((start, end - start, 1));
        at = end;
    }
    if at < SIZE {
        map.push((at, SIZE - at, 0));
    }
    map
}

fn write(guest: &mut Guest, chunk: u64) {
    guest.write(chunk * CHUNK + 512, &[7; 512]);
}

#[track_caller]
fn add(qmp: &mut Qmp, node: &str, name: &str, more: &Value) {
    let mut arguments = json!({"node": node, "name": name});
    let members = arguments.as_object_mut().unwrap();
    members.extend(more.as_object().unwrap().clone());
    qmp.execute("block-dirty-bitmap-add", &arguments);
}

#[track_caller]
fn merge(qmp: &mut Qmp, node: &str, target: &str, sources: &Value) {
    let arguments = json!({"node": node, "target": target, "bitmaps": sources});
    qmp.execute("block-dirty-bitmap-merge", &arguments);
}

#[track_caller]
fn refused(qmp: &mut Qmp, command: &str, arguments: &Value, expected: &str) {
    let found = qmp.try_execute(command, arguments);
    assert_eq!(found, Err(expected.to_owned()), "{command} {arguments}");
}

#[test]
fn a_bitmap_takes_in_what_changes_while_it_records_and_nothing_else() {
    let server = Server::with_disk(SIZE);
    let (mut guest, mut qmp) = (Guest::new(&server, "vda"), server.qmp());
    write(&mut guest, 1);
    add(&mut qmp, "vda", "a", &json!({}));
    add(&mut qmp, "vda", "off", &json!({"disabled": true}));
    assert_eq!(
        bitmap(&mut qmp, "vda", "a"),
        json!({"name": "a", "count": 0, "granularity": CHUNK, "recording": true, "busy": false,
            "persistent": false})
    );
    write(&mut guest, 3);
    guest.zeroes(5 * CHUNK, 4096, 0);
    guest.trim(6 * CHUNK, 4096);
    assert_eq!(map_now(&server, "vda", "a"), map(&[3..4, 5..7]));
    assert_eq!(bitmap(&mut qmp, "vda", "a")["count"], 3 * CHUNK);
    assert_eq!(bitmap(&mut qmp, "vda", "off")["count"], 0);

    change(&mut qmp, "disable", "vda", "a").unwrap();
    write(&mut guest, 9);
    write(&mut guest, 3);
    assert_eq!(map_now(&server, "vda", "a"), map(&[3..4, 5..7]));
    assert_eq!(bitmap(&mut qmp, "vda", "a")["recording"], false);
    change(&mut qmp, "enable", "vda", "a").unwrap();
    assert_eq!(map_now(&server, "vda", "a"), map(&[3..4, 5..7]));
    write(&mut guest, 11);
    assert_eq!(map_now(&server, "vda", "a"), map(&[3..4, 5..7, 11..12]));
    change(&mut qmp, "enable", "vda", "a").unwrap();
    assert_eq!(map_now(&server, "vda", "a"), map(&[3..4, 5..7, 11..12]));

    change(&mut qmp, "clear", "vda", "a").unwrap();
    assert_eq!(map_now(&server, "vda", "a"), map(&[]));
    write(&mut guest, 3);
    assert_eq!(map_now(&server, "vda", "a"), map(&[3..4]));
    change(&mut qmp, "remove", "vda", "a").unwrap();
    let left = bitmaps(&mut qmp, "vda");
    assert_eq!(left.len(), 1, "{left:?}");
}

#[test]
fn merging_takes_what_is_dirty_in_others_whatever_their_granularity_and_disk() {
    let builder = Server::builder().disk("vda", SIZE).disk("vdc", SIZE / 2);
    let path = builder.path("vdb.raw");
    sparse_file(&path, SIZE);
    let fine = format!("vdb={},granularity=4k", path.display());
    let server = builder.disk_as(&fine).start();
    let mut qmp = server.qmp();
    let mut nbd = server.open_live("vdb");
    add(&mut qmp, "vdb", "fine", &json!({"granularity": 4096}));
    add(&mut qmp, "vdb", "coarse", &json!({"granularity": MIB}));
    add(
        &mut qmp,
        "vdb",
        "target",
        &json!({"granularity": 4096, "disabled": true}),
    );
    add(&mut qmp, "vda", "target", &json!({}));
    add(&mut qmp, "vdc", "small", &json!({}));
    nbd.write(2 * MIB + 4096, &[1; 512]).unwrap();
    let fine = [(0, 2 * MIB + 4096, 0), (2 * MIB + 4096, 4096, 1)];
    assert_eq!(map_now(&server, "vdb", "fine")[..2], fine);
    let coarse = [(0, 2 * MIB, 0), (2 * MIB, MIB, 1), (3 * MIB, 5 * MIB, 0)];
    assert_eq!(map_now(&server, "vdb", "coarse"), coarse);

    merge(&mut qmp, "vdb", "target", &json!(["fine"]));
    assert_eq!(map_now(&server, "vdb", "target")[..2], fine);
    merge(
        &mut qmp,
        "vdb",
        "target",
        &json!(["coarse", {"node": "vdb", "name": "fine"}]),
    );
    assert_eq!(map_now(&server, "vdb", "target"), coarse);
    merge(
        &mut qmp,
        "vda",
        "target",
        &json!([{"node": "vdb", "name": "fine"}]),
    );
    assert_eq!(map_now(&server, "vda", "target"), map(&[32..33]));
    merge(&mut qmp, "vda", "target", &json!(["target"]));
    assert_eq!(map_now(&server, "vda", "target"), map(&[32..33]));
    let arguments = json!({"node": "vda", "target": "target",
        "bitmaps": [{"node": "vdc", "name": "small"}]});
    refused(
        &mut qmp,
        "block-dirty-bitmap-merge",
        &arguments,
        "Bitmaps are of different sizes (destination size is 8388608, source size is 4194304) \
         and can't be merged",
    );
}

#[test]
fn what_cannot_be_done_is_refused_in_qemus_words() {
    let server = Server::with_disk(SIZE);
    let mut qmp = server.qmp();
    let qmp = &mut qmp;
    add(qmp, "vda", "a", &json!({}));
    let long = "é".repeat(512);
    let add = "block-dirty-bitmap-add";
    for (arguments, expected) in [
        (
            json!({"node": "vda", "name": "a"}),
            "Bitmap already exists: a".to_owned(),
        ),
        (
            json!({"node": "vda", "name": ""}),
            "Bitmap name cannot be empty".to_owned(),
        ),
        (
            json!({"node": "vda"}),
            "Parameter 'name' is missing".to_owned(),
        ),
        (
            json!({"node": "nope", "name": "b"}),
            "Cannot find device='nope' nor node-name='nope'".to_owned(),
        ),
        (
            json!({"node": "vda", "name": "b", "granularity": 65_537}),
            "Granularity must be power of 2 and at least 512".to_owned(),
        ),
        (
            json!({"node": "vda", "name": "b", "granularity": 1_u64 << 32}),
            "Parameter 'granularity' expects uint32_t".to_owned(),
        ),
        (
            json!({"node": "vda", "name": "b", "granularity": "64k"}),
            "Parameter 'granularity' expects uint64".to_owned(),
        ),
        (
            json!({"node": "vda", "name": "b", "granularity": 32_768}),
            "Granularity must be at least 65536: more finely disk 'vda' is not tracked".to_owned(),
        ),
        (
            json!({"node": "vda", "name": long}),
            format!("Bitmap name too long: {long}"),
        ),
        (
            json!({"node": "vda", "name": long, "persistent": true}),
            format!(
                "Can't make bitmap '{long}' persistent in 'vda': \
                 Name length exceeds maximum (1023 characters)"
            ),
        ),
        (
            json!({"node": "vda", "name": "b\0"}),
            "Bitmap name cannot contain NUL".to_owned(),
        ),
    ] {
        refused(qmp, add, &arguments, &expected);
    }
    for verb in ["remove", "clear", "enable", "disable"] {
        let command = format!("block-dirty-bitmap-{verb}");
        let arguments = json!({"node": "vda", "name": "b"});
        refused(qmp, &command, &arguments, "Dirty bitmap 'b' not found");
        let arguments = json!({"node": "vdb", "name": "b"});
        refused(qmp, &command, &arguments, "Node 'vdb' not found");
    }
    let merge = "block-dirty-bitmap-merge";
    for (target, sources, expected) in [
        ("b", json!(["a"]), "Dirty bitmap 'b' not found"),
        ("a", json!(["b"]), "Dirty bitmap 'b' not found"),
        (
            "a",
            json!([{"node": "x", "name": "a"}]),
            "Node 'x' not found",
        ),
        (
            "a",
            json!([{"name": "a"}]),
            "Parameter 'bitmaps[0].node' is missing",
        ),
        (
            "a",
            json!([3]),
            "Invalid parameter type for 'null', expected: BlockDirtyBitmapOrStr",
        ),
    ] {
        let arguments = json!({"node": "vda", "target": target, "bitmaps": sources});
        refused(qmp, merge, &arguments, expected);
    }
    // The longest name there is.
    let longest = "é".repeat(511) + "x";
    add_and_find(&server, qmp, &longest);
}

#[track_caller]
fn add_and_find(server: &Server, qmp: &mut Qmp, name: &str) {
    add(qmp, "vda", name, &json!({"persistent": true}));
    assert_eq!(map_now(server, "vda", name), map(&[]));
    assert_eq!(bitmap(qmp, "vda", name)["persistent"], true);
}

#[test]
fn names_are_any_text_byte_by_byte() {
    let mut server = Server::with_disk(SIZE);
    let names = [
        "a b/c,d:e@f..g",
        "\u{1F4BE}\n\"'\\",
        "-",
        "A",
        "a\u{301}",
        "\u{e1}",
    ];
    for name in names {
        add_and_find(&server, &mut server.qmp(), name);
    }
    server.kill();
    server.start();
    let found: Vec<Value> = bitmaps(&mut server.qmp(), "vda");
    let found: Vec<&str> = found
        .iter()
        .rev()
        .filter_map(|b| b["name"].as_str())
        .collect();
    assert_eq!(found, names);
    for name in names {
        assert_eq!(map_now(&server, "vda", name), map(&[]), "{name:?}");
    }
}

#[test]
fn a_transaction_does_all_at_one_instant_or_nothing() {
    let server = Server::with_disk(SIZE);
    let (mut guest, mut qmp) = (Guest::new(&server, "vda"), server.qmp());
    add(&mut qmp, "vda", "a", &json!({}));
    add(&mut qmp, "vda", "p", &json!({"persistent": true}));
    write(&mut guest, 1);
    let before = bitmaps(&mut qmp, "vda");
    let on = |name: &str| json!({"node": "vda", "name": name});
    for (last, expected) in [
        (action("add", &on("new")), "Bitmap already exists: new"),
        (action("add", &on("a")), "Bitmap already exists: a"),
        (
            action("clear", &on("a")),
            "Bitmap 'a' is currently in use by another operation and cannot be used",
        ),
        (
            action("enable", &on("nope")),
            "Dirty bitmap 'nope' not found",
        ),
        (
            json!({"type": "abort", "data": {}}),
            "Transaction aborted using Abort action",
        ),
        (
            json!({"type": "drive-backup", "data": {}}),
            "Parameter 'type' does not accept value 'drive-backup'",
        ),
        (
            action("clear", &json!({"node": "vda"})),
            "Parameter 'actions[4].data.name' is missing",
        ),
    ] {
        let actions = [
            action("add", &on("new")),
            action("clear", &on("p")),
            action("disable", &on("a")),
            action("remove", &on("a")),
            last,
        ];
        refused(
            &mut qmp,
            "transaction",
            &json!({"actions": actions}),
            expected,
        );
        assert_eq!(bitmaps(&mut qmp, "vda"), before, "{expected}");
    }
    assert_eq!(map_now(&server, "vda", "a"), map(&[1..2]));

    // What comes later sees what came before: the usual way to begin the next of a chain.
    let merge = json!({"node": "vda", "target": "sum", "bitmaps": ["a", "p"]});
    let actions = [
        action(
            "add",
            &json!({"node": "vda", "name": "next", "persistent": true}),
        ),
        action("disable", &on("a")),
        action(
            "add",
            &json!({"node": "vda", "name": "sum", "disabled": true}),
        ),
        action("merge", &merge),
        action("clear", &on("p")),
        action("add", &on("brief")),
        action("remove", &on("brief")),
    ];
    qmp.execute(
        "transaction",
        &json!({"actions": actions, "properties": {}}),
    );
    write(&mut guest, 2);
    for (name, dirty) in [("next", 2..3), ("a", 1..2), ("sum", 1..2), ("p", 2..3)] {
        assert_eq!(map_now(&server, "vda", name), map(&[dirty]), "{name}");
    }
    qmp.execute("transaction", &json!({"actions": []}));
    let properties = json!({"completion-mode": "grouped"});
    refused(
        &mut qmp,
        "transaction",
        &json!({"actions": [action("clear", &on("p"))], "properties": properties}),
        "Action 'block-dirty-bitmap-clear' does not support transaction property \
         completion-mode = grouped",
    );
}

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

#[test]
fn what_persists_is_there_after_a_stop_a_kill_and_a_power_cut_and_what_does_not_is_gone() {
    let mut server = Server::with_disk(SIZE);
    let mut guest = Guest::new(&server, "vda");
    let mut qmp = server.qmp();
    add(&mut qmp, "vda", "on", &json!({"persistent": true}));
    add(&mut qmp, "vda", "off", &json!({"persistent": true}));
    add(
        &mut qmp,
        "vda",
        "coarse",
        &json!({"persistent": true, "granularity": MIB}),
    );
    write(&mut guest, 1);
    change(&mut qmp, "disable", "vda", "off").unwrap();
    let (mut on, off) = (vec![1..2], [1..2]);
    for (round, chunk) in [(0, 4), (1, 6), (2, 8)] {
        add(&mut server.qmp(), "vda", "brief", &json!({}));
        let mut guest = Guest::new(&server, "vda");
        write(&mut guest, chunk);
        on.push(chunk..chunk + 1);
        let mut before = bitmaps(&mut server.qmp(), "vda");
        before.remove(0);
        match round {
            0 => server.stop(),
            1 => server.kill(),
            _ => {
                server.kill();
                pretend_power_cut(&state::directory(&server, "vda"));
            }
        }
        server.start();
        let after = bitmaps(&mut server.qmp(), "vda");
        if round < 2 {
            assert_eq!(after, before, "round {round}");
            assert_eq!(map_now(&server, "vda", "on"), map(&on), "round {round}");
        } else {
            // The region that was being written is in doubt, and the disk has one more.
            let found = map_now(&server, "vda", "on");
            assert_eq!(found, map(&[0..64]), "round {round}");
        }
        assert_eq!(map_now(&server, "vda", "off"), map(&off), "round {round}");
    }
    assert_eq!(bitmap(&mut server.qmp(), "vda", "coarse")["count"], 4 * MIB);
}

#[test]
fn a_backup_that_goes_on_after_a_kill_serves_the_bitmaps_it_served() {
    let mut server = Server::with_disk(SIZE);
    let mut guest = Guest::new(&server, "vda");
    let mut qmp = server.qmp();
    add(&mut qmp, "vda", "kept", &json!({"persistent": true}));
    add(&mut qmp, "vda", "brief", &json!({}));
    add(&mut qmp, "vda", "off", &json!({"disabled": true}));
    write(&mut guest, 1);
    merge(&mut qmp, "vda", "off", &json!(["kept"]));
    let names = ["kept", "brief", "off"];
    server.begin("b1", &["--bitmap=kept", "--bitmap=brief", "--bitmap=off"]);
    for round in 0..3 {
        let mut guest = Guest::new(&server, "vda");
        write(&mut guest, 1);
        write(&mut guest, 10 + round);
        for name in names {
            assert_eq!(
                frozen_map(&server, "vda", "b1", name),
                map(&[1..2]),
                "{name}, {round}"
            );
        }
        if round == 0 {
            server.stop();
        } else {
            server.kill();
        }
        server.start();
    }
    for name in names {
        assert_eq!(
            frozen_map(&server, "vda", "b1", name),
            map(&[1..2]),
            "{name}"
        );
    }
    let left = bitmaps(&mut server.qmp(), "vda");
    assert_eq!(left.len(), 1, "{left:?}");
    assert_eq!(
        (&left[0]["name"], &left[0]["busy"]),
        (&json!("kept"), &json!(true))
    );
    server.abort("b1");
    assert_eq!(map_now(&server, "vda", "kept"), map(&[1..2, 10..13]));

    server.begin("again", &["--bitmap=kept"]);
    server.kill();
    let file = state::directory(&server, "vda").join("backups/again/bitmap-0");
    fs::remove_file(file).unwrap();
    server.start();
    let broken = server.cli(&["backup", "show", "again"]);
    assert!(
        broken.exits(4).stdout.contains("dirty bitmap 'kept'"),
        "{broken}"
    );
    server.abort("again");
    assert_eq!(map_now(&server, "vda", "kept"), map(&[1..2, 10..13]));
}

fn files(server: &Server) -> Vec<PathBuf> {
    let entries = fs::read_dir(state::directory(server, "vda").join("bitmaps")).unwrap();
    let mut files: Vec<_> = entries.map(|entry| entry.unwrap().path()).collect();
    files.sort();
    files
}

/// The file of the only bitmap whose file is none of `others`.
fn new_file(server: &Server, others: &[PathBuf]) -> PathBuf {
    let mut files = files(server);
    files.retain(|file| !others.contains(file));
    assert_eq!(files.len(), 1, "{files:?}");
    files.remove(0)
}

#[test]
fn damaged_or_missing_bits_cost_their_own_bitmap_alone() {
    let mut server = Server::with_disk(SIZE);
    let mut guest = Guest::new(&server, "vda");
    for (damage, what) in [
        ("missing", "cannot be read"),
        ("flipped", "damaged"),
        ("cut", "damaged"),
    ] {
        let mut qmp = server.qmp();
        add(&mut qmp, "vda", "good", &json!({"persistent": true}));
        let others = files(&server);
        add(&mut qmp, "vda", "bad", &json!({"persistent": true}));
        guest.write(CHUNK, &[1; 512]);
        change(&mut qmp, "disable", "vda", "bad").unwrap();
        let file = new_file(&server, &others);
        server.kill();
        let mut bytes = fs::read(&file).unwrap();
        match damage {
            "missing" => fs::remove_file(&file).unwrap(),
            "cut" => fs::write(&file, &bytes[..bytes.len() - 1]).unwrap(),
            _ => {
                bytes[100] ^= 4;
                fs::write(&file, &bytes).unwrap();
            }
        }
        server.start();
        guest = Guest::new(&server, "vda");
        let mut qmp = server.qmp();
        assert!(
            server.stderr().contains(what),
            "{damage}: {}",
            server.stderr()
        );
        let expected = json!({"name": "bad", "count": 0, "granularity": CHUNK, "recording": false,
            "busy": false, "persistent": true, "inconsistent": true});
        assert_eq!(bitmap(&mut qmp, "vda", "bad"), expected, "{damage}");
        assert_eq!(map_now(&server, "vda", "good"), map(&[1..2]), "{damage}");
        let refusal = "Bitmap 'bad' is inconsistent and cannot be used".to_owned();
        for verb in ["clear", "enable", "disable"] {
            assert_eq!(
                change(&mut qmp, verb, "vda", "bad"),
                Err(refusal.clone()),
                "{damage}"
            );
        }
        for (target, source) in [("bad", "good"), ("good", "bad")] {
            let arguments = json!({"node": "vda", "target": target, "bitmaps": [source]});
            refused(&mut qmp, "block-dirty-bitmap-merge", &arguments, &refusal);
        }
        refused(
            &mut qmp,
            "backup-begin",
            &json!({"bitmaps": ["bad"]}),
            &refusal,
        );
        let shown = server.cli(&["bitmap", "list"]);
        assert!(shown.ok().contains("inconsistent"), "{shown}");
        change(&mut qmp, "remove", "vda", "bad").unwrap();
        change(&mut qmp, "remove", "vda", "good").unwrap();
        assert_eq!(files(&server), Vec::<PathBuf>::new(), "{damage}");
    }
}

#[test]
fn a_record_of_the_journal_that_is_lost_is_noticed_by_the_file_that_is_gone() {
    let mut server = Server::with_disk(SIZE);
    let mut guest = Guest::new(&server, "vda");
    let mut qmp = server.qmp();
    add(&mut qmp, "vda", "good", &json!({"persistent": true}));
    add(
        &mut qmp,
        "vda",
        "merged",
        &json!({"persistent": true, "disabled": true}),
    );
    write(&mut guest, 1);
    let journal = state::directory(&server, "vda").join("journal");
    let before = fs::metadata(&journal).unwrap().len();
    merge(&mut qmp, "vda", "merged", &json!(["good"]));
    server.kill();
    fs::OpenOptions::new()
        .write(true)
        .open(&journal)
        .unwrap()
        .set_len(before)
        .unwrap();
    server.start();
    let mut qmp = server.qmp();
    assert_eq!(bitmap(&mut qmp, "vda", "merged")["inconsistent"], true);
    assert_eq!(map_now(&server, "vda", "good"), map(&[1..2]));
}

#[test]
fn what_was_written_behind_the_servers_back_makes_bitmaps_inconsistent() {
    let mut server = Server::with_disk(SIZE);
    add(&mut server.qmp(), "vda", "a", &json!({"persistent": true}));
    server.stop();
    let image = fs::OpenOptions::new()
        .write(true)
        .open(server.image("vda"))
        .unwrap();
    std::os::unix::fs::FileExt::write_all_at(&image, &[1; 512], 0).unwrap();
    server.start();
    let mut qmp = server.qmp();
    assert_eq!(bitmap(&mut qmp, "vda", "a")["inconsistent"], true);
    add(&mut qmp, "vda", "b", &json!({"persistent": true}));
    assert_eq!(map_now(&server, "vda", "b"), map(&[]));
    change(&mut qmp, "remove", "vda", "a").unwrap();
    add(&mut qmp, "vda", "a", &json!({"persistent": true}));
    assert_eq!(map_now(&server, "vda", "a"), map(&[]));
}

#[test]
fn the_command_line_does_what_the_control_socket_does() {
    let mut server = Server::with_disk(SIZE);
    let mut guest = Guest::new(&server, "vda");
    assert_eq!(server.cli(&["bitmap", "list"]).ok(), "no bitmaps\n");
    server
        .cli(&["bitmap", "add", "vda", "a", "--granularity", "128k"])
        .ok();
    server
        .cli(&["bitmap", "add", "vda", "b", "--disabled", "--transient"])
        .ok();
    write(&mut guest, 1);
    server.cli(&["bitmap", "merge", "vda", "b", "a"]).ok();
    server.cli(&["bitmap", "disable", "vda", "a"]).ok();
    let list = server.cli(&["bitmap", "list"]);
    let rows: Vec<Vec<&str>> = list
        .ok()
        .lines()
        .map(|l| l.split_whitespace().collect())
        .collect();
    assert_eq!(
        rows[0],
        ["DISK", "BITMAP", "DIRTY", "GRANULARITY", "KEPT", "STATE"]
    );
    assert_eq!(
        rows[1],
        ["vda", "a", "128", "KiB", "128", "KiB", "yes", "disabled"]
    );
    assert_eq!(
        rows[2],
        ["vda", "b", "128", "KiB", "64", "KiB", "no", "disabled"]
    );
    let json = server.cli_json(&["bitmap", "list"]);
    assert_eq!(json[0]["dirty-bitmaps"][0]["count"], 128 * KIB, "{json}");
    server.cli(&["bitmap", "enable", "vda", "a"]).ok();
    server.cli(&["bitmap", "clear", "vda", "b"]).ok();
    server
        .cli(&["bitmap", "clear", "vda", "x"])
        .refused("Dirty bitmap 'x' not found");
    server.cli(&["bitmap", "remove", "vda", "b"]).ok();
    server.stop();
    server.start();
    let list = server.cli_json(&["bitmap", "list"]);
    let kept = json!([{"name": "a", "count": 128 * KIB, "granularity": 128 * KIB,
        "recording": true, "busy": false, "persistent": true}]);
    assert_eq!(list[0]["dirty-bitmaps"], kept);
}

#[test]
fn limits_have_names() {
    let server = Server::with_disk(SIZE);
    let mut qmp = server.qmp();
    let add = |n: usize| action("add", &json!({"node": "vda", "name": n.to_string()}));
    let too_many: Vec<_> = (0..=1024).map(add).collect();
    let one_less = &too_many[..1024];
    refused(
        &mut qmp,
        "transaction",
        &json!({"actions": too_many}),
        "a transaction has at most 1024 actions",
    );
    qmp.execute("transaction", &json!({"actions": one_less}));
    let arguments = json!({"node": "vda", "name": "more"});
    let full = "Maximum number of bitmaps of 'vda' is already reached";
    refused(&mut qmp, "block-dirty-bitmap-add", &arguments, full);
    let arguments = json!({"node": "vda", "name": "more", "persistent": true});
    let full = "Can't make bitmap 'more' persistent in 'vda': \
                Maximum number of persistent bitmaps is already reached";
    refused(&mut qmp, "block-dirty-bitmap-add", &arguments, full);
}
