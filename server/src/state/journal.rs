//! What happened to a disk's checkpoints, backups and consumers, one record after the other.
//!
//! A record begins at a multiple of 512 bytes, so that after damage the next one is found. What a
//! record says is true whether or not the others can be read: a checkpoint is a name for an era, and
//! it is the map that knows what changed. So a record that is lost costs a checkpoint, a backup or a
//! deletion, and never makes a change disappear.
//!
//! The file is written anew before the first record of a server, when most of it is of no use any
//! more, and when an append has failed, so that nobody knows whether the file has that record. What each crash point of that leaves behind:
//!
//! - before the rename: the old file, with all that was acknowledged, and one aside that nobody reads
//!   and the next start removes;
//! - after it: either file, depending on what the directory has kept. Both say the same, because
//!   nothing is appended from when the ledger is copied until the directory is synced.

use std::io;
use std::path::Path;

use serde::{Deserialize, Serialize};
use uuid::Uuid;

use self::log::{Log, LogFile};
use super::bits::BitsId;
use super::ledger::Ledger;
use crate::names::Name;

mod log;

/// The file, to which records are appended.
pub(crate) struct Journal<L = LogFile> {
    log: L,
    end: u64,
    number: u64,
    /// What the file says, or will say when it has been written anew.
    ledger: Ledger,
    /// An append failed: the file is written anew before the next one.
    in_doubt: bool,
    /// How long the file may become before it is written anew.
    bound: u64,
    /// Up to where there is room, also on a file system that is full.
    reserved: u64,
}

/// Something that happened.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "kebab-case", tag = "what")]
pub(crate) enum Record {
    /// A server began; `era` is the one in which it presumed changes, the next is its guests'.
    Started {
        /// By number.
        era: u32,
    },
    /// A checkpoint was taken. One of several disks counts when each of them has this.
    Checkpoint(CheckpointRecord),
    /// A checkpoint of several disks has its record on all of them.
    Complete {
        /// Which one.
        uuid: Uuid,
    },
    /// A checkpoint was deleted: on this disk, and on those others whether or not they say so too.
    Deleted {
        /// Which one.
        uuid: Uuid,
        /// On which disks, by uuid.
        #[serde(default)]
        disks: Vec<Uuid>,
    },
    /// A backup was begun.
    Begun(Box<BackupRecord>),
    /// A backup was committed: this alone makes its checkpoint visible, and moves its consumer there.
    Committed {
        /// Which one.
        uuid: Uuid,
    },
    /// A backup was aborted.
    Aborted {
        /// Which one.
        uuid: Uuid,
    },
    /// What dirty bitmaps became, by one command.
    Bitmaps(Box<BitmapsRecord>),
    /// Whether what a command on dirty bitmaps of several disks recorded counts.
    BitmapsSettled {
        /// Which one.
        uuid: Uuid,
        /// Whether it does.
        counts: bool,
    },
    /// A backup lost its instant on this disk, and never has it again.
    Broken {
        /// Which one.
        uuid: Uuid,
        /// Why.
        reason: String,
    },
    /// A consumer is at a checkpoint; in a journal that was written anew.
    Consumer(ConsumerRecord),
    /// A consumer is forgotten, on every disk where it was at one of these checkpoints.
    Forgotten {
        /// Which one.
        consumer: Name,
        /// Where it was, by the uuids of checkpoints.
        at: Vec<Uuid>,
    },
    /// How backups ended; in a journal that was written anew.
    Ended {
        /// Oldest first.
        backups: Vec<EndedRecord>,
    },
    /// Something that was known before may not be known any more.
    Lost {
        /// Why, in words.
        reason: String,
    },
    /// The journal was written anew.
    Rewritten {
        /// The highest era that it named before.
        era: u32,
    },
}

/// A checkpoint, as far as one disk is concerned.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub(crate) struct CheckpointRecord {
    pub(crate) name: Name,
    pub(crate) uuid: Uuid,
    /// Nanoseconds since 1970.
    pub(crate) created: i64,
    pub(crate) era: u32,
    /// All its disks, by uuid, until each of them is known to have this record; none of one that
    /// counts in any case.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub(crate) disks: Vec<Uuid>,
    /// It was made for a consumer, and goes when nobody needs it.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub(crate) automatic: bool,
}

/// Where a consumer is, as far as one disk is concerned.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub(crate) struct ConsumerRecord {
    pub(crate) consumer: Name,
    /// Its last checkpoint, which may have been deleted since.
    pub(crate) checkpoint: Name,
    /// The identity of that.
    pub(crate) uuid: Uuid,
    /// When it was taken, in nanoseconds since 1970.
    pub(crate) created: i64,
}

/// A backup that has ended.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub(crate) struct EndedRecord {
    /// None if its beginning was damaged.
    pub(crate) id: Option<Name>,
    pub(crate) uuid: Uuid,
    pub(crate) outcome: Outcome,
}

/// How a backup ended.
#[derive(Clone, Copy, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Outcome {
    /// It succeeded: its checkpoint is a base.
    Committed,
    /// As if it had never begun.
    Aborted,
}

/// A backup, as far as one disk is concerned.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub(crate) struct BackupRecord {
    pub(crate) id: Name,
    pub(crate) uuid: Uuid,
    /// Nanoseconds since 1970.
    pub(crate) frozen_at: i64,
    pub(crate) pause_us: u64,
    /// The era that began with it.
    pub(crate) era: u32,
    /// All its disks, by uuid: it is open when each of them has this record.
    pub(crate) disks: Vec<Uuid>,
    pub(crate) has_disk_name: bool,
    pub(crate) request: RequestRecord,
    /// The checkpoint that it begins from, and its uuid.
    pub(crate) since: Option<(Name, Uuid)>,
    /// The era of that on this disk, or why the disk cannot use it.
    pub(crate) base: Option<Result<u32, String>>,
    /// The checkpoint that its commit makes, and its uuid.
    pub(crate) checkpoint: Option<(Name, Uuid)>,
    /// The dirty bitmaps that it serves. Their bits are in its own folder, numbered in this order.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub(crate) bitmaps: Vec<FrozenBitmapRecord>,
    /// When the server aborts it, in nanoseconds since 1970.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) expires_at: Option<i64>,
    /// How much scratch it may take, in bytes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) scratch_limit: Option<u64>,
    /// How large the disk was, in bytes; as large as it is, where this is missing.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) size: Option<u64>,
}

impl BackupRecord {
    /// Whether the name of its checkpoint was made up for a consumer.
    pub(crate) fn is_checkpoint_automatic(&self) -> bool {
        self.request.checkpoint.is_none() && self.checkpoint.is_some()
    }
}

/// A dirty bitmap as it was when a backup began.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub(crate) struct FrozenBitmapRecord {
    pub(crate) name: String,
    pub(crate) uuid: Uuid,
    pub(crate) granularity: u64,
    /// The era since which it recorded, if it did.
    pub(crate) since: Option<u32>,
}

/// A command on dirty bitmaps, as far as one disk is concerned.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub(crate) struct BitmapsRecord {
    /// The command's, the same on all its disks.
    pub(crate) uuid: Uuid,
    /// All its disks, by uuid: of several, it counts when each of them has this record, or one has
    /// the record that says so.
    pub(crate) disks: Vec<Uuid>,
    /// The era that began with it, or was the current one.
    pub(crate) era: u32,
    /// What bitmaps are from then on.
    pub(crate) changed: Vec<BitmapRecord>,
    /// Which are no more.
    pub(crate) removed: Vec<Uuid>,
}

/// A persistent dirty bitmap after a change, but for its bits, which are in a file of their own.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub(crate) struct BitmapRecord {
    pub(crate) name: String,
    pub(crate) uuid: Uuid,
    pub(crate) granularity: u64,
    /// Which file.
    pub(crate) revision: u64,
    /// The era that began with the change, or was the current one.
    pub(crate) era: u32,
    /// The era since which it records, if it does.
    pub(crate) since: Option<u32>,
}

impl BitmapRecord {
    /// Which file has its bits.
    pub(super) fn bits_id(&self) -> BitsId {
        BitsId {
            uuid: self.uuid,
            revision: self.revision,
        }
    }
}

/// What was asked for, to be compared when it is asked for again.
#[derive(Clone, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
pub(crate) struct RequestRecord {
    pub(crate) id: Option<Name>,
    pub(crate) disks: Option<Vec<Name>>,
    pub(crate) since: Option<String>,
    pub(crate) checkpoint: Option<Name>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) bitmaps: Option<Vec<String>>,
    #[serde(default)]
    pub(crate) consumer: Option<Name>,
    #[serde(default)]
    pub(crate) expires_s: Option<u64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) scratch_limit: Option<u64>,
}

/// How much of a journal is not what it should be.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub(crate) struct Damage {
    /// Blocks that are followed by a record: something was there once.
    pub(crate) within: u64,
    /// Blocks at the end, which may have been a record that was never complete.
    pub(crate) at_end: u64,
}

impl Journal {
    /// The journal in `dir`, and what of it is damaged. A file that is missing is empty.
    pub(crate) fn open(dir: &Path) -> io::Result<(Self, Damage)> {
        Self::read(LogFile::open(&dir.join(JOURNAL))?)
    }

    /// An empty journal, which is durable as far as the file goes.
    pub(crate) async fn create(dir: &Path) -> io::Result<()> {
        LogFile::create(&dir.join(JOURNAL))?.sync().await
    }
}

impl<L: Log> Journal<L> {
    fn read(log: L) -> io::Result<(Self, Damage)> {
        let bytes = log.load(LENGTH_MAX)?;
        let (records, damage, number) = replay(&bytes);
        // Behind everything that is there, whatever it is.
        let end = bytes.len().next_multiple_of(BLOCK) as u64;
        let mut journal = Self {
            log,
            end,
            number,
            ledger: records.iter().collect(),
            // What may have been a record once must not stand between others; and what the last server
            // stored may not be durable, also when a sync succeeds from now on.
            in_doubt: !bytes.is_empty(),
            bound: LENGTH_MAX,
            reserved: end,
        };
        journal.bound = bound_of(journal.rewritten()?.len() as u64);
        journal.reserve();
        Ok((journal, damage))
    }

    /// What it says.
    pub(crate) fn ledger(&self) -> &Ledger {
        &self.ledger
    }

    /// Stores `record` and makes it durable. After a failure it counts as never said.
    pub(crate) async fn append(&mut self, record: &Record) -> io::Result<()> {
        let frame = encode(self.number + 1, record)?;
        let end = self.end + frame.len() as u64;
        if (self.in_doubt || end > self.bound)
            && let Err(error) = self.rewrite().await
            && (self.in_doubt || end > LENGTH_MAX)
        {
            return Err(error);
        }
        let frame = encode(self.number + 1, record)?;
        // In doubt until it is known to be there: what is stored may be found.
        self.in_doubt = true;
        self.log.store(self.end, &frame)?;
        self.end += frame.len() as u64;
        self.number += 1;
        self.log.sync().await?;
        self.in_doubt = false;
        self.ledger.take(record);
        self.reserve();
        Ok(())
    }

    /// The same for what is so in any case: after a failure it is owed, and durable before anything
    /// that is appended later.
    pub(crate) async fn append_or_owe(&mut self, record: &Record) -> io::Result<()> {
        let appended = self.append(record).await;
        if appended.is_err() {
            self.owe(record);
        }
        appended
    }

    /// Says `record` with whatever is appended next.
    pub(crate) fn owe(&mut self, record: &Record) {
        self.in_doubt = true;
        self.ledger.take(record);
    }

    /// Pays what is owed.
    pub(crate) async fn settle(&mut self) -> io::Result<()> {
        if self.in_doubt {
            self.rewrite().await?;
        }
        Ok(())
    }

    /// Writes the file anew if less than half of it is of use.
    pub(crate) async fn tidy(&mut self) -> io::Result<()> {
        if 2 * self.rewritten()?.len() as u64 <= self.end {
            self.rewrite().await?;
        }
        Ok(())
    }

    async fn rewrite(&mut self) -> io::Result<()> {
        let bytes = self.rewritten()?;
        let successor = self.log.successor()?;
        successor.store(0, &bytes)?;
        successor.sync().await?;
        successor.succeed()?;
        self.log = successor;
        self.end = bytes.len() as u64;
        self.number += self.ledger.records().len() as u64;
        self.bound = bound_of(self.end);
        self.reserved = self.end;
        // Whichever of the two a power cut leaves has to have all that is acknowledged.
        self.in_doubt = true;
        self.log.sync_place().await?;
        self.in_doubt = false;
        self.reserve();
        Ok(())
    }

    /// The file as it would be written anew.
    fn rewritten(&self) -> io::Result<Vec<u8>> {
        let mut bytes = Vec::new();
        for (record, number) in self.ledger.records().iter().zip(self.number + 1..) {
            bytes.extend(encode(number, record)?);
        }
        Ok(bytes)
    }

    /// Keeps room for the records to come, so that a backup can be ended on a file system that is
    /// full because of it.
    fn reserve(&mut self) {
        if self.reserved >= self.end + RESERVED / 2 {
            return;
        }
        // Where there is none, the next append fails, or does not.
        if self.log.reserve_behind(self.end, RESERVED).is_ok() {
            self.reserved = self.end + RESERVED;
        }
    }
}

/// A record: magic, CRC-32 of all that follows, number, length, JSON, zeroes up to a whole block.
pub(super) fn encode(number: u64, record: &Record) -> io::Result<Vec<u8>> {
    let text = serde_json::to_vec(record).map_err(io::Error::other)?;
    let mut frame = Vec::with_capacity((HEAD + text.len()).next_multiple_of(BLOCK));
    frame.extend(MAGIC);
    frame.extend([0; 4]);
    frame.extend(number.to_le_bytes());
    frame.extend((text.len() as u64).to_le_bytes());
    frame.extend(text);
    let sum = crc32fast::hash(&frame[8..]);
    frame[4..8].copy_from_slice(&sum.to_le_bytes());
    frame.resize(frame.len().next_multiple_of(BLOCK), 0);
    Ok(frame)
}

fn decode(bytes: &[u8]) -> Option<(u64, usize, Record)> {
    let head = bytes.get(..HEAD)?;
    if head[..4] != *MAGIC {
        return None;
    }
    let number = u64::from_le_bytes(head[8..16].try_into().ok()?);
    let length = usize::try_from(u64::from_le_bytes(head[16..24].try_into().ok()?)).ok()?;
    let end = HEAD.checked_add(length)?;
    let sum = crc32fast::hash(bytes.get(8..end)?);
    if sum.to_le_bytes() != head[4..8] {
        return None;
    }
    let record = serde_json::from_slice(&bytes[HEAD..end]).ok()?;
    Some((number, end.next_multiple_of(BLOCK), record))
}

/// What is in `bytes`, what of it is damaged, and the highest number.
pub(super) fn replay(bytes: &[u8]) -> (Vec<Record>, Damage, u64) {
    let (mut records, mut damage) = (Vec::new(), Damage::default());
    let (mut at, mut last) = (0, 0);
    while at < bytes.len() {
        match decode(&bytes[at..]) {
            // A record from before, or in the wrong place, says nothing.
            Some((number, length, record)) if number > last => {
                records.push(record);
                last = number;
                at += length;
                damage.within += std::mem::take(&mut damage.at_end);
            }
            _ => {
                damage.at_end += 1;
                at += BLOCK;
            }
        }
    }
    (records, damage, last)
}

fn bound_of(length: u64) -> u64 {
    (2 * length).clamp(BOUND_MIN, LENGTH_MAX)
}

pub(super) const JOURNAL: &str = "journal";
const MAGIC: &[u8; 4] = b"SPJR";
const HEAD: usize = 24;
const BLOCK: usize = 512;

/// Some hundred thousand records; more means that something is wrong.
const LENGTH_MAX: u64 = 64 << 20;

/// A shorter journal is read in no time, and is not worth writing anew while the server runs.
const BOUND_MIN: u64 = 256 << 10;

/// Room for the ends of all backups that may be open, and then some.
const RESERVED: u64 = 128 << 10;

#[cfg(test)]
mod power;
#[cfg(test)]
mod tests;
