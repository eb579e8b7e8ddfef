//! What has changed although nobody wrote it here is marked as what guests write.

use std::io;
use std::ops::Range;

use scratch::World;

use super::Disk;

impl<W: World> Disk<W> {
    /// Marks `changed`, ranges in order, in the era that is current, durably. Guests go on meanwhile.
    ///
    /// A server that is killed leaves some of it marked, which says too much and never too little.
    pub async fn mark_changed(
        &self,
        changed: impl IntoIterator<Item = Range<u64>>,
    ) -> io::Result<()> {
        self.mark_all(changed).await?;
        self.sync_tracking().await
    }

    /// The same, which is durable only where regions are active.
    pub(super) async fn mark_all(
        &self,
        changed: impl IntoIterator<Item = Range<u64>>,
    ) -> io::Result<()> {
        let Some(intents) = &self.intents else {
            let pass = self.gate.enter().await;
            for range in changed {
                self.mark(&range, &pass).await?;
            }
            return Ok(());
        };
        let pieces = |range| intents.regions().pieces(range, REGIONS_AT_ONCE);
        let mut pieces = changed.into_iter().flat_map(pieces).peekable();
        while let Some(first) = pieces.next() {
            // What lies in the same regions shares one sync.
            let is_near = |piece: &Range<u64>| {
                let whole = first.start..piece.end;
                intents
                    .regions()
                    .pieces(whole, REGIONS_AT_ONCE)
                    .nth(1)
                    .is_none()
            };
            let mut near = vec![first.clone()];
            while let Some(piece) = pieces.next_if(is_near) {
                near.push(piece);
            }
            let all = first.start..near[near.len() - 1].end;
            let inside = intents.enter(&all, &self.map, &self.pace).await?;
            for piece in near {
                // A freeze waits for one of them, and not for all.
                let pass = self.gate.enter().await;
                self.mark(&piece, &pass).await?;
            }
            drop(inside);
            if intents.regions().active() > super::ACTIVE_MAX {
                self.retire_some().await?;
            }
        }
        Ok(())
    }
}

/// How many regions are marked at a time: so few that a guest that enters one of its own meanwhile
/// does not wait for long, and no more than are retired at once.
const REGIONS_AT_ONCE: u64 = 256;
