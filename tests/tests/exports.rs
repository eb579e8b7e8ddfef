//! Which exports and contexts each socket has, and what they are.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;

use stillpoint_tests::raw_nbd::{can, errno, rep};
use stillpoint_tests::{CHUNK, MIB, RawNbd, Server};

const SIZE: u64 = 4 * MIB;

fn server() -> Server {
    Server::with_disk(SIZE)
}

/// A server with some data on `vda`, a checkpoint `cp1`, a change since, and a backup `b1`.
fn server_with_backup() -> Server {
    let server = server();
    let mut nbd = server.open_live("vda");
    nbd.write(0, &vec![1; MIB as usize]).unwrap();
    server.checkpoint("cp1");
    nbd.write(3 * CHUNK, &[2; 4096]).unwrap();
    server.begin("b1", &["--since", "cp1"]);
    server
}

/// The connection is still in step: it answers, and answers right.
#[track_caller]
fn in_step(nbd: &mut RawNbd) {
    assert_eq!(
        nbd.read(SIZE - 512, 512),
        Ok(vec![0; 512]),
        "the connection is out of step"
    );
}

#[test]
fn the_backup_socket_never_reaches_a_live_disk() {
    let server = server();
    let mut nbd = RawNbd::connect(&server.frozen());
    assert_eq!(nbd.list().unwrap(), []);
    for name in ["vda", "", "vda@", "@", "vda@live", "vda@b1"] {
        assert_eq!(nbd.go(name), Err(rep::ERR_UNKNOWN), "{name:?}");
    }
}

#[test]
fn the_live_socket_never_reaches_a_backup() {
    let server = server_with_backup();
    let mut nbd = RawNbd::connect(&server.live());
    assert_eq!(nbd.list().unwrap().len(), 1);
    assert_eq!(nbd.go("vda@b1"), Err(rep::ERR_UNKNOWN));
    assert_eq!(nbd.go("vda@cp1..b1"), Err(rep::ERR_UNKNOWN));
}

#[test]
fn the_live_socket_lists_the_disks() {
    let server = Server::builder().disk("vda", MIB).disk("vdb", MIB).start();
    let mut nbd = RawNbd::connect(&server.live());
    let names: Vec<_> = nbd
        .list()
        .unwrap()
        .into_iter()
        .map(|(name, _)| name)
        .collect();
    assert_eq!(names, ["vda", "vdb"]);
}

#[test]
fn everything_that_the_backup_socket_lists_can_be_opened_and_is_read_only() {
    let server = server_with_backup();
    let list = RawNbd::connect(&server.frozen()).list().unwrap();
    let names: Vec<_> = list.iter().map(|(name, _)| name.as_str()).collect();
    assert!(names.contains(&"vda@b1"), "{names:?}");
    assert!(
        !names.contains(&"vda@cp1..b1"),
        "a difference is never listed: {names:?}"
    );
    for name in names {
        let nbd = server.open_frozen(name, &[]);
        assert_eq!(
            nbd.export().flags & can::READ_ONLY,
            can::READ_ONLY,
            "{name}"
        );
    }
}

#[test]
fn a_difference_says_that_it_needs_its_base() {
    let server = server_with_backup();
    let mut nbd = RawNbd::connect(&server.frozen());
    let info = nbd.info("vda@cp1..b1").unwrap();
    assert_eq!(
        info.description.as_deref(),
        Some("difference since cp1: needs its base")
    );
    nbd.structured_replies();
    let contexts = nbd
        .list_contexts("vda@cp1..b1", &["qemu:dirty-bitmap:"])
        .unwrap();
    assert_eq!(contexts, ["qemu:dirty-bitmap:cp1"]);
    assert_eq!(nbd.go("vda@cp9..b1"), Err(rep::ERR_UNKNOWN));
    assert_eq!(nbd.go("vda@cp1..b9"), Err(rep::ERR_UNKNOWN));
}

#[test]
fn the_plain_name_belongs_to_the_backup_that_was_alone_until_that_one_ends() {
    let server = server();
    let mut guest = server.open_live("vda");
    let plain = || {
        let mut names = ["vda", ""].into_iter();
        let open = |name| RawNbd::try_open(&server.frozen(), name, &[]);
        let first = open(names.next().unwrap()).map(|mut nbd| nbd.read(0, 1).unwrap()[0]);
        let empty = open(names.next().unwrap()).map(|mut nbd| nbd.read(0, 1).unwrap()[0]);
        assert_eq!(first, empty, "the empty name is the same");
        first
    };
    guest.write(0, &[1]).unwrap();
    server.begin("b1", &[]);
    assert_eq!(plain(), Ok(1));
    guest.write(0, &[2]).unwrap();
    server.begin("b2", &[]);
    assert_eq!(plain(), Ok(1), "a second backup does not take it away");
    server.abort("b1");
    assert_eq!(
        plain(),
        Err(rep::ERR_UNKNOWN),
        "a second backup does not inherit it"
    );
    guest.write(0, &[3]).unwrap();
    server.begin("b3", &[]);
    assert_eq!(
        plain(),
        Err(rep::ERR_UNKNOWN),
        "another one was open when it was begun"
    );
    server.commit("b2");
    server.abort("b3");
    server.begin("b4", &[]);
    assert_eq!(plain(), Ok(3));
    server.commit("b4");
    assert_eq!(plain(), Err(rep::ERR_UNKNOWN));
}

#[test]
fn the_empty_name_is_no_backup_where_there_are_two_disks() {
    let server = Server::builder().disk("vda", MIB).disk("vdb", MIB).start();
    server.begin("b1", &[]);
    let mut nbd = RawNbd::connect(&server.frozen());
    assert_eq!(nbd.info(""), Err(rep::ERR_UNKNOWN));
    assert_eq!(nbd.info("vda@"), Err(rep::ERR_UNKNOWN));
    for disk in ["vda", "vdb"] {
        assert_eq!(nbd.info(disk).unwrap().size, MIB, "{disk}");
    }
}

#[test]
fn a_read_only_disk_is_read_only_when_it_is_live_too() {
    let builder = Server::builder();
    let image = builder.path("vda.raw");
    fs::write(&image, vec![7; MIB as usize]).unwrap();
    let disk = format!("vda={},read-only", image.display());
    let server = builder.disk_as(&disk).start();
    let mut nbd = server.open_live("vda");
    assert_eq!(nbd.export().flags & can::READ_ONLY, can::READ_ONLY);
    assert_eq!(nbd.write(0, &[1]), Err(errno::EPERM));
    assert_eq!(nbd.read(0, 1), Ok(vec![7]));
    server.begin("b1", &[]);
    let frozen = server.open_frozen("vda@b1", &[]).read(MIB - 1, 1);
    assert_eq!(frozen, Ok(vec![7]));
}

#[test]
fn the_sockets_are_for_their_owner_alone() {
    let server = server();
    let mode = |path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
    for socket in [server.live(), server.frozen(), server.control()] {
        assert_eq!(mode(socket.clone()), 0o600, "{}", socket.display());
    }
    assert_eq!(mode(server.path("run")), 0o755);
}

#[test]
fn libvirts_default_name_of_the_bitmap_is_understood_and_not_listed() {
    let server = server_with_backup();
    let name = "qemu:dirty-bitmap:backup-vda";
    let mut nbd = server.open_frozen("vda@b1", &[name, "qemu:dirty-bitmap:cp1"]);
    assert_eq!(nbd.map(name), nbd.map("qemu:dirty-bitmap:cp1"));
}

#[test]
fn without_a_base_the_16_newest_bitmaps_are_listed_and_any_may_be_selected() {
    let server = server();
    let name = |number: u32| format!("cp{number:02}");
    let context = |number: u32| format!("qemu:dirty-bitmap:{}", name(number));
    (1..=20).for_each(|number| server.checkpoint(&name(number)));
    let begun = server.begin("b1", &[]);
    let mut expected = vec![
        "base:allocation".to_owned(),
        "qemu:allocation-depth".to_owned(),
    ];
    expected.extend((5..=20).rev().map(context));
    assert_eq!(begun["disks"][0]["contexts"], serde_json::json!(expected));
    // One that is made later says nothing of this instant.
    server.checkpoint(&name(21));

    let mut nbd = RawNbd::connect(&server.frozen());
    nbd.structured_replies();
    assert_eq!(nbd.list_contexts("vda@b1", &[]).unwrap(), expected);
    for number in [1, 4, 20] {
        let context = context(number);
        let chosen = nbd.set_contexts("vda@b1", &[&context]).unwrap();
        assert_eq!(chosen, [context]);
    }
    for refused in [&context(21), "qemu:dirty-bitmap:backup-vda"] {
        assert_eq!(nbd.set_contexts("vda@b1", &[refused]).unwrap(), [""; 0]);
    }

    // Each can be seen as a difference, with a bitmap of its own alone.
    for number in [1, 20] {
        let export = format!("vda@{}..b1", name(number));
        let listed = nbd.list_contexts(&export, &["qemu:"]).unwrap();
        assert_eq!(
            listed,
            ["qemu:allocation-depth".to_owned(), context(number)]
        );
        let other = nbd.set_contexts(&export, &[&context(2)]).unwrap();
        assert_eq!(other, [""; 0], "{export}");
    }
    assert_eq!(nbd.info("vda@cp21..b1"), Err(rep::ERR_UNKNOWN));
}

#[test]
fn with_a_base_its_bitmap_is_listed_and_any_other_may_be_selected() {
    let server = server();
    let mut guest = server.open_live("vda");
    for name in ["cp1", "cp2", "cp3"] {
        server.checkpoint(name);
        guest
            .write(u64::from(name.as_bytes()[2] - b'0') * CHUNK, &[1])
            .unwrap();
    }
    server.begin("b1", &["--since", "cp2"]);
    let bitmap = |name: &str| format!("qemu:dirty-bitmap:{name}");
    let mut nbd = RawNbd::connect(&server.frozen());
    nbd.structured_replies();
    let listed = nbd
        .list_contexts("vda@b1", &["qemu:dirty-bitmap:"])
        .unwrap();
    assert_eq!(listed, [bitmap("cp2")]);
    for (name, first) in [("cp1", 1), ("cp2", 2), ("cp3", 3)] {
        let map = server
            .open_frozen("vda@b1", &[&bitmap(name)])
            .map(&bitmap(name));
        let dirty = (first * CHUNK, (4 - first) * CHUNK, 1);
        assert_eq!(map[..2], [(0, first * CHUNK, 0), dirty], "{name}");
    }
    nbd.go("vda@cp2..b1").unwrap();
    let mut nbd = RawNbd::connect(&server.frozen());
    for export in ["vda@cp1..b1", "vda@cp3..b1", "vda@backup-vda..b1"] {
        assert_eq!(nbd.info(export), Err(rep::ERR_UNKNOWN), "{export}");
    }
}

#[test]
fn cache_is_done_and_counts_as_no_read() {
    let server = server_with_backup();
    let mut live = server.open_live("vda");
    assert_eq!(live.cache(0, SIZE as u32), Ok(()));
    let mut frozen = server.open_frozen("vda@b1", &[]);
    assert_eq!(frozen.cache(1, SIZE as u32 - 1), Ok(()));
    assert_eq!(server.bytes_read("b1", "vda", "vda@b1"), 0);
    in_step(&mut live);
    in_step(&mut frozen);
    assert_eq!(server.bytes_read("b1", "vda", "vda@b1"), 512);
}

#[test]
fn a_frozen_export_is_read_only_and_stays_in_step() {
    let server = server_with_backup();
    for export in ["vda@b1", "vda", "", "vda@cp1..b1"] {
        let mut nbd = server.open_frozen(export, &[]);
        assert_eq!(
            nbd.export().flags & can::READ_ONLY,
            can::READ_ONLY,
            "{export}"
        );
        assert_eq!(nbd.write(0, &[9; 5000]), Err(errno::EPERM), "{export}");
        in_step(&mut nbd);
        assert_eq!(nbd.trim(0, 4096), Err(errno::EPERM), "{export}");
        assert_eq!(nbd.zeroes(0, 4096, 0), Err(errno::EPERM), "{export}");
        assert_eq!(nbd.read(0, 1), Ok(vec![1]), "{export}");
        in_step(&mut nbd);
    }
}
