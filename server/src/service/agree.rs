//! What the journals of all the disks that are served say together.
//!
//! An end, a deletion and the forgetting of a consumer are so as soon as one of them says so. A
//! checkpoint of several disks, and the beginning of a backup, are so when each of them says so; of a
//! disk that is not served nobody knows better, so the others decide. What a disk has not heard of
//! yet is owed to it: when it is recorded there, each journal can be read by itself.

use std::collections::{BTreeMap, BTreeSet};

use uuid::Uuid;

use crate::names::Name;
use crate::state::{BitmapsRecord, Ledger, Outcome, Record};

/// A disk's identity, and what its journal says.
pub(super) type Told = BTreeMap<Name, (Uuid, Ledger)>;

/// Makes the ledgers agree, and returns what has to be recorded for that, by disk and in order.
pub(super) fn agree(told: &mut Told) -> Vec<(Name, Record)> {
    let mut owed = Vec::new();
    for step in [
        ends,
        interrupted_beginnings,
        deletions,
        checkpoints,
        forgotten,
        bitmaps,
    ] {
        let records = step(told);
        for (disk, record) in &records {
            if let Some((_, ledger)) = told.get_mut(disk) {
                ledger.take(record);
            }
        }
        owed.extend(records);
    }
    owed
}

/// Backups that have ended on one disk have ended on all.
fn ends(told: &Told) -> Vec<(Name, Record)> {
    let mut outcomes: BTreeMap<Uuid, Outcome> = BTreeMap::new();
    for ended in told.values().flat_map(|(_, ledger)| &ledger.ended) {
        let outcome = outcomes.entry(ended.uuid).or_insert(ended.outcome);
        // An abort is recorded only of what nobody was told is committed.
        if ended.outcome == Outcome::Aborted {
            *outcome = Outcome::Aborted;
        }
    }
    let mut owed = Vec::new();
    for (disk, (_, ledger)) in told {
        let mut ended: Vec<_> = ledger
            .open
            .values()
            .filter_map(|backup| Some((backup.era, backup.uuid, *outcomes.get(&backup.uuid)?)))
            .collect();
        // In which order they ended is not known. A consumer that is left at the oldest misses
        // nothing, whichever of the copies it goes on from.
        ended.sort_unstable_by_key(|(era, ..)| std::cmp::Reverse(*era));
        let records = ended.into_iter().map(|(_, uuid, outcome)| match outcome {
            Outcome::Committed => Record::Committed { uuid },
            Outcome::Aborted => Record::Aborted { uuid },
        });
        owed.extend(records.map(|record| (disk.clone(), record)));
    }
    owed
}

/// A backup of which a disk that is served does not know was never begun.
fn interrupted_beginnings(told: &Told) -> Vec<(Name, Record)> {
    let lacking = |uuid: &Uuid, disks: &[Uuid]| {
        told.values()
            .any(|(disk, ledger)| disks.contains(disk) && !ledger.open.contains_key(uuid))
    };
    let mut owed = Vec::new();
    for (disk, (_, ledger)) in told {
        for backup in ledger.open.values() {
            if lacking(&backup.uuid, &backup.disks) {
                owed.push((disk.clone(), Record::Aborted { uuid: backup.uuid }));
            }
        }
    }
    owed
}

/// What was deleted on several disks is deleted on all of those.
fn deletions(told: &Told) -> Vec<(Name, Record)> {
    let all: Vec<_> = told
        .values()
        .flat_map(|(_, ledger)| ledger.deletions.iter().cloned())
        .collect();
    let mut owed = Vec::new();
    for (disk, (own, ledger)) in told {
        let missed = all
            .iter()
            .filter(|(uuid, disks)| disks.contains(own) && ledger.checkpoints.contains_key(uuid));
        let missed: BTreeMap<_, _> = missed.cloned().collect();
        let records = missed
            .into_iter()
            .map(|(uuid, disks)| Record::Deleted { uuid, disks });
        owed.extend(records.map(|record| (disk.clone(), record)));
    }
    owed
}

/// A checkpoint of several disks counts if one of them knows that all have it, or if all have it.
fn checkpoints(told: &Told) -> Vec<(Name, Record)> {
    let mut complete: BTreeSet<Uuid> = BTreeSet::new();
    let mut unsure: BTreeMap<Uuid, &[Uuid]> = BTreeMap::new();
    for checkpoint in told
        .values()
        .flat_map(|(_, ledger)| ledger.checkpoints.values())
    {
        if checkpoint.disks.is_empty() {
            complete.insert(checkpoint.uuid);
        } else {
            unsure.insert(checkpoint.uuid, &checkpoint.disks);
        }
    }
    for (uuid, disks) in &unsure {
        let lacks = |(disk, ledger): &(Uuid, Ledger)| {
            let knew = ledger.deletions.iter().any(|(deleted, _)| deleted == uuid);
            // A journal that was damaged may have had it.
            let has = ledger.checkpoints.contains_key(uuid) || knew || ledger.loss.is_some();
            disks.contains(disk) && !has
        };
        if !told.values().any(lacks) {
            complete.insert(*uuid);
        }
    }
    let mut owed = Vec::new();
    for (disk, (_, ledger)) in told {
        let unsure = ledger.checkpoints.values().filter(|c| !c.disks.is_empty());
        for checkpoint in unsure {
            let uuid = checkpoint.uuid;
            let record = if complete.contains(&uuid) {
                Record::Complete { uuid }
            } else {
                let disks = checkpoint.disks.clone();
                Record::Deleted { uuid, disks }
            };
            owed.push((disk.clone(), record));
        }
    }
    owed
}

/// A consumer that was forgotten is so wherever it has not moved on since.
fn forgotten(told: &Told) -> Vec<(Name, Record)> {
    let all: Vec<_> = told
        .values()
        .flat_map(|(_, ledger)| ledger.forgotten.iter().cloned())
        .collect();
    let mut owed = Vec::new();
    for (disk, (_, ledger)) in told {
        for (consumer, at) in &all {
            let is_there = ledger
                .consumers
                .get(consumer)
                .is_some_and(|last| at.contains(&last.uuid));
            if is_there {
                let (consumer, at) = (consumer.clone(), at.clone());
                owed.push((disk.clone(), Record::Forgotten { consumer, at }));
            }
        }
    }
    owed
}

/// A command on bitmaps of several disks counts if one of them says so, or if all have its record.
fn bitmaps(told: &Told) -> Vec<(Name, Record)> {
    let counts = |command: &BitmapsRecord| {
        let word = told
            .values()
            .find_map(|(_, ledger)| ledger.word_on(command.uuid));
        word.unwrap_or_else(|| {
            let has_it = |uuid: &Uuid| {
                told.values().any(|(disk, ledger)| {
                    disk == uuid && ledger.undecided.iter().any(|c| c.uuid == command.uuid)
                })
            };
            command.disks.iter().all(has_it)
        })
    };
    let mut owed = Vec::new();
    for (disk, (_, ledger)) in told {
        let unsettled = ledger.undecided.iter();
        let unsettled = unsettled.filter(|c| c.disks.len() > 1 && ledger.word_on(c.uuid).is_none());
        for command in unsettled {
            let uuid = command.uuid;
            let counts = counts(command);
            owed.push((disk.clone(), Record::BitmapsSettled { uuid, counts }));
        }
    }
    owed
}

#[cfg(test)]
mod tests;
