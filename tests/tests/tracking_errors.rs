//! What happens when it cannot be recorded that the disk changes.

use std::fs::{self, File};
use std::io::Write as _;
use std::path::Path;

use serde_json::{Value, json};
use stillpoint_tests::process::wait_until_blocked;
use stillpoint_tests::server::{Builder, named};
use stillpoint_tests::state::{Begun, begin_since};
use stillpoint_tests::tools::{path, sparse_file};
use stillpoint_tests::{CHUNK, Guest, MIB, Mount, Server};

/// A server whose state lies on a file system of its own, with a checkpoint, and changes in the first
/// page of the map.
fn server_on(mount: &Mount, policy: &str) -> Server {
    let builder = Server::builder();
    let scratch = builder.path("scratch");
    server_with(builder, mount, policy, &scratch)
}

/// The same with a place for its scratch.
fn server_with(builder: Builder, mount: &Mount, policy: &str, scratch: &Path) -> Server {
    let image = builder.path("vda.raw");
    sparse_file(&image, 256 * MIB);
    let state = mount.path().join("state");
    let disk = format!("vda={},state={}", path(&image), path(&state));
    let server = builder
        .disk_as(&disk)
        .arg(&format!("--scratch-dir={}", path(scratch)))
        .arg("--scratch-reserve=0")
        .arg(&format!("--on-tracking-error={policy}"))
        .start();
    Guest::new(&server, "vda").write(CHUNK, &[1; 4096]);
    server.checkpoint("cp1");
    Guest::new(&server, "vda").write(2 * CHUNK, &[1; 4096]);
    server
}

fn fill(mount: &Mount) {
    let mut file = File::create(mount.path().join("filler")).unwrap();
    for size in [MIB as usize, 4096, 1] {
        while file.write_all(&vec![7; size]).is_ok() {
            // What is only in memory may find no room later.
            if file.sync_all().is_err() {
                break;
            }
        }
    }
}

fn empty(mount: &Mount) {
    fs::remove_file(mount.path().join("filler")).unwrap();
}

fn tracking(server: &Server) -> Value {
    let disks = server.qmp().execute("query-disks", &json!({}));
    named(&disks, "disks", "disk", "vda").expect("vda")
}

#[track_caller]
fn dirty_since(server: &Server, id: &str, since: &str) -> Vec<u64> {
    match begin_since(server, id, "vda", since) {
        Begun::Full { reason } => panic!("full: {reason}"),
        Begun::Incremental { map, .. } => {
            let dirty = map.iter().filter(|extent| extent.2 == 1);
            dirty.map(|extent| extent.0 / CHUNK).collect()
        }
    }
}

#[track_caller]
fn is_full(server: &Server, id: &str, since: &str) {
    match begin_since(server, id, "vda", since) {
        Begun::Full { reason } => {
            assert!(reason.contains("could not be recorded"), "{reason}");
        }
        Begun::Incremental { map, .. } => panic!("incremental: {map:?}"),
    }
}

#[test]
fn with_fail_write_a_full_file_system_fails_what_cannot_be_tracked_and_nothing_else() {
    let mount = Mount::ext4(8 * MIB);
    let mut server = server_on(&mount, "fail-write");
    fill(&mount);
    let mut nbd = server.open_live("vda");
    nbd.write(3 * CHUNK, &[2; 4096]).expect("its page is there");
    nbd.write(100 * MIB, &[2; 4096])
        .expect_err("it is untracked");
    assert_eq!(nbd.read(100 * MIB, 4096), Ok(vec![0; 4096]));
    nbd.flush().expect("the image is well");
    assert_eq!(tracking(&server)["tracking"], "ok");
    empty(&mount);
    nbd.write(100 * MIB, &[3; 4096]).expect("there is room");
    assert_eq!(dirty_since(&server, "b1", "cp1"), [2, 1600]);
    drop(nbd);
    server.kill();
    server.start();
    assert_eq!(dirty_since(&server, "b2", "cp1"), [2, 1600]);
    assert_eq!(server.open_live("vda").read(3 * CHUNK, 1), Ok(vec![2]));
}

#[test]
fn with_stop_tracking_the_guest_goes_on_and_the_next_backup_is_full_with_the_reason() {
    let mount = Mount::ext4(8 * MIB);
    let mut server = server_on(&mount, "stop-tracking");
    server.begin("open", &["--since", "cp1", "--checkpoint", "cp2"]);
    let mut events = server.qmp();
    fill(&mount);
    let mut nbd = server.open_live("vda");
    nbd.write(100 * MIB, &[2; 4096]).expect("it goes on");
    let event = events.event("TRACKING_LOST");
    assert_eq!(event["data"]["disk"], "vda");
    let reason = event["data"]["reason"].as_str().expect("a reason");
    assert!(reason.contains("No space left"), "{reason}");
    let told = tracking(&server);
    assert_eq!(
        (&told["tracking"], &told["tracking_reason"]),
        (&json!("lost"), &json!(reason))
    );
    assert!(server.cli(&["status"]).ok().contains("not tracked"));

    // The instant from before is whole, and so is what is known of it; also after a kill.
    for again in [false, true] {
        if again {
            server.kill();
            empty(&mount);
            server.start();
        }
        let context = "qemu:dirty-bitmap:cp1";
        let mut frozen = server.open_frozen("vda@open", &[context]);
        assert_eq!(frozen.read(100 * MIB, 4096), Ok(vec![0; 4096]), "{again}");
        let dirty: Vec<_> = frozen
            .map(context)
            .into_iter()
            .filter(|e| e.2 == 1)
            .collect();
        assert_eq!(dirty, [(2 * CHUNK, CHUNK, 1)], "{again}");
    }
    // Its commit succeeds, and what it makes is of no use as a base.
    server.commit("open");
    is_full(&server, "b1", "cp2");
    is_full(&server, "b2", "cp1");
    assert_eq!(tracking(&server)["tracking"], "ok");
    server.checkpoint("cp3");
    server
        .open_live("vda")
        .write(200 * MIB, &[3; 4096])
        .unwrap();
    assert_eq!(dirty_since(&server, "b3", "cp3"), [3200]);
    server.stop();
    server.start();
    is_full(&server, "b4", "cp1");
    assert_eq!(dirty_since(&server, "b5", "cp3"), [3200]);
}

#[test]
fn where_not_even_the_loss_can_be_recorded_a_write_fails_that_cannot_be_tracked() {
    for policy in ["fail-write", "stop-tracking"] {
        let mount = Mount::ext4(8 * MIB);
        let server = server_on(&mount, policy);
        mount.fail();
        let mut nbd = server.open_live("vda");
        nbd.write(100 * MIB, &[2; 4096]).expect_err(policy);
        assert_eq!(nbd.read(100 * MIB, 4096), Ok(vec![0; 4096]), "{policy}");
        nbd.flush().expect("the image is well");
        assert_eq!(tracking(&server)["tracking"], "ok", "{policy}");
        let log = server.stderr();
        let line = log.lines().find(|line| line.contains("a request failed"));
        let line = line.unwrap_or_else(|| panic!("{policy}: {log}"));
        for word in [" peer=", " export=\"vda\"", " error="] {
            assert!(line.contains(word), "{policy}: {line}");
        }
    }
}

#[test]
fn tracking_that_was_lost_stays_so_over_every_end_until_a_new_checkpoint() {
    let mount = Mount::ext4(8 * MIB);
    let mut server = server_on(&mount, "stop-tracking");
    fill(&mount);
    server
        .open_live("vda")
        .write(100 * MIB, &[2; 4096])
        .unwrap();
    server.kill();
    empty(&mount);
    // With another policy, too.
    server.start();
    is_full(&server, "b1", "cp1");
    server.kill();
    stillpoint_tests::state::pretend_power_cut(&mount.path().join("state"));
    server.start();
    is_full(&server, "b2", "cp1");
    server.stop();
    // A record that cannot be read says that it is not known.
    stillpoint_tests::state::damage_sector(&mount.path().join("state"), 3);
    server.start();
    match begin_since(&server, "b3", "vda", "cp1") {
        Begun::Full { reason } => assert!(reason.contains("damaged"), "{reason}"),
        Begun::Incremental { .. } => panic!("incremental"),
    }
    server.checkpoint("cp2");
    server.kill();
    server.start();
    assert_eq!(dirty_since(&server, "b4", "cp2"), [] as [u64; 0]);
}

/// Between the moment when a bitmap is found to be whole and the instant, scratch files are made.
#[test]
fn a_bitmap_that_misses_a_write_of_the_last_moment_is_not_frozen() {
    let (mount, slow) = (Mount::ext4(8 * MIB), Mount::ext4(8 * MIB));
    let scratch = slow.path().join("scratch");
    let server = server_with(Server::builder(), &mount, "stop-tracking", &scratch);
    server.cli(&["bitmap", "add", "vda", "b"]).ok();
    let mut nbd = server.open_live("vda");
    fill(&mount);
    let held = slow.freeze();
    let mut control = server.qmp();
    let begin = json!({"execute": "backup-begin", "arguments": {"id": "b1", "bitmaps": ["b"]}});
    control.try_send(begin.to_string().as_bytes()).unwrap();
    wait_until_blocked(server.pid());
    nbd.write(100 * MIB, &[2; 4096]).expect("it goes on");
    drop(held);
    let answer = control.reply();
    assert_eq!(answer["error"]["code"], "bitmap-inconsistent", "{answer}");
    let none = server.cli_json(&["backup", "list"]);
    assert_eq!(none, json!([]));
}
