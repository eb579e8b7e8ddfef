//! The map of a disk of 15 TiB.

use std::fs::File;
use std::path::Path;

use rustix::fs::{FallocateFlags, fallocate};
use stillpoint_tests::tools::{merged, path, proc_number, sparse_file};
use stillpoint_tests::{CHUNK, GIB, KIB, MIB, Mount, RawNbd, Server};

use crate::ALLOCATION;

const HUGE: u64 = 15 << 40;
const RUNS: u64 = 200_000;
/// Of all contexts of a reply together.
const EXTENTS_MAX: usize = 1 << 16;

/// Allocates a block of every other chunk, as far as so many runs go.
fn fragment(image: &Path) {
    sparse_file(image, HUGE);
    let file = File::options().write(true).open(image).unwrap();
    for run in (0..RUNS).step_by(2) {
        fallocate(&file, FallocateFlags::empty(), run * CHUNK, 4096).unwrap();
    }
}

fn anonymous(server: &Server) -> u64 {
    proc_number(server.pid(), "status", "RssAnon") * KIB
}

#[test]
fn the_map_of_a_fragmented_disk_takes_little_memory_and_is_the_same_in_either_form() {
    // Goes as a whole, which to some file systems is less work than so many extents.
    let mount = Mount::ext4(GIB);
    let image = mount.path().join("fragmented.raw");
    fragment(&image);
    let builder = Server::builder();
    let state = builder.path("state");
    let server = builder
        .disk_as(&format!("vda={},state={}", path(&image), path(&state)))
        .start();
    server.checkpoint("cp1");
    server.begin("b1", &["--since", "cp1"]);
    let bitmap = "qemu:dirty-bitmap:cp1";
    let before = anonymous(&server);
    let mut most = before;

    let mut nbd = RawNbd::open_extended(&server.frozen(), "vda@b1", &[ALLOCATION, bitmap]);
    let (allocation, bitmap_id) = (nbd.context(ALLOCATION), nbd.context(bitmap));
    let (mut at, mut extended) = (0, Vec::new());
    while at < HUGE {
        let answer = nbd.extended_status(at, HUGE - at, 0).unwrap();
        let covered = |id| answer[&id].iter().map(|extent| extent.0).sum::<u64>();
        assert_eq!(covered(allocation), covered(bitmap_id), "at {at}");
        let told: usize = answer.values().map(Vec::len).sum();
        assert!(told <= EXTENTS_MAX, "{told} extents at {at}");
        assert!(answer[&bitmap_id].iter().all(|extent| extent.1 == 0));
        for (length, flags) in &answer[&allocation] {
            extended.push((at, *length, *flags as u32));
            at += length;
        }
        most = most.max(anonymous(&server));
    }
    let extended = merged(extended);
    assert_eq!(extended.len() as u64, RUNS);

    let mut nbd = RawNbd::open(&server.frozen(), "vda@b1", &[ALLOCATION]);
    let compact = nbd.map(ALLOCATION);
    most = most.max(anonymous(&server));
    assert!(compact == extended, "the maps differ");
    assert!(
        most - before < 16 * MIB,
        "{} MiB more than before",
        (most - before) / MIB
    );
}
