//! How long a guest waits while others do harm, as a table for docs/limits.md.
//!
//! Run by `scripts/hostile-figures`, by hand and on a machine that does nothing else.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use stillpoint_tests::attacks::{ATTACKS, Victim};
use stillpoint_tests::rude::private_memory;
use stillpoint_tests::{CHUNK, MIB, RawNbd, Server};

fn main() {
    println!("| attack | p99 undisturbed | p99 under attack | ratio | memory at most |");
    println!("| --- | --- | --- | --- | --- |");
    for (name, harm) in ATTACKS {
        let (server, victim) = server();
        let mut guest = server.open_live("vda");
        let mut most = 0;
        let mut undisturbed = waits(&mut guest, &server, &mut most);
        let over = AtomicBool::new(false);
        let attacked = std::thread::scope(|threads| {
            threads.spawn(|| {
                while !over.load(Ordering::Relaxed) {
                    let clients = harm(&victim);
                    let begun = Instant::now();
                    while begun.elapsed() < AGAIN && !over.load(Ordering::Relaxed) {
                        std::thread::park_timeout(Duration::from_millis(10));
                    }
                    drop(clients);
                }
            });
            let waits = waits(&mut guest, &server, &mut most);
            over.store(true, Ordering::Relaxed);
            waits
        });
        // Before and after, so that a machine that changes meanwhile is seen.
        undisturbed.extend(waits(&mut guest, &server, &mut most));
        let [calm, rough] = [undisturbed, attacked].map(p99);
        println!(
            "| {name} | {} us | {} us | {:.2} | {} MiB |",
            calm.as_micros(),
            rough.as_micros(),
            rough.as_secs_f64() / calm.as_secs_f64(),
            most / MIB
        );
    }
}

/// With the limits that it has unless told otherwise.
fn server() -> (Server, Victim) {
    let server = Server::builder()
        .disk("vda", SIZE)
        .arg("--live-listen=tcp:127.0.0.1:0")
        .arg("--backup-listen=tcp:127.0.0.1:0")
        .start();
    let mut guest = server.open_live("vda");
    for chunk in (0..SIZE / CHUNK).step_by(2) {
        guest.write(chunk * CHUNK, &[1; 4096]).expect("a write");
    }
    server.checkpoint("cp1");
    for chunk in (0..SIZE / CHUNK).step_by(4) {
        guest.write(chunk * CHUNK, &[2; 4096]).expect("a write");
    }
    server.begin("b1", &["--since", "cp1"]);
    let victim = Victim::new(&server, SIZE);
    (server, victim)
}

/// How long each of the guest's requests takes: 4 KiB, one after the other, as many reads as writes.
fn waits(guest: &mut RawNbd, server: &Server, most: &mut u64) -> Vec<Duration> {
    let mut waits = Vec::new();
    let begun = Instant::now();
    while begun.elapsed() < MEASURED {
        let offset = waits.len() as u64 * 7 % (SIZE / CHUNK) * CHUNK;
        let asked = Instant::now();
        if waits.len() % 2 == 0 {
            guest
                .write(offset, &[3; 4096])
                .expect("the guest can write");
        } else {
            guest.read(offset, 4096).expect("the guest can read");
        }
        waits.push(asked.elapsed());
        if waits.len() % 64 == 0 {
            *most = private_memory(server.pid()).max(*most);
        }
    }
    waits
}

fn p99(mut waits: Vec<Duration>) -> Duration {
    waits.sort();
    waits[waits.len() * 99 / 100]
}

const SIZE: u64 = 64 * MIB;

/// How long a guest is watched.
const MEASURED: Duration = Duration::from_secs(5);

/// When an attack is begun anew.
const AGAIN: Duration = Duration::from_millis(500);
