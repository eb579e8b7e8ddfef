//! The server is killed at moments drawn from a seed, and the next one knows everything.
//!
//! `STILLPOINT_KILL_ROUNDS` sets how many kills there are; `STILLPOINT_SEED` picks one life.

mod life;

mod known;

use std::env;
use std::process::{Command, Stdio};

use stillpoint_tests::base::is_elsewhere;
use stillpoint_tests::process::KilledOnDrop;
use stillpoint_tests::{CHUNK, MIB, Server, seeds};

use life::Life;

const ROUNDS_PER_LIFE: u64 = 5;

#[test]
fn whenever_a_server_is_killed_the_next_one_knows_everything() {
    let rounds = env::var("STILLPOINT_KILL_ROUNDS").map_or(10, |n| n.parse().expect("a number"));
    let lives: Vec<u64> = (1..=u64::div_ceil(rounds, ROUNDS_PER_LIFE)).collect();
    for seed in seeds::seeds(&lives) {
        let mut life = Life::new(seed);
        for round in 0..ROUNDS_PER_LIFE {
            life.round(round);
        }
    }
}

#[test]
fn a_guest_that_reconnects_notices_nothing_of_a_kill() {
    let mut server = Server::with_disk(16 * MIB);
    server.checkpoint("cp1");
    let options = format!(
        "driver=nbd,server.type=unix,server.path={},export=vda,reconnect-delay=20",
        server.live().display()
    );
    let mut command = Command::new("qemu-io");
    command
        .args(["--image-opts", &options])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped());
    let mut guest = KilledOnDrop::spawn(&mut command);
    let mut input = guest.child.stdin.take().expect("piped");
    let mut output = std::io::BufReader::new(guest.child.stdout.take().expect("piped"));
    let mut tell = |line: &str| std::io::Write::write_all(&mut input, line.as_bytes()).unwrap();
    let mut hear = |wanted: &str| {
        let mut text = String::new();
        while !text.ends_with('\n') || !text.contains(wanted) {
            let length = std::io::BufRead::read_line(&mut output, &mut text).unwrap();
            assert!(length > 0, "qemu-io ended: {text}");
            assert!(!text.contains("failed") && !text.contains("rror"), "{text}");
        }
    };
    for round in 1..=3_u64 {
        tell(&format!("write -P {round} {} 64k\n", round * CHUNK));
        hear("wrote 65536/65536");
        server.kill();
        // Asked while nobody is there to answer.
        tell(&format!("write -P {round} {} 64k\n", (round + 4) * CHUNK));
        server.start();
        hear("wrote 65536/65536");
        tell(&format!("read -P {round} {} 64k\nflush\n", round * CHUNK));
        hear("read 65536/65536");
    }
    let dirty = server.dirty_bytes("cp1", "vda");
    if is_elsewhere() {
        // What another server may have lost with ours counts as changed.
        assert!(dirty >= 6 * CHUNK, "{dirty}");
    } else {
        assert_eq!(dirty, 6 * CHUNK);
    }
    tell("quit\n");
    assert!(guest.child.wait().unwrap().success());
}
