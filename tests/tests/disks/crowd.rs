//! Many disks, one after the other and together: nothing is left of those that went.

use std::fs;

use stillpoint_tests::tools::{path, proc_number, sparse_file};
use stillpoint_tests::{CHUNK, NbdBase, Server};

use super::{SIZE, add, builder, changed, disks, map_of, remove};

/// What a process has open and runs.
#[derive(Debug, Eq, PartialEq)]
struct Held {
    descriptors: usize,
    threads: u64,
    locks: usize,
}

fn held(server: &Server) -> Held {
    let folder = format!("/proc/{}/fd", server.pid());
    let pid = format!(" {} ", server.pid());
    let locks = fs::read_to_string("/proc/locks").expect("the kernel's locks");
    Held {
        descriptors: fs::read_dir(folder).expect("a live process").count(),
        threads: proc_number(server.pid(), "status", "Threads"),
        locks: locks.lines().filter(|line| line.contains(&pid)).count(),
    }
}

/// Waits until what is held is not more than this; threads of a pool end after a while.
#[track_caller]
fn comes_back_to(server: &Server, before: &Held) {
    let begun = std::time::Instant::now();
    loop {
        let now = held(server);
        let is_back = now.descriptors <= before.descriptors && now.locks <= before.locks;
        if is_back && now.threads <= before.threads + POOLED {
            return;
        }
        assert!(begun.elapsed().as_secs() < 60, "{now:?} after {before:?}");
        std::thread::yield_now();
    }
}

/// Threads of the pools that a command may have started, and that end when they are idle.
const POOLED: u64 = 4;

#[test]
fn a_hundred_comings_and_goings_leave_nothing() {
    let server = builder().start();
    sparse_file(&server.image("vdc"), SIZE);
    let base = NbdBase::file(&server.image("vdc"));
    let remote = format!("vdc={},state={}", base.uri(), path(&server.path("state")));
    // The first of everything makes what stays: rings, threads.
    add(&server, "vdb");
    server.begin("first", &[]);
    server.open_live("vdb").write(0, &[1; 512]).unwrap();
    server.commit("first");
    remove(&server, "vdb");
    let before = held(&server);
    for round in 0..100_u64 {
        add(&server, "vdb");
        if round % 10 == 0 {
            server.cli(&["disk", "add", &remote]).ok();
            server.begin(
                &format!("b{round}"),
                &["--checkpoint", &format!("cp{round}")],
            );
        }
        server
            .open_live("vdb")
            .write(round % 64 * CHUNK, &[1; 512])
            .unwrap();
        if round % 10 == 0 {
            server.commit(&format!("b{round}"));
            remove(&server, "vdc");
        }
        remove(&server, "vdb");
    }
    comes_back_to(&server, &before);
    add(&server, "vdb");
    let since: Vec<u64> = (90..100).map(|round| round % 64).collect();
    assert_eq!(changed(&server, "i", "vdb", "cp90"), map_of(&since));
}

#[test]
fn more_disks_than_a_machine_has_are_refused_and_those_that_are_there_are_served() {
    let server = builder().start();
    let mut qmp = server.qmp();
    for number in 0..256 {
        let name = format!("d{number}");
        let image = server.path(&format!("{name}.raw"));
        sparse_file(&image, CHUNK);
        let arguments = serde_json::json!({"disk": name, "path": path(&image)});
        let added = qmp.try_execute("disk-add", &arguments);
        if number < 255 {
            added.unwrap();
        } else {
            assert!(added.unwrap_err().contains("256 disks"));
        }
    }
    assert_eq!(disks(&server).len(), 256);
    server.open_live("d254").write(0, &[1; 512]).unwrap();
    server.checkpoint("cp1");
    remove(&server, "d0");
}
