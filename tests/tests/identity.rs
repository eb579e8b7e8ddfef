//! What a server finds when it starts: the image that it left, another one, or another boot.

use std::fs::{self, File};
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt};
use std::path::Path;

use serde_json::Value;
use stillpoint_tests::server::named;
use stillpoint_tests::state::{self, Begun, begin_since};
use stillpoint_tests::tools::{path, tool};
use stillpoint_tests::{CHUNK, Guest, KIB, MIB, Server};

/// Two disks, each with a checkpoint and one chunk written since.
fn left_by(stop: fn(&mut Server)) -> Server {
    let mut server = Server::builder()
        .disk("vda", 8 * MIB)
        .disk("vdb", 8 * MIB)
        .start();
    for disk in ["vda", "vdb"] {
        Guest::new(&server, disk).write(3 * CHUNK, &[1; 4096]);
    }
    server.checkpoint("cp1");
    let copy = server.path("older");
    fs::copy(server.image("vda"), copy).unwrap();
    for disk in ["vda", "vdb"] {
        Guest::new(&server, disk).write(9 * CHUNK, &[2; 4096]);
    }
    stop(&mut server);
    server
}

/// The disk whose image was tampered with is full, with the reason; the other one is not, and a
/// checkpoint made from here on is a base.
#[track_caller]
fn check_full(server: &mut Server, reason: &str, how: &str) {
    server.start();
    let size = server.open_live("vda").export().size;
    match begin_since(server, "b1", "vda", "cp1") {
        Begun::Full { reason: found } => assert!(found.contains(reason), "{how}: {found}"),
        Begun::Incremental { map, .. } => panic!("{how}: incremental, {map:?}"),
    }
    let list = server.cli_json(&["checkpoint", "list"]);
    let checkpoint = named(&list, "checkpoints", "name", "cp1").expect("cp1");
    let part = named(&checkpoint, "disks", "disk", "vda").expect("vda");
    assert_eq!(part["dirty_bytes"], size, "{how}: {list}");
    assert_eq!(part["uncertain_bytes"], size, "{how}: {list}");
    let told = part["reason"].as_str().unwrap_or_default();
    assert!(told.contains(reason), "{how}: {list}");
    let other = named(&checkpoint, "disks", "disk", "vdb").expect("vdb");
    assert!(other["reason"].is_null(), "{how}: {list}");
    for command in [&["checkpoint", "list"][..], &["checkpoint", "show", "cp1"]] {
        let output = server.cli(command);
        let shown = output.ok();
        assert!(
            shown.contains("full, because") && shown.contains("usable"),
            "{how}: {shown}"
        );
    }
    let log = server.stderr();
    assert!(log.contains("everything counts as changed"), "{how}: {log}");
    check_incremental(server, "b2", ("vdb", "cp1"), &[9], how);

    server.checkpoint("cp2");
    Guest::new(server, "vda").write(5 * CHUNK, &[3; 4096]);
    check_incremental(server, "b3", ("vda", "cp2"), &[5], how);
    // It stays so.
    server.stop();
    server.start();
    check_incremental(server, "b4", ("vda", "cp2"), &[5], how);
    let again = begin_since(server, "b5", "vda", "cp1");
    assert!(matches!(again, Begun::Full { .. }), "{how}: {again:?}");
}

#[track_caller]
fn check_incremental(
    server: &Server,
    id: &str,
    (disk, since): (&str, &str),
    chunks: &[u64],
    how: &str,
) {
    match begin_since(server, id, disk, since) {
        Begun::Full { reason } => panic!("{how}: {disk} is full: {reason}"),
        Begun::Incremental { map, uncertain } => {
            let dirty: Vec<u64> = map
                .iter()
                .filter(|e| e.2 == 1)
                .map(|e| e.0 / CHUNK)
                .collect();
            assert_eq!(dirty, chunks, "{how}: {disk} since {since}: {map:?}");
            assert_eq!(uncertain, 0, "{how}: {disk} since {since}");
        }
    }
}

/// What someone does to `image` while the server is down.
type Tampering = fn(image: &Path, older: &Path);

fn replaced(image: &Path, _: &Path) {
    let copy = image.with_extension("copy");
    tool("cp", &[path(image), path(&copy)]).ok();
    fs::rename(copy, image).unwrap();
}

fn resized(image: &Path, _: &Path) {
    tool("truncate", &["--size=+1M", path(image)]).ok();
}

fn written(image: &Path, _: &Path) {
    let file = File::options().write(true).open(image).unwrap();
    file.write_all_at(&[7; 512], 0).unwrap();
}

fn written_and_its_time_put_back(image: &Path, older: &Path) {
    let before = File::open(image).unwrap().metadata().unwrap();
    written(image, older);
    let file = File::options().write(true).open(image).unwrap();
    file.set_modified(before.modified().unwrap()).unwrap();
}

fn restored(image: &Path, older: &Path) {
    fs::copy(older, image).unwrap();
}

fn given_another_mode(image: &Path, _: &Path) {
    fs::set_permissions(image, fs::Permissions::from_mode(0o600)).unwrap();
}

fn touched(image: &Path, _: &Path) {
    tool("touch", &[path(image)]).ok();
}

fn given_a_second_name(image: &Path, _: &Path) {
    fs::hard_link(image, image.with_extension("link")).unwrap();
}

fn moved_away_and_back(image: &Path, _: &Path) {
    let aside = image.with_extension("aside");
    fs::rename(image, &aside).unwrap();
    fs::rename(aside, image).unwrap();
}

#[test]
fn an_image_changed_behind_our_back_costs_a_full_backup_with_the_reason() {
    let cases: [(&str, Tampering, &str); 9] = [
        ("replaced", replaced, "replaced"),
        ("resized", resized, "resized"),
        ("written", written, "changed while the server was down"),
        (
            "time put back",
            written_and_its_time_put_back,
            "changed while",
        ),
        ("restored", restored, "changed while"),
        // A new name is a change of the file, and nobody can tell that it was the only one.
        (
            "moved",
            moved_away_and_back,
            "its times, mode, owner or names",
        ),
        (
            "chmod",
            given_another_mode,
            "its times, mode, owner or names",
        ),
        ("touch", touched, "its times, mode, owner or names"),
        (
            "linked",
            given_a_second_name,
            "its times, mode, owner or names",
        ),
    ];
    for (how, tamper, reason) in cases {
        let mut server = left_by(Server::stop);
        tamper(&server.image("vda"), &server.path("older"));
        check_full(&mut server, reason, how);
    }
    for (how, tamper, reason) in &cases[..2] {
        let mut server = left_by(Server::kill);
        tamper(&server.image("vda"), &server.path("older"));
        check_full(&mut server, reason, &format!("{how} after a kill"));
    }
}

#[test]
fn a_backup_that_a_changed_image_broke_has_no_base_to_begin_anew_from() {
    let mut server = left_by(Server::stop);
    server.start();
    server.begin("b1", &["--since", "cp1"]);
    server.stop();
    written(&server.image("vda"), &server.path("older"));
    server.start();
    let commit = server.cli(&["backup", "commit", "b1"]);
    assert!(commit.error(4).contains("changed while"), "{commit}");
    assert!(commit.stderr.contains("is a full one"), "{commit}");
    assert!(!commit.stderr.contains("intact"), "{commit}");
    server.abort("b1");
    let again = begin_since(&server, "b2", "vda", "cp1");
    assert!(matches!(again, Begun::Full { .. }), "{again:?}");
}

#[test]
fn an_image_that_nobody_touched_goes_on_after_a_stop_and_a_kill() {
    for (how, stop) in [
        ("stop", Server::stop as fn(&mut Server)),
        ("kill", Server::kill),
    ] {
        let mut server = left_by(stop);
        // Looking is not touching.
        fs::read(server.image("vda")).unwrap();
        server.start();
        check_incremental(&server, "b1", ("vda", "cp1"), &[9], how);
        check_incremental(&server, "b2", ("vdb", "cp1"), &[9], how);
    }
}

#[test]
fn an_image_written_by_someone_else_after_a_kill_costs_a_full_backup() {
    let mut server = left_by(Server::kill);
    let image = server.image("vda");
    let last = fs::metadata(&image).unwrap().ctime();
    // The other program goes on until its last write is later than ours can be.
    while fs::metadata(&image).unwrap().ctime() <= last + 3 {
        written(&image, &image);
        File::open(&image).unwrap().sync_all().unwrap();
    }
    check_full(
        &mut server,
        "changed while the server was down",
        "written after a kill",
    );
}

#[test]
fn a_state_directory_copied_to_another_image_is_of_no_use_there() {
    let mut server = left_by(Server::stop);
    let other = server.path("other.raw");
    fs::copy(server.image("vda"), &other).unwrap();
    let its_state = server.path("other.raw.stillpoint");
    state::copy_directory(&state::directory(&server, "vda"), &its_state);
    let other = Server::builder().disk_at("vda", &other).start();
    let begun = begin_since(&other, "b1", "vda", "cp1");
    assert!(matches!(begun, Begun::Full { .. }), "{begun:?}");
    server.start();
    check_incremental(&server, "b1", ("vda", "cp1"), &[9], "the original");
}

#[test]
fn a_state_directory_rolled_back_is_of_no_use_once_the_image_went_on() {
    let mut server = left_by(Server::stop);
    let (now, old) = (state::directory(&server, "vda"), server.path("state-then"));
    state::copy_directory(&now, &old);
    server.start();
    check_incremental(&server, "b1", ("vda", "cp1"), &[9], "before");
    Guest::new(&server, "vda").write(12 * CHUNK, &[4; 4096]);
    server.stop();
    state::copy_directory(&old, &now);
    server.start();
    let begun = begin_since(&server, "b2", "vda", "cp1");
    assert!(matches!(begun, Begun::Full { .. }), "{begun:?}");
}

/// A power cut cannot be had here. What the server goes by is the boot in its header; so that is
/// changed after a kill, and everything that it does about a power cut is seen but the loss itself.
#[test]
fn after_another_boot_the_doubt_is_bounded_and_open_backups_are_broken() {
    const REGION: u64 = 256 * KIB;
    let builder = Server::builder();
    let image = builder.path("vda.raw");
    stillpoint_tests::tools::sparse_file(&image, 256 * MIB);
    let disk = format!("vda={},granularity=4k", image.display());
    let mut server = builder.disk_as(&disk).start();
    let mut guest = Guest::new(&server, "vda");
    server.checkpoint("cp1");
    let mut written = Vec::new();
    // Every region, twice over; so most of them have been retired.
    for n in 0..2048 {
        let offset = n * 97 % 1024 * REGION + n / 1024 * 8192;
        guest.write(offset, &[n as u8 | 1; 4096]);
        written.push(offset);
    }
    server.begin("b1", &["--since", "cp1", "--checkpoint", "cp2"]);
    guest.write(0, &[9; 4096]);
    let status = server.cli_json(&["status"]);
    assert_eq!(status["disks"][0]["uncertain_bytes"], 0, "{status}");
    let active = status["disks"][0]["active_bytes"].as_u64().expect("bytes");
    assert!(
        (REGION..=(512 + 256) * REGION).contains(&active),
        "{status}"
    );
    server.kill();
    state::pretend_power_cut(&state::directory(&server, "vda"));
    // Killed in the middle of it, whoever comes next has the same doubt.
    for micros in [500, 2000, 5000, 9000] {
        server.start_and_kill(std::time::Duration::from_micros(micros));
    }
    server.start();

    is_broken(&server);
    // What is lost stays lost, however the next server ends.
    server.kill();
    server.start();
    is_broken(&server);
    server.stop();
    server.start();
    is_broken(&server);
    server.cli(&["backup", "commit", "b1"]).error(4);
    server.abort("b1");
    match begin_since(&server, "b2", "vda", "cp1") {
        Begun::Full { reason } => panic!("the base is gone: {reason}"),
        Begun::Incremental { map, uncertain } => {
            for offset in written {
                let dirty = map
                    .iter()
                    .any(|e| e.0 <= offset && offset < e.0 + e.1 && e.2 == 1);
                assert!(dirty, "{offset} was written and is clean");
            }
            assert!(uncertain > 0, "nothing is in doubt");
            // Those that may be active, and those that are entered while some are being retired.
            assert!(
                uncertain <= (512 + 256) * REGION,
                "{uncertain} bytes are in doubt"
            );
            println!("{} regions in doubt", uncertain / REGION);
            let status = server.cli_json(&["status"]);
            assert_eq!(status["disks"][0]["uncertain_bytes"], uncertain, "{status}");
            // Written in the regions in doubt, and known to be.
            assert!(uncertain <= active, "{uncertain} of {active}");
        }
    }
    server.checkpoint("cp3");
    guest_again(&server, 5 * REGION);
    match begin_since(&server, "b3", "vda", "cp3") {
        Begun::Full { reason } => panic!("full: {reason}"),
        Begun::Incremental { map, uncertain } => {
            let dirty: u64 = map.iter().filter(|e| e.2 == 1).map(|e| e.1).sum();
            assert_eq!((dirty, uncertain), (4 * KIB, 0), "{map:?}");
        }
    }
}

#[track_caller]
fn is_broken(server: &Server) {
    let shown = server.cli(&["backup", "show", "b1", "--json"]);
    let backup: Value = serde_json::from_str(&shown.exits(4).stdout).expect("JSON");
    assert_eq!(backup["state"], "broken", "{backup}");
    let reason = backup["broken_reason"].as_str();
    assert!(reason.is_some_and(|why| !why.is_empty()), "{backup}");
}

#[test]
fn a_backup_whose_scratch_was_away_for_one_start_stays_broken() {
    let mut server = left_by(Server::stop);
    server.start();
    server.begin("b1", &["--since", "cp1"]);
    Guest::new(&server, "vda").write(0, &[5; 4096]);
    server.stop();
    let scratch = state::directory(&server, "vda").join("backups");
    let aside = server.path("aside");
    fs::rename(&scratch, &aside).unwrap();
    server.start();
    is_broken(&server);
    // A write that the scratch does not see.
    Guest::new(&server, "vda").write(3 * CHUNK, &[6; 4096]);
    server.stop();
    let _ = fs::remove_dir_all(&scratch);
    fs::rename(&aside, &scratch).unwrap();
    server.start();
    is_broken(&server);
    server.abort("b1");
    check_incremental(&server, "b2", ("vda", "cp1"), &[0, 3, 9], "scratch away");
}

fn guest_again(server: &Server, offset: u64) {
    let written = server.open_live("vda").write(offset, &[5; 4096]);
    assert_eq!(written, Ok(()));
}

#[test]
fn after_another_boot_a_change_later_than_the_lease_costs_a_full_backup() {
    let mut server = left_by(Server::kill);
    let state = state::directory(&server, "vda");
    state::pretend_power_cut(&state);
    state::end_lease(&state);
    server.start();
    match begin_since(&server, "b1", "vda", "cp1") {
        Begun::Full { reason } => assert!(reason.contains("changed while"), "{reason}"),
        Begun::Incremental { map, .. } => panic!("incremental: {map:?}"),
    }
}
