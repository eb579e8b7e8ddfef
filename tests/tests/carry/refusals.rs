//! What is not taken in, and that nothing is left of it.

use std::fs::File;
use std::path::Path;

use serde_json::Value;
use stillpoint_tests::tools::{abandon, path, tool, with_qemu_nbd};
use stillpoint_tests::{MIB, Server};

use crate::images::{SIZE, bitmap, create, image_with_bitmap, poke, serving_copy};

/// Neither a checkpoint nor a bitmap is made of `from`, for this reason.
#[track_caller]
fn refused(server: &Server, from: &Path, code: &str, why: &str) {
    for kind in ["checkpoint", "bitmap"] {
        let args = [kind, "import", "vda", "cp0", "--from", path(from), "--json"];
        server.cli(&args).fails_with(code, why);
    }
    assert_eq!(
        server.cli_json(&["checkpoint", "list"]),
        Value::Array(vec![])
    );
    assert!(!server.cli(&["bitmap", "list"]).ok().contains("cp0"));
}

#[test]
fn images_that_cannot_be_believed_are_refused_by_name() {
    let (dir, image) = image_with_bitmap(&[3]);
    let server = serving_copy(&image);
    let with = |name: &str, at: u64, bytes: &[u8]| {
        let copy = dir.path().join(name);
        std::fs::copy(&image, &copy).unwrap();
        poke(&copy, at, bytes);
        copy
    };
    let bits = |bit: u32| (1_u64 << bit).to_be_bytes();
    refused(&server, &with("a", 72, &bits(0)), "image-dirty", "dirty");
    refused(
        &server,
        &with("b", 72, &bits(1)),
        "image-corrupt",
        "corrupt",
    );
    refused(&server, &with("c", 72, &bits(9)), "image-features", "bit 9");
    refused(
        &server,
        &with("d", 32, &[0, 0, 0, 2]),
        "image-encrypted",
        "LUKS",
    );
    refused(
        &server,
        &with("e", 4, &[0, 0, 0, 9]),
        "bad-image",
        "version 9",
    );
    // Written by somebody who clears what they do not know.
    refused(
        &server,
        &with("f", 88, &[0; 8]),
        "bitmap-inconsistent",
        "knows no bitmaps",
    );
    let torn = with("g", 0, b"Q");
    abandon(&torn);
    refused(&server, &torn, "bitmap-inconsistent", "did not close");
    with_qemu_nbd(&["-f", "qcow2", path(&image)], |_| {
        refused(&server, &image, "image-locked", "in use");
    });
    let other = dir.path().join("other");
    create(&other, "", SIZE);
    refused(&server, &other, "unknown-bitmap", "no bitmap 'cp0'");
    bitmap(&other, &["--add", "x"]);
    bitmap(&other, &["--add", "y z"]);
    let output = server.cli(&["bitmap", "import", "vda", "cp0", "--from", path(&other)]);
    assert!(output.stderr.contains("it has: x, y z"), "{output}");
    let larger = dir.path().join("larger");
    create(&larger, "", SIZE + MIB);
    bitmap(&larger, &["--add", "cp0"]);
    refused(&server, &larger, "other-size", "8388608");
}

#[test]
fn lists_that_cannot_be_believed_are_refused() {
    let (dir, image) = image_with_bitmap(&[3]);
    let server = serving_copy(&image);
    let list = dir.path().join("list");
    with_qemu_nbd(&["-r", "-f", "qcow2", path(&image)], |socket| {
        let uri = stillpoint_tests::server::uri(socket, "");
        let map = tool("nbdinfo", &["--json", "--map", &uri]);
        std::fs::write(&list, map.ok()).unwrap();
    });
    refused(&server, &list, "bad-extents", "base:allocation");
    let map = tool("qemu-img", &["map", "--output=json", path(&image)]);
    std::fs::write(&list, map.ok()).unwrap();
    refused(&server, &list, "bad-extents", "missing field");
    let whole = |length: u64| {
        format!(
            "[{{\"offset\": 0, \"length\": {length}, \"type\": 1, \"description\": \"dirty\"}}]"
        )
    };
    for (text, why) in [
        (String::new(), "EOF"),
        ("nonsense".to_owned(), "expected"),
        (whole(SIZE - 512), "ends at"),
        (whole(SIZE + 512), "behind the disk"),
        (format!("{}]", whole(SIZE)), "trailing"),
        (whole(SIZE).repeat(2), "trailing"),
    ] {
        std::fs::write(&list, text).unwrap();
        refused(&server, &list, "bad-extents", why);
    }
    // Whole, but of 2 GiB, most of it white space; sparse, so that nobody has to write it.
    File::create(&list).unwrap().set_len(2 << 30).unwrap();
    refused(&server, &list, "list-too-long", "2147483648");
}

#[test]
fn what_is_no_file_or_not_there_is_refused_without_waiting() {
    let (dir, image) = image_with_bitmap(&[3]);
    let server = serving_copy(&image);
    refused(
        &server,
        &dir.path().join("none"),
        "cannot-open",
        "No such file",
    );
    refused(&server, dir.path(), "cannot-open", "no file");
    refused(&server, Path::new("/dev/zero"), "cannot-open", "no file");
    let pipe = dir.path().join("pipe");
    tool("mkfifo", &[path(&pipe)]).ok();
    refused(&server, &pipe, "cannot-open", "no file");
    server.is_well();
}

#[test]
fn names_and_granularities_follow_the_rules_that_they_always_do() {
    let (_dir, image) = image_with_bitmap(&[3]);
    let server = serving_copy(&image);
    let import =
        |args: &[&str]| server.cli(&[args, &["--from", path(&image), "--bitmap", "cp0"]].concat());
    import(&["checkpoint", "import", "vda", "a b"]).refused("character other than");
    import(&["checkpoint", "import", "vda", "backup-vda"]).refused("backup bitmap");
    import(&["checkpoint", "import", "vdz", "cp0"]).refused("no disk 'vdz'");
    import(&["bitmap", "import", "vdz", "cp0"]).refused("no disk 'vdz'");
    import(&["bitmap", "import", "vda", ""]).refused("cannot be empty");
    import(&["bitmap", "import", "vda", "b", "--granularity", "4k"]).refused("at least 65536");
    for kind in ["checkpoint", "bitmap"] {
        import(&[kind, "import", "vda", "twice"]).ok();
        import(&[kind, "import", "vda", "twice"]).refused("exists");
    }
}

#[test]
fn where_something_went_untracked_nothing_is_made_of_a_file_from_before() {
    let (_dir, image) = image_with_bitmap(&[3]);
    let mut server = serving_copy(&image);
    server.checkpoint("old");
    server.stop();
    // Somebody else has changed the image.
    poke(&server.image("vda"), 0, &[7; 512]);
    server.start();
    refused_since(&server, &image, &[]);
    refused_since(&server, &image, &["--as-of", "old"]);
    server.checkpoint("new");
    for kind in ["checkpoint", "bitmap"] {
        let args = [
            kind,
            "import",
            "vda",
            "cp0",
            "--from",
            path(&image),
            "--as-of",
            "new",
        ];
        server.cli(&args).ok();
    }
}

#[track_caller]
fn refused_since(server: &Server, image: &Path, more: &[&str]) {
    for kind in ["checkpoint", "bitmap"] {
        let args = [kind, "import", "vda", "cp0", "--from", path(image)];
        let output = server.cli(&[&args[..], more].concat());
        output.refused("is not known: the image was changed");
    }
}
