//! A disk moves, with its chain: here into another folder, under another name.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use rand::Rng as _;
use rand::seq::IndexedRandom as _;
use serde_json::{Value, json};
use stillpoint_tests::bitmap::bitmaps;
use stillpoint_tests::seeds::{Rng, number, rng, seeds};
use stillpoint_tests::state::{directory, pretend_power_cut};
use stillpoint_tests::tools::path;
use stillpoint_tests::{CHUNK, Extent, Guest, LoopDevice, MIB, Server};

use crate::images::{SIZE, dirty_in, is_known_to_have_changed, map_of, since};

/// The disk of a server, as `--disk` takes it.
pub(crate) fn spec(server: &Server) -> String {
    format!("vda={}", path(&server.image("vda")))
}

/// Packs the state of a server's disk into a file of its folder.
#[track_caller]
pub(crate) fn export(server: &Server) -> PathBuf {
    let file = server.path("state");
    let args = [
        "state",
        "export",
        "--force",
        "--disk",
        &spec(server),
        "--to",
        path(&file),
    ];
    server.cli(&args).ok();
    file
}

/// A stopped server with a copy of the image of another, and the state from a file.
#[track_caller]
pub(crate) fn moved(from: &Server, state: &Path) -> Server {
    let builder = Server::builder();
    let image = builder.path("vda.raw");
    fs::copy(from.image("vda"), &image).unwrap();
    let mut to = builder.disk_at("vda", &image).start();
    to.stop();
    fs::remove_dir_all(directory(&to, "vda")).unwrap();
    to.cli(&["state", "import", path(state), "--disk", &spec(&to)])
        .ok();
    to
}

/// All that can be seen of what is known of a disk.
#[derive(Debug, PartialEq)]
pub(crate) struct Known {
    checkpoints: Value,
    consumers: Value,
    bitmaps: Vec<Value>,
    maps: BTreeMap<String, Vec<Extent>>,
}

pub(crate) fn known(server: &Server) -> Known {
    let checkpoints = server.cli_json(&["checkpoint", "list"]);
    let bitmaps = bitmaps(&mut server.qmp(), "vda");
    let mut maps = BTreeMap::new();
    for checkpoint in checkpoints.as_array().unwrap() {
        let name = checkpoint["name"].as_str().unwrap();
        maps.insert(format!("cp {name}"), since(server, name));
    }
    for bitmap in &bitmaps {
        let name = bitmap["name"].as_str().unwrap();
        maps.insert(format!("bm {name}"), dirty_in(server, name));
    }
    Known {
        checkpoints,
        consumers: server.cli_json(&["consumer", "list"]),
        bitmaps,
        maps,
    }
}

/// Does something drawn to what is known.
fn do_something(server: &Server, guest: &mut Guest, rng: &mut Rng, step: usize) {
    let name = format!("n{step}");
    let some_bitmap = |rng: &mut Rng| {
        let all = bitmaps(&mut server.qmp(), "vda");
        all.choose(rng)
            .map(|bitmap| bitmap["name"].as_str().unwrap().to_owned())
    };
    match rng.random_range(0..12) {
        0..5 => guest.do_something(rng),
        5 | 6 => server.checkpoint(&name),
        7 => {
            let disabled = if rng.random_bool(0.5) {
                &["--disabled"][..]
            } else {
                &[]
            };
            server
                .cli(&[&["bitmap", "add", "vda", &name][..], disabled].concat())
                .ok();
        }
        8 => {
            if let Some(bitmap) = some_bitmap(rng) {
                let verb = *["clear", "enable", "disable", "remove"]
                    .choose(rng)
                    .unwrap();
                server.cli(&["bitmap", verb, "vda", &bitmap]).ok();
            }
        }
        9 => {
            if let [Some(to), Some(from)] = [some_bitmap(rng), some_bitmap(rng)] {
                server.cli(&["bitmap", "merge", "vda", &to, &from]).ok();
            }
        }
        10 => {
            let consumer = *["one", "two"].choose(rng).unwrap();
            server.begin(&name, &["--consumer", consumer]);
            guest.do_something(rng);
            server.commit(&name);
        }
        _ => {
            let all = server.cli_json(&["checkpoint", "list"]);
            if let Some(checkpoint) = all.as_array().unwrap().choose(rng) {
                let name = checkpoint["name"].as_str().unwrap();
                server.cli(&["checkpoint", "delete", name, "--force"]).ok();
            }
        }
    }
}

#[test]
fn whatever_happened_everything_that_is_known_moves_with_the_disk() {
    let rounds: Vec<_> = (1..=number("STILLPOINT_CARRY_HISTORIES", 8)).collect();
    for seed in seeds(&rounds) {
        let mut rng = rng(seed);
        let mut server = Server::with_disk(SIZE - 512);
        let mut guest = Guest::new(&server, "vda");
        let mut step = 0;
        for journey in 0..3 {
            for _ in 0..12 {
                step += 1;
                do_something(&server, &mut guest, &mut rng, step);
            }
            let expected = known(&server);
            let how = format!("seed {seed}, journey {journey}");
            // However its server ended, the chain is whole.
            match rng.random_range(0..2) {
                0 => server.stop(),
                _ => server.kill(),
            }
            let state = export(&server);
            let mut next = moved(&server, &state);
            next.start();
            assert_eq!(known(&next), expected, "{how}");
            guest.reconnect(&next, "vda");
            guest.do_something(&mut rng);
            // And at the old place it goes on as well.
            server.start();
            assert_eq!(known(&server), expected, "{how}, at the old place");
            server = next;
        }
    }
}

#[test]
fn a_folder_of_backups_goes_on_with_the_disk_where_it_is_now() {
    let mut server = Server::with_disk(SIZE);
    let folder = server.path("backups");
    let mut guest = Guest::new(&server, "vda");
    guest.write(CHUNK, &[1; 4096]);
    let pull = |server: &Server| {
        let output = server.cli(&["pull", "vda", "--to", path(&folder), "--json"]);
        let last = output.ok().lines().last().unwrap().to_owned();
        serde_json::from_str::<Value>(&last).unwrap()["disks"][0].clone()
    };
    assert_eq!(pull(&server)["mode"], "full");
    guest.write(2 * CHUNK, &[2; 4096]);
    server.stop();
    let state = export(&server);
    let mut next = moved(&server, &state);
    next.start();
    guest.reconnect(&next, "vda");
    guest.write(3 * CHUNK, &[3; 4096]);
    let told = pull(&next);
    assert_eq!(told["mode"], "incremental", "{told}");
    assert_eq!(told["copied_bytes"], 2 * CHUNK, "{told}");
    let restored = next.path("restored");
    next.cli(&["restore", path(&folder), "--output", path(&restored)])
        .ok();
    assert!(fs::read(&restored).unwrap() == guest.disk);
}

#[test]
fn after_a_power_cut_what_is_uncertain_moves_as_such() {
    let mut server = Server::with_disk(64 * MIB);
    server.checkpoint("cp1");
    server.open_live("vda").write(5 * CHUNK, &[1; 512]).unwrap();
    server.kill();
    pretend_power_cut(&directory(&server, "vda"));
    let state = export(&server);
    let mut next = moved(&server, &state);
    next.start();
    let [here, there] = {
        server.start();
        [&server, &next].map(|server| {
            let begun = server.begin("b1", &["--since", "cp1"]);
            [
                begun["disks"][0]["changed_bytes"].clone(),
                begun["disks"][0]["uncertain_bytes"].clone(),
            ]
        })
    };
    assert_eq!(here, there);
    assert_eq!(here[0], 4 * MIB);
}

#[test]
fn a_moved_disk_survives_kills_and_is_guarded_as_any_other() {
    let mut server = Server::with_disk(SIZE);
    server.checkpoint("cp1");
    server.open_live("vda").write(0, &[1; 512]).unwrap();
    server.stop();
    let state = export(&server);
    let mut next = moved(&server, &state);
    next.start();
    next.open_live("vda").write(9 * CHUNK, &[1; 512]).unwrap();
    next.kill();
    next.start();
    assert_eq!(since(&next, "cp1"), map_of(&[0, 9]));
    next.stop();
    crate::images::poke(&next.image("vda"), 0, &[5]);
    next.start();
    is_known_to_have_changed(&next);
}

#[test]
fn a_disk_moves_to_a_block_device_and_into_a_qcow2_image() {
    let mut server = Server::with_disk(SIZE);
    server.open_live("vda").write(CHUNK, &[7; 512]).unwrap();
    server.checkpoint("cp1");
    server.open_live("vda").write(0, &[1; 512]).unwrap();
    server.stop();
    let state = export(&server);

    let builder = Server::builder();
    let (backing, folder) = (builder.path("backing"), builder.path("state-of-device"));
    fs::copy(server.image("vda"), &backing).unwrap();
    let device = LoopDevice::new(&backing);
    let disk = format!("vda={},state={}", path(device.path()), path(&folder));
    let mut there = builder.disk_as(&disk).start();
    there.stop();
    let import = ["state", "import", path(&state), "--force", "--disk", &disk];
    there.cli(&import).ok();
    there.start();
    assert_eq!(since(&there, "cp1"), map_of(&[0]));
    there.stop();

    let builder = Server::builder();
    let image = builder.path("vm.qcow2");
    let raw = server.image("vda");
    let convert = [
        "convert",
        "-f",
        "raw",
        "-O",
        "qcow2",
        path(&raw),
        path(&image),
    ];
    stillpoint_tests::tools::tool("qemu-img", &convert).ok();
    let disk = format!("vda={},format=qcow2,read-only", path(&image));
    let mut there = builder.disk_as(&disk).start();
    there.stop();
    there
        .cli(&["state", "import", path(&state), "--force", "--disk", &disk])
        .ok();
    there.start();
    assert_eq!(since(&there, "cp1"), map_of(&[0]));
}

#[test]
fn the_command_says_what_it_has_moved() {
    let mut server = Server::with_disk(SIZE);
    server.checkpoint("cp1");
    server.cli(&["bitmap", "add", "vda", "a b"]).ok();
    server.stop();
    let file = server.path("state");
    let args = [
        "state",
        "export",
        "--disk",
        &spec(&server),
        "--to",
        path(&file),
        "--json",
    ];
    let told = server.cli(&args).json();
    let hash = blake3::hash(&fs::read(server.image("vda")).unwrap()).to_string();
    assert_eq!(told["image_blake3"], hash);
    assert_eq!(told["size"], SIZE);
    assert_eq!(
        [&told["checkpoints"], &told["bitmaps"]],
        [&json!(["cp1"]), &json!(["a b"])]
    );
    let next = moved(&server, &file);
    let import = [
        "state",
        "import",
        path(&file),
        "--force",
        "--disk",
        &spec(&next),
    ];
    let text = next.cli(&import);
    assert!(text.ok().contains("1 checkpoints, 1 bitmaps"), "{text}");
}
