//! Folders of backups that are made without a server: the server's own types write them, and a plain
//! copy of each disk at each point says what they must hold.

use std::collections::BTreeMap;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;

use bytes::Bytes;
use rand::{Rng as _, RngCore as _};
use stillpoint::archive::{
    Archive, Chunk, DiskPlan, Draft, Identity, Leftover, Mode, Origin, Piece, Plan, Point,
    Progress, Since,
};
use tempfile::TempDir;
use time::OffsetDateTime;
use uuid::Uuid;

use crate::process::{Output, run};
use crate::seeds::Rng;
use crate::server::{binary, temporary_directory};
use crate::tools::path;

/// A disk in memory, and what it was at the last point.
#[derive(Clone, Debug)]
pub struct Disk {
    /// Its name.
    pub name: String,
    /// Its uuid.
    pub uuid: Uuid,
    /// What is on it.
    pub contents: Vec<u8>,
    /// How finely its changes are known.
    pub granularity: u64,
    last: Option<(u64, Vec<u8>)>,
}

/// A folder, and what it must hold.
#[derive(Debug)]
pub struct BackupFolder {
    directory: TempDir,
    path: PathBuf,
    /// The disks as they are now.
    pub disks: Vec<Disk>,
    /// What each was at each point.
    pub past: BTreeMap<u64, BTreeMap<String, Vec<u8>>>,
    /// When the next point is.
    pub now: OffsetDateTime,
}

impl Disk {
    /// An empty disk.
    pub fn new(name: &str, size: u64, granularity: u64) -> Self {
        Self {
            name: name.to_owned(),
            uuid: Uuid::new_v4(),
            contents: vec![0; size as usize],
            granularity,
            last: None,
        }
    }

    /// Writes or zeroes something somewhere, or makes the disk larger.
    pub fn change(&mut self, rng: &mut Rng) {
        let size = self.contents.len();
        let length = rng
            .random_range(1..=(size / 8).max(512))
            .min(1 << rng.random_range(9..20));
        let start = rng.random_range(0..=size - length.min(size));
        let stretch = &mut self.contents[start..(start + length).min(size)];
        match rng.random_range(0..8) {
            0..5 => rng.fill_bytes(stretch),
            5..7 => stretch.fill(0),
            _ => {
                let larger = size + 512 * rng.random_range(0..64);
                self.contents.resize(larger, 0);
            }
        }
    }

    /// The plan for its part of the next point; a full one where there was none before.
    pub fn plan(&self) -> DiskPlan {
        let size = self.contents.len() as u64;
        let (mode, parent) = match &self.last {
            None => (Mode::Full, None),
            Some((point, _)) => (Mode::Incremental, Some(*point)),
        };
        let (mut data, mut zero) = (Vec::new(), Vec::new());
        // What is allocated is known finer than what changed.
        let step = self.granularity.min(4096) as usize;
        for start in (0..self.contents.len()).step_by(step) {
            let range = start..(start + step).min(self.contents.len());
            if !self.has_changed(&range) {
                continue;
            }
            let is_zero = self.contents[range.clone()].iter().all(|byte| *byte == 0);
            let runs: &mut Vec<Range<u64>> = if is_zero { &mut zero } else { &mut data };
            let (start, end) = (range.start as u64, range.end as u64);
            match runs.last_mut() {
                Some(last) if last.end == start => last.end = end,
                _ => runs.push(start..end),
            }
        }
        DiskPlan {
            name: self.name.clone(),
            uuid: Some(self.uuid),
            size,
            mode,
            reason: (mode == Mode::Full).then(|| "first backup".to_owned()),
            since: parent.map(|point| Since {
                name: format!("cp{point}"),
                uuid: None,
            }),
            parent,
            granularity: self.granularity,
            data,
            zero,
        }
    }

    /// Makes the next point of it a full one.
    pub fn forget(&mut self) {
        self.last = None;
    }

    fn has_changed(&self, range: &Range<usize>) -> bool {
        let Some((_, last)) = &self.last else {
            return true;
        };
        // As a bitmap of that granularity knows it.
        let granularity = self.granularity as usize;
        let start = range.start / granularity * granularity;
        let end = (start + granularity).min(self.contents.len());
        last.get(start..end) != Some(&self.contents[start..end])
    }

    /// What a source answers for a chunk, cut anywhere.
    pub fn pieces(&self, chunk: &Chunk, rng: &mut Rng) -> Vec<Piece> {
        let mut pieces = Vec::new();
        for run in &chunk.runs {
            let mut bytes = &self.contents[run.start as usize..run.end as usize];
            while !bytes.is_empty() {
                let (piece, rest) = bytes.split_at(rng.random_range(1..=bytes.len()));
                bytes = rest;
                let is_zero = piece.iter().all(|byte| *byte == 0);
                pieces.push(if is_zero && rng.random() {
                    Piece::Zero(piece.len() as u64)
                } else {
                    Piece::Data(Bytes::copy_from_slice(piece))
                });
            }
        }
        pieces
    }
}

impl BackupFolder {
    /// A folder that is yet to be made, for these disks.
    pub fn new(disks: Vec<Disk>) -> Self {
        let directory = temporary_directory();
        let path = directory.path().join("backups");
        Self {
            directory,
            path,
            disks,
            past: BTreeMap::new(),
            now: OffsetDateTime::from_unix_timestamp(1_795_209_243).expect("a time"),
        }
    }

    /// The same at another place.
    pub fn at(path: &Path, disks: Vec<Disk>) -> Self {
        let path = path.to_owned();
        Self {
            path,
            ..Self::new(disks)
        }
    }

    /// Where it is.
    pub fn path(&self) -> PathBuf {
        self.path.clone()
    }

    /// A path beside it.
    pub fn beside(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    /// The plan of the next point.
    pub fn plan(&self) -> Plan {
        let number = self.past.len() as u64 + 1;
        Plan {
            origin: Origin {
                place: "a test".to_owned(),
                vouched: true,
            },
            backup: None,
            instant: self.now,
            checkpoint: Some(Identity {
                name: format!("cp{number}"),
                uuid: Uuid::from_u128(number.into()),
            }),
            held_us: None,
            disks: self.disks.iter().map(Disk::plan).collect(),
        }
    }

    /// Puts into a draft what is not there yet, in any order; and returns how much that was.
    pub fn put_all(&self, draft: &Draft, rng: &mut Rng) -> u64 {
        let mut bytes = 0;
        for (draft, disk) in draft.disks().iter().zip(&self.disks) {
            let mut chunks: Vec<_> = draft.chunks().collect();
            rand::seq::SliceRandom::shuffle(&mut chunks[..], rng);
            for chunk in chunks {
                draft
                    .put(&chunk, &disk.pieces(&chunk, rng))
                    .expect("it is stored");
                bytes += chunk.bytes();
            }
        }
        bytes
    }

    /// Makes the next point.
    #[track_caller]
    pub fn pull(&mut self, rng: &mut Rng) -> u64 {
        let archive = Archive::open_for_writing(&self.path()).expect("it can be written");
        let mut draft = archive.begin(self.plan()).expect("a point begins");
        if rng.random() {
            draft.follow(&(Arc::new(()) as Arc<dyn Progress>));
        }
        self.put_all(&draft, rng);
        let point = draft.finish(&()).expect("a point is made");
        self.note(&point)
    }

    /// Goes on with the point that was begun, and makes it.
    #[track_caller]
    pub fn go_on(&mut self, rng: &mut Rng) -> u64 {
        let archive = Archive::open_for_writing(&self.path()).expect("it can be written");
        let Leftover::Interrupted(left) = archive.leftover().expect("it can be read") else {
            panic!("nothing can go on");
        };
        assert_eq!(*left.plan(), self.plan());
        let draft = left.go_on(&()).expect("it goes on");
        self.put_all(&draft, rng);
        let point = draft.finish(&()).expect("a point is made");
        self.note(&point)
    }

    /// Keeps in mind what a point must hold.
    pub fn note(&mut self, point: &Point) -> u64 {
        let disks = self.disks.iter_mut().map(|disk| {
            disk.last = Some((point.number, disk.contents.clone()));
            (disk.name.clone(), disk.contents.clone())
        });
        self.past.insert(point.number, disks.collect());
        point.number
    }

    /// Runs `stillpoint COMMAND FOLDER ARGS...`.
    pub fn stillpoint(&self, command: &str, args: &[&str]) -> Output {
        let folder = self.path();
        // Where no server could be.
        let mut line = Command::new(binary());
        line.env_remove("XDG_RUNTIME_DIR")
            .env_remove("STILLPOINT_RUN_DIR");
        run(line.arg(command).arg(path(&folder)).args(args))
    }

    /// The file of a disk at a point.
    pub fn file(&self, point: u64, name: &str) -> PathBuf {
        self.path().join(format!("{point}/{name}"))
    }
}

/// Everything in a folder, name by name, copied.
pub fn copy_folder(from: &Path, to: &Path) {
    crate::tools::tool("cp", &["-a", path(from), path(to)]).ok();
}
