//! A server that is killed at one system call after the other while a command changes bitmaps of two
//! disks: both are as they were, or both as they were to be, and nothing is lost either way.

use serde_json::{Value, json};
use stillpoint_tests::bitmap::{action, bitmaps, map_now};
use stillpoint_tests::killer::Killer;
use stillpoint_tests::{CHUNK, Extent, MIB, Server};

const SIZE: u64 = MIB;

/// What can be seen of the bitmaps of both disks.
#[derive(Clone, Debug, Eq, PartialEq)]
struct Seen {
    lists: [Vec<Value>; 2],
    maps: Vec<Vec<Extent>>,
}

fn look(server: &Server) -> Seen {
    let lists = ["vda", "vdb"].map(|disk| bitmaps(&mut server.qmp(), disk));
    let mut maps = Vec::new();
    for (disk, list) in ["vda", "vdb"].into_iter().zip(&lists) {
        for bitmap in list {
            assert_eq!(bitmap["inconsistent"], Value::Null, "{lists:?}");
            maps.push(map_now(server, disk, bitmap["name"].as_str().unwrap()));
        }
    }
    Seen { lists, maps }
}

/// Adds to, removes, ends and empties bitmaps of both disks.
fn actions() -> Value {
    let on = |disk: &str, name: &str| json!({"node": disk, "name": name});
    let merge = json!({"node": "vdb", "target": "sum", "bitmaps": [on("vda", "a"), "b"]});
    let new = json!({"node": "vda", "name": "new", "persistent": true});
    json!({"actions": [
        action("merge", &merge),
        action("disable", &on("vda", "a")),
        action("clear", &on("vdb", "b")),
        action("add", &new),
        action("remove", &on("vda", "old")),
    ]})
}

/// A server that is where the command begins.
fn prepared() -> Server {
    let server = Server::builder()
        .disk("vda", SIZE)
        .disk("vdb", SIZE)
        .start();
    let mut qmp = server.qmp();
    for (disk, name, disabled) in [
        ("vda", "a", false),
        ("vda", "old", false),
        ("vdb", "b", false),
        ("vdb", "sum", true),
    ] {
        let arguments =
            json!({"node": disk, "name": name, "persistent": true, "disabled": disabled});
        qmp.execute("block-dirty-bitmap-add", &arguments);
    }
    for (disk, chunk) in [("vda", 1), ("vdb", 2), ("vdb", 5)] {
        let mut nbd = server.open_live(disk);
        nbd.write(chunk * CHUNK, &[1; 4096]).unwrap();
    }
    server
}

#[test]
fn a_command_on_two_disks_is_done_or_not_done_wherever_it_is_killed() {
    let expected = {
        let server = prepared();
        let before = look(&server);
        server.qmp().execute("transaction", &actions());
        [before, look(&server)]
    };
    let [mut undone, mut done] = [0, 0];
    for calls in ["fsync", "fdatasync", "pwrite64", "rename", "unlink"] {
        for n in 1.. {
            let mut server = prepared();
            let answered = {
                let mut qmp = server.qmp();
                let _killer = Killer::of(&server, calls, n);
                let command = json!({"execute": "transaction", "arguments": actions()});
                qmp.try_send(command.to_string().as_bytes()).unwrap();
                qmp.receive().is_some()
            };
            if answered {
                assert_eq!(look(&server), expected[1], "{calls} {n}, alive");
                server.kill();
            } else {
                server.wait();
            }
            server.start();
            let found = look(&server);
            let at = expected.iter().position(|expected| *expected == found);
            match at {
                Some(1) => done += 1,
                Some(_) if !answered => undone += 1,
                _ => panic!("{calls} {n}, answered {answered}: {found:#?}"),
            }
            // A second start finds the same: what was undecided is decided for good.
            server.kill();
            server.start();
            assert_eq!(look(&server), found, "{calls} {n}, at the second start");
            if answered {
                break;
            }
        }
    }
    assert!(undone >= 5 && done >= 5, "{undone} undone, {done} done");
}
