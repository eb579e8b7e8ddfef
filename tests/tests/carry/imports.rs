//! A bitmap that QEMU made goes on here.

use std::collections::BTreeSet;

use rand::Rng as _;
use serde_json::json;
use stillpoint_tests::seeds::{rng, seeds};
use stillpoint_tests::state::{directory, pretend_power_cut};
use stillpoint_tests::tools::{convert_to_raw, path, tool};
use stillpoint_tests::{CHUNK, Guest, Server};

use crate::images::{
    SIZE, as_qemu_says, bitmap, bytes_of, chunks, create, dirty_in, image_with_bitmap, map_of,
    serving_copy, since, write_chunks,
};

fn write(server: &Server, chunk: u64) {
    let mut nbd = server.open_live("vda");
    nbd.write(chunk * CHUNK + 100, &[9; 100]).unwrap();
}

#[test]
fn a_bitmap_of_qemus_goes_on_when_its_disk_was_converted_to_raw() {
    for kind in ["checkpoint", "bitmap"] {
        let (dir, image) = image_with_bitmap(&[3, 4, 20]);
        let before = bytes_of(&image);
        let full = dir.path().join("full.qcow2");
        // What the full backup had was taken when the bitmap began.
        create(&full, "", SIZE);
        write_chunks(&full, &[0, 7, 9]);
        let server = serving_copy(&image);
        let answer = server.cli_json(&[kind, "import", "vda", "cp0", "--from", path(&image)]);
        let told = json!({"disk": "vda", "name": "cp0", "told_bytes": 3 * CHUNK,
            "dirty_bytes": 3 * CHUNK});
        assert_eq!(answer, told);
        assert!(bytes_of(&image) == before, "the image was touched");
        write(&server, 4);
        write(&server, 30);
        let found = match kind {
            "checkpoint" => since(&server, "cp0"),
            _ => dirty_in(&server, "cp0"),
        };
        assert_eq!(found, map_of(&[3, 4, 20, 30]), "{kind}");
        if kind == "bitmap" {
            continue;
        }
        // By stock tools, an incremental on top of that full one is the disk.
        server.begin("mine", &["--since", "cp0"]);
        let incremental = dir.path().join("inc.qcow2");
        let uri = server.frozen_uri("vda@cp0..mine");
        let args = [
            "convert",
            "-O",
            "qcow2",
            "-B",
            path(&full),
            "-F",
            "qcow2",
            "-f",
            "raw",
        ];
        tool(
            "qemu-img",
            &[&args[..], &[&uri, path(&incremental)]].concat(),
        )
        .ok();
        let raw = dir.path().join("restored");
        convert_to_raw(&incremental, &raw);
        assert!(bytes_of(&raw) == server.open_live("vda").read_all());
    }
}

#[test]
fn a_bitmap_of_any_granularity_becomes_a_superset_and_no_more_than_that_rounded() {
    for seed in seeds(&[1, 2, 3]) {
        let mut rng = rng(seed);
        let dir = stillpoint_tests::server::temporary_directory();
        let image = dir.path().join("vm.qcow2");
        // Not a whole number of chunks.
        let size = SIZE - 5 * 512;
        create(&image, "cluster_size=4k", size);
        for (name, granularity) in [("fine", "512"), ("same", "64k"), ("coarse", "1M")] {
            bitmap(&image, &["--add", "-g", granularity, name]);
        }
        let drawn: Vec<_> = (0..6).map(|_| rng.random_range(0..size / CHUNK)).collect();
        write_chunks(&image, &drawn);
        let tail = format!("write {} 512", size - 512);
        tool("qemu-io", &["-f", "qcow2", "-c", &tail, path(&image)]).ok();
        let server = serving_copy(&image);
        for name in ["fine", "same", "coarse"] {
            let expected = chunks(&as_qemu_says(&image, name));
            assert!(expected.len() >= 2, "seed {seed}");
            let (checkpoint, own) = (format!("cp-{name}"), format!("bm-{name}"));
            for (kind, to) in [("bitmap", &own), ("checkpoint", &checkpoint)] {
                let args = ["--from", path(&image), "--bitmap", name];
                server
                    .cli(&[&[kind, "import", "vda", to][..], &args].concat())
                    .ok();
            }
            assert_eq!(
                chunks(&dirty_in(&server, &own)),
                expected,
                "seed {seed}: {name}"
            );
            // What came before as a checkpoint has been marked.
            let found = chunks(&since(&server, &checkpoint));
            assert_eq!(found, expected, "seed {seed}: {name}");
        }
    }
}

#[test]
fn what_was_written_here_before_the_import_has_changed_as_well() {
    let (_dir, image) = image_with_bitmap(&[3]);
    let server = serving_copy(&image);
    write(&server, 50);
    server.checkpoint("later");
    write(&server, 60);
    let import = |kind: &str, name: &str, more: &[&str]| {
        let args = [
            kind,
            "import",
            "vda",
            name,
            "--from",
            path(&image),
            "--bitmap",
            "cp0",
        ];
        server.cli(&[&args, more].concat()).ok();
    };
    import("bitmap", "all", &[]);
    import("bitmap", "some", &["--as-of", "later"]);
    import("bitmap", "idle", &["--as-of", "later", "--disabled"]);
    write(&server, 70);
    assert_eq!(dirty_in(&server, "all"), map_of(&[3, 50, 60, 70]));
    assert_eq!(dirty_in(&server, "some"), map_of(&[3, 60, 70]));
    assert_eq!(dirty_in(&server, "idle"), map_of(&[3, 60]));
    import("checkpoint", "cp-some", &["--as-of", "later"]);
    assert_eq!(since(&server, "cp-some"), map_of(&[3, 60, 70]));
    import("checkpoint", "cp-all", &[]);
    write(&server, 80);
    assert_eq!(since(&server, "cp-all"), map_of(&[3, 50, 60, 70, 80]));
    let refused = server.cli(&[
        "bitmap",
        "import",
        "vda",
        "x",
        "--from",
        path(&image),
        "--bitmap",
        "cp0",
        "--as-of",
        "no",
    ]);
    refused.refused("no checkpoint 'no'");
}

#[test]
fn an_import_says_more_of_other_checkpoints_only_where_it_is_a_checkpoint_and_never_less() {
    let (_dir, image) = image_with_bitmap(&[3, 4]);
    let server = serving_copy(&image);
    server.checkpoint("before");
    write(&server, 10);
    server.cli(&["bitmap", "add", "vda", "other"]).ok();
    server.begin("b1", &["--since", "before"]);
    let frozen = || {
        let mut export = server.open_frozen("vda@b1", &["qemu:dirty-bitmap:before"]);
        export.map("qemu:dirty-bitmap:before")
    };
    assert_eq!(frozen(), map_of(&[10]));
    server
        .cli(&[
            "bitmap",
            "import",
            "vda",
            "b",
            "--from",
            path(&image),
            "--bitmap",
            "cp0",
        ])
        .ok();
    assert_eq!(since(&server, "before"), map_of(&[10]));
    assert_eq!(dirty_in(&server, "other"), map_of(&[]));
    server
        .cli(&["checkpoint", "import", "vda", "cp0", "--from", path(&image)])
        .ok();
    assert_eq!(since(&server, "before"), map_of(&[3, 4, 10]));
    // With what was written here, which the file could not tell.
    assert_eq!(dirty_in(&server, "other"), map_of(&[3, 4, 10]));
    server.checkpoint("after");
    assert_eq!(since(&server, "after"), map_of(&[]));
    // An instant that was taken before knows nothing of it.
    assert_eq!(frozen(), map_of(&[10]));
}

#[test]
fn what_was_imported_survives_a_stop_a_kill_and_a_power_cut() {
    let (_dir, image) = image_with_bitmap(&[3, 100, 127]);
    let mut server = serving_copy(&image);
    for kind in ["bitmap", "checkpoint"] {
        let name = format!("{kind}-0");
        let args = [
            kind,
            "import",
            "vda",
            &name,
            "--from",
            path(&image),
            "--bitmap",
            "cp0",
        ];
        server.cli(&args).ok();
    }
    server
        .cli(&[
            "bitmap",
            "import",
            "vda",
            "gone",
            "--from",
            path(&image),
            "--bitmap",
            "cp0",
            "--transient",
        ])
        .ok();
    write(&server, 5);
    let expected = map_of(&[3, 5, 100, 127]);
    for end in ["kill", "stop", "power cut"] {
        match end {
            "stop" => server.stop(),
            _ => server.kill(),
        }
        if end == "power cut" {
            pretend_power_cut(&directory(&server, "vda"));
        }
        server.start();
        let found = [
            since(&server, "checkpoint-0"),
            dirty_in(&server, "bitmap-0"),
        ];
        if end == "power cut" {
            for map in found {
                let found: BTreeSet<u64> = chunks(&map);
                assert!(chunks(&expected).is_subset(&found), "{map:?}");
            }
        } else {
            assert_eq!(found, [expected.clone(), expected.clone()], "after a {end}");
        }
        let gone = server.cli(&["backup", "begin", "--bitmap", "gone"]);
        gone.refused("'gone' not found");
    }
}

#[test]
fn guests_write_on_while_a_checkpoint_is_imported() {
    let (_dir, image) = image_with_bitmap(&(0..120).collect::<Vec<_>>());
    let server = serving_copy(&image);
    let mut guest = Guest::new(&server, "vda");
    guest.disk = server.open_live("vda").read_all();
    for round in 0..5 {
        std::thread::scope(|scope| {
            let name = format!("cp{round}");
            let (server, image) = (&server, path(&image));
            let import = scope.spawn(move || {
                let args = ["checkpoint", "import", "vda", &name, "--from", image];
                server.cli(&[&args[..], &["--bitmap", "cp0"]].concat()).ok();
            });
            for chunk in 0..128 {
                guest.write(chunk * CHUNK, &[round; 512]);
            }
            import.join().unwrap();
        });
        write(&server, 127);
        let found = chunks(&since(&server, &format!("cp{round}")));
        assert!((0..120).all(|chunk| found.contains(&chunk)), "{found:?}");
        assert!(found.contains(&127));
    }
}
