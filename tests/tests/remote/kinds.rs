//! Servers of every kind.

use std::fs::{self, File};

use stillpoint_tests::seeds;
use stillpoint_tests::server::temporary_directory;
use stillpoint_tests::tools::{nbdcopy_sha256, path, sha256, tool};
use stillpoint_tests::{Guest, NbdBase};

use super::{SIZE, check_backup, image, on};

/// Writes and backs up by turns, with the disk on `base`; returns what the disk holds at last.
#[track_caller]
fn use_disk(base: &NbdBase, what: &str) -> Vec<u8> {
    let mut rng = seeds::rng(7);
    let mut server = on(base, "").start();
    let mut guest = Guest::new(&server, "vda");
    assert_eq!(guest.size(), SIZE, "{what}");
    for _ in 0..20 {
        guest.do_something(&mut rng);
    }
    server.checkpoint("cp-b0");
    for (id, since) in [("b1", "cp-b0"), ("b2", "cp-b1")] {
        guest.touched.clear();
        if id == "b2" {
            // What was written after the instant before.
            guest.write(0, &vec![0xee; 100_000]);
            guest.zeroes(1 << 20, 70_001, 0);
        }
        for _ in 0..20 {
            guest.do_something(&mut rng);
        }
        check_backup(&server, &mut guest, (id, since), what);
    }
    guest.flush();
    let mut live = server.open_live("vda");
    assert!(live.read_all() == guest.disk, "{what}: the live disk");
    server.stop();
    guest.disk
}

#[test]
fn an_export_of_any_server_is_frozen_mapped_and_pulled() {
    for args in [
        &["memory", "8M"][..],
        &["--no-sr", "memory", "8M"],
        &["--filter=nozero", "memory", "8M"],
        &["--filter=noextents", "memory", "8M"],
        &["--filter=fua", "memory", "8M"],
        &[
            "--filter=blocksize-policy",
            "memory",
            "8M",
            "blocksize-minimum=4096",
            "blocksize-preferred=8192",
            "blocksize-maximum=64K",
            "blocksize-error-policy=error",
        ],
        &["--mask-handshake=0", "memory", "8M"],
    ] {
        let base = NbdBase::nbdkit(args);
        use_disk(&base, &args.join(" "));
    }
}

#[test]
fn what_a_guest_was_told_is_durable_is_in_the_file_of_the_base() {
    let directory = temporary_directory();
    let image = image(&directory);
    let base = NbdBase::file(&image);
    let disk = use_disk(&base, "nbdkit file");
    assert!(fs::read(&image).unwrap() == disk);
}

#[test]
fn a_qcow2_image_is_written_by_way_of_qemu_nbd() {
    let directory = temporary_directory();
    let image = directory.path().join("image.qcow2");
    let raw = directory.path().join("image.raw");
    tool("qemu-img", &["create", "-f", "qcow2", path(&image), "8M"]).ok();
    let mut base = NbdBase::qemu_nbd(&["--format=qcow2", "--discard=unmap", path(&image)]);
    let disk = use_disk(&base, "qemu-nbd");
    base.kill();
    tool(
        "qemu-img",
        &["convert", "-O", "raw", path(&image), path(&raw)],
    )
    .ok();
    assert!(fs::read(&raw).unwrap() == disk);
}

#[test]
fn an_export_that_is_read_only_is_served_read_only() {
    let base = NbdBase::nbdkit(&["-r", "sparse-random", "8M"]);
    let refused = on(&base, "").start_and_fail();
    assert!(refused.error(1).contains("read-only"), "{refused}");
    let server = on(&base, ",read-only").start();
    let mut live = server.open_live("vda");
    let expected = sha256(&live.read_all());
    assert!(live.write(0, &[1; 512]).is_err());
    server.begin("b1", &[]);
    let uri = server.frozen_uri("vda@b1");
    assert_eq!(nbdcopy_sha256(&uri, server.directory()), expected);
}

#[test]
fn a_disk_grows_when_its_server_has_made_it_larger() {
    let directory = temporary_directory();
    let image = image(&directory);
    let base = NbdBase::file(&image);
    let server = on(&base, "").start();
    let mut live = server.open_live("vda");
    live.write(0, &[1; 512]).unwrap();
    server.checkpoint("cp1");
    let larger = (2 * SIZE).to_string();
    let refused = server.cli(&["disk", "resize", "vda", &larger]);
    assert!(refused.error(1).contains("is to have"), "{refused}");
    let file = File::options().write(true).open(&image).unwrap();
    file.set_len(2 * SIZE).unwrap();
    server.cli(&["disk", "resize", "vda", &larger]).ok();
    let mut grown = server.open_live("vda");
    assert_eq!(grown.export().size, 2 * SIZE);
    grown.write(2 * SIZE - 512, &[2; 512]).unwrap();
    server.begin("b1", &["--since", "cp1"]);
    let context = "qemu:dirty-bitmap:cp1";
    let map = server.open_frozen("vda@b1", &[context]).map(context);
    assert_eq!(map, [(0, SIZE, 0), (SIZE, SIZE, 1)]);
}
