//! Scratch has limits; whoever reaches one gives way alone, and gives back what it had.

use std::path::Path;
use std::time::Instant;

use rustix::fs::statvfs;
use serde_json::{Value, json};
use stillpoint_tests::process::PATIENCE;
use stillpoint_tests::raw_nbd::errno;
use stillpoint_tests::tools::{nbdcopy_sha256, path, sha256};
use stillpoint_tests::{Guest, KIB, MIB, Mount, Qmp, RawNbd, Server};

const SIZE: u64 = 16 * MIB;

fn start(args: &[&str]) -> (Server, Guest) {
    start_with(args, None)
}

fn start_with(args: &[&str], scratch: Option<&Path>) -> (Server, Guest) {
    let mut builder = Server::builder().disk("vda", SIZE);
    for arg in args {
        builder = builder.arg(arg);
    }
    if let Some(scratch) = scratch {
        builder = builder.arg(&format!("--scratch-dir={}", path(scratch)));
    }
    let server = builder.start();
    let mut guest = Guest::new(&server, "vda");
    (0..SIZE / MIB).for_each(|mib| guest.write(mib * MIB, &vec![1; MIB as usize]));
    (server, guest)
}

#[track_caller]
fn is_exact(server: &Server, export: &str, then: &str) {
    let found = nbdcopy_sha256(&server.frozen_uri(export), server.directory());
    assert_eq!(found, then, "{export}");
}

#[track_caller]
fn broken_reason(server: &Server, id: &str) -> String {
    let shown = server.cli(&["backup", "show", id, "--json"]);
    shown.exits(4);
    let backup: Value = serde_json::from_str(&shown.stdout).expect("the backup");
    backup["broken_reason"]
        .as_str()
        .expect("a reason")
        .to_owned()
}

fn free(path: &Path) -> u64 {
    let told = statvfs(path).expect("a file system");
    told.f_bavail * told.f_frsize
}

/// Asks the server things until something holds, which is soon.
#[track_caller]
fn until(qmp: &mut Qmp, what: &str, holds: impl Fn() -> bool) {
    let begun = Instant::now();
    while !holds() {
        assert!(begun.elapsed() < PATIENCE, "not so for long: {what}");
        qmp.execute("query-status", &json!({}));
    }
}

#[test]
fn a_backup_that_reaches_its_limit_breaks_alone() {
    let (server, mut guest) = start(&["--backup-scratch-limit=1M"]);
    let then = sha256(&guest.disk);
    server.begin("small", &["--scratch-limit", "64k"]);
    server.begin("default", &[]);
    server.begin("large", &["--scratch-limit", "1G"]);
    // The last granule fits, the next does not.
    guest.write(0, &vec![2; 64 * KIB as usize]);
    let shown = server.cli_json(&["backup", "show", "small"]);
    assert_eq!(shown["state"], "open", "{shown}");
    assert_eq!(shown["scratch_used_bytes"], 64 * KIB, "{shown}");
    assert_eq!(shown["scratch_limit_bytes"], 64 * KIB, "{shown}");
    guest.write(64 * KIB, &[2; 1]);
    let reason = broken_reason(&server, "small");
    assert!(reason.contains("limit, 65536 bytes"), "{reason}");

    guest.write(0, &vec![3; 2 * MIB as usize]);
    let reason = broken_reason(&server, "default");
    assert!(reason.contains("limit, 1048576 bytes"), "{reason}");
    is_exact(&server, "vda@large", &then);
    server.commit("large");
    assert_eq!(guest.disk, server.open_live("vda").read_all());
}

#[test]
fn a_limit_outlives_the_server() {
    let (mut server, mut guest) = start(&[]);
    server.begin("b1", &["--scratch-limit", "64k"]);
    guest.write(0, &vec![2; 60 * KIB as usize]);
    server.stop();
    server.start();
    let shown = server.cli_json(&["backup", "show", "b1"]);
    assert_eq!(shown["scratch_used_bytes"], 60 * KIB, "{shown}");
    // The same arguments are the same backup, others are not.
    server.begin("b1", &["--scratch-limit", "64k"]);
    server.cli(&["backup", "begin", "--id", "b1"]).error(1);
    let mut live = server.open_live("vda");
    live.write(MIB, &[2; 4096]).expect("it fits");
    assert_eq!(server.backup("b1")["state"], "open");
    live.write(2 * MIB, &[2; 4096])
        .expect("the backup gives way");
    broken_reason(&server, "b1");
}

#[test]
fn of_backups_that_reach_the_limit_of_all_the_oldest_breaks_and_makes_room() {
    let (server, mut guest) = start(&["--scratch-limit=1M"]);
    server.begin("older", &[]);
    guest.write(0, &vec![2; 512 * KIB as usize]);
    let then = sha256(&guest.disk);
    server.begin("newer", &[]);
    guest.write(MIB, &vec![2; 256 * KIB as usize]);
    let status = server.cli_json(&["status"]);
    assert_eq!(status["scratch_used_bytes"], MIB, "{status}");
    assert_eq!(status["scratch_limit_bytes"], MIB, "{status}");
    assert_eq!(server.backup("older")["state"], "open");

    guest.write(2 * MIB, &[2; 4096]);
    let reason = broken_reason(&server, "older");
    assert!(reason.contains("all backups, 1048576 bytes"), "{reason}");
    is_exact(&server, "vda@newer", &then);
    assert_eq!(server.backup("newer")["scratch_used_bytes"], 260 * KIB);

    // When nothing is left, nothing begins that would break at once.
    guest.write(4 * MIB, &vec![2; 764 * KIB as usize]);
    let refused = server.cli(&["backup", "begin", "--id", "late"]);
    assert!(refused.error(1).contains("limit of all"), "{refused}");
    assert!(refused.stderr.contains("--scratch-limit"), "{refused}");
    is_exact(&server, "vda@newer", &then);
    server.commit("newer");
    server.begin("late", &[]);
}

#[test]
fn what_is_overwritten_piece_by_piece_is_kept_at_once_where_everything_fits() {
    const GRANULE: u64 = 4 * KIB;
    let (server, mut guest) = start(&["--scratch-reserve=0"]);
    let mut overwrite = |at: u64| {
        let then = sha256(&guest.disk);
        (0..5).for_each(|i| guest.write(at + 3 * i * GRANULE, &[2; GRANULE as usize]));
        then
    };
    let use_of = |id: &str| {
        let disk = server.backup(id)["disks"][0].clone();
        (
            disk["scratch_used_bytes"].as_u64().expect("bytes"),
            disk["copying_writes"].as_u64().expect("a count"),
        )
    };
    server.begin("roomy", &[]);
    let first = overwrite(0);
    assert_eq!(use_of("roomy"), (64 * KIB, 5));
    // Not everything would fit into this one, so nothing is kept without need.
    server.begin("tight", &["--scratch-limit", "31M"]);
    let second = overwrite(MIB);
    assert_eq!(use_of("roomy"), (64 * KIB + 5 * GRANULE, 10));
    assert_eq!(use_of("tight"), (5 * GRANULE, 5));
    is_exact(&server, "vda@roomy", &first);
    is_exact(&server, "vda@tight", &second);
}

#[test]
fn zeroes_and_holes_take_nothing() {
    let (server, mut guest) = start(&[]);
    guest.zeroes(0, 4 * MIB, 0);
    guest.trim(4 * MIB, 4 * MIB);
    let then = sha256(&guest.disk);
    server.begin("b1", &["--scratch-limit", "4k"]);
    guest.write(0, &vec![2; 8 * MIB as usize]);
    assert_eq!(server.backup("b1")["scratch_used_bytes"], 0);
    is_exact(&server, "vda@b1", &then);
    guest.write(8 * MIB, &[2; 1]);
    is_exact(&server, "vda@b1", &then);
    guest.write(9 * MIB, &[2; 1]);
    broken_reason(&server, "b1");
}

#[test]
fn a_limit_that_holds_no_write_begins_nothing() {
    let (server, _) = start(&["--backup-scratch-limit=4095"]);
    for (limit, option) in [
        (&["--scratch-limit", "0"][..], "--scratch-limit"),
        (&["--scratch-limit", "1k"], "--scratch-limit"),
        (&[], "--backup-scratch-limit"),
    ] {
        let line = [&["backup", "begin", "--json"], limit].concat();
        let refused = server.cli(&line);
        refused.fails_with("scratch-limit", "smallest write");
        let hint = format!("give a larger {option}\"");
        assert!(refused.stdout.contains(&hint), "{refused}");
    }
    server.begin("b1", &["--scratch-limit", "4k"]);
    server.abort("b1");

    let (server, _) = start(&["--scratch-limit=4095"]);
    let refused = server.cli(&["backup", "begin", "--json"]);
    refused.fails_with("scratch-limit", "limit of all backups");
}

#[test]
fn a_guest_whose_write_gives_way_can_write_when_there_is_room_again() {
    for word in ["fail-guest-write", "break-guest-write"] {
        let (server, mut guest) = start(&[
            &format!("--on-scratch-error={word}"),
            "--scratch-limit=512k",
        ]);
        server.begin("first", &[]);
        guest.write(0, &vec![2; 256 * KIB as usize]);
        let then = sha256(&guest.disk);
        server.begin("second", &[]);
        let mut live = server.open_live("vda");
        let new = vec![3; 512 * KIB as usize];
        assert_eq!(live.write(MIB, &new), Err(errno::ENOSPC), "{word}");
        // Nothing of it is there, and what is kept already goes on being written.
        assert_eq!(live.read(MIB, new.len() as u32), Ok(vec![1; new.len()]));
        live.write(0, &[1; 512])
            .expect("the first has it, the second takes it");
        live.write(0, &[2; 512]).expect("both have it");
        is_exact(&server, "vda@second", &then);
        for id in ["first", "second"] {
            assert_eq!(server.backup(id)["state"], "open", "{word}");
        }

        server.abort("first");
        guest.write(MIB, &new[..252 * KIB as usize]);
        is_exact(&server, "vda@second", &then);
        assert_eq!(live.write(2 * MIB, &new), Err(errno::ENOSPC), "{word}");
        server.commit("second");
        guest.write(2 * MIB, &new);
        assert_eq!(guest.disk, live.read_all());
    }
}

#[test]
fn events_tell_of_each_watermark_once_and_in_order() {
    let (server, mut guest) = start(&["--scratch-limit=1G"]);
    let mut qmp = server.qmp();
    server.begin("b1", &["--scratch-limit", "1M"]);
    for at in 0..256 {
        guest.write(at * 4 * KIB, &[2; 4096]);
    }
    guest.write(MIB, &[2; 1]);
    let mut seen = Vec::new();
    loop {
        let event = qmp.receive().expect("an event");
        let data = &event["data"];
        match event["event"].as_str().expect("a name") {
            "SCRATCH_THRESHOLD" => {
                assert_eq!((&data["id"], &data["limit"]), (&json!("b1"), &json!(MIB)));
                seen.push(data["used"].as_u64().expect("a number"));
            }
            "BACKUP_BROKEN" => break,
            _ => {}
        }
    }
    assert_eq!(seen.len(), 3, "{seen:?}");
    assert!(seen.is_sorted(), "{seen:?}");
    for (used, percent) in seen.iter().zip([50, 75, 90]) {
        assert!(used * 100 >= MIB * percent, "{seen:?}");
    }
}

#[test]
fn a_reserve_of_the_file_system_stays_free() {
    let reserve = 32 * MIB;
    for policy in ["fail-guest-write", "break-backup"] {
        let volume = Mount::ext4(44 * MIB);
        let args = [
            "--scratch-reserve=32M",
            &format!("--on-scratch-error={policy}"),
        ];
        let (server, mut guest) = start_with(&args, Some(volume.path()));
        server.begin("b1", &[]);
        let mut least = free(volume.path());
        let mut live = server.open_live("vda");
        let mut refused = 0;
        for at in (0..SIZE).step_by(64 << 10) {
            match live.write(at, &vec![2; 64 << 10]) {
                Ok(()) => guest.disk[at as usize..][..64 << 10].fill(2),
                Err(error) => {
                    assert_eq!(error, errno::ENOSPC, "{policy}");
                    refused += 1;
                }
            }
            least = least.min(free(volume.path()));
        }
        assert!(least >= reserve, "{policy}: only {least} bytes were free");
        assert_eq!(guest.disk, live.read_all(), "{policy}");
        if policy == "break-backup" {
            assert_eq!(refused, 0);
            let reason = broken_reason(&server, "b1");
            assert!(
                reason.contains("reserve of free space, 33554432"),
                "{reason}"
            );
        } else {
            assert!(
                refused > 0 && least < reserve + 2 * MIB,
                "{refused}, {least}"
            );
            is_exact(&server, "vda@b1", &sha256(&vec![1; SIZE as usize]));
        }
    }
}

#[test]
fn whoever_uses_up_the_reserve_breaks_the_backup_that_holds_most() {
    let volume = Mount::tmpfs(64 * MIB);
    let (server, mut guest) = start_with(&["--scratch-reserve=16M"], Some(volume.path()));
    let mut qmp = server.qmp();
    server.begin("large", &[]);
    guest.write(0, &vec![2; 8 * MIB as usize]);
    let then = sha256(&guest.disk);
    server.begin("small", &[]);
    guest.write(8 * MIB, &[2; 4096]);
    let ballast = volume.path().join("ballast");
    std::fs::write(&ballast, vec![1; 42 * MIB as usize]).expect("room beside the reserve");
    let event = qmp.event("BACKUP_BROKEN");
    assert_eq!(event["data"]["id"], "large", "{event}");
    let reason = event["data"]["reason"].as_str().expect("a reason");
    assert!(reason.contains("16777216 bytes"), "{event}");
    until(&mut qmp, "it is free again", || {
        free(volume.path()) > 20 * MIB
    });
    is_exact(&server, "vda@small", &then);
    server.commit("small");
}

#[test]
fn a_backup_does_not_begin_where_the_reserve_is_not_free() {
    let volume = Mount::tmpfs(100 * MIB);
    let scratch = format!("--scratch-dir={}", path(volume.path()));
    let builder = Server::builder().disk("vda", SIZE).arg(&scratch);
    let server = builder.default_reserve().start();
    let refused = server.cli(&["backup", "begin", "--id", "b1"]);
    let error = refused.error(1);
    assert!(error.contains("bytes free"), "{refused}");
    assert!(error.contains(path(volume.path())), "{refused}");
    assert!(refused.stderr.contains("--scratch-reserve"), "{refused}");
    server.cli(&["backup", "show", "b1"]).error(1);
    let left = volume.path().join("vda/backups/b1");
    assert!(!left.exists(), "{left:?}");

    for (reserve, begins) in [("100M", false), ("98%", true), ("99%", true), ("0", true)] {
        let argument = format!("--scratch-reserve={reserve}");
        let volume = Mount::tmpfs(100 * MIB);
        let (server, _) = start_with(&[&argument], Some(volume.path()));
        let outcome = server.cli(&["backup", "begin", "--id", "b1"]);
        outcome.exits(i32::from(!begins));
    }
}

#[test]
fn what_is_broken_or_over_takes_no_space_also_while_clients_have_it_open() {
    let volume = Mount::tmpfs(64 * MIB);
    let (mut server, mut guest) = start_with(&[], Some(volume.path()));
    let before = free(volume.path());
    let is_free = || free(volume.path()) + 64 * KIB > before;
    let mut qmp = server.qmp();

    server.begin("broken", &["--scratch-limit", "4M"]);
    let mut client = server.open_frozen("vda@broken", &["base:allocation"]);
    guest.write(0, &vec![2; 4 * MIB as usize]);
    assert_eq!(client.read(0, 4096), Ok(vec![1; 4096]));
    assert!(free(volume.path()) + 4 * MIB <= before);
    guest.write(4 * MIB, &[2; 4096]);
    until(&mut qmp, "what is broken takes no space", is_free);
    is_lost(&mut client);
    let reason = broken_reason(&server, "broken");
    assert_eq!(server.cli_json(&["status"])["scratch_used_bytes"], 0);
    // The next server knows why, although there is nothing left of it.
    server.kill();
    server.start();
    assert_eq!(broken_reason(&server, "broken"), reason);
    server.abort("broken");

    let mut live = server.open_live("vda");
    for outcome in ["commit", "abort"] {
        server.begin(outcome, &[]);
        let mut client = server.open_frozen(&format!("vda@{outcome}"), &[]);
        live.write(0, &vec![3; 4 * MIB as usize]).expect("room");
        assert!(free(volume.path()) + 4 * MIB <= before, "{outcome}");
        server.cli(&["backup", outcome, outcome]).ok();
        assert!(is_free(), "{outcome}");
        assert!(client.read(0, 4096).is_err(), "{outcome}");
    }
}

#[track_caller]
fn is_lost(client: &mut RawNbd) {
    assert_eq!(client.read(0, 4096), Err(errno::EIO));
    assert_eq!(client.read(SIZE - 4096, 4096), Err(errno::EIO));
    assert_eq!(client.block_status(0, MIB as u32, 0), Err(errno::EIO));
}
