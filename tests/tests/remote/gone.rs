//! The base is killed and started again, is gone for long, or comes back as something else.

use std::fs;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use rand::Rng as _;
use stillpoint_tests::seeds::{self, Rng, number};
use stillpoint_tests::server::temporary_directory;
use stillpoint_tests::shadow::{Change, Event, SECTOR};
use stillpoint_tests::tools::{path, sparse_file, tool};
use stillpoint_tests::{CHUNK, KIB, MIB, NbdBase, RawNbd, Server, Shadow};

use super::{SIZE, image, on};

const EIO: u32 = 5;
const WRITERS: u64 = 3;
/// Each belongs to one writer.
const UNIT: u64 = 16 * KIB;

/// Writes that wait for a base to come back are waited for.
const PATIENTLY: &str = "--freeze-timeout=60s";

/// Writes, zeroes and flushes in units of its own until `stop`; all of it must succeed.
fn write(
    mut live: RawNbd,
    writer: u64,
    rng: &mut Rng,
    clock: &AtomicU64,
    stop: &AtomicBool,
) -> Vec<Event> {
    let tick = || clock.fetch_add(1, Ordering::SeqCst);
    let mut events = Vec::new();
    while !stop.load(Ordering::Acquire) {
        let unit = rng.random_range(0..SIZE / UNIT / WRITERS) * WRITERS + writer;
        let offset = unit * UNIT + SECTOR * rng.random_range(0..16);
        let length = SECTOR * rng.random_range(1..=16);
        let issued = tick();
        let change = match rng.random_range(0..10) {
            0 => {
                live.flush().expect("the guest can flush");
                continue;
            }
            1 => {
                live.zeroes(offset, length as u32, 0)
                    .expect("the guest can zero");
                Change::Fill(0)
            }
            _ => {
                let stamp = issued + 1;
                let bytes = stamp.to_le_bytes().repeat(length as usize / 8);
                live.write(offset, &bytes).expect("the guest can write");
                Change::Fill(stamp)
            }
        };
        events.push(Event {
            offset,
            length,
            change,
            issued,
            ended: tick(),
            acknowledged: true,
        });
    }
    events
}

/// Guests write, the base is killed and comes back, instants are taken: all at once.
fn load(server: &Server, base: &mut NbdBase, kills: u64, seed: u64) {
    let (clock, stop) = (AtomicU64::new(1), AtomicBool::new(false));
    let mut rng = seeds::rng(seed);
    let mut rngs: Vec<Rng> = (0..WRITERS).map(|n| seeds::rng(seed * 100 + n)).collect();
    let mut instants = Vec::new();
    server.checkpoint("cp0");
    let mut since = ("cp0".to_owned(), (0, 0));
    let events: Vec<Event> = std::thread::scope(|scope| {
        let writers: Vec<_> = (0..)
            .zip(&mut rngs)
            .map(|(writer, rng)| {
                let live = server.open_live("vda");
                let (clock, stop) = (&clock, &stop);
                scope.spawn(move || write(live, writer, rng, clock, stop))
            })
            .collect();
        for kill in 0..kills {
            let target = clock.load(Ordering::SeqCst) + rng.random_range(1..400);
            while clock.load(Ordering::SeqCst) < target {
                std::thread::yield_now();
            }
            base.kill();
            base.start();
            let id = format!("b{kill}");
            let begun = clock.fetch_add(1, Ordering::SeqCst);
            let next = format!("cp-{id}");
            server.begin(&id, &["--since", &since.0, "--checkpoint", &next]);
            let taken = (begun, clock.fetch_add(1, Ordering::SeqCst));
            let context = format!("qemu:dirty-bitmap:{}", since.0);
            let mut frozen = server.open_frozen(&format!("vda@{id}"), &[&context]);
            let (bytes, map) = (frozen.read_all(), frozen.map(&context));
            server.commit(&id);
            instants.push((id, (since.1, taken), bytes, map));
            since = (next, taken);
        }
        stop.store(true, Ordering::Release);
        let ended = writers
            .into_iter()
            .flat_map(|writer| writer.join().unwrap());
        ended.collect()
    });
    let mut shadow = Shadow::new(SIZE, CHUNK);
    shadow.add(events);
    for (id, (from, taken), bytes, map) in instants {
        let what = format!("seed {seed}, backup {id}");
        shadow.check_bytes(&bytes, taken, &what);
        let (must, _) = shadow.must_and_may(from, taken);
        let dirty = shadow.dirty(&map);
        let missing: Vec<_> = must.difference(&dirty).collect();
        assert!(missing.is_empty(), "{what}: chunks {missing:?} are clean");
    }
    let now = clock.load(Ordering::SeqCst) + 1;
    let bytes = server.open_live("vda").read_all();
    shadow.check_bytes(&bytes, (now, now), &format!("seed {seed}, the live disk"));
}

#[test]
fn a_base_that_is_killed_under_load_and_comes_back_has_lost_nothing() {
    for seed in seeds::seeds(&[1, 2]) {
        let directory = temporary_directory();
        let image = image(&directory);
        let mut base = NbdBase::file(&image);
        let mut server = on(&base, "").arg(PATIENTLY).start();
        load(&server, &mut base, number("STILLPOINT_BASE_KILLS", 4), seed);
        let bytes = server.open_live("vda").read_all();
        server.stop();
        assert!(fs::read(&image).unwrap() == bytes, "seed {seed}");
    }
}

#[test]
fn what_a_qemu_nbd_had_in_memory_when_it_was_killed_is_given_to_the_next() {
    for seed in seeds::seeds(&[3, 4]) {
        let directory = temporary_directory();
        let qcow2 = directory.path().join("image.qcow2");
        tool("qemu-img", &["create", "-f", "qcow2", path(&qcow2), "8M"]).ok();
        let mut base = NbdBase::qemu_nbd(&["--format=qcow2", path(&qcow2)]);
        let server = on(&base, "").arg(PATIENTLY).start();
        load(&server, &mut base, number("STILLPOINT_BASE_KILLS", 4), seed);
    }
}

#[test]
fn a_base_that_is_gone_for_long_is_an_error_until_it_is_back() {
    let directory = temporary_directory();
    let mut base = NbdBase::file(&image(&directory));
    let mut server = on(&base, ",reconnect=3s").start();
    let mut live = server.open_live("vda");
    live.write(0, &[1; 512]).unwrap();
    base.kill();
    assert_eq!(live.write(0, &[2; 512]), Err(EIO));
    assert_eq!(live.read(0, 512), Err(EIO));
    assert_eq!(live.flush(), Err(EIO));
    let refused = server.cli(&["backup", "begin"]);
    assert!(refused.error(1).contains("durable"), "{refused}");
    base.start();
    server.wait_for_log("the base is back", 1);
    assert_eq!(live.read(0, 512).unwrap(), [1; 512]);
    // That nobody answered proves nothing about what was written before.
    live.write(0, &[3; 512]).unwrap();
    live.flush().unwrap();
    server.begin("b1", &[]);
    server.stop();
}

#[test]
fn a_base_that_comes_back_with_another_size_is_not_used() {
    let directory = temporary_directory();
    let (image, other) = (image(&directory), directory.path().join("other"));
    let mut base = NbdBase::file(&image);
    let server = on(&base, ",reconnect=3s").start();
    let mut live = server.open_live("vda");
    live.write(0, &[1; 512]).unwrap();
    for size in [SIZE / 2, 2 * SIZE] {
        sparse_file(&other, size);
        base.kill();
        base.start_with(&["file", path(&other)]);
        assert_eq!(live.read(0, 512), Err(EIO), "{size}");
        assert_eq!(live.write(0, &[2; 512]), Err(EIO), "{size}");
        assert!(
            fs::read(&other).unwrap().iter().all(|byte| *byte == 0),
            "{size}"
        );
        server.wait_for_log(&format!("came back with {size}"), 1);
        fs::remove_file(&other).unwrap();
    }
    base.kill();
    base.start_with(&["file", path(&image)]);
    server.wait_for_log("the base is back", 1);
    assert_eq!(live.read(0, 512).unwrap(), [1; 512]);
}

#[test]
fn more_than_is_kept_in_memory_is_flushed_in_time() {
    let directory = temporary_directory();
    let qcow2 = directory.path().join("image.qcow2");
    tool("qemu-img", &["create", "-f", "qcow2", path(&qcow2), "64M"]).ok();
    let mut base = NbdBase::qemu_nbd(&["--format=qcow2", path(&qcow2)]);
    let server = on(&base, "").start();
    let mut live = server.open_live("vda");
    for round in 0..60_u8 {
        live.write(u64::from(round) * MIB, &vec![round + 1; MIB as usize])
            .unwrap();
    }
    base.kill();
    base.start();
    for round in 0..60_u8 {
        let read = live.read(u64::from(round) * MIB, MIB as u32).unwrap();
        assert!(read.iter().all(|byte| *byte == round + 1), "MiB {round}");
    }
}
