//! Clients that want to do harm. Whatever they do, the server's memory stays within what was agreed,
//! the guest goes on, others are served, and in the end everything is given back.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Instant;

use stillpoint_tests::attacks::{ATTACKS, Victim};
use stillpoint_tests::process::PATIENCE;
use stillpoint_tests::raw_nbd::command;
use stillpoint_tests::rude::{Heard, Rude, descriptors, private_memory, request};
use stillpoint_tests::{CHUNK, KIB, MIB, Server};

#[test]
fn a_handshake_byte_by_byte() {
    attack(0);
}

#[test]
fn a_payload_byte_by_byte() {
    attack(1);
}

#[test]
fn a_thousand_handshakes_half_open() {
    attack(2);
}

#[test]
fn options_of_4_gib() {
    attack(3);
}

#[test]
fn options_whose_answers_nobody_takes() {
    attack(4);
}

#[test]
fn block_status_of_everything_with_nobody_listening() {
    attack(5);
}

#[test]
fn the_longest_reads_with_nobody_listening() {
    attack(6);
}

#[test]
fn small_reads_with_nobody_listening() {
    attack(7);
}

#[test]
fn refused_requests_with_nobody_listening() {
    attack(8);
}

#[test]
fn payloads_that_stop_in_the_middle() {
    attack(9);
}

/// Somewhere to do harm.
struct Scene {
    server: Server,
    victim: Victim,
    /// How often the guest has been answered.
    answered: AtomicU64,
    /// The most memory that the server was seen to have.
    memory_most: AtomicU64,
    over: AtomicBool,
}

/// Lets one of the attacks happen to a server, sees that it does no harm, and that all is well
/// afterwards.
#[track_caller]
fn attack(number: usize) {
    let (what, harm) = ATTACKS[number];
    let scene = Scene::new();
    let pid = scene.server.pid();
    let before = (private_memory(pid), descriptors(pid));
    std::thread::scope(|threads| {
        let guest = threads.spawn(|| scene.be_a_guest());
        let over = Over(&scene.over);
        scene.guest_goes_on();

        let clients = harm(&scene.victim);
        for _ in 0..20 {
            scene.guest_goes_on();
        }
        // Others are served, at every socket.
        let live = scene.victim.live.iter().map(|address| (address, "vda"));
        let frozen = scene
            .victim
            .frozen
            .iter()
            .map(|address| (address, "vda@b1"));
        for (address, name) in live.chain(frozen) {
            let mut client = Rude::open(address, name, &[]);
            client.say(&request(command::READ, 1, 0, 64 * KIB as u32));
            let Heard::Bytes(heard) = client.hear(16 + 64 * KIB as usize, PATIENCE) else {
                panic!("no answer at {address:?}");
            };
            assert_eq!(heard[4..8], [0; 4], "{address:?}");
        }
        scene.server.is_well();
        drop(clients);
        drop(over);
        guest.join().expect("the guest goes on");
    });

    let most = scene.memory_most.load(Ordering::Relaxed);
    println!(
        "{what}: {} MiB before, {} MiB at most",
        before.0 / MIB,
        most / MIB
    );
    assert!(most < LIMIT + 64 * MIB, "{} MiB", most / MIB);
    let begun = Instant::now();
    loop {
        let after = (private_memory(pid), descriptors(pid));
        if after.0 < before.0 + KEPT_MAX && after.1 <= before.1 {
            println!(
                "given back after {:?}: {} MiB",
                begun.elapsed(),
                after.0 / MIB
            );
            break;
        }
        assert!(
            begun.elapsed() < PATIENCE,
            "not given back: {before:?}, {after:?}"
        );
        std::thread::yield_now();
    }
    scene.end();
}

/// Says so, however it ends.
struct Over<'a>(&'a AtomicBool);

impl Drop for Over<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

impl Scene {
    fn new() -> Self {
        let server = Server::builder()
            .disk("vda", SIZE)
            .arg("--connection-limit=64")
            .arg(&format!("--buffer-limit={LIMIT}"))
            .arg("--live-listen=tcp:127.0.0.1:0")
            .arg("--backup-listen=tcp:127.0.0.1:0")
            .start();
        let mut guest = server.open_live("vda");
        // As many extents, and as many dirty runs, as there can be.
        for chunk in (0..SIZE / CHUNK).step_by(2) {
            guest.write(chunk * CHUNK, &[1; 4096]).expect("a write");
        }
        server.checkpoint("cp1");
        for chunk in (0..SIZE / CHUNK).step_by(4) {
            guest.write(chunk * CHUNK, &[2; 4096]).expect("a write");
        }
        server.begin("b1", &["--since", "cp1"]);
        Self {
            victim: Victim::new(&server, SIZE),
            server,
            answered: AtomicU64::new(0),
            memory_most: AtomicU64::new(0),
            over: AtomicBool::new(false),
        }
    }

    /// Writes and reads until all is over, and looks at the server's memory meanwhile.
    fn be_a_guest(&self) {
        let mut guest = self.server.open_live("vda");
        let mut round = 0;
        while !self.over.load(Ordering::Relaxed) {
            let offset = round % (SIZE / CHUNK) * CHUNK + CHUNK / 2;
            let bytes = [round as u8; 4096];
            guest.write(offset, &bytes).expect("the guest can write");
            assert_eq!(
                guest.read(offset, 4096),
                Ok(bytes.to_vec()),
                "round {round}"
            );
            round += 1;
            self.answered.store(round, Ordering::Relaxed);
            let memory = private_memory(self.server.pid());
            self.memory_most.fetch_max(memory, Ordering::Relaxed);
        }
    }

    /// Waits until the guest has been answered some times more.
    #[track_caller]
    fn guest_goes_on(&self) {
        let enough = self.answered.load(Ordering::Relaxed) + 10;
        let begun = Instant::now();
        while self.answered.load(Ordering::Relaxed) < enough {
            assert!(begun.elapsed() < PATIENCE, "the guest waits");
            std::thread::yield_now();
        }
    }

    fn end(mut self) {
        self.server.commit("b1");
        self.server.stop();
    }
}

const SIZE: u64 = 64 * MIB;

/// As little as goes with 64 connections of each role.
const LIMIT: u64 = 224 * MIB;

/// What the allocator may keep of what was given back to it.
const KEPT_MAX: u64 = 64 * MIB;
