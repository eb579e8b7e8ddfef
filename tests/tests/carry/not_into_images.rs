//! Images that get no bitmap, and that none of them is touched.

use std::path::{Path, PathBuf};

use stillpoint_tests::tools::{path, tool, with_qemu_nbd};
use stillpoint_tests::{MIB, Output, Server};

use crate::images::{SIZE, as_qemu_says, bitmap, bytes_of, check, create, poke};

fn server() -> Server {
    let server = Server::with_disk(SIZE);
    server.checkpoint("cp1");
    server.open_live("vda").write(MIB, &[1; 512]).unwrap();
    server
}

/// Puts what has changed since `cp1` into an image.
fn export(server: &Server, image: &Path, options: &[&str]) -> Output {
    let args = ["checkpoint", "export", "vda", "cp1", "--format", "qcow2"];
    server.cli(&[&args[..], &["--to", path(image)], options].concat())
}

#[track_caller]
fn refused(server: &Server, image: &Path, code: &str, why: &str) {
    let before = std::fs::read(image).ok();
    let output = export(server, image, &["--json"]);
    output.fails_with(code, why);
    assert!(
        std::fs::read(image).ok() == before,
        "{} was touched",
        image.display()
    );
}

#[test]
fn images_that_cannot_be_believed_get_no_bitmap() {
    let server = server();
    let image = |name: &str, options: &str| -> PathBuf {
        let image = server.path(name);
        create(&image, options, SIZE);
        image
    };
    let bits = |bit: u32| (1_u64 << bit).to_be_bytes();
    for (name, at, bytes, code, why) in [
        ("dirty", 72, &bits(0)[..], "image-dirty", "dirty"),
        ("corrupt", 72, &bits(1), "image-corrupt", "corrupt"),
        ("features", 72, &bits(40), "image-features", "bit 40"),
        ("encrypted", 32, &[0, 0, 0, 1], "image-encrypted", "AES"),
        ("version", 4, &[0, 0, 0, 4], "bad-image", "version 4"),
        ("raw", 0, b"RAW\0", "bad-image", "no qcow2"),
        ("counts", 48, &[0xff; 8], "bad-image", "table of counts"),
    ] {
        let image = image(name, "");
        poke(&image, at, bytes);
        refused(&server, &image, code, why);
    }
    refused(
        &server,
        &image("old", "compat=0.10"),
        "image-version",
        "version 2",
    );
    let other = server.path("other");
    create(&other, "", SIZE + MIB);
    refused(&server, &other, "other-size", "9437184");
    refused(
        &server,
        &server.path("none"),
        "not-writable",
        "No such file",
    );
    refused(&server, &server.path("run"), "not-writable", "directory");
    refused(&server, &server.image("vda"), "image-locked", "in use");
    let used = image("used", "");
    with_qemu_nbd(&["-f", "qcow2", path(&used)], |_| {
        refused(&server, &used, "image-locked", "in use");
    });
    with_qemu_nbd(&["-r", "-f", "qcow2", path(&used)], |_| {
        refused(&server, &used, "image-locked", "in use");
    });
}

#[test]
fn a_damaged_list_of_bitmaps_is_not_written_over() {
    let server = server();
    let image = server.path("image");
    create(&image, "", SIZE);
    bitmap(&image, &["--add", "theirs"]);
    let bytes = bytes_of(&image);
    let listed = bytes
        .windows(4)
        .position(|four| four == [0x23, 0x85, 0x28, 0x75])
        .unwrap();
    let at = |field: usize| {
        let from = listed + 8 + field;
        u64::from_be_bytes(bytes[from..from + 8].try_into().unwrap())
    };
    let (says, list) = (listed as u64 + 8, at(16));
    for (place, damage, why) in [
        (says, &[0, 0, 0, 9][..], "does not add up"),
        (says, &[0, 0, 0xff, 0], "as many bitmaps"),
        (says + 16, &[0xff; 8], "no cluster"),
        (says + 17, &[1], "behind the end"),
        (says - 4, &[0, 0, 0, 16], "no list"),
        (list + 18, &[0xff, 0xff], "cut short"),
        (list + 20, &[0xff; 4], "cut short"),
        (list + 8, &[0xff; 4], "larger than any"),
    ] {
        poke(&image, place, damage);
        let before = bytes_of(&image);
        let output = export(&server, &image, &[]);
        assert_eq!(output.code(), 1, "{output}");
        assert!(output.stderr.contains(why), "{place}: {output}");
        assert!(bytes_of(&image) == before, "{place}");
        std::fs::write(&image, &bytes).unwrap();
    }
}

#[test]
fn bitmaps_that_nobody_can_believe_go_only_by_force() {
    let server = server();
    let image = server.path("image");
    create(&image, "", SIZE);
    bitmap(&image, &["--add", "theirs"]);
    poke(&image, 88, &[0; 8]);
    refused(&server, &image, "bitmap-inconsistent", "knows none");
    export(&server, &image, &["--force"]).ok();
    let told = tool("qemu-img", &["info", "--output=json", path(&image)]).json();
    let bitmaps = &told["format-specific"]["data"]["bitmaps"];
    assert_eq!(bitmaps.as_array().unwrap().len(), 1, "{told}");
    let changed = crate::images::map_of(&[16]);
    assert_eq!(as_qemu_says(&image, "cp1"), changed);
    // What was theirs is a leak by now.
    tool("qemu-img", &["check", "-q", "-r", "leaks", path(&image)]).ok();
    check(&image, "without leaks");
    assert_eq!(as_qemu_says(&image, "cp1"), changed);
}

#[test]
fn a_head_without_room_is_refused() {
    let server = server();
    let image = server.path("image");
    // The names of features fill most of a cluster of 512 bytes; QEMU leaves them out there.
    create(&image, "cluster_size=512", SIZE);
    let mut extension = 0x1234_5678_u32.to_be_bytes().to_vec();
    extension.extend(368_u32.to_be_bytes());
    let bytes = bytes_of(&image);
    let from = u64::from(u32::from_be_bytes(bytes[100..104].try_into().unwrap()));
    poke(&image, from, &[&extension[..], &[0; 376]].concat());
    refused(&server, &image, "bad-image", "no room");
}

#[test]
fn what_makes_no_sense_is_a_usage_error() {
    let server = server();
    let export =
        |args: &[&str]| server.cli(&[&["checkpoint", "export", "vda", "cp1"], args].concat());
    export(&["--to", "-", "--format", "qcow2"]).exits(2);
    export(&["--to", "list", "--disabled"]).exits(2);
    export(&["--to", "list", "--bitmap", "x"]).exits(2);
    export(&[]).exits(2);
}
