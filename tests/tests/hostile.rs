//! Clients that want to do harm. Whatever they do, the server's memory stays within what was agreed,
//! the guest goes on, others are served, and in the end everything is given back.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use stillpoint_tests::process::PATIENCE;
use stillpoint_tests::raw_nbd::{command, option};
use stillpoint_tests::rude::request;
use stillpoint_tests::rude::{Address, Rude, descriptors, go, option_message, private_memory};
use stillpoint_tests::{CHUNK, KIB, MIB, Server};

#[test]
fn a_handshake_byte_by_byte() {
    attack(|scene| {
        // Each would take hours.
        let mut clients: Vec<_> = scene.addresses().map(|to| Rude::connect(&to)).collect();
        for byte in [&3u32.to_be_bytes()[..], &go("vda")].concat() {
            for client in &mut clients {
                client.push(&[byte], NO_TIME);
            }
            scene.guest_goes_on();
        }
        clients
    });
}

#[test]
fn a_payload_byte_by_byte() {
    attack(|scene| {
        let mut clients: Vec<_> = (0..8).map(|_| scene.open_live()).collect();
        for client in &mut clients {
            client.say(&request(command::WRITE, 1, 0, 32 * MIB as u32));
        }
        for _ in 0..32 {
            for client in &mut clients {
                client.push(&[0], NO_TIME);
            }
            scene.guest_goes_on();
        }
        clients
    });
}

#[test]
fn a_thousand_handshakes_half_open() {
    attack(|scene| {
        let addresses: Vec<_> = scene.addresses().collect();
        let half_open = |number: usize| Rude::try_connect(&addresses[number % addresses.len()]);
        (0..1000)
            .filter_map(|number| half_open(number).ok())
            .collect()
    });
}

#[test]
fn options_of_4_gib() {
    attack(|scene| {
        let mut clients: Vec<_> = scene.addresses().map(|to| Rude::greeted(&to)).collect();
        for client in &mut clients {
            let mut head = option_message(option::SET_META_CONTEXT, &[]);
            head[12..].copy_from_slice(&u32::MAX.to_be_bytes());
            client.say(&head);
            client.push(&vec![0; 4 * MIB as usize], BRIEFLY);
        }
        clients
    });
}

#[test]
fn options_whose_answers_nobody_takes() {
    attack(|scene| {
        let mut clients: Vec<_> = (0..8)
            .flat_map(|_| scene.addresses())
            .map(|to| Rude::greeted(&to))
            .collect();
        let list = option_message(option::LIST, &[]).repeat(900);
        for client in &mut clients {
            client.push(&list, BRIEFLY);
        }
        clients
    });
}

#[test]
fn block_status_of_everything_over_and_over_with_nobody_listening() {
    attack(|scene| {
        let contexts = [
            "base:allocation",
            "qemu:allocation-depth",
            "qemu:dirty-bitmap:cp1",
        ];
        let ask = request(command::BLOCK_STATUS, 1, 0, SIZE as u32).repeat(256);
        let mut clients: Vec<_> = (0..32).map(|_| scene.open_frozen(&contexts)).collect();
        clients.extend((0..32).map(|_| Rude::open(&scene.live, "vda", &contexts[..2])));
        for client in &mut clients {
            client.push(&ask, BRIEFLY);
        }
        clients
    });
}

#[test]
fn the_longest_reads_over_many_connections_with_nobody_listening() {
    attack(|scene| {
        let ask = request(command::READ, 1, 0, 32 * MIB as u32).repeat(64);
        let mut clients: Vec<_> = (0..32).map(|_| scene.open_frozen(&[])).collect();
        clients.extend((0..32).map(|_| scene.open_live()));
        for client in &mut clients {
            client.push(&ask, BRIEFLY);
        }
        clients
    });
}

#[test]
fn small_reads_in_any_number_with_nobody_listening() {
    attack(|scene| {
        let ask = request(command::READ, 1, 0, 64 * KIB as u32).repeat(4096);
        let mut clients: Vec<_> = (0..32).map(|_| scene.open_frozen(&[])).collect();
        clients.extend((0..32).map(|_| scene.open_live()));
        for client in &mut clients {
            client.push(&ask, BRIEFLY);
        }
        clients
    });
}

#[test]
fn requests_that_are_refused_in_any_number_with_nobody_listening() {
    attack(|scene| {
        let ask = request(77, 1, 0, 0).repeat(64 << 10);
        let mut clients: Vec<_> = (0..16).map(|_| scene.open_frozen(&[])).collect();
        clients.extend((0..16).map(|_| scene.open_live()));
        for client in &mut clients {
            client.push(&ask, BRIEFLY);
        }
        clients
    });
}

#[test]
fn writers_that_stop_in_the_middle_of_the_longest_payload() {
    attack(|scene| {
        let most = vec![7; 32 * MIB as usize - 1];
        let mut clients: Vec<_> = (0..32).map(|_| scene.open_live()).collect();
        for client in &mut clients {
            client.say(&request(command::WRITE, 1, 0, 32 * MIB as u32));
            client.push(&most, BRIEFLY);
        }
        clients
    });
}

/// Somewhere to do harm.
struct Scene {
    server: Server,
    live: Address,
    live_tcp: Address,
    frozen: Address,
    frozen_tcp: Address,
    /// How often the guest has been answered.
    answered: AtomicU64,
    /// The most memory that the server was seen to have.
    memory_most: AtomicU64,
    over: AtomicBool,
}

/// Lets `harm` happen to a server, sees that it does none, and that all is well afterwards.
#[track_caller]
fn attack(harm: impl FnOnce(&Scene) -> Vec<Rude>) {
    let scene = Scene::new();
    let pid = scene.server.pid();
    let before = (private_memory(pid), descriptors(pid));
    std::thread::scope(|threads| {
        let guest = threads.spawn(|| scene.be_a_guest());
        let over = Over(&scene.over);
        scene.guest_goes_on();

        let clients = harm(&scene);
        for _ in 0..20 {
            scene.guest_goes_on();
        }
        // Others are served, at every socket.
        for (address, name) in [
            (&scene.live, "vda"),
            (&scene.live_tcp, "vda"),
            (&scene.frozen, "vda@b1"),
            (&scene.frozen_tcp, "vda@b1"),
        ] {
            let mut client = Rude::open(address, name, &[]);
            client.say(&request(command::READ, 1, 0, 64 * KIB as u32));
            let heard = client.hear(16 + 64 * KIB as usize, PATIENCE);
            let stillpoint_tests::rude::Heard::Bytes(heard) = heard else {
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
        "memory: {} MiB before, {} MiB at most",
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
            live: Address::unix(&server.live()),
            live_tcp: Address::tcp(&server, "live"),
            frozen: Address::unix(&server.frozen()),
            frozen_tcp: Address::tcp(&server, "backups"),
            server,
            answered: AtomicU64::new(0),
            memory_most: AtomicU64::new(0),
            over: AtomicBool::new(false),
        }
    }

    fn addresses(&self) -> impl Iterator<Item = Address> {
        [&self.live, &self.live_tcp, &self.frozen, &self.frozen_tcp]
            .map(Clone::clone)
            .into_iter()
    }

    fn open_live(&self) -> Rude {
        Rude::open(&self.live, "vda", &[])
    }

    fn open_frozen(&self, contexts: &[&str]) -> Rude {
        Rude::open(&self.frozen, "vda@b1", contexts)
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

/// A client that waits for nothing.
const NO_TIME: Duration = Duration::ZERO;

/// How long a server may take nothing before a client sees that it will not.
const BRIEFLY: Duration = Duration::from_millis(20);
