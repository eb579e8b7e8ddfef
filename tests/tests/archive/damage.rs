//! Every kind of byte is flipped: what `verify` and `restore` then say is held against what is lost.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Mutex;

use rand::Rng as _;
use serde_json::Value;
use stillpoint::archive::{
    Archive, Damage, Existing, Format, OnDamage, Progress, Restoration, Restored, Scope, Watch,
    restore, verify,
};
use stillpoint_tests::backup_folder::{BackupFolder, Disk};
use stillpoint_tests::seeds::{Rng, number, rng, seeds};
use stillpoint_tests::tools::path;
use stillpoint_tests::{KIB, MIB};

/// Keeps what it hears.
#[derive(Default)]
struct Listener(Mutex<Vec<Damage>>);

impl Progress for Listener {}

impl Watch for Listener {
    fn found(&self, damage: &Damage) {
        self.0.lock().unwrap().push(damage.clone());
    }
}

/// A full and two incrementals, with data, zeroes, and a part of a cluster at the end.
fn folder(rng: &mut Rng) -> BackupFolder {
    let mut folder = BackupFolder::new(vec![Disk::new("vda", 3 * MIB + 512, 4 * KIB)]);
    for _ in 0..3 {
        let disk = &mut folder.disks[0];
        for _ in 0..6 {
            let size = disk.contents.len();
            let start = rng.random_range(0..size - 4096);
            let length = rng.random_range(1..size / 4).min(size - start);
            rand::RngCore::fill_bytes(rng, &mut disk.contents[start..start + length]);
        }
        disk.contents[1 << 20..(1 << 20) + 65536].fill(0);
        *disk.contents.last_mut().unwrap() = 1;
        folder.pull(rng);
    }
    folder
}

fn flip(file: &Path, offset: u64, bit: u32) {
    let file = File::options().read(true).write(true).open(file).unwrap();
    let mut byte = [0];
    file.read_exact_at(&mut byte, offset).unwrap();
    byte[0] ^= 1 << bit;
    file.write_all_at(&byte, offset).unwrap();
}

fn damages(folder: &BackupFolder, scope: &Scope) -> Vec<Damage> {
    let archive = Archive::open(&folder.path()).unwrap();
    let listener = Listener::default();
    let verified = verify(&archive, scope, &listener).unwrap();
    let found = listener.0.into_inner().unwrap();
    assert_eq!(verified.damages, found.len() as u64);
    found
}

/// Restores the last point whatever is damaged, and returns what that made of the disk.
fn kept_going(folder: &BackupFolder) -> (Restored, Vec<u8>) {
    let archive = Archive::open(&folder.path()).unwrap();
    let output = folder.beside("restored");
    let wanted = Restoration {
        disk: "vda",
        point: 3,
        output: &output,
        format: Format::Raw,
        existing: Existing::Replace,
        damage: OnDamage::KeepGoing,
    };
    let restored = restore(&archive, &wanted, &()).unwrap();
    let refusing = Restoration {
        damage: OnDamage::Refuse,
        ..wanted
    };
    let refused = restore(&archive, &refusing, &());
    assert_eq!(refused.is_err(), restored.damages > 0, "{refused:?}");
    (restored, fs::read(&output).unwrap())
}

/// What is not told to be lost is right, what is lost is zeroes.
#[track_caller]
fn check_restored(what: &str, folder: &BackupFolder) -> Restored {
    let (restored, found) = kept_going(folder);
    let mut expected = folder.past[&3]["vda"].clone();
    for Range { start, end } in restored.lost.clone() {
        expected[start as usize..end as usize].fill(0);
    }
    assert!(found == expected, "{what}: {restored:?}");
    restored
}

#[test]
fn any_flipped_byte_of_a_file_is_named_with_its_place_and_nothing_wrong_is_restored() {
    let flips = number("STILLPOINT_ARCHIVE_FLIPS", 25);
    for seed in seeds(&[1]) {
        let mut rng = rng(seed);
        let folder = folder(&mut rng);
        assert_eq!(damages(&folder, &Scope::default()), []);
        assert_eq!(check_restored("sound", &folder).damages, 0);
        let (mut kinds, mut lost) = (BTreeSet::new(), 0);
        for point in 1..=3 {
            let file = folder.file(point, "vda.qcow2");
            let length = fs::metadata(&file).unwrap().len();
            // Every byte of a header, some of each cluster before the data, and any.
            let cluster = if point == 1 { 64 * KIB } else { 4 * KIB };
            let tables =
                (0..6).flat_map(|number| [0, 1, 7, 8, 9, 100].map(|at| number * cluster + at));
            let header = (0..130).step_by(if point == 2 { 1 } else { 10 });
            let mut places: Vec<_> = header.chain(tables).collect();
            places.extend((0..flips).map(|_| rng.random_range(0..length)));
            places.push(length - 1);
            for place in places {
                let bit = rng.random_range(0..8);
                flip(&file, place, bit);
                let what = format!("seed {seed}, point {point}, byte {place}, bit {bit}");
                let found = damages(&folder, &Scope::default());
                assert_eq!(found.len(), 1, "{what}: {found:?}");
                let Damage {
                    file: name,
                    offset: Some(offset),
                    length: Some(length),
                    ..
                } = &found[0]
                else {
                    panic!("{what}: {found:?}");
                };
                assert_eq!(*name, format!("{point}/vda.qcow2"), "{what}");
                assert!(
                    (*offset..offset + length).contains(&place),
                    "{what}: {found:?}"
                );
                kinds.insert(found[0].what.clone());
                if found[0].what == "data" {
                    assert!(!found[0].lost.is_empty(), "{what}");
                } else if found[0].what != "padding" || place < 6 * cluster {
                    // Of tables every byte is known.
                    assert_eq!((*offset, *length), (place, 1), "{what}");
                }
                if place % 5 == 0 || found[0].what == "data" {
                    lost += check_restored(&what, &folder).lost.len();
                }
                flip(&file, place, bit);
            }
        }
        let kinds: Vec<_> = kinds.into_iter().collect();
        let expected = [
            "a refcount block",
            "data",
            "padding",
            "the L1 table",
            "the L2 table",
            "the header",
            "the refcount table",
        ];
        assert_eq!(kinds, expected, "seed {seed}");
        assert!(lost > 0, "seed {seed}: some data is of the last point");
    }
}

#[test]
fn any_flipped_byte_of_a_manifest_is_damage_and_its_point_is_not_restored() {
    let mut rng = rng(3);
    let folder = folder(&mut rng);
    for point in 1..=3 {
        let file = folder.file(point, "manifest.json");
        let length = fs::metadata(&file).unwrap().len();
        for place in (0..length).filter(|at| at % 7 == 0 || *at < 40 || *at + 90 > length) {
            let bit = rng.random_range(0..8);
            flip(&file, place, bit);
            let what = format!("point {point}, byte {place}, bit {bit}");
            let found = damages(&folder, &Scope::default());
            assert_eq!(found.len(), 1, "{what}: {found:?}");
            assert_eq!(found[0].file, format!("{point}/manifest.json"), "{what}");
            assert_eq!(found[0].what, "the manifest", "{what}");
            let archive = Archive::open(&folder.path()).unwrap();
            assert_eq!(archive.find("latest", None).is_err(), point == 3, "{what}");
            flip(&file, place, bit);
        }
    }
    // Of an older one, what that alone has is lost, and told.
    flip(&folder.file(1, "manifest.json"), 50, 0);
    let restored = check_restored("point 1", &folder);
    assert!(!restored.lost.is_empty());
}

#[test]
fn the_command_names_what_is_damaged_and_exits_with_5() {
    let mut rng = rng(4);
    let folder = folder(&mut rng);
    let file = folder.file(2, "vda.qcow2");
    let last = fs::metadata(&file).unwrap().len() - 4 * KIB;
    flip(&file, last, 0);

    let output = folder.stillpoint("verify", &[]);
    assert!(output.error(5).contains("1 damage found"), "{output}");
    assert!(
        output.stdout.contains("damaged: 2/vda.qcow2 is not"),
        "{output}"
    );
    assert!(output.stdout.contains("data of bytes "), "{output}");
    let lines = json_lines(folder.stillpoint("verify", &["--json"]).exits(5));
    assert_eq!(lines[0]["event"], "damage");
    assert_eq!(lines[0]["file"], "2/vda.qcow2");
    assert_eq!(lines[0]["what"], "data");
    assert!(lines[0]["lost"][0][1].as_u64().unwrap() > 0);
    assert_eq!(lines[1]["event"], "result");
    assert_eq!(lines[1]["outcome"], "damaged");
    assert_eq!(lines.len(), 2);

    // Point 1 is not concerned.
    let sound = json_lines(
        folder
            .stillpoint("verify", &["--at", "1", "--json"])
            .exits(0),
    );
    assert_eq!(
        (&sound[0]["outcome"], &sound[0]["points"]),
        (&"sound".into(), &1.into())
    );
    folder.stillpoint("verify", &["--at", "3"]).error(5);

    let out = folder.beside("out");
    let refused = folder.stillpoint("restore", &["--at", "2", "-o", path(&out)]);
    assert!(refused.error(5).contains("2/vda.qcow2"), "{refused}");
    assert!(refused.stderr.contains("--keep-going"), "{refused}");
    assert!(!out.exists(), "a refused restore leaves nothing");
    let line = ["--at", "2", "--keep-going", "-o", path(&out)];
    let kept = folder.stillpoint("restore", &line);
    kept.error(5);
    assert!(kept.stdout.contains("lost: bytes "), "{kept}");
    let lines = folder.stillpoint("restore", &[&line[..], &["--force", "--json"]].concat());
    let lines = json_lines(lines.exits(5));
    let result = lines.last().unwrap();
    assert_eq!(result["event"], "result");
    let lost = &result["disks"][0]["lost"];
    let total: u64 = lost
        .as_array()
        .unwrap()
        .iter()
        .map(|run| run[1].as_u64().unwrap())
        .sum();
    assert_eq!(result["lost_bytes"], total);
    assert!(total > 0);
}

#[test]
fn missing_files_folders_and_ends_are_told() {
    let mut rng = rng(5);
    let folder = folder(&mut rng);
    let here = |name: &str| folder.path().join(name);
    let only = |expected: &str| {
        let found = damages(&folder, &Scope::default());
        assert_eq!(found.len(), 1, "{found:?}");
        assert!(found[0].message.contains(expected), "{found:?}");
        check_restored(expected, &folder)
    };

    fs::rename(here("2"), here("away")).unwrap();
    let restored = only("point 3 builds on point 2 for vda, which is not there");
    assert!(!restored.lost.is_empty());
    folder
        .stillpoint("restore", &["-o", path(&folder.beside("x"))])
        .error(5);
    fs::rename(here("away"), here("2")).unwrap();

    fs::rename(here("1/vda.qcow2"), here("away")).unwrap();
    only("1/vda.qcow2 cannot be read");
    fs::rename(here("away"), here("1/vda.qcow2")).unwrap();

    let file = File::options()
        .write(true)
        .open(here("1/vda.qcow2"))
        .unwrap();
    let length = file.metadata().unwrap().len();
    let whole = fs::read(here("1/vda.qcow2")).unwrap();
    file.set_len(length - 1).unwrap();
    only("the file ends before");
    file.set_len(0).unwrap();
    let found = damages(&folder, &Scope::default());
    assert!(
        found.iter().any(|damage| damage.what == "the header"),
        "{found:?}"
    );
    check_restored("empty", &folder);
    fs::write(here("1/vda.qcow2"), &whole).unwrap();
    file.set_len(length + 1).unwrap();
    let found = damages(&folder, &Scope::default());
    assert_eq!(
        (found.len(), found[0].offset),
        (1, Some(length)),
        "{found:?}"
    );
    file.set_len(length).unwrap();

    fs::rename(here("3/manifest.json"), here("away")).unwrap();
    let found = damages(&folder, &Scope::default());
    assert!(found[0].message.contains("it is missing"), "{found:?}");
    fs::rename(here("away"), here("3/manifest.json")).unwrap();

    flip(&here("folder.json"), 20, 1);
    let found = damages(&folder, &Scope::default());
    assert_eq!(found[0].file, "folder.json");
    flip(&here("folder.json"), 20, 1);
    assert_eq!(damages(&folder, &Scope::default()), []);
}

#[test]
fn a_point_that_was_made_on_another_file_is_told() {
    let mut rng = rng(6);
    let folder = folder(&mut rng);
    let mut other = self::folder(&mut rng);
    other.disks[0].uuid = folder.disks[0].uuid;
    // Sound by itself, but not what point 3 builds on.
    fs::remove_dir_all(folder.path().join("2")).unwrap();
    stillpoint_tests::backup_folder::copy_folder(&other.path().join("2"), &folder.path().join("2"));
    let found = damages(&folder, &Scope::default());
    let messages: Vec<_> = found.iter().map(|damage| damage.message.as_str()).collect();
    assert!(
        messages.contains(&"point 3 builds on another file of vda than point 2 has"),
        "{messages:?}"
    );
    check_restored("another", &folder);
}

fn json_lines(output: &stillpoint_tests::Output) -> Vec<Value> {
    let lines = output.stdout.lines();
    lines
        .map(|line| serde_json::from_str(line).unwrap())
        .collect()
}
