//! A point that is being made.
//!
//! It lies in a folder of its own, `N.partial`, which has in it
//!
//! - the qcow2 file of each disk, its tables first of all;
//! - `DISK.done`, the [records](Records) of what is stored of it;
//! - `plan.json`, which is made last: without it the folder is nothing, and is removed.

use std::fs::{self, DirBuilder, File};
use std::io;
use std::ops::Range;
use std::os::unix::fs::{DirBuilderExt, FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use block::qcow2::Layout;
use bytes::Bytes;
use serde::{Deserialize, Serialize};

use super::chunk::{self, Chunk, chunk_size};
use super::digest::Digest;
use super::error::ArchiveError;
use super::folder::{self, Archive, Writer};
use super::manifest::{CHUNKS_MAX, DISKS_MAX, Parent, Point};
use super::plan::{self, DiskPlan, Plan};
use super::progress::{Progress, step};
use super::records::Records;
use super::sealed::{self, Unsound};
use super::zeroes::{self, Space};
use super::{publish, runs};

/// A point that is being made: all disks of one instant, or, until it is finished, none.
///
/// Dropped, it stays where it is, and can go on in another process.
#[derive(Debug)]
pub struct Draft {
    pub(super) number: u64,
    pub(super) plan: Plan,
    pub(super) disks: Vec<Arc<DiskDraft>>,
    /// Where it is made, and where it is then.
    pub(super) folder: PathBuf,
    pub(super) place: PathBuf,
    /// Nobody else works on it.
    _writer: Writer,
}

/// One disk of it. Shared by all threads that fetch.
#[derive(Debug)]
pub struct DiskDraft {
    plan: DiskPlan,
    pub(super) map: Map,
    pub(super) parent: Option<Parent>,
    pub(super) path: PathBuf,
    pub(super) file: File,
    pub(super) records: Records,
    /// Whether the file may have something where zeroes are to be.
    is_resumed: bool,
}

/// What of a disk is to lie where in its file.
#[derive(Debug)]
pub(super) struct Map {
    pub(super) data: Vec<Range<u64>>,
    pub(super) zero: Vec<Range<u64>>,
    pub(super) layout: Layout,
    pub(super) cluster_size: u64,
    pub(super) chunk_size: u64,
}

/// A piece of a chunk as it comes from a source.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum Piece {
    /// These bytes.
    Data(Bytes),
    /// So many zeroes.
    Zero(u64),
}

/// What an interrupted run has left in a folder.
#[derive(Debug)]
#[expect(clippy::large_enum_variant, reason = "there is one in a run")]
pub enum Leftover {
    /// Nothing.
    Nothing,
    /// A point that can go on.
    Interrupted(Interrupted),
    /// Something that could not go on, for this reason; it has been removed.
    Removed(String),
}

/// A point whose making was interrupted.
#[derive(Debug)]
pub struct Interrupted {
    number: u64,
    plan: Plan,
    parents: Vec<Option<Parent>>,
    folder: PathBuf,
    place: PathBuf,
    writer: Writer,
}

impl Interrupted {
    /// What it was to hold.
    pub fn plan(&self) -> &Plan {
        &self.plan
    }

    /// Goes on with it: reads back what is stored, and keeps what is right.
    pub fn go_on(self, progress: &dyn Progress) -> Result<Draft, ArchiveError> {
        let disks = self.plan.disks.iter().zip(self.parents);
        let disks = disks.map(|(disk, parent)| {
            let disk = DiskDraft::open(&self.folder, disk.clone(), parent, progress)?;
            Ok(Arc::new(disk))
        });
        Ok(Draft {
            number: self.number,
            disks: disks.collect::<Result<_, ArchiveError>>()?,
            plan: self.plan,
            folder: self.folder,
            place: self.place,
            _writer: self.writer,
        })
    }

    /// Removes it.
    pub fn discard(self) -> Result<(), ArchiveError> {
        remove(&self.folder)
    }
}

impl Draft {
    /// What it is to hold.
    pub fn plan(&self) -> &Plan {
        &self.plan
    }

    /// Its number, as soon as it is published.
    pub fn number(&self) -> u64 {
        self.number
    }

    /// Its disks, in the order of the plan.
    pub fn disks(&self) -> &[Arc<DiskDraft>] {
        &self.disks
    }

    /// Syncs, drops what is cached, reads back, compares with the hashes of what was received, and
    /// publishes. When this returns a point, it is durable. After an error it stays as it is, and
    /// another run goes on with it.
    pub fn finish(self, progress: &dyn Progress) -> Result<Point, ArchiveError> {
        publish::finish(&self, progress)
    }

    /// Removes it.
    pub fn discard(self) -> Result<(), ArchiveError> {
        remove(&self.folder)
    }
}

impl DiskDraft {
    fn create(folder: &Path, plan: DiskPlan, parent: Option<Parent>) -> Result<Self, ArchiveError> {
        let map = Map::of(&plan)?;
        let path = folder.join(plan::file_name(&plan.name));
        let writing = |error| ArchiveError::writing(&path, error);
        let mut options = File::options();
        let options = options.read(true).write(true).create_new(true).mode(0o600);
        let file = options.open(&path).map_err(writing)?;
        map.layout.write_metadata(&file).map_err(writing)?;
        let records = Records::create(&folder.join(records_name(&plan.name))).map_err(writing)?;
        Ok(Self {
            plan,
            map,
            parent,
            path,
            file,
            records,
            is_resumed: false,
        })
    }

    fn open(
        folder: &Path,
        plan: DiskPlan,
        parent: Option<Parent>,
        progress: &dyn Progress,
    ) -> Result<Self, ArchiveError> {
        let map = Map::of(&plan)?;
        let path = folder.join(plan::file_name(&plan.name));
        let writing = |error| ArchiveError::writing(&path, error);
        let file = File::options().read(true).write(true).open(&path);
        let file = file.map_err(writing)?;
        map.restore_metadata(&file).map_err(writing)?;
        let mut buffer = Vec::new();
        let records = folder.join(records_name(&plan.name));
        let records = Records::open(&records, |index, hash| {
            let Some(chunk) = map.chunk(index) else {
                return Ok(false);
            };
            buffer.resize(chunk.bytes() as usize, 0);
            // What cannot be read is fetched again.
            let is_read = file.read_exact_at(&mut buffer, map.host(&chunk)).is_ok();
            step(progress, chunk.bytes())?;
            Ok::<_, ArchiveErrorOrIo>(is_read && Digest::of(&buffer) == hash)
        });
        let records = records.map_err(|error| match error {
            ArchiveErrorOrIo::Archive(error) => error,
            ArchiveErrorOrIo::Io(error) => ArchiveError::reading(&path, error),
        })?;
        Ok(Self {
            plan,
            map,
            parent,
            path,
            file,
            records,
            is_resumed: true,
        })
    }

    /// What it is to hold.
    pub fn plan(&self) -> &DiskPlan {
        &self.plan
    }

    /// How many bytes of data it is to hold, rounded out to clusters.
    pub fn data_bytes(&self) -> u64 {
        runs::bytes(&self.map.data)
    }

    /// How many bytes it records as zeroes.
    pub fn zero_bytes(&self) -> u64 {
        runs::bytes(&self.map.zero)
    }

    /// The chunks that are not there yet, ascending.
    pub fn chunks(&self) -> impl Iterator<Item = Chunk> + '_ {
        let all = chunk::chunks(&self.map.data, self.map.chunk_size);
        all.filter(|chunk| self.records.hash_of(chunk.index).is_none())
    }

    /// Takes the contents of a chunk: the bytes of its runs in order, in pieces of any length. Any
    /// thread may, in any order.
    pub fn put(&self, chunk: &Chunk, data: &[Piece]) -> Result<(), ArchiveError> {
        let length: u64 = data.iter().map(Piece::length).sum();
        if length != chunk.bytes() || self.map.chunk(chunk.index).as_ref() != Some(chunk) {
            let (index, name) = (chunk.index, &self.plan.name);
            let reason = format!("{length} bytes are not chunk {index} of {name}");
            return Err(ArchiveError::Plan(reason));
        }
        let hash = hash(data);
        self.store(self.map.host(chunk), data)
            .and_then(|()| self.records.add(chunk.index, hash))
            .map_err(|error| ArchiveError::writing(&self.path, error))
    }

    fn store(&self, mut offset: u64, data: &[Piece]) -> io::Result<()> {
        for piece in data {
            match piece {
                Piece::Data(bytes) => self.file.write_all_at(bytes, offset)?,
                // A new file is all zeroes where nothing was written.
                Piece::Zero(_) if !self.is_resumed => {}
                Piece::Zero(length) => {
                    zeroes::fill(&self.file, offset, *length, Space::GivenBack)?;
                }
            }
            offset += piece.length();
        }
        Ok(())
    }
}

impl Piece {
    fn length(&self) -> u64 {
        match self {
            Self::Data(bytes) => bytes.len() as u64,
            Self::Zero(length) => *length,
        }
    }
}

impl Map {
    fn of(plan: &DiskPlan) -> Result<Self, ArchiveError> {
        let (data, zero) = plan.by_clusters();
        let cluster_size = plan.cluster_size();
        let layout = plan::layout(
            &plan.name,
            plan.size,
            cluster_size,
            plan.parent,
            (&data, &zero),
        );
        let layout = layout.map_err(|error| {
            ArchiveError::Plan(format!("no file can hold {}: {error}", plan.name))
        })?;
        Ok(Self {
            data,
            zero,
            layout,
            cluster_size,
            chunk_size: chunk_size(plan.size),
        })
    }

    /// The chunk of this index, if it has data.
    fn chunk(&self, index: u64) -> Option<Chunk> {
        let start = index.checked_mul(self.chunk_size)?;
        let end = start.saturating_add(self.chunk_size);
        let runs: Vec<_> = runs::within(&self.data, &(start..end)).collect();
        (!runs.is_empty()).then_some(Chunk { index, runs })
    }

    /// Where in the file a chunk lies, in one piece.
    fn host(&self, chunk: &Chunk) -> u64 {
        let host = self.layout.host_offset(chunk.runs[0].start);
        host.expect("a chunk is made of data")
    }

    /// Makes the file what it was before the first byte of data came, where it is not.
    fn restore_metadata(&self, file: &File) -> io::Result<()> {
        file.set_len(self.layout.file_size())?;
        let mut expected = vec![0; self.cluster_size as usize];
        let mut found = expected.clone();
        for offset in self.layout.metadata_offsets() {
            self.layout.fill(offset, &mut expected);
            let is_read = file.read_exact_at(&mut found, offset).is_ok();
            if !is_read || found != expected {
                file.write_all_at(&expected, offset)?;
            }
        }
        // After the end of the disk there is nothing.
        match self.data.last() {
            Some(last) if !last.end.is_multiple_of(self.cluster_size) => {
                let end = self.layout.host_offset(last.end - 1).expect("it is data") + 1;
                let length = self.layout.file_size() - end;
                zeroes::fill(file, end, length, Space::Kept)
            }
            _ => Ok(()),
        }
    }
}

/// Makes point `number` of the folder begin.
pub(super) fn begin(
    archive: &Archive,
    number: u64,
    plan: Plan,
    writer: Writer,
) -> Result<Draft, ArchiveError> {
    let parents = check(archive, number, &plan)?;
    let folder = archive.partial_folder_of(number);
    let writing = |error| ArchiveError::writing(&folder, error);
    let made = DirBuilder::new().mode(0o700).create(&folder);
    made.map_err(writing)?;
    let disks = plan.disks.iter().zip(parents).map(|(disk, parent)| {
        let disk = DiskDraft::create(&folder, disk.clone(), parent)?;
        Ok(Arc::new(disk))
    });
    let disks = disks.collect::<Result<_, ArchiveError>>();
    let document = PlanDocument {
        version: VERSION,
        point: number,
        plan,
    };
    let written = disks.and_then(|disks| {
        let text = sealed::seal(&document);
        folder::write_aside(&folder.join(PLAN), &text).map_err(writing)?;
        Ok(disks)
    });
    match written {
        Ok(disks) => Ok(Draft {
            number,
            plan: document.plan,
            disks,
            place: archive.folder_of(number),
            folder,
            _writer: writer,
        }),
        Err(error) => {
            // Nothing has come yet. What cannot be removed now is when the next run finds it.
            let _ = fs::remove_dir_all(&folder);
            Err(error)
        }
    }
}

/// What lies in the folder of point `number` that is being made.
pub(super) fn found(
    archive: &Archive,
    number: u64,
    writer: Writer,
) -> Result<Leftover, ArchiveError> {
    let folder = archive.partial_folder_of(number);
    let path = folder.join(PLAN);
    let useless = |reason: String| {
        remove(&folder)?;
        Ok(Leftover::Removed(reason))
    };
    let file = match File::open(&path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            return useless("it had not begun to copy".to_owned());
        }
        file => file.map_err(|error| ArchiveError::reading(&path, error))?,
    };
    let text = sealed::read_at_most(file, PLAN_MAX);
    let Some(text) = text.map_err(|error| ArchiveError::reading(&path, error))? else {
        return useless("its plan is damaged".to_owned());
    };
    let document: PlanDocument = match sealed::unseal(&text, VERSION) {
        Ok(document) => document,
        Err(Unsound::Damaged(reason)) => {
            return useless(format!("its plan is damaged: {reason}"));
        }
        Err(Unsound::Newer(version)) => {
            let known = VERSION;
            return Err(ArchiveError::Newer {
                path,
                version,
                known,
            });
        }
    };
    let PlanDocument { point, plan, .. } = document;
    let parents = match check(archive, number, &plan) {
        Ok(parents) if point == number => parents,
        Ok(_) => return useless(format!("its plan is that of point {point}")),
        Err(error) => return useless(error.to_string()),
    };
    let is_there = |disk: &DiskPlan| {
        folder.join(plan::file_name(&disk.name)).is_file()
            && folder.join(records_name(&disk.name)).is_file()
    };
    if !plan.disks.iter().all(is_there) {
        return useless("files of it are missing".to_owned());
    }
    Ok(Leftover::Interrupted(Interrupted {
        number,
        plan,
        parents,
        place: archive.folder_of(number),
        folder,
        writer,
    }))
}

/// Removes what a published point no longer needs.
pub(super) fn sweep(folder: &Path) {
    let Ok(entries) = fs::read_dir(folder) else {
        return;
    };
    for entry in entries.flatten() {
        let name = entry.file_name();
        if name == PLAN || Path::new(&name).extension().is_some_and(|end| end == DONE) {
            // It is in nobody's way.
            let _ = fs::remove_file(entry.path());
        }
    }
}

/// What each disk builds on, if the plan is one.
fn check(archive: &Archive, number: u64, plan: &Plan) -> Result<Vec<Option<Parent>>, ArchiveError> {
    let impossible = |reason| Err(ArchiveError::Plan(reason));
    if plan.disks.is_empty() || plan.disks.len() > DISKS_MAX {
        return impossible(format!("it has {} disks", plan.disks.len()));
    }
    if archive
        .points()
        .last()
        .is_some_and(|last| last.number >= number)
    {
        return impossible(format!("point {number} is not the next"));
    }
    let mut parents = Vec::new();
    for (at, disk) in plan.disks.iter().enumerate() {
        disk.check().map_err(ArchiveError::Plan)?;
        let name = &disk.name;
        if plan.disks[..at].iter().any(|other| other.name == *name) {
            return impossible(format!("disk {name} is in it twice"));
        }
        if disk.size.div_ceil(chunk_size(disk.size)) > CHUNKS_MAX as u64 {
            return impossible(format!("disk {name} is larger than 64 TiB"));
        }
        if let Some((_, last)) = archive.last_of(name)
            && let (Some(there), Some(here)) = (last.uuid, disk.uuid)
            && there != here
        {
            return Err(ArchiveError::OtherDisk {
                path: archive.path().to_owned(),
                disk: name.clone(),
            });
        }
        let parent = disk.parent.map(|point| {
            let entry = archive.point(point).and_then(|point| point.disk(name));
            let entry = entry.ok_or_else(|| ArchiveError::MissingLink {
                point: number,
                disk: name.clone(),
                missing: point,
            })?;
            let blake3 = entry.blake3;
            Ok::<_, ArchiveError>(Parent { point, blake3 })
        });
        parents.push(parent.transpose()?);
    }
    Ok(parents)
}

fn remove(folder: &Path) -> Result<(), ArchiveError> {
    let writing = |error| ArchiveError::writing(folder, error);
    // Without its plan nobody takes for a draft what is left of it.
    match fs::remove_file(folder.join(PLAN)) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(writing(error)),
        _ => {}
    }
    fs::remove_dir_all(folder).map_err(writing)
}

fn hash(data: &[Piece]) -> Digest {
    let mut hasher = blake3::Hasher::new();
    for piece in data {
        match piece {
            Piece::Data(bytes) => {
                hasher.update(bytes);
            }
            Piece::Zero(length) => {
                for zeroes in zeroes::pieces(*length) {
                    hasher.update(zeroes);
                }
            }
        }
    }
    Digest(hasher.finalize())
}

fn records_name(disk: &str) -> String {
    format!("{disk}.{DONE}")
}

enum ArchiveErrorOrIo {
    Archive(ArchiveError),
    Io(io::Error),
}

impl From<ArchiveError> for ArchiveErrorOrIo {
    fn from(error: ArchiveError) -> Self {
        Self::Archive(error)
    }
}

impl From<io::Error> for ArchiveErrorOrIo {
    fn from(error: io::Error) -> Self {
        Self::Io(error)
    }
}

/// The shape of `plan.json`. How clusters and chunks follow from it belongs to the version.
#[derive(Deserialize, Serialize)]
struct PlanDocument {
    version: u64,
    point: u64,
    plan: Plan,
}

const PLAN: &str = "plan.json";
const DONE: &str = "done";
const VERSION: u64 = 1;

/// Some ten disks of the most runs.
const PLAN_MAX: u64 = 1 << 30;
