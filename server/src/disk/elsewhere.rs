//! Disks whose storage is not in our hands alone.
//!
//! Storage elsewhere may still perform a write that was given up, now or much later. Such a range is
//! marked in every era and preserved for every instant, as if a guest were writing it all the time. And
//! it may lose, while this server is killed, what was written and not synced: so everything before an
//! instant is durable before anybody is told of it, and after a kill what was being written counts as
//! changed.

use std::io;
use std::ops::Range;

use block::Storage;
use scratch::World;

use super::{Change, Disk, pieces};

impl<W: World> Disk<W> {
    /// To be done when an era has begun, before anybody is told of it.
    ///
    /// What was given up while an era lasts is marked in it by the write itself, which does not end
    /// before it is known to be given up; so is what it overwrites preserved. What lands between the
    /// instant and this is of the instant: nobody has read that yet.
    pub(super) async fn cover_instant(&self) -> io::Result<()> {
        if !self.image.is_elsewhere() {
            return Ok(());
        }
        self.flush().await?;
        self.cover_unsettled().await
    }

    /// Marks and preserves, as for a write, what may change although nobody writes it.
    pub async fn cover_unsettled(&self) -> io::Result<()> {
        // Beyond the size that clients know nothing is kept, nor written.
        let size = self.size();
        for Range { start, end } in self.image.unsettled() {
            for piece in pieces(start..end.min(size)) {
                self.change(piece, Change::ByItself).await?;
            }
        }
        Ok(())
    }

    /// How much may change although nobody writes it.
    pub fn unsettled_bytes(&self) -> u64 {
        let ranges = self.image.unsettled().into_iter();
        ranges.map(|range| range.end - range.start).sum()
    }

    /// What is in active regions: nobody knows whether all of it was durable.
    pub fn active_ranges(&self) -> Vec<Range<u64>> {
        let Some(intents) = &self.intents else {
            return Vec::new();
        };
        let (regions, size) = (intents.regions(), self.size());
        let ranges = regions.all_active().map(|region| regions.range(region));
        ranges
            .map(|range| range.start.min(size)..range.end.min(size))
            .filter(|range| !range.is_empty())
            .collect()
    }

    /// Marks everything in active regions. Open instants need none of it: what they do not keep was
    /// durable before anybody heard of them.
    pub async fn mark_active(&self) -> io::Result<()> {
        for range in self.active_ranges() {
            let pass = self.gate.enter().await;
            self.mark(&range, &pass).await?;
        }
        Ok(())
    }
}
