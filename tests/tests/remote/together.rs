//! The base and the server end together, or the base cannot do what durability takes.

use std::fs;

use rand::Rng as _;
use stillpoint_tests::seeds::{self, number};
use stillpoint_tests::server::temporary_directory;
use stillpoint_tests::shadow::SECTOR;
use stillpoint_tests::state::{Begun, begin_since};
use stillpoint_tests::tools::{path, tool};
use stillpoint_tests::{CHUNK, NbdBase, Server};

use super::{SIZE, image, on};

const EIO: u32 = 5;

/// Every chunk that differs from what the disk was at the checkpoint is dirty since.
#[track_caller]
fn check_since(server: &Server, (id, checkpoint): (&str, &str), then: &[u8], what: &str) {
    let now = server.open_live("vda").read_all();
    let map = match begin_since(server, id, "vda", checkpoint) {
        Begun::Incremental { map, .. } => map,
        Begun::Full { reason } => panic!("{what}: full, because {reason}"),
    };
    for at in (0..SIZE).step_by(CHUNK as usize) {
        let place = at as usize..(at + CHUNK) as usize;
        let dirty = map.iter().any(|(start, length, flags)| {
            *flags == 1 && *start <= at && at + CHUNK <= start + length
        });
        assert!(
            dirty || now[place.clone()] == then[place],
            "{what}: {at} is clean"
        );
    }
}

#[test]
fn what_is_lost_when_both_are_killed_is_marked() {
    for seed in seeds::seeds(&[5, 6]) {
        let mut rng = seeds::rng(seed);
        let directory = temporary_directory();
        let qcow2 = directory.path().join("image.qcow2");
        tool("qemu-img", &["create", "-f", "qcow2", path(&qcow2), "8M"]).ok();
        // What is new in its tables it has in memory, until it is flushed.
        let mut base = NbdBase::qemu_nbd(&["--format=qcow2", path(&qcow2)]);
        let mut server = on(&base, "").start();
        for round in 0..number("STILLPOINT_BASE_KILLS", 4) {
            let (what, name) = (format!("seed {seed}, round {round}"), format!("cp{round}"));
            let mut live = server.open_live("vda");
            let mut then = Vec::new();
            for step in 0..30_u8 {
                if step == 15 {
                    server.checkpoint(&name);
                    then = live.read_all();
                }
                let offset = SECTOR * rng.random_range(0..SIZE / SECTOR - 64);
                let length = SECTOR * rng.random_range(1..64);
                live.write(offset, &vec![rng.random(); length as usize])
                    .unwrap();
                if rng.random_ratio(1, 12) {
                    live.flush().unwrap();
                }
            }
            if rng.random() {
                server.kill();
                base.kill();
            } else {
                base.kill();
                server.kill();
            }
            base.start();
            server.start();
            check_since(&server, (&format!("b{round}"), &name), &then, &what);
        }
    }
}

/// A file by way of shell commands: how it is flushed, if at all, is for the caller to say.
fn by_hand(file: &std::path::Path, flush: &[&str]) -> NbdBase {
    let file = path(file);
    let size = format!("get_size=echo {SIZE}");
    let read = format!("pread=dd if={file} bs=64K iflag=skip_bytes,count_bytes skip=$4 count=$3");
    let write = format!("pwrite=dd of={file} bs=64K conv=notrunc oflag=seek_bytes seek=$4");
    let fixed = ["eval", &size, "can_write=exit 0", &read, &write];
    NbdBase::nbdkit(&[&fixed, flush].concat())
}

#[test]
fn what_a_base_without_flush_loses_with_the_server_is_marked_though_older_than_the_instant() {
    let directory = temporary_directory();
    let (image, before) = (image(&directory), directory.path().join("before"));
    let mut base = by_hand(&image, &[]);
    let mut server = on(&base, "").start();
    let mut live = server.open_live("vda");
    fs::copy(&image, &before).unwrap();
    live.write(3 * CHUNK, &[1; 512]).unwrap();
    server.checkpoint("cp1");
    let then = live.read_all();
    server.kill();
    base.kill();
    fs::copy(&before, &image).unwrap();
    base.start();
    server.start();
    check_since(&server, ("b1", "cp1"), &then, "no flush");
}

#[test]
fn a_flush_that_the_base_fails_is_never_made_good() {
    let directory = temporary_directory();
    let (image, fails) = (image(&directory), directory.path().join("fails"));
    let flush = format!(
        "flush=[ ! -e {} ] || {{ echo EIO >&2; exit 1; }}",
        path(&fails)
    );
    let base = by_hand(&image, &["can_flush=exit 0", &flush]);
    let mut server = on(&base, "").start();
    let mut live = server.open_live("vda");
    live.write(0, &[1; 512]).unwrap();
    live.flush().unwrap();
    server.checkpoint("cp1");
    let then = live.read_all();
    server.begin("b1", &["--since", "cp1"]);
    live.write(3 * CHUNK, &[2; 512]).unwrap();
    fs::write(&fails, "").unwrap();
    assert_eq!(live.flush(), Err(EIO));
    fs::remove_file(&fails).unwrap();
    assert_eq!(
        live.flush(),
        Err(EIO),
        "one that succeeds would prove nothing"
    );
    let mut frozen = server.open_frozen("vda@b1", &[]);
    assert_eq!(frozen.read(0, 512), Err(EIO), "it is broken");
    server.cli(&["backup", "begin", "--id", "b2"]).error(1);
    server.kill();
    server.start();
    server.abort("b1");
    check_since(&server, ("b3", "cp1"), &then, "after a flush that failed");
    server.open_live("vda").flush().unwrap();
}
