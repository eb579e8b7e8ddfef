//! Whoever remembers what damage has taken gets a full backup that says so.

use std::fs;
use std::path::Path;

use serde_json::Value;
use stillpoint_tests::server::named;
use stillpoint_tests::state::{directory, journal};
use stillpoint_tests::{MIB, Server};

fn two_disks() -> Server {
    let builder = Server::builder().disk("vda", MIB).disk("vdb", MIB);
    let server = builder.start();
    server.checkpoint("cp1");
    server.checkpoint("cp2");
    let args = ["backup", "begin", "--id", "b1", "--consumer", "nightly"];
    server.cli(&args).ok();
    server.commit("b1");
    server.checkpoint("cp3");
    server
}

/// The mode of each disk of a backup, and the reasons.
#[track_caller]
fn begin(server: &Server, code: i32, args: &[&str]) -> [(Value, Value); 2] {
    let args = [&["backup", "begin", "--json"][..], args].concat();
    let output = server.cli(&args);
    output.exits(code);
    let backup: Value = serde_json::from_str(&output.stdout).expect("JSON");
    let id = backup["id"].as_str().expect("an id");
    server.abort(id);
    ["vda", "vdb"].map(|disk| {
        let part = named(&backup["disks"], "disks", "disk", disk).expect("the disk");
        (part["mode"].clone(), part["reason"].clone())
    })
}

/// Flips a bit in the record that says this.
fn damage(state: &Path, says: impl Fn(&Value) -> bool) {
    let records = journal(state);
    let record = records.iter().find(|record| says(&record.says));
    let at = record.expect("there is one").at;
    let mut bytes = fs::read(state.join("journal")).unwrap();
    bytes[at + 30] ^= 1;
    fs::write(state.join("journal"), bytes).unwrap();
}

#[test]
fn a_checkpoint_whose_record_is_damaged_gives_that_disk_a_full_backup_and_the_other_none() {
    let mut server = two_disks();
    let uuid = named(&server.cli_json(&["checkpoint", "list"]), "", "name", "cp1").unwrap();
    let uuid = uuid["uuid"].as_str().expect("a uuid").to_owned();
    server.stop();
    damage(&directory(&server, "vda"), |says| says["name"] == "cp1");
    for round in 0..3 {
        server.start();
        for since in ["cp1", uuid.as_str()] {
            let [vda, vdb] = begin(&server, 3, &["--since", since]);
            assert_eq!(vda.0, "full");
            assert_eq!(vda.1, "records of its journal are damaged", "round {round}");
            assert_eq!(vdb, ("incremental".into(), Value::Null));
        }
        // What is not damaged is good.
        let good = begin(&server, 0, &["--since", "cp2"]);
        assert!(good.iter().all(|(mode, _)| mode == "incremental"));
        let good = begin(&server, 0, &["--since", "last", "--consumer", "nightly"]);
        assert!(good.iter().all(|(mode, _)| mode == "incremental"));
        server.kill();
    }
}

#[test]
fn a_name_that_only_damage_can_explain_is_no_error() {
    let mut server = Server::with_disk(MIB);
    for name in ["cp1", "cp2"] {
        server.checkpoint(name);
    }
    let args = ["backup", "begin", "--since", "nonsense"];
    server.cli(&args).refused("no checkpoint 'nonsense'");
    server.stop();
    damage(&directory(&server, "vda"), |says| says["name"] == "cp1");
    server.start();
    let args = ["backup", "begin", "--since", "cp1", "--json"];
    let begun = server.cli(&args);
    begun.exits(3);
    assert!(begun.stdout.contains("are damaged"), "{begun}");
}

#[test]
fn a_consumer_whose_state_was_begun_anew_is_told_why() {
    let mut server = two_disks();
    server.stop();
    let state = directory(&server, "vda");
    let mut header = fs::read(state.join("header")).unwrap();
    header[20] ^= 1;
    fs::write(state.join("header"), header).unwrap();
    for round in 0..2 {
        server.start();
        for args in [
            &["--since", "cp1"][..],
            &["--since", "last", "--consumer", "nightly"],
        ] {
            let [vda, vdb] = begin(&server, 3, args);
            assert_eq!(vda.0, "full", "round {round}: {args:?}");
            assert_eq!(vda.1, "the header of its state is damaged");
            assert_eq!(vdb.0, "incremental", "round {round}: {args:?}");
        }
        server.stop();
    }
    // Where no disk is left that knows the name, it is no error either.
    let server = Server::builder()
        .disk_at("vda", &server.image("vda"))
        .start();
    let begun = server.cli(&["backup", "begin", "--since", "cp1", "--json"]);
    begun.exits(3);
    assert!(begun.stdout.contains("the header of its state is damaged"));
}

#[test]
fn a_record_that_was_never_complete_is_no_damage() {
    let mut server = Server::with_disk(MIB);
    server.checkpoint("cp1");
    server.kill();
    let path = directory(&server, "vda").join("journal");
    let mut bytes = fs::read(&path).unwrap();
    // The beginning of one more, as a killed server may leave it.
    bytes.extend_from_within(512..552);
    fs::write(&path, bytes).unwrap();
    for _ in 0..2 {
        server.start();
        let args = ["backup", "begin", "--since", "cp2"];
        server.cli(&args).refused("no checkpoint 'cp2'");
        server.checkpoint("more");
        server.cli(&["checkpoint", "delete", "more"]).ok();
        server.kill();
    }
}
