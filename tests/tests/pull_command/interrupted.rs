//! Pulls that do not come to their end, and what the next one makes of it.

use std::process::{Child, Command, Stdio};
use std::time::Instant;

use rustix::process::Signal;
use serde_json::{Value, json};
use stillpoint_tests::killer::traced_by;
use stillpoint_tests::process::{self, KilledOnDrop, Output, PATIENCE};
use stillpoint_tests::tools::path;
use stillpoint_tests::{Guest, MIB, Mount, Server};

use crate::folder::{Folder, Pulled};

/// Its chunks take some time each, so that there is a middle.
const SLOWLY: [&str; 6] = [
    "-f",
    "-o",
    "/dev/null",
    "--trace=pwrite64",
    "-e",
    "inject=pwrite64:delay_enter=20000",
];

/// A pull under way, of which so much has been read.
struct UnderWay {
    process: KilledOnDrop,
    backup: String,
}

impl UnderWay {
    /// Returns when clients have read so much of a disk.
    #[track_caller]
    fn begin(server: &Server, folder: &Folder, read: u64) -> Self {
        Self::begin_with(server, folder, &[], read)
    }

    /// The same of a pull with these arguments.
    #[track_caller]
    fn begin_with(server: &Server, folder: &Folder, args: &[&str], read: u64) -> Self {
        let pull = folder.command(server, args);
        let mut slow = Command::new("strace");
        slow.args(SLOWLY)
            .arg(pull.get_program())
            .args(pull.get_args());
        slow.stdout(Stdio::null()).stderr(Stdio::null());
        let process = KilledOnDrop::spawn(&mut slow);
        let begun = Instant::now();
        let mut qmp = server.qmp();
        loop {
            assert!(begun.elapsed() < PATIENCE, "nothing is read");
            let backups = qmp.execute("query-backups", &json!({}));
            let export = &backups[0]["disks"][0]["exports"][0];
            if export["bytes_read"]
                .as_u64()
                .is_some_and(|bytes| bytes >= read)
            {
                let backup = backups[0]["id"].as_str().expect("an id").to_owned();
                return Self { process, backup };
            }
            std::thread::yield_now();
        }
    }

    fn signal(&self, signal: Signal) {
        let traced = traced_by(self.process.child.id());
        rustix::process::kill_process(traced, signal).expect("it runs");
    }

    /// The exit code, when it has ended.
    fn wait(mut self) -> i32 {
        let child: &mut Child = &mut self.process.child;
        let status = process::wait(child).expect("an end");
        status.code().unwrap_or(-1)
    }
}

/// A server of one disk that is full of data.
fn full_disk(size: u64, args: &[&str]) -> (Server, Guest) {
    let mut builder = Server::builder().disk("vda", size);
    for arg in args {
        builder = builder.arg(arg);
    }
    let server = builder.start();
    let mut guest = Guest::new(&server, "vda");
    let mut rng = stillpoint_tests::seeds::rng(1);
    (0..size / MIB).for_each(|mib| guest.write_random(&mut rng, mib * MIB, MIB));
    (server, guest)
}

fn open_backups(server: &Server) -> Value {
    server.cli_json(&["backup", "list"])
}

#[test]
fn a_pull_that_is_interrupted_says_what_to_do_and_goes_on_with_the_same_instant() {
    for signal in [Signal::INT, Signal::TERM] {
        let (server, mut guest) = full_disk(64 * MIB, &[]);
        let folder = Folder::new();
        let pull = UnderWay::begin(&server, &folder, 40 * MIB);
        pull.signal(signal);
        assert_eq!(pull.wait(), 1);
        assert!(folder.has_draft() && folder.points().is_empty());
        let instant = guest.disk.clone();
        guest.write(0, &vec![9; MIB as usize]);

        let read = open_backups(&server)[0]["disks"][0]["exports"][0]["bytes_read"].clone();
        let goes_on = folder.pull(&server, &[]);
        let disk = goes_on.disk(0, "vda");
        assert!(
            disk["copied_bytes"].as_u64() < Some(64 * MIB),
            "{disk}, {read} before"
        );
        assert_eq!(goes_on.result(0)["point"], 1);
        folder.holds(1, "vda", &instant, "the instant of the first run");
        assert_eq!(open_backups(&server), json!([]));

        let next = folder.pull(&server, &[]);
        assert_eq!(next.disk(0, "vda")["mode"], "incremental");
        folder.holds(2, "vda", &guest.disk, "the instant of the second run");
    }
}

#[test]
fn killed_at_nine_tenths_it_reads_little_anew() {
    const SIZE: u64 = 256 * MIB;
    let (server, guest) = full_disk(SIZE, &[]);
    let folder = Folder::new();
    let pull = UnderWay::begin(&server, &folder, SIZE / 10 * 9);
    pull.signal(Signal::KILL);
    pull.wait();
    let mut qmp = server.qmp();
    let read = |qmp: &mut stillpoint_tests::Qmp| {
        let backups = qmp.execute("query-backups", &json!({}));
        backups[0]["disks"][0]["exports"][0]["bytes_read"].as_u64()
    };
    let before = read(&mut qmp).expect("it is open");

    // Its counters go with the commit: so that is not come to.
    folder.pull_up_to_publishing(&server);
    let after = read(&mut qmp).expect("it is open");
    let (anew, rest) = (after - before, SIZE - before);
    assert!(
        (rest..=rest + SIZE / 20).contains(&anew),
        "{anew} bytes of {SIZE} were read after {before}"
    );

    let done = folder.pull(&server, &[]);
    assert_eq!(done.disk(0, "vda")["copied_bytes"], 0);
    folder.holds(1, "vda", &guest.disk, "in three runs");
}

#[test]
fn killed_between_the_instant_and_the_first_byte_it_leaves_no_backup_to_the_next_run() {
    let (server, guest) = full_disk(4 * MIB, &[]);
    let folder = Folder::new();
    folder.pull(&server, &[]).result(0);
    // The first is that of the folder; that of a draft is made when the instant is there.
    folder.pull_killed_at(&server, "mkdir,mkdirat", 2);
    let left = open_backups(&server);
    assert_eq!(left.as_array().map(Vec::len), Some(1), "{left}");

    // Somebody else's is none of ours.
    server.begin("others", &[]);
    let next = folder.pull(&server, &[]);
    assert_eq!(next.disk(0, "vda")["parent"], 1);
    assert_eq!(
        stillpoint_tests::server::names(&open_backups(&server), "", "id"),
        ["others"]
    );
    folder.holds(2, "vda", &guest.disk, "after a backup that nobody copied");
}

#[test]
fn killed_between_publishing_and_commit_the_next_run_commits_what_is_there() {
    let (server, mut guest) = full_disk(4 * MIB, &[]);
    let folder = Folder::new();
    // What a point needs only until it is whole is removed when it is published.
    folder.pull_killed_at(&server, "unlink,unlinkat", 1);
    assert_eq!(folder.points(), [1]);
    let open = open_backups(&server);
    assert_eq!(open.as_array().map(Vec::len), Some(1), "{open}");
    folder.holds(1, "vda", &guest.disk, "published");

    guest.write(0, &[9; 512]);
    let next = folder.pull(&server, &[]);
    let disk = next.disk(0, "vda");
    assert_eq!(
        (&disk["mode"], &disk["parent"]),
        (&json!("incremental"), &json!(1))
    );
    assert_eq!(open_backups(&server), json!([]));
    folder.holds(2, "vda", &guest.disk, "on top of what was committed late");
}

#[test]
fn a_backup_that_breaks_meanwhile_is_aborted_and_its_base_stays() {
    let (server, mut guest) = full_disk(64 * MIB, &["--backup-scratch-limit=1M"]);
    let folder = Folder::new();
    folder.pull(&server, &[]).result(0);
    let mut rng = stillpoint_tests::seeds::rng(2);
    (0..32).for_each(|mib| guest.write_random(&mut rng, mib * MIB, MIB));

    let pull = UnderWay::begin(&server, &folder, MIB);
    // More than may be kept; of what has not been read yet too.
    guest.write_random(&mut rng, 16 * MIB, 16 * MIB);
    assert_eq!(pull.wait(), 4);
    assert_eq!(open_backups(&server), json!([]));
    assert!(!folder.has_draft());
    assert_eq!(folder.points(), [1]);

    let next = folder.pull(&server, &[]);
    let disk = next.disk(0, "vda");
    assert_eq!(
        (&disk["mode"], &disk["parent"]),
        (&json!("incremental"), &json!(1))
    );
    let point = next.result(0)["point"].as_u64().expect("a number");
    folder.holds(point, "vda", &guest.disk, "after a broken one");
}

#[test]
fn a_backup_that_broke_between_two_runs_is_told_of_and_aborted() {
    let (server, mut guest) = full_disk(64 * MIB, &["--backup-scratch-limit=1M"]);
    let folder = Folder::new();
    let pull = UnderWay::begin(&server, &folder, 32 * MIB);
    let backup = pull.backup.clone();
    pull.signal(Signal::KILL);
    pull.wait();
    guest.write(0, &vec![1; 4 * MIB as usize]);

    let output = folder.fails(&server, &[], 4, "is broken");
    assert!(output.stderr.contains(&backup), "{output}");
    assert!(!folder.has_draft());
    assert_eq!(open_backups(&server), json!([]));
    folder.pull(&server, &[]).result(0);
}

#[test]
fn a_backup_that_somebody_else_ended_costs_a_new_beginning() {
    let (server, guest) = full_disk(64 * MIB, &[]);
    let folder = Folder::new();
    let pull = UnderWay::begin(&server, &folder, 32 * MIB);
    let backup = pull.backup.clone();
    pull.signal(Signal::KILL);
    pull.wait();
    server.abort(&backup);

    let pulled = folder.pull(&server, &[]);
    assert_eq!(pulled.disk(0, "vda")["copied_bytes"], 64 * MIB);
    let notes: Vec<_> = pulled
        .lines
        .iter()
        .filter(|line| line["event"] == "note")
        .collect();
    assert!(
        notes[0]["message"]
            .as_str()
            .is_some_and(|text| text.contains("has ended")),
        "{notes:?}"
    );
    folder.holds(1, "vda", &guest.disk, "begun anew");
}

#[test]
fn two_at_once_do_not_get_into_each_others_way() {
    let (server, guest) = full_disk(32 * MIB, &[]);
    let folder = Folder::new();
    let pull = UnderWay::begin(&server, &folder, 8 * MIB);
    // However late the second is, the first is there.
    pull.signal(Signal::STOP);
    let second = process::run(&mut folder.command(&server, &[]));
    pull.signal(Signal::CONT);
    let (_, message) = Pulled::from(second).error(1);
    assert!(message.contains("in use"), "{message}");
    assert_eq!(pull.wait(), 0);
    folder.holds(1, "vda", &guest.disk, "the first of two");
}

#[test]
fn one_that_ends_under_way_is_told_of() {
    let (server, _guest) = full_disk(64 * MIB, &[]);
    let folder = Folder::new();
    let pull = UnderWay::begin(&server, &folder, 8 * MIB);
    server.abort(&pull.backup);
    assert_eq!(pull.wait(), 4);
    assert!(!folder.has_draft());
}

#[test]
fn a_full_target_loses_nothing_and_the_pull_goes_on_when_there_is_room() {
    let mount = Mount::tmpfs(24 * MIB);
    let (server, guest) = full_disk(32 * MIB, &[]);
    let folder = Folder::at(&mount.path().join("backups"));
    let output: Output = folder.fails(&server, &[], 1, "no space is left");
    assert!(output.stderr.contains("hint: "), "{output}");
    assert!(folder.has_draft());
    assert_eq!(open_backups(&server).as_array().map(Vec::len), Some(1));

    let args = ["-o", "remount,size=64m", path(mount.path())];
    stillpoint_tests::tools::tool("mount", &args).ok();
    let goes_on = folder.pull(&server, &[]);
    let copied = goes_on.disk(0, "vda")["copied_bytes"].as_u64();
    assert!(copied < Some(24 * MIB), "{copied:?}");
    folder.holds(1, "vda", &guest.disk, "with more room");
}

#[test]
fn a_server_that_comes_back_is_waited_for_and_the_same_run_goes_on() {
    for is_killed in [false, true] {
        let (mut server, guest) = full_disk(64 * MIB, &[]);
        let folder = Folder::new();
        let pull = UnderWay::begin(&server, &folder, 16 * MIB);
        if is_killed {
            server.kill();
        } else {
            server.stop();
        }
        server.start();
        assert_eq!(pull.wait(), 0);
        assert_eq!(folder.points(), [1]);
        folder.holds(1, "vda", &guest.disk, "over a restart, in one run");
        assert_eq!(open_backups(&server), json!([]));
    }
}

#[test]
fn a_server_that_stays_away_is_waited_for_as_long_as_was_said_and_the_next_run_goes_on() {
    let (mut server, guest) = full_disk(64 * MIB, &[]);
    let folder = Folder::new();
    let args = ["--reconnect=500ms"];
    let pull = UnderWay::begin_with(&server, &folder, &args, 16 * MIB);
    server.stop();
    assert_eq!(pull.wait(), 1);
    assert!(folder.has_draft());
    folder.fails(&server, &[], 1, "no server answers");
    server.start();
    let goes_on = folder.pull(&server, &[]);
    assert!(goes_on.disk(0, "vda")["copied_bytes"].as_u64() < Some(64 * MIB));
    folder.holds(1, "vda", &guest.disk, "over a restart");
}

#[test]
fn other_arguments_begin_anew_and_leave_no_backup_open() {
    let (server, _guest) = full_disk(32 * MIB, &[]);
    let folder = Folder::new();
    let pull = UnderWay::begin(&server, &folder, 16 * MIB);
    pull.signal(Signal::KILL);
    pull.wait();
    // The one before was full already: it is what is asked for.
    let goes_on = folder.pull(&server, &["--full"]);
    assert!(goes_on.disk(0, "vda")["copied_bytes"].as_u64() < Some(32 * MIB));

    let mut guest = Guest::new(&server, "vda");
    guest.write(0, &vec![1; 16 * MIB as usize]);
    let pull = UnderWay::begin(&server, &folder, 8 * MIB);
    pull.signal(Signal::KILL);
    pull.wait();
    let full = folder.pull(&server, &["--full"]);
    assert_eq!(full.disk(0, "vda")["copied_bytes"], 32 * MIB);
    assert_eq!(open_backups(&server), json!([]));
}
