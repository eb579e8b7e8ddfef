//! What a client can do that wants to do harm.
//!
//! Each attack leaves its connections open, and in the state that costs the server most.

use std::time::Duration;

use crate::raw_nbd::{command, option};
use crate::rude::{Address, Rude, go, option_message, request};
use crate::{KIB, MIB, Server};

/// A server with a disk `vda`, and a backup `b1` of it since `cp1`, at both kinds of socket.
#[derive(Debug)]
pub struct Victim {
    /// Where its live exports are.
    pub live: [Address; 2],
    /// Where its frozen ones are.
    pub frozen: [Address; 2],
    /// The size of the disk.
    pub size: u64,
}

/// An attack, as a sentence has it.
pub type Attack = (&'static str, fn(&Victim) -> Vec<Rude>);

/// All of them.
pub const ATTACKS: [Attack; 10] = [
    ("a handshake byte by byte", slow_handshake),
    ("a payload byte by byte", slow_payload),
    ("a thousand handshakes half open", half_open_handshakes),
    ("options of 4 GiB", long_options),
    ("options whose answers nobody takes", deaf_options),
    (
        "block status of everything, nobody listens",
        deaf_block_status,
    ),
    ("the longest reads, nobody listens", deaf_long_reads),
    ("small reads, nobody listens", deaf_small_reads),
    ("refused requests, nobody listens", deaf_refused),
    ("payloads that stop in the middle", unfinished_payloads),
];

impl Victim {
    /// A server that was told to listen on port 0 of 127.0.0.1 for both kinds of exports.
    #[track_caller]
    pub fn new(server: &Server, size: u64) -> Self {
        Self {
            live: [Address::unix(&server.live()), Address::tcp(server, "live")],
            frozen: [
                Address::unix(&server.frozen()),
                Address::tcp(server, "backups"),
            ],
            size,
        }
    }

    fn addresses(&self) -> impl Iterator<Item = &Address> + Clone {
        self.live.iter().chain(&self.frozen)
    }

    /// So many connections to the live export, and as many to the frozen one.
    fn open(&self, count: usize) -> Vec<Rude> {
        let live = (0..count).map(|_| Rude::open(&self.live[0], "vda", &[]));
        let frozen = (0..count).map(|_| Rude::open(&self.frozen[0], "vda@b1", &[]));
        live.chain(frozen).collect()
    }
}

fn slow_handshake(victim: &Victim) -> Vec<Rude> {
    let mut clients: Vec<_> = victim.addresses().map(Rude::connect).collect();
    for byte in [&3u32.to_be_bytes()[..], &go("vda")].concat() {
        for client in &mut clients {
            client.push(&[byte], NO_TIME);
        }
    }
    clients
}

fn slow_payload(victim: &Victim) -> Vec<Rude> {
    let mut clients: Vec<_> = (0..8)
        .map(|_| Rude::open(&victim.live[0], "vda", &[]))
        .collect();
    for client in &mut clients {
        client.say(&request(command::WRITE, 1, 0, 32 * MIB as u32));
    }
    for _ in 0..1000 {
        for client in &mut clients {
            client.push(&[0], NO_TIME);
        }
    }
    clients
}

fn half_open_handshakes(victim: &Victim) -> Vec<Rude> {
    let addresses = victim.addresses().cycle().take(1000);
    addresses
        .filter_map(|address| Rude::try_connect(address).ok())
        .collect()
}

fn long_options(victim: &Victim) -> Vec<Rude> {
    let mut clients: Vec<_> = victim.addresses().map(Rude::greeted).collect();
    for client in &mut clients {
        let mut head = option_message(option::SET_META_CONTEXT, &[]);
        head[12..].copy_from_slice(&u32::MAX.to_be_bytes());
        client.say(&head);
        client.push(&vec![0; 4 * MIB as usize], BRIEFLY);
    }
    clients
}

fn deaf_options(victim: &Victim) -> Vec<Rude> {
    let addresses = victim.addresses().cycle().take(32);
    let mut clients: Vec<_> = addresses.map(Rude::greeted).collect();
    ask_all(&mut clients, &option_message(option::LIST, &[]).repeat(900));
    clients
}

fn deaf_block_status(victim: &Victim) -> Vec<Rude> {
    let contexts = [
        "base:allocation",
        "qemu:allocation-depth",
        "qemu:dirty-bitmap:cp1",
    ];
    let frozen = (0..32).map(|_| Rude::open(&victim.frozen[0], "vda@b1", &contexts));
    let live = (0..32).map(|_| Rude::open(&victim.live[0], "vda", &contexts[..2]));
    let mut clients: Vec<_> = frozen.chain(live).collect();
    let everything = request(command::BLOCK_STATUS, 1, 0, victim.size as u32);
    ask_all(&mut clients, &everything.repeat(256));
    clients
}

fn deaf_long_reads(victim: &Victim) -> Vec<Rude> {
    let mut clients = victim.open(32);
    let longest = request(command::READ, 1, 0, 32 * MIB as u32);
    ask_all(&mut clients, &longest.repeat(64));
    clients
}

fn deaf_small_reads(victim: &Victim) -> Vec<Rude> {
    let mut clients = victim.open(32);
    let small = request(command::READ, 1, 0, 64 * KIB as u32);
    ask_all(&mut clients, &small.repeat(4096));
    clients
}

fn deaf_refused(victim: &Victim) -> Vec<Rude> {
    let mut clients = victim.open(16);
    ask_all(&mut clients, &request(77, 1, 0, 0).repeat(64 << 10));
    clients
}

fn unfinished_payloads(victim: &Victim) -> Vec<Rude> {
    let mut clients: Vec<_> = (0..32)
        .map(|_| Rude::open(&victim.live[0], "vda", &[]))
        .collect();
    let head = request(command::WRITE, 1, 0, 32 * MIB as u32);
    let most = vec![7; 32 * MIB as usize - 1];
    ask_all(&mut clients, &[head, most].concat());
    clients
}

/// Says this to all, as far as they listen.
fn ask_all(clients: &mut [Rude], words: &[u8]) {
    for client in clients {
        client.push(words, BRIEFLY);
    }
}

/// A client that waits for nothing.
const NO_TIME: Duration = Duration::ZERO;

/// How long a server may take nothing before a client sees that it will not.
const BRIEFLY: Duration = Duration::from_millis(50);
