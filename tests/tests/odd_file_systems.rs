//! What a file system can do to a server besides keeping its files.

use stillpoint_tests::process::wait_until_blocked;
use stillpoint_tests::raw_nbd::command;
use stillpoint_tests::state::{Begun, begin_since};
use stillpoint_tests::tools::{path, sparse_file};
use stillpoint_tests::{CHUNK, Guest, LoopDevice, MIB, Mount, Server};

const SIZE: u64 = 64 * MIB;
/// What is in doubt as one.
const REGION: u64 = 64 * CHUNK;

#[test]
fn a_file_system_shut_down_and_mounted_again_within_a_boot_is_a_power_cut() {
    let storage = Mount::ext4(128 * MIB);
    let image = storage.path().join("vda.raw");
    sparse_file(&image, SIZE);
    let mut server = Server::builder().disk_at("vda", &image).start();
    let mut guest = Guest::new(&server, "vda");
    (0..SIZE / MIB).for_each(|mib| guest.write(mib * MIB, &vec![1; CHUNK as usize]));
    server.checkpoint("cp1");
    let then = guest.disk;
    // After a stop no region is active.
    server.stop();
    server.start();
    let mut live = server.open_live("vda");
    // In four regions, of which nothing but that they are active need be durable.
    for chunk in [0, 1, 80, 900] {
        live.write(chunk * CHUNK, &[2; 4096]).unwrap();
    }
    server.begin("b1", &["--since", "cp1"]);
    live.write(300 * CHUNK, &[3; 4096]).unwrap();
    server.kill();
    storage.lose_power();
    server.start();

    let shown = server.cli(&["backup", "show", "b1", "--json"]);
    shown.exits(4);
    assert!(shown.stdout.contains("broken"), "{shown}");
    let now = server.open_live("vda").read_all();
    let Begun::Incremental { map, uncertain } = begin_since(&server, "b2", "vda", "cp1") else {
        panic!("full, with the image as it was left");
    };
    let is_dirty = |at: u64| {
        let found = map.iter().find(|extent| at < extent.0 + extent.1);
        found.is_some_and(|extent| extent.2 == 1)
    };
    for at in (0..SIZE).step_by(CHUNK as usize) {
        let chunk = at as usize..(at + CHUNK) as usize;
        assert!(
            now[chunk.clone()] == then[chunk] || is_dirty(at),
            "what changed at {at} is clean: {map:?}"
        );
    }
    // All of the regions that were active, and no more.
    let dirty: u64 = map.iter().filter(|e| e.2 == 1).map(|e| e.1).sum();
    assert_eq!(dirty, 4 * REGION, "{map:?}");
    assert!(uncertain > 0, "{map:?}");
}

#[test]
fn the_next_server_is_kept_out_until_the_last_write_of_a_killed_one_has_landed() {
    let below = Mount::ext4(128 * MIB);
    let file = below.path().join("backing");
    sparse_file(&file, SIZE);
    let device = LoopDevice::new(&file);
    let builder = Server::builder();
    let state = builder.path("state");
    let disk = |state: &str| format!("vda={},state={state}", path(device.path()));
    let mut server = builder.disk_as(&disk(path(&state))).start();
    let mut guest = Guest::new(&server, "vda");
    guest.write(3 * CHUNK, &[1; 4096]);
    guest.flush();
    server.checkpoint("cp1");
    guest.touched.clear();
    guest.write(5 * CHUNK, &[2; 4096]);
    let (expected, map) = (guest.disk.clone(), guest.expected_map());

    let frozen = below.freeze();
    let mut other = server.open_live("vda");
    let (sender, _) = other.halves();
    sender
        .request((command::FLUSH, 0), 7, 0, 0, &[])
        .expect("the server takes it");
    wait_until_blocked(server.pid());
    server.signal(rustix::process::Signal::KILL);

    let second = Server::builder();
    let state = second.path("state");
    let refused = second.disk_as(&disk(path(&state))).start_and_fail();
    refused.exits(1);
    assert!(refused.stderr.contains("in use"), "{refused}");

    drop(frozen);
    server.wait();
    server.start();
    let mut live = server.open_live("vda");
    assert!(
        live.read_all() == expected,
        "what was acknowledged is there"
    );
    let begun = begin_since(&server, "b1", "vda", "cp1");
    assert_eq!(begun, Begun::Incremental { map, uncertain: 0 });
    server.stop();
}

#[test]
fn the_next_server_is_kept_out_until_the_last_direct_write_of_a_killed_ones_ring_has_landed() {
    let below = Mount::ext4(128 * MIB);
    let file = below.path().join("backing");
    sparse_file(&file, SIZE);
    let device = LoopDevice::new(&file);
    let disk = |state: &str| format!("vda={},state={state},cache=none", path(device.path()));
    let builder = Server::builder().arg("--io-engine=io_uring");
    let state = builder.path("state");
    let mut server = builder.disk_as(&disk(path(&state))).start();
    let mut guest = Guest::new(&server, "vda");
    guest.write(3 * CHUNK, &[1; 4096]);
    server.checkpoint("cp1");
    guest.touched.clear();
    guest.write(5 * CHUNK, &[2; 4096]);

    let frozen = below.freeze();
    let mut other = server.open_live("vda");
    let (sender, _) = other.halves();
    sender
        .request((command::WRITE, 0), 7, 6 * CHUNK, 4096, &[3; 4096])
        .expect("the server takes it");
    device.wait_until_writing(true);
    server.kill();

    // The process is gone, and its write is not.
    let second = Server::builder();
    let state = second.path("state");
    let refused = second.disk_as(&disk(path(&state))).start_and_fail();
    refused.exits(1);
    assert!(refused.stderr.contains("in use"), "{refused}");

    drop(frozen);
    device.wait_until_writing(false);
    // The kernel lets go of the ring's file soon after the write has ended, not at once; a start
    // waits for it.
    server.start();
    // It was acknowledged to nobody, and has landed.
    guest.disk[6 * CHUNK as usize..][..4096].fill(3);
    guest.touched.insert(6);
    let mut live = server.open_live("vda");
    assert!(live.read_all() == guest.disk, "what was written is there");
    let begun = begin_since(&server, "b1", "vda", "cp1");
    let map = guest.expected_map();
    assert_eq!(begun, Begun::Incremental { map, uncertain: 0 });
    server.stop();
}

#[test]
fn a_start_that_finds_no_room_says_so_and_nothing_is_lost() {
    let storage = Mount::ext4(8 * MIB);
    let builder = Server::builder();
    let image = builder.path("vda.raw");
    sparse_file(&image, SIZE);
    let state = storage.path().join("state");
    let disk = format!("vda={},state={}", path(&image), path(&state));
    let builder = builder.disk_as(&disk);

    // A new one.
    let filler = storage.fill();
    let refused = builder.start_and_fail();
    let error = refused.error(1);
    assert!(error.contains("No space left"), "{refused}");
    assert!(error.contains(path(&state)), "{refused}");
    drop(filler);
    let mut server = builder.start();
    let mut guest = Guest::new(&server, "vda");
    server.checkpoint("cp1");
    guest.write(7 * CHUNK, &[1; 4096]);
    let map = guest.expected_map();

    // One that is there, after a stop and after a kill.
    for how in ["stop", "kill"] {
        match how {
            "stop" => server.stop(),
            _ => server.kill(),
        }
        let filler = storage.fill();
        // What a start stores may find room in blocks that are taken already.
        if server.try_start().is_ok() {
            server.kill();
        } else {
            let log = server.stderr();
            assert!(log.contains("No space left"), "after a {how}: {log}");
        }
        drop(filler);
        server.start();
        let begun = begin_since(&server, &format!("b-{how}"), "vda", "cp1");
        let map = map.clone();
        let expected = Begun::Incremental { map, uncertain: 0 };
        assert_eq!(begun, expected, "after a {how}");
    }
}
