//! Whoever imports or exports is killed at one system call after the other: what is there afterwards is
//! what was there before, or all of the new.

use std::fs::{self, File};
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use serde_json::json;
use stillpoint_tests::killer::{execute_and_die, killing};
use stillpoint_tests::process::{KilledOnDrop, run, wait, wait_at_most};
use stillpoint_tests::server::names;
use stillpoint_tests::tools::{path, tool};
use stillpoint_tests::{Output, Server};

use crate::images::{
    SIZE, as_qemu_says, bitmap, check, create, dirty_in, image_with_bitmap, map_of, poke,
    serving_copy, since, write_chunks,
};
use crate::moved::{export, known, moved, spec};

const CALLS: [&str; 6] = [
    "fsync",
    "fdatasync",
    "pwrite64",
    "rename",
    "unlink",
    "ftruncate",
];

/// Runs a command that is killed at the `n`th of its `calls`, if it comes to that; whether it did not.
#[track_caller]
fn run_and_kill(command: &Command, calls: &str, n: usize) -> bool {
    let mut strace = killing(calls, n);
    strace.arg(command.get_program()).args(command.get_args());
    let output: Output = run(&mut strace);
    let answered = output.status.success();
    // strace ends as what it ran has ended.
    assert!(answered || output.status.signal() == Some(9), "{output}");
    answered
}

#[test]
fn a_server_that_is_killed_in_an_import_has_all_of_it_or_nothing() {
    let (_dir, image) = image_with_bitmap(&[3, 70]);
    let [mut undone, mut done] = [0, 0];
    for command in ["checkpoint-import", "bitmap-import"] {
        for calls in ["fsync", "fdatasync", "pwrite64", "rename"] {
            for n in 1.. {
                let how = format!("{command}, {calls} {n}");
                let mut server = serving_copy(&image);
                server.checkpoint("before");
                let arguments = json!({"disk": "vda", "name": "cp0", "from": path(&image)});
                let request = json!({"execute": command, "arguments": arguments});
                let answered = execute_and_die(&mut server, &request, calls, n);
                server.start();
                let is_there = if command == "checkpoint-import" {
                    let list = server.cli_json(&["checkpoint", "list"]);
                    names(&list, "", "name").contains(&"cp0".to_owned())
                } else {
                    server.cli(&["bitmap", "list"]).ok().contains("cp0")
                };
                assert!(is_there || !answered, "{how}");
                if is_there {
                    done += 1;
                    let found = if command == "checkpoint-import" {
                        since(&server, "cp0")
                    } else {
                        dirty_in(&server, "cp0")
                    };
                    assert_eq!(found, map_of(&[3, 70]), "{how}");
                } else {
                    undone += 1;
                    // And once more it can be done.
                    server.qmp().execute(command, &arguments);
                }
                if answered {
                    break;
                }
            }
        }
    }
    assert!(undone >= 4 && done >= 8, "{undone} undone, {done} done");
}

#[test]
fn an_image_whose_export_is_killed_has_leaks_at_worst() {
    let server = Server::with_disk(SIZE);
    server.checkpoint("cp1");
    server.open_live("vda").write(SIZE / 2, &[1; 512]).unwrap();
    let map = since(&server, "cp1");
    let small = "cluster_size=512,refcount_bits=64";
    for (options, has_marker) in [("", true), (small, true), ("", false), (small, false)] {
        let good = server.path("good.qcow2");
        create(&good, options, SIZE);
        write_chunks(&good, &[1, 2, 3]);
        let backing = server.path("base.raw");
        stillpoint_tests::tools::sparse_file(&backing, SIZE);
        let rebase = [
            "rebase",
            "-u",
            "-b",
            path(&backing),
            "-F",
            "raw",
            path(&good),
        ];
        tool("qemu-img", &rebase).ok();
        if !has_marker {
            end_extensions_by_the_name(&good);
        }
        for is_first in [true, false] {
            if !is_first {
                bitmap(&good, &["--add", "theirs"]);
                bitmap(&good, &["--add", "cp1"]);
            }
            let [mut old, mut new] = [0, 0];
            for calls in ["fdatasync", "pwrite64", "ftruncate"] {
                for n in 1.. {
                    let how =
                        format!("'{options}', marker {has_marker}, first {is_first}, {calls} {n}");
                    let image = server.path("image.qcow2");
                    fs::copy(&good, &image).unwrap();
                    let export = ["checkpoint", "export", "vda", "cp1", "--force", "--to"];
                    let export = server.cli_command(&[&export[..], &[path(&image)]].concat());
                    let answered = run_and_kill(&export, calls, n);
                    // 3 is what it says of leaks alone.
                    let checked = tool("qemu-img", &["check", "-f", "qcow2", path(&image)]);
                    assert!([0, 3].contains(&checked.code()), "{how}\n{checked}");
                    assert!(!answered || checked.code() == 0, "{how}\n{checked}");
                    match state_of(&image, is_first) {
                        State::Old => old += 1,
                        State::New => {
                            new += 1;
                            assert_eq!(as_qemu_says(&image, "cp1"), map, "{how}");
                        }
                        // Nobody believes any, which is safe.
                        State::Inconsistent => assert!(!answered, "{how}"),
                    }
                    tool("qemu-img", &["check", "-q", "-r", "leaks", path(&image)]).ok();
                    run(&mut { export }).ok();
                    tool("qemu-img", &["check", "-q", "-r", "leaks", path(&image)]);
                    check(&image, &how);
                    assert_eq!(as_qemu_says(&image, "cp1"), map, "{how}");
                    if answered {
                        break;
                    }
                }
            }
            assert!(old >= 4 && new >= 3, "'{options}': {old} old, {new} new");
        }
    }
}

/// Puts the name of the backing file directly behind its format, where the end of the extensions was told
/// before.
fn end_extensions_by_the_name(image: &Path) {
    let bytes = crate::images::bytes_of(image);
    let be32 = |at: usize| u32::from_be_bytes(bytes[at..at + 4].try_into().unwrap());
    let (from, length) = (be32(12) as usize, be32(16) as usize);
    let name = &bytes[from..from + length];
    let format = [
        &0xe279_2aca_u32.to_be_bytes()[..],
        &[0, 0, 0, 3],
        b"raw\0\0\0\0\0",
    ]
    .concat();
    let at = u64::from(be32(100));
    let place = at + format.len() as u64;
    poke(image, at, &[&format[..], name, &[0xff; 32]].concat());
    poke(image, 8, &place.to_be_bytes());
    check(image, "without a marker");
}

#[derive(Debug, PartialEq)]
enum State {
    Old,
    New,
    Inconsistent,
}

/// What became of the bitmaps of an image that had none, or one of this name with nothing in it.
fn state_of(image: &Path, is_first: bool) -> State {
    let told = tool("qemu-img", &["info", "--output=json", path(image)]).json();
    let empty = Vec::new();
    let listed = told["format-specific"]["data"]["bitmaps"]
        .as_array()
        .unwrap_or(&empty)
        .clone();
    let is_inconsistent = crate::images::bytes_of(image)[95] & 1 == 0;
    match listed.iter().find(|bitmap| bitmap["name"] == "cp1") {
        _ if is_inconsistent && (!is_first || !listed.is_empty()) => State::Inconsistent,
        None => {
            assert!(is_first, "{told}");
            State::Old
        }
        Some(_) => {
            assert_eq!(listed.len(), if is_first { 1 } else { 2 }, "{told}");
            let found = as_qemu_says(image, "cp1");
            if found == map_of(&[]) {
                State::Old
            } else {
                State::New
            }
        }
    }
}

#[test]
fn a_killed_export_of_a_state_leaves_the_state_and_what_was_at_the_place() {
    let mut server = Server::with_disk(SIZE);
    server.checkpoint("cp1");
    server.open_live("vda").write(0, &[1; 512]).unwrap();
    let expected = known(&server);
    server.stop();
    export(&server);
    let file = server.path("state");
    for calls in CALLS {
        for n in 1.. {
            let how = format!("{calls} {n}");
            let args = [
                "state",
                "export",
                "--force",
                "--disk",
                &spec(&server),
                "--to",
                path(&file),
            ];
            let answered = run_and_kill(&server.cli_command(&args), calls, n);
            let mut next = moved(&server, &file);
            next.start();
            assert_eq!(known(&next), expected, "{how}");
            server.start();
            assert_eq!(known(&server), expected, "{how}");
            server.stop();
            if answered {
                break;
            }
        }
    }
}

#[test]
fn a_killed_import_leaves_the_old_state_or_the_new_one() {
    let mut server = Server::with_disk(SIZE);
    server.checkpoint("new");
    server.open_live("vda").write(0, &[1; 512]).unwrap();
    server.cli(&["bitmap", "add", "vda", "b"]).ok();
    let new = known(&server);
    server.stop();
    let state = export(&server);
    let [mut olds, mut news] = [0, 0];
    for calls in [
        "fsync",
        "fdatasync",
        "pwrite64",
        "rename",
        "unlink",
        "mkdir",
        "ftruncate",
    ] {
        for n in 1.. {
            let how = format!("{calls} {n}");
            let builder = Server::builder();
            let image = builder.path("vda.raw");
            fs::copy(server.image("vda"), &image).unwrap();
            let mut there = builder.disk_at("vda", &image).start();
            there.checkpoint("old");
            there.cli(&["bitmap", "add", "vda", "c"]).ok();
            let old = known(&there);
            there.stop();
            let args = [
                "state",
                "import",
                path(&state),
                "--force",
                "--disk",
                &spec(&there),
            ];
            let answered = run_and_kill(&there.cli_command(&args), calls, n);
            if n % 3 == 0 && !answered {
                // So is the next start.
                start_and_kill_at(&there, "rename", 1 + n % 2);
            }
            there.start();
            let found = known(&there);
            if found == new {
                news += 1;
            } else {
                assert!(!answered, "{how}");
                assert_eq!(found, old, "{how}");
                olds += 1;
            }
            there.stop();
            let left = there.path("vda.raw.stillpoint");
            assert!(
                !left.join("arriving").exists() && !left.join("arrived").exists(),
                "{how}"
            );
            if answered {
                break;
            }
        }
    }
    assert!(olds >= 8 && news >= 8, "{olds} old, {news} new");
}

/// Starts a server that is killed at the `n`th of these calls, or asked to stop when it serves before
/// that.
fn start_and_kill_at(server: &Server, calls: &str, n: usize) {
    let serve = server.command();
    let mut strace = killing(calls, n);
    strace.arg(serve.get_program()).args(serve.get_args());
    let log = File::create(server.path("killed")).unwrap();
    let mut strace = KilledOnDrop::spawn(strace.stdout(log.try_clone().unwrap()).stderr(log));
    while wait_at_most(&mut strace.child, Duration::from_millis(20)).is_none() {
        if server.cli(&["status"]).status.success() {
            // Where this is too late, the stop is what is killed.
            server.cli(&["qmp", r#"{"execute":"quit"}"#]);
            assert!(wait(&mut strace.child).is_some(), "it goes on");
            return;
        }
    }
}
