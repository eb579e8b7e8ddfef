//! Folders that are not to be touched, and plans that cannot be.

use std::fs;
use std::process::Command;

use serde_json::Value;
use stillpoint::archive::{Archive, ArchiveError, Mode};
use stillpoint_tests::backup_folder::{BackupFolder, Disk};
use stillpoint_tests::process::run;
use stillpoint_tests::seeds::rng;
use stillpoint_tests::server::{binary, temporary_directory};
use stillpoint_tests::tools::path;
use stillpoint_tests::{KIB, MIB, Mount};
use uuid::Uuid;

fn folder_of_two() -> BackupFolder {
    let mut rng = rng(1);
    let mut folder = BackupFolder::new(vec![Disk::new("vda", MIB, 64 * KIB)]);
    for byte in 1..3 {
        folder.disks[0].contents[7] = byte;
        folder.pull(&mut rng);
    }
    folder
}

#[test]
fn a_machine_that_gives_no_threads_is_told_of() {
    let folder = folder_of_two();
    let mut command = Command::new("strace");
    command.args(["-f", "-o", "/dev/null", "-e", "trace=clone,clone3"]);
    command.args(["-e", "inject=clone,clone3:error=EAGAIN"]);
    command.arg(binary()).args(["verify", path(&folder.path())]);
    let output = run(&mut command);
    assert!(output.error(1).contains("no thread"), "{output}");
}

#[test]
fn a_folder_of_something_else_is_left_alone() {
    let directory = temporary_directory();
    let here = |name: &str| directory.path().join(name);
    fs::create_dir(here("photos")).unwrap();
    fs::write(here("photos/cat.jpg"), "cat").unwrap();
    let error = Archive::open_for_writing(&here("photos")).unwrap_err();
    assert!(matches!(error, ArchiveError::NotOurs(_)), "{error:?}");
    assert_eq!(fs::read_dir(here("photos")).unwrap().count(), 1);
    let error = Archive::open(&here("photos")).unwrap_err();
    assert!(matches!(error, ArchiveError::NoFolder(_)), "{error:?}");
    let error = Archive::open(&here("nothing")).unwrap_err();
    assert!(matches!(error, ArchiveError::NoFolder(_)), "{error:?}");
    let error = Archive::open_for_writing(&here("photos/cat.jpg")).unwrap_err();
    assert!(matches!(error, ArchiveError::Io { .. }), "{error:?}");
    // One in which there is nothing yet is fine, and so is the root of a new file system.
    fs::create_dir(here("empty")).unwrap();
    let archive = Archive::open_for_writing(&here("empty")).unwrap();
    let identity = archive.identity().unwrap();
    drop(archive);
    let archive = Archive::open(&here("empty")).unwrap();
    assert_eq!(archive.identity().unwrap(), identity);
    assert!(archive.points().is_empty());
    let mount = Mount::ext4(8 * MIB);
    Archive::open_for_writing(mount.path()).unwrap();
}

#[test]
fn a_point_that_is_not_there_and_a_disk_that_it_lacks_are_told_apart() {
    let folder = folder_of_two();
    let output = folder.beside("output");
    for at in ["latest", "1"] {
        let line = ["--at", at, "--disk", "foo", "-o", path(&output)];
        let refused = folder.stillpoint("restore", &line);
        let error = refused.error(1);
        assert!(error.contains("no disk 'foo': it has vda"), "{refused}");
        assert!(!error.contains("no point"), "{refused}");
    }
    for disk in [&[][..], &["--disk", "foo"]] {
        let line = [&["--at", "2020-01-01", "-o", path(&output)], disk].concat();
        let refused = folder.stillpoint("restore", &line);
        let error = refused.error(1);
        assert!(error.contains("no point '2020-01-01'"), "{refused}");
        assert!(error.contains("2026-11-20T21:14:03Z"), "{refused}");
    }
}

#[test]
fn a_newer_version_is_refused_by_its_number() {
    let folder = folder_of_two();
    let file = folder.file(2, "manifest.json");
    let text = fs::read_to_string(&file).unwrap();
    let newer = reseal(&text.replacen("\"version\":1", "\"version\":9", 1));
    fs::write(&file, newer).unwrap();
    for (command, line) in [
        ("verify", &[][..]),
        ("restore", &["-o", "/nonexistent/x"]),
        ("prune", &["--keep-last", "1"]),
    ] {
        let output = folder.stillpoint(command, line);
        let error = output.error(1);
        assert!(error.contains("version 9"), "{output}");
        assert!(error.contains("knows 1"), "{output}");
        assert!(output.stderr.contains("use a newer stillpoint"), "{output}");
    }
    let error = Archive::open_for_writing(&folder.path()).unwrap_err();
    assert!(
        matches!(error, ArchiveError::Newer { version: 9, .. }),
        "{error:?}"
    );
    let list = folder.stillpoint("list", &["--json"]).json();
    assert_eq!(list[1]["point"], 2);
    assert!(
        list[1]["error"].as_str().unwrap().contains("version 9"),
        "{list}"
    );
    // What is older is ours to read.
    let out = folder.beside("out");
    folder
        .stillpoint("restore", &["--at", "1", "-o", path(&out)])
        .ok();
    assert!(fs::read(&out).unwrap() == folder.past[&1]["vda"]);
}

/// The text with the hash that belongs to it, as its documentation says.
fn reseal(text: &str) -> String {
    let (body, _) = text.rsplit_once(",\"blake3\":\"").unwrap();
    format!(
        "{body},\"blake3\":\"{}\"}}\n",
        blake3::hash(body.as_bytes())
    )
}

#[test]
fn another_disk_of_the_same_name_is_refused() {
    let mut folder = folder_of_two();
    folder.disks[0].uuid = Uuid::new_v4();
    for mode in [Mode::Incremental, Mode::Full] {
        let archive = Archive::open_for_writing(&folder.path()).unwrap();
        let mut plan = folder.plan();
        if mode == Mode::Full {
            let disk = &mut plan.disks[0];
            disk.mode = mode;
            (disk.parent, disk.data, disk.zero) = (None, vec![], vec![0..disk.size]);
        }
        let error = archive.begin(plan).unwrap_err();
        assert!(matches!(error, ArchiveError::OtherDisk { .. }), "{error:?}");
        assert!(!folder.path().join("3.partial").exists());
    }
}

#[test]
fn plans_that_would_lose_something_are_refused() {
    let mut folder = folder_of_two();
    folder.disks[0].contents[9] = 1;
    let archive = Archive::open_for_writing(&folder.path()).unwrap();
    let refused = |change: &dyn Fn(&mut stillpoint::archive::DiskPlan)| {
        let mut plan = folder.plan();
        change(&mut plan.disks[0]);
        let error = archive.begin(plan).unwrap_err();
        assert!(!folder.path().join("3.partial").exists(), "{error:?}");
        error
    };
    let error = refused(&|disk| disk.parent = Some(9));
    assert!(
        matches!(error, ArchiveError::MissingLink { missing: 9, .. }),
        "{error:?}"
    );
    for error in [
        refused(&|disk| disk.parent = None),
        refused(&|disk| disk.name = "../vda".into()),
        refused(&|disk| disk.size = 1000),
        refused(&|disk| disk.size = 0),
        refused(&|disk| disk.data = vec![0..2 * MIB]),
        refused(&|disk| disk.data = vec![0..512, 0..512]),
        refused(&|disk| {
            (disk.mode, disk.parent) = (Mode::Full, None);
            (disk.data, disk.zero) = (vec![0..512], vec![1024..MIB]);
        }),
    ] {
        assert!(matches!(error, ArchiveError::Plan(_)), "{error:?}");
    }
    let mut plan = folder.plan();
    plan.disks.push(plan.disks[0].clone());
    assert!(matches!(archive.begin(plan), Err(ArchiveError::Plan(_))));
    // A chunk that is not what was asked for is no chunk.
    let draft = archive.begin(folder.plan()).unwrap();
    let disk = &draft.disks()[0];
    let chunk = disk.chunks().next().unwrap();
    let pieces = |bytes: u64| vec![stillpoint::archive::Piece::Zero(bytes)];
    assert!(disk.put(&chunk, &pieces(chunk.bytes() - 1)).is_err());
    let mut other = chunk.clone();
    other.index += 1;
    assert!(disk.put(&other, &pieces(chunk.bytes())).is_err());
    assert!(draft.finish(&()).is_err(), "a chunk is missing");
}

#[test]
fn one_at_a_time_changes_a_folder_and_others_read_meanwhile() {
    let folder = folder_of_two();
    let writer = Archive::open_for_writing(&folder.path()).unwrap();
    let error = Archive::open_for_writing(&folder.path()).unwrap_err();
    assert!(matches!(error, ArchiveError::Locked { .. }), "{error:?}");
    let pid = format!("(pid {})", std::process::id());
    assert!(error.to_string().contains(&pid), "{error}");
    let refused = folder.stillpoint("prune", &["--keep-last", "1"]);
    assert!(refused.error(1).contains(&pid), "{refused}");
    folder.stillpoint("verify", &[]).ok();
    folder.stillpoint("list", &[]).ok();
    folder
        .stillpoint("prune", &["--keep-last", "1", "--dry-run"])
        .ok();
    // A draft keeps others out as well.
    let draft = writer.begin(folder.plan()).unwrap();
    drop(writer);
    assert!(Archive::open_for_writing(&folder.path()).is_err());
    draft.discard().unwrap();
    Archive::open_for_writing(&folder.path()).unwrap();
}

#[test]
fn a_folder_that_cannot_be_written_is_read() {
    let mount = Mount::ext4(16 * MIB);
    let mut folder = BackupFolder::at(
        &mount.path().join("backups"),
        vec![Disk::new("vda", MIB, 64 * KIB)],
    );
    folder.disks[0].contents[0] = 1;
    folder.pull(&mut rng(1));
    mount.fail();
    let error = Archive::open_for_writing(&folder.path()).unwrap_err();
    assert!(
        matches!(error, ArchiveError::NotWritable { .. }),
        "{error:?}"
    );
    let refused = folder.stillpoint("prune", &["--keep-last", "1"]);
    assert!(refused.error(1).contains("cannot write"), "{refused}");
    let error = Archive::open_for_writing(&mount.path().join("new")).unwrap_err();
    assert!(
        matches!(error, ArchiveError::NotWritable { .. }),
        "{error:?}"
    );
    folder.stillpoint("verify", &[]).ok();
    let out = temporary_directory();
    let out = out.path().join("out");
    folder.stillpoint("restore", &["-o", path(&out)]).ok();
    assert!(fs::read(&out).unwrap() == folder.past[&1]["vda"]);
    let refused = folder.stillpoint("restore", &["-o", path(&mount.path().join("out"))]);
    assert!(refused.error(1).contains("cannot write"), "{refused}");
}

#[test]
fn commands_on_what_is_no_folder_say_so() {
    let folder = BackupFolder::new(Vec::new());
    for (command, line) in [
        ("list", &[][..]),
        ("verify", &[]),
        ("restore", &["-o", "/nonexistent/x"]),
        ("prune", &["--keep-last", "1"]),
    ] {
        let output = folder.stillpoint(command, line);
        assert!(output.error(1).contains("holds no backups"), "{output}");
        let output = folder.stillpoint(command, &[line, &["--json"]].concat());
        let error: Value = serde_json::from_str(&output.exits(1).stdout).unwrap();
        assert_eq!(error["error"]["code"], "no-backup-folder");
        assert!(!folder.path().exists(), "{command}");
    }
    folder.stillpoint("prune", &[]).exits(2);
    folder.stillpoint("restore", &[]).exits(2);
}
