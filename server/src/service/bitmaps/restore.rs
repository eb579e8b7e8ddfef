//! Bitmaps as the journals of the disks tell them.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::sync::Arc;

use bitmap::{BitGranularity, DirtySet, Era};
use uuid::Uuid;

use super::{Bitmap, Bitmaps};
use crate::names::Name;
use crate::served::{Past, ServedDisk};
use crate::service::Service;
use crate::state::{BitmapRecord, BitmapsRecord, BitsId, Record};

/// What the journals say of bitmaps.
pub(in crate::service) struct Restored {
    /// Those that are there.
    pub(in crate::service) bitmaps: Bitmaps,
    /// What had not been decided when the last server ended, and has to be recorded first of all.
    pub(in crate::service) settlements: Vec<Settlement>,
}

/// Whether what a command recorded counts on a disk.
pub(in crate::service) struct Settlement {
    /// The disk.
    pub(in crate::service) disk: Name,
    /// The command.
    pub(in crate::service) uuid: Uuid,
    /// Whether it does.
    pub(in crate::service) counts: bool,
}

/// What all the journals say together.
#[derive(Default)]
struct Told<'a> {
    commands: BTreeMap<&'a Name, Vec<&'a BitmapsRecord>>,
    settled: BTreeMap<Uuid, BTreeMap<&'a Name, bool>>,
}

/// The persistent bitmaps as they were.
pub(in crate::service) fn restore(
    disks: &BTreeMap<Name, Arc<ServedDisk>>,
    pasts: &BTreeMap<Name, Past>,
) -> Restored {
    let mut told = Told::default();
    for (disk, past) in pasts {
        for record in &past.records {
            match record {
                Record::Bitmaps(record) => told.commands.entry(disk).or_default().push(record),
                Record::BitmapsSettled { uuid, counts } => {
                    told.settled.entry(*uuid).or_default().insert(disk, *counts);
                }
                _ => {}
            }
        }
    }
    let mut restored = Restored {
        bitmaps: Bitmaps::default(),
        settlements: Vec::new(),
    };
    for (name, commands) in &told.commands {
        let mut records: Vec<&BitmapRecord> = Vec::new();
        for command in commands {
            let counts = told.counts(name, command, disks);
            if told.own_word(name, command).is_none() && command.disks.len() > 1 {
                restored.settlements.push(Settlement {
                    disk: (*name).clone(),
                    uuid: command.uuid,
                    counts,
                });
            }
            if counts {
                apply(&mut records, command);
            }
        }
        let disk = &disks[*name];
        let bitmaps = records.into_iter().filter_map(|record| load(disk, record));
        restored.bitmaps.restore((*name).clone(), bitmaps.collect());
    }
    restored
}

impl Told<'_> {
    fn own_word(&self, disk: &Name, command: &BitmapsRecord) -> Option<bool> {
        self.settled.get(&command.uuid)?.get(disk).copied()
    }

    /// Whether what `disk` has of a command counts: as it says itself; else as any other disk of it
    /// says; else if all of them have it.
    fn counts(
        &self,
        disk: &Name,
        command: &BitmapsRecord,
        disks: &BTreeMap<Name, Arc<ServedDisk>>,
    ) -> bool {
        let any_word = || self.settled.get(&command.uuid)?.values().copied().next();
        let word = self.own_word(disk, command).or_else(any_word);
        word.unwrap_or_else(|| {
            let has_it = |uuid: &Uuid| {
                let mut found = self
                    .commands
                    .iter()
                    .filter(|(name, _)| disks[**name].uuid == *uuid);
                found.any(|(_, commands)| commands.iter().any(|c| c.uuid == command.uuid))
            };
            command.disks.iter().all(has_it)
        })
    }
}

fn apply<'a>(records: &mut Vec<&'a BitmapRecord>, command: &'a BitmapsRecord) {
    records.retain(|record| !command.removed.contains(&record.uuid));
    for changed in &command.changed {
        match records
            .iter_mut()
            .find(|record| record.uuid == changed.uuid)
        {
            Some(record) => *record = changed,
            None => records.push(changed),
        }
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
    };
    if let Err(reason) = bitmap.dirty(disk) {
        tracing::warn!(disk = %disk.name, bitmap = record.name, reason, "a bitmap is inconsistent");
    }
    Some(bitmap)
}

impl Service {
    /// Records what was found undecided, as it was decided; then removes what nobody needs.
    pub(in crate::service) async fn settle_bitmaps_found(&self) -> io::Result<()> {
        let undecided = std::mem::take(&mut *self.undecided.lock().expect("no one panics with it"));
        for Settlement { disk, uuid, counts } in undecided {
            let record = Record::BitmapsSettled { uuid, counts };
            self.disks[&disk].record(&record).await?;
        }
        self.book().bitmaps.remove_leftovers(&self.disks);
        Ok(())
    }
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
