//! What a guest's write pays for tracking, and how fast a map becomes runs.

use std::hint::black_box;
use std::ops::Range;
use std::sync::Arc;

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use rand::seq::SliceRandom as _;
use rand::{Rng as _, SeedableRng as _};
use rand_chacha::ChaCha8Rng;
use stillpoint_bitmap::{Era, EraMap, FrozenEras, Granularity, MemoryPages, Run, Salt};

criterion_group!(eras, mark, runs);
criterion_main!(eras);

type Map = EraMap<MemoryPages>;

/// As a guest marks that writes 4 KiB to each chunk of a disk, in an order that is drawn.
fn mark(criterion: &mut Criterion) {
    let map = map_of(MARKED);
    let writes = writes();
    let mut era = BASE;

    let mut group = criterion.benchmark_group("mark");
    group.throughput(Throughput::Elements(MARKED));
    assert_eq!(mark_all(&map, &writes, era), MARKED);
    assert_eq!(mark_all(&map, &writes, era), 0, "they are marked");
    group.bench_function("a chunk that carries the era already", |bencher| {
        bencher.iter(|| mark_all(&map, &writes, era));
    });
    group.bench_function("a chunk that carries an older era", |bencher| {
        bencher.iter(|| {
            era = era.next().expect("there are more eras than iterations");
            mark_all(&map, &writes, era)
        });
    });
    assert_eq!(map.changed_bytes(era), map.size());
    group.finish();
}

/// As a block status walks the map of a disk that has a million runs.
fn runs(criterion: &mut Criterion) {
    let stretches = stretches();
    let expected = expected_runs(&stretches);
    let live = fragmented(&stretches);
    let frozen = frozen(&stretches);
    let whole = 0..live.size();
    assert!(
        live.changes(whole.clone(), BASE).eq(expected.clone()),
        "seed {SEED}"
    );
    assert!(
        frozen.changes(whole.clone(), BASE).eq(expected),
        "seed {SEED}"
    );

    let mut group = criterion.benchmark_group("runs");
    group.throughput(Throughput::Elements(stretches.len() as u64));
    group.bench_function("of a live map", |bencher| {
        bencher.iter(|| live.changes(black_box(whole.clone()), BASE).count());
    });
    group.bench_function(
        "of a frozen map, a quarter of it changed since",
        |bencher| {
            bencher.iter(|| frozen.changes(black_box(whole.clone()), BASE).count());
        },
    );
    group.finish();
}

/// Marks what `writes` touch, as the server does; returns how many chunks that took.
fn mark_all(map: &Map, writes: &[Range<u64>], era: Era) -> u64 {
    let mut marked = 0;
    for run in writes.iter().flat_map(|write| map.older(write, era)) {
        map.mark(&run.chunks, era).expect("memory does not fail");
        marked += run.chunks.end - run.chunks.start;
    }
    marked
}

fn writes() -> Vec<Range<u64>> {
    let mut chunks: Vec<u64> = (0..MARKED).collect();
    chunks.shuffle(&mut ChaCha8Rng::seed_from_u64(SEED));
    let start = |chunk| chunk * CHUNK.bytes();
    chunks
        .into_iter()
        .map(|chunk| start(chunk)..start(chunk) + 4096)
        .collect()
}

fn map_of(chunks: u64) -> Map {
    let pages = MemoryPages::default();
    EraMap::new(chunks * CHUNK.bytes(), CHUNK, Salt::default(), pages)
}

/// A million neighbouring stretches of chunks, of which every other one is dirty.
fn stretches() -> Vec<Range<u64>> {
    let mut rng = ChaCha8Rng::seed_from_u64(SEED);
    let mut end = 0;
    let stretch = |_| {
        let start = end;
        end += rng.random_range(1..=8);
        start..end
    };
    (0..1_000_000).map(stretch).collect()
}

fn is_dirty(number: usize) -> bool {
    number % 2 == 1
}

fn expected_runs(stretches: &[Range<u64>]) -> impl Iterator<Item = Run> + Clone {
    let size = size_of(stretches);
    stretches
        .iter()
        .enumerate()
        .map(move |(number, chunks)| Run {
            range: CHUNK.range(chunks, size),
            dirty: is_dirty(number),
        })
}

fn size_of(stretches: &[Range<u64>]) -> u64 {
    stretches.last().map_or(0, |last| last.end * CHUNK.bytes())
}

/// A disk of which every other stretch has changed.
fn fragmented(stretches: &[Range<u64>]) -> Map {
    let map = map_of(size_of(stretches) / CHUNK.bytes());
    for chunks in stretches.iter().skip(1).step_by(2) {
        map.mark(chunks, BASE).expect("memory does not fail");
    }
    map
}

/// The same, frozen before a quarter of the stretches changed once more.
fn frozen(stretches: &[Range<u64>]) -> FrozenEras<MemoryPages> {
    let live = Arc::new(fragmented(stretches));
    let (size, era) = (live.size(), BASE.next().expect("it is not the last"));
    let frozen = FrozenEras::new(Arc::clone(&live), size, era, MemoryPages::default());
    // Another seed than that of the lengths, or the shortest would be drawn.
    let mut rng = ChaCha8Rng::seed_from_u64(SEED + 1);
    for chunks in stretches.iter().filter(|_| rng.random_ratio(1, 4)) {
        for run in live.older(&CHUNK.range(chunks, size), era) {
            frozen.put_aside(&run).expect("memory does not fail");
            live.mark(&run.chunks, era).expect("memory does not fail");
        }
    }
    let changed = live.changed_bytes(era);
    assert!((size / 5..size / 3).contains(&changed), "seed {SEED}");
    frozen
}

const SEED: u64 = 1;
const CHUNK: Granularity = Granularity::DEFAULT;
/// That a checkpoint began.
const BASE: Era = Era::from_number(2);
/// Chunks of 4 GiB.
const MARKED: u64 = 1 << 16;
