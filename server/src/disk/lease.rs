use std::io;
use std::sync::atomic::{AtomicU64, Ordering};

use bitmap::PageStore;
use block::SharedSync;
use scratch::Durable;

/// Until when writes may be issued, so that the next server can tell its predecessor's last change
/// of the image from someone else's.
///
/// Two times, in seconds since 1970. The end of the lease is durable: no write is issued at or after
/// it, so after a power cut no change of ours is later. The clock is stored whenever a write is
/// issued in a new second, and not synced: after a kill no change of ours is much later than it.
#[derive(Debug)]
pub struct Lease<P> {
    store: P,
    end: AtomicU64,
    clock: AtomicU64,
    syncs: SharedSync,
}

/// What a lease said when its server ended.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct LeaseRecord {
    /// No write was issued at or after this time; `None` if that cannot be read.
    pub end: Option<u64>,
    /// A write was issued at this time, and none more than a second later.
    pub clock: Option<u64>,
}

impl<P: Durable> Lease<P> {
    /// A lease that has run out, and the record of the last one in `store`.
    pub fn open(store: P) -> io::Result<(Self, LeaseRecord)> {
        let record = LeaseRecord {
            end: load(&store, END_SECTOR)?,
            clock: load(&store, CLOCK_SECTOR)?,
        };
        let lease = Self {
            store,
            end: AtomicU64::new(0),
            clock: AtomicU64::new(0),
            syncs: SharedSync::default(),
        };
        Ok((lease, record))
    }

    /// Returns when a write may be issued at `now`.
    pub(super) async fn cover(&self, now: u64) -> io::Result<()> {
        // Whoever shares a sync has the end that another stored, perhaps much earlier.
        while now + RENEWED_BEFORE_S >= self.end.load(Ordering::Acquire) {
            self.syncs
                .run(|| async {
                    // Who asked earlier may have its turn later, and what was promised holds.
                    let end = self.end.load(Ordering::Acquire).max(now + LEASE_S);
                    save(&self.store, END_SECTOR, end)?;
                    self.store.sync().await?;
                    self.end.store(end, Ordering::Release);
                    Ok(())
                })
                .await?;
        }
        Ok(())
    }

    /// Stores that a write is issued at `now`.
    pub(super) fn note(&self, now: u64) -> io::Result<()> {
        // Most often someone has done so, and nobody need wait for the others' copy of it.
        if self.clock.load(Ordering::Acquire) != now {
            save(&self.store, CLOCK_SECTOR, now)?;
            // Not before: whoever finds it here changes the image at once.
            self.clock.store(now, Ordering::Release);
        }
        Ok(())
    }
}

fn save<P: PageStore>(store: &P, sector: u64, time: u64) -> io::Result<()> {
    let mut bytes = [0; 12];
    bytes[..8].copy_from_slice(&time.to_le_bytes());
    bytes[8..].copy_from_slice(&crc32fast::hash(&time.to_le_bytes()).to_le_bytes());
    store.store(sector * SECTOR_BYTES, &bytes)
}

fn load<P: PageStore>(store: &P, sector: u64) -> io::Result<Option<u64>> {
    let mut bytes = [0; 12];
    store.load(sector * SECTOR_BYTES, &mut bytes)?;
    let (time, sum) = bytes.split_at(8);
    let whole = crc32fast::hash(time).to_le_bytes() == *sum;
    Ok(time
        .try_into()
        .ok()
        .filter(|_| whole)
        .map(u64::from_le_bytes))
}

/// One sync a minute, of a file of one page, while something is written.
const LEASE_S: u64 = 60;

/// Renewed so long before it ends, so that a write which then waits is still issued within it. One
/// that is not costs a full backup after a power cut, and nothing else.
const RENEWED_BEFORE_S: u64 = 10;

const END_SECTOR: u64 = 0;
const CLOCK_SECTOR: u64 = 1;
const SECTOR_BYTES: u64 = 512;

#[cfg(test)]
mod tests {
    use std::ops::Range;
    use std::sync::atomic::AtomicBool;

    use super::*;
    use bitmap::MemoryPages;

    /// Stores nothing while it fails; a sync takes a while.
    #[derive(Default)]
    struct Failing {
        pages: MemoryPages,
        fails: AtomicBool,
    }

    impl PageStore for Failing {
        fn store(&self, offset: u64, bytes: &[u8]) -> io::Result<()> {
            if self.fails.load(Ordering::Relaxed) {
                return Err(io::ErrorKind::StorageFull.into());
            }
            self.pages.store(offset, bytes)
        }

        fn load(&self, offset: u64, bytes: &mut [u8]) -> io::Result<()> {
            self.pages.load(offset, bytes)
        }

        fn stored(&self, offset: u64) -> io::Result<Option<Range<u64>>> {
            self.pages.stored(offset)
        }
    }

    impl Durable for Failing {
        async fn sync(&self) -> io::Result<()> {
            tokio::task::yield_now().await;
            Ok(())
        }
    }

    #[test]
    fn a_time_that_could_not_be_stored_is_not_taken_for_stored() {
        let (lease, _) = Lease::open(Failing::default()).unwrap();
        lease.store.fails.store(true, Ordering::Relaxed);
        lease.note(1000).unwrap_err();
        lease.note(1000).unwrap_err();
        lease.store.fails.store(false, Ordering::Relaxed);
        lease.note(1000).unwrap();
        assert_eq!(load(&lease.store, CLOCK_SECTOR).unwrap(), Some(1000));
    }

    #[tokio::test]
    async fn whose_turn_comes_late_takes_back_nothing_of_the_lease() {
        let (lease, _) = Lease::open(Failing::default()).unwrap();
        // The second asks while the sync of the first is under way, with a time from before.
        let (first, second) = tokio::join!(lease.cover(1040), lease.cover(1000));
        first.and(second).unwrap();
        let stored = load(&lease.store, END_SECTOR).unwrap();
        assert_eq!(stored, Some(1040 + LEASE_S));
    }

    #[tokio::test]
    async fn a_lease_covers_every_write_and_the_next_server_reads_it() {
        let (lease, before) = Lease::open(MemoryPages::default()).unwrap();
        assert_eq!(before, LeaseRecord::default());
        for now in [1000, 1001, 1059, 1060] {
            lease.cover(now).await.unwrap();
            lease.note(now).unwrap();
            let stored = MemoryPages::from(lease.store.contents());
            let (_, record) = Lease::open(stored).unwrap();
            assert!(record.end.unwrap() > now, "{record:?}");
            assert_eq!(record.clock, Some(now));
        }
    }
}
