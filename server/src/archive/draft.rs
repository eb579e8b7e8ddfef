//! A point that is being made.

use std::fs::File;
use std::io;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use bytes::Bytes;
use rustix::fs::{Advice, fadvise};

use super::begin::remove;
use super::chunk::{self, Chunk};
use super::digest::Digest;
use super::error::ArchiveError;
use super::folder::Writer;
use super::manifest::{Parent, Point};
use super::map::Map;
use super::plan::{self, DiskPlan, Plan};
use super::progress::{Progress, step};
use super::read_back::Follower;
use super::records::Records;
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
    /// Who reads them back already; of the first of them.
    pub(super) followers: Vec<Follower>,
    /// Where it is made, and where it is then.
    pub(super) folder: PathBuf,
    pub(super) place: PathBuf,
    /// Nobody else works on it.
    #[expect(dead_code, reason = "held, not used")]
    pub(super) writer: Writer,
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

/// A piece of a chunk as it comes from a source.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum Piece {
    /// These bytes.
    Data(Bytes),
    /// So many zeroes.
    Zero(u64),
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

    /// Begins to sync and to read back what comes, on other threads: [`finish`](Self::finish) then
    /// has only the rest to do.
    pub fn follow(&mut self, progress: &Arc<dyn Progress>) {
        let more = self
            .disks
            .iter()
            .take(FOLLOWERS_MAX)
            .skip(self.followers.len());
        let more = more.map_while(|disk| Follower::of(disk, Arc::clone(progress)));
        self.followers.extend(more);
    }

    /// Syncs, drops what is cached, reads back, compares with the hashes of what was received, and
    /// publishes. When this returns a point, it is durable. After an error it stays as it is, and
    /// another run goes on with it.
    pub fn finish(mut self, progress: &dyn Progress) -> Result<Point, ArchiveError> {
        publish::finish(&mut self, progress)
    }

    /// Removes it.
    pub fn discard(mut self) -> Result<(), ArchiveError> {
        self.followers.clear();
        remove(&self.folder)
    }
}

impl DiskDraft {
    /// Makes its file, all but the data.
    pub(super) fn create(
        folder: &Path,
        plan: DiskPlan,
        parent: Option<Parent>,
    ) -> Result<Self, ArchiveError> {
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

    /// Takes up what another run has made, with what of it is right.
    pub(super) fn open(
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
        let place = self.map.host(chunk);
        self.store(place, data)
            .and_then(|()| self.records.add(chunk.index, hash))
            .map_err(|error| ArchiveError::writing(&self.path, error))?;
        self.begin_to_write_back(place, length);
        Ok(())
    }

    /// Has the kernel write back what was stored up to here, now and then, and waits for nothing: so
    /// whoever syncs finds less to do. Where the advice does nothing, nothing is lost.
    fn begin_to_write_back(&self, place: u64, length: u64) {
        let (before, now) = (place / WRITTEN_BACK, (place + length) / WRITTEN_BACK);
        if now > before {
            // With one more, as chunks come in no strict order.
            let start = before.saturating_sub(1) * WRITTEN_BACK;
            let length = now * WRITTEN_BACK - start;
            let _ = fadvise(&self.file, start, length.try_into().ok(), Advice::DontNeed);
        }
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

/// The name of the file of records of a disk.
pub(super) fn records_name(disk: &str) -> String {
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

/// So much is written back together: enough for a device to be busy with.
const WRITTEN_BACK: u64 = 8 << 20;

/// Disks that are read back while they come. Each takes two threads; of more disks than that the rest
/// have to wait.
const FOLLOWERS_MAX: usize = 16;

/// How that ends.
pub(super) const DONE: &str = "done";
