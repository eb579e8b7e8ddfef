//! What comes back where the base was.

use std::fs;

use stillpoint_tests::server::temporary_directory;
use stillpoint_tests::tools::path;
use stillpoint_tests::{CHUNK, KIB, MIB, NbdBase, RawNbd, Server};

use super::{SIZE, image, on};

const EIO: u32 = 5;

/// Nothing is read there, nothing is written, and the log says why.
#[track_caller]
fn is_not_used(server: &Server, live: &mut RawNbd) {
    assert_eq!(live.read(0, 512), Err(EIO));
    assert_eq!(live.write(MIB, &[9; 512]), Err(EIO));
    assert_eq!(live.flush(), Err(EIO));
    server.wait_for_log("with another image, or with an older state", 1);
}

#[test]
fn another_image_of_the_same_size_is_neither_read_nor_written() {
    let directory = temporary_directory();
    let (image, other) = (image(&directory), directory.path().join("other"));
    let mut base = NbdBase::file(&image);
    let server = on(&base, ",reconnect=3s").start();
    let mut live = server.open_live("vda");
    live.write(0, &[1; 512]).unwrap();
    live.flush().unwrap();
    server.begin("b1", &[]);
    let mut frozen = server.open_frozen("vda@b1", &[]);
    // It was not flushed: a base that came back would be given it.
    live.write(MIB, &[2; 512]).unwrap();
    fs::write(&other, vec![7; SIZE as usize]).unwrap();
    base.kill();
    base.start_with(&["file", path(&other)]);
    is_not_used(&server, &mut live);
    assert_eq!(frozen.read(0, 512), Err(EIO));
    let bytes = fs::read(&other).unwrap();
    assert!(bytes.iter().all(|byte| *byte == 7), "the other was written");

    base.kill();
    base.start_with(&["file", path(&image)]);
    server.wait_for_log("the base is back", 1);
    assert_eq!(live.read(0, 512).unwrap(), [1; 512]);
    assert_eq!(live.read(MIB, 512).unwrap(), [2; 512]);
    assert_eq!(frozen.read(0, 512).unwrap(), [1; 512]);
    assert_eq!(frozen.read(MIB, 512).unwrap(), [0; 512]);
}

#[test]
fn an_older_state_of_the_image_is_not_used() {
    let directory = temporary_directory();
    let (image, older) = (image(&directory), directory.path().join("older"));
    let mut base = NbdBase::file(&image);
    let server = on(&base, ",reconnect=3s").start();
    let mut live = server.open_live("vda");
    live.write(MIB, &[1; 512]).unwrap();
    live.flush().unwrap();
    fs::copy(&image, &older).unwrap();
    live.write(MIB + 100 * KIB, &[2; 512]).unwrap();
    live.flush().unwrap();
    base.kill();
    base.start_with(&["file", path(&older)]);
    is_not_used(&server, &mut live);
    base.kill();
    base.start_with(&["file", path(&image)]);
    server.wait_for_log("the base is back", 1);
    assert_eq!(live.read(MIB + 100 * KIB, 512).unwrap(), [2; 512]);
}

#[test]
fn a_base_that_has_lost_what_it_flushed_is_not_used() {
    let mut base = NbdBase::nbdkit(&["memory", "8M"]);
    let server = on(&base, ",reconnect=3s").start();
    let mut live = server.open_live("vda");
    live.write(MIB + 512, &[1; 512]).unwrap();
    live.flush().unwrap();
    base.kill();
    base.start();
    is_not_used(&server, &mut live);
}

#[test]
fn an_instant_that_the_base_cannot_make_durable_is_none_and_what_changed_stays_marked() {
    let directory = temporary_directory();
    let mut base = NbdBase::file(&image(&directory));
    let server = on(&base, ",reconnect=3s").start();
    let mut live = server.open_live("vda");
    server.checkpoint("cp0");
    live.write(CHUNK, &[1; 512]).unwrap();
    base.kill();
    let begin = ["backup", "begin", "--id", "b1", "--since", "cp0"];
    let refused = server.cli(&begin);
    assert!(
        refused.error(1).contains("cannot be made durable"),
        "{refused}"
    );
    let refused = server.cli(&["checkpoint", "create", "cp1"]);
    assert!(
        refused.error(1).contains("cannot be made durable"),
        "{refused}"
    );
    let status = server.cli_json(&["status"]);
    assert_eq!(status["backups"], serde_json::json!([]), "{status}");
    assert_eq!(live.write(3 * CHUNK, &[2; 512]), Err(EIO));

    base.start();
    server.wait_for_log("the base is back", 1);
    live.write(5 * CHUNK, &[3; 512]).unwrap();
    server.checkpoint("cp1");
    server.cli(&begin).ok();
    let context = "qemu:dirty-bitmap:cp0";
    let mut frozen = server.open_frozen("vda@b1", &[context]);
    let dirty: Vec<_> = frozen
        .map(context)
        .into_iter()
        .filter(|it| it.2 == 1)
        .collect();
    // Of the write that failed nobody knows whether it was performed.
    let expected = [1, 3, 5].map(|chunk| (chunk * CHUNK, CHUNK, 1));
    assert_eq!(dirty, expected);
    assert_eq!(frozen.read(CHUNK, 512).unwrap(), [1; 512]);
}

#[test]
fn a_frozen_read_waits_for_the_base_and_is_never_wrong() {
    let directory = temporary_directory();
    let mut base = NbdBase::file(&image(&directory));
    let server = on(&base, ",reconnect=3s").start();
    let mut live = server.open_live("vda");
    live.write(0, &[1; 8192]).unwrap();
    server.begin("b1", &[]);
    let mut frozen = server.open_frozen("vda@b1", &[]);
    // The base has lost neither, and is given the second again.
    live.write(0, &[2; 4096]).unwrap();
    base.kill();
    // What is kept is here, but the image is read first.
    assert_eq!(frozen.read(0, 4096), Err(EIO));
    assert_eq!(frozen.read(4096, 4096), Err(EIO));
    base.start();
    server.wait_for_log("the base is back", 1);
    assert_eq!(frozen.read(0, 8192).unwrap(), [1; 8192]);
    assert_eq!(live.read(0, 4096).unwrap(), [2; 4096]);
}

#[test]
fn a_first_write_whose_old_bytes_cannot_be_read_breaks_the_backup_and_not_its_base() {
    let directory = temporary_directory();
    let mut base = NbdBase::file(&image(&directory));
    let server = on(&base, ",reconnect=3s").start();
    let mut live = server.open_live("vda");
    server.checkpoint("cp0");
    live.write(0, &[1; 512]).unwrap();
    server.begin("b1", &["--since", "cp0"]);
    base.kill();
    assert_eq!(live.write(CHUNK, &[2; 512]), Err(EIO));
    base.start();
    server.wait_for_log("the base is back", 1);
    let mut frozen = server.open_frozen("vda@b1", &[]);
    assert_eq!(frozen.read(0, 512), Err(EIO), "it is broken");
    server.abort("b1");
    server.begin("b2", &["--since", "cp0"]);
    let context = "qemu:dirty-bitmap:cp0";
    let map = server.open_frozen("vda@b2", &[context]).map(context);
    assert_eq!(map, [(0, 2 * CHUNK, 1), (2 * CHUNK, SIZE - 2 * CHUNK, 0)]);
}
