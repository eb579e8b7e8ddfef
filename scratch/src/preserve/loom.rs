//! Guests and someone who reads the past, in every order in which they can see each other.
//!
//! Relaxed atomics stand for the image and for scratch: what one thread stores there another sees
//! late, unless something orders it.

use loom::future::block_on;
use loom::sync::atomic::{AtomicU8, Ordering::Relaxed};
use loom::thread;

use bitmap::{Era, EraMap, Granularity, MemoryPages, Salt};
use block::{Extent, Zeroing};

use super::*;
use crate::ahead::OFTEN;
use crate::world::Unpaced;
use crate::{Frozen, SnapshotFiles, Terms};

struct Checked;

impl World for Checked {
    type Image = Memory;
    type Scratch = Memory;
    type Pages = MemoryPages;
    type Pace = Unpaced;
}

/// A byte for each granule.
struct Memory {
    granules: Vec<AtomicU8>,
    read: fn(&AtomicU8) -> u8,
}

impl Memory {
    /// The checker knows of each byte only who was there last: that a guest reads what it is about to
    /// overwrite would hide from it that someone else has read that too, if it took the guest for
    /// a mere reader.
    fn image() -> Self {
        Self::new(OLD, |granule| granule.fetch_add(0, Relaxed))
    }

    fn scratch() -> Self {
        Self::new(0, |granule| granule.load(Relaxed))
    }

    fn new(value: u8, read: fn(&AtomicU8) -> u8) -> Self {
        let granules = (0..GRANULES).map(|_| AtomicU8::new(value)).collect();
        Self { granules, read }
    }
}

impl Storage for Memory {
    fn size(&self) -> u64 {
        GRANULES * GRANULE
    }

    async fn read(&self, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
        let granules = self.granules[(offset / GRANULE) as usize..].iter();
        for (granule, part) in granules.zip(buffer.chunks_mut(GRANULE as usize)) {
            part.fill((self.read)(granule));
        }
        Ok(())
    }

    async fn write(&self, offset: u64, data: &Bytes) -> io::Result<()> {
        let granules = self.granules[(offset / GRANULE) as usize..].iter();
        for (granule, part) in granules.zip(data.chunks(GRANULE as usize)) {
            granule.store(part[0], Relaxed);
        }
        Ok(())
    }

    async fn zero(&self, _: Range<u64>, _: Zeroing) -> io::Result<()> {
        unreachable!("nobody zeroes here")
    }

    async fn sync(&self) -> io::Result<()> {
        Ok(())
    }

    async fn extents(&self, range: Range<u64>) -> io::Result<Vec<Extent>> {
        Ok(vec![Extent { range, hole: false }])
    }
}

/// Two to be written, and others that are kept from the beginning: one of them, or as many as it takes
/// for the rest to be copied ahead.
const GRANULES: u64 = 2 + OFTEN as u64;
const ONE: Range<u64> = 2..3;
const ALL: Range<u64> = 2..GRANULES;
const OLD: u8 = 1;
/// What is found in scratch that has gone.
const GONE: u8 = 9;

struct Scene {
    image: Arc<Memory>,
    snapshots: [Arc<Snapshot<Checked>>; 1],
    claims: Claims,
}

impl Scene {
    fn new(kept: Range<u64>) -> Arc<Self> {
        let pages = MemoryPages::default;
        let size = GRANULES * GRANULE;
        let live = EraMap::new(size, Granularity::DEFAULT, Salt::default(), pages());
        let files = SnapshotFiles {
            scratch: Memory::scratch(),
            states: pages(),
            second: pages(),
            eras: pages(),
        };
        let snapshot = Snapshot::new(
            Arc::new(live),
            Era::from_number(2),
            files,
            Terms::endless(),
            1,
        );
        let snapshot = snapshot.unwrap();
        // So that the page of bits is there: how it comes into being, the checker cannot see.
        let holes = [Kept::Hole; GRANULES as usize];
        snapshot.preserved.keep(kept, &holes).unwrap();
        Arc::new(Self {
            image: Arc::new(Memory::image()),
            snapshots: [Arc::new(snapshot)],
            claims: Claims::default(),
        })
    }

    fn write(self: &Arc<Self>, value: u8, granules: Range<u64>) -> thread::JoinHandle<()> {
        let scene = Arc::clone(self);
        thread::spawn(move || {
            let range = bytes(&granules, scene.image.size());
            let data = vec![value; (range.end - range.start) as usize].into();
            let (image, snapshots) = (&*scene.image, &scene.snapshots);
            block_on(async {
                preserve(&range, image, snapshots, &scene.claims, &Unpaced)
                    .await
                    .unwrap();
                image.write(range.start, &data).await.unwrap();
            });
        })
    }

    /// Reads unless the instant is over by then.
    fn read_what_is_left(self: &Arc<Self>) -> thread::JoinHandle<()> {
        let scene = Arc::clone(self);
        thread::spawn(move || {
            let snapshot = Arc::clone(&scene.snapshots[0]);
            let frozen = Frozen::new(Arc::clone(&scene.image), snapshot, Arc::new(Unpaced));
            let mut buffer = [0; GRANULE as usize];
            if block_on(frozen.read(0, &mut buffer)).is_ok() {
                assert!(buffer.iter().all(|byte| *byte == OLD), "{}", buffer[0]);
            }
        })
    }

    fn read_the_past(&self, granules: u64) {
        let snapshot = Arc::clone(&self.snapshots[0]);
        let frozen = Frozen::new(Arc::clone(&self.image), snapshot, Arc::new(Unpaced));
        let mut buffer = vec![0; (granules * GRANULE) as usize];
        block_on(frozen.read(0, &mut buffer)).unwrap();
        assert!(buffer.iter().all(|byte| *byte == OLD), "{}", buffer[0]);
    }
}

fn check(preemptions: usize, model: impl Fn() + Send + Sync + 'static) {
    let mut builder = loom::model::Builder::new();
    builder.preemption_bound = Some(preemptions);
    builder.check(model);
}

#[test]
fn loom_the_past_is_read_as_it_was() {
    check(4, || {
        let scene = Scene::new(ONE);
        let writer = scene.write(7, 0..1);
        scene.read_the_past(1);
        writer.join().unwrap();
        scene.read_the_past(1);
    });
}

#[test]
fn loom_the_past_is_read_as_it_was_whoever_copies_it() {
    check(3, || {
        let scene = Scene::new(ONE);
        let writers = [scene.write(7, 0..2), scene.write(8, 0..1)];
        scene.read_the_past(2);
        for writer in writers {
            writer.join().unwrap();
        }
    });
}

#[test]
fn loom_the_past_is_read_as_it_was_where_more_is_copied_than_is_written() {
    check(3, || {
        let scene = Scene::new(ALL);
        let writers = [scene.write(7, 0..1), scene.write(8, 1..2)];
        scene.read_the_past(2);
        for writer in writers {
            writer.join().unwrap();
        }
    });
}

#[test]
fn loom_what_has_gone_is_neither_believed_nor_stored_to() {
    check(3, || {
        let scene = Scene::new(ONE);
        let others = [scene.write(7, 0..1), scene.read_what_is_left()];
        let snapshot = &scene.snapshots[0];
        snapshot.end();
        block_on(snapshot.quiet());
        snapshot.scratch.granules[0].store(GONE, Relaxed);
        for other in others {
            other.join().unwrap();
        }
        let left = snapshot.scratch.granules[0].load(Relaxed);
        assert_eq!(left, GONE, "something was stored when it had gone");
    });
}
