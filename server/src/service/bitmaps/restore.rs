//! Bitmaps as the journals of the disks tell them.

use std::collections::BTreeSet;
use std::sync::Arc;

use bitmap::{BitGranularity, DirtySet, Era};

use uuid::Uuid;

use super::{Bitmap, Bitmaps, InImage};
use crate::image::Stored;
use crate::names::Name;
use crate::served::ServedDisk;
use crate::state::{BitmapRecord, BitsId};

/// The bitmaps that are stored in the image of a disk, and the persistent ones of ours as they were.
pub(in crate::service) fn load_bitmaps(disk: &ServedDisk, records: &[BitmapRecord]) -> Vec<Bitmap> {
    let own = records.iter().filter_map(|record| load(disk, record));
    let mut bitmaps: Vec<Bitmap> = disk.stored.iter().map(|it| in_image(disk, it)).collect();
    for bitmap in own {
        // Ours was made when the image had none of that name: it is the one that clients know.
        if let Some(at) = bitmaps.iter().position(|known| known.name == bitmap.name) {
            let (disk, bitmap) = (&disk.name, &bitmap.name);
            tracing::warn!(%disk, bitmap, "a bitmap in the image is hidden by one of that name");
            bitmaps.remove(at);
        }
        bitmaps.push(bitmap);
    }
    bitmaps
}

fn in_image(disk: &ServedDisk, stored: &Stored) -> Bitmap {
    let dirty = stored
        .bits
        .clone()
        .map(|bits| DirtySet { bits, since: None });
    Bitmap {
        name: stored.name.clone(),
        uuid: Uuid::new_v4(),
        granularity: stored.granularity,
        persistent: false,
        revision: 0,
        // It was read by this server, whatever happened to the image before.
        era: disk.disk.tracking().era,
        dirty,
        in_image: Some(if stored.recording {
            InImage::Recording
        } else {
            InImage::Idle
        }),
    }
}

/// A record of which nothing can be made is not there: what it names is not a bitmap of ours.
fn load(disk: &ServedDisk, record: &BitmapRecord) -> Option<Bitmap> {
    let granularity = BitGranularity::new(record.granularity).ok()?;
    let id = BitsId {
        uuid: record.uuid,
        revision: record.revision,
    };
    let bits = disk.bits.load(id, granularity);
    let bitmap = Bitmap {
        name: record.name.clone(),
        uuid: record.uuid,
        granularity,
        persistent: true,
        revision: record.revision,
        era: Era::from_number(record.era),
        dirty: bits.map(|bits| DirtySet {
            bits: Arc::new(bits),
            since: record.since.map(Era::from_number),
        }),
        in_image: None,
    };
    if let Err(reason) = bitmap.dirty(disk) {
        tracing::warn!(disk = %disk.name, bitmap = record.name, reason, "a bitmap is inconsistent");
    }
    Some(bitmap)
}

impl Bitmaps {
    /// Takes in those of one disk more.
    pub(in crate::service) fn join(&mut self, other: Self) {
        self.0.extend(other.0);
    }

    /// Leaves out those of a disk.
    pub(in crate::service) fn leave_out(&mut self, disk: &Name) {
        self.0.remove(disk);
    }

    /// Removes the files of each disk that no bitmap has.
    pub(in crate::service) fn remove_leftovers<'a>(
        &self,
        disks: impl Iterator<Item = &'a Arc<ServedDisk>>,
    ) {
        for disk in disks {
            let name = &disk.name;
            let persistent = self.of(name.as_str()).iter().filter(|b| b.persistent);
            let known: BTreeSet<BitsId> = persistent.map(Bitmap::bits_id).collect();
            if let Err(error) = disk.bits.remove_others(&known) {
                tracing::warn!(disk = %name, %error, "files of bitmaps are left behind");
            }
        }
    }
}
