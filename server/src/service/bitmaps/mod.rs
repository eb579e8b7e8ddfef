//! Dirty bitmaps, as QEMU has them.
//!
//! A bitmap is bits and, while it records, the era since which it does: what is dirty is the bits and
//! whatever the era map of the disk says has changed since. So a guest's write costs the same for
//! none and for a thousand of them. Commands work out what the bitmaps become ([`Draft`]), take one
//! instant for all of it, and replace what was there; a bitmap is never changed in its place.

mod change;
mod draft;
mod restore;
#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use bitmap::{BitGranularity, DirtySet, Era};
use uuid::Uuid;

pub(super) use draft::granularity_on;
pub(crate) use draft::{Action, Addition, Source};
pub(super) use restore::load_bitmaps;

use super::{BeginRequest, Service};
use crate::failure::Failure;
use crate::names::Name;
use crate::served::ServedDisk;
use crate::state::{BitmapRecord, BitsId, FrozenBitmapRecord};

/// A named set of dirty blocks of one disk.
#[derive(Clone, Debug)]
pub(crate) struct Bitmap {
    /// Its name: 1 to 1,023 bytes of any text, as in QEMU.
    pub(crate) name: String,
    /// Its identity, which is never used again.
    pub(crate) uuid: Uuid,
    /// How much of the disk one bit stands for.
    pub(crate) granularity: BitGranularity,
    /// Whether it outlives the server.
    pub(crate) persistent: bool,
    /// How often it was changed, which tells its files apart.
    pub(super) revision: u64,
    /// The era that began with its last change.
    pub(super) era: Era,
    /// What is dirty, or why that is lost.
    dirty: Result<DirtySet, String>,
    /// It is the image's own, and cannot be changed.
    pub(crate) in_image: Option<InImage>,
}

/// What a bitmap that is stored in an image does while whoever owns the image runs.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum InImage {
    /// It records.
    Recording,
    /// It does not.
    Idle,
}

impl Bitmap {
    /// What is dirty, or why that is lost. `disk` is its disk.
    pub(crate) fn dirty(&self, disk: &ServedDisk) -> Result<&DirtySet, String> {
        let dirty = self.dirty.as_ref().map_err(Clone::clone)?;
        match disk.why_lost(dirty.since.unwrap_or(self.era)) {
            Some(why) => Err(why),
            None => Ok(dirty),
        }
    }

    fn bits_id(&self) -> BitsId {
        BitsId {
            uuid: self.uuid,
            revision: self.revision,
        }
    }

    fn record(&self) -> BitmapRecord {
        let since = self.dirty.as_ref().ok().and_then(|dirty| dirty.since);
        BitmapRecord {
            name: self.name.clone(),
            uuid: self.uuid,
            granularity: self.granularity.bytes(),
            revision: self.revision,
            era: self.era.number(),
            since: since.map(Era::number),
        }
    }
}

/// A bitmap as it was when a backup began, with whose end it ends.
#[derive(Clone, Debug)]
pub(crate) struct FrozenBitmap {
    /// Its name.
    pub(crate) name: String,
    /// Its identity.
    pub(crate) uuid: Uuid,
    /// What was dirty, together with the eras of the instant.
    pub(crate) dirty: DirtySet,
}

impl FrozenBitmap {
    pub(super) fn record(&self) -> FrozenBitmapRecord {
        FrozenBitmapRecord {
            name: self.name.clone(),
            uuid: self.uuid,
            granularity: self.dirty.bits.granularity().bytes(),
            since: self.dirty.since.map(Era::number),
        }
    }
}

/// The bitmaps of all disks.
#[derive(Default)]
pub(crate) struct Bitmaps(BTreeMap<Name, Vec<Bitmap>>);

impl Bitmaps {
    /// Those of one disk, oldest first.
    pub(crate) fn of(&self, disk: &str) -> &[Bitmap] {
        self.0.get(disk).map_or(&[], Vec::as_slice)
    }

    /// The one of this name.
    pub(super) fn find(&self, disk: &str, name: &str) -> Option<&Bitmap> {
        self.of(disk).iter().find(|bitmap| bitmap.name == name)
    }
}

impl Service {
    /// The bitmaps that an open backup serves: nothing can be done to them until it ends.
    pub(crate) fn busy_bitmaps(&self) -> BTreeSet<Uuid> {
        let book = self.book();
        let parts = book.backups.iter().flat_map(|open| open.disks.values());
        parts
            .flat_map(|part| part.bitmaps.iter().map(|bitmap| bitmap.uuid))
            .collect()
    }

    /// What a backup of `disks` is to serve of the bitmaps that `request` names, disk by disk. Each
    /// of them is on at least one.
    pub(super) fn bitmaps_to_freeze(
        &self,
        request: &BeginRequest,
        disks: &[Arc<ServedDisk>],
    ) -> Result<BTreeMap<Name, Vec<FrozenBitmap>>, Failure> {
        let busy = self.busy_bitmaps();
        let book = self.book();
        let mut frozen: BTreeMap<Name, Vec<FrozenBitmap>> = BTreeMap::new();
        let wanted: BTreeSet<&String> = request.bitmaps.iter().flatten().collect();
        for name in wanted {
            let made = request.checkpoint.as_ref().map(Name::as_str);
            if made == Some(name.as_str()) || book.checkpoint(name).is_some() {
                return Err(ambiguous(name, "a checkpoint"));
            }
            let mut is_known = false;
            for disk in disks {
                let base = name.strip_prefix("backup-");
                if request.since.is_some() && base == Some(disk.name.as_str()) {
                    return Err(ambiguous(
                        name,
                        "another name for what changed since the base",
                    ));
                }
                let Some(bitmap) = book.bitmaps.find(disk.name.as_str(), name) else {
                    continue;
                };
                is_known = true;
                if busy.contains(&bitmap.uuid) && bitmap.in_image.is_none() {
                    return Err(in_use(name));
                }
                let dirty = bitmap.dirty(disk).map_err(|_| inconsistent(name))?.clone();
                let uuid = bitmap.uuid;
                let name = name.clone();
                let bitmap = FrozenBitmap { name, uuid, dirty };
                frozen.entry(disk.name.clone()).or_default().push(bitmap);
            }
            if !is_known {
                return Err(not_found(name).hint("none of the backup's disks has it"));
            }
        }
        Ok(frozen)
    }
}

pub(super) fn not_found(name: &str) -> Failure {
    Failure::new("unknown-bitmap", format!("Dirty bitmap '{name}' not found"))
}

fn read_only(name: &str) -> Failure {
    let message = format!("Bitmap '{name}' is readonly and cannot be modified");
    Failure::new("bitmap-read-only", message).hint(
        "it is stored in the image, which is never written; merge it into one of another name",
    )
}

fn in_use(name: &str) -> Failure {
    let message =
        format!("Bitmap '{name}' is currently in use by another operation and cannot be used");
    Failure::new("bitmap-in-use", message)
}

pub(super) fn inconsistent(name: &str) -> Failure {
    let message = format!("Bitmap '{name}' is inconsistent and cannot be used");
    Failure::new("bitmap-inconsistent", message)
        .hint("Try block-dirty-bitmap-remove to delete this bitmap from disk")
}

fn ambiguous(name: &str, other: &str) -> Failure {
    let message = format!("'{name}' is a dirty bitmap and {other}: a client could not tell which");
    Failure::new("ambiguous-bitmap", message)
        .hint("merge it into a bitmap of another name, and ask for that")
}
