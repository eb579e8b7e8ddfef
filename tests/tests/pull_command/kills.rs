//! The puller, the server, or both are killed, at a moment drawn from a seed; then it is run again.
//!
//! `STILLPOINT_PULL_KILLS` says how many kills there are.

use std::collections::BTreeMap;

use rand::Rng as _;
use serde_json::json;
use stillpoint_tests::killer::{Killer, killing};
use stillpoint_tests::process::run;
use stillpoint_tests::seeds::{Rng, number, rng, seeds};
use stillpoint_tests::{Guest, MIB, Server};

use crate::folder::Folder;

/// What a puller does to files, to servers and to its own threads.
const CALLS_OF_A_PULLER: &str = "pwrite64,write,writev,sendto,sendmsg,recvfrom,fsync,fdatasync,\
                                 rename,renameat,renameat2,mkdir,mkdirat,openat,unlink,unlinkat,ftruncate";

/// What a server does for one.
const CALLS_OF_A_SERVER: &str =
    "sendto,sendmsg,write,writev,pwrite64,recvfrom,fsync,fdatasync,preadv2,openat,unlink,unlinkat";

#[test]
fn whoever_is_killed_whenever_the_folder_has_instants_and_nothing_else() {
    for seed in seeds(&[1, 2]) {
        kills(seed, number("STILLPOINT_PULL_KILLS", 12));
    }
}

/// What two disks held at the instants that were taken, by backup.
type Instants = BTreeMap<String, Vec<Vec<u8>>>;

fn kills(seed: u64, rounds: u64) {
    let mut rng = rng(seed);
    let names = ["vda", "vdb"];
    let mut server = Server::builder()
        .disk("vda", 6 * MIB)
        .disk("vdb", 2 * MIB + 512)
        .start();
    let mut guests = names.map(|name| Guest::new(&server, name));
    let folder = Folder::new();
    let mut instants = Instants::new();
    let (mut killed, mut whole) = (0, 0);
    for round in 0..rounds {
        let what = format!("seed {seed}, round {round}");
        for guest in &mut guests {
            (0..rng.random_range(1..12_u32)).for_each(|_| guest.do_something(&mut rng));
        }
        let now: Vec<Vec<u8>> = guests.iter().map(|guest| guest.disk.clone()).collect();
        let (code, server_ended) = pull_and_kill(&mut rng, &mut server, &folder);
        if server_ended {
            server.start();
            for (guest, name) in guests.iter_mut().zip(names) {
                guest.reconnect(&server, name);
            }
        }
        remember(&mut instants, &server, &folder, &now);
        match code {
            0 => whole += 1,
            1 | 137 => killed += 1,
            other => panic!("{what}: exit code {other}"),
        }
        if rng.random_bool(0.4) {
            let pulled = folder.pull(&server, &[]);
            pulled.result(0);
            remember(&mut instants, &server, &folder, &now);
        }
    }
    folder.pull(&server, &[]).result(0);
    let now: Vec<Vec<u8>> = guests.iter().map(|guest| guest.disk.clone()).collect();
    remember(&mut instants, &server, &folder, &now);
    // There are no backups left that nobody knows of.
    assert_eq!(
        server.cli_json(&["backup", "list"]),
        json!([]),
        "seed {seed}"
    );
    assert!(!folder.has_draft(), "seed {seed}");

    let points = folder.points();
    for point in &points {
        let manifest = folder.manifest(*point);
        let backup = manifest["backup"]["name"].as_str().expect("a backup");
        let disks = &instants[backup];
        for (name, bytes) in names.iter().zip(disks) {
            folder.holds(
                *point,
                name,
                bytes,
                &format!("seed {seed}, backup {backup}"),
            );
        }
    }
    let fulls = points
        .iter()
        .filter(|point| folder.manifest(**point)["disks"][0]["mode"] == "full");
    println!(
        "seed {seed}: {} points, {} of them full, {killed} runs killed, {whole} not",
        points.len(),
        fulls.count()
    );
    assert!(killed > 0, "seed {seed}: nothing was killed");
}

/// Notes what the disks held when backups were begun that are new: nobody writes while a pull runs.
fn remember(instants: &mut Instants, server: &Server, folder: &Folder, now: &[Vec<u8>]) {
    let open = server.cli_json(&["backup", "list"]);
    let mut ids: Vec<String> = open
        .as_array()
        .expect("a list")
        .iter()
        .map(|backup| backup["id"].as_str().expect("an id").to_owned())
        .collect();
    if folder.path().exists() {
        let manifests = folder
            .points()
            .into_iter()
            .map(|point| folder.manifest(point));
        ids.extend(manifests.map(|it| it["backup"]["name"].as_str().expect("an id").to_owned()));
    }
    for id in ids {
        instants.entry(id).or_insert_with(|| now.to_owned());
    }
}

/// Pulls, with somebody killed on the way or not; returns the exit code, and whether the server ended.
fn pull_and_kill(rng: &mut Rng, server: &mut Server, folder: &Folder) -> (i32, bool) {
    let (puller, server_too) = [(true, false), (false, true), (true, true)][rng.random_range(0..3)];
    let killer =
        server_too.then(|| Killer::of(server, CALLS_OF_A_SERVER, rng.random_range(1..400)));
    // Nobody starts the server again before the puller has ended.
    let pull = folder.command(server, &["--reconnect=0s"]);
    let output = if puller {
        let mut command = killing(CALLS_OF_A_PULLER, rng.random_range(1..250));
        command.arg(pull.get_program()).args(pull.get_args());
        run(&mut command)
    } else {
        let mut pull = pull;
        run(&mut pull)
    };
    if let Some(killer) = killer {
        killer.detach();
    }
    // A thread in a sync can keep what was killed for long; but it answers nobody any more.
    let ended = server_too && !server.cli(&["status"]).status.success();
    if ended {
        server.wait();
    }
    (output.code(), ended)
}
