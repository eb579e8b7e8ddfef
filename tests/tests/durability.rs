//! What is known after each kind of end, with each `durability=`.

use std::fs;
use std::path::PathBuf;

use rustix::process::Signal;
use stillpoint_tests::killer::Killer;
use stillpoint_tests::raw_nbd::{command, errno};
use stillpoint_tests::server::{named, temporary_directory};
use stillpoint_tests::state::{Begun, begin_since, pretend_power_cut};
use stillpoint_tests::tools::{path, sparse_file};
use stillpoint_tests::{CHUNK, GIB, Guest, MIB, Mount, Server, Syncs};
use tempfile::TempDir;

/// An image that several servers serve, one after the other.
struct Image {
    directory: TempDir,
}

impl Image {
    fn new() -> Self {
        let directory = temporary_directory();
        sparse_file(&directory.path().join("vda.raw"), 64 * MIB);
        Self { directory }
    }

    fn path(&self) -> PathBuf {
        self.directory.path().join("vda.raw")
    }

    fn state(&self) -> PathBuf {
        self.directory.path().join("vda.raw.stillpoint")
    }

    fn serve(&self, durability: &str) -> Server {
        let disk = format!("vda={},durability={durability}", path(&self.path()));
        Server::builder().disk_as(&disk).start()
    }
}

/// A server on `image` with a checkpoint, and chunk 9 written since.
fn with_checkpoint(image: &Image, durability: &str) -> Server {
    let server = image.serve(durability);
    let mut guest = Guest::new(&server, "vda");
    guest.write(3 * CHUNK, &[1; 4096]);
    server.checkpoint("cp1");
    guest.write(9 * CHUNK, &[2; 4096]);
    guest.write(33 * MIB, &[2; 4096]);
    server
}

#[track_caller]
fn is_full(server: &Server, id: &str, since: &str, why: &str) {
    match begin_since(server, id, "vda", since) {
        Begun::Full { reason } => assert!(reason.contains(why), "{reason}"),
        Begun::Incremental { map, .. } => panic!("incremental: {map:?}"),
    }
}

#[track_caller]
fn has_changed(server: &Server, id: &str, since: &str, chunks: &[u64]) {
    match begin_since(server, id, "vda", since) {
        Begun::Full { reason } => panic!("full: {reason}"),
        Begun::Incremental { map, uncertain } => {
            let dirty = map.iter().filter(|extent| extent.2 == 1);
            let dirty: Vec<u64> = dirty.map(|extent| extent.0 / CHUNK).collect();
            assert_eq!((&dirty[..], uncertain), (chunks, 0), "{map:?}");
        }
    }
}

#[test]
fn with_process_all_is_exact_after_a_kill_and_full_after_another_boot() {
    let image = Image::new();
    let mut server = with_checkpoint(&image, "process");
    server.kill();
    let mut server = image.serve("process");
    has_changed(&server, "b1", "cp1", &[9, 528]);
    server.begin("b2", &["--since", "cp1"]);
    server.kill();

    pretend_power_cut(&image.state());
    let mut server = image.serve("process");
    assert_eq!(
        server.cli(&["backup", "show", "b2"]).code(),
        4,
        "it is open"
    );
    server.abort("b2");
    is_full(&server, "b3", "cp1", "durability=process");
    // From here on it is as before; and what is full stays so.
    server.checkpoint("cp2");
    Guest::new(&server, "vda").write(5 * CHUNK, &[3; 4096]);
    has_changed(&server, "b4", "cp2", &[5]);
    server.stop();
    let server = image.serve("power");
    has_changed(&server, "b5", "cp2", &[5]);
    is_full(&server, "b6", "cp1", "durability=process");
}

#[test]
fn with_none_all_is_full_after_anything_but_a_clean_stop() {
    let image = Image::new();
    let mut server = with_checkpoint(&image, "none");
    server.stop();
    let mut server = image.serve("none");
    has_changed(&server, "b1", "cp1", &[9, 528]);
    server.kill();
    let mut server = image.serve("power");
    is_full(&server, "b2", "cp1", "durability=none");
    server.checkpoint("cp2");
    Guest::new(&server, "vda").write(5 * CHUNK, &[3; 4096]);
    server.kill();
    has_changed(&image.serve("none"), "b3", "cp2", &[5]);
}

/// What that sync was to make durable may be gone for good: the next one knows nothing of it.
#[test]
fn a_stop_whose_sync_fails_leaves_its_disk_in_doubt_and_ends_the_others_well() {
    let mut server = Server::builder()
        .disk("vda", 8 * MIB)
        .disk("vdb", 8 * MIB)
        .start();
    for disk in ["vda", "vdb"] {
        let mut live = server.open_live(disk);
        live.write(CHUNK, &[1; 4096]).unwrap();
    }
    server.checkpoint("cp1");
    {
        let _failing = Killer::failing(&server, "fdatasync", &server.image("vda"));
        server.signal(Signal::TERM);
        assert_eq!(server.wait().code(), Some(1), "{}", server.stderr());
    }
    let told = server.stderr();
    assert!(told.contains("'vda': not everything"), "{told}");
    server.start();
    let marked = server.dirty_bytes("cp1", "vda");
    assert!(marked >= CHUNK, "{marked} bytes");
    assert_eq!(server.dirty_bytes("cp1", "vdb"), 0);
}

/// A client that is told may be all that is left to tell, a moment later.
#[test]
fn a_failed_sync_is_recorded_before_anyone_is_told_of_it() {
    let mut server = Server::with_disk(8 * MIB);
    let mut live = server.open_live("vda");
    live.write(CHUNK, &[1; 4096]).unwrap();
    server.checkpoint("cp1");
    let header = server.path("vda.raw.stillpoint/header");
    let told = || fs::read(&header).expect("a header")[SYNC_FAILED_AT];
    assert_eq!(told(), 0);
    {
        let _failing = Killer::failing(&server, "fdatasync", &server.image("vda"));
        assert_eq!(live.flush(), Err(errno::EIO));
        assert_eq!(told(), 1);
    }
    server.kill();
    server.start();
    let marked = server.dirty_bytes("cp1", "vda");
    assert!(marked >= CHUNK, "{marked} bytes");
    assert_eq!(told(), 0, "by now it is marked");
    server.open_live("vda").flush().expect("another server");
}

/// A guest's flush that waits for the sync of a retirement ends with it, although the server does by then.
#[test]
fn a_stop_waits_for_a_flush_that_waits_for_a_retirement() {
    let mut server = Server::with_disk(4 * GIB);
    let mut live = server.open_live("vda");
    for region in 0..=ACTIVE_MAX {
        if region == ACTIVE_MAX {
            // The next one is one too many.
            let slow = Killer::slowing(&server, "fdatasync", &server.image("vda"), 2_000_000);
            live.write(region * REGION, &[1; 512]).unwrap();
            // Answered by the thread that retires, after it has begun.
            server.cli(&["status"]).ok();
            let (to, from) = live.halves();
            to.request((command::FLUSH, 0), 1, 0, 0, &[]).unwrap();
            to.request((command::READ, 0), 2, 0, 512, &[]).unwrap();
            assert_eq!(from.answer().unwrap().cookie, 2, "the flush waits");
            server.signal(Signal::TERM);
            assert_eq!(server.wait().code(), Some(0), "{}", server.stderr());
            slow.detach();
        } else {
            live.write(region * REGION, &[1; 512]).unwrap();
        }
    }
}

/// Else the next server takes a write that waited for long for someone else's.
#[test]
fn a_write_that_waited_for_a_sync_for_seconds_is_our_own_after_a_kill() {
    let mut server = Server::with_disk(64 * MIB);
    let mut guest = Guest::new(&server, "vda");
    guest.write(3 * CHUNK, &[1; 4096]);
    server.checkpoint("cp1");
    let pages = server.path("vda.raw.stillpoint/pages");
    let slow = Killer::slowing(&server, "fdatasync", &pages, 4_500_000);
    guest.write(33 * MIB, &[2; 4096]);
    slow.detach();
    server.kill();
    server.start();
    has_changed(&server, "b1", "cp1", &[528]);
}

#[test]
fn a_start_after_a_kill_makes_up_for_what_a_weaker_server_did_not_sync() {
    let image = Image::new();
    let mut server = with_checkpoint(&image, "process");
    server.kill();
    let mut server = image.serve("power");
    Guest::new(&server, "vda").write(5 * CHUNK, &[3; 4096]);
    server.kill();
    pretend_power_cut(&image.state());
    match begin_since(&image.serve("power"), "b1", "vda", "cp1") {
        Begun::Full { reason } => panic!("full: {reason}"),
        Begun::Incremental { map, uncertain } => {
            let dirty = |at| map.iter().any(|e| e.0 <= at && at < e.0 + e.1 && e.2 == 1);
            assert!(dirty(5 * CHUNK) && dirty(9 * CHUNK) && dirty(33 * MIB));
            assert!(uncertain > 0, "{map:?}");
        }
    }
}

#[test]
fn only_with_power_does_a_write_wait_for_a_sync() {
    for (durability, syncs) in [("power", 3), ("process", 0), ("none", 0)] {
        let image = Image::new();
        let server = image.serve(durability);
        let mut guest = Guest::new(&server, "vda");
        let watch = Syncs::of(&server);
        for region in 0..3 {
            guest.write(region * 4 * MIB, &[1; 4096]);
        }
        guest.flush();
        watch.shows(&fs::canonicalize(image.path()).unwrap(), 1, durability);
        watch.shows(&image.state().join("pages"), syncs, durability);
        watch.shows(&image.state().join("lease"), syncs.min(1), durability);
    }
}

#[test]
fn what_a_disk_survives_is_told() {
    let image = Image::new();
    let server = image.serve("process");
    let disks = server.qmp().execute("query-disks", &serde_json::json!({}));
    let disk = named(&disks, "disks", "disk", "vda").expect("vda");
    assert_eq!(disk["durability"], "process");
    assert!(
        server
            .cli(&["status"])
            .ok()
            .contains("(durability=process)")
    );
}

#[test]
fn a_state_directory_in_memory_is_refused_unless_nothing_is_promised() {
    let memory = Mount::tmpfs(8 * MIB);
    let image = Image::new();
    let state = memory.path().join("state");
    let disk = |more: &str| format!("vda={},state={}{more}", path(&image.path()), path(&state));
    for more in ["", ",durability=process"] {
        let output = Server::builder().disk_as(&disk(more)).start_and_fail();
        let error = output.error(1);
        assert!(error.contains("in memory"), "{output}");
        assert!(output.stderr.contains("durability=none"), "{output}");
    }
    let mut server = Server::builder().disk_as(&disk(",durability=none")).start();
    server.checkpoint("cp1");
    server.stop();
    server.start();
    has_changed(&server, "b1", "cp1", &[]);
}

/// Where the header of a state has it that a sync of the image has failed.
const SYNC_FAILED_AT: usize = 4 * 512 + 4;

/// How many regions may be active before some are retired, and how large one is with chunks of 64 KiB.
const ACTIVE_MAX: u64 = 512;
const REGION: u64 = 4 * MIB;
