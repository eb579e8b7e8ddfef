//! What is known of a point, and how that is written down.

use std::collections::BTreeSet;
use std::fs::File;
use std::io;
use std::ops::Range;
use std::path::Path;

use block::qcow2::Layout;
use serde::{Deserialize, Deserializer, Serialize};
use time::OffsetDateTime;
use uuid::Uuid;

use super::chunk::{CHUNK_SIZE_MAX, Chunk, chunks};
use super::digest::Digest;
use super::error::ArchiveError;
use super::plan::{self, Identity, Mode, Origin, Since};
use super::sealed::{self, Unsound};
use super::{bounded, runs};
use crate::names::Name;

/// A point in the folder, without the map and the hashes of its contents.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
pub struct Point {
    /// From 1 on; never used again.
    pub number: u64,
    /// The instant that it holds.
    #[serde(with = "time::serde::rfc3339")]
    pub instant: OffsetDateTime,
    /// Where it was copied from.
    pub origin: Origin,
    /// The server's backup that it is a copy of.
    pub backup: Option<Identity>,
    /// The checkpoint of that instant.
    pub checkpoint: Option<Identity>,
    /// For how long hooks held the machine, in microseconds.
    pub held_us: Option<u64>,
    /// The disks in it.
    pub disks: Vec<DiskEntry>,
}

/// One disk of a point.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
pub struct DiskEntry {
    /// Its name.
    pub name: String,
    /// Its uuid, if the server told one.
    pub uuid: Option<Uuid>,
    /// How large the disk is, in bytes.
    pub size: u64,
    /// Whether all of it is here.
    pub mode: Mode,
    /// Why it is a full, in words.
    pub reason: Option<String>,
    /// The checkpoint since which changes are here.
    pub since: Option<Since>,
    /// What an incremental builds on.
    pub parent: Option<Parent>,
    /// The name of the file, in the folder of the point.
    pub file: String,
    /// How long that file is.
    pub file_size: u64,
    /// The hash of that file.
    pub blake3: Digest,
    /// The cluster size of that file.
    pub cluster_size: u64,
    /// The size of the chunks that are hashed.
    pub chunk_size: u64,
    /// How many bytes of the disk are data here.
    pub data_bytes: u64,
    /// How many bytes are recorded as zeroes.
    pub zero_bytes: u64,
}

/// The point that an incremental builds on.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub struct Parent {
    /// Its number.
    pub point: u64,
    /// The hash of its file of this disk.
    pub blake3: Digest,
}

/// All that is known of a point.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Manifest {
    pub(super) point: Point,
    /// Of each disk of the point, in the same order.
    pub(super) contents: Vec<Contents>,
}

/// What of a disk lies in its file, and what it is.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Contents {
    pub(super) data: Vec<Range<u64>>,
    pub(super) zero: Vec<Range<u64>>,
    /// The hash of each chunk that has data, in order.
    pub(super) hashes: Vec<(u64, Digest)>,
}

impl Point {
    /// The entry of a disk.
    pub fn disk(&self, name: &str) -> Option<&DiskEntry> {
        self.disks.iter().find(|disk| disk.name == name)
    }
}

impl DiskEntry {
    /// How its file is laid out.
    pub(super) fn layout(&self, contents: &Contents) -> Layout {
        self.try_layout(contents)
            .expect("a manifest is believed only if there is a layout")
    }

    fn try_layout(&self, contents: &Contents) -> Result<Layout, String> {
        let parent = self.parent.as_ref().map(|parent| parent.point);
        let runs = (&contents.data[..], &contents.zero[..]);
        plan::layout(&self.name, self.size, self.cluster_size, parent, runs)
            .map_err(|error| error.to_string())
    }
}

impl Contents {
    /// The chunks with their hashes.
    pub(super) fn chunks(&self, chunk_size: u64) -> impl Iterator<Item = (Chunk, Digest)> + '_ {
        let hashes = self.hashes.iter().map(|(_, hash)| *hash);
        chunks(&self.data, chunk_size).zip(hashes)
    }
}

impl Manifest {
    /// Reads the manifest in the folder of point `number`.
    pub(super) fn read(folder: &Path, number: u64) -> Result<Self, ArchiveError> {
        let path = folder.join(MANIFEST);
        let damaged = |reason: String| ArchiveError::Manifest {
            path: path.clone(),
            reason,
        };
        let file = File::open(&path).map_err(|error| match error.kind() {
            io::ErrorKind::NotFound => damaged("it is missing".to_owned()),
            _ => ArchiveError::reading(&path, error),
        })?;
        let text = sealed::read_at_most(file, MANIFEST_MAX)
            .map_err(|error| ArchiveError::reading(&path, error))?
            .ok_or_else(|| damaged(format!("it is longer than {MANIFEST_MAX} bytes")))?;
        let manifest = Self::parse(&text).map_err(|unsound| match unsound {
            Unsound::Damaged(reason) => damaged(reason),
            Unsound::Newer(version) => ArchiveError::Newer {
                path: path.clone(),
                version,
                known: VERSION,
            },
        })?;
        if manifest.point.number != number {
            let found = manifest.point.number;
            return Err(damaged(format!("it is that of point {found}")));
        }
        Ok(manifest)
    }

    /// Believes a text that is whole and says only what can be.
    pub(super) fn parse(text: &[u8]) -> Result<Self, Unsound> {
        let document: Document = sealed::unseal(text, VERSION)?;
        document.believe().map_err(Unsound::Damaged)
    }

    /// The text that is parsed as this.
    pub(super) fn text(&self) -> Vec<u8> {
        sealed::seal(&Document::from(self))
    }
}

/// The shape of `manifest.json`.
#[derive(Deserialize, Serialize)]
struct Document {
    version: u64,
    point: u64,
    #[serde(with = "time::serde::rfc3339")]
    instant: OffsetDateTime,
    origin: Origin,
    backup: Option<Identity>,
    checkpoint: Option<Identity>,
    held_us: Option<u64>,
    #[serde(deserialize_with = "disks")]
    disks: Vec<DiskDocument>,
}

#[derive(Deserialize, Serialize)]
struct DiskDocument {
    disk: String,
    disk_uuid: Option<Uuid>,
    size: u64,
    mode: Mode,
    reason: Option<String>,
    since: Option<Since>,
    parent: Option<Parent>,
    file: String,
    file_size: u64,
    blake3: Digest,
    cluster_size: u64,
    chunk_size: u64,
    #[serde(with = "runs::pairs")]
    data: Vec<Range<u64>>,
    #[serde(with = "runs::pairs")]
    zero: Vec<Range<u64>>,
    #[serde(deserialize_with = "hashes")]
    chunks: Vec<(u64, Digest)>,
}

impl Document {
    fn believe(self) -> Result<Manifest, String> {
        let number = self.point;
        if number == 0 {
            return Err("points count from 1".to_owned());
        }
        if self.disks.is_empty() {
            return Err("it has no disks".to_owned());
        }
        let mut names = BTreeSet::new();
        let (mut disks, mut contents) = (Vec::new(), Vec::new());
        for disk in self.disks {
            if !names.insert(disk.disk.clone()) {
                return Err(format!("disk {} is in it twice", disk.disk));
            }
            let (entry, holds) = disk.believe(number)?;
            disks.push(entry);
            contents.push(holds);
        }
        let point = Point {
            number,
            instant: self.instant,
            origin: self.origin,
            backup: self.backup,
            checkpoint: self.checkpoint,
            held_us: self.held_us,
            disks,
        };
        Ok(Manifest { point, contents })
    }
}

impl DiskDocument {
    fn believe(self, number: u64) -> Result<(DiskEntry, Contents), String> {
        // It becomes a part of paths.
        Name::parse(&self.disk).map_err(|error| error.to_string())?;
        let name = &self.disk;
        if self.file != plan::file_name(name) {
            return Err(format!("{name} lies in another file than {name}.qcow2"));
        }
        let is_incremental = self.mode == Mode::Incremental;
        let parent = self.parent.as_ref().map(|parent| parent.point);
        if parent.is_some() != is_incremental || parent.is_some_and(|point| point >= number) {
            return Err(format!("{name} is {:?} with parent {parent:?}", self.mode));
        }
        let chunk_size = self.chunk_size;
        if !chunk_size.is_power_of_two()
            || !(self.cluster_size..=CHUNK_SIZE_MAX).contains(&chunk_size)
        {
            return Err(format!("{name} has chunks of {chunk_size} bytes"));
        }
        let contents = Contents {
            data: self.data,
            zero: self.zero,
            hashes: self.chunks,
        };
        let entry = DiskEntry {
            name: self.disk,
            uuid: self.disk_uuid,
            size: self.size,
            mode: self.mode,
            reason: self.reason,
            since: self.since,
            parent: self.parent,
            file: self.file,
            file_size: self.file_size,
            blake3: self.blake3,
            cluster_size: self.cluster_size,
            chunk_size,
            data_bytes: runs::bytes(&contents.data),
            zero_bytes: runs::bytes(&contents.zero),
        };
        let file_size = entry.try_layout(&contents)?.file_size();
        let name = &entry.name;
        if file_size != entry.file_size {
            let said = entry.file_size;
            return Err(format!(
                "the file of {name} has {said} bytes, and needs {file_size}"
            ));
        }
        let expected = chunks(&contents.data, chunk_size).map(|chunk| chunk.index);
        if !expected.eq(contents.hashes.iter().map(|(index, _)| *index)) {
            return Err(format!("the hashes of {name} are not those of its chunks"));
        }
        Ok((entry, contents))
    }
}

impl From<&Manifest> for Document {
    fn from(manifest: &Manifest) -> Self {
        let Manifest { point, contents } = manifest;
        let disks = point.disks.iter().zip(contents);
        let disks = disks.map(|(disk, contents)| DiskDocument {
            disk: disk.name.clone(),
            disk_uuid: disk.uuid,
            size: disk.size,
            mode: disk.mode,
            reason: disk.reason.clone(),
            since: disk.since.clone(),
            parent: disk.parent.clone(),
            file: disk.file.clone(),
            file_size: disk.file_size,
            blake3: disk.blake3,
            cluster_size: disk.cluster_size,
            chunk_size: disk.chunk_size,
            data: contents.data.clone(),
            zero: contents.zero.clone(),
            chunks: contents.hashes.clone(),
        });
        Self {
            version: VERSION,
            point: point.number,
            instant: point.instant,
            origin: point.origin.clone(),
            backup: point.backup.clone(),
            checkpoint: point.checkpoint.clone(),
            held_us: point.held_us,
            disks: disks.collect(),
        }
    }
}

fn disks<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<DiskDocument>, D::Error> {
    bounded::list(deserializer, DISKS_MAX, Ok)
}

fn hashes<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<(u64, Digest)>, D::Error> {
    bounded::list(deserializer, CHUNKS_MAX, Ok)
}

/// The name of the file in the folder of a point.
pub(super) const MANIFEST: &str = "manifest.json";

/// What is written here, and the newest that is read.
const VERSION: u64 = 1;

/// What is read into memory at once: some ten disks of the most runs and chunks.
pub(super) const MANIFEST_MAX: u64 = 1 << 30;

/// Of one point: more than a machine has.
pub(super) const DISKS_MAX: usize = 1024;

/// Of one disk: 64 TiB.
pub(super) const CHUNKS_MAX: usize = 1 << 22;

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn manifest() -> Manifest {
        let contents = Contents {
            data: vec![0..128 << 10, 2 << 20..(2 << 20) + (64 << 10)],
            zero: vec![1 << 20..2 << 20],
            hashes: vec![(0, Digest::of(b"a")), (2, Digest::of(b"b"))],
        };
        let entry = DiskEntry {
            name: "vda".into(),
            uuid: Some(Uuid::from_u128(7)),
            size: 4 << 20,
            mode: Mode::Incremental,
            reason: None,
            since: Some(Since {
                name: "cp1".into(),
                uuid: None,
            }),
            parent: Some(Parent {
                point: 1,
                blake3: Digest::of(b"c"),
            }),
            file: "vda.qcow2".into(),
            file_size: 8 << 16,
            blake3: Digest::of(b"d"),
            cluster_size: 64 << 10,
            chunk_size: 1 << 20,
            data_bytes: 192 << 10,
            zero_bytes: 1 << 20,
        };
        let point = Point {
            number: 2,
            instant: OffsetDateTime::UNIX_EPOCH,
            origin: Origin {
                place: "/run/stillpoint".into(),
                vouched: true,
            },
            backup: None,
            checkpoint: None,
            held_us: Some(12),
            disks: vec![entry],
        };
        Manifest {
            point,
            contents: vec![contents],
        }
    }

    #[test]
    fn what_is_written_is_read() {
        let manifest = manifest();
        assert_eq!(Manifest::parse(&manifest.text()), Ok(manifest));
    }

    #[test]
    fn what_cannot_be_is_refused_although_its_hash_is_right() {
        let good: Value = serde_json::from_slice(&manifest().text()).unwrap();
        let check = |pointer: &str, value: Value| {
            let mut changed = good.clone();
            changed.as_object_mut().unwrap().remove("blake3");
            *changed.pointer_mut(pointer).expect(pointer) = value.clone();
            let found = Manifest::parse(&sealed::seal(&changed));
            assert!(
                matches!(found, Err(Unsound::Damaged(_))),
                "{pointer} {value}: {found:?}"
            );
        };
        check("/point", json!(0));
        check("/point", json!(1));
        check("/instant", json!("yesterday"));
        check("/disks", json!([]));
        check("/disks", json!([good["disks"][0], good["disks"][0]]));
        check("/disks/0/disk", json!("../etc"));
        check("/disks/0/file", json!("../1/vda.qcow2"));
        check("/disks/0/mode", json!("full"));
        check("/disks/0/parent", json!(null));
        check("/disks/0/size", json!(64u64 << 40));
        check("/disks/0/size", json!(1u64 << 20));
        check("/disks/0/size", json!(u64::MAX));
        check("/disks/0/file_size", json!(1));
        check("/disks/0/blake3", json!("00"));
        for cluster_size in [0, 1, 65_537, 1 << 40, u64::MAX] {
            check("/disks/0/cluster_size", json!(cluster_size));
        }
        for chunk_size in [0, 1, 4096, 2 << 20, 1 << 40, u64::MAX] {
            check("/disks/0/chunk_size", json!(chunk_size));
        }
        for data in [
            json!([]),
            json!([[0, 0]]),
            json!([[u64::MAX, 1]]),
            json!([[0, u64::MAX]]),
            json!([[65536, 65536], [0, 65536]]),
            json!([[0, 65536], [0, 65536]]),
            json!([[0, 512]]),
            json!([[0, 2 << 20]]),
            json!([[0]]),
            json!({}),
        ] {
            check("/disks/0/data", data);
        }
        check("/disks/0/zero", json!([[0, 65536]]));
        check("/disks/0/chunks", json!([]));
        let hash = Digest::of(b"a").to_string();
        check("/disks/0/chunks", json!([[0, hash], [1, hash]]));
        check("/disks/0/chunks", json!([[0, hash], [2, "x"]]));
    }
}
