//! Damage to state files costs at most a full backup of that disk, and says so.
//!
//! `STILLPOINT_ROT_ROUNDS` sets how much damage is drawn; `STILLPOINT_SEED` picks one.

use std::collections::BTreeSet;
use std::env;
use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use rand::{Rng as _, seq::IndexedRandom as _};
use serde_json::Value;
use stillpoint_tests::seeds::{self, Rng};
use stillpoint_tests::server::names;
use stillpoint_tests::state::{self, Begun, begin_since};
use stillpoint_tests::{CHUNK, GIB, MIB, RawNbd, Server};

const SIZE: u64 = 8 * GIB;
const FILES: [&str; 5] = ["header", "eras", "pages", "journal", "lease"];
const BACKUP_FILES: [&str; 4] = [
    "backups/b1/scratch",
    "backups/b1/states",
    "backups/b1/eras",
    "backups/b1/states2",
];

/// Two disks as a server left them, to be damaged again and again.
struct Scene {
    server: Server,
    ending: Ending,
    saved: PathBuf,
    /// The chunks that changed since each checkpoint.
    changed: Vec<(&'static str, BTreeSet<u64>)>,
    used: u64,
}

/// Written since each checkpoint: three sectors of the table of pages have some, and some pages
/// regions that nobody writes any more beside one that is active.
const WRITES: [(&str, &[u64]); 3] = [
    ("cp1", &[1, 100, 5000, 70_000, 70_100, 130_000]),
    ("cp2", &[2, 5000, 131_071]),
    ("cp3", &[3, 70_001]),
];
/// An entry of `eras`.
const ENTRY: u64 = 8;

#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Ending {
    Stop,
    Kill,
    PowerCut,
}

#[derive(Clone, Debug)]
struct Damage {
    file: String,
    how: How,
}

#[derive(Clone, Copy, Debug)]
enum How {
    Remove,
    Truncate(u64),
    Zero(u64, u64),
    Flip(u64),
}

impl Scene {
    fn new(ending: Ending) -> Self {
        let mut server = Server::builder()
            .disk("vda", SIZE)
            .disk("vdb", 8 * MIB)
            .start();
        let mut vdb = server.open_live("vdb");
        let mut changed: Vec<(&str, BTreeSet<u64>)> = Vec::new();
        for (checkpoint, chunks) in WRITES {
            server.checkpoint(checkpoint);
            changed.push((checkpoint, BTreeSet::new()));
            let mut vda = server.open_live("vda");
            for &chunk in chunks {
                vda.write(chunk * CHUNK, &[7; 4096]).unwrap();
                for (_, set) in &mut changed {
                    set.insert(chunk);
                }
            }
            drop(vda);
            if checkpoint == "cp2" {
                // No region is active after this.
                server.stop();
                server.start();
                vdb = server.open_live("vdb");
            }
        }
        vdb.write(9 * CHUNK, &[1; 4096]).unwrap();
        // Another era in which nothing changes any more, but what the backup keeps.
        server.begin(
            "b1",
            &["--since", "cp1", "--checkpoint", "cp4", "--disk", "vda"],
        );
        let mut vda = server.open_live("vda");
        vda.write(5000 * CHUNK, &[8; 4096]).unwrap();
        match ending {
            Ending::Stop => server.stop(),
            Ending::Kill | Ending::PowerCut => server.kill(),
        }
        if ending == Ending::PowerCut {
            state::pretend_power_cut(&state::directory(&server, "vda"));
        }
        let saved = server.path("saved");
        fs::create_dir(&saved).unwrap();
        for disk in ["vda", "vdb"] {
            state::copy_directory(&state::directory(&server, disk), &saved.join(disk));
        }
        Self {
            server,
            ending,
            saved,
            changed,
            used: 0,
        }
    }

    fn state(&self) -> PathBuf {
        state::directory(&self.server, "vda")
    }

    /// As it was left. The images are not written meanwhile, so they fit.
    fn restore(&self) {
        for disk in ["vda", "vdb"] {
            state::copy_directory(
                &self.saved.join(disk),
                &state::directory(&self.server, disk),
            );
        }
    }

    fn length(&self, file: &str) -> u64 {
        fs::metadata(self.saved.join("vda").join(file))
            .unwrap()
            .len()
    }

    /// Damages, starts, and sees that nothing that changed is called clean.
    fn check(&mut self, damage: &[Damage], seed: &str) {
        let what = format!("{seed}, after {:?}, {damage:?}", self.ending);
        // Told before, in case the start fails.
        eprintln!("{what}");
        self.restore();
        for part in damage {
            part.apply(&self.state());
        }
        self.server.start();
        self.check_disk(&what);
        self.check_other_disk(&what);
        let log = self.server.stderr();
        assert!(!log.contains("panicked"), "{what}: {log}");
        self.server.kill();
    }

    fn check_disk(&mut self, what: &str) {
        let list = self.server.cli_json(&["checkpoint", "list"]);
        let listed: BTreeSet<String> = names(&list, "checkpoints", "name").into_iter().collect();
        for (name, changed) in self.changed.clone() {
            if !listed.contains(name) {
                continue;
            }
            let id = self.new_id();
            match begin_since(&self.server, &id, "vda", name) {
                Begun::Full { .. } => {}
                Begun::Incremental { map, .. } => {
                    for chunk in changed {
                        let at = chunk * CHUNK;
                        let dirty = map.iter().any(|e| e.0 <= at && at < e.0 + e.1 && e.2 == 1);
                        assert!(
                            dirty,
                            "{what}: chunk {chunk} is clean since {name}: {map:?}"
                        );
                    }
                }
            }
        }
        // And a new chain can begin.
        let (name, id) = (self.new_id(), self.new_id());
        self.server.checkpoint(&name);
        let begun = begin_since(&self.server, &id, "vda", &name);
        let clean =
            matches!(&begun, Begun::Incremental { map, .. } if map.iter().all(|e| e.2 == 0));
        assert!(clean, "{what}: {begun:?}");
    }

    fn check_other_disk(&mut self, what: &str) {
        let id = self.new_id();
        let begun = begin_since(&self.server, &id, "vdb", "cp3");
        let dirty = [
            (0, 9 * CHUNK, 0),
            (9 * CHUNK, CHUNK, 1),
            (10 * CHUNK, 8 * MIB - 10 * CHUNK, 0),
        ];
        let expected = Begun::Incremental {
            map: dirty.to_vec(),
            uncertain: 0,
        };
        assert_eq!(begun, expected, "{what}: the other disk");
    }

    fn new_id(&mut self) -> String {
        self.used += 1;
        format!("r{}", self.used)
    }

    fn draw(&self, rng: &mut Rng) -> Damage {
        let files: Vec<&str> = FILES.iter().chain(&BACKUP_FILES).copied().collect();
        let file = *files.choose(rng).expect("some");
        // What was on the disk has no sums, neither there nor in scratch.
        let has_sums = !file.ends_with("/scratch");
        let length = self.length(file).max(1);
        // Where something is, more often than in the emptiness of a sparse file.
        let written = WRITES
            .choose(rng)
            .and_then(|(_, chunks)| chunks.choose(rng));
        let entry = written.map_or(0, |chunk| chunk * ENTRY);
        let at = match rng.random_range(0..if file.ends_with("eras") { 6 } else { 3 }) {
            3.. => rng.random_range(entry.saturating_sub(64)..entry + 64),
            0 => rng.random_range(0..length),
            1 => rng.random_range(0..length.min(4096)),
            _ => rng.random_range(length.saturating_sub(4096)..length),
        };
        let how = match rng.random_range(0..if has_sums { 8 } else { 2 }) {
            0 => How::Remove,
            1 => How::Truncate(at),
            2 => How::Zero(at / 512 * 512, rng.random_range(1..=8) * 512),
            3 => How::Zero(at, rng.random_range(1..=16)),
            _ => How::Flip(at * 8 + rng.random_range(0..8)),
        };
        Damage {
            file: file.to_owned(),
            how,
        }
    }
}

impl Damage {
    fn new(file: &str, how: How) -> Self {
        let file = file.to_owned();
        Self { file, how }
    }

    fn apply(&self, state: &Path) {
        let path = state.join(&self.file);
        let Ok(file) = File::options().read(true).write(true).open(&path) else {
            // Two drawn: the other one has removed it.
            return;
        };
        let length = file.metadata().unwrap().len();
        match self.how {
            How::Remove => fs::remove_file(path).unwrap(),
            How::Truncate(to) => file.set_len(to.min(length)).unwrap(),
            How::Zero(at, count) => {
                let count = count.min(length.saturating_sub(at));
                file.write_all_at(&vec![0; count as usize], at).unwrap();
            }
            How::Flip(bit) => {
                let mut byte = [0];
                if file.read_at(&mut byte, bit / 8).unwrap() == 1 {
                    file.write_all_at(&[byte[0] ^ 1 << (bit % 8)], bit / 8)
                        .unwrap();
                }
            }
        }
    }
}

#[test]
fn a_file_that_is_missing_short_or_zeroed_is_never_taken_for_clean() {
    for ending in [Ending::Stop, Ending::Kill, Ending::PowerCut] {
        let mut scene = Scene::new(ending);
        let mut all = vec![];
        for file in FILES {
            let length = scene.length(file);
            all.extend(
                [How::Remove, How::Truncate(0), How::Truncate(length / 2)]
                    .map(|how| Damage::new(file, how)),
            );
        }
        for file in ["header", "pages"] {
            let sectors = scene.length(file) / 512;
            all.extend((0..sectors).map(|n| Damage::new(file, How::Zero(n * 512, 512))));
        }
        for damage in all {
            scene.check(&[damage], "targeted");
        }
    }
}

#[test]
fn damage_drawn_from_a_seed_is_never_taken_for_clean() {
    let rounds = env::var("STILLPOINT_ROT_ROUNDS").map_or(60, |n| n.parse().expect("a number"));
    let endings = [Ending::Stop, Ending::Kill, Ending::PowerCut];
    let mut scenes = endings.map(Scene::new);
    for seed in seeds::seeds(&(1..=rounds).collect::<Vec<u64>>()) {
        let mut rng = seeds::rng(seed);
        let scene = &mut scenes[seed as usize % 3];
        let count = *[1, 1, 1, 2, 3].choose(&mut rng).expect("some");
        let damage: Vec<Damage> = (0..count).map(|_| scene.draw(&mut rng)).collect();
        scene.check(&damage, &format!("seed {seed}"));
    }
}

#[test]
fn a_damaged_entry_of_the_map_costs_its_own_chunk_while_a_region_of_its_page_is_active() {
    let mut scene = Scene::new(Ending::Kill);
    // In a region that is active, written and not; in one beside it; and a whole region.
    for (first, count, dirty) in [(1, 1, 1), (2, 1, 1), (9, 1, 1), (100, 1, 1), (64, 64, 64)] {
        for how in [
            How::Flip(first * ENTRY * 8 + 1),
            How::Flip(first * ENTRY * 8 + 63),
            How::Zero(first * ENTRY, count * ENTRY),
        ] {
            let dirty = if matches!(how, How::Zero(..)) {
                dirty
            } else {
                1
            };
            let what = format!("{how:?}");
            scene.restore();
            Damage::new("eras", how).apply(&scene.state());
            scene.server.start();
            let id = scene.new_id();
            let begun = begin_since(&scene.server, &id, "vda", "cp3");
            let Begun::Incremental { map, uncertain } = begun else {
                panic!("{what}: {begun:?}");
            };
            assert_eq!(uncertain, dirty * CHUNK, "{what}: {map:?}");
            let surplus = [first * CHUNK, (first + count - 1) * CHUNK];
            for at in [3 * CHUNK, 5000 * CHUNK, 70_001 * CHUNK]
                .iter()
                .chain(&surplus[..dirty.min(2) as usize])
            {
                assert!(
                    map.iter()
                        .any(|e| e.0 <= *at && *at < e.0 + e.1 && e.2 == 1),
                    "{what}: {map:?}"
                );
            }
            let changed: u64 = map.iter().filter(|e| e.2 == 1).map(|e| e.1).sum();
            assert_eq!(changed, (3 + dirty) * CHUNK, "{what}: {map:?}");
            scene.server.kill();
        }
    }
}

#[test]
fn what_cannot_be_read_of_the_last_server_is_said_in_words() {
    for (ending, file, reason) in [
        (Ending::Stop, "header", "how its last server ended"),
        (Ending::Kill, "header", "how its last server ended"),
        (Ending::PowerCut, "header", "how its last server ended"),
        (Ending::Kill, "lease", "when its last server wrote"),
        (Ending::PowerCut, "lease", "when its last server wrote"),
        (Ending::Kill, "eras", "the map of what changed"),
    ] {
        let mut scene = Scene::new(ending);
        let what = format!("after {ending:?}, {file}");
        scene.restore();
        let how = match file {
            // Both copies of how things were left.
            "header" => How::Zero(512, 1024),
            "lease" => How::Zero(0, 1024),
            _ => How::Remove,
        };
        Damage::new(file, how).apply(&scene.state());
        if file == "lease" {
            // Else the last write may be of the second in which the server began.
            state::age_image(&scene.state());
        }
        scene.server.start();
        let id = scene.new_id();
        match begin_since(&scene.server, &id, "vda", "cp1") {
            Begun::Full { reason: found } => assert!(found.contains(reason), "{what}: {found}"),
            begun @ Begun::Incremental { .. } => panic!("{what}: {begun:?}"),
        }
        scene.check_other_disk(&what);
    }
}

#[test]
fn an_open_backup_that_lost_a_file_is_broken_and_its_base_is_intact() {
    for ending in [Ending::Stop, Ending::Kill] {
        let mut scene = Scene::new(ending);
        let mut all = vec![];
        for file in BACKUP_FILES {
            let half = scene.length(file) / 2;
            all.extend(
                [How::Remove, How::Truncate(0), How::Truncate(half)]
                    .map(|how| Damage::new(file, how)),
            );
        }
        for damage in all {
            let what = format!("after {ending:?}, {damage:?}");
            eprintln!("{what}");
            scene.restore();
            damage.apply(&scene.state());
            scene.server.start();
            let shown = scene.server.cli(&["backup", "show", "b1", "--json"]);
            let backup: Value = serde_json::from_str(&shown.stdout).expect("JSON");
            // Old eras that are missing count as changed, so without them nothing is lost but
            // sharpness; anything else would change the frozen bytes.
            if backup["state"] == "open" {
                assert_eq!(damage.file, BACKUP_FILES[2], "{what}: {backup}");
                check_frozen(&scene.server, &what);
            } else {
                let reason = backup["broken_reason"].as_str().unwrap_or_default();
                assert!(!reason.is_empty(), "{what}: {backup}");
                scene.server.cli(&["backup", "commit", "b1"]).error(4);
                let mut nbd = RawNbd::connect(&scene.server.frozen());
                nbd.structured_replies();
                if nbd.go("vda@b1").is_ok() {
                    assert!(nbd.read(0, 512).is_err(), "{what}: it can be read");
                }
            }
            scene.server.abort("b1");
            scene.check_disk(&what);
            scene.server.kill();
        }
    }
}

/// The frozen bytes are from before the last write, and what had changed by then is dirty.
fn check_frozen(server: &Server, what: &str) {
    let context = "qemu:dirty-bitmap:cp1";
    let mut export = server.open_frozen("vda@b1", &[context]);
    assert_eq!(export.read(5000 * CHUNK, 4096), Ok(vec![7; 4096]), "{what}");
    let map = export.map(context);
    for at in WRITES
        .iter()
        .flat_map(|(_, chunks)| *chunks)
        .map(|chunk| chunk * CHUNK)
    {
        let dirty = map.iter().any(|e| e.0 <= at && at < e.0 + e.1 && e.2 == 1);
        assert!(dirty, "{what}: {at} is clean: {map:?}");
    }
}

#[test]
fn a_state_of_a_newer_version_is_refused_and_left_as_it_is() {
    let scene = Scene::new(Ending::Stop);
    let Scene { mut server, .. } = scene;
    let state = state::directory(&server, "vda");
    // Behind sum and magic: the version, and three sets of feature bits.
    for (at, what) in [
        (12, "version"),
        (24, "read-only compatible"),
        (32, "incompatible"),
    ] {
        state::change_sector(&state, 0, |bytes| bytes[at] ^= 2);
        let before = contents(&state);
        let output = server.start_and_fail();
        let error = output.error(1);
        assert!(error.contains("newer"), "{what}: {output}");
        assert_eq!(contents(&state), before, "{what}: something was changed");
        state::change_sector(&state, 0, |bytes| bytes[at] ^= 2);
    }
    // What need not be understood is no obstacle.
    state::change_sector(&state, 0, |bytes| bytes[16] ^= 2);
    server.start();
    let begun = begin_since(&server, "after", "vda", "cp1");
    assert!(matches!(begun, Begun::Incremental { .. }), "{begun:?}");
}

/// Every file and its bytes, but the lock, which says who looked last.
fn contents(folder: &Path) -> Vec<(PathBuf, Vec<u8>)> {
    let mut found = Vec::new();
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            found.extend(contents(&path));
        // A frozen disk's scratch is as long as the disk; what it holds is not in question here.
        } else if !path.ends_with("stillpoint.lock") && !path.ends_with("scratch") {
            found.push((path.clone(), fs::read(&path).unwrap()));
        }
    }
    found.sort();
    found
}
