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

use super::Disks;
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
    disks: &Disks,
    pasts: BTreeMap<Name, Past>,
    space: &Space,
) -> io::Result<Restored> {
    let (mut told, mut endings) = (Told::new(), BTreeMap::new());
    for (name, past) in pasts {
        endings.insert(name.clone(), past.ending);
        told.insert(name.clone(), (disks[&name].uuid, past.ledger));
    }
    let owed = agree(&mut told);
    let (mut book, mut open) = (Book::default(), Open::default());
    for (disk, (_, ledger)) in told {
        take_ledger(&mut book, &mut open, &disks[&disk], ledger);
    }
    open.reopen(&mut book, disks, &endings, space)?;
    book.sort();
    Ok(Restored { book, owed })
}

/// The same for one disk that joins others, of which `known` is the book: what its `ledger` tells
/// now that it agrees with theirs. `disks` are those and it.
///
/// A backup that others have open too went on without it: it is broken, also here.
pub(super) fn restore_one(
    (disk, ending): (&Arc<ServedDisk>, Ending),
    ledger: Ledger,
    (known, disks): (&Book, &Disks),
    space: &Space,
) -> io::Result<Book> {
    let (mut book, mut open) = (Book::default(), Open::default());
    take_ledger(&mut book, &mut open, disk, ledger);
    for uuid in open.parts.keys() {
        let others = known.backups.iter().find(|backup| backup.uuid == *uuid);
        if let Some(others) = others {
            let without = || format!("it went on without disk '{}'", disk.name);
            let reason = others.broken().unwrap_or_else(without);
            open.broken.insert((disk.name.clone(), *uuid), reason);
        }
    }
    let endings = BTreeMap::from([(disk.name.clone(), ending)]);
    open.reopen(&mut book, disks, &endings, space)?;
    Ok(book)
}

/// The backups that were open.
#[derive(Default)]
struct Open {
    /// What the disks of each say of it.
    parts: BTreeMap<Uuid, BTreeMap<Name, BackupRecord>>,
    /// Why a disk's part of one is lost.
    broken: BTreeMap<(Name, Uuid), String>,
}

impl Open {
    fn reopen(
        &self,
        book: &mut Book,
        disks: &Disks,
        endings: &BTreeMap<Name, Ending>,
        space: &Space,
    ) -> io::Result<()> {
        for (uuid, parts) in &self.parts {
            let backup = reopen(*uuid, parts, &self.broken, disks, endings, space)?;
            book.checkpoints.extend(backup.pending_checkpoint());
            book.backups.push(Arc::new(backup));
        }
        Ok(())
    }
}

fn take_ledger(book: &mut Book, open: &mut Open, served: &ServedDisk, ledger: Ledger) {
    let disk = &served.name;
    take_checkpoints(book, disk, &ledger);
    let bitmaps = load_bitmaps(served, &ledger.bitmaps);
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
        open.broken.insert((disk.clone(), uuid), reason);
    }
    for (uuid, part) in ledger.open {
        let parts = open.parts.entry(uuid).or_default();
        parts.insert(disk.clone(), part);
    }
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
    disks: &Disks,
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
