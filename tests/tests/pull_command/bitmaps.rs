//! Disks that come by a dirty bitmap of their own: machines that were stopped, in qcow2 images.

use std::path::{Path, PathBuf};

use rand::Rng as _;
use serde_json::json;
use stillpoint_tests::seeds::{Rng, rng, seeds};
use stillpoint_tests::server::temporary_directory;
use stillpoint_tests::tools::{abandon, convert_to_raw, path, sha256_of_file, tool};
use stillpoint_tests::{CHUNK, Guest, KIB, MIB, Server};
use tempfile::TempDir;

use crate::folder::{Folder, Pulled};

const SIZE: u64 = 8 * MIB;

/// The image of a machine that is stopped whenever a server has it.
struct Machine {
    directory: TempDir,
    image: PathBuf,
}

impl Machine {
    /// One on top of another image, with some data.
    fn new(rng: &mut Rng) -> Self {
        let directory = temporary_directory();
        let [base, image] = ["base", "image"].map(|name| directory.path().join(name));
        let size = SIZE.to_string();
        tool(
            "qemu-img",
            &["create", "-q", "-f", "qcow2", path(&base), &size],
        )
        .ok();
        let behind = ["-b", "base", "-F", "qcow2", path(&image)];
        tool(
            "qemu-img",
            &[&["create", "-q", "-f", "qcow2"], &behind[..]].concat(),
        )
        .ok();
        write_somewhere(&base, rng);
        let machine = Self { directory, image };
        machine.runs(rng);
        machine
    }

    /// It runs for a while.
    fn runs(&self, rng: &mut Rng) {
        write_somewhere(&self.image, rng);
    }

    fn bitmap(&self, args: &[&str], name: &str) {
        tool(
            "qemu-img",
            &[&["bitmap"], args, &[path(&self.image), name]].concat(),
        )
        .ok();
    }

    /// A server that has it.
    fn served(&self) -> Server {
        let disk = format!("vda={},format=qcow2,read-only", self.image.display());
        Server::builder().disk_as(&disk).start()
    }

    /// What `qemu-img` says is on its disk.
    fn contents(&self) -> Vec<u8> {
        let raw = self.directory.path().join("raw");
        convert_to_raw(&self.image, &raw);
        std::fs::read(raw).expect("what was converted")
    }
}

fn write_somewhere(image: &Path, rng: &mut Rng) {
    let mut args = vec!["-f".to_owned(), "qcow2".to_owned()];
    for _ in 0..6 {
        let offset = rng.random_range(0..(SIZE - 256 * KIB) / 512) * 512;
        let length = rng.random_range(1..=512) * 512;
        let pattern = rng.random_range(1..256);
        let command = match rng.random_range(0..4) {
            0 => format!("write -z {offset} {length}"),
            1 => format!("discard {offset} {length}"),
            _ => format!("write -P {pattern} {offset} {length}"),
        };
        args.extend(["-c".to_owned(), command]);
    }
    args.push(path(image).to_owned());
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    tool("qemu-io", &args).ok();
}

#[track_caller]
fn reason(pulled: &Pulled, code: i32) -> String {
    let disk = pulled.disk(code, "vda");
    assert_eq!(disk["mode"], "full", "{disk}");
    disk["reason"].as_str().expect("a reason").to_owned()
}

#[test]
fn a_stopped_machine_comes_incrementally_by_the_bitmaps_in_its_image_which_stays_as_it_is() {
    for seed in seeds(&[1, 2]) {
        let mut rng = rng(seed);
        let machine = Machine::new(&mut rng);
        let folder = Folder::new();
        let mut bitmap = "cp0".to_owned();
        machine.bitmap(&["--add", "-g", "64k"], &bitmap);
        for point in 1..=4_u64 {
            let what = format!("seed {seed}, point {point}");
            let (expected, before) = (machine.contents(), sha256_of_file(&machine.image));
            let server = machine.served();
            let pulled = folder.pull(&server, &["--bitmap", &bitmap]);
            let disk = pulled.disk(0, "vda");
            drop(server);
            assert_eq!(sha256_of_file(&machine.image), before, "{what}");
            folder.holds(point, "vda", &expected, &what);
            let is_first = point == 1;
            assert_eq!(pulled.result(0)["vouched"], is_first, "{what}");
            if is_first {
                assert_eq!(reason(&pulled, 0), "nothing of it is in the folder yet");
            } else {
                let found = (&disk["mode"], &disk["since"], &disk["parent"]);
                assert_eq!(
                    found,
                    (&json!("incremental"), &json!(bitmap), &json!(point - 1))
                );
                assert!(
                    disk["copied_bytes"].as_u64() < Some(SIZE / 2),
                    "{what}: {disk}"
                );
            }
            // As libvirt does: one that has all so far ends, and another begins.
            if point % 2 == 0 {
                machine.bitmap(&["--disable"], &bitmap);
                bitmap = format!("cp{point}");
                machine.bitmap(&["--add", "-g", "4k"], &bitmap);
            } else {
                machine.bitmap(&["--clear"], &bitmap);
            }
            machine.runs(&mut rng);
        }
    }
}

#[test]
fn a_bitmap_that_cannot_be_believed_makes_a_full_and_one_that_is_nowhere_makes_nothing() {
    let mut rng = rng(1);
    let machine = Machine::new(&mut rng);
    machine.bitmap(&["--add"], "cp1");
    let folder = Folder::new();
    let server = machine.served();
    folder.pull(&server, &[]).result(0);

    let (code, message) = folder.pull(&server, &["--bitmap", "cp2"]).error(1);
    assert_eq!(code, "unknown-bitmap", "{message}");
    assert!(message.contains("'cp2' not found"), "{message}");
    assert_eq!(server.cli_json(&["backup", "list"]), json!([]));
    drop(server);

    // With the bitmap in use.
    abandon(&machine.image);
    let server = machine.served();
    let args = ["--bitmap", "cp1"];
    let pulled = folder.pull(&server, &args);
    let why = reason(&pulled, 3);
    assert!(why.contains("'cp1' is inconsistent"), "{why}");
    assert_eq!(pulled.result(3)["vouched"], true);
    drop(server);
    folder.holds(2, "vda", &machine.contents(), "a full after all");
}

#[test]
fn a_dry_run_knows_what_a_bitmap_has_and_people_are_told_that_nobody_vouches() {
    let mut rng = rng(2);
    let machine = Machine::new(&mut rng);
    let folder = Folder::new();
    let server = machine.served();
    folder.pull(&server, &[]).result(0);
    drop(server);
    machine.bitmap(&["--add", "-g", "64k"], "cp1");
    let write = [
        "-f",
        "qcow2",
        "-c",
        "write -P 9 64k 65k",
        path(&machine.image),
    ];
    tool("qemu-io", &write).ok();

    let server = machine.served();
    let dry = folder.pull(&server, &["--bitmap", "cp1", "--dry-run"]);
    let disk = &dry.lines[0]["disks"][0];
    let found = (&disk["mode"], &disk["changed_bytes"], &disk["parent"]);
    assert_eq!(
        found,
        (&json!("incremental"), &json!(2 * CHUNK), &json!(1)),
        "{disk}"
    );
    let said = server.cli(&["pull", "--to", path(folder.path()), "--bitmap", "cp1"]);
    assert!(said.ok().contains("as the dirty bitmap says"), "{said}");
    assert!(said.ok().contains("since cp1, on top of point 1"), "{said}");
    drop(server);
    folder.holds(2, "vda", &machine.contents(), "by a bitmap");
}

#[test]
fn a_bitmap_of_the_servers_own_is_as_good_and_others_disks_come_as_ever() {
    let server = Server::builder()
        .disk("vda", SIZE)
        .disk("vdb", SIZE)
        .start();
    let mut guests = ["vda", "vdb"].map(|name| Guest::new(&server, name));
    let folder = Folder::new();
    folder.pull(&server, &[]).result(0);
    server.cli(&["bitmap", "add", "vda", "mine"]).ok();
    for guest in &mut guests {
        guest.write(3 * CHUNK, &[1; 512]);
    }
    let pulled = folder.pull(&server, &["--bitmap", "mine"]);
    assert_eq!(pulled.disk(0, "vda")["since"], "mine");
    for (name, guest) in ["vda", "vdb"].iter().zip(&guests) {
        let disk = pulled.disk(0, name);
        let found = (&disk["mode"], &disk["copied_bytes"], &disk["parent"]);
        assert_eq!(
            found,
            (&json!("incremental"), &json!(CHUNK), &json!(1)),
            "{disk}"
        );
        folder.holds(2, name, &guest.disk, "by a bitmap, or by a checkpoint");
    }
    assert_ne!(pulled.disk(0, "vdb")["since_uuid"], json!(null));
}

#[test]
fn a_pull_by_a_bitmap_that_is_interrupted_goes_on_by_that_one_alone() {
    let mut rng = rng(3);
    let machine = Machine::new(&mut rng);
    let folder = Folder::new();
    let server = machine.served();
    folder.pull(&server, &[]).result(0);
    drop(server);
    for name in ["cp1", "cp2"] {
        machine.bitmap(&["--add"], name);
    }
    machine.runs(&mut rng);
    let (server, args) = (machine.served(), ["--bitmap", "cp1"]);
    for (again, copies) in [(["--bitmap", "cp1"], false), (["--bitmap", "cp2"], true)] {
        folder.pull_with_killed_at(&server, &args, "renameat2", 1);
        let goes_on = folder.pull(&server, &again);
        let disk = goes_on.disk(0, "vda");
        assert_eq!(disk["since"], again[1], "{disk}");
        assert_eq!(disk["copied_bytes"].as_u64() > Some(0), copies, "{disk}");
        let point = goes_on.result(0)["point"].as_u64().expect("a number");
        folder.holds(
            point,
            "vda",
            &machine_contents(&machine, &server),
            "gone on",
        );
    }
}

/// What is on the disk, while a server has it.
fn machine_contents(machine: &Machine, server: &Server) -> Vec<u8> {
    let raw = machine.directory.path().join("served");
    tool("nbdcopy", &[&server.live_uri("vda"), path(&raw)]).ok();
    std::fs::read(raw).expect("what was copied")
}

#[test]
fn a_bitmap_that_does_not_record_is_not_believed_to_have_what_changed() {
    let server = Server::with_disk(SIZE);
    let mut guest = Guest::new(&server, "vda");
    let folder = Folder::new();
    folder.pull(&server, &[]).result(0);
    server
        .cli(&["bitmap", "add", "vda", "mine", "--disabled"])
        .ok();
    guest.write(5 * CHUNK, &[5; 512]);
    let pulled = folder.pull(&server, &["--bitmap", "mine"]);
    // The checkpoint of the point before has it.
    let disk = pulled.disk(0, "vda");
    assert_eq!(disk["mode"], "incremental", "{disk}");
    assert!(!disk["since_uuid"].is_null(), "{disk}");
    folder.holds(2, "vda", &guest.disk, "by the checkpoint");
}
