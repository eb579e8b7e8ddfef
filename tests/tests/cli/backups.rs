//! Backups by hand: what a begin tells, and what an end does.

use std::path::Path;

use serde_json::Value;
use stillpoint_tests::server::{named, names};
use stillpoint_tests::tools::{path, tool};
use stillpoint_tests::{CHUNK, Guest, MIB, Server};

#[test]
fn begin_tells_what_the_contract_says() {
    let server = Server::with_disk(MIB);
    server.checkpoint("cp1");
    Guest::new(&server, "vda").write(3 * CHUNK - 1, &[1; 2]);
    let begun = server.begin("b1", &["--since", "cp1", "--checkpoint", "cp2"]);
    for (key, expected) in [
        ("id", "b1"),
        ("state", "open"),
        ("since", "cp1"),
        ("checkpoint", "cp2"),
    ] {
        assert_eq!(begun[key], expected, "{key} in {begun}");
    }
    for key in ["uuid", "frozen_at", "since_uuid", "checkpoint_uuid"] {
        assert!(begun[key].is_string(), "{key} in {begun}");
    }
    assert_eq!(begun["consumer"], Value::Null);
    let frozen_at = begun["frozen_at"].as_str().unwrap();
    assert!(
        frozen_at.contains('T') && frozen_at.ends_with('Z'),
        "{frozen_at}"
    );
    let disk = &begun["disks"][0];
    assert_eq!(disk["disk"], "vda");
    assert_eq!(disk["size"], MIB);
    assert_eq!(disk["mode"], "incremental");
    assert_eq!(disk["reason"], Value::Null);
    assert_eq!(disk["changed_bytes"], 2 * CHUNK);
    assert_eq!(disk["uncertain_bytes"], 0);
    assert_eq!(disk["export"], "vda@b1");
    assert_eq!(disk["uris"][0], server.frozen_uri("vda@b1"));
    let contexts = [
        "base:allocation",
        "qemu:allocation-depth",
        "qemu:dirty-bitmap:cp1",
    ];
    assert_eq!(disk["contexts"], serde_json::json!(contexts));
    assert_eq!(disk["difference"]["export"], "vda@cp1..b1");
    assert_eq!(
        disk["difference"]["uris"][0],
        server.frozen_uri("vda@cp1..b1")
    );
    assert!(disk["disk_uuid"].is_string(), "{begun}");
}

#[test]
fn begin_without_json_prints_what_to_paste() {
    let server = Server::with_disk(MIB);
    let output = server.cli(&["backup", "begin", "--id", "b1"]);
    assert!(
        output.ok().contains(&server.frozen_uri("vda@b1")),
        "{output}"
    );
}

#[test]
fn without_an_id_one_is_made_up() {
    let server = Server::with_disk(MIB);
    let begun = server.cli_json(&["backup", "begin"]);
    let id = begun["id"].as_str().unwrap();
    assert_eq!(server.backup(id)["uuid"], begun["uuid"]);
    server.abort(id);
}

#[test]
fn a_full_backup_has_no_difference_and_says_its_size() {
    let server = Server::with_disk(MIB);
    let begun = server.begin("b1", &[]);
    let disk = &begun["disks"][0];
    assert_eq!(begun["since"], Value::Null);
    assert_eq!(disk["mode"], "full");
    assert_eq!(disk["changed_bytes"], MIB);
    assert_eq!(disk["difference"], Value::Null);
}

#[test]
fn begin_again_with_the_same_id_is_the_same_backup() {
    let server = Server::with_disk(MIB);
    server.checkpoint("cp1");
    let args = ["--since", "cp1", "--checkpoint", "cp2"];
    let first = server.begin("b1", &args);
    Guest::new(&server, "vda").write(0, &[1]);
    let again = server.begin("b1", &args);
    for key in ["uuid", "frozen_at", "checkpoint_uuid"] {
        assert_eq!(first[key], again[key], "{key}");
    }
    assert_eq!(
        first["disks"][0]["changed_bytes"],
        again["disks"][0]["changed_bytes"]
    );
    let other = server.cli(&["backup", "begin", "--id", "b1", "--since", "cp1"]);
    assert!(other.error(1).contains("b1"), "{other}");
    server.abort("b1");
    let ended = server.cli(&["backup", "begin", "--id", "b1", "--since", "cp1"]);
    assert!(
        ended.error(1).contains("b1"),
        "ids are never reused\n{ended}"
    );
}

#[test]
fn an_end_may_be_repeated_but_not_changed() {
    let server = Server::with_disk(MIB);
    server.begin("b1", &["--checkpoint", "cp1"]);
    server.commit("b1");
    server.commit("b1");
    server.cli(&["backup", "abort", "b1"]).error(1);
    server.begin("b2", &["--checkpoint", "cp2"]);
    server.abort("b2");
    server.abort("b2");
    server.cli(&["backup", "commit", "b2"]).error(1);
    let list = server.cli_json(&["checkpoint", "list"]);
    assert_eq!(names(&list, "checkpoints", "name"), ["cp1"]);
}

#[test]
fn a_pending_checkpoint_is_taken_but_no_base_before_commit() {
    let server = Server::with_disk(MIB);
    server.begin("b1", &["--checkpoint", "cp1"]);
    server.cli(&["checkpoint", "create", "cp1"]).error(1);
    server.cli(&["backup", "begin", "--since", "cp1"]).error(1);
    Guest::new(&server, "vda").write(CHUNK, &[1]);
    server.commit("b1");
    assert_eq!(
        server.dirty_bytes("cp1", "vda"),
        CHUNK,
        "changed since the freeze"
    );
    let begun = server.begin("b2", &["--since", "cp1"]);
    assert_eq!(begun["disks"][0]["changed_bytes"], CHUNK);
    server.abort("b2");
}

#[test]
fn an_abort_forgets_nothing() {
    let server = Server::with_disk(MIB);
    let mut guest = Guest::new(&server, "vda");
    server.checkpoint("cp1");
    guest.write(CHUNK, &[1]);
    server.begin("b1", &["--since", "cp1", "--checkpoint", "cp2"]);
    guest.write(5 * CHUNK, &[1]);
    server.abort("b1");
    assert_eq!(server.dirty_bytes("cp1", "vda"), 2 * CHUNK);
    server.checkpoint("cp2");
}

#[test]
fn a_disk_that_the_checkpoint_lacks_is_full_alone_and_the_exit_code_is_3() {
    let server = Server::builder()
        .disk("vda", MIB)
        .disk("vdb", 2 * MIB)
        .start();
    server
        .cli(&["checkpoint", "create", "cp1", "--disk", "vda"])
        .ok();
    let output = server.cli(&["backup", "begin", "--id", "b1", "--since", "cp1", "--json"]);
    output.exits(3);
    let begun: Value = serde_json::from_str(&output.stdout).expect("the backup");
    let vda = named(&begun, "disks", "disk", "vda").unwrap();
    assert_eq!(
        (&vda["mode"], &vda["reason"]),
        (&"incremental".into(), &Value::Null)
    );
    let vdb = named(&begun, "disks", "disk", "vdb").unwrap();
    assert_eq!(vdb["mode"], "full", "{begun}");
    assert!(vdb["reason"].is_string(), "{begun}");
    assert_eq!(vdb["changed_bytes"], 2 * MIB);
    assert_eq!(vdb["difference"], Value::Null);
    assert!(
        !vdb["contexts"].to_string().contains("dirty-bitmap"),
        "{begun}"
    );

    let only = [
        "backup", "begin", "--id", "b2", "--since", "cp1", "--disk", "vda",
    ];
    server.cli(&only).exits(0);
}

#[test]
fn only_the_disks_named_are_frozen() {
    let server = Server::builder().disk("vda", MIB).disk("vdb", MIB).start();
    let begun = server.begin("b1", &["--disk", "vdb"]);
    assert_eq!(names(&begun, "disks", "disk"), ["vdb"]);
    let refused = stillpoint_tests::RawNbd::try_open(&server.frozen(), "vda@b1", &[]);
    assert!(refused.is_err());
}

#[test]
fn open_backups_are_listed_and_end_on_their_own() {
    let server = Server::with_disk(MIB);
    for id in ["b1", "b2", "b3"] {
        server.begin(id, &[]);
    }
    let open = || {
        let list = server.cli_json(&["backup", "list"]);
        let open = list
            .as_array()
            .or_else(|| list["backups"].as_array())
            .unwrap()
            .clone();
        let open = open.into_iter().filter(|backup| backup["state"] == "open");
        open.map(|backup| backup["id"].as_str().unwrap().to_owned())
            .collect::<Vec<_>>()
    };
    assert_eq!(open(), ["b1", "b2", "b3"]);
    server.commit("b2");
    assert_eq!(open(), ["b1", "b3"]);
    assert!(server.cli(&["backup", "list"]).ok().contains("b3"));
    assert!(server.cli(&["backup", "show", "b3"]).ok().contains("b3"));
    server.abort("b1");
    server.abort("b3");
    assert_eq!(open(), [""; 0]);
}

#[test]
fn scratch_is_sparse_and_goes_with_the_backup() {
    let server = Server::with_disk(64 * MIB);
    let mut guest = Guest::new(&server, "vda");
    guest.write(0, &vec![1; 8 * MIB as usize]);
    let state = server.path("vda.raw.stillpoint");
    let used = || disk_usage(&state);
    server.begin("b1", &[]);
    let before = used();
    guest.write(0, &vec![2; 4 * MIB as usize]);
    let during = used() - before;
    assert!(
        (4 * MIB..5 * MIB).contains(&during),
        "{during} bytes for 4 MiB of old bytes"
    );
    server.abort("b1");
    assert!(
        used() < before + MIB / 2,
        "{} bytes after, {before} before",
        used()
    );
}

fn disk_usage(directory: &Path) -> u64 {
    let output = tool("du", &["-s", "--block-size=1", path(directory)]);
    output
        .ok()
        .split_whitespace()
        .next()
        .unwrap()
        .parse()
        .unwrap()
}
