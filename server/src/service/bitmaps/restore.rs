//! Bitmaps as the journals of the disks tell them.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use bitmap::{BitGranularity, DirtySet, Era};

use super::{Bitmap, Bitmaps};
use crate::names::Name;
use crate::served::ServedDisk;
use crate::state::{BitmapRecord, BitsId};

/// The persistent bitmaps of a disk as they were.
pub(in crate::service) fn load_bitmaps(disk: &ServedDisk, records: &[BitmapRecord]) -> Vec<Bitmap> {
    records
        .iter()
        .filter_map(|record| load(disk, record))
        .collect()
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
    };
    if let Err(reason) = bitmap.dirty(disk) {
        tracing::warn!(disk = %disk.name, bitmap = record.name, reason, "a bitmap is inconsistent");
    }
    Some(bitmap)
}

impl Bitmaps {
    /// Removes the files of each disk that no bitmap has.
    pub(in crate::service) fn remove_leftovers(&self, disks: &BTreeMap<Name, Arc<ServedDisk>>) {
        for (name, disk) in disks {
            let persistent = self.of(name.as_str()).iter().filter(|b| b.persistent);
            let known: BTreeSet<BitsId> = persistent.map(Bitmap::bits_id).collect();
            if let Err(error) = disk.bits.remove_others(&known) {
                tracing::warn!(disk = %name, %error, "files of bitmaps are left behind");
            }
        }
    }
}
