//! Consumers have chains of their own; a forgotten backup is ended; both ends can be asked for again.

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
        expected.iter_mut().for_each(|bytes| *bytes += CHUNK);
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
