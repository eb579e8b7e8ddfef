//! What a server knows outlives it.

use stillpoint_tests::tools::sparse_file;
use stillpoint_tests::{CHUNK, Guest, MIB, Server, base};

#[test]
fn checkpoints_and_what_changed_since_survive_a_clean_stop() {
    let mut server = Server::with_disk(4 * MIB);
    server.checkpoint("cp1");
    Guest::new(&server, "vda").write(9 * CHUNK, &[1; 512]);
    server.stop();
    server.start();
    assert_eq!(server.dirty_bytes("cp1", "vda"), CHUNK);
    server.begin("b1", &["--since", "cp1"]);
    let map = server.open_frozen("vda@b1", &["qemu:dirty-bitmap:cp1"]);
    let map = { map }.map("qemu:dirty-bitmap:cp1");
    assert_eq!(map[1], (9 * CHUNK, CHUNK, 1), "{map:?}");
}

#[test]
fn another_granularity_than_that_of_the_state_is_refused_with_both() {
    let builder = Server::builder();
    let image = builder.path("vda.raw");
    sparse_file(&image, MIB);
    let mut server = builder.disk_at("vda", &image).start();
    server.checkpoint("cp1");
    server.stop();
    let disk = format!("vda={},granularity=128k", image.display());
    let output = Server::builder().disk_as(&disk).start_and_fail();
    output.error(1);
    let told = |text: &[&str]| text.iter().any(|text| output.stderr.contains(text));
    assert!(told(&["64k", "64 KiB", "65536"]), "{output}");
    assert!(told(&["128k", "128 KiB", "131072"]), "{output}");
}

#[test]
fn an_open_backup_survives_a_stop_and_a_kill() {
    for how in ["stop", "kill"] {
        let mut server = Server::with_disk(4 * MIB);
        server.checkpoint("cp1");
        let mut guest = Guest::new(&server, "vda");
        guest.write(9 * CHUNK, &[1; 4096]);
        let (then, map) = (guest.disk.clone(), guest.expected_map());
        server.begin("b1", &["--since", "cp1"]);
        guest.write(9 * CHUNK, &[2; 4096]);
        guest.write(11 * CHUNK, &[2; 4096]);
        match how {
            "stop" => server.stop(),
            _ => server.kill(),
        }
        server.start();
        let mut frozen = server.open_frozen("vda@b1", &["qemu:dirty-bitmap:cp1"]);
        assert!(frozen.read_all() == then, "{how}: the frozen bytes moved");
        assert_eq!(frozen.map("qemu:dirty-bitmap:cp1"), map, "{how}");
        server.commit("b1");
        if how == "stop" || !base::is_elsewhere() {
            assert_eq!(server.dirty_bytes("cp1", "vda"), 2 * CHUNK, "{how}");
        }
    }
}
