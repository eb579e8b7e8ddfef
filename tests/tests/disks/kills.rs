//! The server is killed at each of its system calls while a disk comes or goes. Nothing is lost, and
//! nothing is taken for clean that is not.

use serde_json::{Value, json};
use stillpoint_tests::killer::execute_and_die;
use stillpoint_tests::state::{Begun, begin_since, directory, pretend_power_cut};
use stillpoint_tests::tools::path;
use stillpoint_tests::{CHUNK, Server};

use super::{builder, changed, disks_of, map_of};

/// All that a disk's coming and going do something with. Only its coming makes files.
const CALLS: [&str; 3] = ["fdatasync", "pwrite64", "flock"];

/// A server with `vda`, and the image of `vdb` with a past: a checkpoint `cp1` of both disks, and one that
/// was deleted while `vdb` was away. Chunk 3 was written since `cp1`.
fn prepared() -> Server {
    let server = builder().start();
    super::add(&server, "vdb");
    server.checkpoint("cp1");
    server.checkpoint("gone");
    server
        .open_live("vdb")
        .write(3 * CHUNK, &[2; 4096])
        .unwrap();
    server
}

fn adding(server: &Server) -> Value {
    let arguments = json!({"disk": "vdb", "path": path(&server.image("vdb"))});
    json!({"execute": "disk-add", "arguments": arguments})
}

#[track_caller]
fn check(server: &Server, how: &str) {
    super::add(server, "vdb");
    assert_eq!(disks_of(server, "cp1"), ["vda", "vdb"], "{how}");
    assert_eq!(changed(server, "i1", "vdb", "cp1"), map_of(&[3]), "{how}");
    let mut live = server.open_live("vdb");
    assert_eq!(live.read(3 * CHUNK, 4096).unwrap(), [2; 4096], "{how}");
    live.write(9 * CHUNK, &[3; 512]).unwrap();
    assert_eq!(
        changed(server, "i2", "vdb", "cp1"),
        map_of(&[3, 9]),
        "{how}"
    );
}

#[test]
fn a_server_that_is_killed_while_a_disk_comes_loses_nothing() {
    for calls in CALLS.into_iter().chain(["fsync"]) {
        for n in 1.. {
            let how = format!("add, {calls} {n}");
            let mut server = prepared();
            super::remove(&server, "vdb");
            server.cli(&["checkpoint", "delete", "gone"]).ok();
            let command = adding(&server);
            let answered = execute_and_die(&mut server, &command, calls, n);
            server.start();
            check(&server, &how);
            assert!(disks_of(&server, "gone").is_empty(), "{how}");
            if answered {
                assert!(n > 1, "{how}: there is no such call");
                break;
            }
        }
    }
}

#[test]
fn a_server_that_is_killed_while_a_disk_goes_loses_nothing() {
    for power_cut in [false, true] {
        for calls in CALLS {
            for n in 1.. {
                let how = format!("remove, {calls} {n}, power cut: {power_cut}");
                let mut server = prepared();
                let client = server.open_live("vdb");
                let arguments = json!({"disk": "vdb", "force": true});
                let command = json!({"execute": "disk-remove", "arguments": arguments});
                let answered = execute_and_die(&mut server, &command, calls, n);
                drop(client);
                server.start();
                if power_cut {
                    pretend_power_cut(&directory(&server, "vdb"));
                    check_after_power_cut(&server, &how);
                } else {
                    check(&server, &how);
                }
                if answered {
                    assert!(n > 1, "{how}: there is no such call");
                    break;
                }
            }
        }
    }
}

/// What was written is dirty, whatever else is.
#[track_caller]
fn check_after_power_cut(server: &Server, how: &str) {
    super::add(server, "vdb");
    match begin_since(server, "i1", "vdb", "cp1") {
        Begun::Incremental { map, .. } => {
            let at = 3 * CHUNK;
            let is_dirty = map.iter().any(|e| e.2 == 1 && e.0 <= at && at < e.0 + e.1);
            assert!(is_dirty, "{how}: {map:?}");
        }
        Begun::Full { reason } => panic!("{how}: full: {reason}"),
    }
}
