//! Points that `stillpoint pull` has made, and points held against what a server serves.

use std::collections::BTreeMap;
use std::fs;

use rand::Rng as _;
use serde_json::Value;
use stillpoint_tests::backup_folder::{BackupFolder, Disk};
use stillpoint_tests::process::run;
use stillpoint_tests::seeds::{number, rng, seeds};
use stillpoint_tests::tools::{path, with_qemu_nbd};
use stillpoint_tests::{Guest, KIB, MIB, Server, server};

#[test]
fn what_was_pulled_is_sound_is_what_is_served_and_is_restored() {
    let rounds = number("STILLPOINT_ARCHIVE_PULLS", 2);
    for seed in seeds(&(1..=rounds).collect::<Vec<_>>()) {
        let mut rng = rng(seed);
        let server = Server::builder()
            .disk("vda", 12 * MIB + 512)
            .disk("vdb", 4 * MIB)
            .start();
        let mut guests = ["vda", "vdb"].map(|disk| Guest::new(&server, disk));
        let folder = server.path("backups");
        let stillpoint = |args: &[&str]| {
            let mut command = std::process::Command::new(server::binary());
            run(command.args(args))
        };
        let mut past = BTreeMap::new();
        for point in 1..=4 {
            for guest in &mut guests {
                (0..rng.random_range(0..30)).for_each(|_| guest.do_something(&mut rng));
            }
            let run_dir = server.run_directory();
            let line = ["pull", "--to", path(&folder), "--run-dir", path(run_dir)];
            stillpoint(&line).ok();
            past.insert(point, [guests[0].disk.clone(), guests[1].disk.clone()]);

            // Nothing was written meanwhile: an instant of now is the same.
            let id = format!("b{point}");
            server.begin(&id, &[]);
            for disk in ["vda", "vdb"] {
                let uri = server.frozen_uri(&format!("{disk}@{id}"));
                let line = ["verify", path(&folder), "--disk", disk, "--against", &uri];
                let same = stillpoint(&line);
                assert!(same.ok().starts_with("identical: "), "seed {seed}: {same}");
            }
            server.stillpoint(&["backup", "abort", &id]).ok();
        }
        stillpoint(&["verify", path(&folder)]).ok();
        for (point, disks) in past {
            let out = server.path(&format!("restored{point}"));
            let at = point.to_string();
            stillpoint(&["restore", path(&folder), "--at", &at, "-o", path(&out)]).ok();
            for (disk, expected) in ["vda", "vdb"].iter().zip(disks) {
                let found = fs::read(out.join(format!("{disk}.raw"))).unwrap();
                assert!(found == expected, "seed {seed}, point {point}, {disk}");
            }
        }
    }
}

#[test]
fn a_map_that_lied_is_found_by_comparing_and_by_nothing_else() {
    let mut rng = rng(1);
    // Some stretches are zeroes in the folder, and longer than what is read at once.
    let mut folder = BackupFolder::new(vec![Disk::new("vda", 40 * MIB, 64 * KIB)]);
    folder.disks[0].contents[5 << 20] = 1;
    folder.disks[0].contents[39 << 20] = 1;
    folder.pull(&mut rng);
    let image = folder.beside("image");
    fs::write(&image, &folder.disks[0].contents).unwrap();

    let against = |args: &[&str]| {
        with_qemu_nbd(&["-r", "-f", "raw", path(&image)], |socket| {
            let uri = server::uri(socket, "");
            folder.stillpoint("verify", &[&["--against", &uri], args].concat())
        })
    };
    assert!(
        against(&[])
            .ok()
            .contains("identical: vda of point 1, 40 MiB")
    );
    // In data, in what is zeroes here, at the end, and zeroes where there is data.
    let mut served = folder.disks[0].contents.clone();
    served[(5 << 20) + 700] = 7;
    served[20 << 20] = 1;
    served[(40 << 20) - 1] = 1;
    served[39 << 20] = 0;
    fs::write(&image, &served).unwrap();
    folder.stillpoint("verify", &[]).ok();
    let different = against(&[]);
    assert!(
        different
            .error(5)
            .contains("2.0 KiB of vda are not what is served"),
        "{different}"
    );
    assert!(
        different
            .stdout
            .contains("different: bytes 20971520 to 20972032 of vda"),
        "{different}"
    );
    let lines = against(&["--json"]);
    let lines: Vec<Value> = lines
        .exits(5)
        .stdout
        .lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect();
    let places: Vec<_> = lines[..4]
        .iter()
        .map(|line| line["offset"].as_u64().unwrap())
        .collect();
    assert_eq!(
        places,
        [(5 << 20) + 512, 20 << 20, 39 << 20, (40 << 20) - 512]
    );
    assert_eq!(lines[4]["event"], "result");
    assert_eq!(lines[4]["different_bytes"], 4 * 512);
    assert_eq!(lines.len(), 5);

    // Another size is no comparison, and neither is a folder that is damaged.
    served.truncate(39 << 20);
    fs::write(&image, &served).unwrap();
    assert!(
        against(&[])
            .error(5)
            .contains("and the export has 40894464")
    );
    fs::write(&image, &folder.disks[0].contents).unwrap();
    fs::remove_file(folder.file(1, "vda.qcow2")).unwrap();
    assert!(against(&[]).error(5).contains("1/vda.qcow2"));
    let gone = folder.stillpoint("verify", &["--against", "nbd+unix:///?socket=/nonexistent"]);
    gone.error(if gone.code() == 5 { 5 } else { 1 });
}
