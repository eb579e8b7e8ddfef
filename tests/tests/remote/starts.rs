//! What is known of a base at the next start.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

use rustix::process::Signal;
use stillpoint_tests::process::{self, KilledOnDrop};
use stillpoint_tests::server::temporary_directory;
use stillpoint_tests::state::{Begun, begin_since};
use stillpoint_tests::tls::{Authority, Holder};
use stillpoint_tests::tools::path;
use stillpoint_tests::{CHUNK, Guest, MIB, NbdBase, Server};

use super::{at, check_backup, image, on};

/// Why the checkpoint `cp1` is of no use, if so.
fn why_lost(server: &Server) -> Option<String> {
    match begin_since(server, "why", "vda", "cp1") {
        Begun::Full { reason } => Some(reason),
        Begun::Incremental { .. } => None,
    }
}

#[test]
fn the_chain_goes_on_after_a_stop_and_after_a_kill() {
    let directory = temporary_directory();
    let image = image(&directory);
    let mut base = NbdBase::file(&image);
    let mut server = on(&base, "").start();
    let mut guest = Guest::new(&server, "vda");
    guest.write(3 * MIB, &[1; 5000]);
    server.checkpoint("cp1");
    guest.touched.clear();
    guest.write(5 * MIB, &[2; 5000]);
    let (disk, touched) = (guest.disk.clone(), guest.touched.clone());
    server.stop();
    base.kill();
    base.start();
    server.start();
    let mut guest = Guest::new(&server, "vda");
    (guest.disk, guest.touched) = (disk, touched);
    check_backup(&server, &mut guest, ("b1", "cp1"), "after a stop");
    server.kill();
    server.start();
    assert_eq!(why_lost(&server), None, "after a kill");
}

/// What is written by one name would not be known of by the other.
#[test]
fn two_names_for_one_export_are_refused_however_they_are_written() {
    let directory = temporary_directory();
    let base = NbdBase::file(&image(&directory));
    let state = |name| directory.path().join(name).display().to_string();
    for again in [base.uri(), format!("{}&", base.uri())] {
        let refused = Server::builder()
            .disk_as(&format!("vda={},state={}", base.uri(), state("a")))
            .disk_as(&format!("vdb={again},state={}", state("b")))
            .start_and_fail();
        let already = format!("cannot use '{again}': it is disk 'vda' already");
        assert!(refused.error(1).contains(&already), "{refused}");
    }
}

#[test]
fn an_image_that_was_changed_or_replaced_meanwhile_is_backed_up_in_full() {
    for kill in [false, true] {
        let directory = temporary_directory();
        let image = image(&directory);
        let base = NbdBase::file(&image);
        let mut server = on(&base, "").start();
        let mut guest = Guest::new(&server, "vda");
        guest.write(3 * MIB, &vec![1; CHUNK as usize]);
        server.checkpoint("cp1");
        if kill {
            server.kill();
        } else {
            server.stop();
        }
        let file = File::options().write(true).open(&image).unwrap();
        file.write_all_at(&[7; 16 << 10], 0).unwrap();
        server.start();
        let why = why_lost(&server).expect("it is not the image that was left");
        assert!(why.contains("changed, or is another"), "{why}");
    }
}

#[test]
fn an_older_state_of_the_image_is_noticed_by_what_was_written_last() {
    let directory = temporary_directory();
    let image = image(&directory);
    let base = NbdBase::file(&image);
    let mut server = on(&base, "").start();
    let mut guest = Guest::new(&server, "vda");
    server.checkpoint("cp1");
    guest.flush();
    let before = std::fs::read(&image).unwrap();
    guest.write(3 * MIB + 8192, &[1; 512]);
    server.stop();
    let file = File::options().write(true).open(&image).unwrap();
    file.write_all_at(&before, 0).unwrap();
    server.start();
    assert!(why_lost(&server).is_some());
}

#[test]
fn a_base_needs_a_place_for_its_state_and_must_be_there() {
    let directory = temporary_directory();
    let mut base = NbdBase::file(&image(&directory));
    base.kill();
    let refused = on(&base, ",reconnect=50ms").start_and_fail();
    assert!(refused.error(1).contains("cannot connect"), "{refused}");
    let refused = on(&base, ",reconnect=1s").start_and_fail();
    let last = refused.exits(1).stderr.lines().last();
    assert!(
        last.is_some_and(|line| line.contains("cannot connect")),
        "{refused}"
    );
    // Whoever adds a disk is told at once.
    let uri = format!(
        "vdb={},state={},reconnect=1h",
        base.uri(),
        path(&directory.path().join("b"))
    );
    let server = Server::with_disk(MIB);
    let refused = server.cli(&["--json", "disk", "add", &uri]);
    refused.fails_with("base-unreachable", "cannot connect");
    base.start();
    let refused = on(&base, ",cache=none").start_and_fail();
    refused.refused("that server's");
}

/// Whether the server that logs to this file says that it waits for its base.
fn waits(log: &Path) -> bool {
    std::fs::read_to_string(log).is_ok_and(|log| log.contains("waiting for the base"))
}

#[test]
fn a_base_that_listens_a_little_later_is_waited_for() {
    let directory = temporary_directory();
    let image = image(&directory);
    let mut base = NbdBase::file(&image);
    let mut server = on(&base, ",reconnect=1h").start();
    Guest::new(&server, "vda").write(3 * MIB, &[1; 5000]);
    server.checkpoint("cp1");
    server.stop();
    base.kill();
    let log = server.path("stderr");
    std::thread::scope(|scope| {
        let start = scope.spawn(|| server.start());
        while !waits(&log) && !start.is_finished() {
            std::thread::yield_now();
        }
        assert!(!start.is_finished(), "it did not wait");
        base.start();
    });
    assert_eq!(why_lost(&server), None);
}

#[test]
fn a_server_that_waits_for_its_base_can_be_stopped() {
    let directory = temporary_directory();
    let mut base = NbdBase::file(&image(&directory));
    base.kill();
    let builder = on(&base, ",reconnect=1h");
    let log = builder.path("log");
    let mut command = builder.command();
    command.stderr(File::create(&log).unwrap());
    let mut server = KilledOnDrop::spawn(&mut command);
    while !waits(&log) {
        assert_eq!(server.child.try_wait().unwrap(), None, "it did not wait");
        std::thread::yield_now();
    }
    process::signal(&server.child, Signal::TERM);
    let status = process::wait(&mut server.child).expect("it ends");
    assert!(status.success(), "{status}");
}

#[test]
fn a_base_is_reached_with_tls_and_not_without() {
    let directory = temporary_directory();
    let authority = Authority::new("ours");
    let theirs = authority.outfit(&directory.path().join("base"), Holder::Server, "base");
    let ours = authority.outfit(&directory.path().join("client"), Holder::Client, "us");
    let strange = Authority::new("strange");
    let strange = strange.outfit(&directory.path().join("strange"), Holder::Client, "us");
    let creds = format!("--tls-certificates={}", path(&theirs));
    let base = NbdBase::nbdkit(&["--tls=require", "--tls-verify-peer", &creds, "memory", "8M"]);
    let secure = base.uri().replacen("nbd+unix", "nbds+unix", 1);

    let with = |dir: &Path| format!(",tls-creds={},reconnect=5s", path(dir));
    let server = at(&secure, &with(&ours)).start();
    let mut live = server.open_live("vda");
    live.write(0, b"secret").unwrap();
    assert_eq!(live.read(0, 6).unwrap(), b"secret");
    at(&secure, &with(&strange)).start_and_fail().error(1);
    at(&base.uri(), "").start_and_fail().error(1);
    let refused = at(&secure, "").start_and_fail();
    assert!(refused.error(1).contains("needs certificates"), "{refused}");
}
