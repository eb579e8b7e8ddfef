//! What goes, what stays, and what a kill in between leaves.

use std::fs;
use std::time::Duration;

use rand::Rng as _;
use stillpoint::archive::Archive;
use stillpoint_tests::backup_folder::{BackupFolder, Disk};
use stillpoint_tests::seeds::{rng, seeds};
use stillpoint_tests::tools::path;
use stillpoint_tests::{KIB, MIB};

fn points(folder: &BackupFolder) -> Vec<u64> {
    let archive = Archive::open(&folder.path()).unwrap();
    archive.points().iter().map(|point| point.number).collect()
}

#[test]
fn what_stays_can_be_restored_and_the_next_point_has_a_new_number() {
    for seed in seeds(&[1, 2]) {
        let mut rng = rng(seed);
        let mut folder = BackupFolder::new(vec![Disk::new("vda", MIB, 64 * KIB)]);
        for day in 1..=8 {
            (0..4).for_each(|_| folder.disks[0].change(&mut rng));
            if day == 4 || day == 6 {
                folder.disks[0].forget();
            }
            folder.pull(&mut rng);
            folder.now += Duration::from_secs(86_400);
        }
        // Fulls are 1, 4 and 6.
        let dry = folder.stillpoint("prune", &["--keep-last", "3", "--dry-run"]);
        assert!(dry.ok().contains("would be pruned"), "{dry}");
        assert_eq!(points(&folder), [1, 2, 3, 4, 5, 6, 7, 8]);
        let json = folder
            .stillpoint("prune", &["--keep-daily", "4", "--json"])
            .json();
        assert_eq!(json["pruned"], serde_json::json!([1, 2, 3]), "{json}");
        assert_eq!(points(&folder), [4, 5, 6, 7, 8]);
        let text = folder.stillpoint("prune", &["--keep-last", "1"]);
        assert!(text.ok().contains("because point 7 builds on it"), "{text}");
        assert_eq!(points(&folder), [6, 7, 8]);
        folder.stillpoint("verify", &[]).ok();
        for point in [6, 7, 8] {
            let (at, out) = (point.to_string(), folder.beside("out"));
            let line = ["--at", &at, "--force", "-o", path(&out)];
            folder.stillpoint("restore", &line).ok();
            assert!(
                fs::read(&out).unwrap() == folder.past[&point]["vda"],
                "seed {seed}"
            );
        }
        folder.disks[0].forget();
        assert_eq!(folder.pull(&mut rng), 9);
        folder.stillpoint("prune", &["--keep-last", "1"]).ok();
        assert_eq!(points(&folder), [9]);
        assert_eq!(folder.pull(&mut rng), 10);
        let left = fs::read_dir(folder.path()).unwrap().count();
        assert_eq!(left, 5, "two points, two locks and an identity");
    }
}

#[test]
fn a_removal_that_is_interrupted_leaves_a_folder_that_is_sound() {
    let mut rng = rng(1);
    let mut folder = BackupFolder::new(vec![Disk::new("vda", MIB, 64 * KIB)]);
    for day in 1..=6 {
        (0..4).for_each(|_| folder.disks[0].change(&mut rng));
        if day == 5 {
            folder.disks[0].forget();
        }
        folder.pull(&mut rng);
    }
    // As after each of its steps: the youngest first, out of sight and then piece by piece.
    for gone in [4, 3, 2, 1] {
        let pruned = folder.path().join(format!("{gone}.pruned"));
        fs::rename(folder.path().join(gone.to_string()), &pruned).unwrap();
        folder.stillpoint("verify", &[]).ok();
        if rng.random() {
            fs::remove_file(pruned.join("manifest.json")).unwrap();
        }
        folder.stillpoint("verify", &[]).ok();
    }
    folder.stillpoint("prune", &["--keep-last", "9"]).ok();
    assert_eq!(points(&folder), [5, 6]);
    assert!(!folder.path().join("4.pruned").exists());
}

#[test]
fn what_is_being_read_is_not_removed() {
    let mut rng = rng(1);
    let mut folder = BackupFolder::new(vec![Disk::new("vda", MIB, 64 * KIB)]);
    for _ in 0..2 {
        folder.disks[0].forget();
        folder.pull(&mut rng);
    }
    let reader = Archive::open(&folder.path()).unwrap();
    let refused = folder.stillpoint("prune", &["--keep-last", "1"]);
    assert!(refused.error(1).contains("is in use"), "{refused}");
    assert_eq!(points(&folder), [1, 2]);
    drop(reader);
    folder.stillpoint("prune", &["--keep-last", "1"]).ok();
    assert_eq!(points(&folder), [2]);
}
