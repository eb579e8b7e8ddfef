//! Known writes at known offsets, and the maps that stock tools print of them.

use std::fs;

use serde_json::Value;
use stillpoint_tests::base::{is_elsewhere, knows_holes};
use stillpoint_tests::raw_nbd::flag;
use stillpoint_tests::seeds::{rng, seeds};
use stillpoint_tests::server::named;
use stillpoint_tests::tools::{nbdinfo_map, proc_number, qemu_img_dirty_map};
use stillpoint_tests::{CHUNK, Extent, GIB, Guest, KIB, MIB, Server};

/// Begins a backup since `cp1` and sees that every tool tells this map.
#[track_caller]
fn check(server: &Server, id: &str, expected: &[Extent]) -> Value {
    let changed: u64 = expected
        .iter()
        .filter(|extent| extent.2 == 1)
        .map(|extent| extent.1)
        .sum();
    assert_eq!(
        server.dirty_bytes("cp1", "vda"),
        changed,
        "dirty bytes of the checkpoint"
    );

    let begun = server.begin(id, &["--since", "cp1"]);
    let disk = named(&begun, "disks", "disk", "vda").expect("vda is in the backup");
    assert_eq!(disk["mode"], "incremental", "{begun}");
    assert_eq!(disk["changed_bytes"], changed, "{begun}");

    let (export, context) = (format!("vda@{id}"), "qemu:dirty-bitmap:cp1");
    assert_eq!(
        nbdinfo_map(&server.frozen_uri(&export), context),
        expected,
        "nbdinfo"
    );
    assert_eq!(
        qemu_img_dirty_map(&server.frozen(), &export, context),
        expected,
        "qemu-img map"
    );
    assert_eq!(
        server.open_frozen(&export, &[context]).map(context),
        expected,
        "by hand"
    );
    begun
}

fn with_checkpoint(size: u64) -> (Server, Guest) {
    let server = Server::with_disk(size);
    let guest = Guest::new(&server, "vda");
    server.checkpoint("cp1");
    (server, guest)
}

#[test]
fn writes_zeroes_and_trims_are_in_the_map_by_whole_chunks() {
    let (server, mut guest) = with_checkpoint(8 * MIB);
    guest.write(0, &[1; 512]);
    guest.write(3 * CHUNK - 100, &[2; 200]);
    guest.write(10 * CHUNK, &vec![3; CHUNK as usize]);
    guest.write(20 * CHUNK + 1, &vec![4; CHUNK as usize]);
    guest.zeroes(30 * CHUNK + 4 * KIB, 4 * KIB, 0);
    guest.zeroes(40 * CHUNK - 4 * KIB, 8 * KIB, flag::NO_HOLE);
    guest.trim(50 * CHUNK, 2 * CHUNK);
    guest.trim(61 * CHUNK - 4 * KIB, 8 * KIB);
    guest.write(127 * CHUNK + 65_535, &[5]);

    let dirty = [0, 2, 3, 10, 20, 21, 30, 39, 40, 50, 51, 60, 61, 127];
    assert_eq!(guest.touched, dirty.into(), "the model itself");
    check(&server, "b1", &guest.expected_map());
}

#[test]
fn nothing_written_is_one_clean_extent() {
    let (server, mut guest) = with_checkpoint(MIB);
    guest.flush();
    check(&server, "b1", &[(0, MIB, 0)]);
}

#[test]
fn everything_written_is_one_dirty_extent() {
    let (server, mut guest) = with_checkpoint(8 * MIB);
    for start in (0..8).map(|mib| mib * MIB) {
        guest.write(start, &vec![1; MIB as usize]);
    }
    check(&server, "b1", &[(0, 8 * MIB, 1)]);
}

#[test]
fn one_byte_is_one_dirty_chunk() {
    let (server, mut guest) = with_checkpoint(MIB);
    guest.write(5 * CHUNK + 12_345, &[1]);
    check(
        &server,
        "b1",
        &[
            (0, 5 * CHUNK, 0),
            (5 * CHUNK, CHUNK, 1),
            (6 * CHUNK, 10 * CHUNK, 0),
        ],
    );
}

#[test]
fn the_last_chunk_of_an_odd_sized_disk_ends_with_the_disk() {
    for tail in [512, 4096 + 512, CHUNK - 512] {
        let (server, mut guest) = with_checkpoint(MIB + tail);
        guest.write(MIB + tail - 1, &[1]);
        check(&server, "b1", &[(0, MIB, 0), (MIB, tail, 1)]);
        server.abort("b1");
        guest.write(0, &[1]);
        check(
            &server,
            "b2",
            &[(0, CHUNK, 1), (CHUNK, MIB - CHUNK, 0), (MIB, tail, 1)],
        );
    }
}

#[test]
fn a_write_of_what_is_already_there_may_not_be_called_clean_by_mistake() {
    let (server, mut guest) = with_checkpoint(MIB);
    guest.write(0, &[0; 4096]);
    check(&server, "b1", &guest.expected_map());
}

#[test]
fn each_checkpoint_has_its_own_map() {
    for seed in seeds(&[1, 2]) {
        let mut rng = rng(seed);
        let server = Server::with_disk(8 * MIB + 512);
        let mut guest = Guest::new(&server, "vda");
        let mut expected = Vec::new();
        for name in ["cp1", "cp2", "cp3"] {
            server.checkpoint(name);
            guest.touched.clear();
            (0..10).for_each(|_| guest.do_something(&mut rng));
            expected.push((name, guest.touched.clone()));
        }
        // Changed since a checkpoint is what was touched after it, whatever came in between.
        for later in (1..expected.len()).rev() {
            let touched = expected[later].1.clone();
            expected[later - 1].1.extend(touched);
        }
        server.begin("b1", &[]);
        for (name, touched) in &expected {
            let context = format!("qemu:dirty-bitmap:{name}");
            let map = server.open_frozen("vda@b1", &[&context]).map(&context);
            let expected = stillpoint_tests::guest::dirty_map(touched, guest.size());
            assert_eq!(map, expected, "seed {seed}: {name}");
            let bytes: u64 = expected.iter().filter(|e| e.2 == 1).map(|e| e.1).sum();
            assert_eq!(
                server.dirty_bytes(name, "vda"),
                bytes,
                "seed {seed}: {name}"
            );
        }
    }
}

#[test]
fn another_granularity_means_other_chunks() {
    let builder = Server::builder();
    let image = builder.path("vda.raw");
    stillpoint_tests::tools::sparse_file(&image, MIB);
    let server = builder.disk_with("vda", &image, ",granularity=4k").start();
    let mut guest = Guest::new(&server, "vda");
    server.checkpoint("cp1");
    guest.write(100 * KIB, &[1]);
    check(
        &server,
        "b1",
        &[
            (0, 100 * KIB, 0),
            (100 * KIB, 4 * KIB, 1),
            (104 * KIB, 920 * KIB, 0),
        ],
    );
}

#[test]
fn the_difference_export_shows_the_map_as_allocation() {
    let server = Server::with_disk(MIB);
    let mut guest = Guest::new(&server, "vda");
    guest.write(0, &vec![1; MIB as usize / 2]);
    server.checkpoint("cp1");
    guest.write(2 * CHUNK, &vec![2; CHUNK as usize]);
    guest.trim(4 * CHUNK, CHUNK);
    server.begin("b1", &["--since", "cp1"]);

    // 1 is a hole whose content is the base's, 0 is data, 3 is a hole that reads as zeroes.
    let expected = [
        (0, 2 * CHUNK, 1),
        (2 * CHUNK, CHUNK, 0),
        (3 * CHUNK, CHUNK, 1),
        (4 * CHUNK, CHUNK, if knows_holes() { 3 } else { 0 }),
        (5 * CHUNK, 11 * CHUNK, 1),
    ];
    let uri = server.frozen_uri("vda@cp1..b1");
    let mut found = nbdinfo_map(&uri, "base:allocation");
    if is_elsewhere() && found.len() == expected.len() {
        // What a trim leaves is the other server's choice, and data is always true.
        found[3].2 |= 3;
    }
    assert_eq!(found, expected);
    let bytes = server.open_frozen("vda@cp1..b1", &[]).read_all();
    assert!(
        bytes == guest.disk,
        "every read of a difference returns the frozen bytes"
    );
}

#[test]
fn a_sparse_image_of_fifteen_tib_costs_little_memory_and_begin_writes_little() {
    const SIZE: u64 = 15 << 40;
    let server = Server::with_disk(SIZE);
    let mut nbd = server.open_live("vda");
    assert_eq!(nbd.export().size, SIZE);
    server.checkpoint("cp1");
    for start in [0, 7 << 40, SIZE - 4096] {
        nbd.write(start, &[1; 4096]).unwrap();
    }
    nbd.flush().unwrap();

    let written = |key| proc_number(server.pid(), "io", key);
    let before = [written("wchar"), written("write_bytes")];
    server.begin("b1", &["--since", "cp1"]);
    let after = [written("wchar"), written("write_bytes")];
    for (before, after) in before.iter().zip(after) {
        assert!(after - before < MIB, "begin wrote {} bytes", after - before);
    }

    let expected = [
        (0, CHUNK, 1),
        (CHUNK, (7 << 40) - CHUNK, 0),
        (7 << 40, CHUNK, 1),
        ((7 << 40) + CHUNK, (8 << 40) - 2 * CHUNK, 0),
        (SIZE - CHUNK, CHUNK, 1),
    ];
    let uri = server.frozen_uri("vda@b1");
    assert_eq!(nbdinfo_map(&uri, "qemu:dirty-bitmap:cp1"), expected);
    nbd.write(7 << 40, &[2; 4096]).unwrap();
    let frozen = server
        .open_frozen("vda@b1", &[])
        .read(7 << 40, 4096)
        .unwrap();
    assert_eq!(frozen, [1; 4096]);

    let anonymous = proc_number(server.pid(), "status", "RssAnon") * KIB;
    assert!(
        anonymous < 100 * MIB,
        "{} MiB of anonymous memory",
        anonymous / MIB
    );
    let state = fs::read_dir(server.path("vda.raw.stillpoint")).expect("the state directory");
    let stored: u64 = state
        .map(|entry| entry.expect("an entry").metadata().expect("a file"))
        .map(|metadata| std::os::unix::fs::MetadataExt::blocks(&metadata) * 512)
        .sum();
    assert!(stored < GIB, "{stored} bytes of state");
}
