//! A disk that becomes larger: while it is served, or while no server has it.

mod refusals;
mod while_served;
mod without_server;

mod kills;

use std::collections::BTreeSet;

use serde_json::{Value, json};
use stillpoint_tests::guest::dirty_map;
use stillpoint_tests::server::named;
use stillpoint_tests::state::{Begun, begin_since};
use stillpoint_tests::{CHUNK, Extent, Guest, MIB, Server};

/// Ends within a chunk, and within a region of the map's first page.
const BEFORE: u64 = 58 * MIB + 5 * 512;
/// Ends within a chunk, on the map's second page.
const AFTER: u64 = 66 * MIB + 3 * 512;

/// What has grown: the chunk in which the disk ended, and all behind it.
fn new_chunks() -> impl Iterator<Item = u64> {
    BEFORE / CHUNK..AFTER.div_ceil(CHUNK)
}

/// The map of the larger disk where these chunks were written, and it has grown.
fn grown_map(written: &[u64]) -> Vec<Extent> {
    let touched: BTreeSet<u64> = written.iter().copied().chain(new_chunks()).collect();
    dirty_map(&touched, AFTER)
}

/// The same of the disk as it was.
fn map_before(written: &[u64]) -> Vec<Extent> {
    dirty_map(&written.iter().copied().collect(), BEFORE)
}

/// A disk with a checkpoint, and one chunk that was written after it.
fn prepared() -> Server {
    let server = Server::with_disk(BEFORE);
    write(&server);
    server
}

const WRITTEN: u64 = 3;

fn write(server: &Server) {
    let mut guest = Guest::new(server, "vda");
    guest.write(CHUNK, &[1; 4096]);
    server.checkpoint("cp1");
    guest.write(WRITTEN * CHUNK, &[2; 4096]);
}

fn resize(server: &Server, size: u64) -> Value {
    let arguments = json!({"disk": "vda", "size": size});
    server.qmp().execute("disk-resize", &arguments)
}

fn size_of(server: &Server) -> u64 {
    let disks = server.qmp().execute("query-disks", &json!({}));
    let disk = named(&disks, "disks", "disk", "vda").expect("vda");
    disk["size"].as_u64().expect("a number")
}

/// What has changed since a checkpoint, for certain.
#[track_caller]
fn changed_since(server: &Server, id: &str, checkpoint: &str, how: &str) -> Vec<Extent> {
    match begin_since(server, id, "vda", checkpoint) {
        Begun::Incremental { map, uncertain } => {
            assert_eq!(uncertain, 0, "{how}");
            map
        }
        Begun::Full { reason } => panic!("{how}: full: {reason}"),
    }
}
