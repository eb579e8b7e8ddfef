//! What happened to a disk's checkpoints and backups, one record after the other.
//!
//! A record begins at a multiple of 512 bytes, so that after damage the next one is found. What a
//! record says is true whether or not the others can be read: a checkpoint is a name for an era, and
//! it is the map that knows what changed. So a record that is lost costs a checkpoint, a backup or a
//! deletion, and never makes a change disappear.

use std::io;

use block::Cells;
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use crate::names::Name;

/// The file, to which records are appended.
pub(crate) struct Journal {
    cells: Cells,
    end: u64,
    number: u64,
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
    /// A checkpoint was taken.
    Checkpoint(CheckpointRecord),
    /// A checkpoint was deleted.
    Deleted {
        /// Which one.
        uuid: Uuid,
    },
    /// A backup was begun.
    Begun(Box<BackupRecord>),
    /// A backup was committed: this alone makes its checkpoint visible.
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
}

/// A checkpoint, as far as one disk is concerned.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub(crate) struct CheckpointRecord {
    pub(crate) name: Name,
    pub(crate) uuid: Uuid,
    /// Nanoseconds since 1970.
    pub(crate) created: i64,
    pub(crate) era: u32,
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

/// What was asked for, to be compared when it is asked for again.
#[derive(Clone, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
pub(crate) struct RequestRecord {
    pub(crate) id: Option<Name>,
    pub(crate) disks: Option<Vec<Name>>,
    pub(crate) since: Option<String>,
    pub(crate) checkpoint: Option<Name>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) bitmaps: Option<Vec<String>>,
}

/// What a journal holds.
#[derive(Debug)]
pub(crate) struct History {
    /// In the order in which it happened.
    pub(crate) records: Vec<Record>,
    /// How many blocks are not what they should be.
    pub(crate) damaged: u64,
}

impl Journal {
    /// The journal that is in `cells`, and what it holds.
    pub(crate) fn open(cells: Cells) -> io::Result<(Self, History)> {
        let length = cells.length()?.min(LENGTH_MAX);
        let mut bytes = vec![0; length as usize];
        cells.load(0, &mut bytes)?;
        let (history, number) = replay(&bytes);
        // Behind everything that is there, whatever it is.
        let end = length.next_multiple_of(BLOCK as u64);
        Ok((Self { cells, end, number }, history))
    }

    /// Stores `record` and makes it durable.
    pub(crate) async fn append(&mut self, record: &Record) -> io::Result<()> {
        let number = self.number + 1;
        let frame = encode(number, record)?;
        if self.end + frame.len() as u64 > LENGTH_MAX {
            return Err(io::Error::new(
                io::ErrorKind::StorageFull,
                "the journal is full",
            ));
        }
        self.cells.store(self.end, &frame)?;
        // Counted as there also if the sync fails: what is stored may be found.
        self.end += frame.len() as u64;
        self.number = number;
        self.cells.sync().await
    }
}

/// A record: magic, CRC-32 of all that follows, number, length, JSON, zeroes up to a whole block.
fn encode(number: u64, record: &Record) -> io::Result<Vec<u8>> {
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

fn replay(bytes: &[u8]) -> (History, u64) {
    let mut history = History {
        records: Vec::new(),
        damaged: 0,
    };
    let (mut at, mut last) = (0, 0);
    while at < bytes.len() {
        match decode(&bytes[at..]) {
            // A record from before, or in the wrong place, says nothing.
            Some((number, length, record)) if number > last => {
                history.records.push(record);
                last = number;
                at += length;
            }
            _ => {
                history.damaged += 1;
                at += BLOCK;
            }
        }
    }
    (history, last)
}

const MAGIC: &[u8; 4] = b"SPJR";
const HEAD: usize = 24;
const BLOCK: usize = 512;
/// A hundred thousand records; more means that something is wrong.
const LENGTH_MAX: u64 = 64 << 20;

#[cfg(test)]
mod tests {
    use super::*;

    fn records() -> Vec<Record> {
        let checkpoint = |number: u32| {
            Record::Checkpoint(CheckpointRecord {
                name: Name::parse(&format!("cp{number}")).unwrap(),
                uuid: Uuid::from_u128(number.into()),
                created: i64::MAX,
                era: number,
            })
        };
        vec![
            checkpoint(1),
            Record::Started { era: u32::MAX },
            checkpoint(2),
            checkpoint(3),
        ]
    }

    fn bytes() -> Vec<u8> {
        let frames = records()
            .into_iter()
            .zip(1..)
            .map(|(r, number)| encode(number, &r).unwrap());
        frames.flatten().collect()
    }

    #[test]
    fn what_was_appended_is_replayed() {
        let (history, number) = replay(&bytes());
        assert_eq!(
            (history.records, history.damaged, number),
            (records(), 0, 4)
        );
    }

    #[test]
    fn a_damaged_record_costs_itself_and_no_other() {
        let good = bytes();
        for at in 0..good.len() {
            let mut bad = good.clone();
            bad[at] ^= 0x10;
            let (history, _) = replay(&bad);
            let intact = records()
                .into_iter()
                .filter(|r| history.records.contains(r))
                .count();
            assert!(intact >= 3, "byte {at}: {history:?}");
            assert!(
                history.records.iter().all(|r| records().contains(r)),
                "byte {at}"
            );
        }
    }

    #[test]
    fn a_torn_end_is_not_replayed() {
        let good = bytes();
        for length in 0..good.len() {
            let (history, _) = replay(&good[..length]);
            assert_eq!(
                history.records[..],
                records()[..history.records.len()],
                "{length} bytes"
            );
        }
    }
}
