//! What happens to checkpoints, backups and consumers while one of their disks is away.

use std::fs;

use serde_json::json;
use stillpoint_tests::server::{named, names};
use stillpoint_tests::state::{copy_directory, directory};
use stillpoint_tests::tools::path;
use stillpoint_tests::{CHUNK, Guest, Server};

use super::{add, builder, changed, disks_of, map_of, remove, spec};

/// Both disks, and a checkpoint of them.
fn both() -> Server {
    let server = builder().start();
    add(&server, "vdb");
    server.checkpoint("cp1");
    server
}

/// An open backup, broken or not.
#[track_caller]
fn backup(server: &Server, id: &str) -> serde_json::Value {
    let all = server.qmp().execute("query-backups", &json!({}));
    named(&all, "backups", "id", id).unwrap_or_else(|| panic!("no {id} in {all}"))
}

fn delete(server: &Server, checkpoint: &str) {
    server.cli(&["checkpoint", "delete", checkpoint]).ok();
}

#[test]
fn a_checkpoint_that_is_deleted_while_a_disk_is_away_is_deleted_there_too() {
    for restarts in [false, true] {
        let mut server = both();
        server.checkpoint("cp2");
        remove(&server, "vdb");
        assert_eq!(disks_of(&server, "cp1"), ["vda"]);
        delete(&server, "cp1");
        // The name is free, and means another instant.
        server.checkpoint("cp1");
        if restarts {
            server.kill();
            server.start();
        }
        add(&server, "vdb");
        assert_eq!(disks_of(&server, "cp1"), ["vda"], "restarts: {restarts}");
        assert_eq!(
            disks_of(&server, "cp2"),
            ["vda", "vdb"],
            "restarts: {restarts}"
        );
        // It has heard of it for good.
        remove(&server, "vda");
        assert!(disks_of(&server, "cp1").is_empty(), "restarts: {restarts}");
        assert_eq!(disks_of(&server, "cp2"), ["vdb"], "restarts: {restarts}");
    }
}

#[test]
fn what_a_disk_hears_elsewhere_it_tells_when_it_comes() {
    let server = both();
    server.open_live("vda").write(CHUNK, &[1; 512]).unwrap();
    server.checkpoint("cp2");
    remove(&server, "vda");
    delete(&server, "cp1");
    remove(&server, "vdb");
    // Now the disk that knows comes to one that does not, on a server that knows nothing.
    let mut other = alone(&server, "vda");
    assert_eq!(disks_of(&other, "cp1"), ["vda"]);
    other.cli(&["disk", "add", &spec(&server, "vdb")]).ok();
    assert!(disks_of(&other, "cp1").is_empty());
    assert_eq!(disks_of(&other, "cp2"), ["vda", "vdb"]);
    other.kill();
    let later = alone(&server, "vda");
    assert!(
        disks_of(&later, "cp1").is_empty(),
        "it has heard of it for good"
    );
}

#[test]
fn consumers_go_on_disk_by_disk() {
    let server = builder().start();
    add(&server, "vdb");
    let back_up = |id: &str, code: i32| {
        let args = ["--since", "last", "--consumer", "nightly", "--json"];
        let begun = server.cli(&[&["backup", "begin", "--id", id][..], &args].concat());
        begun.exits(code);
        server.commit(id);
        let begun: serde_json::Value = serde_json::from_str(&begun.stdout).unwrap();
        begun["disks"].as_array().unwrap().clone()
    };
    let mut guests = [Guest::new(&server, "vda"), Guest::new(&server, "vdb")];
    back_up("b1", 0);
    for guest in &mut guests {
        guest.write(CHUNK, &[1; 512]);
    }
    let [mut vda, vdb] = guests;
    drop(vdb);
    remove(&server, "vdb");
    assert_eq!(back_up("b2", 0)[0]["changed_bytes"], CHUNK);
    vda.write(2 * CHUNK, &[2; 512]);
    vda.write(3 * CHUNK, &[2; 512]);
    add(&server, "vdb");
    let disks = back_up("b3", 0);
    let changed: Vec<_> = disks.iter().map(|disk| &disk["changed_bytes"]).collect();
    assert_eq!(changed, [&json!(2 * CHUNK), &json!(CHUNK)]);
    // What was made for it and nobody needs has gone, on both.
    let all = server.qmp().execute("query-checkpoints", &json!({}));
    assert_eq!(names(&all, "checkpoints", "name").len(), 1, "{all}");

    // Forgotten while a disk is away, it is forgotten there too.
    remove(&server, "vdb");
    server.cli(&["consumer", "forget", "nightly"]).ok();
    add(&server, "vdb");
    assert_eq!(
        server.qmp().execute("query-consumers", &json!({})),
        json!([])
    );
    let disks = back_up("b4", 0);
    assert_eq!(disks[1]["reason"], "first backup of this consumer");
}

#[test]
fn the_last_checkpoint_of_a_consumer_on_a_disk_that_is_away_goes_only_by_force() {
    let server = builder().start();
    add(&server, "vdb");
    server.begin("b1", &["--consumer", "nightly", "--checkpoint", "cp1"]);
    server.commit("b1");
    remove(&server, "vdb");
    server.begin("b2", &["--consumer", "nightly", "--checkpoint", "cp2"]);
    server.commit("b2");
    let refused = server.cli(&["checkpoint", "delete", "cp1"]);
    assert!(refused.error(1).contains("'nightly'"), "{refused}");
    server.cli(&["checkpoint", "delete", "cp1", "--force"]).ok();
    add(&server, "vdb");
    assert!(disks_of(&server, "cp1").is_empty());
}

/// Two disks with an open backup `b1` of both that is to make `cp2`, whose server was killed. In the
/// server's directory.
fn open_on_both() -> Server {
    let mut server = Server::builder()
        .disk("vda", super::SIZE)
        .disk("vdb", super::SIZE)
        .start();
    server.checkpoint("cp1");
    for disk in ["vda", "vdb"] {
        server.open_live(disk).write(5 * CHUNK, &[1; 512]).unwrap();
    }
    server.begin("b1", &["--since", "cp1", "--checkpoint", "cp2"]);
    server.kill();
    server
}

/// A server that has this disk of the other from its start.
fn alone(server: &Server, disk: &str) -> Server {
    Server::builder().disk_as(&spec(server, disk)).start()
}

#[test]
fn a_backup_that_went_on_without_a_disk_is_broken_there_too_and_its_base_is_whole() {
    for (first, second) in [("vda", "vdb"), ("vdb", "vda")] {
        let images = open_on_both();
        let mut server = alone(&images, first);
        assert_eq!(backup(&server, "b1")["state"], "broken", "{first} first");
        let one = names(&backup(&server, "b1"), "disks", "disk");
        assert_eq!(one, [first]);
        server.cli(&["disk", "add", &spec(&images, second)]).ok();
        let backup = backup(&server, "b1");
        assert_eq!(backup["state"], "broken", "{first} first");
        assert_eq!(names(&backup, "disks", "disk"), ["vda", "vdb"]);
        server.cli(&["backup", "commit", "b1"]).exits(4);
        assert!(
            server
                .cli(&["disk", "remove", second])
                .error(1)
                .contains("'b1'")
        );
        server.abort("b1");
        for disk in ["vda", "vdb"] {
            assert_eq!(
                changed(&server, &format!("i-{disk}"), disk, "cp1"),
                map_of(&[5])
            );
        }
        remove(&server, second);
        server.kill();
        server.start();
        server.cli(&["disk", "add", &spec(&images, second)]).ok();
        assert!(server.qmp().execute("query-backups", &json!({})) == json!([]));
    }
}

#[test]
fn a_commit_that_one_disk_knows_of_is_one_when_it_comes() {
    for (knows, other) in [("vda", "vdb"), ("vdb", "vda")] {
        for outcome in ["commit", "abort"] {
            let mut images = open_on_both();
            // The state of the other disk as it was before the end.
            let state = directory(&images, other);
            let saved = images.path("saved");
            copy_directory(&state, &saved);
            images.start();
            images.cli(&["backup", outcome, "b1"]).ok();
            images.kill();
            copy_directory(&saved, &state);

            let server = alone(&images, other);
            assert_eq!(backup(&server, "b1")["state"], "broken");
            let mut qmp = server.qmp();
            server.cli(&["disk", "add", &spec(&images, knows)]).ok();
            let how = format!("{knows} knows of the {outcome}");
            let ended = qmp.event("BACKUP_ENDED");
            assert_eq!(
                ended["data"]["outcome"],
                format!("{}ed", outcome.replace("commit", "committ")),
                "{how}"
            );
            assert!(
                qmp.execute("query-backups", &json!({})) == json!([]),
                "{how}"
            );
            let expected: &[&str] = if outcome == "commit" {
                &["vda", "vdb"]
            } else {
                &[]
            };
            assert_eq!(disks_of(&server, "cp2"), expected, "{how}");
            // Its scratch has gone, on both.
            for disk in ["vda", "vdb"] {
                let backups = directory(&images, disk).join("backups");
                let left = fs::read_dir(backups).into_iter().flatten().count();
                assert_eq!(left, 0, "{how}: {disk}");
            }
        }
    }
}

#[test]
fn a_disk_with_an_open_backup_of_a_name_that_is_taken_is_refused_as_it_was() {
    for power_cut in [false, true] {
        let server = builder().start();
        server.begin("b1", &[]);
        let (mut earlier, guest) = super::past(&server.image("vdb"));
        earlier.begin("b1", &["--since", "cp1", "--checkpoint", "cp2"]);
        let then = stillpoint_tests::tools::sha256(&guest.disk);
        let mut live = earlier.open_live("vdb");
        live.write(0, &[9; 4096]).unwrap();
        earlier.kill();
        let state = directory(&server, "vdb");
        if power_cut {
            stillpoint_tests::state::pretend_power_cut(&state);
        }
        for _ in 0..2 {
            let refused = loop {
                let refused = server.cli(&["disk", "add", &spec(&server, "vdb")]);
                if !refused.stderr.contains("in use by another process") {
                    break refused;
                }
            };
            assert!(refused.error(1).contains("open backup 'b1'"), "{refused}");
        }
        assert_eq!(super::disks(&server), ["vda"]);
        // Its own server finds it as it would have.
        earlier.start();
        let backup = backup(&earlier, "b1");
        let expected = if power_cut { "broken" } else { "open" };
        assert_eq!(backup["state"], expected, "{}", earlier.stderr());
        if !power_cut {
            let uri = earlier.frozen_uri("vdb@b1");
            let found = stillpoint_tests::tools::nbdcopy_sha256(&uri, server.directory());
            assert_eq!(found, then);
        }
        let part = named(&backup["disks"], "disks", "disk", "vdb").unwrap();
        assert_eq!(part["mode"], "incremental", "{}", path(&state));
    }
}
