//! What a client pays that asks a frozen disk where its data and its changes are.

use std::time::Instant;

use bytes::BytesMut;
use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use proto::{Chunk, DIRTY, Extent, Headers, Reply, STATE_HOLE, STATE_ZERO};
use stillpoint::benches::{FragmentedDisk, WRITTEN};
use tokio::task::LocalSet;

criterion_group!(maps, block_status);
criterion_main!(maps);

/// One request for the whole disk and for all that it lists: `base:allocation`,
/// `qemu:allocation-depth`, and what changed since a checkpoint.
fn block_status(criterion: &mut Criterion) {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .expect("there are descriptors");
    let local = LocalSet::new();

    let mut group = criterion.benchmark_group("block status");
    for (form, headers) in [
        ("structured", Headers::Structured),
        ("extended", Headers::Extended),
    ] {
        let folder = tempfile::tempdir().expect("there is a place for temporary files");
        let created = FragmentedDisk::create(folder.path(), CHUNKS, headers);
        let disk = local.block_on(&runtime, created);
        let reply = local.block_on(&runtime, disk.block_status(BytesMut::new()));
        let expected = [allocation(), depth(), changes()];
        assert_eq!(extents_in(headers, reply), expected);

        let extents: usize = expected.iter().map(Vec::len).sum();
        group.throughput(Throughput::Elements(extents as u64));
        let id = BenchmarkId::new("all contexts of a fragmented disk", form);
        group.bench_function(id, |bencher| {
            bencher.iter_custom(|iterations| {
                local.block_on(&runtime, async {
                    let mut reply = BytesMut::new();
                    let begun = Instant::now();
                    for _ in 0..iterations {
                        reply.clear();
                        reply = disk.block_status(reply).await;
                    }
                    begun.elapsed()
                })
            });
        });
    }
    group.finish();
}

/// What each context says, in the order of the reply.
fn extents_in(headers: Headers, mut input: BytesMut) -> Vec<Vec<Extent>> {
    let mut found = Vec::new();
    while let Some(reply) = Reply::decode(headers, &mut input).expect("it is legal") {
        match reply {
            Reply::Chunk {
                chunk: Chunk::BlockStatus { extents, .. },
                ..
            } => found.push(extents),
            other => panic!("expected a block status, found {other:?}"),
        }
    }
    found
}

/// A hole up to the first odd chunk, and behind what was written in each of them.
fn allocation() -> Vec<Extent> {
    let hole = |length| extent(length, STATE_HOLE | STATE_ZERO);
    let mut extents = vec![hole(CHUNK)];
    for _ in 0..CHUNKS / 2 {
        extents.push(extent(WRITTEN, 0));
        extents.push(hole(2 * CHUNK - WRITTEN));
    }
    // No chunk follows the last one.
    extents.last_mut().expect("it begins with a hole").length -= CHUNK;
    extents
}

fn depth() -> Vec<Extent> {
    vec![extent(CHUNKS * CHUNK, 1)]
}

fn changes() -> Vec<Extent> {
    let clean_and_dirty = [extent(CHUNK, 0), extent(CHUNK, DIRTY)];
    clean_and_dirty.repeat(CHUNKS as usize / 2)
}

fn extent(length: u64, flags: u32) -> Extent {
    let flags = u64::from(flags);
    Extent { length, flags }
}

/// Of a disk of 1 GiB: as many as one reply can tell of in all three contexts.
const CHUNKS: u64 = 1 << 14;
const CHUNK: u64 = 64 << 10;
