//! A disk becomes larger while it is being written.
//!
//! What each crash point leaves behind stands at [`Disk::grow`].

use std::io;

use block::Storage;
use scratch::{Pace, Step, World};
use thiserror::Error;

use super::Disk;

/// From which size to which, in bytes.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Growth {
    /// What clients know.
    pub from: u64,
    /// What they are to know.
    pub to: u64,
}

/// Where it is recorded that a disk grows. Each of these returns when it is durable.
pub trait GrowthRecord {
    /// From here on the image may have either size, and neither is anybody else's doing.
    fn begins(&mut self, growth: Growth) -> impl Future<Output = io::Result<()>>;

    /// The image has the new size, and what is new is marked.
    fn ends(&mut self, growth: Growth) -> impl Future<Output = io::Result<()>>;

    /// The image has not been enlarged.
    fn undone(&mut self) -> impl Future<Output = io::Result<()>>;
}

/// Why a disk has not grown.
#[derive(Debug, Error)]
pub enum NotGrown {
    /// Everything is as it was.
    #[error("{0}")]
    Refused(io::Error),
    /// The image has been enlarged, and nobody is told. The same again ends it, or the next start.
    #[error("{0}")]
    Unfinished(io::Error),
}

impl<W: World> Disk<W> {
    /// Makes the disk `size` bytes large, which is more than it has. Only one instant may be taken,
    /// and one of these be done, at a time; and an instant just before, so that what is new carries
    /// an era that no checkpoint and no open backup has.
    ///
    /// Guests go on meanwhile, within the old size. Who asks for the size is told the new one when
    /// this has succeeded, and open instants keep the old one.
    ///
    /// A server that is killed, or loses power, leaves
    ///
    /// 1. after there is room: a map and a table that are longer than the disk needs;
    /// 2. after it is recorded: the image at the old size, and the next start forgets the record; or
    /// 3. at the new one, and the next start marks all that is new, whatever is marked already;
    /// 4. after the end is recorded: a disk of the new size, of which nobody was told yet.
    ///
    /// In 2 and 3 nothing is written beyond the old size.
    pub async fn grow(&self, size: u64, record: &mut impl GrowthRecord) -> Result<(), NotGrown> {
        let growth = Growth {
            from: self.size(),
            to: size,
        };
        let begun = async {
            self.make_room(size).await?;
            record.begins(growth).await
        };
        begun.await.map_err(NotGrown::Refused)?;
        self.pace.step(Step::Grow).await;
        self.issuing();
        if let Err(error) = self.image.grow(size).await {
            // What cannot be taken back is so at the next start.
            let _ = record.undone().await;
            return Err(NotGrown::Refused(error));
        }
        let finished = async {
            // Before the record ends that tells a size that is lost from one that someone changed.
            self.flush().await?;
            self.mark_new(growth).await?;
            self.sync_tracking().await?;
            record.ends(growth).await
        };
        finished.await.map_err(NotGrown::Unfinished)?;
        self.pace.step(Step::Offer).await;
        self.map.grow(size);
        Ok(())
    }

    /// Makes the map and the table as long as a disk of `size` bytes needs, durably: whoever finds
    /// the image at that size finds them so.
    async fn make_room(&self, size: u64) -> io::Result<()> {
        self.map.make_room(size)?;
        if let Some(intents) = &self.intents {
            intents.regions().make_room(self.map.eras().page_count())?;
            // The image changes too, if only in its size.
            intents.may_issue(&self.pace).await?;
        }
        self.sync_tracking().await
    }

    /// Marks what is new, and the chunk in which the disk ended, as guests mark what they write.
    async fn mark_new(&self, growth: Growth) -> io::Result<()> {
        let chunk = self.map.granularity().bytes();
        let new = growth.from / chunk * chunk..growth.to;
        self.mark_all([new]).await
    }
}
