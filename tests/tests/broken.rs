//! A backup that loses its instant says so everywhere, and costs nothing but itself.

use serde_json::{Value, json};
use stillpoint_tests::raw_nbd::errno;
use stillpoint_tests::tools::{nbdcopy_sha256, nbdinfo_map, path, sha256, tool};
use stillpoint_tests::{CHUNK, Guest, MIB, Mount, Server, Syncs};

const SIZE: u64 = 16 * MIB;
const EXPORTS: [&str; 5] = ["vda@b1", "vda", "vda@cp1..b1", "vdb@b1", "vdb@cp1..b1"];

#[test]
fn scratch_on_a_full_tmpfs_breaks_the_backup_and_nothing_else() {
    full_scratch_breaks_the_backup_and_nothing_else(&Mount::tmpfs(2 * MIB));
}

#[test]
fn scratch_on_a_full_ext4_breaks_the_backup_and_nothing_else() {
    full_scratch_breaks_the_backup_and_nothing_else(&Mount::ext4(6 * MIB));
}

fn full_scratch_breaks_the_backup_and_nothing_else(scratch: &Mount) {
    let mut server = Server::builder()
        .disk("vda", SIZE)
        .disk("vdb", SIZE)
        .arg(&format!("--scratch-dir={}", path(scratch.path())))
        .start();
    let mut guest = Guest::new(&server, "vda");
    (0..SIZE / MIB).for_each(|mib| guest.write(mib * MIB, &vec![1; MIB as usize]));
    server.checkpoint("cp1");
    guest.touched.clear();
    guest.write(3 * CHUNK, &[2; 4096]);
    server.begin("b1", &["--since", "cp1", "--checkpoint", "cp2"]);
    let mut open: Vec<_> = EXPORTS
        .map(|export| server.open_frozen(export, &["base:allocation", "qemu:dirty-bitmap:cp1"]))
        .into();
    assert!(open.iter_mut().all(|nbd| nbd.read(0, 512).is_ok()));

    let mut qmp = server.qmp();
    // Each of these succeeds, although the scratch is full after the first few.
    (0..SIZE / MIB).for_each(|mib| guest.write(mib * MIB, &vec![3; MIB as usize]));
    let event = qmp.event("BACKUP_BROKEN");
    assert_eq!(event["data"]["id"], "b1", "{event}");
    let reason = event["data"]["reason"].as_str().expect("a reason");
    assert!(
        reason.contains("'vda'") && reason.contains("No space left"),
        "{event}"
    );

    for (nbd, export) in open.iter_mut().zip(EXPORTS) {
        assert_eq!(nbd.read(0, 512), Err(errno::EIO), "{export}");
        assert_eq!(nbd.cache(0, 512), Err(errno::EIO), "{export}");
        let status = nbd.block_status(0, MIB as u32, 0);
        assert_eq!(status, Err(errno::EIO), "{export}");
        let late = server.open_frozen(export, &[]).read(0, 512);
        assert_eq!(late, Err(errno::EIO), "{export}, opened when it was broken");
    }

    let shown = server.cli(&["backup", "show", "b1", "--json"]);
    shown.exits(4);
    let shown: Value = serde_json::from_str(&shown.stdout).expect("the backup");
    assert_eq!(shown["state"], "broken", "{shown}");
    assert_eq!(shown["broken_reason"], reason, "{shown}");
    let commit = server.cli(&["backup", "commit", "b1"]);
    assert!(commit.error(4).contains(reason), "{commit}");
    assert!(commit.stderr.contains("its base is intact"), "{commit}");
    let commit = server.cli(&["backup", "commit", "b1", "--json"]);
    commit.exits(4);
    assert!(commit.stdout.contains("backup-broken"), "{commit}");

    // Its space is free when it has ended and the last client has left.
    drop(open);
    let is_used = |backup: &Value| {
        let disks = backup["disks"].as_array().expect("disks").iter();
        let mut exports = disks.flat_map(|disk| disk["exports"].as_array().expect("exports"));
        exports.any(|export| export["clients"] != 0)
    };
    while is_used(&qmp.execute("query-backups", &json!({"id": "b1"}))[0]) {}
    server.abort("b1");

    // The base is intact, and nothing that changed is forgotten.
    let begun = server.begin("b2", &["--since", "cp1"]);
    assert_eq!(begun["disks"][0]["mode"], "incremental", "{begun}");
    assert_eq!(begun["disks"][0]["changed_bytes"], guest.expected_bytes());
    let uri = server.frozen_uri("vda@b2");
    assert_eq!(
        nbdinfo_map(&uri, "qemu:dirty-bitmap:cp1"),
        guest.expected_map()
    );
    assert_eq!(
        nbdcopy_sha256(&uri, server.directory()),
        sha256(&guest.disk)
    );
    server.commit("b2");
    server.stop();
}

#[test]
fn a_backup_on_another_file_system_outlives_one_that_breaks() {
    // The second disk's scratch does not fit; the first disk's backup does not care.
    let scratch = Mount::tmpfs(2 * MIB);
    let server = Server::builder()
        .disk("vda", SIZE)
        .disk("vdb", SIZE)
        .arg(&format!("--scratch-dir={}", path(scratch.path())))
        .start();
    let mut guests = ["vda", "vdb"].map(|disk| Guest::new(&server, disk));
    for guest in &mut guests {
        guest.write(0, &vec![1; 8 * MIB as usize]);
    }
    server.begin("b1", &["--disk", "vda"]);
    server.begin("b2", &["--disk", "vdb"]);
    let then = sha256(&guests[0].disk);
    guests[0].write(0, &[2; 8192]);
    guests[1].write(0, &vec![2; 8 * MIB as usize]);

    server.cli(&["backup", "show", "b2"]).exits(4);
    server.cli(&["backup", "show", "b1"]).exits(0);
    let uri = server.frozen_uri("vda@b1");
    assert_eq!(nbdcopy_sha256(&uri, server.directory()), then);
    server.commit("b1");
    server.abort("b2");
}

#[test]
fn a_backup_that_cannot_begin_for_want_of_space_changes_nothing() {
    let scratch = Mount::tmpfs(MIB);
    let server = Server::builder()
        .disk("vda", SIZE)
        .arg(&format!("--scratch-dir={}", path(scratch.path())))
        .start();
    server.checkpoint("cp1");
    let ballast = scratch.path().join("ballast");
    // It fails when the file system is full.
    let full = tool("dd", &["if=/dev/zero", &format!("of={}", path(&ballast))]);
    assert!(full.stderr.contains("No space left"), "{full}");

    let refused = server.cli(&["backup", "begin", "--id", "b1", "--since", "cp1"]);
    assert!(refused.error(1).contains("No space left"), "{refused}");
    server.cli(&["backup", "show", "b1"]).error(1);
    std::fs::remove_file(&ballast).expect("our own file");
    server.begin("b1", &["--since", "cp1"]);
    server.commit("b1");
}

#[test]
fn a_commit_first_makes_scratch_durable_and_an_abort_need_not() {
    let server = Server::with_disk(SIZE);
    let mut guest = Guest::new(&server, "vda");
    guest.write(0, &[1; 4096]);
    let syncs = Syncs::of(&server);
    for id in ["aborted", "committed"] {
        server.begin(id, &[]);
        guest.write(0, &[2; 4096]);
    }
    let scratch = |id| {
        let state = server.path("vda.raw.stillpoint/backups");
        state.join(id).join("scratch")
    };
    server.abort("aborted");
    server.commit("committed");
    syncs.shows(&scratch("committed"), 1, "a commit");
    syncs.shows(&scratch("aborted"), 0, "an abort");
}
