use std::io;
use std::ops::Range;
use std::sync::Arc;

use bitmap::{DirtySet, Era, Run};
use block::{Extent, Storage};
use thiserror::Error;

use crate::allocation::allocation;
use crate::granules::{bytes, granules};
use crate::preserved::Kept;
use crate::snapshot::Snapshot;
use crate::sync::{Ordering, fence};
use crate::world::{Pace, Step, World};

/// Reads a disk as it was at the instant of its snapshot.
pub struct Frozen<W: World> {
    image: Arc<W::Image>,
    snapshot: Arc<Snapshot<W>>,
    pace: Arc<W::Pace>,
}

/// Why the past cannot be read.
#[derive(Debug, Error)]
pub enum FrozenError {
    /// Something of it was overwritten and is not kept.
    #[error("the snapshot is broken: {0}")]
    Broken(String),
    /// Nobody keeps it any more.
    #[error("the snapshot has ended")]
    Ended,
    /// The disk or the scratch failed.
    #[error(transparent)]
    Io(#[from] io::Error),
}

impl<W: World> Frozen<W> {
    /// The past that `snapshot` keeps of the disk on `image`.
    pub fn new(image: Arc<W::Image>, snapshot: Arc<Snapshot<W>>, pace: Arc<W::Pace>) -> Self {
        Self {
            image,
            snapshot,
            pace,
        }
    }

    /// The size of the disk at that instant, in bytes.
    pub fn size(&self) -> u64 {
        self.snapshot.size()
    }

    /// What keeps it.
    pub fn snapshot(&self) -> &Arc<Snapshot<W>> {
        &self.snapshot
    }

    /// Fills `buffer` with what was at `offset`.
    pub async fn read(&self, offset: u64, buffer: &mut [u8]) -> Result<(), FrozenError> {
        let range = offset..offset + buffer.len() as u64;
        self.snapshot.whole()?;
        self.read_disk(&range, buffer).await?;
        // What the disk returned was read before the bits are.
        fence(Ordering::Acquire);
        self.pace.step(Step::ReadPast).await;
        for run in self.snapshot.preserved.runs(granules(&range)) {
            let part = clamp(&bytes(&run.granules, self.size()), &range);
            let target = &mut buffer[(part.start - offset) as usize..(part.end - offset) as usize];
            match run.kept {
                Kept::Not => {}
                Kept::Data => self.read_kept(part.start, target).await?,
                Kept::Zero | Kept::Hole => target.fill(0),
            }
        }
        // What scratch returned was read before it is asked whether that was still there.
        fence(Ordering::Acquire);
        self.snapshot.whole()
    }

    /// Reads what the disk has of `range` today: all but long stretches that are kept, which it lacks
    /// anyway. What is kept stays kept, so whoever looks again finds these.
    async fn read_disk(&self, range: &Range<u64>, buffer: &mut [u8]) -> io::Result<()> {
        let mut at = range.start;
        for run in self.snapshot.preserved.runs(granules(range)) {
            let part = clamp(&bytes(&run.granules, self.size()), range);
            if run.kept != Kept::Not && part.end - part.start >= LEFT_OUT_MIN {
                self.read_part(at..part.start, range, buffer).await?;
                at = part.end;
            }
        }
        self.read_part(at..range.end, range, buffer).await
    }

    async fn read_part(
        &self,
        part: Range<u64>,
        range: &Range<u64>,
        buffer: &mut [u8],
    ) -> io::Result<()> {
        let within = |offset: u64| (offset - range.start) as usize;
        let target = &mut buffer[within(part.start)..within(part.end)];
        if target.is_empty() {
            return Ok(());
        }
        self.image.read(part.start, target).await
    }

    async fn read_kept(&self, offset: u64, target: &mut [u8]) -> Result<(), FrozenError> {
        let read = self.snapshot.scratch.read(offset, target).await;
        if read.is_err() {
            // Perhaps only because it has gone.
            self.snapshot.whole()?;
        }
        Ok(read?)
    }

    /// What of `range` took space then: adjacent extents from its start on, at least one and at most
    /// `limit`, which is not zero.
    pub async fn extents(
        &self,
        range: Range<u64>,
        limit: usize,
    ) -> Result<Vec<Extent>, FrozenError> {
        self.snapshot.whole()?;
        let today = allocation(&*self.image, bytes(&granules(&range), self.size())).await?;
        fence(Ordering::Acquire);
        self.pace.step(Step::ReadPast).await;
        let mut then: Vec<Extent> = Vec::with_capacity(today.len());
        'told: for extent in today {
            for run in self.snapshot.preserved.runs(granules(&extent.range)) {
                let part = clamp(&bytes(&run.granules, self.size()), &range);
                let hole = match run.kept {
                    Kept::Not => extent.hole,
                    Kept::Hole => true,
                    Kept::Data | Kept::Zero => false,
                };
                let told = then.len();
                match then.last_mut() {
                    Some(last) if last.hole == hole => last.range.end = part.end,
                    _ if told == limit => break 'told,
                    _ => then.push(Extent { range: part, hole }),
                }
            }
        }
        self.snapshot.whole()?;
        Ok(then)
    }

    /// What of `range` had changed in `since` or later: adjacent runs, covering all of it, unless
    /// there are more than `limit`.
    pub fn changes(
        &self,
        range: Range<u64>,
        since: Era,
        limit: usize,
    ) -> Result<Vec<Run>, FrozenError> {
        self.snapshot.whole()?;
        let runs = self
            .snapshot
            .eras
            .changes(range, since)
            .take(limit)
            .collect();
        self.snapshot.whole()?;
        Ok(runs)
    }

    /// What of `range` was dirty in `set`, as it was at the instant: as [`changes`](Self::changes).
    pub fn dirty(
        &self,
        range: Range<u64>,
        set: &DirtySet,
        limit: usize,
    ) -> Result<Vec<Run>, FrozenError> {
        self.snapshot.whole()?;
        let runs = set.frozen_runs(&self.snapshot.eras, range);
        let runs = runs.take(limit).collect();
        self.snapshot.whole()?;
        Ok(runs)
    }
}

impl<W: World> Clone for Frozen<W> {
    fn clone(&self) -> Self {
        Self {
            image: Arc::clone(&self.image),
            snapshot: Arc::clone(&self.snapshot),
            pace: Arc::clone(&self.pace),
        }
    }
}

/// Reading less costs less than the call that it saves.
const LEFT_OUT_MIN: u64 = 32 << 10;

fn clamp(range: &Range<u64>, within: &Range<u64>) -> Range<u64> {
    range.start.max(within.start)..range.end.min(within.end)
}
