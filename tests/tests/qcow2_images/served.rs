//! A stopped machine's image behind our sockets, as stock tools see it there.

use std::path::{Path, PathBuf};

use serde_json::json;
use stillpoint_tests::bitmap::{bitmap, bitmaps};
use stillpoint_tests::seeds::{number, rng, seeds};
use stillpoint_tests::server::Builder;
use stillpoint_tests::state::{Begun, begin_since};
use stillpoint_tests::tools::{
    abandon, merged, nbdcopy_sha256, nbdinfo_map, path, sha256, sha256_of_file, tool, with_qemu_nbd,
};
use stillpoint_tests::{Extent, KIB, MIB, Server};

use crate::images::{Images, history, qemu_io};

/// A server to be, of an image.
fn serving(image: &Path) -> Builder {
    Server::builder().disk_as(&format!("vda={},format=qcow2,read-only", image.display()))
}

/// What `qemu-nbd` says of an image in this context: of a copy, since a server keeps it to itself.
fn as_qemu_says(image: &Path, options: &[&str], context: &str) -> Vec<Extent> {
    let copy = image.with_extension("copy");
    std::fs::copy(image, &copy).expect("a copy beside it");
    let args = [&["-r", "-f", "qcow2"], options, &[path(&copy)]].concat();
    with_qemu_nbd(&args, |socket| {
        merged(nbdinfo_map(
            &stillpoint_tests::server::uri(socket, ""),
            context,
        ))
    })
}

/// What is done to bitmaps, and to the disk in between.
fn bitmap_history(image: &Path, seed: u64) {
    let mut rng = rng(seed);
    let bitmap = |args: &[&str]| {
        let (first, last) = args.split_at(args.len() - 1);
        let args = [&["bitmap"], first, &[path(image)], last].concat();
        tool("qemu-img", &args).ok();
    };
    let mut write = || {
        let mut commands = history(&mut rng, 9 * MIB, 64 * KIB, false);
        commands.truncate(5);
        qemu_io(image, "qcow2", &commands);
    };
    bitmap(&["--add", "-g", "4k", "fine"]);
    bitmap(&["--add", "-g", "1M", "coarse"]);
    bitmap(&["--add", "cp1"]);
    write();
    bitmap(&["--add", "--disable", "idle"]);
    bitmap(&["--disable", "coarse"]);
    write();
    bitmap(&["--add", "cp2"]);
    bitmap(&["--disable", "cp1"]);
    write();
    bitmap(&["--merge", "fine", "idle"]);
    bitmap(&["--clear", "fine"]);
    bitmap(&["--enable", "coarse"]);
    bitmap(&["--add", "gone"]);
    write();
    bitmap(&["--remove", "gone"]);
    bitmap(&["--add", "spaced name..of dots"]);
    write();
    bitmap(&["--add", "--disable", "empty"]);
}

const BITMAPS: [&str; 7] = [
    "fine",
    "coarse",
    "cp1",
    "idle",
    "cp2",
    "spaced name..of dots",
    "empty",
];

#[test]
fn bitmaps_that_qemu_made_are_served_all_at_once_and_no_byte_is_touched() {
    let rounds: Vec<_> = (1..=number("STILLPOINT_QCOW2_HISTORIES", 3)).collect();
    for seed in seeds(&rounds) {
        let images = Images::new();
        let base = images.create("base", "", &[], 8 * MIB);
        qemu_io(
            &base,
            "qcow2",
            &history(&mut rng(seed), 8 * MIB, 64 * KIB, true),
        );
        let options = ["", "cluster_size=512", "extended_l2=on"][seed as usize % 3];
        let image = images.create("image", options, &["base", "qcow2"], 9 * MIB + 512);
        bitmap_history(&image, seed);
        let hashes = || [&base, &image].map(|image| sha256_of_file(image));
        let (before, expected) = (hashes(), sha256(&images.converted(&image, "qcow2")));

        let mut server = serving(&image).start();
        server.begin("b1", &[]);
        let listed = tool("nbdinfo", &["--json", &server.frozen_uri("vda@b1")]).json();
        let contexts = listed["exports"][0]["contexts"].to_string();
        for name in BITMAPS {
            let context = format!("qemu:dirty-bitmap:{name}");
            assert!(contexts.contains(&context), "seed {seed}: {contexts}");
            let ours = nbdinfo_map(&server.frozen_uri("vda@b1"), &context);
            let qemu = as_qemu_says(&image, &["-B", name], &context);
            assert_eq!(ours, qemu, "seed {seed}: {name}");
        }
        assert_eq!(
            nbdcopy_sha256(&server.frozen_uri("vda@b1"), server.directory()),
            expected
        );
        assert_eq!(
            nbdcopy_sha256(&server.live_uri("vda"), server.directory()),
            expected
        );
        for (context, options) in [
            ("base:allocation", &[][..]),
            ("qemu:allocation-depth", &["-A"]),
        ] {
            let qemu = as_qemu_says(&image, options, context);
            for uri in [server.frozen_uri("vda@b1"), server.live_uri("vda")] {
                let ours = nbdinfo_map(&uri, context);
                // A hole that is no whole block of 4 KiB is data to us.
                if context != "base:allocation" || options.is_empty() && seed % 3 == 0 {
                    assert_eq!(ours, qemu, "seed {seed}: {context} of {uri}");
                }
            }
        }
        server.commit("b1");
        server.stop();
        assert_eq!(hashes(), before, "seed {seed}");
    }
}

#[test]
fn an_incremental_by_a_stored_bitmap_makes_the_disk_of_its_base() {
    for seed in seeds(&[1, 2]) {
        let images = Images::new();
        let image = images.create("image", "", &[], 9 * MIB);
        let mut rng = rng(seed);
        qemu_io(&image, "qcow2", &history(&mut rng, 9 * MIB, 64 * KIB, true));
        tool("qemu-img", &["bitmap", "--add", path(&image), "cp1"]).ok();
        let full = images.at("full");
        let convert = |from: &[&str], to: &Path| {
            tool(
                "qemu-img",
                &[&["convert", "-O", "qcow2"], from, &[path(to)]].concat(),
            )
            .ok();
        };
        convert(&["-f", "qcow2", path(&image)], &full);
        qemu_io(
            &image,
            "qcow2",
            &history(&mut rng, 9 * MIB, 64 * KIB, false),
        );

        let server = serving(&image).start();
        server.begin("b1", &[]);
        let incremental = images.at("incremental");
        let uri = server.frozen_uri("vda@cp1..b1");
        convert(
            &["-f", "raw", "-B", path(&full), "-F", "qcow2", &uri],
            &incremental,
        );
        let copy = images.at("copy");
        std::fs::copy(&image, &copy).unwrap();
        tool(
            "qemu-img",
            &[
                "compare",
                "-f",
                "qcow2",
                "-F",
                "qcow2",
                path(&copy),
                path(&incremental),
            ],
        )
        .ok();
        // Only what is dirty was copied.
        let dirty = nbdinfo_map(&uri, "qemu:dirty-bitmap:cp1");
        let read = server.bytes_read("b1", "vda", "vda@cp1..b1");
        let changed: u64 = dirty.iter().filter(|e| e.2 == 1).map(|e| e.1).sum();
        assert!(
            read <= changed && changed < 9 * MIB,
            "seed {seed}: {read} of {changed}"
        );
    }
}

#[test]
fn a_bitmap_that_was_not_closed_is_listed_as_inconsistent_and_not_served() {
    let images = Images::new();
    let image = images.create("image", "", &[], 4 * MIB);
    tool("qemu-img", &["bitmap", "--add", path(&image), "torn"]).ok();
    // A crash, with the bitmap in use.
    abandon(&image);
    tool("qemu-img", &["bitmap", "--add", path(&image), "idle"]).ok();

    let server = serving(&image).start();
    let mut qmp = server.qmp();
    assert_eq!(bitmap(&mut qmp, "vda", "torn")["inconsistent"], true);
    assert_eq!(bitmap(&mut qmp, "vda", "idle")["inconsistent"], json!(null));
    server.begin("b1", &[]);
    let listed = tool("nbdinfo", &["--json", &server.frozen_uri("vda@b1")]).json();
    let contexts = listed["exports"][0]["contexts"].to_string();
    assert!(
        contexts.contains("bitmap:idle") && !contexts.contains("torn"),
        "{contexts}"
    );
    let refused = server.cli(&["backup", "begin", "--bitmap", "torn"]);
    assert!(refused.stderr.contains("inconsistent"), "{refused}");
    let difference = tool("nbdinfo", &[&server.frozen_uri("vda@torn..b1")]);
    assert_ne!(difference.code(), 0, "{difference}");
}

#[test]
fn bitmaps_in_an_image_that_was_written_without_them_are_inconsistent() {
    let images = Images::new();
    let image = images.create("image", "", &[], 4 * MIB);
    tool("qemu-img", &["bitmap", "--add", path(&image), "cp1"]).ok();
    // Whoever writes an image clears the bits that it does not know.
    crate::images::poke(&image, 88, &[0; 8]);
    let server = serving(&image).start();
    assert_eq!(
        bitmap(&mut server.qmp(), "vda", "cp1")["inconsistent"],
        true
    );
}

#[test]
fn stored_bitmaps_can_be_merged_from_and_never_changed() {
    let images = Images::new();
    let image = images.create("image", "", &[], 4 * MIB);
    tool("qemu-img", &["bitmap", "--add", path(&image), "cp1"]).ok();
    qemu_io(&image, "qcow2", &["write 1M 64k".to_owned()]);
    let before = sha256_of_file(&image);
    let mut server = serving(&image).start();
    let mut qmp = server.qmp();
    let told = bitmap(&mut qmp, "vda", "cp1");
    assert_eq!(
        [&told["persistent"], &told["recording"], &told["count"]],
        [&json!(true), &json!(true), &json!(64 * KIB)],
        "{told}"
    );
    for verb in ["clear", "enable", "disable", "remove"] {
        let refused = server.cli(&["bitmap", verb, "vda", "cp1"]);
        assert!(refused.stderr.contains("'cp1' is readonly"), "{refused}");
    }
    server.cli(&["bitmap", "add", "vda", "own"]).ok();
    let refused = server.cli(&["bitmap", "merge", "vda", "cp1", "own"]);
    assert!(refused.stderr.contains("'cp1' is readonly"), "{refused}");
    server.cli(&["bitmap", "merge", "vda", "own", "cp1"]).ok();
    assert_eq!(bitmap(&mut qmp, "vda", "own")["count"], 64 * KIB);
    let exists = server.cli(&["bitmap", "add", "vda", "cp1"]);
    assert!(exists.stderr.contains("already exists"), "{exists}");
    drop(qmp);
    server.stop();
    server.start();
    let names: Vec<_> = bitmaps(&mut server.qmp(), "vda");
    assert_eq!(names.len(), 2, "{names:?}");
    server.stop();
    assert_eq!(sha256_of_file(&image), before);
}

#[test]
fn a_checkpoint_hides_a_stored_bitmap_of_its_name() {
    let images = Images::new();
    let image = images.create("image", "", &[], 4 * MIB);
    tool("qemu-img", &["bitmap", "--add", path(&image), "cp1"]).ok();
    qemu_io(&image, "qcow2", &["write 1M 64k".to_owned()]);
    let server = serving(&image).start();
    let context = "qemu:dirty-bitmap:cp1";
    server.begin("b1", &[]);
    let stored = nbdinfo_map(&server.frozen_uri("vda@b1"), context);
    assert_eq!(stored.len(), 3);
    server.checkpoint("cp1");
    // Of an instant before the checkpoint, nothing has this name now.
    let unknown = tool(
        "nbdinfo",
        &[&format!("--map={context}"), &server.frozen_uri("vda@b1")],
    );
    assert_ne!(unknown.code(), 0, "{unknown}");
    server.begin("b2", &["--since", "cp1"]);
    assert_eq!(
        nbdinfo_map(&server.frozen_uri("vda@b2"), context),
        [(0, 4 * MIB, 0)]
    );
}

#[test]
fn backups_and_checkpoints_survive_a_kill_and_an_image_that_changed_is_noticed() {
    let images = Images::new();
    let data = images.at("data");
    let base = images.create("base", "", &[], 4 * MIB);
    let options = format!("data_file={}", data.display());
    let external = images.create("external", &options, &[], 4 * MIB);
    let image = images.create("image", "", &["base", "qcow2"], 4 * MIB);
    tool("qemu-img", &["bitmap", "--add", path(&image), "old"]).ok();
    qemu_io(&image, "qcow2", &["write -P 7 1M 64k".to_owned()]);
    qemu_io(&external, "qcow2", &["write -P 7 0 4M".to_owned()]);

    for (image, touched) in [(&image, &image), (&image, &base), (&external, &data)] {
        let mut server = serving(image).start();
        server.checkpoint("cp1");
        server.begin("b1", &[]);
        let whole = nbdcopy_sha256(&server.frozen_uri("vda@b1"), server.directory());
        server.kill();
        server.start();
        assert_eq!(
            nbdcopy_sha256(&server.frozen_uri("vda@b1"), server.directory()),
            whole
        );
        let begun = begin_since(&server, "b2", "vda", "cp1");
        let Begun::Incremental { map, .. } = begun else {
            panic!("{begun:?}");
        };
        assert_eq!(map, [(0, 4 * MIB, 0)]);
        server.abort("b1");
        server.kill();
        // As its machine would, and other bytes than before.
        if *touched == data {
            qemu_io(touched, "raw", &["write -P 8 2M 64k".to_owned()]);
        } else {
            qemu_io(touched, "qcow2", &["write -P 8 2M 64k".to_owned()]);
        }
        server.start();
        let begun = begin_since(&server, "b3", "vda", "cp1");
        assert!(
            matches!(begun, Begun::Full { .. }),
            "{}: {begun:?}",
            touched.display()
        );
        if image.ends_with("image") {
            let context = "qemu:dirty-bitmap:old";
            server.begin("b4", &[]);
            let ours = nbdinfo_map(&server.frozen_uri("vda@b4"), context);
            assert_eq!(ours, as_qemu_says(image, &["-B", "old"], context));
        }
        server.stop();
        let _ = std::fs::remove_dir_all(format!("{}.stillpoint", image.display()));
    }
}

#[test]
fn who_may_write_an_image_or_what_is_behind_it_keeps_us_out() {
    let images = Images::new();
    let base = images.create("base", "", &[], 4 * MIB);
    let image = images.create("image", "", &["base", "qcow2"], 4 * MIB);
    let other = images.create("other", "", &["base", "qcow2"], 4 * MIB);
    for writable in [&image, &base] {
        with_qemu_nbd(&["-f", "qcow2", path(writable)], |_| {
            let failed = serving(&image).start_and_fail();
            assert!(
                failed.stderr.contains("in use by another process"),
                "{failed}"
            );
        });
    }
    // What is behind both is read by both, and by a QEMU.
    let _first = serving(&image).start();
    let _second = serving(&other).start();
    with_qemu_nbd(&["-r", "-f", "qcow2", path(&base)], |socket| {
        tool(
            "qemu-img",
            &["info", &stillpoint_tests::server::uri(socket, "")],
        )
        .ok();
    });
    let writer = tool(
        "qemu-io",
        &["-f", "qcow2", "-c", "write 0 64k", path(&base)],
    );
    assert!(writer.stderr.contains("lock"), "{writer}");
}

#[test]
fn what_cannot_be_served_is_refused_with_what_to_do() {
    let images = Images::new();
    std::fs::create_dir(images.at("bases")).unwrap();
    images.create("bases/base", "", &[], 4 * MIB);
    let plain = images.create("plain", "", &[], 4 * MIB);
    let behind = images.create("behind", "", &["bases/base", "qcow2"], 4 * MIB);
    std::fs::create_dir(images.at("own")).unwrap();
    let outside = images.create("own/outside", "", &["../bases/base", "qcow2"], 4 * MIB);
    let dirty = images.create("dirty", "lazy_refcounts=on", &[], 4 * MIB);
    crate::images::poke(&dirty, 72, &1_u64.to_be_bytes());
    let disk = |image: &PathBuf, keys: &str| format!("vda={},{keys}", image.display());
    for (disk, expected) in [
        (disk(&plain, "format=qcow2"), "add ,read-only"),
        (
            disk(&plain, "format=qcow2,read-only,cache=none"),
            "cache=writeback",
        ),
        (disk(&plain, "read-only"), "no format was given"),
        (disk(&plain, "format=vmdk,read-only"), "only raw and qcow2"),
        (
            disk(&outside, "format=qcow2,read-only"),
            "--allow-backing DIR",
        ),
        (
            disk(&dirty, "format=qcow2,read-only"),
            "qemu-img check -r all",
        ),
    ] {
        let failed = Server::builder().disk_as(&disk).start_and_fail();
        assert!(failed.stderr.contains(expected), "{disk}: {failed}");
    }
    serving(&behind).start();
    let allowed = format!("--allow-backing={}", images.at("bases").display());
    serving(&outside).arg(&allowed).start();
}
