//! How far a verification or a restore is, as programs and people are told.

use std::process::Command;

use serde_json::Value;
use stillpoint_tests::backup_folder::{BackupFolder, Disk};
use stillpoint_tests::process::{Output, run};
use stillpoint_tests::seeds::rng;
use stillpoint_tests::server::binary;
use stillpoint_tests::tools::path;
use stillpoint_tests::{KIB, MIB};

/// A folder of one point with five chunks of data.
fn folder() -> BackupFolder {
    let mut folder = BackupFolder::new(vec![Disk::new("vda", 5 * MIB, 64 * KIB)]);
    folder.disks[0].contents.fill(7);
    folder.pull(&mut rng(1));
    folder
}

/// A command that takes longer than a second, since each of its reads takes a while.
fn slowly(folder: &BackupFolder, command: &str, args: &[&str]) -> Output {
    let mut slow = Command::new("strace");
    // The one asks the device, the other the page cache.
    let reads = "io_uring_enter,pread64";
    slow.args(["-f", "-o", "/dev/null", &format!("--trace={reads}")])
        .args(["-e", &format!("inject={reads}:delay_enter=300000")])
        .arg(binary())
        .args([command, path(&folder.path())])
        .args(args);
    run(&mut slow)
}

#[test]
fn programs_are_told_every_second_how_far_it_is() {
    let folder = folder();
    let out = folder.beside("out");
    let restored = ["--json", "-o", path(&out)];
    for (command, args, disk, total) in [
        ("verify", &["--json"][..], Value::Null, None),
        ("restore", &restored, Value::from("vda"), Some(5 * MIB)),
    ] {
        let output = slowly(&folder, command, args);
        let lines = output.ok().lines();
        let lines: Vec<Value> = lines.map(|it| serde_json::from_str(it).unwrap()).collect();
        let (last, progress) = lines.split_last().expect("a result");
        assert_eq!(last["event"], "result", "{output}");
        assert!(!progress.is_empty(), "{output}");
        let mut before = 0;
        for line in progress {
            assert_eq!(line["event"], "progress", "{output}");
            assert_eq!(line["phase"], command, "{output}");
            assert_eq!(line["disk"], disk);
            let number = |key: &str| line[key].as_u64().expect("a number");
            let (done, all) = (number("done_bytes"), number("total_bytes"));
            assert!(before < done && done <= all, "{output}");
            assert!(total.is_none_or(|total| total == all), "{output}");
            assert!(number("bytes_per_s") > 0, "{output}");
            before = done;
        }
    }
}

#[test]
fn whoever_wants_quiet_hears_of_damage_alone() {
    let folder = folder();
    let out = folder.beside("out");
    assert_eq!(folder.stillpoint("verify", &["--quiet"]).ok(), "");
    let restored = ["--quiet", "-o", path(&out)];
    assert_eq!(folder.stillpoint("restore", &restored).ok(), "");
    let file = folder.file(1, "vda.qcow2");
    let length = file.metadata().unwrap().len();
    let file = std::fs::File::options().write(true).open(file).unwrap();
    std::os::unix::fs::FileExt::write_all_at(&file, &[0], length - 1).unwrap();
    let damaged = folder.stillpoint("verify", &["--quiet"]);
    damaged.exits(5);
    assert!(damaged.stdout.contains("damaged: 1/vda.qcow2"), "{damaged}");
}
