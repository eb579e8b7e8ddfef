//! Clients that are killed, or behave badly, trouble nobody else.

use std::process::{Command, Stdio};

use rustix::process::Signal;
use stillpoint_tests::process::KilledOnDrop;
use stillpoint_tests::raw_nbd::{command, flag, option};
use stillpoint_tests::tools::nbdinfo_map;
use stillpoint_tests::{CHUNK, Guest, MIB, RawNbd, Server};

const SIZE: u64 = 16 * MIB;

/// A server with a guest and an open backup of the guest's disk.
struct Scene {
    server: Server,
    guest: Guest,
    then: Vec<u8>,
}

impl Scene {
    fn new() -> Self {
        let server = Server::with_disk(SIZE);
        let mut guest = Guest::new(&server, "vda");
        guest.write(0, &vec![1; 8 * MIB as usize]);
        server.checkpoint("cp1");
        guest.touched.clear();
        guest.write(3 * CHUNK, &[2; 4096]);
        server.begin("b1", &["--since", "cp1"]);
        let then = guest.disk.clone();
        Self {
            server,
            guest,
            then,
        }
    }

    /// Server, guest and backup go on, and can end well.
    fn goes_on(mut self) {
        self.server.is_well();
        self.guest.write(5 * CHUNK, &[3; 4096]);
        let mut frozen = self.server.open_frozen("vda@b1", &[]);
        assert!(frozen.read_all() == self.then, "the frozen bytes moved");
        self.server.commit("b1");
        self.server.stop();
    }
}

#[test]
fn a_reader_killed_in_the_middle_of_a_read() {
    let scene = Scene::new();
    for _ in 0..20 {
        let mut nbd = scene.server.open_frozen("vda@b1", &[]);
        let (sender, receiver) = nbd.halves();
        for cookie in 0..16 {
            let offset = cookie * MIB % SIZE;
            sender
                .request((command::READ, 0), cookie, offset, MIB as u32, &[])
                .unwrap();
        }
        receiver.chunk().expect("the first part of an answer");
        nbd.hang_up();
    }
    scene.goes_on();
}

#[test]
fn nbdcopy_killed_in_the_middle_of_a_pull() {
    let scene = Scene::new();
    let uri = scene.server.frozen_uri("vda@b1");
    // Nobody reads the pipe, so that it cannot come to an end.
    let mut nbdcopy = Command::new("nbdcopy");
    let mut nbdcopy = KilledOnDrop::spawn(nbdcopy.args([&uri, "-"]).stdout(Stdio::piped()));
    let pipe = nbdcopy.child.stdout.take().expect("it was asked for");
    nbdcopy.wait_until_readable(&pipe);
    drop(nbdcopy);
    scene.goes_on();
}

#[test]
fn a_reader_that_asks_and_never_listens() {
    let mut scene = Scene::new();
    let mut deaf = scene.server.open_frozen("vda@b1", &[]);
    let (sender, _) = deaf.halves();
    for cookie in 0..256 {
        sender
            .request((command::READ, 0), cookie, 0, MIB as u32, &[])
            .unwrap();
    }
    for round in 0..64 {
        scene.guest.write(round * CHUNK, &[4; 8192]);
    }
    scene.goes_on();
    drop(deaf);
}

#[test]
fn a_writer_killed_before_its_payload_was_complete_never_began() {
    let scene = Scene::new();
    for sent in [0, 1, 4096, CHUNK as usize - 1] {
        let mut nbd = scene.server.open_live("vda");
        let (sender, _) = nbd.halves();
        let part = vec![9; sent];
        sender
            .request((command::WRITE, 0), 1, 10 * CHUNK, CHUNK as u32, &part)
            .unwrap();
        nbd.hang_up();
    }
    let now = scene
        .server
        .open_live("vda")
        .read(10 * CHUNK, CHUNK as u32)
        .unwrap();
    assert!(
        now == scene.guest.disk[10 * CHUNK as usize..][..CHUNK as usize],
        "half a write"
    );
    scene.goes_on();
}

#[test]
fn a_writer_killed_before_the_answer_has_written_all_or_nothing_and_it_is_marked() {
    // Each over the border of two chunks, so that a missing mark shows on either side.
    const LENGTH: u64 = CHUNK / 2;
    let scene = Scene::new();
    let offsets: Vec<u64> = (65..128)
        .step_by(2)
        .map(|border| border * CHUNK - LENGTH / 2)
        .collect();
    for offset in &offsets {
        let mut nbd = scene.server.open_live("vda");
        let (sender, _) = nbd.halves();
        let payload = vec![9; LENGTH as usize];
        sender
            .request((command::WRITE, 0), 1, *offset, LENGTH as u32, &payload)
            .unwrap();
        nbd.hang_up();
    }
    // The freeze waits for whatever is under way.
    scene.server.begin("b2", &["--since", "cp1"]);
    let frozen = scene.server.open_frozen("vda@b2", &[]).read_all();
    let map = nbdinfo_map(&scene.server.frozen_uri("vda@b2"), "qemu:dirty-bitmap:cp1");
    for offset in offsets {
        let bytes = &frozen[offset as usize..][..LENGTH as usize];
        let whole = bytes.iter().all(|byte| *byte == bytes[0]);
        assert!(
            whole && [1, 9].contains(&bytes[0]),
            "half of the write at {offset}"
        );
    }
    for (chunk, (now, then)) in frozen
        .chunks(CHUNK as usize)
        .zip(scene.then.chunks(CHUNK as usize))
        .enumerate()
    {
        let start = chunk as u64 * CHUNK;
        let extent = map
            .iter()
            .find(|extent| start < extent.0 + extent.1)
            .expect("a whole map");
        assert!(
            now == then || extent.2 == 1,
            "chunk {chunk} changed and is clean"
        );
    }
    scene.server.abort("b2");
    scene.server.is_well();
    let mut frozen = scene.server.open_frozen("vda@b1", &[]);
    assert!(frozen.read_all() == scene.then, "the frozen bytes moved");
}

#[test]
fn a_client_killed_anywhere_in_the_handshake() {
    let scene = Scene::new();
    for (socket, name) in [
        (scene.server.live(), "vda"),
        (scene.server.frozen(), "vda@b1"),
    ] {
        let mut words = 3u32.to_be_bytes().to_vec();
        let go = [
            &(name.len() as u32).to_be_bytes()[..],
            name.as_bytes(),
            &[0, 0],
        ]
        .concat();
        for (option, data) in [(option::STRUCTURED_REPLY, vec![]), (option::GO, go)] {
            words.extend(b"IHAVEOPT");
            words.extend(option.to_be_bytes());
            words.extend((data.len() as u32).to_be_bytes());
            words.extend(data);
        }
        for length in 0..=words.len() {
            let mut nbd = RawNbd::connect_silently(&socket);
            // The server may be done with us already.
            let _ = nbd.send_raw(&words[..length]);
            nbd.hang_up();
        }
    }
    scene.goes_on();
}

#[test]
fn what_is_in_flight_at_a_stop_is_answered() {
    const READS: u64 = 8;
    // Together no more than what is begun before the first is taken.
    const LENGTH: u64 = 128 << 10;
    const WRITES: u64 = 200;
    let mut scene = Scene::new();
    let mut reader = scene.server.open_frozen("vda@b1", &[]);
    let (sender, reads) = reader.halves();
    for cookie in 0..READS {
        sender
            .request(
                (command::READ, 0),
                cookie,
                cookie * LENGTH,
                LENGTH as u32,
                &[],
            )
            .unwrap();
    }
    let mut guest = scene.server.open_live("vda");
    let (sender, writes) = guest.halves();
    for cookie in 0..WRITES {
        let offset = 8 * MIB + cookie * 8192;
        sender
            .request((command::WRITE, flag::FUA), cookie, offset, 512, &[9; 512])
            .unwrap();
    }
    // Nothing has been received yet, and the server has begun all of it.
    let mut other = scene.server.open_live("vda");
    while scene.server.bytes_read("b1", "vda", "vda@b1") < READS * LENGTH {}
    while other.read(8 * MIB + (WRITES - 1) * 8192, 1) != Ok(vec![9]) {}

    scene.server.signal(Signal::TERM);
    for (receiver, count) in [(reads, READS), (writes, WRITES)] {
        let mut answered: Vec<_> = (0..count)
            .map(|_| receiver.answer().expect("an answer to what was begun"))
            .collect();
        answered.sort_by_key(|answer| answer.cookie);
        assert!(answered.iter().all(|answer| answer.error == 0));
        assert!(answered.iter().map(|answer| answer.cookie).eq(0..count));
        assert!(receiver.answer().is_err(), "the server hangs up");
    }
    assert!(scene.server.wait().success());
    let disk = std::fs::read(scene.server.image("vda")).unwrap();
    for write in 0..WRITES {
        let at = (8 * MIB + write * 8192) as usize;
        assert_eq!(disk[at..at + 512], [9; 512], "write {write}");
    }
}

#[test]
fn clients_that_connect_and_stay_silent_keep_nobody_out() {
    let scene = Scene::new();
    let silent: Vec<_> = (0..64)
        .map(|_| RawNbd::connect_silently(&scene.server.frozen()))
        .chain((0..64).map(|_| RawNbd::connect_silently(&scene.server.live())))
        .collect();
    scene.goes_on();
    drop(silent);
}

#[test]
fn more_backup_clients_than_there_is_room_for_make_room_for_each_other_and_nobody_else_waits() {
    let mut scene = Scene::new();
    let silent: Vec<_> = (0..400)
        .map(|_| RawNbd::connect_silently(&scene.server.frozen()))
        .collect();
    // The guest, a second one, and whoever begins a backup, which takes descriptors too.
    scene.guest.write(0, &[5; 4096]);
    assert_eq!(scene.server.open_live("vda").read(0, 1), Ok(vec![5]));
    scene.server.begin("b2", &[]);
    let descriptors = format!("/proc/{}/fd", scene.server.pid());
    let count = std::fs::read_dir(descriptors)
        .expect("a live process")
        .count();
    assert!(count < 350, "{count} descriptors");
    drop(silent);
    scene.server.abort("b2");
    scene.goes_on();
}

#[test]
fn more_control_clients_than_there_may_be_are_turned_away_with_a_reason() {
    let server = Server::with_disk(MIB);
    let mut clients: Vec<_> = (0..128).map(|_| server.qmp()).collect();
    let refused = server.cli(&["status"]);
    assert!(refused.error(1).contains("128 clients"), "{refused}");
    // Those who are there are served, and a place that becomes free is taken.
    clients[127].execute("query-status", &serde_json::json!({}));
    drop(clients.pop());
    server.cli(&["status", "--wait", "20"]).ok();
}
