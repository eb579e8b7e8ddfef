use std::ops::Range;
use std::sync::Arc;

use crate::preserve::lacks;
use crate::snapshot::Snapshot;
use crate::world::World;

/// The stretch around `wanted`, if all of it is to be kept now and not only what is about to be
/// overwritten.
///
/// The rest of a stretch costs at once what four or five of its granules cost one by one. So when that many
/// are kept already, the rest is copied too: if the guest comes for it, that is half of what it would
/// cost, and if it never does, no more than it has cost already. Only
/// where [twice everything](crate::Allowance::holds_all) would fit into scratch, so that nobody wants
/// for what was copied in vain; and where several snapshots lack something, if it suits all of them.
pub(crate) fn ahead<W: World>(
    snapshots: &[Arc<Snapshot<W>>],
    wanted: &Range<u64>,
) -> Option<Range<u64>> {
    let start = wanted.start / STRETCH * STRETCH;
    let stretch = start..start + STRETCH;
    if *wanted == stretch || wanted.end > stretch.end {
        return None;
    }
    let mut lacking = snapshots.iter().filter(|s| lacks(s, &stretch));
    let suits = |snapshot: &Arc<Snapshot<W>>| {
        snapshot.preserved.kept_of_stretch(start) >= OFTEN && snapshot.takes_copies_ahead()
    };
    lacking.all(suits).then_some(stretch)
}

/// So many granules, from a multiple of it on, are a stretch.
pub(crate) const STRETCH: u64 = 16;

/// When so many granules of a stretch are kept, the rest is copied with the next write.
pub(crate) const OFTEN: u32 = 4;

#[cfg(all(test, not(feature = "loom")))]
mod tests {
    use std::io;
    use std::sync::Mutex;

    use bitmap::{Era, EraMap, Granularity, MemoryPages, Salt};
    use block::{Extent, Storage, Zeroing};
    use bytes::Bytes;

    use super::*;
    use crate::{
        Allowance, Budget, Claims, FreeSpace, GRANULE, Kept, OnError, Quota, Room, SnapshotFiles,
        Terms, Unpaced, preserve,
    };

    #[tokio::test]
    async fn a_stretch_of_which_some_was_copied_is_copied_whole() {
        let disk = Disk::new();
        let snapshot = freeze(endless());
        let snapshots = [Arc::clone(&snapshot)];
        disk.preserve(&snapshots, [19, 30, 16, 21]).await;
        assert_eq!(kept(&snapshot), [16, 19, 21, 30]);
        disk.preserve(&snapshots, [24]).await;
        assert!(kept(&snapshot).into_iter().eq(16..32));
        assert_eq!(snapshot.scratch_used(), 16 * GRANULE);
        let bytes = 16 * GRANULE as usize..32 * GRANULE as usize;
        let (image, scratch) = (disk.image.contents(), snapshot.scratch.contents());
        assert!(image[bytes.clone()] == scratch[bytes]);
        // The last one ends with the disk.
        disk.preserve(&snapshots, [37, 33, 35, 32, 34]).await;
        assert!(kept(&snapshot).into_iter().eq(16..38));
    }

    #[tokio::test]
    async fn nothing_is_copied_ahead_where_not_everything_would_fit_twice() {
        let disk = Disk::new();
        let limited = |own: u64, all: u64, free: u64| {
            let all = Arc::new(Quota::new(Some(all)));
            let room = Room::new(Free(free), MIB);
            let budget = Arc::new(Budget::new(Some(own), all));
            let room = Arc::new(room);
            Allowance { budget, room }
        };
        let twice = 2 * SIZE;
        for (own, all, free, count) in [
            (twice, twice, twice + 6 * MIB, 16),
            (twice - 1, twice, twice + 6 * MIB, 5),
            (twice, twice - 1, twice + 6 * MIB, 5),
            (twice, twice, twice + MIB, 5),
        ] {
            let snapshots = [freeze(limited(own, all, free))];
            disk.preserve(&snapshots, 0..5).await;
            assert_eq!(kept(&snapshots[0]).len(), count, "{own} {all} {free}");
        }
    }

    #[tokio::test]
    async fn what_others_may_need_counts_until_they_are_gone() {
        let disk = Disk::new();
        let all = Arc::new(Quota::new(Some(2 * SIZE)));
        let allowance = || Allowance {
            budget: Arc::new(Budget::new(None, Arc::clone(&all))),
            room: Arc::new(Room::endless()),
        };
        let two = [allowance(), allowance()].map(freeze);
        disk.preserve(&two, 0..5).await;
        assert_eq!(two.each_ref().map(|s| kept(s).len()), [5, 5]);
        let [one, other] = two;
        drop(other);
        disk.preserve(&[Arc::clone(&one)], 5..6).await;
        assert_eq!(kept(&one).len(), 16);
    }

    #[tokio::test]
    async fn one_snapshot_that_has_no_use_for_it_is_enough() {
        let disk = Disk::new();
        let first = freeze(endless());
        disk.preserve(&[Arc::clone(&first)], 0..4).await;
        let both = [first, freeze(endless())];
        disk.preserve(&both, 4..5).await;
        assert_eq!(both.each_ref().map(|s| kept(s).len()), [5, 1]);
    }

    #[tokio::test]
    async fn what_cannot_be_copied_ahead_harms_nobody() {
        for on_error in [OnError::BreakBackup, OnError::FailGuestWrite] {
            let mut disk = Disk::new();
            disk.image.unreadable = Some(9);
            let snapshots = [freeze_on(endless(), on_error)];
            disk.preserve(&snapshots, 0..6).await;
            assert!(!snapshots[0].is_over());
            assert!(kept(&snapshots[0]).into_iter().eq(0..6));
            // It is not tried again, where it would succeed either.
            disk.preserve(&snapshots, 16..21).await;
            assert_eq!(kept(&snapshots[0]).len(), 11);
        }
    }

    const MIB: u64 = 1 << 20;
    /// Two stretches and the beginning of a third.
    const SIZE: u64 = 38 * GRANULE;

    fn endless() -> Allowance {
        Terms::endless().allowance
    }

    fn kept(snapshot: &Snapshot<InMemory>) -> Vec<u64> {
        let all = 0..SIZE / GRANULE;
        all.filter(|granule| snapshot.kept(*granule) != Kept::Not)
            .collect()
    }

    struct Free(u64);

    impl FreeSpace for Free {
        fn free(&self) -> io::Result<u64> {
            Ok(self.0)
        }
    }

    struct Disk {
        image: Memory,
        claims: Claims,
    }

    impl Disk {
        fn new() -> Self {
            Self {
                image: Memory::new(|at| 1 + at as u8 % 251),
                claims: Claims::default(),
            }
        }

        async fn preserve(
            &self,
            snapshots: &[Arc<Snapshot<InMemory>>],
            granules: impl IntoIterator<Item = u64>,
        ) {
            for granule in granules {
                let range = granule * GRANULE..(granule + 1) * GRANULE;
                let done = preserve(&range, &self.image, snapshots, &self.claims, &Unpaced);
                done.await.unwrap();
            }
        }
    }

    fn freeze(allowance: Allowance) -> Arc<Snapshot<InMemory>> {
        freeze_on(allowance, OnError::BreakBackup)
    }

    fn freeze_on(allowance: Allowance, on_error: OnError) -> Arc<Snapshot<InMemory>> {
        let pages = MemoryPages::default;
        let live = EraMap::new(SIZE, Granularity::DEFAULT, Salt::default(), pages());
        let files = SnapshotFiles {
            scratch: Memory::new(|_| 0),
            states: pages(),
            second: pages(),
            eras: pages(),
        };
        let terms = Terms {
            allowance,
            on_error,
        };
        let frozen_in = Era::from_number(2);
        Arc::new(Snapshot::new(Arc::new(live), frozen_in, files, terms, 1).unwrap())
    }

    struct InMemory;

    impl World for InMemory {
        type Image = Memory;
        type Scratch = Memory;
        type Pages = MemoryPages;
        type Pace = Unpaced;
    }

    struct Memory {
        contents: Mutex<Vec<u8>>,
        /// A granule that cannot be read.
        unreadable: Option<u64>,
    }

    impl Memory {
        fn new(byte: impl Fn(u64) -> u8) -> Self {
            Self {
                contents: Mutex::new((0..SIZE).map(byte).collect()),
                unreadable: None,
            }
        }

        fn contents(&self) -> Vec<u8> {
            self.contents.lock().unwrap().clone()
        }
    }

    impl Storage for Memory {
        fn size(&self) -> u64 {
            SIZE
        }

        async fn read(&self, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
            let range = offset..offset + buffer.len() as u64;
            if self
                .unreadable
                .is_some_and(|g| range.contains(&(g * GRANULE)))
            {
                return Err(io::ErrorKind::InvalidData.into());
            }
            let contents = self.contents.lock().unwrap();
            buffer.copy_from_slice(&contents[range.start as usize..range.end as usize]);
            Ok(())
        }

        async fn write(&self, offset: u64, data: &Bytes) -> io::Result<()> {
            let range = offset as usize..offset as usize + data.len();
            self.contents.lock().unwrap()[range].copy_from_slice(data);
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
}
