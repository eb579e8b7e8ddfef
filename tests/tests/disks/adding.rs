//! What is added is there at once, and is what it was.

use serde_json::json;
use stillpoint_tests::state::{Begun, begin_since, directory, pretend_power_cut};
use stillpoint_tests::tools::{nbdcopy_sha256, path, sha256, tool};
use stillpoint_tests::{CHUNK, Guest, KIB, RawNbd};

use super::{SIZE, add, builder, changed, disks, disks_of, listed, map_of, past, remove, spec};

#[test]
fn a_disk_that_is_added_is_tracked_from_its_first_write() {
    let server = builder().start();
    let mut qmp = server.qmp();
    server.checkpoint("before");
    let answer = add(&server, "vdb");
    assert_eq!(
        (&answer["disk"], &answer["size"]),
        (&json!("vdb"), &json!(SIZE))
    );
    assert_eq!(answer["live_uris"], json!([server.live_uri("vdb")]));
    assert_eq!(qmp.event("DISK_ADDED")["data"], json!({"disk": "vdb"}));
    assert_eq!(listed(&server), ["vda", "vdb"]);

    let mut guest = Guest::new(&server, "vdb");
    guest.write(5 * CHUNK, &[1; 4096]);
    server.checkpoint("cp1");
    guest.touched.clear();
    guest.write(7 * CHUNK + 100, &vec![2; 70_000]);
    assert_eq!(changed(&server, "i1", "vdb", "cp1"), guest.expected_map());

    // One instant of both, and the new disk is full where it was not there yet.
    let begun = server.cli(&[
        "backup", "begin", "--id", "b1", "--since", "before", "--json",
    ]);
    let begun: serde_json::Value = serde_json::from_str(&begun.exits(3).stdout).unwrap();
    assert_eq!(begun["disks"][0]["mode"], "incremental");
    let why = begun["disks"][1]["reason"].as_str().unwrap();
    assert!(why.contains("does not include it"), "{why}");
    let then = sha256(&guest.disk);
    guest.write(0, &[3; 4096]);
    let copied = nbdcopy_sha256(&server.frozen_uri("vdb@b1"), server.directory());
    assert_eq!(copied, then);
    assert_eq!(disks_of(&server, "before"), ["vda"]);
    assert_eq!(disks_of(&server, "cp1"), ["vda", "vdb"]);
}

#[test]
fn the_options_of_a_disk_are_those_of_serve() {
    let server = builder().start();
    let state = server.path("elsewhere");
    let disk = format!(
        "{},granularity=4k,state={},durability=process,cache=none,read-only=off",
        spec(&server, "vdb"),
        path(&state)
    );
    let answer = server.cli_json(&["disk", "add", &disk]);
    for (key, value) in [
        ("granularity", json!(4096)),
        ("durability", json!("process")),
        ("cache", json!("none")),
        ("read_only", json!(false)),
        ("format", json!("raw")),
    ] {
        assert_eq!(answer[key], value, "{key}: {answer}");
    }
    assert!(state.join("header").exists());
    remove(&server, "vdb");
    let read_only = format!("{},state={},readonly", spec(&server, "vdb"), path(&state));
    assert_eq!(
        server.cli_json(&["disk", "add", &read_only])["read_only"],
        true
    );
    assert!(server.open_live("vdb").write(0, &[1; 512]).is_err());
}

#[test]
fn a_path_is_meant_from_where_the_command_is_given() {
    let server = builder().start();
    let mut command = server.cli_command(&["disk", "add", "vdb=vdb.raw", "--json"]);
    let answer = stillpoint_tests::process::run(command.current_dir(server.directory())).json();
    assert_eq!(answer["path"], path(&server.image("vdb")));
}

#[test]
fn the_empty_name_is_the_disk_while_there_is_exactly_one() {
    let server = builder().start();
    let open = || RawNbd::try_open(&server.live(), "", &[]);
    let mut first = open().unwrap();
    add(&server, "vdb");
    assert!(open().is_err(), "of two, none is meant");
    // Who is there keeps what it has chosen.
    first.write(0, &[7; 512]).unwrap();
    assert_eq!(server.open_live("vda").read(0, 512).unwrap(), [7; 512]);
    first.disconnect();
    remove(&server, "vda");
    assert_eq!(listed(&server), ["vdb"]);
    let mut second = open().unwrap();
    second.write(0, &[8; 512]).unwrap();
    assert_eq!(server.open_live("vdb").read(0, 512).unwrap(), [8; 512]);
    second.disconnect();
    remove(&server, "vdb");
    assert!(open().is_err() && listed(&server).is_empty());

    for command in [
        &["checkpoint", "create", "cp1"][..],
        &["backup", "begin", "--id", "b1"],
        &["backup", "begin", "--id", "b1", "--disk", "vda"],
    ] {
        let refused = server.cli(command);
        refused.error(1);
        assert!(refused.stderr.contains("stillpoint disk add"), "{refused}");
    }
    server.is_well();
    add(&server, "vda");
    open().unwrap();
    server.checkpoint("cp1");
}

#[test]
fn a_disk_goes_on_with_its_chain_however_its_last_server_ended() {
    for how in ["stopped", "killed", "cut off"] {
        let server = builder().start();
        let (mut earlier, _) = past(&server.image("vdb"));
        let uuid = earlier.cli_json(&["checkpoint", "show", "cp1"])["uuid"].clone();
        if how == "stopped" {
            earlier.stop();
        } else {
            earlier.kill();
        }
        if how == "cut off" {
            pretend_power_cut(&directory(&server, "vdb"));
        }
        super::add(&server, "vdb");
        assert_eq!(disks_of(&server, "cp1"), ["vdb"], "{how}");
        assert_eq!(
            server.cli_json(&["checkpoint", "show", "cp1"])["uuid"],
            uuid,
            "{how}"
        );
        if how == "cut off" {
            let found = begin_since(&server, "i1", "vdb", "cp1");
            let Begun::Incremental { map, uncertain } = found else {
                panic!("{how}: {found:?}");
            };
            let is_dirty = |chunk: u64| {
                let at = chunk * CHUNK;
                map.iter().any(|e| e.2 == 1 && e.0 <= at && at < e.0 + e.1)
            };
            assert!(is_dirty(3) && uncertain > 0, "{how}: {map:?}, {uncertain}");
            continue;
        }
        assert_eq!(changed(&server, "i1", "vdb", "cp1"), map_of(&[3]), "{how}");
        let mut live = server.open_live("vdb");
        live.write(9 * CHUNK, &[4; 512]).unwrap();
        assert_eq!(
            changed(&server, "i2", "vdb", "cp1"),
            map_of(&[3, 9]),
            "{how}"
        );
    }
}

#[test]
fn an_open_backup_of_a_disk_that_is_added_goes_on() {
    for killed in [false, true] {
        let server = builder().start();
        let (mut earlier, mut guest) = past(&server.image("vdb"));
        earlier.begin("b7", &["--since", "cp1", "--checkpoint", "cp2"]);
        let then = sha256(&guest.disk);
        guest.write(11 * CHUNK, &vec![5; 100 * KIB as usize]);
        if killed {
            earlier.kill();
        } else {
            earlier.stop();
        }
        super::add(&server, "vdb");
        assert_eq!(server.backup("b7")["state"], "open", "killed: {killed}");
        let mut live = server.open_live("vdb");
        live.write(0, &[6; 4096]).unwrap();
        let uri = server.frozen_uri("vdb@b7");
        assert_eq!(
            nbdcopy_sha256(&uri, server.directory()),
            then,
            "killed: {killed}"
        );
        let refused = server.cli(&["disk", "remove", "vdb", "--force"]);
        assert!(refused.error(1).contains("'b7'"), "{refused}");
        server.commit("b7");
        let found = changed(&server, "i1", "vdb", "cp2");
        assert_eq!(found, map_of(&[0, 11, 12]), "killed: {killed}");
    }
}

#[test]
fn what_the_command_line_does_not_say_is_not_served_after_a_restart_and_not_forgotten() {
    let mut server = builder().start();
    add(&server, "vdb");
    server.checkpoint("cp1");
    server.open_live("vdb").write(CHUNK, &[1; 512]).unwrap();
    server.stop();
    server.start();
    assert_eq!(disks(&server), ["vda"]);
    assert_eq!(disks_of(&server, "cp1"), ["vda"]);
    add(&server, "vdb");
    assert_eq!(disks_of(&server, "cp1"), ["vda", "vdb"]);
    assert_eq!(changed(&server, "i1", "vdb", "cp1"), map_of(&[1]));
}

#[test]
fn stock_tools_see_a_disk_that_was_added() {
    let server = builder().start();
    add(&server, "vdb");
    let uri = server.live_uri("vdb");
    tool("qemu-io", &["-f", "raw", "-c", "write -P 7 1M 64k", &uri]).ok();
    let listed = tool("nbdinfo", &["--list", &server.live_uri("")]);
    assert!(listed.ok().contains("export=\"vdb\""), "{listed}");
    tool("qemu-io", &["-f", "raw", "-c", "read -P 7 1M 64k", &uri]).ok();
}
