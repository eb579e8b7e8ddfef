//! Checkpoints by hand.

use stillpoint_tests::server::{named, names};
use stillpoint_tests::{CHUNK, Guest, MIB, Server};

#[test]
fn they_are_created_listed_shown_and_deleted() {
    let server = Server::builder().disk("vda", MIB).disk("vdb", MIB).start();
    server.checkpoint("cp1");
    let mut guest = Guest::new(&server, "vdb");
    guest.write(100, &[1]);
    server
        .cli(&["checkpoint", "create", "cp2", "--disk", "vda"])
        .ok();
    let list = server.cli_json(&["checkpoint", "list"]);
    assert_eq!(names(&list, "checkpoints", "name"), ["cp1", "cp2"]);
    assert_eq!(server.dirty_bytes("cp1", "vda"), 0);
    assert_eq!(server.dirty_bytes("cp1", "vdb"), CHUNK);
    let cp2 = named(&list, "checkpoints", "name", "cp2").unwrap();
    assert_eq!(names(&cp2, "disks", "disk"), ["vda"]);
    assert!(cp2["uuid"].is_string(), "{cp2}");
    let shown = server.cli_json(&["checkpoint", "show", "cp2"]);
    assert_eq!(
        named(&shown, "checkpoints", "name", "cp2").unwrap()["uuid"],
        cp2["uuid"]
    );

    let again = server.cli(&["checkpoint", "create", "cp1"]);
    assert!(again.error(1).contains("cp1"), "{again}");
    server.cli(&["checkpoint", "delete", "cp1"]).ok();
    server.cli(&["checkpoint", "delete", "cp1"]).error(1);
    server.checkpoint("cp1");
    assert_eq!(
        server.dirty_bytes("cp1", "vdb"),
        0,
        "another one of the same name"
    );
    for text in ["cp1", "cp2"] {
        assert!(server.cli(&["checkpoint", "list"]).ok().contains(text));
    }
}

#[test]
fn deleting_one_forgets_nothing_of_the_others() {
    let server = Server::with_disk(MIB);
    let mut guest = Guest::new(&server, "vda");
    for (name, chunk) in [("cp1", 1), ("cp2", 2), ("cp3", 3)] {
        server.checkpoint(name);
        guest.write(chunk * CHUNK, &[1]);
    }
    server.cli(&["checkpoint", "delete", "cp2"]).ok();
    assert_eq!(server.dirty_bytes("cp1", "vda"), 3 * CHUNK);
    assert_eq!(server.dirty_bytes("cp3", "vda"), CHUNK);
}

#[test]
fn a_uuid_is_as_good_as_a_name() {
    let server = Server::with_disk(MIB);
    server.checkpoint("cp1");
    let list = server.cli_json(&["checkpoint", "list"]);
    let cp1 = named(&list, "checkpoints", "name", "cp1").unwrap();
    let begun = server.begin("b1", &["--since", cp1["uuid"].as_str().unwrap()]);
    assert_eq!(begun["since"], "cp1");
    assert_eq!(begun["since_uuid"], cp1["uuid"]);
    assert_eq!(begun["disks"][0]["mode"], "incremental");
}

#[test]
fn a_name_that_looks_like_a_uuid_is_a_name() {
    let server = Server::with_disk(MIB);
    let name = "0123456789abcdef0123456789abcdef";
    server.checkpoint(name);
    let begun = server.begin("b1", &["--since", name]);
    assert_eq!(begun["disks"][0]["mode"], "incremental", "{begun}");
    let other = name.replace('0', "1");
    let output = server.cli(&["backup", "begin", "--since", &other, "--json"]);
    output.exits(3);
    assert!(output.stdout.contains(r#""mode":"full""#), "{output}");
}

#[test]
fn one_that_a_backup_uses_stays_and_the_error_names_the_backup() {
    let server = Server::with_disk(MIB);
    server.checkpoint("cp1");
    server.begin("b1", &["--since", "cp1"]);
    let output = server.cli(&["checkpoint", "delete", "cp1"]);
    assert!(output.error(1).contains("b1"), "{output}");
    server.abort("b1");
    server.cli(&["checkpoint", "delete", "cp1"]).ok();
}
