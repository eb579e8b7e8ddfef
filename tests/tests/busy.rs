//! Storage that holds a write up holds no instant up for longer than it may.

use stillpoint_tests::process::wait_until_blocked;
use stillpoint_tests::raw_nbd::command;
use stillpoint_tests::tools::{path, sparse_file};
use stillpoint_tests::{CHUNK, MIB, Mount, Server};

#[test]
fn an_instant_that_waits_too_long_for_a_write_is_refused_and_taken_later() {
    let slow = Mount::ext4(32 * MIB);
    let image = slow.path().join("vda.raw");
    sparse_file(&image, 8 * MIB);
    let builder = Server::builder();
    // Only the image is on the slow file system.
    let state = builder.path("state");
    let server = builder
        .disk_as(&format!("vda={},state={}", path(&image), path(&state)))
        .arg("--freeze-timeout=200ms")
        .start();
    let mut guest = server.open_live("vda");
    guest.write(0, &[1; 4096]).unwrap();
    server.checkpoint("cp1");

    let frozen = slow.freeze();
    let data = [2; 4096];
    let (sender, receiver) = guest.halves();
    sender
        .request((command::WRITE, 0), 7, 3 * CHUNK, 4096, &data)
        .unwrap();
    wait_until_blocked(server.pid());
    let refused = server.cli(&["checkpoint", "create", "cp2", "--json"]);
    refused.exits(1);
    assert!(refused.stdout.contains("\"code\":\"busy\""), "{refused}");
    server
        .cli(&["backup", "begin"])
        .refused("no instant within 200ms");
    // Whoever only looks does not wait.
    server.is_well();

    drop(frozen);
    receiver.answer().unwrap().done().unwrap();
    server.checkpoint("cp2");
    // The write was before cp2, and is known to be after cp1.
    assert_eq!(server.dirty_bytes("cp1", "vda"), CHUNK);
    assert_eq!(server.dirty_bytes("cp2", "vda"), 0);
    server.begin("b1", &["--since", "cp1"]);
    let begun = server.open_frozen("vda@b1", &[]).read(3 * CHUNK, 4096);
    assert_eq!(begun.unwrap(), data);
}
