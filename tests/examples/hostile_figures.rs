//! How long a guest waits while others do harm, as a table for docs/limits.md.
//!
//! Run by `scripts/hostile-figures`, by hand and on a machine that does nothing else.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use rustix::process::setpriority_process;
use stillpoint_tests::attacks::{ATTACKS, Victim};
use stillpoint_tests::rude::{Rude, private_memory};
use stillpoint_tests::{CHUNK, MIB, RawNbd, Server};

fn main() {
    let wanted = std::env::args().nth(1).unwrap_or_default();
    println!("| attack | p99 undisturbed | p99 under attack | ratio | memory at most |");
    println!("| --- | --- | --- | --- | --- |");
    for (name, harm) in ATTACKS {
        if !name.contains(&wanted) {
            continue;
        }
        let (server, victim) = server();
        let mut guest = server.open_live("vda");
        let mut most = 0;
        let mut calm = vec![p99(waits(&mut guest, &server, &mut most))];
        let mut rough = Vec::new();
        for _ in 0..ROUNDS {
            rough.push(p99(while_harmed(harm, &victim, || {
                waits(&mut guest, &server, &mut most)
            })));
            calm.push(p99(waits(&mut guest, &server, &mut most)));
        }
        // Of each round, compared with what was before and after it.
        let ratios = rough.iter().zip(calm.windows(2)).map(|(rough, calm)| {
            let calm = (calm[0] + calm[1]) / 2;
            rough.as_secs_f64() / calm.as_secs_f64()
        });
        let ratio = median(ratios.collect());
        let [calm, rough] = [calm, rough].map(|p99s| {
            let p99s = p99s.iter().map(Duration::as_secs_f64);
            (median(p99s.collect()) * 1e6).round()
        });
        println!(
            "| {name} | {calm} us | {rough} us | {ratio:.2} | {} MiB |",
            most / MIB
        );
    }
}

/// What comes of `watch` while an attack is made, anew every now and then.
fn while_harmed<T>(
    harm: fn(&Victim) -> Vec<Rude>,
    victim: &Victim,
    watch: impl FnOnce() -> T,
) -> T {
    let over = AtomicBool::new(false);
    std::thread::scope(|threads| {
        threads.spawn(|| {
            // Those that do harm have processors of their own elsewhere: they take little of these.
            setpriority_process(None, 19).expect("a thread can be nice");
            while !over.load(Ordering::Relaxed) {
                let clients = harm(victim);
                let begun = Instant::now();
                while begun.elapsed() < AGAIN && !over.load(Ordering::Relaxed) {
                    std::thread::park_timeout(Duration::from_millis(10));
                }
                drop(clients);
            }
        });
        let seen = watch();
        over.store(true, Ordering::Relaxed);
        seen
    })
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

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

/// How often a guest is watched under each attack, and once more without: a machine that changes
/// meanwhile is seen.
const ROUNDS: usize = 3;

/// How long a guest is watched each time.
const MEASURED: Duration = Duration::from_millis(2500);

/// When an attack is begun anew.
const AGAIN: Duration = Duration::from_millis(500);
