//! Consumers have chains of their own; a forgotten backup is ended; both ends can be asked for again.

use std::fs;

use serde_json::Value;
use stillpoint_tests::process::Output;
use stillpoint_tests::server::{named, names};
use stillpoint_tests::{CHUNK, Guest, MIB, Server};

const SIZE: u64 = 4 * MIB;

/// Runs `backup begin` that ends with this exit code, and returns its JSON.
#[track_caller]
fn begin(server: &Server, code: i32, args: &[&str]) -> Value {
    let args = [&["backup", "begin", "--json"][..], args].concat();
    let output: Output = server.cli(&args);
    output.exits(code);
    serde_json::from_str(&output.stdout).expect("JSON")
}

#[track_caller]
fn part(backup: &Value, disk: &str) -> Value {
    named(&backup["disks"], "disks", "disk", disk).unwrap_or_else(|| panic!("{disk}: {backup}"))
}

fn checkpoints(server: &Server) -> Vec<String> {
    names(
        &server.cli_json(&["checkpoint", "list"]),
        "checkpoints",
        "name",
    )
}

/// Where a consumer is on a disk.
#[track_caller]
fn last(server: &Server, consumer: &str, disk: &str) -> Value {
    let list = server.cli_json(&["consumer", "list"]);
    let found = named(&list, "consumers", "name", consumer);
    part(&found.unwrap_or_else(|| panic!("{consumer}: {list}")), disk)
}

#[test]
fn each_consumer_has_a_chain_of_its_own_whatever_happens_to_the_server() {
    let mut server = Server::builder()
        .disk("vda", SIZE)
        .disk("vdb", SIZE)
        .start();
    for consumer in ["nightly", "weekly"] {
        let args = ["--id", consumer, "--consumer", consumer, "--since", "last"];
        let first = begin(&server, 0, &args);
        assert_eq!(first["consumer"], consumer, "{first}");
        for disk in ["vda", "vdb"] {
            let part = part(&first, disk);
            assert_eq!(part["mode"], "full", "{first}");
            assert_eq!(part["reason"], "first backup of this consumer", "{first}");
        }
        // Nothing has moved before it is committed.
        assert_eq!(
            server
                .cli_json(&["consumer", "list"])
                .as_array()
                .map_or(0, |list| {
                    list.iter().filter(|c| c["name"] == consumer).count()
                }),
            0
        );
        server.commit(consumer);
        let made = first["checkpoint"].as_str().expect("one is made");
        assert!(made.starts_with(&format!("{consumer}.2")), "{first}");
        assert_eq!(last(&server, consumer, "vdb")["checkpoint"], made);
    }
    let mut expected: [u64; 2] = [0, 0];
    for round in 1..=4_u64 {
        let mut guest = Guest::new(&server, "vda");
        guest.write(round * CHUNK, &[1; 512]);
        drop(guest);
        expected = expected.map(|bytes| bytes + CHUNK);
        match round % 3 {
            0 => server.stop(),
            1 => server.kill(),
            _ => {
                server.stop();
                server.start();
                server.kill();
            }
        }
        server.start();
        // The weekly one comes every other time, and then aborts at first.
        for (which, consumer) in ["nightly", "weekly"].into_iter().enumerate() {
            if which == 1 && round % 2 == 1 {
                continue;
            }
            let before = last(&server, consumer, "vda");
            assert_eq!(before["dirty_bytes"], expected[which], "{round}: {before}");
            for end in ["abort", "commit"] {
                let id = format!("{consumer}{round}{end}");
                let args = ["--id", &id, "--consumer", consumer, "--since", "last"];
                let backup = begin(&server, 0, &args);
                let disk = part(&backup, "vda");
                assert_eq!(disk["mode"], "incremental", "{backup}");
                assert_eq!(disk["since_uuid"], before["checkpoint_uuid"], "{backup}");
                assert_eq!(backup["since_uuid"], before["checkpoint_uuid"], "{backup}");
                assert_eq!(disk["changed_bytes"], expected[which], "{backup}");
                assert_eq!(part(&backup, "vdb")["changed_bytes"], 0, "{backup}");
                server.cli(&["backup", end, &id]).ok();
                let now = last(&server, consumer, "vda");
                let moved = now["checkpoint_uuid"] == backup["checkpoint_uuid"];
                assert_eq!(moved, end == "commit", "{round}: {now}");
            }
            expected[which] = 0;
        }
        // Of what is made for consumers, only what they need is left.
        let lasts = ["nightly", "weekly"].map(|name| last(&server, name, "vda"));
        let mut needed = lasts.map(|last| last["checkpoint"].as_str().unwrap().to_owned());
        needed.sort();
        let mut left = checkpoints(&server);
        left.sort();
        assert_eq!(left, needed, "round {round}");
    }
}

#[test]
fn a_disk_that_is_added_later_is_full_alone_and_says_why() {
    let mut old = Server::with_disk(SIZE);
    begin(&old, 0, &["--id", "b1", "--consumer", "nightly"]);
    old.commit("b1");
    old.stop();
    let server = Server::builder()
        .disk_at("vda", &old.image("vda"))
        .disk("vdb", SIZE)
        .start();
    let args = ["--id", "b2", "--consumer", "nightly", "--since", "latest"];
    let backup = begin(&server, 3, &args);
    assert_eq!(part(&backup, "vda")["mode"], "incremental", "{backup}");
    let added = part(&backup, "vdb");
    assert_eq!(added["mode"], "full", "{backup}");
    let reason = added["reason"].as_str().expect("a reason");
    assert!(reason.contains("no backup of it yet"), "{backup}");
    server.commit("b2");
    let args = ["--id", "b3", "--consumer", "nightly", "--since", "last"];
    let backup = begin(&server, 0, &args);
    assert_eq!(part(&backup, "vdb")["mode"], "incremental", "{backup}");
}

#[test]
fn what_a_consumer_needs_goes_only_by_force_and_then_its_next_backup_is_full() {
    let mut server = Server::with_disk(SIZE);
    let args = ["--id", "b1", "--consumer", "nightly", "--checkpoint", "cp1"];
    begin(&server, 0, &args);
    server.commit("b1");
    let refused = server.cli(&["checkpoint", "delete", "cp1"]);
    assert!(refused.error(1).contains("'nightly'"), "{refused}");
    assert!(refused.stderr.contains("--force"), "{refused}");
    let uuid = last(&server, "nightly", "vda")["checkpoint_uuid"].clone();
    server.cli(&["checkpoint", "delete", "cp1", "--force"]).ok();
    // Another of this name is another.
    server.checkpoint("cp1");
    for round in 0..2 {
        let at = last(&server, "nightly", "vda");
        assert_eq!(at["checkpoint_uuid"], uuid, "{round}");
        assert_eq!(at["dirty_bytes"], SIZE, "{round}: {at}");
        let id = format!("again{round}");
        let args = ["--id", &id, "--consumer", "nightly", "--since", "last"];
        let backup = begin(&server, 3, &args);
        let reason = part(&backup, "vda")["reason"].clone();
        let reason = reason.as_str().expect("a reason");
        let told = reason.contains("gone") && reason.contains(uuid.as_str().unwrap());
        assert!(told, "{round}: {backup}");
        server.abort(&id);
        server.kill();
        server.start();
    }
}

#[test]
fn a_consumer_that_is_forgotten_takes_along_what_was_made_for_it_and_nothing_else() {
    let mut server = Server::builder()
        .disk("vda", SIZE)
        .disk("vdb", SIZE)
        .start();
    begin(&server, 0, &["--id", "b1", "--consumer", "nightly"]);
    server.commit("b1");
    let args = [
        "--id",
        "b2",
        "--consumer",
        "weekly",
        "--checkpoint",
        "named",
    ];
    begin(&server, 0, &args);
    server.commit("b2");
    server.cli(&["consumer", "forget", "nobody"]).error(1);
    for consumer in ["nightly", "weekly"] {
        let done = server.cli(&["consumer", "forget", consumer, "--json"]);
        assert_eq!(done.json(), serde_json::json!({}));
    }
    server.kill();
    server.start();
    assert_eq!(
        server.cli_json(&["consumer", "list"]),
        serde_json::json!([])
    );
    assert_eq!(checkpoints(&server), ["named"]);
    let args = ["--consumer", "nightly", "--since", "last"];
    let backup = begin(&server, 0, &args);
    assert_eq!(
        part(&backup, "vdb")["reason"],
        "first backup of this consumer"
    );
}

#[test]
fn what_was_made_for_a_consumer_stays_while_an_open_backup_begins_from_it() {
    let server = Server::with_disk(SIZE);
    let first = begin(&server, 0, &["--id", "b1", "--consumer", "nightly"]);
    server.commit("b1");
    let made = first["checkpoint"].as_str().unwrap();
    begin(&server, 0, &["--id", "other", "--since", made]);
    begin(&server, 0, &["--id", "b2", "--consumer", "nightly"]);
    server.commit("b2");
    assert!(checkpoints(&server).iter().any(|name| name == made));
    server.abort("other");
    let left = checkpoints(&server);
    assert_eq!(left.len(), 1, "{left:?}");
    assert_ne!(left[0], made);
}

#[test]
fn the_last_backup_is_one_of_a_consumer() {
    let server = Server::with_disk(SIZE);
    let output = server.cli(&["backup", "begin", "--since", "last"]);
    output.exits(2);
    assert!(output.stderr.contains("--consumer"), "{output}");
    let mut qmp = server.qmp();
    let wrong = qmp.try_execute("backup-begin", &serde_json::json!({"since": "latest"}));
    assert!(wrong.unwrap_err().contains("consumer"));
}

#[test]
fn a_forgotten_backup_is_aborted_when_its_time_has_come_whether_or_not_a_server_runs() {
    let builder = Server::builder().disk("vda", SIZE).test_hooks();
    let clock = builder.path("clock");
    let clock_text = clock.display().to_string();
    let mut server = builder
        .env("STILLPOINT_TEST_CLOCK_FILE", &clock_text)
        .start();
    let mut qmp = server.qmp();
    let args = ["--id", "b1", "--consumer", "nightly", "--expires", "1h"];
    let backup = begin(&server, 0, &args);
    let expires = backup["expires_at"].as_str().expect("a time");
    assert!(expires.ends_with('Z') && expires > backup["frozen_at"].as_str().unwrap());
    // The reply was lost.
    assert_eq!(begin(&server, 0, &args)["uuid"], backup["uuid"]);
    let others = ["backup", "begin", "--id", "b1", "--expires", "2h"];
    server.cli(&others).refused("other arguments");
    fs::write(&clock, "3700").unwrap();
    let event = qmp.event("BACKUP_ENDED");
    assert_eq!(event["data"]["outcome"], "aborted", "{event}");
    server.cli(&["backup", "commit", "b1"]).refused("aborted");
    assert_eq!(checkpoints(&server), [""; 0]);
    for how in ["stop", "kill"] {
        fs::write(&clock, "0").unwrap();
        begin(&server, 0, &["--id", how, "--expires", "1h"]);
        let stays = format!("{how}-stays");
        begin(&server, 0, &["--id", &stays, "--expires", "2h"]);
        match how {
            "stop" => server.stop(),
            _ => server.kill(),
        }
        fs::write(&clock, "3700").unwrap();
        server.start();
        let open = names(&server.cli_json(&["backup", "list"]), "backups", "id");
        assert_eq!(open, std::slice::from_ref(&stays), "after a {how}");
        server.abort(how);
        server.abort(&stays);
        let scratch = stillpoint_tests::state::directory(&server, "vda").join("backups");
        assert_eq!(fs::read_dir(scratch).unwrap().count(), 0, "after a {how}");
    }
}

#[test]
fn each_end_can_be_asked_for_again_and_the_other_never() {
    let mut server = Server::with_disk(SIZE);
    for (id, end) in [("c", "commit"), ("a", "abort")] {
        server.begin(id, &[]);
        server.cli(&["backup", end, id]).ok();
    }
    for how in ["nothing", "stop", "kill"] {
        match how {
            "stop" => server.stop(),
            "kill" => server.kill(),
            _ => {}
        }
        if how != "nothing" {
            server.start();
        }
        server.commit("c");
        server.abort("a");
        server
            .cli(&["backup", "abort", "c"])
            .refused("was committed");
        server
            .cli(&["backup", "commit", "a"])
            .refused("was aborted");
        let again = server.cli(&["backup", "begin", "--id", "c"]);
        again.refused("used before");
    }
}

#[test]
fn more_open_backups_than_there_may_be_are_refused_with_what_to_do() {
    let server = Server::with_disk(MIB);
    let mut qmp = server.qmp();
    let none = serde_json::json!({});
    let begun = (0..1000).take_while(|_| qmp.try_execute("backup-begin", &none).is_ok());
    assert_eq!(begun.count(), 64);
    let refused = server.cli(&["backup", "begin"]);
    assert!(
        refused.error(1).contains("64 backups are open"),
        "{refused}"
    );
    server.abort("b7");
    server.cli(&["backup", "begin"]).ok();
}
