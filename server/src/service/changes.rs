//! What has changed on a live disk, told piece by piece.
//!
//! Guests write on meanwhile. Each piece has at least what had changed when the first was asked for:
//! together they are a superset of one instant, and whoever needs exactly one takes a backup.

use std::ops::Range;
use std::sync::Arc;

use bitmap::{DirtySet, Era, Run};
use uuid::Uuid;

use super::bitmaps::{inconsistent, not_found};
use super::{Bitmap, Service, blocking};
use crate::failure::Failure;
use crate::files::CellPages;
use crate::names::Name;

/// Since what.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(crate) enum ChangesOf {
    /// A checkpoint, by name or uuid.
    Checkpoint(String),
    /// What a dirty bitmap has.
    Bitmap(String),
}

/// A piece of it.
#[derive(Clone, Debug)]
pub(crate) struct Changes {
    /// The size of the disk, in bytes.
    pub(crate) size: u64,
    /// How much of the disk is dirty or clean together, in bytes.
    pub(crate) granularity: u64,
    /// The checkpoint or the bitmap.
    pub(crate) uuid: Uuid,
    /// Of a bitmap: another number, and it has been changed by a command.
    pub(crate) revision: Option<u64>,
    /// What is dirty: ranges in order.
    pub(crate) dirty: Vec<Range<u64>>,
    /// Up to where this tells, if that is not the end.
    pub(crate) next: Option<u64>,
}

/// What it is told from.
enum Known {
    Since(Era),
    Set(DirtySet),
}

impl Service {
    /// What is dirty on `disk` from `offset` on.
    pub(crate) async fn changes(
        &self,
        disk: &Name,
        of: ChangesOf,
        offset: u64,
    ) -> Result<Changes, Failure> {
        let disk = self.disk(disk)?;
        let map = Arc::clone(disk.disk.map());
        let (known, uuid, revision, granularity) = match of {
            ChangesOf::Checkpoint(name) => {
                let (era, uuid) = self.checkpoint_on(&name, &disk)?;
                if let Some(why) = disk.why_lost(era) {
                    let message = format!("everything counts as changed since '{name}': {why}");
                    return Err(Failure::new("checkpoint-lost", message));
                }
                (Known::Since(era), uuid, None, map.granularity().bytes())
            }
            ChangesOf::Bitmap(name) => {
                let book = self.book();
                let found: Option<&Bitmap> = book.bitmaps.find(disk.name.as_str(), &name);
                let bitmap = found.ok_or_else(|| not_found(&name))?;
                let dirty = bitmap.dirty(&disk).map_err(|_| inconsistent(&name))?;
                let granularity = bitmap.granularity.bytes();
                let revision = Some(bitmap.revision);
                (
                    Known::Set(dirty.clone()),
                    bitmap.uuid,
                    revision,
                    granularity,
                )
            }
        };
        let size = map.size();
        if offset > size {
            let message = format!("{offset} is behind the end of the disk, which has {size} bytes");
            return Err(Failure::new("bad-argument", message));
        }
        let (dirty, next) = blocking(move || known.tell(&map, offset..size)).await?;
        Ok(Changes {
            size,
            granularity,
            uuid,
            revision,
            dirty,
            next,
        })
    }
}

impl Known {
    fn tell(
        &self,
        map: &bitmap::EraMap<CellPages>,
        range: Range<u64>,
    ) -> (Vec<Range<u64>>, Option<u64>) {
        match self {
            Self::Since(era) => collect(map.changes(range, *era)),
            Self::Set(dirty) => collect(dirty.runs(map, range)),
        }
    }
}

fn collect(runs: impl Iterator<Item = Run>) -> (Vec<Range<u64>>, Option<u64>) {
    let mut dirty = Vec::new();
    for run in runs.filter(|run| run.dirty) {
        if dirty.len() == EXTENTS_MAX {
            return (dirty, Some(run.range.start));
        }
        dirty.push(run.range);
    }
    (dirty, None)
}

/// In one answer: some 800 KB of JSON at most.
const EXTENTS_MAX: usize = 32_768;
