//! What is performed after it was given up, and what is answered with an error.

use std::fs::File;
use std::os::unix::fs::FileExt;

use rustix::process::Signal;
use stillpoint_tests::relay::Relay;
use stillpoint_tests::server::{self, temporary_directory};
use stillpoint_tests::tools::path;
use stillpoint_tests::{CHUNK, NbdBase, RawNbd, Server};

use super::{at, image, on};

const EIO: u32 = 5;

/// The bytes at the beginning of what a backup serves, and whether its chunk is marked.
fn first_chunk(server: &Server, id: &str, since: &str) -> (Vec<u8>, u32) {
    let context = format!("qemu:dirty-bitmap:{since}");
    let mut frozen = server.open_frozen(&format!("vda@{id}"), &[&context]);
    let bytes = frozen.read(0, CHUNK as u32).unwrap();
    (bytes, frozen.map(&context)[0].2)
}

/// Of a write that was given up, and one after it: "b1" is from before it landed, the next from after.
#[track_caller]
fn the_next_has_what_has_landed(server: &Server) {
    is_marked_with(server, "b1", "cp-b0", 3);
    server.commit("b1");
    checkpointed(server, "b2", "cp-b1");
    is_marked_with(server, "b2", "cp-b1", 2);
}

#[track_caller]
fn is_marked_with(server: &Server, id: &str, since: &str, value: u8) {
    let (bytes, marked) = first_chunk(server, id, since);
    let is_all = bytes.iter().all(|byte| *byte == value);
    assert!(is_all && marked == 1, "{id}: not {value}, or not marked");
}

fn checkpointed(server: &Server, id: &str, since: &str) {
    server.begin(id, &["--since", since, "--checkpoint", &format!("cp-{id}")]);
}

/// A server whose first chunk was written, with ones, before `cp-b0`; and then with twos, which was given
/// up and is on its way until the relay releases it.
fn with_a_write_given_up(base: &NbdBase) -> (Relay, Server, RawNbd) {
    let relay = Relay::to(&base.socket());
    let uri = server::uri(&relay.socket(), "");
    let server = at(&uri, ",reconnect=3s").start();
    let mut live = server.open_live("vda");
    live.write(0, &vec![1; CHUNK as usize]).unwrap();
    server.checkpoint("cp-b0");
    relay.hold();
    let given_up = live.write(0, &vec![2; CHUNK as usize]);
    assert_eq!(given_up, Err(EIO));
    // On a connection that is not held.
    server.wait_for_log("the base is back", 1);
    (relay, server, live)
}

#[test]
fn a_write_that_lands_long_after_it_was_given_up_is_marked_and_preserved() {
    let directory = temporary_directory();
    let image = image(&directory);
    let base = NbdBase::one_after_the_other(&image);
    let (relay, mut server, mut live) = with_a_write_given_up(&base);
    checkpointed(&server, "b1", "cp-b0");
    live.write(0, &vec![3; CHUNK as usize]).unwrap();
    server.commit("b1");
    checkpointed(&server, "b2", "cp-b1");
    checkpointed(&server, "b3", "cp-b1");
    assert_eq!(first_chunk(&server, "b2", "cp-b1").1, 1);
    // Another server's life does not change that: it may still land.
    server.kill();
    server.start();
    relay.release();
    let mut first = [0];
    File::open(&image)
        .unwrap()
        .read_exact_at(&mut first, 0)
        .unwrap();
    assert_eq!(first, [2], "it has landed");

    // Those that are open are as they were.
    is_marked_with(&server, "b2", "cp-b1", 3);
    let (bytes, _) = first_chunk(&server, "b3", "cp-b1");
    assert!(bytes.iter().all(|byte| *byte == 3), "b3");
    server.commit("b2");
    server.commit("b3");
    checkpointed(&server, "b4", "cp-b3");
    is_marked_with(&server, "b4", "cp-b3", 2);
    server.commit("b4");
    server.stop();
    server.start();
    checkpointed(&server, "b5", "cp-b4");
    let marked = first_chunk(&server, "b5", "cp-b4").1;
    assert_eq!(marked, 1, "after a stop too");
    server.commit("b5");
    server.cli(&["disk", "settle", "vda"]).ok();
    checkpointed(&server, "b6", "cp-b5");
    server.commit("b6");
    checkpointed(&server, "b7", "cp-b6");
    let marked = first_chunk(&server, "b7", "cp-b6").1;
    assert_eq!(marked, 0, "settled");
}

#[test]
fn a_write_that_was_repeated_may_land_twice_and_is_marked_and_preserved() {
    let directory = temporary_directory();
    let image = image(&directory);
    let base = NbdBase::one_after_the_other(&image);
    let relay = Relay::to(&base.socket());
    let uri = server::uri(&relay.socket(), "");
    let server = at(&uri, ",reconnect=20s").start();
    let mut live = server.open_live("vda");
    live.write(0, &vec![1; CHUNK as usize]).unwrap();
    server.checkpoint("cp-b0");
    relay.hold();
    let write = std::thread::scope(|scope| {
        let writer = scope.spawn(|| live.write(0, &vec![2; CHUNK as usize]));
        // The answer can only come over the next connection.
        relay.wait_until_held(CHUNK);
        relay.hang_up();
        writer.join().unwrap()
    });
    assert_eq!(write, Ok(()), "it was sent again");
    live.write(0, &vec![3; CHUNK as usize]).unwrap();
    checkpointed(&server, "b1", "cp-b0");
    relay.release();
    assert_eq!(live.read(0, 1).unwrap(), [2], "the first one has landed");
    the_next_has_what_has_landed(&server);
}

#[test]
fn a_write_that_lands_while_nobody_serves_the_disk_makes_no_other_image_of_it() {
    let directory = temporary_directory();
    let base = NbdBase::one_after_the_other(&image(&directory));
    let (relay, mut server, mut live) = with_a_write_given_up(&base);
    live.write(0, &vec![3; CHUNK as usize]).unwrap();
    checkpointed(&server, "b1", "cp-b0");
    server.stop();
    relay.release();
    server.start();
    the_next_has_what_has_landed(&server);
}

#[test]
fn a_base_that_hesitates_is_waited_for() {
    let base = NbdBase::nbdkit(&[
        "--filter=delay",
        "memory",
        "8M",
        "wdelay=300ms",
        "rdelay=100ms",
    ]);
    let server = on(&base, "").start();
    let mut live = server.open_live("vda");
    live.write(100, b"late").unwrap();
    live.flush().unwrap();
    assert_eq!(live.read(100, 4).unwrap(), b"late");
}

#[test]
fn an_error_of_the_base_is_the_guests_and_the_chunk_is_marked() {
    let directory = temporary_directory();
    let errors = directory.path().join("errors");
    let file = format!("error-pwrite-file={}", path(&errors));
    let base = NbdBase::nbdkit(&[
        "--filter=error",
        "memory",
        "8M",
        "error-pwrite=EIO",
        "error-pwrite-rate=100%",
        &file,
    ]);
    let server = on(&base, "").start();
    let mut live = server.open_live("vda");
    live.write(0, &[1; 512]).unwrap();
    server.checkpoint("cp-b0");
    std::fs::write(&errors, "").unwrap();
    assert_eq!(live.write(CHUNK, &[2; 512]), Err(EIO));
    std::fs::remove_file(&errors).unwrap();
    live.write(5 * CHUNK, &[3; 512]).unwrap();
    server.begin("b1", &["--since", "cp-b0"]);
    let mut frozen = server.open_frozen("vda@b1", &["qemu:dirty-bitmap:cp-b0"]);
    let dirty: Vec<_> = frozen.map("qemu:dirty-bitmap:cp-b0");
    let dirty: Vec<_> = dirty.into_iter().filter(|extent| extent.2 == 1).collect();
    assert_eq!(dirty, [(CHUNK, CHUNK, 1), (5 * CHUNK, CHUNK, 1)]);
}

#[test]
fn a_base_that_stands_still_is_given_up_and_found_again() {
    let base = NbdBase::nbdkit(&["memory", "8M"]);
    let server = on(&base, ",reconnect=500ms").start();
    let mut live = server.open_live("vda");
    live.write(0, &[1; 512]).unwrap();
    base.signal(Signal::STOP);
    assert_eq!(live.write(0, &[2; 512]), Err(EIO));
    assert!(live.read(0, 512).is_err());
    let refused = server.cli(&["checkpoint", "create", "cp1"]);
    assert!(refused.error(1).contains("instant"), "{refused}");
    base.signal(Signal::CONT);
    server.wait_for_log("the base is back", 1);
    let found = live.read(0, 512).unwrap();
    assert!(found == [1; 512] || found == [2; 512], "{found:?}");
    live.write(0, &[3; 512]).unwrap();
    live.flush().unwrap();
    assert_eq!(live.read(0, 512).unwrap(), [3; 512]);
    server.checkpoint("cp1");
}
