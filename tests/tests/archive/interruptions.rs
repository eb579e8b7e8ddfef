//! A point whose making is interrupted goes on, and is never seen half made.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;

use rand::Rng as _;
use stillpoint::archive::{Archive, ArchiveError, Leftover, Progress};
use stillpoint_tests::backup_folder::{BackupFolder, Disk};
use stillpoint_tests::seeds::{number, rng, seeds};
use stillpoint_tests::tools::path;
use stillpoint_tests::{KIB, MIB, Mount};

fn folder() -> BackupFolder {
    BackupFolder::new(vec![
        Disk::new("vda", 9 * MIB + 512, 64 * KIB),
        Disk::new("vdb", 2 * MIB, 4 * KIB),
    ])
}

/// Begins a point and puts some of it.
fn begin(folder: &BackupFolder, rng: &mut stillpoint_tests::seeds::Rng) -> u64 {
    let archive = Archive::open_for_writing(&folder.path()).unwrap();
    let draft = archive.begin(folder.plan()).unwrap();
    let mut left = 0;
    for (draft, disk) in draft.disks().iter().zip(&folder.disks) {
        for chunk in draft.chunks() {
            if rng.random() {
                draft.put(&chunk, &disk.pieces(&chunk, rng)).unwrap();
            } else {
                left += chunk.bytes();
            }
        }
    }
    left
}

#[test]
fn what_was_stored_is_not_fetched_again_and_nothing_is_seen_before_it_is_whole() {
    let rounds = number("STILLPOINT_ARCHIVE_INTERRUPTIONS", 8);
    for seed in seeds(&(1..=rounds).collect::<Vec<_>>()) {
        let mut rng = rng(seed);
        let mut folder = folder();
        for _ in 0..3 {
            for disk in &mut folder.disks {
                (0..9).for_each(|_| disk.change(&mut rng));
            }
            let left = begin(&folder, &mut rng);
            let published = Archive::open(&folder.path()).unwrap().points().len();
            assert_eq!(published, folder.past.len(), "seed {seed}");

            let archive = Archive::open_for_writing(&folder.path()).unwrap();
            let Leftover::Interrupted(draft) = archive.leftover().unwrap() else {
                panic!("seed {seed}: nothing can go on");
            };
            let draft = draft.go_on(&()).unwrap();
            assert_eq!(folder.put_all(&draft, &mut rng), left, "seed {seed}");
            let point = draft.finish(&()).unwrap();
            folder.note(&point);
        }
        folder.stillpoint("verify", &[]).ok();
        let out = folder.beside("out");
        for disk in ["vda", "vdb"] {
            let line = ["--disk", disk, "--force", "-o", path(&out)];
            folder.stillpoint("restore", &line).ok();
            assert!(
                fs::read(&out).unwrap() == folder.past[&3][disk],
                "seed {seed}, {disk}"
            );
        }
    }
}

#[test]
fn what_changed_on_the_disk_meanwhile_is_found_and_fetched_again() {
    for seed in seeds(&[1, 2, 3, 4]) {
        let mut rng = rng(seed);
        let mut folder = folder();
        for disk in &mut folder.disks {
            (0..20).for_each(|_| disk.change(&mut rng));
        }
        begin(&folder, &mut rng);
        for name in ["vda", "vdb"] {
            let path = folder.path().join(format!("1.partial/{name}.qcow2"));
            let file = File::options().write(true).open(path).unwrap();
            let length = file.metadata().unwrap().len();
            for _ in 0..5 {
                file.write_all_at(&[0x5a; 512], rng.random_range(0..length - 512))
                    .unwrap();
            }
            let path = folder.path().join(format!("1.partial/{name}.done"));
            let records = File::options().write(true).open(path).unwrap();
            let length = records.metadata().unwrap().len();
            records
                .set_len(length - length.min(rng.random_range(0..100)))
                .unwrap();
        }
        folder.go_on(&mut rng);
        folder.stillpoint("verify", &[]).ok();
        let out = folder.beside("out");
        folder
            .stillpoint("restore", &["--disk", "vda", "-o", path(&out)])
            .ok();
        assert!(
            fs::read(&out).unwrap() == folder.past[&1]["vda"],
            "seed {seed}"
        );
    }
}

#[test]
fn a_bit_that_flips_between_write_and_verify_is_found_and_the_next_run_mends_it() {
    for seed in seeds(&[1, 2, 3, 4, 5, 6]) {
        let mut rng = rng(seed);
        let mut folder = folder();
        (0..20).for_each(|_| folder.disks[0].change(&mut rng));
        *folder.disks[0].contents.last_mut().unwrap() = 1;
        let archive = Archive::open_for_writing(&folder.path()).unwrap();
        let draft = archive.begin(folder.plan()).unwrap();
        folder.put_all(&draft, &mut rng);
        let file = folder.path().join("1.partial/vda.qcow2");
        let file = File::options().read(true).write(true).open(file).unwrap();
        let length = file.metadata().unwrap().len();
        // What is after the end of the disk counts too.
        let place = match seed {
            1 => length - 1,
            _ => rng.random_range(0..length),
        };
        let mut byte = [0];
        file.read_exact_at(&mut byte, place).unwrap();
        file.write_all_at(&[byte[0] ^ 1 << rng.random_range(0..8)], place)
            .unwrap();
        let error = draft.finish(&()).unwrap_err();
        let ArchiveError::Differs { path, offset, .. } = &error else {
            panic!("seed {seed}: {error:?}");
        };
        assert!(
            path.ends_with("1.partial/vda.qcow2"),
            "seed {seed}: {error}"
        );
        assert!(*offset <= place, "seed {seed}: {error}, byte {place}");
        drop(archive);
        assert!(Archive::open(&folder.path()).unwrap().points().is_empty());
        folder.go_on(&mut rng);
        folder.stillpoint("verify", &[]).ok();
    }
}

#[test]
fn what_cannot_go_on_is_removed_with_the_reason() {
    let mut rng = rng(1);
    let mut folder = folder();
    (0..9).for_each(|_| folder.disks[0].change(&mut rng));
    let partial = folder.path().join("1.partial");
    let damages: [(&str, &dyn Fn()); 4] = [
        ("had not begun", &|| {
            fs::remove_file(partial.join("plan.json")).unwrap()
        }),
        ("plan is damaged", &|| {
            let file = File::options()
                .write(true)
                .open(partial.join("plan.json"))
                .unwrap();
            file.write_all_at(b"x", 30).unwrap();
        }),
        ("files of it are missing", &|| {
            fs::remove_file(partial.join("vdb.qcow2")).unwrap()
        }),
        ("files of it are missing", &|| {
            fs::remove_file(partial.join("vda.done")).unwrap()
        }),
    ];
    for (expected, damage) in damages {
        begin(&folder, &mut rng);
        damage();
        let archive = Archive::open_for_writing(&folder.path()).unwrap();
        let Leftover::Removed(reason) = archive.leftover().unwrap() else {
            panic!("{expected}");
        };
        assert!(reason.contains(expected), "{reason}");
        assert!(!partial.exists(), "{expected}");
        assert!(matches!(archive.leftover().unwrap(), Leftover::Nothing));
    }
    // And one that is not wanted.
    begin(&folder, &mut rng);
    let archive = Archive::open_for_writing(&folder.path()).unwrap();
    let Leftover::Interrupted(draft) = archive.leftover().unwrap() else {
        panic!("it can go on");
    };
    draft.discard().unwrap();
    assert!(!partial.exists());
}

#[test]
fn what_a_point_needed_to_be_made_goes_with_the_next_opening() {
    let mut rng = rng(1);
    let mut folder = folder();
    folder.pull(&mut rng);
    // A crash between the rename and the sweep leaves these; one in a removal leaves that.
    fs::write(folder.file(1, "plan.json"), "x").unwrap();
    fs::write(folder.file(1, "vda.done"), "x").unwrap();
    fs::create_dir(folder.path().join("7.pruned")).unwrap();
    fs::write(folder.path().join("7.pruned/vda.qcow2"), "x").unwrap();
    folder.stillpoint("verify", &[]).ok();
    drop(Archive::open_for_writing(&folder.path()).unwrap());
    for gone in ["1/plan.json", "1/vda.done", "7.pruned"] {
        assert!(!folder.path().join(gone).exists(), "{gone}");
    }
    folder.stillpoint("verify", &[]).ok();
}

#[test]
fn a_full_file_system_loses_nothing_and_the_next_run_goes_on() {
    for mount in [Mount::tmpfs(12 * MIB), Mount::ext4(16 * MIB)] {
        let mut rng = rng(1);
        let mut folder = BackupFolder::at(
            &mount.path().join("backups"),
            vec![Disk::new("vda", 6 * MIB, 64 * KIB)],
        );
        rand::RngCore::fill_bytes(&mut rng, &mut folder.disks[0].contents);
        let archive = Archive::open_for_writing(&folder.path()).unwrap();
        let draft = archive.begin(folder.plan()).unwrap();
        let disk = draft.disks()[0].clone();
        let put = |chunk| disk.put(&chunk, &folder.disks[0].pieces(&chunk, &mut rng.clone()));
        let first = disk.chunks().next().unwrap();
        put(first).unwrap();
        let filler = mount.fill();
        let error = disk.chunks().find_map(|chunk| put(chunk).err()).unwrap();
        assert!(matches!(error, ArchiveError::NoSpace(_)), "{error:?}");
        assert_eq!(error.code(), "no-space");
        assert!(error.hint().unwrap().contains("make room"));
        drop((draft, archive));
        // Whatever comes to open it says the same, and harms nothing.
        if let Err(error) = Archive::open_for_writing(&folder.path()) {
            assert!(matches!(error, ArchiveError::NoSpace(_)), "{error:?}");
        }
        drop(filler);
        let archive = Archive::open_for_writing(&folder.path()).unwrap();
        let Leftover::Interrupted(draft) = archive.leftover().unwrap() else {
            panic!("it can go on");
        };
        let draft = draft.go_on(&()).unwrap();
        let stored = folder.put_all(&draft, &mut rng);
        assert!(stored <= 5 * MIB, "{stored} of {}", 6 * MIB);
        let point = draft.finish(&()).unwrap();
        folder.note(&point);
        drop(archive);
        folder.stillpoint("verify", &[]).ok();

        // A restore that does not fit leaves nothing behind.
        let filler = mount.fill();
        let out = mount.path().join("out");
        let refused = folder.stillpoint("restore", &["-o", path(&out)]);
        assert!(refused.error(1).contains("no space is left"), "{refused}");
        drop(filler);
        let left: Vec<_> = fs::read_dir(mount.path())
            .unwrap()
            .map(|entry| entry.unwrap().file_name())
            .filter(|name| name != "lost+found")
            .collect();
        assert_eq!(left, ["backups"]);
    }
}

#[test]
fn whoever_watches_can_stop_it_and_it_goes_on_later() {
    struct Impatient;
    impl Progress for Impatient {
        fn is_stopped(&self) -> bool {
            true
        }
    }
    let mut rng = rng(1);
    let mut folder = folder();
    (0..20).for_each(|_| folder.disks[0].change(&mut rng));
    let archive = Archive::open_for_writing(&folder.path()).unwrap();
    let draft = archive.begin(folder.plan()).unwrap();
    folder.put_all(&draft, &mut rng);
    let stopped = draft.finish(&Impatient);
    assert!(matches!(stopped, Err(ArchiveError::Stopped)));
    drop(archive);
    folder.go_on(&mut rng);
    folder.stillpoint("verify", &[]).ok();
}
