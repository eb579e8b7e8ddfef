//! Whatever does the waiting for devices, and past the page cache too: the same bytes.

use std::fs::{self, File};
use std::process::{Command, Stdio};
use std::thread;

use rand::Rng as _;
use rustix::fs::{Advice, fadvise};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;
use stillpoint_tests::process::{self, KilledOnDrop};
use stillpoint_tests::raw_nbd::command;
use stillpoint_tests::seeds::{rng, seeds};
use stillpoint_tests::server::binary;
use stillpoint_tests::tools::{nbdcopy_sha256, nbdinfo_map, path, sha256, sparse_file};
use stillpoint_tests::{Guest, KIB, MIB, Mount, Server};

const ENGINES: [&str; 2] = ["io_uring", "threads"];
const SIZE: u64 = 8 * MIB;

/// A server of a new disk with this engine, and with these keys of `--disk`.
fn start(engine: &str, keys: &str) -> Server {
    let builder = Server::builder().arg(&format!("--io-engine={engine}"));
    let image = builder.path("vda.raw");
    sparse_file(&image, SIZE);
    builder
        .disk_as(&format!("vda={}{keys}", path(&image)))
        .start()
}

/// Lets the page cache forget what it has of the image.
fn forget(server: &Server) {
    let image = File::open(server.image("vda")).expect("the image");
    image.sync_all().expect("a sync");
    fadvise(&image, 0, None, Advice::DontNeed).expect("advice is taken");
}

#[test]
fn a_server_has_the_engine_that_it_was_told_and_by_itself_the_ring() {
    for (wanted, has) in [
        ("auto", "io_uring"),
        ("io_uring", "io_uring"),
        ("threads", "threads"),
    ] {
        let server = start(wanted, "");
        assert_eq!(server.cli_json(&["status"])["io_engine"], has, "{wanted}");
    }
    let wrong = Server::builder().disk("vda", SIZE).arg("--io-engine=aio");
    assert!(
        wrong
            .start_and_fail()
            .error(2)
            .contains("io_uring or threads")
    );
}

#[test]
fn where_the_kernel_refuses_the_ring_threads_do_the_same_unless_it_was_asked_for() {
    let builder = |engine| Server::builder().disk("vda", SIZE).arg(engine);
    let refused = |serve: &Command| {
        let mut strace = Command::new("strace");
        strace.args(["-f", "-qq", "-e", "trace=io_uring_setup"]);
        strace.args(["-e", "inject=io_uring_setup:error=EPERM", "-o", "/dev/null"]);
        strace.arg(serve.get_program()).args(serve.get_args());
        strace
    };
    let asked = builder("--io-engine=io_uring");
    let asked = process::run(&mut refused(&asked.command()));
    let error = asked.error(1);
    assert!(error.contains("io_uring cannot be used"), "{asked}");
    assert!(asked.stderr.contains("--io-engine"), "{asked}");

    let builder = builder("--io-engine=auto");
    let run_dir = builder.path("run");
    let mut serve = refused(&builder.command());
    serve.stdout(Stdio::null()).stderr(Stdio::null());
    let mut server = KilledOnDrop::spawn(&mut serve);
    let status = [
        "--run-dir",
        path(&run_dir),
        "--json",
        "status",
        "--wait",
        "20",
    ];
    let status = process::run(Command::new(binary()).args(status));
    status.exits(0);
    let status: Value = serde_json::from_str(&status.stdout).expect("JSON");
    let pid = status["pid"].as_i64().expect("a number") as i32;
    let pid = Pid::from_raw(pid).expect("no zero");
    assert_eq!(status["io_engine"], "threads", "{status}");
    kill_process(pid, Signal::TERM).expect("it runs");
    server.child.wait().expect("it ends");
}

#[test]
fn what_the_page_cache_has_forgotten_is_read_from_the_device() {
    for (engine, seed) in ENGINES.into_iter().zip(seeds(&[1, 2]).into_iter().cycle()) {
        let mut rng = rng(seed);
        let mut server = start(engine, "");
        let mut guest = Guest::new(&server, "vda");
        for mib in 0..SIZE / MIB {
            guest.write_random(&mut rng, mib * MIB, MIB);
        }
        server.checkpoint("cp1");
        server.begin("b1", &["--since", "cp1"]);
        let then = sha256(&guest.disk);
        // A pull that reads cold, and a guest that preserves cold, at once.
        forget(&server);
        thread::scope(|threads| {
            threads.spawn(|| {
                for _ in 0..200 {
                    let offset = rng.random_range(0..SIZE - 10 * KIB);
                    let length = rng.random_range(1..10 * KIB);
                    guest.write_random(&mut rng, offset, length);
                }
            });
            let found = nbdcopy_sha256(&server.frozen_uri("vda@b1"), server.directory());
            assert_eq!(found, then, "{engine}, seed {seed}");
        });
        forget(&server);
        assert!(
            server.open_live("vda").read_all() == guest.disk,
            "{engine}, seed {seed}: the live disk"
        );
        server.commit("b1");
        server.stop();
    }
}

#[test]
fn past_the_page_cache_any_offset_and_length_are_good() {
    for (engine, seed) in ENGINES.into_iter().zip(seeds(&[1, 2]).into_iter().cycle()) {
        let mut rng = rng(seed);
        let mut server = start(engine, ",cache=none");
        assert_eq!(server.cli_json(&["status"])["disks"][0]["cache"], "none");
        is_direct(&server);
        let mut guest = Guest::new(&server, "vda");
        (0..60).for_each(|_| guest.do_something(&mut rng));
        server.checkpoint("cp1");
        guest.touched.clear();
        (0..60).for_each(|_| guest.do_something(&mut rng));
        server.begin("b1", &["--since", "cp1"]);
        let (then, map) = (sha256(&guest.disk), guest.expected_map());
        (0..60).for_each(|_| guest.do_something(&mut rng));
        let uri = server.frozen_uri("vda@b1");
        let context = format!("{engine}, seed {seed}");
        assert_eq!(nbdcopy_sha256(&uri, server.directory()), then, "{context}");
        assert_eq!(nbdinfo_map(&uri, "qemu:dirty-bitmap:cp1"), map, "{context}");
        let mut live = server.open_live("vda");
        for _ in 0..60 {
            let offset = rng.random_range(0..SIZE - 9000);
            let length = rng.random_range(1..9000);
            let expected = &guest.disk[offset as usize..(offset + length) as usize];
            let read = live.read(offset, length as u32).expect("a read");
            assert!(read == expected, "{context}: {length} bytes at {offset}");
        }
        server.commit("b1");
        server.stop();
        let image = fs::read(server.image("vda")).expect("the image");
        assert!(image == guest.disk, "{context}: the image");
    }
}

/// Sees that the server has opened the image so that nothing of it goes through the page cache.
#[track_caller]
fn is_direct(server: &Server) {
    const O_DIRECT: u32 = 0o40000;
    let image = fs::canonicalize(server.image("vda")).expect("the image");
    let folder = format!("/proc/{}/fd", server.pid());
    let mut flags = Vec::new();
    for entry in fs::read_dir(folder).expect("descriptors").flatten() {
        if fs::read_link(entry.path()).is_ok_and(|to| to == image) {
            let number = entry.file_name().into_string().expect("a number");
            let info = format!("/proc/{}/fdinfo/{number}", server.pid());
            let info = fs::read_to_string(info).expect("what is known of it");
            let octal = info.lines().find_map(|line| line.strip_prefix("flags:"));
            flags.push(u32::from_str_radix(octal.expect("flags").trim(), 8).expect("octal"));
        }
    }
    assert!(!flags.is_empty(), "the image is open");
    assert!(flags.iter().all(|flags| flags & O_DIRECT != 0), "{flags:?}");
}

#[test]
fn those_who_write_parts_of_one_block_lose_nothing_of_each_other() {
    const BLOCKS: u64 = 4;
    const PART: u64 = 100;
    const WRITERS: u64 = 4;
    const ROUNDS: u64 = 150;
    for engine in ENGINES {
        let server = start(engine, ",cache=none");
        // Each writes its own part of every block, again and again, without waiting for an answer.
        thread::scope(|threads| {
            for writer in 0..WRITERS {
                let mut nbd = server.open_live("vda");
                threads.spawn(move || {
                    for round in 1..=ROUNDS {
                        for block in 0..BLOCKS {
                            let offset = block * 4 * KIB + writer * PART;
                            let value = [round as u8; PART as usize];
                            let sender = nbd.halves().0;
                            sender
                                .request((command::WRITE, 0), 0, offset, PART as u32, &value)
                                .expect("a request");
                        }
                        for _ in 0..BLOCKS {
                            let answer = nbd.halves().1.answer().expect("an answer");
                            answer.done().expect("a write");
                        }
                        let block = round % BLOCKS;
                        let at = block * 4 * KIB + writer * PART;
                        let read = nbd.read(at, PART as u32).expect("a read");
                        assert!(
                            read.iter().all(|byte| *byte == round as u8),
                            "{engine}: writer {writer} wrote {round} at {at}, and finds {read:?}"
                        );
                    }
                });
            }
        });
    }
}

#[test]
fn direct_io_that_cannot_be_is_refused_with_what_to_do() {
    // Not made of the 4 KiB that the device has for sectors; and a file system that has none of it.
    let volumes = [
        (
            Mount::ext4_on_sectors(64 * MIB, 4096),
            "no multiple of 4096",
        ),
        (Mount::ramfs(), "without direct I/O"),
    ];
    for (volume, why) in volumes {
        let image = volume.path().join("vda.raw");
        sparse_file(&image, SIZE + 512);
        let builder = Server::builder();
        let disk = format!(
            "vda={},state={}",
            path(&image),
            path(&builder.path("state"))
        );
        let refused = builder
            .disk_as(&format!("{disk},cache=none"))
            .start_and_fail();
        assert!(refused.error(1).contains(why), "{refused}");
        assert!(refused.stderr.contains("cache=writeback"), "{refused}");

        let builder = Server::builder();
        let disk = format!(
            "vda={},state={}",
            path(&image),
            path(&builder.path("state"))
        );
        let server = builder.disk_as(&disk).start();
        let written = server.open_live("vda").write(SIZE + 511, &[1]);
        written.expect("a write");
    }
}
