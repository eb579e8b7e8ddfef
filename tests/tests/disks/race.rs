//! Instants are taken while a disk comes and goes, in an order that the machine draws: each has the
//! disk or has it not, and what it has is right.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use rand::Rng as _;
use serde_json::{Value, json};
use stillpoint_tests::seeds::{self, Rng, number};
use stillpoint_tests::shadow::{Change, Event, Instant, SECTOR};
use stillpoint_tests::tools::path;
use stillpoint_tests::{CHUNK, Extent, RawNbd, Server, Shadow};

use super::{SIZE, builder};

/// What all threads share.
struct Scene<'a> {
    server: &'a Server,
    clock: &'a AtomicU64,
    stop: &'a AtomicBool,
    seed: u64,
}

impl Scene<'_> {
    fn tick(&self) -> u64 {
        self.clock.fetch_add(1, Ordering::SeqCst)
    }

    fn is_over(&self) -> bool {
        self.stop.load(Ordering::Acquire)
    }

    fn write(&self, live: &mut RawNbd, rng: &mut Rng) -> Event {
        let sectors = rng.random_range(1..=8);
        let offset = SECTOR * rng.random_range(0..SIZE / SECTOR - sectors);
        let issued = self.tick();
        let stamp = issued + 1;
        let bytes = stamp.to_le_bytes().repeat((sectors * SECTOR) as usize / 8);
        live.write(offset, &bytes).expect("the guest can write");
        Event {
            offset,
            length: sectors * SECTOR,
            change: Change::Fill(stamp),
            issued,
            ended: self.tick(),
            acknowledged: true,
        }
    }

    /// A guest of the disk that stays.
    fn stays(&self) -> Vec<Event> {
        let mut rng = seeds::rng(self.seed * 10 + 1);
        let mut live = self.server.open_live("vda");
        let mut events = Vec::new();
        while !self.is_over() {
            events.push(self.write(&mut live, &mut rng));
        }
        events
    }

    /// The disk that comes and goes, each time with a guest; how often it came.
    fn comes_and_goes(&self) -> (Vec<Event>, u32) {
        let mut rng = seeds::rng(self.seed * 10 + 2);
        let mut qmp = self.server.qmp();
        let arguments = json!({"disk": "vdb", "path": path(&self.server.image("vdb"))});
        let (mut events, mut times) = (Vec::new(), 0);
        while !self.is_over() {
            qmp.execute("disk-add", &arguments);
            times += 1;
            let mut live = self.server.open_live("vdb");
            for _ in 0..rng.random_range(0..20) {
                events.push(self.write(&mut live, &mut rng));
            }
            live.disconnect();
            let force = json!({"disk": "vdb", "force": rng.random_bool(0.5)});
            loop {
                match qmp.try_execute("disk-remove", &force) {
                    Ok(_) => break,
                    Err(_) if self.is_over() => break,
                    Err(error) => {
                        if error.contains("open backup") {
                            qmp.event("BACKUP_ENDED");
                        } else {
                            assert!(error.contains("in use by"), "{error}");
                        }
                    }
                }
            }
        }
        (events, times)
    }

    fn back_up(&self, id: &str) -> Taken {
        let before = self.tick();
        let args = ["--consumer", "c", "--since", "last", "--json"];
        let begun = self
            .server
            .cli(&[&["backup", "begin", "--id", id][..], &args].concat());
        // The first time that the disk is there it is full.
        assert!([0, 3].contains(&begun.code()), "{begun}");
        let begun: Value = serde_json::from_str(&begun.stdout).expect("JSON");
        let instant = (before, self.tick());
        let mut parts = BTreeMap::new();
        for disk in begun["disks"].as_array().expect("disks") {
            let name = disk["disk"].as_str().expect("a name").to_owned();
            parts.insert(name.clone(), self.read(disk, &format!("{name}@{id}")));
        }
        self.server.commit(id);
        Taken { instant, parts }
    }

    fn read(&self, disk: &Value, export: &str) -> Part {
        let Some(since) = disk["since"].as_str() else {
            let reason = disk["reason"].as_str().expect("a reason");
            assert!(
                reason.contains("first") || reason.contains("no backup of it yet"),
                "{disk}"
            );
            let bytes = self.server.open_frozen(export, &[]).read_all();
            return Part { bytes, map: None };
        };
        let context = format!("qemu:dirty-bitmap:{since}");
        let mut frozen = self.server.open_frozen(export, &[&context]);
        let (bytes, map) = (frozen.read_all(), frozen.map(&context));
        Part {
            bytes,
            map: Some(map),
        }
    }
}

/// Has the others end with it.
struct Ends<'a>(&'a AtomicBool);

impl Drop for Ends<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Release);
    }
}

/// A backup, and when it was taken.
struct Taken {
    instant: Instant,
    parts: BTreeMap<String, Part>,
}

struct Part {
    bytes: Vec<u8>,
    /// None of the first.
    map: Option<Vec<Extent>>,
}

fn play(seed: u64, backups: u64) {
    let server = builder().start();
    let (clock, stop) = (AtomicU64::new(1), AtomicBool::new(false));
    let scene = Scene {
        server: &server,
        clock: &clock,
        stop: &stop,
        seed,
    };
    let (vda, (vdb, times), taken) = std::thread::scope(|scope| {
        let stays = scope.spawn(|| scene.stays());
        let comes = scope.spawn(|| scene.comes_and_goes());
        // Also if something here fails.
        let ends = Ends(&stop);
        let taken: Vec<Taken> = (0..backups)
            .map(|number| scene.back_up(&format!("b{number}")))
            .collect();
        drop(ends);
        (stays.join().unwrap(), comes.join().unwrap(), taken)
    });
    let with = taken
        .iter()
        .filter(|taken| taken.parts.contains_key("vdb"))
        .count();
    assert!(
        times > 2 && with > 0,
        "seed {seed}: {times} times there, {with} backups"
    );
    for (disk, events) in [("vda", vda), ("vdb", vdb)] {
        let mut shadow = Shadow::new(SIZE, CHUNK);
        shadow.add(events);
        let mut since: Option<Instant> = None;
        for (number, taken) in taken.iter().enumerate() {
            let Some(part) = taken.parts.get(disk) else {
                assert_eq!(disk, "vdb", "seed {seed}, b{number}");
                continue;
            };
            let what = format!("seed {seed}, {disk}@b{number}");
            shadow.check_bytes(&part.bytes, taken.instant, &what);
            assert_eq!(since.is_some(), part.map.is_some(), "{what}");
            if let (Some(since), Some(map)) = (since, &part.map) {
                shadow.check_map(map, (since, taken.instant), &what);
            }
            since = Some(taken.instant);
        }
    }
}

#[test]
fn an_instant_has_a_disk_that_comes_or_has_it_not() {
    let backups = number("STILLPOINT_DISK_BACKUPS", 40);
    for seed in seeds::seeds(&[1, 2, 3]) {
        play(seed, backups);
    }
}
