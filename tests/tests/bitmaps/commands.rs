//! What each command does, and what it refuses.

use serde_json::{Value, json};
use stillpoint_tests::bitmap::{action, bitmap, bitmaps, change, map_now};
use stillpoint_tests::tools::sparse_file;
use stillpoint_tests::{CHUNK, Guest, KIB, MIB, Qmp, Server};

use crate::{SIZE, add, map, merge, refused, write};

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
