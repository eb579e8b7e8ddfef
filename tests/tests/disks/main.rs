//! Disks that come to a server while it serves others, and go from it.

mod adding;
mod removing;

mod away;
mod bases;
mod refused;

mod crowd;
mod histories;
mod kills;
mod race;

use std::collections::BTreeSet;
use std::path::Path;

use serde_json::{Value, json};
use stillpoint_tests::guest::dirty_map;
use stillpoint_tests::server::{Builder, names};
use stillpoint_tests::state::{Begun, begin_since};
use stillpoint_tests::tools::{path, sparse_file};
use stillpoint_tests::{CHUNK, Extent, Guest, MIB, RawNbd, Server};

const SIZE: u64 = 4 * MIB;

/// A server to be, with the disk `vda`, and an image beside it for `vdb`.
fn builder() -> Builder {
    let builder = Server::builder().disk("vda", SIZE);
    sparse_file(&builder.path("vdb.raw"), SIZE);
    builder
}

/// The disk on the image of its name, as the command line has it.
fn spec(server: &Server, disk: &str) -> String {
    format!("{disk}={}", path(&server.image(disk)))
}

#[track_caller]
fn add(server: &Server, disk: &str) -> Value {
    server.cli_json(&["disk", "add", &spec(server, disk)])
}

#[track_caller]
fn remove(server: &Server, disk: &str) {
    loop {
        let said = server.cli(&["disk", "remove", disk]);
        // Who has hung up may have a seat until the server has noticed.
        if said.status.success() || !said.stderr.contains("in use by") {
            assert_eq!(said.ok(), format!("{disk} is removed\n"));
            return;
        }
    }
}

/// The names of the disks.
fn disks(server: &Server) -> Vec<String> {
    names(
        &server.qmp().execute("query-disks", &json!({})),
        "disks",
        "disk",
    )
}

/// The live exports that a client is told of.
fn listed(server: &Server) -> Vec<String> {
    let mut nbd = RawNbd::connect(&server.live());
    let listed = nbd.list().expect("the server lists");
    listed.into_iter().map(|(name, _)| name).collect()
}

/// The disks of a checkpoint; none if there is no such checkpoint.
fn disks_of(server: &Server, checkpoint: &str) -> Vec<String> {
    let all = server.qmp().execute("query-checkpoints", &json!({}));
    let found = stillpoint_tests::server::named(&all, "checkpoints", "name", checkpoint);
    found.map_or_else(Vec::new, |found| names(&found["disks"], "disks", "disk"))
}

/// What has changed on a disk since a checkpoint, for certain.
#[track_caller]
fn changed(server: &Server, id: &str, disk: &str, checkpoint: &str) -> Vec<Extent> {
    match begin_since(server, id, disk, checkpoint) {
        Begun::Incremental { map, uncertain } => {
            assert_eq!(uncertain, 0, "{id}");
            map
        }
        Begun::Full { reason } => panic!("{id}: full: {reason}"),
    }
}

/// The map in which these chunks are dirty.
fn map_of(chunks: &[u64]) -> Vec<Extent> {
    dirty_map(&chunks.iter().copied().collect::<BTreeSet<u64>>(), SIZE)
}

/// A server that has written a past for the image at `image`: a checkpoint `cp1`, and then chunk 3.
/// It still runs.
fn past(image: &Path) -> (Server, Guest) {
    let server = Server::builder()
        .disk_as(&format!("vdb={}", path(image)))
        .start();
    let mut guest = Guest::new(&server, "vdb");
    guest.write(CHUNK, &[1; 4096]);
    server.checkpoint("cp1");
    guest.write(3 * CHUNK, &[2; 4096]);
    (server, guest)
}
