//! Damage to what an open backup keeps breaks that backup alone, or changes nothing of it.
//!
//! `STILLPOINT_ROT_ROUNDS` sets how much damage is drawn; `STILLPOINT_SEED` picks one.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use rand::{Rng as _, seq::IndexedRandom as _};
use serde_json::Value;
use stillpoint_tests::guest::dirty_map;
use stillpoint_tests::raw_nbd::errno;
use stillpoint_tests::seeds::{self, Rng};
use stillpoint_tests::state;
use stillpoint_tests::{CHUNK, Extent, Guest, KIB, MIB, Server};

const SIZE: u64 = 8 * MIB;
const CONTEXT: &str = "qemu:dirty-bitmap:cp1";
/// Of the record of a backup, before its states.
const HEAD: u64 = 4096;

/// Two backups of one disk, as a server that was killed left them.
struct Scene {
    server: Server,
    saved: PathBuf,
    kept: Vec<Kept>,
    /// The granules that were written after the first backup began.
    written: Vec<u64>,
}

/// What a backup must show.
struct Kept {
    id: &'static str,
    bytes: Vec<u8>,
    changed: BTreeSet<u64>,
}

#[derive(Clone, Debug)]
enum Damage {
    Remove,
    Truncate(u64),
    Zero(u64, u64),
    Flip(u64),
}

impl Scene {
    fn new(seed: u64) -> Self {
        let mut rng = seeds::rng(seed);
        let mut server = Server::builder().disk("vda", SIZE).start();
        let mut guest = Guest::new(&server, "vda");
        guest.write_random(&mut rng, 0, 6 * MIB);
        server.checkpoint("cp1");
        guest.touched.clear();
        let mut kept = Vec::new();
        let mut before = Vec::new();
        for id in ["b1", "b2"] {
            (0..12).for_each(|_| guest.do_something(&mut rng));
            if id == "b2" {
                before.clone_from(&guest.disk);
            }
            server.begin(id, &["--since", "cp1"]);
            kept.push(Kept {
                id,
                bytes: guest.disk.clone(),
                changed: guest.touched.clone(),
            });
        }
        // Data, zeroes and holes are all overwritten.
        (0..24).for_each(|_| guest.do_something(&mut rng));
        guest.write_random(&mut rng, SIZE - 100 * KIB, 100 * KIB);
        let granules = before.chunks(4096).zip(guest.disk.chunks(4096));
        let written = (0..).zip(granules).filter(|(_, (then, now))| then != now);
        let written = written.map(|(granule, _)| granule).collect();
        server.kill();
        let saved = server.path("saved");
        state::copy_directory(&state::directory(&server, "vda"), &saved);
        Self {
            server,
            saved,
            kept,
            written,
        }
    }

    fn folder(&self) -> PathBuf {
        state::directory(&self.server, "vda").join("backups/b1")
    }

    fn draw(&self, rng: &mut Rng) -> (&'static str, Damage) {
        let file = *["states", "states2", "eras"].choose(rng).expect("some");
        let length = fs::metadata(self.saved.join("backups/b1").join(file))
            .expect("the file")
            .len()
            .max(1);
        let granule = *self.written.choose(rng).expect("some");
        let entry = match file {
            "states" => HEAD + granule,
            "states2" => granule,
            _ => granule * 4096 / CHUNK * 8,
        };
        let at = match rng.random_range(0..4) {
            0 => rng.random_range(0..length),
            1 => rng.random_range(0..512),
            _ => entry,
        };
        let damage = match rng.random_range(0..10) {
            0 => Damage::Remove,
            1 => Damage::Truncate(at),
            2 | 3 => Damage::Zero(at / 512 * 512, rng.random_range(1..=8) * 512),
            4 | 5 => Damage::Zero(at, rng.random_range(1..=8)),
            _ => Damage::Flip(at * 8 + rng.random_range(0..8)),
        };
        (file, damage)
    }

    /// Damages, starts, and sees that what is shown is right. Says whether the backup is broken.
    fn check(&mut self, file: &str, damage: &Damage, seed: &str) -> bool {
        let what = format!("{seed}: {damage:?} of {file}");
        // Told before, in case the start fails.
        eprintln!("{what}");
        state::copy_directory(&self.saved, &state::directory(&self.server, "vda"));
        damage.apply(&self.folder().join(file));
        self.server.start();
        let shown = self.server.cli(&["backup", "show", "b1", "--json"]);
        let backup: Value = serde_json::from_str(&shown.stdout).expect("JSON");
        let is_broken = backup["state"] == "broken";
        if is_broken {
            let reason = backup["broken_reason"].as_str().expect("a reason");
            assert!(reason.contains("'vda'"), "{what}: {reason}");
            self.server.cli(&["backup", "commit", "b1"]).error(4);
            let mut export = self.server.open_frozen("vda@b1", &[]);
            assert_eq!(export.read(0, 4096), Err(errno::EIO), "{what}");
        } else {
            let map = self.shows(&self.kept[0], &what);
            let dirty = |chunk: &u64| {
                let at = chunk * CHUNK;
                map.iter().any(|e| e.0 <= at && at < e.0 + e.1 && e.2 == 1)
            };
            let clean: Vec<_> = self.kept[0].changed.iter().filter(|c| !dirty(c)).collect();
            assert!(clean.is_empty(), "{what}: {clean:?} are clean: {map:?}");
        }
        let other = &self.kept[1];
        let map = self.shows(other, &what);
        assert_eq!(map, dirty_map(&other.changed, SIZE), "{what}: the other");
        let log = self.server.stderr();
        assert!(!log.contains("panicked"), "{what}: {log}");
        self.server.kill();
        is_broken
    }

    /// Reads the backup, which is whole, and returns its map.
    fn shows(&self, kept: &Kept, what: &str) -> Vec<Extent> {
        let mut export = self
            .server
            .open_frozen(&format!("vda@{}", kept.id), &[CONTEXT]);
        assert!(
            export.read_all() == kept.bytes,
            "{what}: {} shows other bytes",
            kept.id
        );
        export.map(CONTEXT)
    }
}

impl Damage {
    fn apply(&self, path: &Path) {
        let open = File::options().read(true).write(true).open(path);
        let file = open.expect("a file of the backup");
        let length = file.metadata().expect("its length").len();
        match *self {
            Self::Remove => fs::remove_file(path).expect("our own file"),
            Self::Truncate(to) => file.set_len(to.min(length)).expect("our own file"),
            Self::Zero(at, count) => {
                let count = count.min(length.saturating_sub(at));
                let zeroes = vec![0; count as usize];
                file.write_all_at(&zeroes, at).expect("our own file");
            }
            Self::Flip(bit) => {
                let mut byte = [0];
                if file.read_at(&mut byte, bit / 8).expect("our own file") == 1 {
                    byte[0] ^= 1 << (bit % 8);
                    file.write_all_at(&byte, bit / 8).expect("our own file");
                }
            }
        }
    }
}

#[test]
fn a_state_that_is_lost_or_made_up_breaks_the_backup() {
    let mut scene = Scene::new(1);
    let granule = scene.written[scene.written.len() / 2];
    for (file, entry) in [("states", HEAD + granule), ("states2", granule)] {
        let bytes = fs::read(scene.saved.join("backups/b1").join(file)).expect("the file");
        let (length, state) = (bytes.len() as u64, bytes[entry as usize]);
        let mut all = vec![
            Damage::Remove,
            Damage::Truncate(0),
            Damage::Truncate(length - 1),
        ];
        // One state in thirty of the second file has one bit, and is nothing without it.
        let flips = (0..8).filter(|bit| state != 1 << bit);
        all.extend(flips.map(|bit| Damage::Flip(entry * 8 + bit)));
        if file == "states" {
            all.extend([Damage::Zero(entry, 1), Damage::Zero(HEAD, length)]);
            all.extend([Damage::Zero(0, 512), Damage::Flip(20 * 8)]);
        }
        for damage in all {
            assert!(
                scene.check(file, &damage, "targeted"),
                "{damage:?} of {file}"
            );
        }
    }
    // The first states are whole without the second.
    for damage in [Damage::Zero(granule, 1), Damage::Zero(0, SIZE / 4096)] {
        assert!(!scene.check("states2", &damage, "targeted"), "{damage:?}");
    }
    // Old eras that are missing count as changed.
    for damage in [Damage::Zero(0, SIZE), Damage::Truncate(0)] {
        assert!(!scene.check("eras", &damage, "targeted"), "{damage:?}");
    }
}

#[test]
fn damage_drawn_from_a_seed_shows_no_wrong_byte_and_no_wrong_clean() {
    let rounds = seeds::number("STILLPOINT_ROT_ROUNDS", 40);
    let mut scene = Scene::new(2);
    let mut broken = 0;
    let seeds = seeds::seeds(&(1..=rounds).collect::<Vec<u64>>());
    for seed in &seeds {
        let mut rng = seeds::rng(*seed);
        let (file, damage) = scene.draw(&mut rng);
        broken += u64::from(scene.check(file, &damage, &format!("seed {seed}")));
    }
    // Damage that is never noticed, or always, would say nothing.
    if seeds.len() >= 40 {
        assert!(
            broken * 4 > rounds && broken < rounds,
            "{broken} of {rounds}"
        );
    }
}
