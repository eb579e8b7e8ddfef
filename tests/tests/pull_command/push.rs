//! `stillpoint push`: what a pull makes, made by the server; and what becomes of a push that ends early.

use std::fs;
use std::process::{Command, Stdio};
use std::time::Instant;

use rand::Rng as _;
use rustix::process::Signal;
use serde_json::{Value, json};
use stillpoint_tests::killer::Killer;
use stillpoint_tests::process::{self, KilledOnDrop, PATIENCE, run};
use stillpoint_tests::seeds::{number, rng, seeds};
use stillpoint_tests::tools::path;
use stillpoint_tests::{Guest, MIB, Server};

use crate::folder::{Folder, Pulled};
use crate::histories::{World, some_disks};

fn command(server: &Server, folder: &Folder, args: &[&str]) -> Command {
    let args = [&["push", "--to", path(folder.path()), "--json"], args].concat();
    server.cli_command(&args)
}

/// A push into a folder, whatever comes of it.
pub(crate) fn push(server: &Server, folder: &Folder, args: &[&str]) -> Pulled {
    Pulled::from(run(&mut command(server, folder, args)))
}

fn open_backups(server: &Server) -> Vec<String> {
    let list = server.cli_json(&["backup", "list"]);
    let ids = list.as_array().expect("a list").iter();
    ids.map(|backup| backup["id"].as_str().expect("an id").to_owned())
        .collect()
}

/// A manifest without what is another one in every backup.
fn comparable(mut manifest: Value) -> Value {
    let all = manifest.as_object_mut().expect("an object");
    for key in ["instant", "backup", "checkpoint", "blake3"] {
        assert!(all.remove(key).is_some(), "no {key}");
    }
    for disk in all["disks"].as_array_mut().expect("disks") {
        if let Some(since) = disk["since"].as_object_mut() {
            since.clear();
        }
    }
    manifest
}

#[test]
fn people_are_told_what_the_next_push_would_copy() {
    let server = Server::with_disk(MIB);
    let folder = Folder::new();
    let pushed = server.cli(&["push", "--to", path(folder.path())]);
    assert!(pushed.ok().contains("the next push would copy"), "{pushed}");
}

#[test]
fn what_is_pushed_is_byte_for_byte_what_is_pulled() {
    let histories: Vec<u64> = (1..=number("STILLPOINT_PUSH_HISTORIES", 2)).collect();
    for seed in seeds(&histories) {
        history(seed);
    }
}

fn history(seed: u64) {
    let mut rng = rng(seed);
    let mut world = World::new(&mut rng);
    let (pushed, pulled) = (Folder::new(), Folder::new());
    for step in 0..6 {
        let what = format!("seed {seed}, step {step}");
        world.go_on(&mut rng);
        let World { server, guests, .. } = &world;
        let is_full = rng.random_bool(0.1);
        let wanted = some_disks(&mut rng);
        let args = [wanted, if is_full { &["--full"] } else { &[] }].concat();
        let is_pushed_first = rng.random_bool(0.5);
        let by_push = |folder| push(server, folder, &args);
        let by_pull = |folder: &Folder| folder.pull(server, &args);
        let (first, second) = if is_pushed_first {
            let first = by_push(&pushed);
            (first, by_pull(&pulled))
        } else {
            let second = by_pull(&pulled);
            (by_push(&pushed), second)
        };
        let (first, second) = (first.result(0), second.result(0));
        assert_eq!(first["point"], second["point"], "{what}");
        let point = first["point"].as_u64().expect("a number");
        assert_eq!(
            comparable(pushed.manifest(point)),
            comparable(pulled.manifest(point)),
            "{what}"
        );
        for (name, guest) in guests {
            if !wanted.is_empty() && !wanted.contains(name) {
                continue;
            }
            let files = [&pushed, &pulled].map(|folder| fs::read(folder.file(point, name)));
            let [one, other] = files.map(|file| file.expect("a file of the point"));
            assert!(one == other, "{what}: {name} differs");
            pushed.holds(point, name, &guest.disk, &what);
        }
        // What a disk has, those of its counters that are about the copy say alike.
        let disks = |result: &Value| {
            let mut disks = result["disks"].clone();
            for disk in disks.as_array_mut().expect("disks") {
                for key in ["since", "since_uuid", "file"] {
                    disk.as_object_mut().expect("a disk").remove(key);
                }
            }
            disks
        };
        assert_eq!(disks(first), disks(second), "{what}");
    }
    assert!(
        open_backups(&world.server).is_empty(),
        "backups are left open"
    );
}

/// A server of one disk that is full of data.
fn full_disk(size: u64, args: &[&str]) -> (Server, Guest) {
    let mut builder = Server::builder().disk("vda", size);
    for arg in args {
        builder = builder.arg(arg);
    }
    let server = builder.start();
    let mut guest = Guest::new(&server, "vda");
    let mut rng = rng(1);
    (0..size / MIB).for_each(|mib| guest.write_random(&mut rng, mib * MIB, MIB));
    (server, guest)
}

/// What makes each write into the first disk of a point take some time, so that there is a middle.
struct Slowed {
    _strace: KilledOnDrop,
}

impl Slowed {
    fn down(server: &Server, folder: &Folder, point: u64) -> Self {
        let file = folder.path().join(format!("{point}.partial/vda.qcow2"));
        let mut strace = Command::new("strace");
        strace
            .args(["-f", "-o", "/dev/null", "--trace=pwrite64"])
            .args(["-e", "inject=pwrite64:delay_enter=50000"])
            .args(["-P", path(&file)])
            .arg(format!("--attach={}", server.pid()))
            .stderr(Stdio::piped());
        let mut strace = KilledOnDrop::spawn(&mut strace);
        let told = strace.child.stderr.take().expect("it was asked for");
        let mut told = std::io::BufReader::new(told);
        let mut line = String::new();
        while !line.contains("attached") {
            line.clear();
            let read = std::io::BufRead::read_line(&mut told, &mut line);
            assert!(read.expect("what strace says") > 0, "strace ended");
        }
        Self { _strace: strace }
    }
}

/// A push under way.
struct UnderWay {
    client: KilledOnDrop,
    backup: String,
}

impl UnderWay {
    /// Returns when so much has been copied.
    #[track_caller]
    fn begin(server: &Server, folder: &Folder, copied: u64) -> Self {
        let mut command = command(server, folder, &[]);
        command.stdout(Stdio::null()).stderr(Stdio::null());
        let client = KilledOnDrop::spawn(&mut command);
        let begun = Instant::now();
        let mut qmp = server.qmp();
        loop {
            assert!(begun.elapsed() < PATIENCE, "nothing is copied");
            let jobs = qmp.execute("query-jobs", &json!({}));
            let done = jobs[0]["disks"][0]["done_bytes"].as_u64();
            if done.is_some_and(|bytes| bytes >= copied) {
                assert_eq!(jobs[0]["status"], "running", "{jobs}");
                let backup = jobs[0]["id"].as_str().expect("an id").to_owned();
                return Self { client, backup };
            }
            std::thread::yield_now();
        }
    }

    /// The exit code, when it has ended.
    fn wait(&mut self) -> i32 {
        let status = process::wait(&mut self.client.child).expect("an end");
        status.code().unwrap_or(-1)
    }
}

/// Waits until a job is over, and returns it.
#[track_caller]
fn concluded(server: &Server, id: &str) -> Value {
    let begun = Instant::now();
    let mut qmp = server.qmp();
    loop {
        assert!(begun.elapsed() < PATIENCE, "the job goes on");
        let jobs = qmp.execute("query-jobs", &json!({}));
        let mut jobs = jobs.as_array().expect("a list").iter();
        let job = jobs.find(|job| job["id"] == id).expect("the job");
        if job["status"] == "concluded" {
            return job.clone();
        }
    }
}

#[test]
fn zeroes_that_were_written_as_data_take_no_space_in_what_is_pushed() {
    use std::os::unix::fs::MetadataExt as _;
    let server = Server::with_disk(8 * MIB);
    let mut guest = Guest::new(&server, "vda");
    guest.write(0, &vec![0; 8 * MIB as usize]);
    guest.write(MIB, &[1; 4096]);
    let folder = Folder::new();
    let pushed = push(&server, &folder, &[]);
    assert_eq!(pushed.disk(0, "vda")["data_bytes"], 8 * MIB);
    let taken = 512 * fs::metadata(folder.file(1, "vda")).unwrap().blocks();
    assert!(taken < MIB, "{taken} bytes");
    folder.holds(1, "vda", &guest.disk, "zeroes");
}

#[test]
fn a_push_that_is_cancelled_leaves_nothing_and_the_next_has_its_base() {
    let (server, mut guest) = full_disk(32 * MIB, &[]);
    let folder = Folder::new();
    push(&server, &folder, &[]).result(0);
    let mut rng = rng(2);
    (0..24).for_each(|mib| guest.write_random(&mut rng, mib * MIB, MIB));

    let slowed = Slowed::down(&server, &folder, 2);
    let mut push_under_way = UnderWay::begin(&server, &folder, MIB);
    let mut qmp = server.qmp();
    let id = json!({"id": push_under_way.backup});
    qmp.execute("job-cancel", &id);
    let told = qmp.event("JOB_STATUS_CHANGE");
    assert_eq!(told["data"]["status"], "aborting");
    assert_eq!(push_under_way.wait(), 1);
    let job = concluded(&server, &push_under_way.backup);
    assert_eq!(job["code"], "cancelled", "{job}");
    drop(slowed);
    assert!(open_backups(&server).is_empty());
    assert!(!folder.has_draft());
    assert_eq!(folder.points(), [1]);
    qmp.execute("job-dismiss", &id);
    let refused = qmp.try_execute("job-cancel", &id).unwrap_err();
    assert!(refused.contains("no job"), "{refused}");

    let next = push(&server, &folder, &[]);
    assert_eq!(next.disk(0, "vda")["mode"], "incremental");
    assert_eq!(next.disk(0, "vda")["data_bytes"], 24 * MIB);
    folder.holds(2, "vda", &guest.disk, "after the cancelled one");
}

/// A push that was interrupted when it had copied some.
fn interrupted(server: &Server, folder: &Folder) -> UnderWay {
    let _slowed = Slowed::down(server, folder, 1);
    let mut under_way = UnderWay::begin(server, folder, 4 * MIB);
    process::signal(&under_way.client.child, Signal::INT);
    assert_eq!(under_way.wait(), 1);
    under_way
}

#[test]
fn a_push_that_is_interrupted_goes_on_with_the_same_instant() {
    let (server, mut guest) = full_disk(48 * MIB, &[]);
    let folder = Folder::new();
    let under_way = interrupted(&server, &folder);
    assert_eq!(
        open_backups(&server),
        std::slice::from_ref(&under_way.backup)
    );
    assert!(folder.has_draft() && folder.points().is_empty());
    let instant = guest.disk.clone();
    guest.write(0, &vec![9; MIB as usize]);

    let goes_on = push(&server, &folder, &[]);
    assert_eq!(goes_on.result(0)["backup"], under_way.backup);
    assert!(goes_on.disk(0, "vda")["copied_bytes"].as_u64() <= Some(44 * MIB));
    folder.holds(1, "vda", &instant, "the first instant");
    assert!(open_backups(&server).is_empty());
}

#[test]
fn what_is_left_of_an_instant_that_has_ended_is_not_gone_on_with() {
    let (server, mut guest) = full_disk(32 * MIB, &[]);
    let folder = Folder::new();
    let under_way = interrupted(&server, &folder);
    server.abort(&under_way.backup);
    guest.write(0, &vec![9; 32 * MIB as usize]);

    let anew = push(&server, &folder, &[]);
    assert_eq!(anew.disk(0, "vda")["copied_bytes"], 32 * MIB);
    folder.holds(1, "vda", &guest.disk, "another instant");
    assert!(open_backups(&server).is_empty());
}

#[test]
fn a_push_goes_on_without_whoever_asked_for_it() {
    let (server, guest) = full_disk(32 * MIB, &[]);
    let folder = Folder::new();
    let slowed = Slowed::down(&server, &folder, 1);
    let mut under_way = UnderWay::begin(&server, &folder, MIB);
    under_way.client.child.kill().unwrap();
    under_way.wait();
    drop(slowed);
    let job = concluded(&server, &under_way.backup);
    assert_eq!(job["result"]["number"], 1, "{job}");
    assert!(open_backups(&server).is_empty());
    folder.holds(1, "vda", &guest.disk, "without a client");
}

#[test]
fn a_push_survives_its_server() {
    for is_killed in [false, true] {
        let (mut server, mut guest) = full_disk(48 * MIB, &[]);
        let folder = Folder::new();
        let slowed = Slowed::down(&server, &folder, 1);
        let mut under_way = UnderWay::begin(&server, &folder, 4 * MIB);
        if is_killed {
            server.kill();
        } else {
            server.stop();
        }
        drop(slowed);
        assert_eq!(under_way.wait(), 1, "killed: {is_killed}");
        server.start();
        assert_eq!(server.qmp().execute("query-jobs", &json!({})), json!([]));
        assert_eq!(open_backups(&server), [under_way.backup.clone()]);
        let instant = guest.disk.clone();
        guest.reconnect(&server, "vda");
        guest.write(0, &vec![9; MIB as usize]);

        let goes_on = push(&server, &folder, &[]);
        assert_eq!(goes_on.result(0)["backup"], under_way.backup);
        assert!(goes_on.disk(0, "vda")["copied_bytes"].as_u64() <= Some(44 * MIB));
        folder.holds(1, "vda", &instant, "the first instant");
    }
}

#[test]
fn what_was_published_is_committed_by_the_next_push() {
    let (mut server, mut guest) = full_disk(4 * MIB, &[]);
    let folder = Folder::new();
    let killer = Killer::of(&server, "unlink,unlinkat", 1);
    let failed = push(&server, &folder, &[]);
    failed.error(1);
    drop(killer);
    server.wait();
    assert_eq!(folder.points(), [1]);
    server.start();
    assert_eq!(open_backups(&server).len(), 1);
    guest.reconnect(&server, "vda");
    guest.write(MIB, &[7; 512]);

    let next = push(&server, &folder, &[]);
    assert!(
        next.lines.iter().any(|line| line["event"] == "note"
            && line["message"].as_str().unwrap().contains("committed now")),
        "{}",
        next.output
    );
    assert_eq!(next.disk(0, "vda")["mode"], "incremental");
    assert!(open_backups(&server).is_empty());
    folder.holds(2, "vda", &guest.disk, "after the late commit");
}

#[test]
fn a_push_whose_backup_breaks_says_so_and_the_next_has_its_base() {
    let (server, mut guest) = full_disk(32 * MIB, &["--backup-scratch-limit=64k"]);
    let folder = Folder::new();
    push(&server, &folder, &[]).result(0);
    let mut rng = rng(3);
    (0..24).for_each(|mib| guest.write_random(&mut rng, mib * MIB, MIB));
    let slowed = Slowed::down(&server, &folder, 2);
    let mut under_way = UnderWay::begin(&server, &folder, MIB);
    guest.write_random(&mut rng, 0, MIB);
    assert_eq!(under_way.wait(), 4);
    drop(slowed);
    assert!(open_backups(&server).is_empty());
    assert!(!folder.has_draft());

    let next = push(&server, &folder, &[]);
    assert_eq!(next.disk(0, "vda")["mode"], "incremental");
    folder.holds(2, "vda", &guest.disk, "after the broken one");
}

#[test]
fn what_cannot_be_pushed_is_refused_and_begins_nothing() {
    let server = Server::with_disk(MIB);
    let folder = Folder::new();
    let mut qmp = server.qmp();
    let refused = |answer: Result<Value, String>, saying: &str| {
        let error = answer.unwrap_err();
        assert!(error.contains(saying), "{error}");
    };
    let to = path(folder.path());
    refused(
        qmp.try_execute("push", &json!({"id": "b1", "to": to})),
        "no open backup 'b1'",
    );
    server.begin("b1", &[]);
    refused(
        qmp.try_execute("push", &json!({"id": "b1", "to": "backups"})),
        "no path from the root on",
    );
    server.abort("b1");
    let unknown = push(&server, &folder, &["vdx"]);
    assert_eq!(unknown.error(1).0, "unknown-disk");
    assert!(!folder.path().exists());

    let foreign = Folder::new();
    fs::create_dir(foreign.path()).unwrap();
    fs::write(foreign.path().join("letter"), "dear").unwrap();
    let refused = push(&server, &foreign, &[]);
    assert_eq!(refused.error(1).0, "not-a-backup-folder");
    assert!(open_backups(&server).is_empty());

    let other = Server::with_disk(MIB);
    push(&other, &folder, &[]).result(0);
    let refused = push(&server, &folder, &[]);
    assert_eq!(refused.error(1).0, "other-disk");
    assert!(open_backups(&server).is_empty(), "{}", refused.output);
}

#[test]
fn a_folder_is_pushed_into_by_one_at_a_time() {
    let (server, _guest) = full_disk(32 * MIB, &[]);
    let folder = Folder::new();
    let slowed = Slowed::down(&server, &folder, 1);
    let mut under_way = UnderWay::begin(&server, &folder, MIB);
    let refused = push(&server, &folder, &[]);
    assert_eq!(refused.error(1).0, "folder-in-use");
    drop(slowed);
    assert_eq!(under_way.wait(), 0);
    assert_eq!(folder.points(), [1]);
}

#[test]
fn jobs_are_told_of_in_the_words_of_qemu() {
    let (server, _guest) = full_disk(4 * MIB, &[]);
    let folder = Folder::new();
    let mut qmp = server.qmp();
    server.begin("b1", &[]);
    let job = qmp.execute("push", &json!({"id": "b1", "to": path(folder.path())}));
    assert_eq!(job["type"], "push");
    assert_eq!(job["status"], "running");
    let mut told = Vec::new();
    while told.last() != Some(&json!("concluded")) {
        let event = qmp.event("JOB_STATUS_CHANGE");
        assert_eq!(event["data"]["id"], "b1");
        told.push(event["data"]["status"].clone());
    }
    assert_eq!(told, [json!("running"), json!("concluded")]);
    let job = concluded(&server, "b1");
    assert_eq!(job["current-progress"], job["total-progress"]);
    assert_eq!(job["total-progress"], 8 * MIB);
    assert!(open_backups(&server).is_empty());
    qmp.execute("job-dismiss", &json!({"id": "b1"}));
    assert_eq!(qmp.execute("query-jobs", &json!({})), json!([]));
}

#[test]
fn the_guest_is_held_around_the_instant_of_a_push_and_the_point_says_for_how_long() {
    let (server, guest) = full_disk(MIB, &[]);
    let folder = Folder::new();
    let log = server.path("log");
    let say = |word: &str| format!("echo {word} $STILLPOINT_COMMAND >> '{}'", log.display());
    let (freeze, thaw) = (say("freeze"), say("thaw"));
    let hooks = [
        &format!("--freeze-hook={freeze}")[..],
        &format!("--thaw-hook={thaw}"),
    ];
    push(&server, &folder, &hooks).result(0);
    assert_eq!(
        fs::read_to_string(&log).unwrap(),
        "freeze push\nthaw push\n"
    );
    assert!(folder.manifest(1)["held_us"].as_u64().unwrap() > 0);
    folder.holds(1, "vda", &guest.disk, "held");

    let failed = push(&server, &folder, &["--freeze-hook=false"]);
    assert_eq!(failed.error(1).0, "freeze-failed");
    assert!(open_backups(&server).is_empty());
}
