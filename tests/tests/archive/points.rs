//! Random histories, and what `qemu-img`, `e2fsck` and our own commands make of every point.

use std::fs::{self, File};
use std::io::Read;
use std::path::Path;

use rand::Rng as _;
use stillpoint_tests::backup_folder::{BackupFolder, Disk};
use stillpoint_tests::seeds::{number, rng, seeds};
use stillpoint_tests::tools::{path, sha256, sha256_of_file, tool};
use stillpoint_tests::{KIB, LoopDevice, MIB, Mount};

#[test]
fn every_point_of_a_random_history_is_what_the_disks_were() {
    let rounds = number("STILLPOINT_ARCHIVE_HISTORIES", 6);
    for seed in seeds(&(1..=rounds).collect::<Vec<_>>()) {
        let mut rng = rng(seed);
        let disks = (0..rng.random_range(1..3)).map(|disk| {
            let size = rng.random_range(1..6 * MIB / 512) * 512;
            let granularity = 512 << rng.random_range(0..9);
            Disk::new(&format!("vd{disk}"), size, granularity)
        });
        let mut folder = BackupFolder::new(disks.collect());
        for _ in 0..rng.random_range(2..6) {
            for disk in &mut folder.disks {
                (0..rng.random_range(0..12)).for_each(|_| disk.change(&mut rng));
            }
            folder.pull(&mut rng);
        }
        folder.stillpoint("verify", &[]).ok();
        for (point, disks) in &folder.past {
            for (name, contents) in disks {
                let what = format!("seed {seed}, point {point}, {name}");
                let file = folder.file(*point, &format!("{name}.qcow2"));
                tool("qemu-img", &["check", path(&file)]).ok();
                let raw = folder.beside("expected.raw");
                fs::write(&raw, contents).unwrap();
                identical(&what, &raw, "raw", &file);

                let output = folder.beside("restored");
                let at = point.to_string();
                let line = [
                    "--at",
                    &at,
                    "--disk",
                    name,
                    "--force",
                    "--output",
                    path(&output),
                ];
                folder.stillpoint("restore", &line).ok();
                assert_eq!(sha256_of_file(&output), sha256(contents), "{what}");
                folder
                    .stillpoint("restore", &[&line[..], &["--format", "qcow2"]].concat())
                    .ok();
                tool("qemu-img", &["check", path(&output)]).ok();
                identical(&what, &raw, "raw", &output);
                let info = tool("qemu-img", &["info", "--output=json", path(&output)]).json();
                assert_eq!(info.get("backing-filename"), None, "{what}");
            }
        }
        assert_moves(&folder);
    }
}

/// A folder is the same wherever it lies.
fn assert_moves(folder: &BackupFolder) {
    let (last, disks) = folder.past.last_key_value().expect("there are points");
    let moved = folder.beside("moved");
    stillpoint_tests::backup_folder::copy_folder(&folder.path(), &moved);
    for (name, contents) in disks {
        let raw = folder.beside("expected.raw");
        fs::write(&raw, contents).unwrap();
        let file = moved.join(format!("{last}/{name}.qcow2"));
        identical("moved", &raw, "raw", &file);
    }
}

#[track_caller]
fn identical(what: &str, one: &Path, format: &str, other: &Path) {
    let args = [
        "compare",
        "-f",
        format,
        "-F",
        "qcow2",
        path(one),
        path(other),
    ];
    let same = tool("qemu-img", &args);
    assert_eq!(same.code(), 0, "{what}: {same}");
}

#[test]
fn a_restored_file_system_is_sound_and_has_its_files() {
    let mut rng = rng(1);
    let mut folder = BackupFolder::new(vec![Disk::new("vda", 32 * MIB, 64 * KIB)]);
    let image = folder.beside("image");
    fs::write(&image, &folder.disks[0].contents).unwrap();
    tool("mkfs.ext4", &["-q", path(&image)]).ok();
    let mut files = Vec::new();
    for round in 0..3u8 {
        let contents = vec![round + 1; 300_000 + usize::from(round)];
        fs::write(folder.beside("source"), &contents).unwrap();
        let write = format!("write {} file{round}", path(&folder.beside("source")));
        tool("debugfs", &["-w", "-R", &write, path(&image)]).ok();
        files.push((format!("file{round}"), sha256(&contents)));
        folder.disks[0].contents = fs::read(&image).unwrap();
        folder.pull(&mut rng);
    }
    for (point, round) in (1..=3).zip(0..) {
        let output = folder.beside(&format!("restored{point}"));
        let at = point.to_string();
        folder
            .stillpoint("restore", &["--at", &at, "-o", path(&output)])
            .ok();
        tool("e2fsck", &["-fn", path(&output)]).ok();
        for (number, (name, expected)) in files.iter().enumerate() {
            let copy = folder.beside("copy");
            let _ = fs::remove_file(&copy);
            let dump = format!("dump {name} {}", path(&copy));
            tool("debugfs", &["-R", &dump, path(&output)]).ok();
            let found = copy.exists().then(|| sha256_of_file(&copy));
            let is_there = number <= round;
            assert_eq!(
                found,
                is_there.then(|| expected.clone()),
                "point {point}, {name}"
            );
        }
    }
}

#[test]
fn a_sparse_disk_is_restored_sparse() {
    let mut rng = rng(1);
    let mut folder = BackupFolder::new(vec![Disk::new("vda", 64 * MIB, 64 * KIB)]);
    folder.disks[0].contents[40 << 20] = 1;
    folder.pull(&mut rng);
    let output = folder.beside("restored");
    folder.stillpoint("restore", &["-o", path(&output)]).ok();
    let found = fs::metadata(&output).unwrap();
    assert_eq!(found.len(), 64 * MIB);
    let taken = std::os::unix::fs::MetadataExt::blocks(&found) * 512;
    assert!(taken <= 64 * KIB, "{taken} bytes");
}

#[test]
fn a_block_device_takes_a_disk_and_what_was_on_it_is_gone() {
    let mut rng = rng(1);
    let mut folder = BackupFolder::new(vec![Disk::new("vda", 3 * MIB, 64 * KIB)]);
    (0..9).for_each(|_| folder.disks[0].change(&mut rng));
    folder.pull(&mut rng);
    let size = folder.disks[0].contents.len();

    let backing = folder.beside("backing");
    fs::write(&backing, vec![0xaa; size + 4096]).unwrap();
    let device = LoopDevice::new(&backing);
    let line = ["-o", path(device.path())];
    folder.stillpoint("restore", &line).error(1);
    folder
        .stillpoint(
            "restore",
            &[&line[..], &["--force", "--format", "qcow2"]].concat(),
        )
        .error(1);
    folder
        .stillpoint("restore", &[&line[..], &["--force"]].concat())
        .ok();
    let mut found = Vec::new();
    File::open(device.path())
        .unwrap()
        .read_to_end(&mut found)
        .unwrap();
    assert!(found[..size] == folder.disks[0].contents);
    assert!(found[size..].iter().all(|byte| *byte == 0xaa));

    let small = folder.beside("small");
    fs::write(&small, vec![0xaa; size - 4096]).unwrap();
    let device = LoopDevice::new(&small);
    let refused = folder.stillpoint("restore", &["-o", path(device.path()), "--force"]);
    assert!(refused.error(1).contains("the disk has"), "{refused}");
    // One that is in use is left alone.
    let mount = Mount::ext4(8 * MIB);
    let mounts = fs::read_to_string("/proc/mounts").unwrap();
    let line = mounts
        .lines()
        .find(|line| line.contains(path(mount.path())));
    let device = line.unwrap().split(' ').next().unwrap();
    let refused = folder.stillpoint("restore", &["-o", device, "--force"]);
    assert!(refused.error(1).contains("in use"), "{refused}");
}

#[test]
fn what_is_there_is_not_overwritten_unless_asked() {
    let mut rng = rng(1);
    let mut folder = BackupFolder::new(vec![Disk::new("vda", MIB, 64 * KIB)]);
    folder.disks[0].contents[0] = 1;
    folder.pull(&mut rng);
    let output = folder.beside("precious");
    fs::write(&output, "precious").unwrap();
    let line = ["-o", path(&output)];
    let refused = folder.stillpoint("restore", &line);
    assert!(refused.error(1).contains("is there already"), "{refused}");
    assert_eq!(fs::read(&output).unwrap(), b"precious");
    folder
        .stillpoint("restore", &[&line[..], &["--force"]].concat())
        .ok();
    assert!(fs::read(&output).unwrap() == folder.disks[0].contents);
    // Nothing else is left beside it.
    let left = fs::read_dir(folder.beside("")).unwrap();
    assert_eq!(left.count(), 2);
}

#[test]
fn a_point_is_found_by_number_checkpoint_uuid_and_time() {
    let mut rng = rng(1);
    let mut folder = BackupFolder::new(vec![
        Disk::new("vda", 64 * KIB, 4 * KIB),
        Disk::new("vdb", 64 * KIB, 4 * KIB),
    ]);
    for byte in 1..4 {
        folder.disks[0].contents[0] = byte;
        folder.pull(&mut rng);
        folder.now += std::time::Duration::from_secs(60);
    }
    let restored = |at: &str| {
        let output = folder.beside("out");
        let line = ["--at", at, "--disk", "vda", "--force", "-o", path(&output)];
        let output = folder.stillpoint("restore", &line);
        (output.code() == 0).then(|| fs::read(folder.beside("out")).unwrap()[0])
    };
    for (at, expected) in [
        ("1", Some(1)),
        ("cp2", Some(2)),
        ("00000000-0000-0000-0000-000000000003", Some(3)),
        ("latest", Some(3)),
        ("2026-11-20T21:14:03Z", Some(1)),
        ("2026-11-20T22:15:02.999+01:00", Some(1)),
        ("2026-11-20T21:15:03Z", Some(2)),
        ("2099-01-01T00:00:00Z", Some(3)),
        ("2020-01-01T00:00:00Z", None),
        ("4", None),
        ("cp9", None),
        ("yesterday", None),
    ] {
        assert_eq!(restored(at), expected, "{at}");
    }
    // All disks go to a folder.
    let all = folder.beside("all");
    folder.stillpoint("restore", &["-o", path(&all)]).ok();
    for name in ["vda.raw", "vdb.raw"] {
        assert_eq!(
            fs::metadata(all.join(name)).unwrap().len(),
            64 * KIB,
            "{name}"
        );
    }
    let list = folder.stillpoint("list", &["--json"]).json();
    assert_eq!(list[1]["disks"][1]["parent"], 1);
    assert_eq!(list[0]["disks"][0]["mode"], "full");
    assert_eq!(list[2]["checkpoint"]["name"], "cp3");
    let list = folder.stillpoint("list", &[]);
    assert!(list.ok().contains("incremental to 2"), "{list}");
    let unknown = folder.stillpoint("restore", &["--disk", "vdz", "-o", path(&all)]);
    unknown.error(1);
    folder.stillpoint("verify", &["--disk", "vdz"]).error(1);
}
