//! A disk that no server has, and an image that someone else has enlarged.

use std::fs::File;

use serde_json::json;
use stillpoint_tests::state::{Begun, begin_since};
use stillpoint_tests::tools::{path, sparse_file};
use stillpoint_tests::{LoopDevice, Server};

use super::{AFTER, BEFORE, WRITTEN, changed_since, grown_map, prepared, size_of, write};

/// Resizes it by the command.
fn resize(server: &Server, size: &str) -> stillpoint_tests::Output {
    let disk = format!("vda={}", path(&server.image("vda")));
    server.cli(&["disk", "resize", "--disk", &disk, "vda", size, "--json"])
}

#[track_caller]
fn resized(server: &Server, size: &str, before: u64) {
    let expected = json!({"disk": "vda", "size_before": before, "size": AFTER});
    assert_eq!(resize(server, size).json(), expected);
}

#[test]
fn a_disk_without_a_server_grows_and_its_chain_and_its_backups_go_on() {
    for relative in [false, true] {
        let mut server = prepared();
        let then = server.open_live("vda").read_all();
        server.begin("b1", &["--since", "cp1"]);
        server.stop();
        let size = if relative {
            format!("+{}", AFTER - BEFORE)
        } else {
            AFTER.to_string()
        };
        resized(&server, &size, BEFORE);
        // Once more, which does nothing.
        resized(&server, &AFTER.to_string(), AFTER);
        server.start();
        assert_eq!(size_of(&server), AFTER);
        assert!(server.open_frozen("vda@b1", &[]).read_all() == then);
        let found = changed_since(&server, "i1", "cp1", "without a server");
        assert_eq!(found, grown_map(&[WRITTEN]));
    }
}

#[test]
fn after_a_kill_a_disk_grows_without_a_server_unless_a_backup_is_open() {
    let mut server = prepared();
    server.kill();
    resized(&server, &AFTER.to_string(), BEFORE);
    server.start();
    let found = changed_since(&server, "i1", "cp1", "after a kill");
    assert_eq!(found, grown_map(&[WRITTEN]));
    server.begin("b1", &[]);
    let then = server.open_live("vda").read_all();
    server.kill();
    let refusal = resize(&server, "+1M");
    assert!(refusal.stdout.contains("not-clean"), "{refusal}");
    refusal.exits(1);
    // And the server finds what it would have found.
    server.start();
    assert!(server.open_frozen("vda@b1", &[]).read_all() == then);
    assert_eq!(size_of(&server), AFTER);
}

#[test]
fn an_image_that_someone_else_has_enlarged_is_full_whatever_is_asked_for() {
    for also_by_us in [false, true] {
        let mut server = prepared();
        server.stop();
        let image = File::options()
            .write(true)
            .open(server.image("vda"))
            .unwrap();
        image.set_len(AFTER).unwrap();
        if also_by_us {
            resized(&server, &AFTER.to_string(), AFTER);
        }
        server.start();
        match begin_since(&server, "i1", "vda", "cp1") {
            Begun::Full { reason } => assert!(reason.contains("resized"), "{reason}"),
            Begun::Incremental { map, .. } => panic!("{map:?}"),
        }
    }
}

#[test]
fn a_block_device_that_was_enlarged_is_taken_over_by_the_command_alone() {
    for command in [true, false] {
        let builder = Server::builder();
        let backing = builder.path("backing");
        sparse_file(&backing, BEFORE);
        let device = LoopDevice::new(&backing);
        let state = builder.path("state");
        let disk = format!("vda={},state={}", path(device.path()), path(&state));
        let mut server = builder.disk_as(&disk).start();
        write(&server);
        server.stop();
        sparse_file(&backing, AFTER);
        device.update_size();
        if command {
            let size = AFTER.to_string();
            server
                .cli(&["disk", "resize", "--disk", &disk, "vda", &size])
                .ok();
        }
        server.start();
        match begin_since(&server, "i1", "vda", "cp1") {
            Begun::Full { reason } if !command => {
                assert!(reason.contains("resized"), "{reason}");
            }
            Begun::Incremental { map, uncertain } if command => {
                assert_eq!((map, uncertain), (grown_map(&[WRITTEN]), 0));
            }
            other => panic!("command {command}: {other:?}"),
        }
    }
}
