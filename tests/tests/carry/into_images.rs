//! A checkpoint becomes a dirty bitmap in an image that nobody uses.

use std::path::Path;

use rand::Rng as _;
use rand::seq::IndexedRandom as _;
use stillpoint_tests::seeds::{number, rng, seeds};
use stillpoint_tests::tools::{convert_to_raw, path, tool};
use stillpoint_tests::{CHUNK, Extent, KIB, MIB, Server};

use crate::images::{SIZE, as_qemu_says, bitmap, check, create, dirty_in, since, write_chunks};

/// What is in an image, by a hash of what `qemu-img convert` makes of it.
fn contents(image: &Path) -> String {
    let raw = image.with_extension("contents");
    convert_to_raw(image, &raw);
    stillpoint_tests::tools::sha256_of_file(&raw)
}

/// A server with a checkpoint, `cp1`, since which drawn chunks were written, and the map of it.
fn prepared(seed: u64, size: u64) -> (Server, Vec<Extent>) {
    let mut rng = rng(seed);
    let server = Server::with_disk(size);
    let mut nbd = server.open_live("vda");
    nbd.write(0, &[1; 4096]).unwrap();
    server.checkpoint("cp1");
    for _ in 0..rng.random_range(0..12) {
        nbd.write(rng.random_range(0..size - 4096), &[2; 4096])
            .unwrap();
    }
    let map = since(&server, "cp1");
    (server, map)
}

/// Images of every kind, by options of `qemu-img create`.
const KINDS: [&str; 14] = [
    "",
    "cluster_size=512",
    "cluster_size=512,refcount_bits=64",
    "cluster_size=4k,refcount_bits=1",
    "cluster_size=4k,refcount_bits=2",
    "cluster_size=4k,refcount_bits=4",
    "cluster_size=1k,refcount_bits=8",
    "cluster_size=8k,refcount_bits=32",
    "cluster_size=2M",
    "extended_l2=on",
    "compression_type=zstd",
    "lazy_refcounts=on",
    "preallocation=metadata",
    "preallocation=falloc,cluster_size=4k",
];

#[test]
fn an_image_of_any_kind_gets_a_bitmap_that_qemu_reads_as_we_serve_it() {
    let rounds: Vec<_> = (1..=number("STILLPOINT_CARRY_IMAGES", 14)).collect();
    for seed in seeds(&rounds) {
        let mut rng = rng(seed);
        let kind = KINDS[(seed as usize - 1) % KINDS.len()];
        let size = SIZE - 512 * rng.random_range(0..200);
        let (server, map) = prepared(seed, size);
        let image = server.path("vm.qcow2");
        let backing = server.path("base.raw");
        stillpoint_tests::tools::sparse_file(&backing, size);
        let has_backing = seed.is_multiple_of(3) && !kind.contains("preallocation");
        let separator = if kind.is_empty() { "" } else { "," };
        let options = if has_backing {
            let backing = backing.display();
            format!("{kind}{separator}backing_file={backing},backing_fmt=raw")
        } else {
            kind.to_owned()
        };
        let how = format!("seed {seed}: '{options}'");
        create(&image, &options, size);
        let drawn: Vec<_> = (0..rng.random_range(0..100))
            .map(|_| rng.random_range(0..size / CHUNK))
            .collect();
        if !drawn.is_empty() {
            write_chunks(&image, &drawn);
        }
        let others = ["other", "a third with a longer name"];
        let others = &others[..rng.random_range(0..=2)];
        for other in others {
            bitmap(&image, &["--add", "-g", "64k", other]);
            write_chunks(&image, &[rng.random_range(0..size / CHUNK)]);
        }
        // With one bit, nothing can be counted twice.
        if seed.is_multiple_of(4) && !kind.contains("refcount_bits=1") {
            tool("qemu-img", &["snapshot", "-c", "s1", path(&image)]).ok();
        }
        check(&image, &format!("{how}, before"));
        let before: Vec<_> = others
            .iter()
            .map(|other| as_qemu_says(&image, other))
            .collect();
        let bytes = contents(&image);

        server
            .cli(&["checkpoint", "export", "vda", "cp1", "--to", path(&image)])
            .ok();
        check(&image, &how);
        assert_eq!(as_qemu_says(&image, "cp1"), map, "{how}");
        let after: Vec<_> = others
            .iter()
            .map(|other| as_qemu_says(&image, other))
            .collect();
        assert_eq!(after, before, "{how}");
        assert_eq!(contents(&image), bytes, "{how}");
        let told = tool("qemu-img", &["info", "--output=json", path(&image)]).json();
        let bitmaps = &told["format-specific"]["data"]["bitmaps"];
        let ours = bitmaps
            .as_array()
            .unwrap()
            .iter()
            .find(|b| b["name"] == "cp1")
            .unwrap();
        assert_eq!(ours["granularity"], CHUNK, "{how}");
        assert_eq!(ours["flags"], serde_json::json!(["auto"]), "{how}");
        if has_backing {
            let named = told["backing-filename"].as_str().unwrap();
            assert_eq!(named, path(&backing), "{how}");
        }

        // Again, over the first: nothing is left of that.
        let refused = server.cli(&["checkpoint", "export", "vda", "cp1", "--to", path(&image)]);
        refused.refused("it has a bitmap of this name");
        for _ in 0..3 {
            let chunk = rng.random_range(0..size / CHUNK);
            server
                .open_live("vda")
                .write(chunk * CHUNK, &[3; 100])
                .unwrap();
            let export = [
                "checkpoint",
                "export",
                "vda",
                "cp1",
                "--force",
                "--to",
                path(&image),
            ];
            server.cli(&export).ok();
            check(&image, &format!("{how}, again"));
        }
        assert_eq!(as_qemu_says(&image, "cp1"), since(&server, "cp1"), "{how}");
        // QEMU goes on with it, and can take it away.
        write_chunks(&image, &[5]);
        let found = as_qemu_says(&image, "cp1");
        assert!(
            crate::images::chunks(&found).contains(&5),
            "{how}: {found:?}"
        );
        bitmap(&image, &["--remove", "cp1"]);
        check(&image, &format!("{how}, removed"));
    }
}

#[test]
fn a_bitmap_of_ours_goes_into_an_image_by_another_name_and_disabled() {
    let server = Server::with_disk(SIZE);
    server
        .cli(&["bitmap", "add", "vda", "ours", "--granularity", "1M"])
        .ok();
    server.open_live("vda").write(3 * MIB, &[1; 512]).unwrap();
    let image = server.path("an image");
    create(&image, "", SIZE);
    let export = ["bitmap", "export", "vda", "ours", "--to", path(&image)];
    let more = [
        "--format",
        "qcow2",
        "--bitmap",
        "theirs \u{e9}",
        "--disabled",
    ];
    server.cli(&[&export[..], &more].concat()).ok();
    check(&image, "a bitmap of ours");
    assert_eq!(
        as_qemu_says(&image, "theirs \u{e9}"),
        dirty_in(&server, "ours")
    );
    write_chunks(&image, &[100]);
    assert_eq!(
        as_qemu_says(&image, "theirs \u{e9}"),
        dirty_in(&server, "ours")
    );
}

#[test]
fn what_was_taken_from_one_image_and_put_into_another_is_the_same() {
    let (_dir, image) = crate::images::image_with_bitmap(&[3, 4, 100]);
    let server = crate::images::serving_copy(&image);
    server
        .cli(&["checkpoint", "import", "vda", "cp0", "--from", path(&image)])
        .ok();
    let other = server.path("other.qcow2");
    create(&other, "cluster_size=512", SIZE);
    server
        .cli(&["checkpoint", "export", "vda", "cp0", "--to", path(&other)])
        .ok();
    assert_eq!(as_qemu_says(&other, "cp0"), as_qemu_says(&image, "cp0"));
    let import = [
        "bitmap",
        "import",
        "vda",
        "back",
        "--bitmap",
        "cp0",
        "--from",
        path(&other),
    ];
    server.cli(&import).ok();
    assert_eq!(dirty_in(&server, "back"), since(&server, "cp0"));
}

#[test]
fn the_table_of_counts_grows_where_it_is_too_short() {
    // A table of counts that is one cluster is for 2 MiB here.
    let (server, _) = prepared(1, SIZE);
    let image = server.path("vm.qcow2");
    create(&image, "cluster_size=512,refcount_bits=64", SIZE);
    let mut table = [0; 12];
    let counts = |image: &Path, table: &mut [u8; 12]| {
        table.copy_from_slice(&crate::images::bytes_of(image)[48..60]);
    };
    counts(&image, &mut table);
    let mut moved = 0;
    for round in 0..40 {
        let at = round * 48 * KIB;
        let write = format!("write -q {at} 48k");
        tool("qemu-io", &["-f", "qcow2", "-c", &write, path(&image)]).ok();
        let mut before = [0; 12];
        counts(&image, &mut before);
        let name = format!("cp-{round}");
        let args = [
            "checkpoint",
            "export",
            "vda",
            "cp1",
            "--bitmap",
            &name,
            "--disabled",
            "--to",
            path(&image),
        ];
        server.cli(&args).ok();
        check(&image, &format!("round {round}"));
        let mut after = [0; 12];
        counts(&image, &mut after);
        moved += u32::from(before != after);
    }
    assert!(moved > 0, "the table has never moved");
    assert_eq!(as_qemu_says(&image, "cp-0"), as_qemu_says(&image, "cp-39"));
}

#[test]
fn drawn_maps_are_stored_whole() {
    for seed in seeds(&[1, 2, 3, 4]) {
        let mut rng = rng(seed);
        let size = 64 * MIB - 512;
        let builder = Server::builder();
        let raw = builder.path("vda.raw");
        stillpoint_tests::tools::sparse_file(&raw, size);
        let server = builder.disk_with("vda", &raw, ",granularity=4k").start();
        server.checkpoint("cp1");
        let mut nbd = server.open_live("vda");
        for _ in 0..300 {
            let length = *[1, 4096, 70_000, 1 << 20].choose(&mut rng).unwrap();
            nbd.zeroes(rng.random_range(0..size - length), length as u32, 0)
                .unwrap();
        }
        let image = server.path("vm.qcow2");
        create(
            &image,
            ["cluster_size=512", "", "cluster_size=4k"][seed as usize % 3],
            size,
        );
        server
            .cli(&["checkpoint", "export", "vda", "cp1", "--to", path(&image)])
            .ok();
        check(&image, &format!("seed {seed}"));
        assert_eq!(
            as_qemu_says(&image, "cp1"),
            since(&server, "cp1"),
            "seed {seed}"
        );
    }
}
