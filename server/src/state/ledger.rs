//! What one journal says, put together.
//!
//! A ledger is what is left of records when they are taken one after the other. Written out again as
//! records it is a journal that says the same in as little room as it can, so a journal is bounded by
//! what there is, and not by what there was. What other disks may still have to be told (ends,
//! deletions, consumers that were forgotten) is kept, up to a bound: whoever does not hear of it in
//! time holds an old checkpoint that is still true, or takes a backup for one that never ended well.

use std::collections::{BTreeMap, VecDeque};

use uuid::Uuid;

use super::journal::{
    BackupRecord, BitmapRecord, BitmapsRecord, CheckpointRecord, ConsumerRecord, EndedRecord,
    Outcome, Record,
};
use crate::names::Name;

/// Everything that a journal says.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub(crate) struct Ledger {
    /// The highest era that a record ever named.
    pub(crate) highest_era: u32,
    /// The eras in which a server presumed changes, oldest first.
    pub(crate) presumed: Vec<u32>,
    /// Why it may not say what it once said.
    pub(crate) loss: Option<String>,
    /// Those that were taken, and those that commits have made.
    pub(crate) checkpoints: BTreeMap<Uuid, CheckpointRecord>,
    /// Which of them were deleted, and on which disks; oldest first.
    pub(crate) deletions: VecDeque<(Uuid, Vec<Uuid>)>,
    /// The last checkpoint of each consumer.
    pub(crate) consumers: BTreeMap<Name, ConsumerRecord>,
    /// Which consumers were forgotten, and where they were then; oldest first.
    pub(crate) forgotten: VecDeque<(Name, Vec<Uuid>)>,
    /// The backups that have not ended.
    pub(crate) open: BTreeMap<Uuid, BackupRecord>,
    /// Which of those have lost their instant, and why.
    pub(crate) broken: BTreeMap<Uuid, String>,
    /// The backups that have; oldest first.
    pub(crate) ended: VecDeque<EndedRecord>,
    /// The persistent dirty bitmaps.
    pub(crate) bitmaps: Vec<BitmapRecord>,
    /// What commands on them recorded since the first of which it is not known whether it counts.
    pub(crate) undecided: VecDeque<BitmapsRecord>,
    /// Of which commands on several disks it is known; oldest first.
    pub(crate) settled: VecDeque<(Uuid, bool)>,
}

impl Ledger {
    /// Takes in what a record says.
    pub(crate) fn take(&mut self, record: &Record) {
        self.highest_era = self.highest_era.max(highest_era_of(record));
        match record {
            Record::Started { era } => self.presumed.push(*era),
            Record::Checkpoint(checkpoint) => {
                self.checkpoints.insert(checkpoint.uuid, checkpoint.clone());
            }
            Record::Complete { uuid } => {
                if let Some(checkpoint) = self.checkpoints.get_mut(uuid) {
                    checkpoint.disks.clear();
                }
            }
            Record::Deleted { uuid, disks } => {
                self.checkpoints.remove(uuid);
                if disks.len() > 1 {
                    let deletion = (*uuid, disks.clone());
                    push_bounded(&mut self.deletions, deletion, DELETIONS_TOLD_MAX);
                }
            }
            Record::Begun(backup) => {
                self.open.insert(backup.uuid, (**backup).clone());
            }
            Record::Broken { uuid, reason } => {
                self.broken.insert(*uuid, reason.clone());
            }
            Record::Committed { uuid } => {
                let backup = self.end(*uuid, Outcome::Committed);
                if let Some(backup) = backup {
                    self.publish(&backup);
                }
            }
            Record::Aborted { uuid } => {
                self.end(*uuid, Outcome::Aborted);
            }
            Record::Consumer(last) => {
                self.consumers.insert(last.consumer.clone(), last.clone());
            }
            Record::Forgotten { consumer, at } => {
                if self
                    .consumers
                    .get(consumer)
                    .is_some_and(|last| at.contains(&last.uuid))
                {
                    self.consumers.remove(consumer);
                }
                let forgotten = (consumer.clone(), at.clone());
                push_bounded(&mut self.forgotten, forgotten, FORGOTTEN_TOLD_MAX);
            }
            Record::Ended { backups } => {
                for backup in backups {
                    push_bounded(&mut self.ended, backup.clone(), ENDED_MAX);
                }
            }
            Record::Bitmaps(command) => {
                self.undecided.push_back((**command).clone());
                self.follow_commands();
            }
            Record::BitmapsSettled { uuid, counts } => {
                push_bounded(&mut self.settled, (*uuid, *counts), SETTLED_TOLD_MAX);
                self.follow_commands();
            }
            Record::Lost { reason } => self.loss = Some(reason.clone()),
            Record::Rewritten { .. } => {}
        }
    }

    /// The fewest records that say all of it.
    pub(crate) fn records(&self) -> Vec<Record> {
        let mut records = vec![Record::Rewritten {
            era: self.highest_era,
        }];
        records.extend(self.loss.clone().map(|reason| Record::Lost { reason }));
        let needed = self.oldest_era();
        let presumed = self
            .presumed
            .iter()
            .filter(|era| needed.is_some_and(|oldest| oldest <= **era));
        records.extend(presumed.map(|&era| Record::Started { era }));
        let ended: Vec<EndedRecord> = self.ended.iter().cloned().collect();
        records.extend(ended.chunks(ENDED_PER_RECORD).map(|backups| Record::Ended {
            backups: backups.to_vec(),
        }));
        let deletions = self.deletions.iter().cloned();
        records.extend(deletions.map(|(uuid, disks)| Record::Deleted { uuid, disks }));
        let forgotten = self.forgotten.iter().cloned();
        records.extend(forgotten.map(|(consumer, at)| Record::Forgotten { consumer, at }));
        records.extend(self.checkpoints.values().cloned().map(Record::Checkpoint));
        records.extend(self.consumers.values().cloned().map(Record::Consumer));
        // None of several disks: it counts.
        records.extend(self.bitmaps.chunks(BITMAPS_PER_RECORD).map(|changed| {
            Record::Bitmaps(Box::new(BitmapsRecord {
                uuid: Uuid::nil(),
                disks: Vec::new(),
                era: 0,
                changed: changed.to_vec(),
                removed: Vec::new(),
            }))
        }));
        let settled = self.settled.iter();
        records.extend(settled.map(|&(uuid, counts)| Record::BitmapsSettled { uuid, counts }));
        let undecided = self.undecided.iter().cloned();
        records.extend(undecided.map(|command| Record::Bitmaps(Box::new(command))));
        let open = self.open.values().cloned();
        records.extend(open.map(|backup| Record::Begun(Box::new(backup))));
        let broken = self.broken.iter();
        records.extend(broken.map(|(&uuid, reason)| Record::Broken {
            uuid,
            reason: reason.clone(),
        }));
        records
    }

    /// How the backup with this identity ended, as far as it is remembered.
    pub(crate) fn outcome(&self, backup: Uuid) -> Option<Outcome> {
        let ended = self.ended.iter().find(|ended| ended.uuid == backup)?;
        Some(ended.outcome)
    }

    /// Whether what a command on bitmaps of several disks recorded counts, as far as is known here.
    pub(crate) fn word_on(&self, command: Uuid) -> Option<bool> {
        let mut settled = self.settled.iter().rev();
        settled
            .find(|(uuid, _)| *uuid == command)
            .map(|(_, counts)| *counts)
    }

    /// Does in order what is decided.
    fn follow_commands(&mut self) {
        while let Some(command) = self.undecided.front() {
            let word = if command.disks.len() > 1 {
                self.word_on(command.uuid)
            } else {
                Some(self.word_on(command.uuid).unwrap_or(true))
            };
            let Some(counts) = word else {
                return;
            };
            let command = self.undecided.pop_front().expect("it was there");
            if counts {
                self.follow(command);
            }
        }
    }

    fn follow(&mut self, command: BitmapsRecord) {
        let is_removed = |bitmap: &BitmapRecord| command.removed.contains(&bitmap.uuid);
        self.bitmaps.retain(|bitmap| !is_removed(bitmap));
        for changed in command.changed {
            match self.bitmaps.iter_mut().find(|b| b.uuid == changed.uuid) {
                Some(bitmap) => *bitmap = changed,
                None => self.bitmaps.push(changed),
            }
        }
    }

    /// The oldest era since which someone may ask what changed. Changes that were presumed before
    /// that are of no interest to anyone.
    fn oldest_era(&self) -> Option<u32> {
        let checkpoints = self.checkpoints.values().map(|checkpoint| checkpoint.era);
        let open = self.open.values().flat_map(|backup| {
            let base = backup.base.as_ref().and_then(|base| base.as_ref().ok());
            base.copied().into_iter().chain([backup.era])
        });
        let frozen = self.open.values().flat_map(|backup| &backup.bitmaps);
        let frozen = frozen.filter_map(|bitmap| bitmap.since);
        let undecided = self.undecided.iter().flat_map(|command| &command.changed);
        let bitmaps = self.bitmaps.iter().chain(undecided);
        let bitmaps = bitmaps.filter_map(|bitmap| bitmap.since);
        checkpoints.chain(open).chain(frozen).chain(bitmaps).min()
    }

    fn end(&mut self, uuid: Uuid, outcome: Outcome) -> Option<BackupRecord> {
        self.broken.remove(&uuid);
        let backup = self.open.remove(&uuid);
        if self.outcome(uuid).is_none() {
            let ended = EndedRecord {
                id: backup.as_ref().map(|backup| backup.id.clone()),
                uuid,
                outcome,
            };
            push_bounded(&mut self.ended, ended, ENDED_MAX);
        }
        backup
    }

    /// What a commit does at once: the checkpoint is a base, and its consumer has moved there.
    fn publish(&mut self, backup: &BackupRecord) {
        let Some((name, uuid)) = backup.checkpoint.clone() else {
            return;
        };
        if let Some(consumer) = backup.request.consumer.clone() {
            let last = ConsumerRecord {
                consumer: consumer.clone(),
                checkpoint: name.clone(),
                uuid,
                created: backup.frozen_at,
            };
            self.consumers.insert(consumer, last);
        }
        let checkpoint = CheckpointRecord {
            name,
            uuid,
            created: backup.frozen_at,
            era: backup.era,
            disks: Vec::new(),
            automatic: backup.is_checkpoint_automatic(),
        };
        self.checkpoints.insert(uuid, checkpoint);
    }
}

impl<'a> FromIterator<&'a Record> for Ledger {
    fn from_iter<I: IntoIterator<Item = &'a Record>>(records: I) -> Self {
        let mut ledger = Self::default();
        records.into_iter().for_each(|record| ledger.take(record));
        ledger
    }
}

fn highest_era_of(record: &Record) -> u32 {
    match record {
        // The guests' era is the next.
        Record::Started { era } => era.saturating_add(1),
        Record::Checkpoint(checkpoint) => checkpoint.era,
        Record::Begun(backup) => backup.era,
        Record::Bitmaps(bitmaps) => bitmaps.era,
        Record::Rewritten { era } => *era,
        Record::Complete { .. }
        | Record::Deleted { .. }
        | Record::Committed { .. }
        | Record::Aborted { .. }
        | Record::Broken { .. }
        | Record::BitmapsSettled { .. }
        | Record::Consumer(_)
        | Record::Forgotten { .. }
        | Record::Ended { .. }
        | Record::Lost { .. } => 0,
    }
}

fn push_bounded<T>(list: &mut VecDeque<T>, entry: T, most: usize) {
    if list.len() == most {
        list.pop_front();
    }
    list.push_back(entry);
}

/// Ended backups whose ids are known not to be used again, and whose ends can be asked for again:
/// hourly ones of half a year.
pub(crate) const ENDED_MAX: usize = 4096;

/// Each takes some 100 bytes, so that a record stays within a few blocks.
const ENDED_PER_RECORD: usize = 32;

/// Deletions that another disk may not have heard of; all that are served hear at the next start.
const DELETIONS_TOLD_MAX: usize = 256;

/// The same for commands on bitmaps.
const SETTLED_TOLD_MAX: usize = 256;

/// Names may be long, and a record is read as a whole.
const BITMAPS_PER_RECORD: usize = 16;

/// The same for consumers that were forgotten.
const FORGOTTEN_TOLD_MAX: usize = 64;

#[cfg(test)]
mod tests;
