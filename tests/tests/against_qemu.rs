//! The same history into QEMU's storage daemon and into ours: writes, zeroes, trims and commands on
//! dirty bitmaps, many of them illegal. Every answer is the same, word by word, and so is every
//! bitmap, extent by extent.
//!
//! `STILLPOINT_QEMU_HISTORIES` sets how many histories are drawn; `STILLPOINT_SEED` picks one.

use std::fmt::Write as _;

use rand::Rng as _;
use rand::seq::IndexedRandom as _;
use serde_json::{Value, json};
use stillpoint_tests::bitmap::{action, bitmaps};
use stillpoint_tests::qemu::{QemuDaemon, maps};
use stillpoint_tests::seeds::{self, Rng};
use stillpoint_tests::tools::{path, sparse_file};
use stillpoint_tests::{KIB, MIB, Qmp, RawNbd, Server};

/// Not a whole number of blocks of any granularity.
const SIZE: u64 = 4 * MIB + 3 * 512;
const DISKS: [(&str, u64); 3] = [("vda", SIZE), ("vdb", SIZE), ("vdc", 2 * MIB)];
const NAMES: [&str; 6] = ["a", "b", "c", "d", "e f", "\u{e9}"];

const HISTORIES: u64 = 100;
const STEPS: usize = 36;
/// After so many steps all bitmaps are compared.
const LOOK_EVERY: usize = 12;

struct Sides {
    qemu: QemuDaemon,
    stillpoint: Server,
    monitors: [Qmp; 2],
    /// Of each disk: QEMU's live export, and ours.
    live: Vec<[RawNbd; 2]>,
    history: String,
    seed: u64,
}

impl Sides {
    fn new() -> Self {
        let qemu = QemuDaemon::start(&DISKS);
        let mut builder = Server::builder();
        for (disk, size) in DISKS {
            let image = builder.path(&format!("{disk}.raw"));
            sparse_file(&image, size);
            builder = builder.disk_as(&format!("{disk}={},granularity=4k", image.display()));
        }
        let stillpoint = builder.start();
        let live = |disk| {
            let theirs = RawNbd::open(&qemu.nbd(), disk, &[]);
            [theirs, stillpoint.open_live(disk)]
        };
        let live = DISKS.iter().map(|(disk, _)| live(disk)).collect();
        Self {
            monitors: [qemu.qmp(), stillpoint.qmp()],
            live,
            qemu,
            stillpoint,
            history: String::new(),
            seed: 0,
        }
    }

    /// Executes a command on both, and sees that the answer is the same.
    #[track_caller]
    fn execute(&mut self, command: &str, arguments: &Value) -> Result<Value, String> {
        writeln!(self.history, "{command} {arguments}").unwrap();
        let [qemu, ours] = &mut self.monitors;
        // QEMU 7.2 writes it with a capital.
        let theirs = qemu
            .try_execute(command, arguments)
            .map_err(|text| text.replace("support Transaction", "support transaction"));
        writeln!(self.history, "    {theirs:?}").unwrap();
        let ours = ours.try_execute(command, arguments);
        assert_eq!(ours, theirs, "seed {}: {command} {arguments}", self.seed);
        theirs
    }

    fn change_disk(&mut self, rng: &mut Rng) {
        let disk = rng.random_range(0..DISKS.len());
        let (name, size) = DISKS[disk];
        let length = *[512, 4 * KIB, 64 * KIB, 200 * KIB].choose(rng).unwrap();
        let length = rng.random_range(1..=length / 512) * 512;
        let offset = rng.random_range(0..=(size - length) / 512) * 512;
        let what = rng.random_range(0..4);
        writeln!(self.history, "{name}: {what} of {offset}+{length}").unwrap();
        for nbd in &mut self.live[disk] {
            match what {
                0 | 1 => nbd.write(offset, &vec![7; length as usize]),
                2 => nbd.zeroes(offset, length as u32, 0),
                _ => nbd.trim(offset, length as u32),
            }
            .unwrap_or_else(|errno| panic!("seed {}: errno {errno}", self.seed));
        }
    }

    /// All bitmaps of all disks, and what may be done to them while they are served.
    fn compare(&mut self, rng: &mut Rng) {
        for (disk, _) in DISKS {
            let found = self.compare_lists(disk);
            let names = found.iter().map(|b| b["name"].as_str().unwrap().to_owned());
            let mut names: Vec<String> = names.collect();
            // The others stay free.
            names.retain(|_| rng.random_bool(0.8));
            if names.is_empty() {
                continue;
            }
            let request = json!({"disks": [disk], "bitmaps": names});
            let begun = self.monitors[1].execute("backup-begin", &request);
            let export = begun["disks"][0]["export"].as_str().unwrap();
            let ours = maps(path(&self.stillpoint.frozen()), export, &names);
            let [qemu, stillpoint] = &mut self.monitors;
            let (seed, history) = (self.seed, &mut self.history);
            let theirs = self.qemu.with_bitmaps(qemu, disk, &names, |qemu| {
                assert_eq!(
                    bitmaps(stillpoint, disk),
                    bitmaps(qemu, disk),
                    "seed {seed}"
                );
                for _ in 0..3 {
                    let (command, arguments) = drawn_command(rng);
                    // Whatever it would do it does to the other side's as well.
                    let theirs = qemu.try_execute(&command, &arguments);
                    let ours = stillpoint.try_execute(&command, &arguments);
                    writeln!(history, "served: {command} {arguments}: {theirs:?}").unwrap();
                    assert_eq!(ours, theirs, "seed {seed}");
                }
            });
            for ((name, ours), theirs) in names.iter().zip(ours).zip(theirs) {
                assert_eq!(ours, theirs, "seed {seed}, {disk}, {name}");
            }
            let abort = json!({"id": begun["id"]});
            self.monitors[1].execute("backup-abort", &abort);
            self.compare_lists(disk);
        }
    }

    fn compare_lists(&mut self, disk: &str) -> Vec<Value> {
        let [qemu, ours] = &mut self.monitors;
        let [theirs, ours] = [qemu, ours].map(|qmp| bitmaps(qmp, disk));
        assert_eq!(ours, theirs, "seed {}, {disk}\n{}", self.seed, self.history);
        theirs
    }

    fn there(&mut self) -> Vec<(String, String)> {
        let of = |(disk, _): (&str, u64)| {
            let found = bitmaps(&mut self.monitors[0], disk).into_iter();
            let name = |b: Value| (disk.to_owned(), b["name"].as_str().unwrap().to_owned());
            found.map(name).collect::<Vec<_>>()
        };
        DISKS.into_iter().flat_map(of).collect()
    }

    fn run(&mut self, seed: u64) {
        self.seed = seed;
        self.history.clear();
        let rng = &mut seeds::rng(seed);
        for step in 1..=STEPS {
            if rng.random_bool(0.5) {
                self.change_disk(rng);
            } else {
                let (command, arguments) = if rng.random_bool(0.3) {
                    let transaction = drawn_transaction(rng, &self.there());
                    ("transaction".to_owned(), transaction)
                } else {
                    drawn_command(rng)
                };
                // Of no consequence where it is refused, which both have to agree on.
                let _ = self.execute(&command, &arguments);
            }
            if step % LOOK_EVERY == 0 {
                self.compare(rng);
            }
        }
        for (disk, _) in DISKS {
            for bitmap in self.compare_lists(disk) {
                let arguments = json!({"node": disk, "name": bitmap["name"]});
                let removed = self.execute("block-dirty-bitmap-remove", &arguments);
                assert_eq!(removed, Ok(json!({})), "seed {seed}");
            }
        }
    }
}

impl Drop for Sides {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("--- history {}\n{}---", self.seed, self.history);
        }
    }
}

fn drawn_command(rng: &mut Rng) -> (String, Value) {
    let (verb, data) = drawn_action(rng);
    (format!("block-dirty-bitmap-{verb}"), data)
}

/// `there` is what bitmaps there are: disk and name.
fn drawn_transaction(rng: &mut Rng, there: &[(String, String)]) -> Value {
    let mut actions: Vec<Value> = Vec::new();
    let mut removed: Vec<Value> = Vec::new();
    let mode = ["individual", "grouped", "other"].choose(rng);
    let mode = mode.copied().filter(|_| rng.random_bool(0.1));
    for _ in 0..rng.random_range(0..5) {
        let (verb, data) = drawn_action(rng);
        // When enabling is refused in a transaction, QEMU crashes, or disables.
        let is_there = there
            .iter()
            .any(|(node, name)| data["node"] == *node && data["name"] == *name);
        let is_refused = !is_there || removed.contains(&data) || mode == Some("grouped");
        if verb == "enable" && is_refused {
            continue;
        }
        actions.push(action(verb, &data));
        if verb == "remove" {
            removed.push(data);
        }
    }
    // Alone, and in a mode that nobody supports, it is refused for different reasons by QEMU 7 and 10.
    if !actions.is_empty() && rng.random_bool(0.1) {
        actions.push(json!({"type": "abort", "data": {}}));
    }
    let mut arguments = json!({"actions": actions});
    if let Some(mode) = mode {
        arguments["properties"] = json!({"completion-mode": mode});
    }
    arguments
}

fn drawn_action(rng: &mut Rng) -> (&'static str, Value) {
    let node = match rng.random_range(0..20) {
        0 => "nope",
        1..3 => "vdc",
        3..7 => "vdb",
        _ => "vda",
    };
    let name = drawn_name(rng);
    match rng.random_range(0..16) {
        0..6 => ("add", drawn_addition(rng, node, &name)),
        6 => ("remove", json!({"node": node, "name": name})),
        7 | 8 => ("clear", json!({"node": node, "name": name})),
        9 | 10 => ("enable", json!({"node": node, "name": name})),
        11 | 12 => ("disable", json!({"node": node, "name": name})),
        _ => {
            // QEMU 10 aborts when there is nothing to merge.
            let sources = (0..rng.random_range(1..4)).map(|_| drawn_source(rng));
            let sources: Vec<Value> = sources.collect();
            (
                "merge",
                json!({"node": node, "target": name, "bitmaps": sources}),
            )
        }
    }
}

fn drawn_name(rng: &mut Rng) -> String {
    match rng.random_range(0..40) {
        0 => String::new(),
        1 => "n".repeat(1024),
        _ => (*NAMES.choose(rng).unwrap()).to_owned(),
    }
}

fn drawn_source(rng: &mut Rng) -> Value {
    let name = drawn_name(rng);
    match rng.random_range(0..10) {
        0 => json!({"node": "vdb", "name": name}),
        1 => json!({"node": "vda", "name": name}),
        2 => json!({"node": *["vdc", "nope"].choose(rng).unwrap(), "name": name}),
        _ => json!(name),
    }
}

fn drawn_addition(rng: &mut Rng, node: &str, name: &str) -> Value {
    let mut arguments = json!({"node": node, "name": name});
    // Finer than a disk of ours is tracked is the one thing that we refuse and QEMU does not.
    let granularity: Option<u64> = match rng.random_range(0..12) {
        0 => Some(4 * KIB),
        1 => Some(8 * KIB),
        2 => Some(32 * KIB),
        3 => Some(64 * KIB),
        4 => Some(128 * KIB),
        5 => Some(2 * MIB),
        6 => Some(1 << 31),
        7 => Some(*[0, 256, 3000, 65_537, 1 << 32].choose(rng).unwrap()),
        _ => None,
    };
    if let Some(granularity) = granularity {
        arguments["granularity"] = json!(granularity);
    }
    if rng.random_bool(0.15) {
        arguments["persistent"] = json!(rng.random_bool(0.7));
    }
    if rng.random_bool(0.3) {
        arguments["disabled"] = json!(rng.random_bool(0.7));
    }
    arguments
}

#[test]
fn the_same_history_leaves_the_same_bitmaps_in_qemu_and_here() {
    let histories = seeds::number("STILLPOINT_QEMU_HISTORIES", HISTORIES);
    let mut sides = Sides::new();
    for seed in seeds::seeds(&(0..histories).collect::<Vec<_>>()) {
        sides.run(seed);
    }
}
