//! What is done to several disks is done to all of them or to none, wherever a server is killed.

use std::fs::{self, File};
use std::path::PathBuf;

use serde_json::Value;
use stillpoint_tests::state::{Recorded, copy_directory, directory, journal};
use stillpoint_tests::{MIB, Server};

const DISKS: [&str; 2] = ["vda", "vdb"];

/// Two disks as a server left them that was killed after a command, to be cut back.
struct Scene {
    server: Server,
    saved: PathBuf,
    /// What the command recorded on each disk, last of all.
    new: [Vec<Recorded>; 2],
    before: Known,
    after: Known,
}

/// What can be seen of checkpoints, backups and consumers.
#[derive(Clone, Debug, Eq, PartialEq)]
struct Known {
    checkpoints: Vec<String>,
    consumers: Vec<String>,
    open: Vec<String>,
}

impl Scene {
    /// A scene in which `commands` came first, and then `last`.
    fn new(commands: &[&[&str]], last: &[&str]) -> Self {
        let mut builder = Server::builder();
        for disk in DISKS {
            builder = builder.disk(disk, MIB);
        }
        let mut server = builder.start();
        for command in commands {
            server.cli(command).ok();
        }
        let states = DISKS.map(|disk| directory(&server, disk));
        let before = known(&server);
        let count = states.clone().map(|state| journal(&state).len());
        let saved = server.path("saved");
        fs::create_dir(&saved).unwrap();
        for (disk, state) in DISKS.iter().zip(&states) {
            copy_directory(state, &saved.join(format!("{disk}-before")));
        }
        server.cli(last).ok();
        let after = known(&server);
        assert_ne!(before, after, "{last:?}");
        server.kill();
        let new = [0, 1].map(|disk| journal(&states[disk]).split_off(count[disk]));
        for (disk, state) in DISKS.iter().zip(&states) {
            let kept = saved.join(disk);
            copy_directory(state, &kept);
            // Scratch that a command lets go is still there while its records are being made.
            let scratch = saved.join(format!("{disk}-before/backups"));
            for backup in fs::read_dir(scratch).into_iter().flatten() {
                let backup = backup.unwrap();
                copy_directory(
                    &backup.path(),
                    &kept.join("backups").join(backup.file_name()),
                );
            }
        }
        Self {
            server,
            saved,
            new,
            before,
            after,
        }
    }

    /// Kills the server when so many records were there, in the order in which they were made: one
    /// on each disk in turn.
    fn cut(&mut self, records: usize, is_torn: bool) -> Known {
        let all = self.new[0].len() + self.new[1].len();
        assert_eq!(self.new[0].len(), self.new[1].len(), "{:?}", self.new);
        for (number, disk) in DISKS.iter().enumerate() {
            let state = directory(&self.server, disk);
            copy_directory(&self.saved.join(disk), &state);
            let kept = (records + 1 - number) / 2;
            let file = File::options()
                .write(true)
                .open(state.join("journal"))
                .unwrap();
            let Some(first_lost) = self.new[number].get(kept) else {
                continue;
            };
            // Of the next record, the beginning may be there.
            let is_next = records < all && records % 2 == number;
            let torn = if is_torn && is_next { 40 } else { 0 };
            file.set_len((first_lost.at + torn) as u64).unwrap();
        }
        self.server.start();
        let found = known(&self.server);
        self.server.kill();
        // What was found is so from then on.
        self.server.start();
        assert_eq!(
            known(&self.server),
            found,
            "{records} records, torn: {is_torn}"
        );
        self.server.kill();
        found
    }

    /// Checks that the command is undone before so many records, and done from then on.
    #[track_caller]
    fn check(mut self, decides: usize) {
        let all = self.new[0].len() + self.new[1].len();
        for records in 0..=all {
            for is_torn in [false, true] {
                let expected = if records < decides {
                    &self.before
                } else {
                    &self.after
                };
                let expected = expected.clone();
                let found = self.cut(records, is_torn);
                assert_eq!(found, expected, "{records} of {:?}", self.new);
            }
        }
    }
}

fn known(server: &Server) -> Known {
    let list = |command: &[&str], describe: &dyn Fn(&Value) -> String| -> Vec<String> {
        let list = server.cli_json(command);
        list.as_array()
            .expect("a list")
            .iter()
            .map(describe)
            .collect()
    };
    let on_disks = |member: &Value, what: &str| {
        let disks = member["disks"].as_array().expect("disks").iter();
        let disks: Vec<_> = disks
            .map(|disk| format!("{}{}", disk["disk"], disk[what]))
            .collect();
        disks.join(" ")
    };
    Known {
        checkpoints: list(&["checkpoint", "list"], &|checkpoint| {
            let (name, pending) = (&checkpoint["name"], &checkpoint["pending"]);
            format!(
                "{name} {pending} on {}",
                on_disks(checkpoint, "dirty_bytes")
            )
        }),
        consumers: list(&["consumer", "list"], &|consumer| {
            let name = &consumer["name"];
            format!("{name} at {}", on_disks(consumer, "checkpoint_uuid"))
        }),
        open: list(&["backup", "list"], &|backup| {
            format!("{} {}", backup["id"], backup["state"])
        }),
    }
}

const CREATE: &[&str] = &["checkpoint", "create", "cp"];
const BEGIN: &[&str] = &["backup", "begin", "--id", "b1", "--consumer", "nightly"];
const AGAIN: &[&str] = &["backup", "begin", "--id", "b2", "--consumer", "nightly"];

#[test]
fn a_checkpoint_is_created_when_both_disks_have_its_record() {
    Scene::new(&[], CREATE).check(2);
}

#[test]
fn a_checkpoint_is_deleted_when_one_disk_says_so() {
    Scene::new(&[CREATE], &["checkpoint", "delete", "cp"]).check(1);
}

#[test]
fn a_backup_is_open_when_both_disks_have_its_record() {
    Scene::new(&[CREATE], BEGIN).check(2);
}

#[test]
fn a_backup_is_committed_and_its_consumer_moves_when_one_disk_says_so() {
    Scene::new(&[BEGIN], &["backup", "commit", "b1"]).check(1);
    // What the consumer leaves behind goes too.
    let scene = Scene::new(
        &[BEGIN, &["backup", "commit", "b1"], AGAIN],
        &["backup", "commit", "b2"],
    );
    assert_eq!(scene.new[0].len(), 2, "{:?}", scene.new);
    scene.check(1);
}

#[test]
fn a_consumer_is_forgotten_when_one_disk_says_so() {
    let scene = Scene::new(
        &[BEGIN, &["backup", "commit", "b1"]],
        &["consumer", "forget", "nightly"],
    );
    scene.check(1);
}

#[test]
fn of_a_disk_that_is_not_served_what_the_other_knows_is_good() {
    let mut scene = Scene::new(&[CREATE], BEGIN);
    scene.cut(4, false);
    let old = scene.server;
    let mut server = Server::builder().disk_at("vda", &old.image("vda")).start();
    let list = server.cli_json(&["checkpoint", "list"]);
    assert_eq!(list[0]["name"], "cp", "{list}");
    let shown = server.cli(&["backup", "show", "b1", "--json"]);
    shown.exits(4);
    assert!(shown.stdout.contains("is not served"), "{shown}");
    server.begin("b2", &["--since", "cp"]);
    server.stop();
    // With both again: what was broken stays so.
    let server = Server::builder()
        .disk_at("vda", &old.image("vda"))
        .disk_at("vdb", &old.image("vdb"))
        .start();
    server.cli(&["backup", "commit", "b1"]).exits(4);
    server.abort("b1");
    let args = ["backup", "begin", "--since", "cp", "--json"];
    server.cli(&args).exits(0);
}
