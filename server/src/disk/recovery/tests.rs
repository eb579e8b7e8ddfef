use std::ops::Range;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use bitmap::{MemoryPages, PageStore};

use super::*;

const SIZE: u64 = 8 << 20;
/// Eras in which a checkpoint was taken, and in which the chunk changed after it.
const CHECKPOINT: Era = Era::from_number(5);
const CHANGED: Era = Era::from_number(7);

#[tokio::test]
async fn a_start_that_loses_power_before_any_sync_leaves_damage_that_the_next_one_finds() {
    for ending in [Ending::Clean, Ending::Killed, Ending::PowerCut] {
        for is_active in [false, true] {
            for syncs in 0.. {
                let what = format!("{ending:?}, active: {is_active}, after {syncs} syncs");
                let (eras, pages) = damaged(is_active);
                let left = Arc::new(AtomicUsize::new(syncs));
                let files = [&eras, &pages].map(|bytes| Storage::new(bytes.clone(), &left));
                let stored = files.each_ref().map(|file| Arc::clone(&file.now));
                let durable = files.each_ref().map(|file| Arc::clone(&file.durable));
                let finished = start(files, ending).await.is_ok();
                // Whatever of each file has got there.
                let states = |file: usize| [lock(&durable[file]).clone(), stored[file].contents()];
                for eras in states(0) {
                    for pages in states(1) {
                        let endless = Arc::new(AtomicUsize::new(usize::MAX));
                        let files =
                            [&eras, &pages].map(|bytes| Storage::new(bytes.clone(), &endless));
                        let next = start(files, Ending::PowerCut).await.expect(&what);
                        assert!(next.map.era(CHUNK) > CHECKPOINT, "{what}: clean");
                    }
                }
                if finished {
                    assert!(syncs > 1, "{what}");
                    break;
                }
            }
        }
    }
}

#[tokio::test]
async fn what_a_failed_sync_left_in_memory_alone_is_durable_after_a_start() {
    let endless = Arc::new(AtomicUsize::new(usize::MAX));
    let (mut eras, pages) = damaged(true);
    eras[CHUNK as usize * 8] ^= 1 << 4;
    let table = PageTable::create(1, MemoryPages::default()).expect("memory does not fail");
    let files = [eras, pages].map(|bytes| Storage::new(bytes, &endless));
    // Nobody lived to record that the sync had failed, and the kernel does not try again.
    *lock(&files[0].durable) = Vec::new();
    *lock(&files[1].durable) = table.store().contents();
    let durable = files.each_ref().map(|file| Arc::clone(&file.durable));
    start(files, Ending::Killed).await.expect("nothing fails");
    let left = durable.map(|bytes| Storage::new(lock(&bytes).clone(), &endless));
    let next = start(left, Ending::PowerCut).await.expect("nothing fails");
    assert!(next.map.era(CHUNK) > CHECKPOINT, "clean");
}

/// A map and its table, where the entry of a chunk that changed is not what was stored.
fn damaged(is_active: bool) -> (Vec<u8>, Vec<u8>) {
    let map = EraMap::new(SIZE, granularity(), salt(), MemoryPages::default());
    let table = PageTable::create(1, MemoryPages::default()).expect("memory does not fail");
    let regions = Regions::new(1, granularity(), table);
    let fill = |chunks: &Chunks| map.eras().fill(chunks);
    // While another region of the page is active, the page has no sum that would tell.
    for region in regions.of(&(0..SIZE)) {
        assert!(!regions.enter(region));
        regions
            .activate(region, fill)
            .expect("memory does not fail");
        regions.activated(region);
    }
    let region = regions.of(&(0..1)).next().expect("there are two");
    map.mark(&(CHUNK..CHUNK + 1), CHANGED)
        .expect("memory does not fail");
    regions.leave(region);
    if !is_active {
        assert_eq!(regions.begin_retiring(1), [region]);
        let checksum = || map.eras().checksum(0);
        regions
            .retire(region, checksum)
            .expect("memory does not fail");
    }
    let mut eras = map.eras().store().contents();
    eras[CHUNK as usize * 8] ^= 1 << 4;
    (eras, regions.table().store().contents())
}

async fn start(files: [Storage; 2], ending: Ending) -> io::Result<Recovered<Storage>> {
    let [eras, pages] = files;
    let known = Era::from_number(100);
    let plausible = Era::from_number(1000);
    let recovery = Recovery::load(SIZE, granularity(), salt(), (eras, pages), plausible)?;
    let before = Before {
        ending,
        durability: Durability::Power,
        known,
    };
    recovery
        .start(before, Durability::Power, &mut Forgetful)
        .await
}

fn granularity() -> Granularity {
    Granularity::DEFAULT
}

fn salt() -> Salt {
    Salt::from_number(7)
}

fn lock(bytes: &Mutex<Vec<u8>>) -> MutexGuard<'_, Vec<u8>> {
    bytes.lock().unwrap_or_else(PoisonError::into_inner)
}

/// What was stored, and what is durable of it.
struct Storage {
    now: Arc<MemoryPages>,
    /// Since the last sync.
    stored: Mutex<Vec<(u64, Vec<u8>)>>,
    durable: Arc<Mutex<Vec<u8>>>,
    /// How many syncs there are before the power is cut, of all files together.
    syncs_left: Arc<AtomicUsize>,
}

impl Storage {
    fn new(bytes: Vec<u8>, syncs_left: &Arc<AtomicUsize>) -> Self {
        Self {
            now: Arc::new(MemoryPages::from(bytes.clone())),
            stored: Mutex::default(),
            durable: Arc::new(Mutex::new(bytes)),
            syncs_left: Arc::clone(syncs_left),
        }
    }
}

impl PageStore for Storage {
    fn store(&self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        let mut stored = self.stored.lock().unwrap_or_else(PoisonError::into_inner);
        stored.push((offset, bytes.to_vec()));
        self.now.store(offset, bytes)
    }

    fn load(&self, offset: u64, bytes: &mut [u8]) -> io::Result<()> {
        self.now.load(offset, bytes)
    }

    fn stored(&self, offset: u64) -> io::Result<Option<Range<u64>>> {
        self.now.stored(offset)
    }
}

impl Durable for Storage {
    async fn sync(&self) -> io::Result<()> {
        self.sync_place().await?;
        let mut durable = lock(&self.durable);
        let mut stored = self.stored.lock().unwrap_or_else(PoisonError::into_inner);
        for (offset, bytes) in stored.drain(..) {
            let place = offset as usize..offset as usize + bytes.len();
            let length = durable.len().max(place.end);
            durable.resize(length, 0);
            durable[place].copy_from_slice(&bytes);
        }
        Ok(())
    }

    async fn sync_place(&self) -> io::Result<()> {
        let left = self.syncs_left.load(Ordering::Relaxed);
        let left = left.checked_sub(1);
        let left = left.ok_or_else(|| io::Error::other("the power is cut"))?;
        self.syncs_left.store(left, Ordering::Relaxed);
        Ok(())
    }
}

struct Forgetful;

impl Chronicle for Forgetful {
    async fn runs(&mut self, _: Running) -> io::Result<()> {
        Ok(())
    }

    async fn started(&mut self, _: Era) -> io::Result<()> {
        Ok(())
    }
}

const CHUNK: u64 = 3;
