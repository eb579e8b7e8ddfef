//! What becomes of the book when a disk comes, or goes.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, OnceLock};

use uuid::Uuid;

use super::book::{Backup, Book};
use crate::names::Name;
use crate::state::Record;

/// What there is to know of a disk that has gone, and what it has to be told when it is back.
#[derive(Default)]
pub(super) struct Away {
    /// The checkpoints that it had.
    checkpoints: BTreeSet<Uuid>,
    /// Where consumers were.
    consumers: BTreeMap<Name, Uuid>,
    /// What happened to these meanwhile.
    missed: Vec<Record>,
}

impl Book {
    /// Takes in what is known of one disk more.
    pub(super) fn join(&mut self, other: Self) {
        for checkpoint in other.checkpoints {
            let mut known = self.checkpoints.iter_mut();
            match known.find(|known| known.uuid == checkpoint.uuid) {
                Some(known) => known.eras.extend(checkpoint.eras),
                None => self.checkpoints.push(checkpoint),
            }
        }
        for backup in other.backups {
            let mut known = self.backups.iter_mut();
            match known.find(|known| known.uuid == backup.uuid) {
                Some(known) => *known = Arc::new(known.with(&backup)),
                None => self.backups.push(backup),
            }
        }
        for (consumer, lasts) in other.consumers {
            self.consumers.entry(consumer).or_default().extend(lasts);
        }
        self.ended.join(other.ended);
        self.bitmaps.join(other.bitmaps);
        self.sort();
    }

    /// Leaves out a disk that has gone, of which no backup is open, and remembers what it may have to
    /// be told.
    pub(super) fn leave_out(&mut self, disk: &Name, uuid: Uuid) {
        let mut away = Away::default();
        for checkpoint in &mut self.checkpoints {
            if checkpoint.eras.remove(disk).is_some() {
                away.checkpoints.insert(checkpoint.uuid);
            }
        }
        self.checkpoints
            .retain(|checkpoint| !checkpoint.eras.is_empty());
        for (consumer, lasts) in &mut self.consumers {
            if let Some(last) = lasts.remove(disk) {
                away.consumers.insert(consumer.clone(), last.uuid);
            }
        }
        self.consumers.retain(|_, lasts| !lasts.is_empty());
        self.bitmaps.leave_out(disk);
        let is_worth_it = !away.checkpoints.is_empty() || !away.consumers.is_empty();
        if is_worth_it && self.away.len() < AWAY_MAX {
            self.away.insert(uuid, away);
        }
    }

    /// Forgets where `consumer` is on `disk`, if it is at one of these checkpoints.
    pub(super) fn forget_consumer_at(&mut self, consumer: &Name, disk: &Name, at: &[Uuid]) {
        let Some(lasts) = self.consumers.get_mut(consumer) else {
            return;
        };
        lasts.retain(|on, last| on != disk || !at.contains(&last.uuid));
        if lasts.is_empty() {
            self.consumers.remove(consumer);
        }
    }

    /// The disks that have gone and have the checkpoint `uuid`.
    pub(super) fn away_with(&self, uuid: Uuid) -> Vec<Uuid> {
        let away = self.away.iter();
        let with = away.filter(|(_, away)| away.checkpoints.contains(&uuid));
        with.map(|(disk, _)| *disk).collect()
    }

    /// Remembers for those of `disks` that have gone what they have to be told.
    pub(super) fn owe(&mut self, record: &Record, disks: &[Uuid]) {
        for (_, away) in self
            .away
            .iter_mut()
            .filter(|(disk, _)| disks.contains(disk))
        {
            if away.missed.len() < MISSED_MAX {
                away.missed.push(record.clone());
            }
        }
    }

    /// What a disk that is back has missed, in order.
    pub(super) fn missed(&self, disk: Uuid) -> &[Record] {
        self.away.get(&disk).map_or(&[], |away| &away.missed)
    }

    /// The disks that have gone and on which `consumer` is somewhere, and where.
    pub(super) fn away_at(&self, consumer: &Name) -> (Vec<Uuid>, Vec<Uuid>) {
        let away = self.away.iter();
        let there = away.filter_map(|(disk, away)| Some((*disk, *away.consumers.get(consumer)?)));
        there.unzip()
    }

    /// The consumer whose last checkpoint on a disk that has gone is `uuid`.
    pub(super) fn away_consumer_at(&self, uuid: Uuid) -> Option<&Name> {
        let consumers = self.away.values().flat_map(|away| &away.consumers);
        let mut there = consumers.filter(|(_, last)| **last == uuid);
        there.next().map(|(consumer, _)| consumer)
    }
}

impl Backup {
    /// The same, with the disks that `other` has of it, which is as broken.
    fn with(&self, other: &Self) -> Self {
        let lost = OnceLock::new();
        if let Some(reason) = self.broken().or_else(|| other.broken()) {
            let _ = lost.set(reason);
        }
        let all = self.disks.iter().chain(&other.disks);
        Self {
            id: self.id.clone(),
            request: self.request.clone(),
            since: self.since.clone(),
            checkpoint: self.checkpoint.clone(),
            budget: Arc::clone(&self.budget),
            disks: all
                .map(|(name, part)| (name.clone(), Arc::clone(part)))
                .collect(),
            lost,
            ..*self
        }
    }
}

/// Disks that have gone and are remembered: more than a machine has. One that is not is back as after a
/// restart that was without it.
const AWAY_MAX: usize = 256;

/// The same for what each has missed: as much as a journal remembers for others.
const MISSED_MAX: usize = 256;
