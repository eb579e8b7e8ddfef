//! What is refused is told why, and leaves nothing.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};

use serde_json::json;
use stillpoint_tests::state::{Begun, begin_since, copy_directory};
use stillpoint_tests::tools::{path, sparse_file, tool};
use stillpoint_tests::{CHUNK, Guest, Mount, Output, Server};

use super::{SIZE, add, builder, changed, disks, listed, map_of, remove, spec};

/// How many descriptors the server has.
fn descriptors(server: &Server) -> usize {
    let folder = format!("/proc/{}/fd", server.pid());
    fs::read_dir(folder).expect("a live process").count()
}

/// Sees that this disk is refused, with these words, and that nothing of it is left.
#[track_caller]
fn refused(server: &Server, disk: &str, saying: &str) -> Output {
    let before = descriptors(server);
    let known = (disks(server), listed(server));
    let output = server.cli(&["disk", "add", disk]);
    output.refused(saying);
    assert_eq!((disks(server), listed(server)), known, "{output}");
    // Connections that have gone may take a moment to be noticed.
    let begun = std::time::Instant::now();
    while descriptors(server) > before {
        assert!(
            begun.elapsed().as_secs() < 20,
            "descriptors are left: {output}"
        );
        std::thread::yield_now();
    }
    output
}

#[test]
fn a_name_or_an_image_that_is_there_already_is_refused() {
    let server = builder().start();
    let other = spec(&server, "vdb").replace("vdb=", "vda=");
    let told = refused(&server, &other, "disk 'vda' is served already");
    assert!(told.stderr.contains("another name"), "{told}");
    let link = server.path("link");
    symlink(server.image("vda"), &link).unwrap();
    fs::hard_link(server.image("vda"), server.path("same")).unwrap();
    for image in [server.image("vda"), link, server.path("same")] {
        let disk = format!("vdx={}", path(&image));
        refused(&server, &disk, "it is disk 'vda' already");
    }
    assert!(!server.path("same.stillpoint").exists());
    let code = server
        .qmp()
        .try_execute("disk-add", &json!({"disk": "a/b", "path": "/a"}));
    assert!(code.unwrap_err().contains("A-Z"));
    refused(&server, "a/b=/a", "A-Z").exits(2);
    refused(&server, "latest=/a", "reserved").exits(2);
    refused(&server, "vdb=/a,size=1", "the keys are").exits(2);
    refused(&server, "vdb", "NAME=PATH").exits(2);
    server
        .cli(&["disk", "remove", "vdx"])
        .refused("there is no disk 'vdx'");

    server.checkpoint("backup-vdb");
    refused(&server, &spec(&server, "vdb"), "checkpoint 'backup-vdb'").exits(1);
    server.cli(&["checkpoint", "delete", "backup-vdb"]).ok();
    add(&server, "vdb");
    let create = server.cli(&["checkpoint", "create", "backup-vdb"]);
    create.refused("the name that a disk's backup bitmap goes by");
}

/// Copies a disk together with its state, and says where that of the copy is.
fn copy_with_state(image: &Path, copy: &Path) -> PathBuf {
    let state = |image: &Path| PathBuf::from(format!("{}.stillpoint", path(image)));
    tool("cp", &["-a", path(image), path(copy)]).ok();
    copy_directory(&state(image), &state(copy));
    state(copy)
}

#[test]
fn a_copy_of_a_disk_that_is_served_is_refused_and_breaks_nothing() {
    let server = builder().start();
    server.begin("b1", &[]);
    let copy = server.path("copy.raw");
    let state = copy_with_state(&server.image("vda"), &copy);
    let before = server.path("before");
    copy_directory(&state, &before);
    let disk = format!("vdx={}", path(&copy));
    let told = refused(&server, &disk, "is the same as disk 'vda''s");
    assert!(told.stderr.contains("remove the folder"), "{told}");
    assert_eq!(server.backup("b1")["state"], "open");
    tool("diff", &["-r", path(&before), path(&state)]).ok();
    fs::remove_dir_all(state).unwrap();
    server.cli(&["disk", "add", &disk]).ok();
}

#[test]
fn disks_that_are_copies_of_each_other_are_refused_by_a_start_that_changes_nothing() {
    let mut server = builder().start();
    server.checkpoint("cp1");
    Guest::new(&server, "vda").write(3 * CHUNK, &[1; 512]);
    server.stop();
    let (image, copy) = (server.image("vda"), server.path("copy.raw"));
    let state = copy_with_state(&image, &copy);
    let disks = [("vda", &image), ("vdx", &copy)]
        .map(|(name, image)| (name, format!("{name}={}", path(image))));
    let builder = |[first, second]: [usize; 2]| {
        let run = server.path("own-run-dir");
        let builder = Server::builder().run_directory(&run);
        builder.disk_as(&disks[first].1).disk_as(&disks[second].1)
    };
    let is_refused = || {
        let before = ["vda.raw", "copy.raw"].map(|image| {
            let [now, before] = ["stillpoint", "before"].map(|end| format!("{image}.{end}"));
            let [now, before] = [now, before].map(|name| server.path(&name));
            copy_directory(&now, &before);
            [before, now]
        });
        for order in [[0, 1], [1, 0]] {
            let told = builder(order).start_and_fail();
            let saying = format!("is the same as disk '{}''s", disks[order[0]].0);
            assert!(told.error(1).contains(&saying), "{told}");
            assert!(told.stderr.contains("remove the folder"), "{told}");
        }
        for [before, now] in before {
            tool("diff", &["-r", path(&before), path(&now)]).ok();
            fs::remove_dir_all(before).unwrap();
        }
    };
    is_refused();
    // Also where it has come from elsewhere, and is not at its place yet.
    fs::create_dir(state.join("arrived")).unwrap();
    for file in ["eras", "pages", "journal", "lease", "header"] {
        fs::rename(state.join(file), state.join("arrived").join(file)).unwrap();
    }
    is_refused();

    fs::remove_dir_all(state).unwrap();
    let both = builder([1, 0]).start();
    assert_eq!(changed(&both, "i1", "vda", "cp1"), map_of(&[3]));
    let begun = begin_since(&both, "i2", "vdx", "cp1");
    assert!(matches!(begun, Begun::Full { .. }));
}

#[test]
fn an_image_that_serve_would_refuse_is_refused_in_the_same_words() {
    let server = builder().start();
    let there = |name: &str| path(&server.path(name)).to_owned();
    fs::create_dir(there("folder")).unwrap();
    sparse_file(Path::new(&there("empty")), 0);
    sparse_file(Path::new(&there("odd")), 1000);
    tool("qemu-img", &["create", "-f", "qcow2", &there("q"), "1M"]).ok();
    tool("mkfifo", &[&there("pipe")]).ok();
    for (image, saying) in [
        ("missing", "cannot open"),
        ("folder", "is a directory"),
        ("pipe", "neither a file nor a block device"),
        ("empty", "size zero"),
        ("odd", "no multiple of 512"),
        ("q", "looks like a qcow2 image"),
        ("q,format=qcow2", "never written"),
        ("vdb.raw,format=qcow2,read-only", "vdb.raw"),
        ("vdb.raw,state=/dev/shm/stillpoint-test-disks", "in memory"),
    ] {
        let disk = format!("vdb={}", there(image));
        let told = refused(&server, &disk, saying);
        // What serve says of it is the same.
        let own = server.path("own-run-dir");
        let alone = Server::builder()
            .run_directory(&own)
            .disk_as(&disk)
            .start_and_fail();
        let why = |output: &Output| {
            let line = output.stderr.lines().find(|line| line.contains("error: "));
            line.and_then(|line| line.split_once("disk 'vdb': "))
                .map(|(_, why)| why.to_owned())
        };
        assert!(
            why(&told).is_some() && why(&told) == why(&alone),
            "{told}\n{alone}"
        );
        assert!(!Path::new(&there("vdb.raw.stillpoint")).exists(), "{told}");
        assert!(
            !Path::new("/dev/shm/stillpoint-test-disks").exists(),
            "{told}"
        );
    }
    add(&server, "vdb");
}

#[test]
fn a_state_that_cannot_be_had_is_refused_and_left_as_it_is() {
    let server = builder().start();
    let foreign = server.path("foreign");
    fs::create_dir(&foreign).unwrap();
    fs::write(foreign.join("letter"), "dear").unwrap();
    let disk = format!("{},state={}", spec(&server, "vdb"), path(&foreign));
    refused(&server, &disk, "not Stillpoint's");
    assert_eq!(fs::read_to_string(foreign.join("letter")).unwrap(), "dear");
    let theirs = path(&server.path("vda.raw.stillpoint")).to_owned();
    let disk = format!("{},state={theirs}", spec(&server, "vdb"));
    refused(&server, &disk, "in use by another disk of this server");

    // A state that is there stays, with what is in it.
    add(&server, "vdb");
    server.checkpoint("cp1");
    let mut guest = Guest::new(&server, "vdb");
    guest.write(CHUNK, &[1; 512]);
    drop(guest);
    remove(&server, "vdb");
    let disk = format!("{},granularity=4k", spec(&server, "vdb"));
    refused(&server, &disk, "granularity of 65536 bytes, not 4096");
    add(&server, "vdb");
    assert_eq!(changed(&server, "i1", "vdb", "cp1"), map_of(&[1]));
}

#[test]
fn a_state_for_which_there_is_no_room_is_not_left_half_made() {
    let server = builder().start();
    let mount = Mount::ext4(16 * stillpoint_tests::MIB);
    let filler = mount.fill();
    let state = mount.path().join("state");
    let disk = format!("{},state={}", spec(&server, "vdb"), path(&state));
    let told = server.cli(&["disk", "add", &disk]);
    assert!(told.error(1).contains("No space left"), "{told}");
    assert!(!state.exists() && disks(&server) == ["vda"]);
    drop(filler);
    server.cli(&["disk", "add", &disk]).ok();
    server.begin("b1", &["--disk", "vdb"]);
    Guest::new(&server, "vdb").write(0, &[1; 512]);
    server.commit("b1");
    remove(&server, "vdb");
    // It is nobody's now, and so is the file system that had its state and its scratch.
    mount.again();
}

#[test]
fn an_image_that_another_server_has_is_refused_with_its_pid() {
    let server = builder().start();
    let mut other = Server::builder().disk_as(&spec(&server, "vdb")).start();
    let pid = format!("(pid {})", other.pid());
    refused(&server, &spec(&server, "vdb"), &pid);
    other.is_well();
    other.stop();
    add(&server, "vdb");
    assert_eq!(fs::metadata(server.image("vdb")).unwrap().len(), SIZE);
}

#[test]
fn without_a_server_there_is_nothing_to_add_to() {
    let mut server = builder().start();
    let disk = spec(&server, "vdb");
    server.stop();
    for command in [&["disk", "add", &disk][..], &["disk", "remove", "vda"]] {
        server.cli(command).refused("no server answers");
    }
}
