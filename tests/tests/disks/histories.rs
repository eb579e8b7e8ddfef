//! Disks come and go in an order that is drawn, with guests, checkpoints, backups, stops and kills in
//! between, against the simplest model: a copy of each disk, and what was touched since each
//! checkpoint.

use std::collections::{BTreeMap, BTreeSet};

use rand::Rng as _;
use stillpoint_tests::guest::dirty_map;
use stillpoint_tests::seeds::{self, Rng};
use stillpoint_tests::tools::{path, sparse_file};
use stillpoint_tests::{CHUNK, MIB, Server};

use super::{disks, disks_of, remove, spec};

const SIZE: u64 = MIB;
const DISKS: [&str; 3] = ["vda", "vdb", "vdc"];
const STEPS: usize = 60;

type Chunks = BTreeSet<u64>;

/// A disk, whether or not it is there.
#[derive(Clone, Debug)]
struct Disk {
    is_there: bool,
    /// It is away, and the server knows what it has.
    is_missed: bool,
    bytes: Vec<u8>,
    /// What was touched since each checkpoint that it has.
    since: BTreeMap<String, Chunks>,
}

struct World {
    server: Server,
    disks: BTreeMap<&'static str, Disk>,
    names: u32,
    rng: Rng,
    seed: u64,
}

impl World {
    fn new(seed: u64) -> Self {
        let builder = Server::builder();
        for disk in DISKS {
            sparse_file(&builder.path(&format!("{disk}.raw")), SIZE);
        }
        let first = format!("vda={}", path(&builder.path("vda.raw")));
        let disk = |name| {
            let disk = Disk {
                is_there: name == "vda",
                is_missed: false,
                bytes: vec![0; SIZE as usize],
                since: BTreeMap::new(),
            };
            (name, disk)
        };
        Self {
            server: builder.disk_as(&first).start(),
            disks: DISKS.map(disk).into(),
            names: 0,
            rng: seeds::rng(seed),
            seed,
        }
    }

    fn there(&self) -> Vec<&'static str> {
        let there = self.disks.iter().filter(|(_, disk)| disk.is_there);
        there.map(|(name, _)| *name).collect()
    }

    fn step(&mut self, number: usize) {
        let what = format!("seed {}, step {number}", self.seed);
        let drawn = DISKS[self.rng.random_range(0..DISKS.len())];
        let is_there = self.disks[drawn].is_there;
        match self.rng.random_range(0..20) {
            0..4 if !is_there => self.add(drawn),
            0..4 => {
                remove(&self.server, drawn);
                let disk = self.disks.get_mut(drawn).unwrap();
                (disk.is_there, disk.is_missed) = (false, true);
            }
            4..11 if is_there => self.write(drawn),
            11..13 if !self.there().is_empty() => self.checkpoint(),
            13 | 14 => self.delete(),
            15 | 16 if !self.there().is_empty() => self.back_up(&what),
            17 => self.end_server(false),
            18 => self.end_server(true),
            _ => {}
        }
        let there = self.there();
        assert_eq!(disks(&self.server), there, "{what}");
        for checkpoint in self.checkpoints() {
            let known = there
                .iter()
                .filter(|disk| self.disks[*disk].since.contains_key(&checkpoint));
            let known: Vec<_> = known.copied().collect();
            assert_eq!(
                disks_of(&self.server, &checkpoint),
                known,
                "{what}: {checkpoint}"
            );
        }
    }

    fn checkpoints(&self) -> BTreeSet<String> {
        let all = self.disks.values().flat_map(|disk| disk.since.keys());
        all.cloned().collect()
    }

    fn add(&mut self, disk: &'static str) {
        loop {
            let added = self.server.cli(&["disk", "add", &spec(&self.server, disk)]);
            if added.status.success() {
                break;
            }
            // Of a server that was killed, until the kernel is done with it.
            assert!(
                added.stderr.contains("in use by another process"),
                "{added}"
            );
        }
        let disk = self.disks.get_mut(disk).unwrap();
        (disk.is_there, disk.is_missed) = (true, false);
    }

    fn write(&mut self, name: &'static str) {
        let disk = self.disks.get_mut(name).unwrap();
        let chunk = self.rng.random_range(0..SIZE / CHUNK);
        let offset = chunk * CHUNK + 512 * self.rng.random_range(0..CHUNK / 512);
        let bytes = vec![self.rng.random_range(1..=255); 512];
        let mut live = self.server.open_live(name);
        live.write(offset, &bytes).unwrap();
        live.disconnect();
        disk.bytes[offset as usize..][..512].copy_from_slice(&bytes);
        disk.since.values_mut().for_each(|touched| {
            touched.insert(chunk);
        });
    }

    fn checkpoint(&mut self) {
        self.names += 1;
        let name = format!("cp{}", self.names);
        self.server.checkpoint(&name);
        for disk in self.disks.values_mut().filter(|disk| disk.is_there) {
            disk.since.insert(name.clone(), Chunks::new());
        }
    }

    /// One that a disk has which is there; where it is missed, it hears of it when it is back.
    fn delete(&mut self) {
        let there = self.disks.values().filter(|disk| disk.is_there);
        let known: BTreeSet<String> = there.flat_map(|disk| disk.since.keys().cloned()).collect();
        let known: Vec<_> = known.into_iter().collect();
        if known.is_empty() {
            return;
        }
        let name = &known[self.rng.random_range(0..known.len())];
        self.server.cli(&["checkpoint", "delete", name]).ok();
        let hear = |disk: &&mut Disk| disk.is_there || disk.is_missed;
        for disk in self.disks.values_mut().filter(hear) {
            disk.since.remove(name);
        }
    }

    /// Of all that are there, compared byte by byte and chunk by chunk.
    fn back_up(&mut self, what: &str) {
        self.names += 1;
        let (id, made) = (format!("b{}", self.names), format!("cp{}", self.names));
        let there = self.there();
        let known: BTreeSet<String> = there
            .iter()
            .flat_map(|disk| self.disks[disk].since.keys().cloned())
            .collect();
        let known: Vec<_> = known.into_iter().collect();
        let since =
            (!known.is_empty()).then(|| known[self.rng.random_range(0..known.len())].clone());
        let mut args = vec!["backup", "begin", "--id", &id, "--checkpoint", &made];
        args.extend(since.iter().flat_map(|since| ["--since", since.as_str()]));
        let begun = self.server.cli(&args);
        assert!([0, 3].contains(&begun.code()), "{what}: {begun}");
        for disk in &there {
            let model = &self.disks[disk];
            let export = format!("{disk}@{id}");
            let touched = since.as_ref().and_then(|since| model.since.get(since));
            let context = format!("qemu:dirty-bitmap:{}", since.as_deref().unwrap_or_default());
            let contexts = if touched.is_some() {
                vec![context.as_str()]
            } else {
                Vec::new()
            };
            let mut frozen = self.server.open_frozen(&export, &contexts);
            assert!(
                frozen.read_all() == model.bytes,
                "{what}: {export} has other bytes"
            );
            if let Some(touched) = touched {
                let expected = dirty_map(touched, SIZE);
                assert_eq!(
                    frozen.map(&context),
                    expected,
                    "{what}: {export} since {since:?}"
                );
            }
        }
        if self.rng.random_bool(0.5) {
            self.server.commit(&id);
            for disk in self.disks.values_mut().filter(|disk| disk.is_there) {
                disk.since.insert(made.clone(), Chunks::new());
            }
        } else {
            self.server.abort(&id);
        }
    }

    /// Disks that were added are not there after a start, and the server does not know of them. What was
    /// deleted before, they hear of from the one that was there.
    fn end_server(&mut self, kill: bool) {
        if !self.disks["vda"].is_there {
            return;
        }
        if kill {
            self.server.kill();
        } else {
            self.server.stop();
        }
        self.server.start();
        for (name, disk) in &mut self.disks {
            (disk.is_there, disk.is_missed) = (*name == "vda", false);
        }
    }
}

#[test]
fn disks_that_come_and_go_keep_every_byte_and_every_change() {
    for seed in seeds::seeds(&[1, 2, 3, 4, 5, 6]) {
        let mut world = World::new(seed);
        for step in 0..STEPS {
            world.step(step);
        }
        // All of it, at last.
        for disk in DISKS {
            if !world.disks[disk].is_there {
                world.add(disk);
            }
        }
        world.back_up(&format!("seed {seed}, the end"));
    }
}
