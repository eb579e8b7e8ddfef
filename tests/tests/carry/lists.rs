//! Lists of extents: what `nbdinfo` prints is taken in, and what is written is what it prints.

use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::fs;
use std::os::unix::fs::{MetadataExt as _, symlink};
use std::path::Path;
use std::process::Command;

use rand::Rng as _;
use serde_json::Value;
use stillpoint_tests::process::run;
use stillpoint_tests::seeds::{rng, seeds};
use stillpoint_tests::tools::{path, sparse_file, tool, with_qemu_nbd};
use stillpoint_tests::{KIB, MIB, Server};

use crate::images::{SIZE, bytes_of, dirty_in, image_with_bitmap, map_of, serving_copy, since};

#[test]
fn what_nbdinfo_prints_of_a_bitmap_of_qemus_is_taken_in() {
    let (dir, image) = image_with_bitmap(&[3, 4, 20]);
    let list = dir.path().join("list");
    let args = ["-r", "-f", "qcow2", "-B", "cp0", path(&image)];
    with_qemu_nbd(&args, |socket| {
        let uri = stillpoint_tests::server::uri(socket, "");
        let map = tool("nbdinfo", &["--json", "--map=qemu:dirty-bitmap:cp0", &uri]);
        fs::write(&list, map.ok()).unwrap();
    });
    let server = serving_copy(&image);
    server
        .cli(&["checkpoint", "import", "vda", "cp0", "--from", path(&list)])
        .ok();
    server
        .cli(&["bitmap", "import", "vda", "any name", "--from", path(&list)])
        .ok();
    assert_eq!(since(&server, "cp0"), map_of(&[3, 4, 20]));
    assert_eq!(dirty_in(&server, "any name"), map_of(&[3, 4, 20]));
}

#[test]
fn what_is_exported_is_what_nbdinfo_prints_and_is_taken_in_elsewhere() {
    for seed in seeds(&[1, 2, 3]) {
        let mut rng = rng(seed);
        let mut server = Server::with_disk(SIZE - 512);
        let mut nbd = server.open_live("vda");
        let mut write = |nbd: &mut stillpoint_tests::RawNbd| {
            for _ in 0..rng.random_range(1..20) {
                let at = rng.random_range(0..SIZE - 4 * KIB);
                nbd.write(at, &[seed as u8; 1000]).unwrap();
            }
        };
        write(&mut nbd);
        server.checkpoint("cp1");
        server
            .cli(&["bitmap", "add", "vda", "b", "--granularity", "1M"])
            .ok();
        write(&mut nbd);
        let list = server.path("list");
        let answer = server.cli_json(&["checkpoint", "export", "vda", "cp1", "--to", path(&list)]);
        assert_eq!(
            answer["dirty_bytes"],
            server.dirty_bytes("cp1", "vda"),
            "seed {seed}"
        );
        let (ours, coarse) = (since(&server, "cp1"), dirty_in(&server, "b"));
        // To standard output it is the same.
        let printed = server.cli(&["checkpoint", "export", "vda", "cp1", "--to", "-"]);
        assert_eq!(printed.ok().as_bytes(), bytes_of(&list), "seed {seed}");
        server.begin("mine", &["--since", "cp1"]);
        let uri = server.frozen_uri("vda@mine");
        let told = tool("nbdinfo", &["--json", "--map=qemu:dirty-bitmap:cp1", &uri]);
        assert_eq!(told.ok().as_bytes(), bytes_of(&list), "seed {seed}");
        server.abort("mine");
        let coarse_list = server.path("coarse");
        server
            .cli(&["bitmap", "export", "vda", "b", "--to", path(&coarse_list)])
            .ok();
        drop(nbd);
        server.stop();

        let builder = Server::builder();
        let copy = builder.path("vda.raw");
        fs::copy(server.image("vda"), &copy).unwrap();
        let other = builder.disk_at("vda", &copy).start();
        other
            .cli(&["checkpoint", "import", "vda", "cp1", "--from", path(&list)])
            .ok();
        let args = [
            "bitmap",
            "import",
            "vda",
            "b",
            "--granularity",
            "1M",
            "--from",
        ];
        other.cli(&[&args[..], &[path(&coarse_list)]].concat()).ok();
        assert_eq!(since(&other, "cp1"), ours, "seed {seed}");
        assert_eq!(dirty_in(&other, "b"), coarse, "seed {seed}");
    }
}

#[test]
fn a_map_of_more_runs_than_one_answer_has_is_told_whole() {
    const RUNS: u64 = 70_001;
    let size = RUNS * 2 * 4 * KIB;
    let builder = Server::builder();
    let image = builder.path("vda.raw");
    sparse_file(&image, size);
    let server = builder.disk_with("vda", &image, ",granularity=4k").start();
    let list = every_second(RUNS);
    let file = server.path("list");
    fs::write(&file, &list).unwrap();
    for kind in ["bitmap", "checkpoint"] {
        let import = [kind, "import", "vda", "many", "--from", path(&file)];
        let finer = ["--granularity", "4k"];
        let more = if kind == "bitmap" { &finer[..] } else { &[] };
        server.cli(&[&import[..], more].concat()).ok();
        let out = server.path(kind);
        server
            .cli(&[kind, "export", "vda", "many", "--to", path(&out)])
            .ok();
        assert!(bytes_of(&out) == list.as_bytes(), "{kind}");
    }
}

#[test]
fn a_list_is_replaced_only_by_force_and_written_whole() {
    let server = Server::with_disk(MIB);
    server.checkpoint("cp1");
    let list = server.path("list");
    fs::write(&list, "mine").unwrap();
    let export = |more: &[&str]| {
        let args = ["checkpoint", "export", "vda", "cp1", "--to", path(&list)];
        server.cli(&[&args, more].concat())
    };
    export(&[]).refused("exists");
    assert_eq!(bytes_of(&list), b"mine");
    export(&["--force"]).ok();
    let told: Value = serde_json::from_slice(&bytes_of(&list)).unwrap();
    assert_eq!(told[0]["length"], MIB);
    assert_eq!(left_aside(&server), 0);
    let nowhere = [
        "checkpoint",
        "export",
        "vda",
        "cp1",
        "--to",
        "/nowhere/list",
    ];
    server.cli(&nowhere).refused("cannot write");
    for (args, why) in [
        (["checkpoint", "export", "vda", "no"], "no checkpoint 'no'"),
        (["bitmap", "export", "vda", "no"], "'no' not found"),
        (["bitmap", "export", "vdz", "no"], "no disk 'vdz'"),
    ] {
        server
            .cli(&[&args[..], &["--to", "-"]].concat())
            .refused(why);
    }
    let offset = serde_json::json!({"disk": "vda", "checkpoint": "cp1", "offset": MIB + 1});
    let refused = server
        .qmp()
        .try_execute("query-changes", &offset)
        .unwrap_err();
    assert!(refused.contains("behind the end"), "{refused}");
    let both = serde_json::json!({"disk": "vda", "checkpoint": "cp1", "bitmap": "b"});
    assert!(server.qmp().try_execute("query-changes", &both).is_err());
}

#[test]
fn what_is_no_file_is_never_replaced_and_nobody_elses_file_is_written() {
    let mut server = Server::with_disk(MIB);
    server.checkpoint("cp1");
    let [link, folder, pipe] = ["link", "folder", "pipe"].map(|name| server.path(name));
    let target = server.path("target");
    fs::write(&target, "mine").unwrap();
    symlink(&target, &link).unwrap();
    fs::create_dir(&folder).unwrap();
    tool("mkfifo", &[path(&pipe)]).ok();
    // Where others would write first.
    let partial = server.path("list.partial");
    symlink(&target, &partial).unwrap();
    let list = server.path("list");
    let disk = format!("vda={}", path(&server.image("vda")));
    for (command, more) in [
        (["checkpoint", "export"], ["vda", "cp1"]),
        (["state", "export"], ["--disk", &disk]),
    ] {
        if command[0] == "state" {
            server.stop();
        }
        let export = |to: &Path, force: &[&str]| {
            let args = [&command[..], &more, &["--to", path(to)], force].concat();
            server.cli_command(&args)
        };
        for place in [&link, &folder, &pipe] {
            let before = fs::symlink_metadata(place).unwrap();
            run(&mut export(place, &[])).refused("exists");
            run(&mut export(place, &["--force"])).refused("no regular file");
            let after = fs::symlink_metadata(place).unwrap();
            assert_eq!(before.ino(), after.ino(), "{}", place.display());
        }
        run(&mut export(&list, &[])).ok();
        assert_eq!(fs::metadata(&list).unwrap().mode() & 0o777, 0o600);
        let injected = |fault: &str, command: &Command| {
            let mut strace = Command::new("strace");
            let fault = format!("inject={fault}");
            strace.args(["-f", "-o", "/dev/null", "-e", &fault]);
            run(strace.arg(command.get_program()).args(command.get_args()))
        };
        // What is renamed in a state is not this.
        if command[0] == "checkpoint" {
            let before = bytes_of(&list);
            let failed = injected("rename:error=EIO", &export(&list, &["--force"]));
            failed.refused("cannot write");
            assert!(bytes_of(&list) == before);
            assert_eq!(left_aside(&server), 1, "{failed}");
        }
        // As on a file system that cannot rename without replacing.
        let without = "renameat2:error=EINVAL";
        injected(without, &export(&list, &[])).refused("exists");
        fs::remove_file(&list).unwrap();
        injected(without, &export(&list, &[])).ok();
        assert_eq!(fs::metadata(&list).unwrap().nlink(), 1);
        fs::remove_file(&list).unwrap();
        assert_eq!(left_aside(&server), 1);
        assert!(fs::symlink_metadata(&partial).unwrap().is_symlink());
        assert_eq!(bytes_of(&target), b"mine");
    }
}

/// How many files are half written.
fn left_aside(server: &Server) -> usize {
    let entries = fs::read_dir(server.directory()).unwrap();
    let names = entries.map(|entry| entry.unwrap().file_name());
    names
        .filter(|name| name.to_string_lossy().contains("partial"))
        .count()
}

#[test]
fn guests_write_on_while_a_map_is_exported() {
    // An answer has 32,768, and there are more even when all are written that are written here.
    const RUNS: u64 = 70_001;
    const WRITES: u64 = 5_000;
    let size = RUNS * 8 * KIB;
    let builder = Server::builder();
    let image = builder.path("vda.raw");
    sparse_file(&image, size);
    let server = builder.disk_with("vda", &image, ",granularity=4k").start();
    let list = server.path("list");
    fs::write(&list, every_second(RUNS)).unwrap();
    let import = ["checkpoint", "import", "vda", "many", "--from", path(&list)];
    server.cli(&import).ok();
    let mut nbd = server.open_live("vda");
    // What was clean, on all pages in turn.
    let clean = |n: u64| n * 7919 % RUNS * 8 * KIB + 4 * KIB;
    let mut written = 0;
    for round in 0..4 {
        let known = written;
        let told = std::thread::scope(|scope| {
            let export = ["checkpoint", "export", "vda", "many", "--to", "-"];
            let server = &server;
            let export = scope.spawn(move || server.cli(&export));
            while written < known + WRITES && !export.is_finished() {
                nbd.write(clean(written), &[2; 512]).unwrap();
                written += 1;
            }
            export.join().unwrap()
        });
        let told: Vec<Value> = serde_json::from_str(told.ok()).unwrap();
        let (mut end, mut dirty) = (0, BTreeSet::new());
        for extent in &told {
            let number = |key: &str| extent[key].as_u64().unwrap();
            assert_eq!(number("offset"), end, "round {round}");
            let start = end;
            end += number("length");
            if extent["description"] == "dirty" {
                dirty.extend((start..end).step_by(4 * KIB as usize));
            }
        }
        assert_eq!(end, size, "round {round}");
        let before = (0..RUNS).map(|run| run * 8 * KIB);
        for at in before.chain((0..known).map(clean)) {
            assert!(dirty.contains(&at), "round {round}: {at} is not dirty");
        }
    }
}

/// A list of so many dirty runs of 4 KiB, each with as much behind it that is clean.
fn every_second(runs: u64) -> String {
    let mut list = "[".to_owned();
    for run in 0..runs {
        let (at, half) = (run * 8 * KIB, 4 * KIB);
        let separator = if run == 0 { "" } else { "," };
        let clean = at + half;
        write!(
            list,
            "{separator}\n{{ \"offset\": {at}, \"length\": {half}, \"type\": 1, \"description\": \
             \"dirty\"}},\n{{ \"offset\": {clean}, \"length\": {half}, \"type\": 0, \
             \"description\": \"clean\"}}"
        )
        .unwrap();
    }
    list + "\n]\n"
}
