//! Checkpoints, backups and consumers as the journals of the disks tell them.
//!
//! Each disk tells its own part; where one has not heard of something that others have, see
//! [`agree`](super::agree).

use std::collections::BTreeMap;
use std::io;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use bitmap::{BitGranularity, DirtySet, Era};
use scratch::{Snapshot, Terms};
use time::OffsetDateTime;
use uuid::Uuid;

use super::agree::{Told, agree};
use super::bitmaps::{FrozenBitmap, load_bitmaps};
use super::book::{Backup, Base, BeginRequest, Book, Checkpoint, FrozenDisk, Last};
use super::space::Space;
use crate::disk::Ending;
use crate::files::{SnapshotDir, nowhere};
use crate::names::Name;
use crate::served::{Past, ServedDisk};
use crate::state::{
    BackupRecord, BitsId, CheckpointRecord, FrozenBitmapRecord, Ledger, Record, RequestRecord,
    read_bits,
};

/// What is known at a start.
pub(super) struct Restored {
    /// The book as it was, with the backups that can go on open again; the others that were open are
    /// broken, and say why.
    pub(super) book: Book,
    /// What disks have not heard of yet.
    pub(super) owed: Vec<(Name, Record)>,
}

/// Joins what the disks tell.
pub(super) fn restore(
    disks: &BTreeMap<Name, Arc<ServedDisk>>,
    pasts: BTreeMap<Name, Past>,
    space: &Space,
) -> io::Result<Restored> {
    let (mut told, mut endings) = (Told::new(), BTreeMap::new());
    for (name, past) in pasts {
        endings.insert(name.clone(), past.ending);
        told.insert(name.clone(), (disks[&name].uuid, past.ledger));
    }
    let owed = agree(&mut told);
    let mut book = Book::default();
    let mut open: BTreeMap<Uuid, BTreeMap<Name, BackupRecord>> = BTreeMap::new();
    let mut broken = BTreeMap::new();
    for (disk, (_, ledger)) in told {
        take_checkpoints(&mut book, &disk, &ledger);
        let bitmaps = load_bitmaps(&disks[&disk], &ledger.bitmaps);
        book.bitmaps.restore(disk.clone(), bitmaps);
        for (consumer, last) in ledger.consumers {
            let last = Last {
                name: last.checkpoint,
                uuid: last.uuid,
                created: time_of(last.created),
            };
            let by_disk = book.consumers.entry(consumer).or_default();
            by_disk.insert(disk.clone(), last);
        }
        for ended in ledger.ended {
            if let Some(id) = ended.id {
                book.ended.insert(id, ended.outcome);
            }
        }
        for (uuid, reason) in ledger.broken {
            broken.insert((disk.clone(), uuid), reason);
        }
        for (uuid, part) in ledger.open {
            open.entry(uuid).or_default().insert(disk.clone(), part);
        }
    }
    for (uuid, parts) in open {
        let backup = reopen(uuid, &parts, &broken, disks, &endings, space)?;
        book.checkpoints.extend(backup.pending_checkpoint());
        book.backups.push(Arc::new(backup));
    }
    book.checkpoints
        .sort_by_key(|checkpoint| checkpoint.created);
    book.backups.sort_by_key(|backup| backup.frozen_at);
    Ok(Restored { book, owed })
}

fn take_checkpoints(book: &mut Book, disk: &Name, ledger: &Ledger) {
    for record in ledger.checkpoints.values() {
        let CheckpointRecord {
            name,
            uuid,
            created,
            era,
            disks: _,
            automatic,
        } = record;
        let known = book.checkpoints.iter().position(|c| c.uuid == *uuid);
        let at = known.unwrap_or_else(|| {
            book.checkpoints.push(Checkpoint {
                name: name.clone(),
                uuid: *uuid,
                created: time_of(*created),
                eras: BTreeMap::new(),
                pending_of: None,
                automatic: *automatic,
            });
            book.checkpoints.len() - 1
        });
        let eras = &mut book.checkpoints[at].eras;
        eras.insert(disk.clone(), Era::from_number(*era));
    }
}

fn reopen(
    uuid: Uuid,
    records: &BTreeMap<Name, BackupRecord>,
    broken: &BTreeMap<(Name, Uuid), String>,
    disks: &BTreeMap<Name, Arc<ServedDisk>>,
    endings: &BTreeMap<Name, Ending>,
    space: &Space,
) -> io::Result<Backup> {
    let any = records.values().next().expect("it is open on a disk");
    let budget = space.budget(any.scratch_limit);
    let mut parts = BTreeMap::new();
    for (name, record) in records {
        let is_served = |uuid: &Uuid| disks.values().any(|disk| disk.uuid == *uuid);
        let missing = || {
            let missing = record.disks.iter().find(|uuid| !is_served(uuid))?;
            Some(format!("its disk with uuid {missing} is not served"))
        };
        let broken = broken.get(&(name.clone(), uuid)).cloned();
        let broken = broken.or_else(missing);
        let terms = |dir: &SnapshotDir| space.terms(&budget, dir.parent());
        let disk = Arc::clone(&disks[name]);
        let part = reopen_disk(record, disk, endings[name], broken, terms)?;
        parts.insert(name.clone(), Arc::new(part));
    }
    let same = |record: &&BackupRecord| record.since == any.since;
    Ok(Backup {
        id: any.id.clone(),
        uuid,
        request: BeginRequest::from(any.request.clone()),
        frozen_at: time_of(any.frozen_at),
        pause: Duration::from_micros(any.pause_us),
        since: any
            .since
            .clone()
            .filter(|_| records.values().all(|r| same(&r))),
        checkpoint: any.checkpoint.clone(),
        expires_at: any.expires_at.map(time_of),
        budget,
        disks: parts,
        lost: OnceLock::new(),
    })
}

fn reopen_disk(
    part: &BackupRecord,
    disk: Arc<ServedDisk>,
    ending: Ending,
    broken: Option<String>,
    terms: impl Fn(&SnapshotDir) -> io::Result<Terms>,
) -> io::Result<FrozenDisk> {
    let era = Era::from_number(part.era);
    let path = disk.snapshot_dir(&part.id);
    // The disk may have grown since.
    let size = part.size.unwrap_or_else(|| disk.disk.size());
    let live = || Arc::clone(disk.disk.map());
    let gone = match (ending, disk.why_not_kept(era)) {
        // Whatever its scratch looks like by now, there were writes that it did not see.
        _ if broken.is_some() => broken,
        (_, Some(why)) => Some(why.to_owned()),
        (Ending::PowerCut, None) => {
            Some("the machine, or a file system, stopped while it was open".to_owned())
        }
        (Ending::Clean | Ending::Killed, None) => None,
    };
    let dir = SnapshotDir::left_at(path);
    let opened = match gone.or_else(|| dir.recorded_break()) {
        Some(why) => Err(why),
        None => dir
            .open(size, disk.engine)
            .and_then(|files| Snapshot::reopen(live(), era, files, terms(&dir)?))
            .map_err(|error| format!("its scratch cannot be used: {error}"))
            .and_then(|snapshot| Ok((snapshot, reopen_bitmaps(&dir, &part.bitmaps)?))),
    };
    let (snapshot, bitmaps) = match opened {
        Ok(opened) => opened,
        // Of what is lost, only that it is lost is left to tell.
        Err(why) => {
            let snapshot = Snapshot::new(live(), era, nowhere(size)?, Terms::endless(), 0)?;
            snapshot.give_up(why);
            (snapshot, Vec::new())
        }
    };
    let snapshot = Arc::new(snapshot);
    if snapshot.broken().is_none() {
        disk.disk.keep_on(Arc::clone(&snapshot));
    }
    let frozen = disk.disk.frozen(snapshot);
    let base = match (&part.since, &part.base) {
        (Some((name, uuid)), Some(Ok(era))) => Base::Checkpoint {
            name: name.clone(),
            uuid: *uuid,
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
        Some(dir),
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
            consumer,
            expires_s,
            scratch_limit,
        } = record;
        Self {
            id,
            disks,
            since,
            checkpoint,
            bitmaps,
            consumer,
            expires_s,
            scratch_limit,
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
            consumer,
            expires_s,
            scratch_limit,
        } = request;
        Self {
            id,
            disks,
            since,
            checkpoint,
            bitmaps,
            consumer,
            expires_s,
            scratch_limit,
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
