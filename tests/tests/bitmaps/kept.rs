//! What of dirty bitmaps is there after a stop, a kill, a power cut, and damage.

use std::fs;
use std::path::PathBuf;

use serde_json::json;
use stillpoint_tests::bitmap::{bitmap, bitmaps, change, frozen_map, map_now};
use stillpoint_tests::state::{self, pretend_power_cut};
use stillpoint_tests::{CHUNK, Guest, MIB, Server};

use crate::{SIZE, add, map, merge, refused, write};

#[test]
fn what_persists_is_there_after_a_stop_a_kill_and_a_power_cut_and_what_does_not_is_gone() {
    let mut server = Server::with_disk(SIZE);
    let mut guest = Guest::new(&server, "vda");
    let mut qmp = server.qmp();
    add(&mut qmp, "vda", "on", &json!({"persistent": true}));
    add(&mut qmp, "vda", "off", &json!({"persistent": true}));
    add(
        &mut qmp,
        "vda",
        "coarse",
        &json!({"persistent": true, "granularity": MIB}),
    );
    write(&mut guest, 1);
    change(&mut qmp, "disable", "vda", "off").unwrap();
    let (mut on, off) = (vec![1..2], [1..2]);
    for (round, chunk) in [(0, 4), (1, 6), (2, 8)] {
        add(&mut server.qmp(), "vda", "brief", &json!({}));
        let mut guest = Guest::new(&server, "vda");
        write(&mut guest, chunk);
        on.push(chunk..chunk + 1);
        let mut before = bitmaps(&mut server.qmp(), "vda");
        before.remove(0);
        match round {
            0 => server.stop(),
            1 => server.kill(),
            _ => {
                server.kill();
                pretend_power_cut(&state::directory(&server, "vda"));
            }
        }
        server.start();
        let after = bitmaps(&mut server.qmp(), "vda");
        if round < 2 {
            assert_eq!(after, before, "round {round}");
            assert_eq!(map_now(&server, "vda", "on"), map(&on), "round {round}");
        } else {
            // The region that was being written is in doubt, and the disk has one more.
            let found = map_now(&server, "vda", "on");
            assert_eq!(found, map(&[0..64]), "round {round}");
        }
        assert_eq!(map_now(&server, "vda", "off"), map(&off), "round {round}");
    }
    assert_eq!(bitmap(&mut server.qmp(), "vda", "coarse")["count"], 4 * MIB);
}

#[test]
fn a_backup_that_goes_on_after_a_kill_serves_the_bitmaps_it_served() {
    let mut server = Server::with_disk(SIZE);
    let mut guest = Guest::new(&server, "vda");
    let mut qmp = server.qmp();
    add(&mut qmp, "vda", "kept", &json!({"persistent": true}));
    add(&mut qmp, "vda", "brief", &json!({}));
    add(&mut qmp, "vda", "off", &json!({"disabled": true}));
    write(&mut guest, 1);
    merge(&mut qmp, "vda", "off", &json!(["kept"]));
    let names = ["kept", "brief", "off"];
    server.begin("b1", &["--bitmap=kept", "--bitmap=brief", "--bitmap=off"]);
    for round in 0..3 {
        let mut guest = Guest::new(&server, "vda");
        write(&mut guest, 1);
        write(&mut guest, 10 + round);
        for name in names {
            assert_eq!(
                frozen_map(&server, "vda", "b1", name),
                map(&[1..2]),
                "{name}, {round}"
            );
        }
        if round == 0 {
            server.stop();
        } else {
            server.kill();
        }
        server.start();
    }
    for name in names {
        assert_eq!(
            frozen_map(&server, "vda", "b1", name),
            map(&[1..2]),
            "{name}"
        );
    }
    let left = bitmaps(&mut server.qmp(), "vda");
    assert_eq!(left.len(), 1, "{left:?}");
    assert_eq!(
        (&left[0]["name"], &left[0]["busy"]),
        (&json!("kept"), &json!(true))
    );
    server.abort("b1");
    assert_eq!(map_now(&server, "vda", "kept"), map(&[1..2, 10..13]));

    server.begin("again", &["--bitmap=kept"]);
    server.kill();
    let file = state::directory(&server, "vda").join("backups/again/bitmap-0");
    fs::remove_file(file).unwrap();
    server.start();
    let broken = server.cli(&["backup", "show", "again"]);
    assert!(
        broken.exits(4).stdout.contains("dirty bitmap 'kept'"),
        "{broken}"
    );
    server.abort("again");
    assert_eq!(map_now(&server, "vda", "kept"), map(&[1..2, 10..13]));
}

fn files(server: &Server) -> Vec<PathBuf> {
    let entries = fs::read_dir(state::directory(server, "vda").join("bitmaps")).unwrap();
    let mut files: Vec<_> = entries.map(|entry| entry.unwrap().path()).collect();
    files.sort();
    files
}

/// The file of the only bitmap whose file is none of `others`.
fn new_file(server: &Server, others: &[PathBuf]) -> PathBuf {
    let mut files = files(server);
    files.retain(|file| !others.contains(file));
    assert_eq!(files.len(), 1, "{files:?}");
    files.remove(0)
}

#[test]
fn damaged_or_missing_bits_cost_their_own_bitmap_alone() {
    let mut server = Server::with_disk(SIZE);
    let mut guest = Guest::new(&server, "vda");
    for (damage, what) in [
        ("missing", "cannot be read"),
        ("flipped", "damaged"),
        ("cut", "damaged"),
    ] {
        let mut qmp = server.qmp();
        add(&mut qmp, "vda", "good", &json!({"persistent": true}));
        let others = files(&server);
        add(&mut qmp, "vda", "bad", &json!({"persistent": true}));
        guest.write(CHUNK, &[1; 512]);
        change(&mut qmp, "disable", "vda", "bad").unwrap();
        let file = new_file(&server, &others);
        server.kill();
        let mut bytes = fs::read(&file).unwrap();
        match damage {
            "missing" => fs::remove_file(&file).unwrap(),
            "cut" => fs::write(&file, &bytes[..bytes.len() - 1]).unwrap(),
            _ => {
                bytes[100] ^= 4;
                fs::write(&file, &bytes).unwrap();
            }
        }
        server.start();
        guest = Guest::new(&server, "vda");
        let mut qmp = server.qmp();
        assert!(
            server.stderr().contains(what),
            "{damage}: {}",
            server.stderr()
        );
        let expected = json!({"name": "bad", "count": 0, "granularity": CHUNK, "recording": false,
            "busy": false, "persistent": true, "inconsistent": true});
        assert_eq!(bitmap(&mut qmp, "vda", "bad"), expected, "{damage}");
        assert_eq!(map_now(&server, "vda", "good"), map(&[1..2]), "{damage}");
        let refusal = "Bitmap 'bad' is inconsistent and cannot be used".to_owned();
        for verb in ["clear", "enable", "disable"] {
            assert_eq!(
                change(&mut qmp, verb, "vda", "bad"),
                Err(refusal.clone()),
                "{damage}"
            );
        }
        for (target, source) in [("bad", "good"), ("good", "bad")] {
            let arguments = json!({"node": "vda", "target": target, "bitmaps": [source]});
            refused(&mut qmp, "block-dirty-bitmap-merge", &arguments, &refusal);
        }
        refused(
            &mut qmp,
            "backup-begin",
            &json!({"bitmaps": ["bad"]}),
            &refusal,
        );
        let shown = server.cli(&["bitmap", "list"]);
        assert!(shown.ok().contains("inconsistent"), "{shown}");
        change(&mut qmp, "remove", "vda", "bad").unwrap();
        change(&mut qmp, "remove", "vda", "good").unwrap();
        assert_eq!(files(&server), Vec::<PathBuf>::new(), "{damage}");
    }
}

#[test]
fn a_record_of_the_journal_that_is_lost_is_noticed_by_the_file_that_is_gone() {
    let mut server = Server::with_disk(SIZE);
    let mut guest = Guest::new(&server, "vda");
    let mut qmp = server.qmp();
    add(&mut qmp, "vda", "good", &json!({"persistent": true}));
    add(
        &mut qmp,
        "vda",
        "merged",
        &json!({"persistent": true, "disabled": true}),
    );
    write(&mut guest, 1);
    let journal = state::directory(&server, "vda").join("journal");
    let before = fs::metadata(&journal).unwrap().len();
    merge(&mut qmp, "vda", "merged", &json!(["good"]));
    server.kill();
    fs::OpenOptions::new()
        .write(true)
        .open(&journal)
        .unwrap()
        .set_len(before)
        .unwrap();
    server.start();
    let mut qmp = server.qmp();
    assert_eq!(bitmap(&mut qmp, "vda", "merged")["inconsistent"], true);
    assert_eq!(map_now(&server, "vda", "good"), map(&[1..2]));
}

#[test]
fn what_was_written_behind_the_servers_back_makes_bitmaps_inconsistent() {
    let mut server = Server::with_disk(SIZE);
    add(&mut server.qmp(), "vda", "a", &json!({"persistent": true}));
    server.stop();
    let image = fs::OpenOptions::new()
        .write(true)
        .open(server.image("vda"))
        .unwrap();
    std::os::unix::fs::FileExt::write_all_at(&image, &[1; 512], 0).unwrap();
    server.start();
    let mut qmp = server.qmp();
    assert_eq!(bitmap(&mut qmp, "vda", "a")["inconsistent"], true);
    add(&mut qmp, "vda", "b", &json!({"persistent": true}));
    assert_eq!(map_now(&server, "vda", "b"), map(&[]));
    change(&mut qmp, "remove", "vda", "a").unwrap();
    add(&mut qmp, "vda", "a", &json!({"persistent": true}));
    assert_eq!(map_now(&server, "vda", "a"), map(&[]));
}
