//! Checkpoints and backups as the journals of the disks tell them.
//!
//! Each disk tells its own part. A checkpoint is what those that know it say; a backup is open when
//! every disk of it has the record of its beginning, and committed when any has the record of that.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use bitmap::{BitGranularity, DirtySet, Era};
use scratch::Snapshot;
use time::OffsetDateTime;
use uuid::Uuid;

use super::bitmaps::FrozenBitmap;
use super::book::{Backup, Base, BeginRequest, Book, Checkpoint, FrozenDisk, Outcome};
use crate::disk::Ending;
use crate::files::{SnapshotDir, nowhere};
use crate::names::Name;
use crate::served::{Past, ServedDisk};
use crate::state::{
    BackupRecord, BitsId, CheckpointRecord, FrozenBitmapRecord, Record, RequestRecord, read_bits,
};

/// What all the journals say together.
#[derive(Default)]
struct Told {
    checkpoints: BTreeMap<Uuid, Checkpoint>,
    deleted: BTreeSet<(Name, Uuid)>,
    backups: BTreeMap<Uuid, BTreeMap<Name, BackupRecord>>,
    outcomes: BTreeMap<Uuid, Outcome>,
    broken: BTreeMap<(Name, Uuid), String>,
}

/// The book as it was, with the backups that can go on open again; the others that were open are
/// broken, and say why.
pub(super) fn book(
    disks: &BTreeMap<Name, Arc<ServedDisk>>,
    pasts: &BTreeMap<Name, Past>,
) -> io::Result<Book> {
    let told = Told::by(pasts);
    let mut book = Book::default();
    for (uuid, parts) in &told.backups {
        let Some(any) = parts.values().next() else {
            continue;
        };
        let complete = any.disks.iter().all(|disk| {
            disks
                .values()
                .any(|d| d.uuid == *disk && parts.contains_key(&d.name))
        });
        let outcome = told.outcomes.get(uuid).copied();
        let Some(outcome) = outcome.or((!complete).then_some(Outcome::Aborted)) else {
            let pending_of = Some(any.id.clone());
            book.checkpoints
                .extend(checkpoint_of(parts, &told, pending_of));
            let backup = reopen(*uuid, any, parts, &told, disks, pasts)?;
            book.backups.push(Arc::new(backup));
            continue;
        };
        book.ended.insert(any.id.clone(), outcome);
        if outcome == Outcome::Committed {
            book.checkpoints.extend(checkpoint_of(parts, &told, None));
        }
    }
    book.checkpoints.extend(told.checkpoints.into_values());
    book.checkpoints
        .sort_by_key(|checkpoint| checkpoint.created);
    book.backups.sort_by_key(|backup| backup.frozen_at);
    Ok(book)
}

impl Told {
    fn by(pasts: &BTreeMap<Name, Past>) -> Self {
        let mut told = Self::default();
        for (disk, past) in pasts {
            for record in &past.records {
                told.take(disk, record);
            }
        }
        told
    }

    fn take(&mut self, disk: &Name, record: &Record) {
        match record {
            // Bitmaps have a namespace, and rules, of their own.
            Record::Started { .. } | Record::Bitmaps(_) | Record::BitmapsSettled { .. } => {}
            Record::Checkpoint(record) => {
                let CheckpointRecord {
                    name,
                    uuid,
                    created,
                    era,
                } = record;
                let fresh = || Checkpoint {
                    name: name.clone(),
                    uuid: *uuid,
                    created: time_of(*created),
                    eras: BTreeMap::new(),
                    pending_of: None,
                };
                let checkpoint = self.checkpoints.entry(*uuid).or_insert_with(fresh);
                checkpoint.eras.insert(disk.clone(), Era::from_number(*era));
            }
            Record::Deleted { uuid } => {
                self.deleted.insert((disk.clone(), *uuid));
                if let Some(checkpoint) = self.checkpoints.get_mut(uuid) {
                    checkpoint.eras.remove(disk);
                    if checkpoint.eras.is_empty() {
                        self.checkpoints.remove(uuid);
                    }
                }
            }
            Record::Begun(record) => {
                let parts = self.backups.entry(record.uuid).or_default();
                parts.insert(disk.clone(), (**record).clone());
            }
            Record::Broken { uuid, reason } => {
                self.broken.insert((disk.clone(), *uuid), reason.clone());
            }
            Record::Committed { uuid } => {
                self.outcomes.insert(*uuid, Outcome::Committed);
            }
            Record::Aborted { uuid } => {
                self.outcomes.entry(*uuid).or_insert(Outcome::Aborted);
            }
        }
    }
}

/// The checkpoint that a backup makes, on the disks that have not deleted it since.
fn checkpoint_of(
    parts: &BTreeMap<Name, BackupRecord>,
    told: &Told,
    pending_of: Option<Name>,
) -> Option<Checkpoint> {
    let any = parts.values().next()?;
    let (name, uuid) = any.checkpoint.clone()?;
    let there = parts
        .iter()
        .filter(|(disk, _)| !told.deleted.contains(&((*disk).clone(), uuid)));
    let eras: BTreeMap<_, _> = there
        .map(|(disk, part)| (disk.clone(), Era::from_number(part.era)))
        .collect();
    let created = time_of(any.frozen_at);
    (!eras.is_empty()).then_some(Checkpoint {
        name,
        uuid,
        created,
        eras,
        pending_of,
    })
}

fn reopen(
    uuid: Uuid,
    any: &BackupRecord,
    parts: &BTreeMap<Name, BackupRecord>,
    told: &Told,
    disks: &BTreeMap<Name, Arc<ServedDisk>>,
    before: &BTreeMap<Name, Past>,
) -> io::Result<Backup> {
    let reopen_part = |(name, part): (&Name, &BackupRecord)| {
        let broken = told.broken.get(&(name.clone(), uuid)).cloned();
        let disk = reopen_disk(part, Arc::clone(&disks[name]), before[name].ending, broken)?;
        Ok((name.clone(), Arc::new(disk)))
    };
    let parts = parts.iter().map(reopen_part).collect::<io::Result<_>>()?;
    Ok(Backup {
        id: any.id.clone(),
        uuid,
        request: BeginRequest::from(any.request.clone()),
        frozen_at: time_of(any.frozen_at),
        pause: Duration::from_micros(any.pause_us),
        since: any.since.clone(),
        checkpoint: any.checkpoint.clone(),
        disks: parts,
        lost: OnceLock::new(),
    })
}

fn reopen_disk(
    part: &BackupRecord,
    disk: Arc<ServedDisk>,
    ending: Ending,
    broken: Option<String>,
) -> io::Result<FrozenDisk> {
    let era = Era::from_number(part.era);
    let path = disk.snapshot_dir(&part.id);
    let size = disk.disk.size();
    let live = || Arc::clone(disk.disk.map());
    let gone = match (ending, disk.why_lost(era)) {
        // Whatever its scratch looks like by now, there were writes that it did not see.
        _ if broken.is_some() => broken,
        (_, Some(why)) => Some(why.to_owned()),
        (Ending::PowerCut, None) => {
            Some("the machine, or a file system, stopped while it was open".to_owned())
        }
        (Ending::Clean | Ending::Killed, None) => None,
    };
    let opened = match gone {
        Some(why) => Err(why),
        None => SnapshotDir::open(path, size)
            .and_then(|(dir, files)| Ok((dir, Snapshot::reopen(live(), era, files)?)))
            .map_err(|error| format!("its scratch cannot be opened: {error}"))
            .and_then(|(dir, snapshot)| {
                let bitmaps = reopen_bitmaps(&dir, &part.bitmaps)?;
                Ok((dir, snapshot, bitmaps))
            }),
    };
    let (dir, snapshot, bitmaps) = match opened {
        Ok((dir, snapshot, bitmaps)) => (Some(dir), snapshot, bitmaps),
        // Of what is lost, only that it is lost is left to tell.
        Err(why) => {
            let snapshot = Snapshot::new(live(), era, nowhere(size)?);
            snapshot.give_up(why);
            (None, snapshot, Vec::new())
        }
    };
    let snapshot = Arc::new(snapshot);
    if snapshot.broken().is_none() {
        disk.disk.keep_on(Arc::clone(&snapshot));
    }
    let frozen = disk.disk.frozen(snapshot);
    let base = match (&part.since, &part.base) {
        (Some((name, _)), Some(Ok(era))) => Base::Checkpoint {
            name: name.clone(),
            era: Era::from_number(*era),
        },
        (_, Some(Err(reason))) => Base::Unusable(reason.clone()),
        (None, Some(Ok(_))) | (_, None) => Base::None,
    };
    Ok(FrozenDisk::new(
        disk,
        part.id.clone(),
        frozen,
        base,
        part.has_disk_name,
        dir,
        bitmaps,
    ))
}

/// The dirty bitmaps of a backup as they were at its instant. Without one of them the backup is not
/// what it was: whoever copies by that map would leave something out.
fn reopen_bitmaps(
    dir: &SnapshotDir,
    records: &[FrozenBitmapRecord],
) -> Result<Vec<FrozenBitmap>, String> {
    let reopen = |(number, record): (usize, &FrozenBitmapRecord)| {
        let FrozenBitmapRecord {
            name,
            uuid,
            granularity,
            since,
        } = record;
        let granularity = BitGranularity::new(*granularity).map_err(|error| error.to_string())?;
        let id = BitsId::frozen(*uuid);
        let bits = read_bits(&dir.bitmap(number), id, granularity)
            .map_err(|why| format!("dirty bitmap '{name}': {why}"))?;
        Ok(FrozenBitmap {
            name: name.clone(),
            uuid: *uuid,
            dirty: DirtySet {
                bits: Arc::new(bits),
                since: since.map(Era::from_number),
            },
        })
    };
    records.iter().enumerate().map(reopen).collect()
}

impl From<RequestRecord> for BeginRequest {
    fn from(record: RequestRecord) -> Self {
        let RequestRecord {
            id,
            disks,
            since,
            checkpoint,
            bitmaps,
        } = record;
        Self {
            id,
            disks,
            since,
            checkpoint,
            bitmaps,
        }
    }
}

impl From<BeginRequest> for RequestRecord {
    fn from(request: BeginRequest) -> Self {
        let BeginRequest {
            id,
            disks,
            since,
            checkpoint,
            bitmaps,
        } = request;
        Self {
            id,
            disks,
            since,
            checkpoint,
            bitmaps,
        }
    }
}

/// As the journal has it: nanoseconds since 1970, which are enough until 2262.
pub(super) fn nanoseconds_of(time: OffsetDateTime) -> i64 {
    i64::try_from(time.unix_timestamp_nanos()).unwrap_or(i64::MAX)
}

fn time_of(nanoseconds: i64) -> OffsetDateTime {
    OffsetDateTime::from_unix_timestamp_nanos(nanoseconds.into())
        .unwrap_or(OffsetDateTime::UNIX_EPOCH)
}
