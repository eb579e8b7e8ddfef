//! What a guest's write pays for an open backup, and what a read of the past costs.
//!
//! Image and scratch are memory that is in use already: what is measured is the bookkeeping and the
//! copying of bytes, and no system call.

use std::hint::black_box;
use std::io;
use std::ops::Range;
use std::pin::pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker};

use bitmap::{Era, EraMap, Granularity, MemoryPages, Salt};
use block::{Extent, Storage, Zeroing};
use bytes::Bytes;
use criterion::{BatchSize, Criterion, Throughput, criterion_group, criterion_main};
use rand::seq::SliceRandom as _;
use rand::{RngCore as _, SeedableRng as _};
use rand_chacha::ChaCha8Rng;
use stillpoint_scratch::{
    Claims, Frozen, GRANULE, Kept, Snapshot, SnapshotFiles, Terms, Unpaced, World, preserve,
};

criterion_group!(before_images, preserve_granules, read_frozen);
criterion_main!(before_images);

/// As a guest needs it that writes every granule of a disk, in an order that is drawn.
fn preserve_granules(criterion: &mut Criterion) {
    let disk = Disk::new();
    let preserved = disk.freeze();
    assert!(disk.all_are(&preserved, Kept::Not));
    disk.preserve_all(&preserved);
    assert!(disk.all_are(&preserved, Kept::Data));

    let mut group = criterion.benchmark_group("preserve");
    group.throughput(Throughput::Elements(GRANULES));
    group.bench_function("a fresh granule", |bencher| {
        bencher.iter_batched_ref(
            || disk.freeze(),
            |fresh| disk.preserve_all(fresh),
            BatchSize::PerIteration,
        );
    });
    group.bench_function("a preserved granule", |bencher| {
        bencher.iter(|| disk.preserve_all(&preserved));
    });
    assert_eq!(preserved[0].scratch_used(), SIZE, "nothing is kept twice");
    group.finish();
}

/// As a client pulls every granule of a frozen disk, in an order that is drawn.
fn read_frozen(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("frozen read");
    group.throughput(Throughput::Bytes(SIZE));
    for (name, is_preserved) in [("of a fresh granule", false), ("of a preserved one", true)] {
        let disk = Disk::new();
        let snapshot = disk.freeze();
        let then = disk.image.contents().clone();
        if is_preserved {
            disk.preserve_all(&snapshot);
            disk.image.contents().fill(0);
        }
        let frozen = disk.frozen(&snapshot);
        let mut found = vec![0; SIZE as usize];
        now(frozen.read(0, &mut found)).expect("memory does not fail");
        assert!(found == then, "seed {SEED}");
        let kept = if is_preserved { Kept::Data } else { Kept::Not };
        assert!(disk.all_are(&snapshot, kept));

        group.bench_function(name, |bencher| {
            bencher.iter(|| disk.read_all(&frozen));
        });
    }
    group.finish();
}

/// A disk, and where what is kept of it goes.
struct Disk {
    image: Arc<Memory>,
    scratch: Memory,
    claims: Claims,
    /// All of them, in the order in which they are written or read.
    granules: Vec<u64>,
}

type Snapshots = [Arc<Snapshot<InMemory>>; 1];

impl Disk {
    fn new() -> Self {
        let mut rng = ChaCha8Rng::seed_from_u64(SEED);
        let mut granules: Vec<u64> = (0..GRANULES).collect();
        granules.shuffle(&mut rng);
        let mut image = vec![0; SIZE as usize];
        rng.fill_bytes(&mut image);
        Self {
            image: Arc::new(Memory::from(image)),
            // Not zeroes: the first touch of a page costs more than the copy that it is for.
            scratch: Memory::from(vec![1; SIZE as usize]),
            claims: Claims::default(),
            granules,
        }
    }

    /// An instant of which nothing is kept yet.
    fn freeze(&self) -> Snapshots {
        let pages = MemoryPages::default;
        let map = EraMap::new(SIZE, Granularity::DEFAULT, Salt::default(), pages());
        let files = SnapshotFiles {
            scratch: self.scratch.clone(),
            states: pages(),
            second: pages(),
            eras: pages(),
        };
        let frozen_in = Era::from_number(2);
        let snapshot = Snapshot::new(Arc::new(map), frozen_in, files, Terms::endless(), 1);
        [Arc::new(snapshot.expect("memory does not fail"))]
    }

    fn frozen(&self, [snapshot]: &Snapshots) -> Frozen<InMemory> {
        let (image, snapshot) = (Arc::clone(&self.image), Arc::clone(snapshot));
        Frozen::new(image, snapshot, Arc::new(Unpaced))
    }

    fn preserve_all(&self, snapshots: &Snapshots) {
        for granule in &self.granules {
            let range = granule * GRANULE..(granule + 1) * GRANULE;
            let preserved = preserve(&range, &*self.image, snapshots, &self.claims, &Unpaced);
            now(preserved).expect("memory does not fail");
        }
    }

    fn all_are(&self, [snapshot]: &Snapshots, kept: Kept) -> bool {
        self.granules
            .iter()
            .all(|granule| snapshot.kept(*granule) == kept)
    }

    fn read_all(&self, frozen: &Frozen<InMemory>) {
        let mut buffer = [0; GRANULE as usize];
        for granule in &self.granules {
            now(frozen.read(granule * GRANULE, &mut buffer)).expect("memory does not fail");
            black_box(&buffer);
        }
    }
}

/// What comes of `future`, which has nothing to wait for.
fn now<T>(future: impl Future<Output = T>) -> T {
    match pin!(future).poll(&mut Context::from_waker(Waker::noop())) {
        Poll::Ready(output) => output,
        Poll::Pending => unreachable!("memory is always ready"),
    }
}

struct InMemory;

impl World for InMemory {
    type Image = Memory;
    type Scratch = Memory;
    type Pages = MemoryPages;
    type Pace = Unpaced;
}

/// Bytes that all clones share.
#[derive(Clone)]
struct Memory(Arc<Mutex<Vec<u8>>>);

impl From<Vec<u8>> for Memory {
    fn from(bytes: Vec<u8>) -> Self {
        Self(Arc::new(Mutex::new(bytes)))
    }
}

impl Memory {
    fn contents(&self) -> MutexGuard<'_, Vec<u8>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Storage for Memory {
    fn size(&self) -> u64 {
        SIZE
    }

    async fn read(&self, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
        let offset = offset as usize;
        buffer.copy_from_slice(&self.contents()[offset..offset + buffer.len()]);
        Ok(())
    }

    async fn write(&self, offset: u64, data: &Bytes) -> io::Result<()> {
        let offset = offset as usize;
        self.contents()[offset..offset + data.len()].copy_from_slice(data);
        Ok(())
    }

    async fn zero(&self, range: Range<u64>, _: Zeroing) -> io::Result<()> {
        self.contents()[range.start as usize..range.end as usize].fill(0);
        Ok(())
    }

    async fn sync(&self) -> io::Result<()> {
        Ok(())
    }

    async fn extents(&self, range: Range<u64>) -> io::Result<Vec<Extent>> {
        Ok(vec![Extent { range, hole: false }])
    }
}

const SEED: u64 = 1;
/// More than the nearest caches hold.
const SIZE: u64 = 16 << 20;
const GRANULES: u64 = SIZE / GRANULE;
