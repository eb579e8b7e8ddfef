//! What a command on bitmaps does, once it is known that it may.
//!
//! What each crash point leaves behind, with one disk: files that no record names, which the next
//! start removes; after the record, the files from before, likewise. With several disks the record of
//! each names all of them, and counts when all have it or one says that it does; a start that finds
//! it undecided decides, and records that before it removes any file.

use std::collections::BTreeMap;
use std::io;
use std::sync::Arc;

use bitmap::{Bits, DirtySet, Era, EraMap};
use uuid::Uuid;

use super::draft::{Action, BitmapDraft, DiskDraft, Draft, Fate, Part, Recording};
use super::{Bitmap, Bitmaps};
use crate::disk::Freeze;
use crate::failure::Failure;
use crate::files::CellPages;
use crate::names::Name;
use crate::served::ServedDisk;
use crate::service::{Service, blocking, next_era, not_recorded, refuse_untrusted, still_known};
use crate::state::{BitmapsRecord, BitsId, Record};

/// What one disk's bitmaps become.
struct Outcome {
    disk: Arc<ServedDisk>,
    bitmaps: Vec<Bitmap>,
    /// What has to outlive the server.
    record: Option<BitmapsRecord>,
    /// Files to be written before the record, and those that nobody needs after it.
    files: Vec<(BitsId, Arc<Bits>)>,
    obsolete: Vec<BitsId>,
}

type Maps = BTreeMap<Name, Arc<EraMap<CellPages>>>;

impl Service {
    /// Does all of `actions` at one instant, each seeing what those before it did; or none.
    pub(crate) async fn change_bitmaps(&self, actions: Vec<Action>) -> Result<(), Failure> {
        if actions.len() > ACTIONS_MAX {
            let message = format!("a transaction has at most {ACTIONS_MAX} actions");
            return Err(Failure::new("bad-argument", message));
        }
        let _alone = self.instants.lock().await;
        self.change_bitmaps_alone(actions).await
    }

    /// The same, for who holds `instants`.
    pub(in crate::service) async fn change_bitmaps_alone(
        &self,
        actions: Vec<Action>,
    ) -> Result<(), Failure> {
        let mut draft = self.draft();
        for action in actions {
            draft.perform(action)?;
        }
        let drafts: BTreeMap<Name, DiskDraft> = draft
            .into_disks()
            .into_iter()
            .filter(|(_, disk)| disk.is_touched())
            .collect();
        let eras = self.begin_eras(&drafts).await?;
        // From here on every mark carries an era of which no bitmap knows yet, or a later look at
        // the map finds it: what is read below has all that changed before the instant.
        let disks = self.disks();
        let maps: Maps = disks
            .iter()
            .map(|(name, disk)| (name.clone(), Arc::clone(disk.disk.map())))
            .collect();
        let told: Vec<_> = drafts.values().flat_map(DiskDraft::told_by_maps).collect();
        let served = Arc::clone(&disks);
        let outcomes = blocking(move || outcomes(drafts, &eras, &served, &maps)).await?;
        // A write that went untracked before the instant has said so by now.
        for (name, since) in told {
            still_known(&disks[&name], since)?;
        }
        let outcomes = self.make_durable(outcomes).await?;
        let replaced = self.replace(outcomes);
        blocking(move || {
            for (disk, obsolete) in replaced {
                if let Err(error) = disk.bits.remove(&obsolete) {
                    tracing::warn!(disk = %disk.name, %error, "files of bitmaps are left behind");
                }
            }
        })
        .await
    }

    /// Shows everyone what became of the bitmaps, and returns what nobody needs any more.
    fn replace(&self, outcomes: Vec<Outcome>) -> Vec<(Arc<ServedDisk>, Vec<BitsId>)> {
        let mut book = self.book_mut();
        let replace = |outcome: Outcome| {
            book.bitmaps
                .restore(outcome.disk.name.clone(), outcome.bitmaps);
            (outcome.disk, outcome.obsolete)
        };
        outcomes.into_iter().map(replace).collect()
    }

    fn draft(&self) -> Draft {
        let busy = self.busy_bitmaps();
        let book = self.book();
        let disk = |(name, disk): (&Name, &Arc<ServedDisk>)| {
            let bitmaps = book.bitmaps.of(name.as_str()).iter();
            let bitmaps = bitmaps.map(|bitmap| (bitmap, bitmap.dirty(disk).is_ok()));
            let granularity = disk.disk.map().granularity().bytes();
            let draft = DiskDraft::new(disk.disk.size(), granularity, bitmaps, &busy);
            (name.clone(), draft)
        };
        Draft::new(self.disks().iter().map(disk).collect())
    }

    /// Begins an era, at one instant, on every disk where something begins or ends to record.
    async fn begin_eras(
        &self,
        drafts: &BTreeMap<Name, DiskDraft>,
    ) -> Result<BTreeMap<Name, Era>, Failure> {
        let (mut eras, mut freezes) = (BTreeMap::new(), Vec::new());
        let disks = self.disks();
        for name in drafts.keys().filter(|name| drafts[*name].needs_instant) {
            let disk = &disks[name];
            refuse_untrusted(disk)?;
            let tracking = disk.disk.tracking();
            let era = next_era(disk, &tracking)?;
            eras.insert(name.clone(), era);
            freezes.push(Freeze {
                disk: Arc::clone(&disk.disk),
                next: tracking.followed_by(era, None),
            });
        }
        if !freezes.is_empty() {
            self.freeze(freezes).await?;
        }
        Ok(eras)
    }

    /// Files first, then the records that name them. On an error neither counts, now or later.
    async fn make_durable(&self, outcomes: Vec<Outcome>) -> Result<Vec<Outcome>, Failure> {
        let (outcomes, stored) = blocking(move || {
            let stored = outcomes.iter().try_for_each(Outcome::store);
            (outcomes, stored)
        })
        .await?;
        let recorded = match stored {
            Ok(()) => record(&outcomes).await,
            failed => failed,
        };
        let Err((disk, error)) = recorded else {
            self.settle_bitmaps(&outcomes, true).await;
            return Ok(outcomes);
        };
        // A record that could not be made durable may be found all the same. It is undone; and
        // where that cannot be recorded either, its files are missing.
        self.settle_bitmaps(&outcomes, false).await;
        blocking(move || outcomes.iter().for_each(Outcome::discard)).await?;
        Err(not_recorded(&disk, &error))
    }

    async fn settle_bitmaps(&self, outcomes: &[Outcome], counts: bool) {
        let recorded = || outcomes.iter().filter(|outcome| outcome.record.is_some());
        let Some(first) = recorded().find_map(|outcome| outcome.record.as_ref()) else {
            return;
        };
        // The word of the only disk needs no other.
        if counts && first.disks.len() < 2 {
            return;
        }
        let uuid = first.uuid;
        let disks = recorded().map(|outcome| &outcome.disk.name);
        self.record_or_owe(disks, &Record::BitmapsSettled { uuid, counts })
            .await;
    }
}

async fn record(outcomes: &[Outcome]) -> Result<(), (Name, io::Error)> {
    for outcome in outcomes {
        if let Some(record) = &outcome.record {
            let record = Record::Bitmaps(Box::new(record.clone()));
            let recorded = outcome.disk.record(&record).await;
            recorded.map_err(|error| (outcome.disk.name.clone(), error))?;
        }
    }
    Ok(())
}

impl Outcome {
    fn store(&self) -> Result<(), (Name, io::Error)> {
        let files: Vec<_> = self.files.iter().map(|(id, bits)| (*id, &**bits)).collect();
        let stored = self.disk.bits.store(&files);
        stored.map_err(|error| (self.disk.name.clone(), error))
    }

    fn discard(&self) {
        let ids: Vec<_> = self.files.iter().map(|(id, _)| *id).collect();
        if let Err(error) = self.disk.bits.remove(&ids) {
            tracing::warn!(disk = %self.disk.name, %error, "files of bitmaps are left behind");
        }
    }
}

impl DiskDraft {
    fn is_touched(&self) -> bool {
        self.needs_instant || self.bitmaps.iter().any(|bitmap| bitmap.fate != Fate::Stays)
    }

    /// Which maps are to tell what changed, and since when.
    fn told_by_maps(&self) -> Vec<(Name, Era)> {
        let changing = self.bitmaps.iter().filter(|it| it.fate == Fate::Changes);
        let parts = changing.flat_map(|it| &it.parts);
        let told = parts.filter_map(|part| match part {
            Part::Bits(_) => None,
            Part::Changed(disk, since, _) => Some((disk.clone(), *since)),
        });
        told.collect()
    }
}

fn outcomes(
    drafts: BTreeMap<Name, DiskDraft>,
    eras: &BTreeMap<Name, Era>,
    disks: &BTreeMap<Name, Arc<ServedDisk>>,
    maps: &Maps,
) -> Vec<Outcome> {
    let outcome = |(name, draft): (Name, DiskDraft)| {
        let disk = Arc::clone(&disks[&name]);
        let era = eras.get(&name).copied();
        outcome(disk, draft, era, maps)
    };
    let mut outcomes: Vec<_> = drafts.into_iter().map(outcome).collect();
    let uuid = Uuid::new_v4();
    let recorded = outcomes.iter().filter(|outcome| outcome.record.is_some());
    let together: Vec<Uuid> = recorded.map(|outcome| outcome.disk.uuid).collect();
    for record in outcomes
        .iter_mut()
        .filter_map(|outcome| outcome.record.as_mut())
    {
        record.uuid = uuid;
        record.disks.clone_from(&together);
    }
    outcomes
}

fn outcome(disk: Arc<ServedDisk>, draft: DiskDraft, era: Option<Era>, maps: &Maps) -> Outcome {
    let now = era.unwrap_or_else(|| disk.disk.tracking().era);
    let (mut bitmaps, mut changed, mut removed) = (Vec::new(), Vec::new(), Vec::new());
    let (mut files, mut obsolete) = (Vec::new(), Vec::new());
    for draft in draft.bitmaps {
        let before = draft.bitmap.bits_id();
        if draft.fate == Fate::Stays {
            bitmaps.push(draft.bitmap);
            continue;
        }
        let was_stored = draft.bitmap.persistent && !draft.is_new;
        if was_stored {
            obsolete.push(before);
        }
        if draft.fate == Fate::Leaves {
            if was_stored {
                removed.push(before.uuid);
            }
            continue;
        }
        let bits = draft.bits(maps);
        let bitmap = draft.become_bitmap(&bits, now);
        if bitmap.persistent {
            files.push((bitmap.bits_id(), bits));
            changed.push(bitmap.record());
        }
        bitmaps.push(bitmap);
    }
    let is_recorded = !changed.is_empty() || !removed.is_empty();
    // Eras without any record would look like damage one day, if there were enough of them.
    let is_milestone = era.is_some_and(|era| era.number().is_multiple_of(ERAS_UNRECORDED));
    let record = (is_recorded || is_milestone).then(|| BitmapsRecord {
        uuid: Uuid::nil(),
        disks: Vec::new(),
        era: now.number(),
        changed,
        removed,
    });
    Outcome {
        disk,
        bitmaps,
        record,
        files,
        obsolete,
    }
}

impl BitmapDraft {
    /// All that its parts say, read from the maps now.
    fn bits(&self, maps: &Maps) -> Arc<Bits> {
        let granularity = self.bitmap.granularity;
        let mut parts = self.parts.iter();
        let first = match parts.as_slice() {
            [Part::Bits(bits), ..] if bits.granularity() == granularity => {
                parts.next();
                Arc::clone(bits)
            }
            _ => Arc::new(Bits::new(granularity)),
        };
        if parts.as_slice().is_empty() {
            return first;
        }
        let mut all = Arc::unwrap_or_clone(first);
        for part in parts {
            match part {
                Part::Bits(bits) => all.merge(bits),
                Part::Changed(disk, since, granularity) => {
                    let changed = DirtySet {
                        bits: Arc::new(Bits::new(*granularity)),
                        since: Some(*since),
                    };
                    all.merge(&changed.collect(&maps[disk]));
                }
            }
        }
        Arc::new(all)
    }

    fn become_bitmap(self, bits: &Arc<Bits>, now: Era) -> Bitmap {
        let since = match self.recording {
            Recording::Off => None,
            Recording::Since(era) => Some(era),
            Recording::FromNow => Some(now),
        };
        let bits = Arc::clone(bits);
        Bitmap {
            revision: self.bitmap.revision + 1,
            era: now,
            dirty: Ok(DirtySet { bits, since }),
            ..self.bitmap
        }
    }
}

impl Bitmaps {
    /// Those of `disk` are these.
    pub(in crate::service) fn restore(&mut self, disk: Name, bitmaps: Vec<Bitmap>) {
        self.0.insert(disk, bitmaps);
    }
}

/// As many as a disk has bitmaps: whoever needs more names some of them twice.
const ACTIONS_MAX: usize = 1024;

/// An era that is a multiple of this is recorded whatever it is for. The journal thus knows every
/// era but this many, and a map that has a much higher one is damaged.
const ERAS_UNRECORDED: u32 = 1 << 16;
