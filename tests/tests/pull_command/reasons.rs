//! Whether a disk comes as a full or as an incremental, and what is said about it.

use serde_json::json;
use stillpoint_tests::{CHUNK, Guest, MIB, Server};

use crate::folder::Folder;
use crate::push::push;

const SIZE: u64 = 16 * MIB;

#[track_caller]
fn is_full(pulled: &crate::folder::Pulled, code: i32, disk: &str, why: &str) {
    let disk = pulled.disk(code, disk);
    assert_eq!(
        (&disk["mode"], &disk["parent"]),
        (&json!("full"), &json!(null)),
        "{disk}"
    );
    assert!(
        disk["reason"]
            .as_str()
            .is_some_and(|reason| reason.contains(why)),
        "{disk}"
    );
}

#[test]
fn the_first_is_full_and_the_next_has_what_changed_and_no_zeroes() {
    let server = Server::with_disk(SIZE);
    let mut guest = Guest::new(&server, "vda");
    guest.write(0, &vec![1; 8 * CHUNK as usize]);
    let folder = Folder::new();
    let first = folder.pull(&server, &[]);
    is_full(&first, 0, "vda", "nothing of it");
    // What is a hole is not asked for.
    assert_eq!(first.disk(0, "vda")["copied_bytes"], 8 * CHUNK);

    guest.write(CHUNK, &[2; 512]);
    guest.zeroes(4 * CHUNK, 2 * CHUNK, 0);
    guest.write(20 * CHUNK, &[3; 512]);
    let second = folder.pull(&server, &[]);
    let disk = second.disk(0, "vda");
    assert_eq!(
        (&disk["mode"], &disk["parent"]),
        (&json!("incremental"), &json!(1))
    );
    assert_eq!(disk["reason"], json!(null));
    assert_eq!(
        (&disk["copied_bytes"], &disk["zero_bytes"]),
        (&json!(2 * CHUNK), &json!(2 * CHUNK))
    );
    assert_eq!(second.result(0)["committed"], true);
    folder.holds(2, "vda", &guest.disk, "an incremental with zeroes");

    let third = folder.pull(&server, &[]);
    assert_eq!(third.disk(0, "vda")["copied_bytes"], 0);
    folder.holds(3, "vda", &guest.disk, "nothing has changed");
}

#[test]
fn the_server_counts_what_is_read_and_that_is_what_was_dirty() {
    let server = Server::with_disk(SIZE);
    let mut guest = Guest::new(&server, "vda");
    guest.write(0, &vec![1; 4 * MIB as usize]);
    let folder = Folder::new();
    folder.pull(&server, &[]).result(0);
    guest.write(CHUNK, &[2; 512]);
    guest.write(60 * CHUNK, &[2; 512]);
    guest.zeroes(2 * MIB, MIB, 0);

    // Killed before it publishes, its backup can still be asked.
    folder.pull_up_to_publishing(&server);
    let list = server.cli_json(&["backup", "list"]);
    let disk = &list[0]["disks"][0];
    assert_eq!(disk["changed_bytes"], 2 * CHUNK + MIB, "{disk}");
    let read: u64 = disk["exports"]
        .as_array()
        .expect("exports")
        .iter()
        .map(|export| export["bytes_read"].as_u64().expect("a number"))
        .sum();
    assert_eq!(read, 2 * CHUNK, "{disk}");
}

#[test]
fn a_checkpoint_that_is_gone_makes_a_full_with_the_reason() {
    let server = Server::with_disk(SIZE);
    let mut guest = Guest::new(&server, "vda");
    guest.write(0, &[1; 4096]);
    let folder = Folder::new();
    let first = folder.pull(&server, &[]);
    let checkpoint = first.result(0)["checkpoint"]
        .as_str()
        .expect("a name")
        .to_owned();
    server
        .cli(&["checkpoint", "delete", &checkpoint, "--force"])
        .ok();
    // Another one of its name is another one.
    server.checkpoint(&checkpoint);
    guest.write(CHUNK, &[2; 4096]);
    let second = folder.pull(&server, &[]);
    is_full(&second, 3, "vda", "no longer has the checkpoint of point 1");
    folder.holds(2, "vda", &guest.disk, "a full after all");
}

#[test]
fn a_consumer_that_moved_on_elsewhere_makes_a_full_not_a_wrong_incremental() {
    let server = Server::with_disk(SIZE);
    let mut guest = Guest::new(&server, "vda");
    let (folder, other) = (Folder::new(), Folder::new());
    guest.write(0, &[1; 4096]);
    let mine = ["--consumer", "nightly"];
    folder.pull(&server, &mine).result(0);
    guest.write(CHUNK, &[2; 4096]);
    // The change before this is in the other folder alone.
    other.pull(&server, &mine).result(0);
    guest.write(2 * CHUNK, &[3; 4096]);
    let third = folder.pull(&server, &mine);
    is_full(&third, 3, "vda", "no longer has the checkpoint of point 1");
    folder.holds(2, "vda", &guest.disk, "a full after all");
}

#[test]
fn what_the_consumer_has_elsewhere_is_no_base_here() {
    let server = Server::builder()
        .disk("vda", SIZE)
        .disk("vdb", SIZE)
        .start();
    let mut guest = Guest::new(&server, "vda");
    let (folder, other) = (Folder::new(), Folder::new());
    let pull = |folder: &Folder, disk: &str| {
        let pulled = folder.pull(&server, &[disk, "--consumer", "nightly"]);
        pulled.result(0)["checkpoint_uuid"]
            .as_str()
            .expect("a uuid")
            .to_owned()
    };
    let first = pull(&folder, "vda");
    pull(&folder, "vdb");
    // Something still needs the checkpoint that is left.
    server.begin("keeper", &["--disk", "vda", "--since", &first]);
    guest.write(0, &[1; 4096]);
    pull(&other, "vda");
    guest.write(CHUNK, &[2; 4096]);

    // Asked for what is since the last of each disk, the server answers with the other folder's.
    let both = folder.pull(&server, &["--consumer", "nightly"]);
    is_full(&both, 3, "vda", "no point here is of checkpoint");
    assert_eq!(both.disk(3, "vdb")["mode"], "incremental");
    folder.holds(3, "vda", &guest.disk, "a full after all");
}

#[test]
fn two_folders_have_chains_of_their_own() {
    let server = Server::with_disk(SIZE);
    let mut guest = Guest::new(&server, "vda");
    let folders = [Folder::new(), Folder::new()];
    for round in 0..3_u8 {
        for (number, folder) in folders.iter().enumerate() {
            guest.write(
                CHUNK * (u64::from(round) + 4 * number as u64),
                &[round + 1; 4096],
            );
            let pulled = folder.pull(&server, &[]);
            let point = pulled.result(0)["point"].as_u64().expect("a number");
            folder.holds(point, "vda", &guest.disk, "one of two chains");
            let mode = pulled.disk(0, "vda")["mode"].clone();
            assert_eq!(mode, if round == 0 { "full" } else { "incremental" });
        }
    }
}

#[test]
fn a_disk_that_is_new_comes_full_beside_others_that_do_not() {
    let mut server = Server::builder()
        .disk("vda", SIZE)
        .disk("vdb", SIZE)
        .start();
    let folder = Folder::new();
    folder.pull(&server, &["vda"]).result(0);
    let mut guests = ["vda", "vdb"].map(|name| Guest::new(&server, name));
    guests[0].write(0, &[1; 512]);
    guests[1].write(0, &[2; 512]);
    let both = folder.pull(&server, &[]);
    assert_eq!(both.disk(0, "vda")["mode"], "incremental");
    is_full(&both, 0, "vdb", "nothing of it");
    guests[1].write(CHUNK, &[3; 512]);
    folder.pull(&server, &["vdb"]).result(0);

    // The two now have different last checkpoints, and a restart changes nothing about that.
    server.stop();
    server.start();
    let names = ["vda", "vdb"];
    guests
        .iter_mut()
        .zip(names)
        .for_each(|(guest, name)| guest.reconnect(&server, name));
    guests[0].write(2 * CHUNK, &[4; 512]);
    let all = folder.pull(&server, &[]);
    assert_eq!(
        (&all.disk(0, "vda")["parent"], &all.disk(0, "vdb")["parent"]),
        (&json!(2), &json!(3))
    );
    folder.holds(4, "vda", &guests[0].disk, "both again");
    folder.holds(4, "vdb", &guests[1].disk, "both again");
}

#[test]
fn a_full_that_was_asked_for_surprises_nobody() {
    let server = Server::with_disk(SIZE);
    let mut guest = Guest::new(&server, "vda");
    let folder = Folder::new();
    folder.pull(&server, &[]).result(0);
    guest.write(0, &[1; 512]);
    is_full(
        &folder.pull(&server, &["--full"]),
        0,
        "vda",
        "was asked for",
    );
    guest.write(CHUNK, &[2; 512]);
    let third = folder.pull(&server, &[]);
    assert_eq!(third.disk(0, "vda")["parent"], 2);
    folder.holds(3, "vda", &guest.disk, "on top of a full in between");
}

#[test]
fn an_image_changed_by_others_makes_a_full_with_the_servers_reason() {
    let mut server = Server::with_disk(SIZE);
    let folder = Folder::new();
    folder.pull(&server, &[]).result(0);
    server.stop();
    let image = server.image("vda");
    let file = std::fs::File::options()
        .write(true)
        .open(image)
        .expect("the image");
    std::os::unix::fs::FileExt::write_all_at(&file, &[7; 512], 5 * CHUNK).expect("a write");
    drop(file);
    server.start();
    let second = folder.pull(&server, &[]);
    is_full(&second, 3, "vda", "");
    assert_eq!(folder.restored(2, "vda")[5 * CHUNK as usize], 7);
}

#[test]
fn a_disk_that_grew_goes_on_incrementally() {
    let server = Server::with_disk(SIZE);
    let mut guest = Guest::new(&server, "vda");
    guest.write(SIZE - 512, &[1; 512]);
    let folder = Folder::new();
    folder.pull(&server, &[]).result(0);
    server.cli(&["disk", "resize", "vda", "+1M"]).ok();
    let mut grown = Guest::new(&server, "vda");
    grown.disk[..SIZE as usize].copy_from_slice(&guest.disk);
    grown.write(SIZE + 4096, &[2; 512]);
    let second = folder.pull(&server, &[]);
    assert_eq!(second.disk(0, "vda")["mode"], "incremental");
    folder.holds(2, "vda", &grown.disk, "larger than its base");
}

#[test]
fn a_dry_run_says_what_would_be_done_and_does_nothing() {
    let server = Server::with_disk(SIZE);
    let mut guest = Guest::new(&server, "vda");
    let folder = Folder::new();
    folder.pull(&server, &["--dry-run"]).result(0);
    assert!(!folder.path().exists(), "a folder was made");
    folder.pull(&server, &[]).result(0);
    guest.write(0, &[1; 512]);
    let checkpoints = server.cli_json(&["checkpoint", "list"]);
    let dry = folder.pull(&server, &["--dry-run"]);
    let plan = &dry.lines[0]["disks"][0];
    assert_eq!(
        (&plan["mode"], &plan["changed_bytes"]),
        (&json!("incremental"), &json!(CHUNK))
    );
    assert_eq!(folder.points(), [1]);
    assert_eq!(
        checkpoints,
        server.cli_json(&["checkpoint", "list"]),
        "no instant was taken"
    );
}

#[test]
fn a_dry_run_of_a_push_says_what_one_of_a_pull_says_and_does_nothing() {
    let server = Server::builder().disk("vda", MIB).disk("vdb", MIB).start();
    let mut guest = Guest::new(&server, "vda");
    let folder = Folder::new();
    for args in [&[][..], &["vda"], &[], &["--full"]] {
        let dry = push(&server, &folder, &[args, &["--dry-run"]].concat());
        let same = folder.pull(&server, &[args, &["--dry-run"]].concat());
        assert_eq!(dry.lines, same.lines, "{args:?}");
        let points = folder.path().exists().then(|| folder.points());
        let published = push(&server, &folder, args);
        let planned = dry.lines[0]["disks"].as_array().expect("disks");
        for disk in planned {
            let name = disk["disk"].as_str().expect("a name");
            let made = published.disk(published.output.code(), name);
            for key in ["mode", "reason", "since_uuid", "parent"] {
                assert_eq!(disk[key], made[key], "{args:?}: {key} of {name}");
            }
        }
        let number = published.result(dry.output.code())["point"].as_u64();
        assert_eq!(number, Some(points.unwrap_or_default().len() as u64 + 1));
        guest.write(0, &[1; 512]);
    }
    assert!(server.cli_json(&["backup", "list"]) == json!([]));

    let other = Server::builder().disk("vda", MIB).start();
    let refused = push(&other, &folder, &["--dry-run"]);
    assert_eq!(refused.error(1).0, "other-disk");
    let stranger = Folder::at(&server.path("images"));
    push(&server, &stranger, &["vdz", "--dry-run"]).error(1);
}

#[test]
fn people_see_a_table_before_and_a_summary_after_and_nothing_with_quiet() {
    let server = Server::with_disk(SIZE);
    let mut guest = Guest::new(&server, "vda");
    guest.write(0, &[1; 512]);
    let folder = Folder::new();
    let to = stillpoint_tests::tools::path(folder.path());
    let first = server.cli(&["pull", "vda", "--to", to]);
    let said = first.ok();
    for word in [
        "DISK",
        "TO COPY",
        "full",
        "nothing of it",
        "point 1",
        "verified",
        "next pull",
    ] {
        assert!(said.contains(word), "no {word:?}\n{first}");
    }
    assert_eq!(server.cli(&["pull", "--to", to, "--quiet"]).ok(), "");
}
