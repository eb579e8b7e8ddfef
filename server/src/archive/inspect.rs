//! Reading a file of a point as a whole, and telling what in it is not what was written.

use std::fmt;
use std::fs::File;
use std::ops::Range;
use std::sync::mpsc::{self, Receiver, SyncSender};
use std::thread;

use block::Buffer;
use block::qcow2::{Layout, Part};

use super::ahead::{Ahead, ENDS, Piece, Wanted, read_cached};
use super::chunk::Chunk;
use super::digest::Digest;
use super::error::ArchiveError;
use super::progress::{Progress, step};

/// What a file is to be.
pub(super) struct Expected<'a> {
    pub(super) layout: &'a Layout,
    pub(super) cluster_size: u64,
    /// Its chunks, as soon as they can be read.
    pub(super) stretches: &'a mut dyn Iterator<Item = Stretch>,
}

/// Chunks with their hashes, ascending.
pub(super) type Stretch = Vec<(Chunk, Digest)>;

/// What a file is.
#[derive(Debug)]
pub(super) struct Inspection {
    /// The hash of the file as it is.
    pub(super) blake3: Digest,
    /// What in it is not what was written, ascending; at most [`FAULTS_MAX`].
    pub(super) faults: Vec<Fault>,
    /// How many more there are.
    pub(super) more: u64,
}

/// A stretch of a file that is not what was written.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(super) struct Fault {
    pub(super) offset: u64,
    pub(super) length: u64,
    pub(super) part: Part,
    /// What of the disk is lost with it.
    pub(super) guest: Vec<Range<u64>>,
    /// Why it could not be read, if that is why.
    pub(super) error: Option<String>,
}

/// Reads all of a file. What cannot be read counts as zeroes, and is a fault.
pub(super) fn inspect(
    file: &File,
    expected: Expected<'_>,
    progress: &dyn Progress,
) -> Result<Inspection, ArchiveError> {
    // What is known of the file's own is on another thread than what is known of its chunks.
    let (full, filled) = mpsc::sync_channel::<Buffer>(BUFFERS);
    let (empty, emptied) = mpsc::sync_channel::<Buffer>(BUFFERS);
    let (inspected, hash) = thread::scope(|scope| {
        let hasher = thread::Builder::new().name("hash".to_owned());
        let hasher = hasher.spawn_scoped(scope, move || hash_all(&filled, &empty));
        let hasher = hasher.map_err(ArchiveError::NoThread)?;
        let mut reader = Reader {
            ahead: Ahead::of(file, emptied),
            full,
            progress,
            faults: Faults::default(),
        };
        let read = reader.read(file, expected);
        let Reader { faults, full, .. } = reader;
        // There is no more to hash.
        drop(full);
        let hash = hasher.join().expect("hashing does not panic");
        read.map(|()| (faults, hash))
    })?;
    let Faults { list, more } = inspected;
    Ok(Inspection {
        blake3: Digest(hash),
        faults: list,
        more,
    })
}

/// Reads what is before the data.
pub(super) fn inspect_tables(file: &File, layout: &Layout, cluster_size: u64) -> Vec<Fault> {
    let mut faults = Faults::default();
    let mut expected = vec![0; cluster_size as usize];
    let mut found = expected.clone();
    let there = length_of(file);
    for offset in layout.metadata_offsets().take_while(|at| *at < there) {
        let error = read_cached(file, &mut found, offset);
        layout.fill(offset, &mut expected);
        faults.compare(layout, offset, &found, &expected, error.as_deref());
    }
    faults.end(layout, there);
    faults.list
}

/// How long a file is, if that can be told.
fn length_of(file: &File) -> u64 {
    file.metadata().map_or(u64::MAX, |found| found.len())
}

fn hash_all(filled: &Receiver<Buffer>, empty: &SyncSender<Buffer>) -> blake3::Hash {
    let mut hasher = blake3::Hasher::new();
    for buffer in filled {
        hasher.update(&buffer);
        // Nobody wants it back at the end, or where there are enough.
        let _ = empty.try_send(buffer);
    }
    hasher.finalize()
}

struct Reader<'a> {
    /// Of chunks, and of clusters of tables.
    ahead: Ahead<'a, Option<(Chunk, Digest)>>,
    full: SyncSender<Buffer>,
    progress: &'a dyn Progress,
    faults: Faults,
}

#[derive(Default)]
struct Faults {
    list: Vec<Fault>,
    more: u64,
}

impl Reader<'_> {
    fn read(&mut self, file: &File, expected: Expected<'_>) -> Result<(), ArchiveError> {
        let Expected {
            layout,
            cluster_size,
            stretches,
        } = expected;
        let there = length_of(file);
        let tables = layout.metadata_offsets().take_while(|at| *at < there);
        let mut tables = tables.map(|offset| Wanted {
            what: None,
            offset,
            length: cluster_size,
        });
        let mut cluster = vec![0; cluster_size as usize];
        while let Some(piece) = self.ahead.next(&mut tables) {
            layout.fill(piece.offset, &mut cluster);
            let error = piece.error.as_deref();
            self.faults
                .compare(layout, piece.offset, &piece.buffer, &cluster, error);
            self.done(piece.offset, piece.buffer)?;
        }
        self.faults.end(layout, there);

        let mut end = layout.metadata_size();
        for stretch in stretches {
            let mut chunks = stretch.into_iter().map(|chunk| {
                let (offset, length) = (end, chunk.0.bytes().next_multiple_of(cluster_size));
                end += length;
                Wanted {
                    what: Some(chunk),
                    offset,
                    length,
                }
            });
            while let Some(piece) = self.ahead.next(&mut chunks) {
                let Piece {
                    what,
                    offset,
                    buffer,
                    error,
                } = piece;
                if let Some((chunk, hash)) = what {
                    self.faults.look_at(chunk, hash, offset, &buffer, error);
                }
                self.done(offset, buffer)?;
            }
        }
        Ok(())
    }

    fn done(&mut self, offset: u64, buffer: Buffer) -> Result<(), ArchiveError> {
        let length = buffer.len() as u64;
        self.ahead.forget(offset, length);
        self.full.send(buffer).expect("the hasher takes all");
        step(self.progress, length)
    }
}

impl Faults {
    /// Notes what tables a file of length `there` lacks. A manifest can say that they are longer than
    /// anybody waits for.
    fn end(&mut self, layout: &Layout, there: u64) {
        let Some(offset) = layout.metadata_offsets().find(|at| *at >= there) else {
            return;
        };
        self.add(Fault {
            offset,
            length: layout.metadata_size() - offset,
            part: layout.part_at(offset),
            guest: Vec::new(),
            error: Some(ENDS.to_owned()),
        });
    }

    /// Notes where a chunk that lies at `offset` is not what was written.
    fn look_at(
        &mut self,
        chunk: Chunk,
        hash: Digest,
        offset: u64,
        found: &[u8],
        error: Option<String>,
    ) {
        let bytes = chunk.bytes();
        let (data, padding) = found.split_at(bytes as usize);
        let is_sound = error.is_none();
        if !is_sound || Digest::of(data) != hash {
            self.add(Fault::of_data(offset, chunk, error));
        }
        if is_sound && !block::is_zero(padding) {
            self.add(Fault {
                offset: offset + bytes,
                length: padding.len() as u64,
                part: Part::Padding,
                guest: Vec::new(),
                error: None,
            });
        }
    }

    /// Notes where the cluster of tables at `base` differs: a stretch for each part of it.
    fn compare(
        &mut self,
        layout: &Layout,
        base: u64,
        found: &[u8],
        expected: &[u8],
        error: Option<&str>,
    ) {
        if error.is_none() && found == expected {
            return;
        }
        let differs = |at: &usize| error.is_some() || found[*at] != expected[*at];
        let mut at = 0;
        while let Some(first) = (at..found.len()).find(differs) {
            let part = layout.part_at(base + first as u64);
            let is_other = |at: &usize| layout.part_at(base + *at as u64) != part;
            let end = (first..found.len()).find(is_other).unwrap_or(found.len());
            let last = (first..end).rev().find(differs).unwrap_or(first);
            self.add(Fault {
                offset: base + first as u64,
                length: (last - first + 1) as u64,
                part,
                guest: Vec::new(),
                error: error.map(str::to_owned),
            });
            at = end;
        }
    }

    fn add(&mut self, fault: Fault) {
        if let Some(last) = self.list.last_mut()
            && last.try_join(&fault)
        {
            return;
        }
        if self.list.len() < FAULTS_MAX {
            self.list.push(fault);
        } else {
            self.more += 1;
        }
    }
}

impl Fault {
    /// Of a chunk that lies at `offset`.
    pub(super) fn of_data(offset: u64, chunk: Chunk, error: Option<String>) -> Self {
        Self {
            offset,
            length: chunk.bytes(),
            part: Part::Data(chunk.runs[0].start),
            guest: chunk.runs,
            error,
        }
    }

    /// Takes in what follows it, if it is more of the same.
    fn try_join(&mut self, next: &Self) -> bool {
        let is_data = |fault: &Self| matches!(fault.part, Part::Data(_));
        let is_same = is_data(self) && is_data(next) || self.part == next.part;
        if !is_same || self.error != next.error || self.offset + self.length != next.offset {
            return false;
        }
        self.length += next.length;
        for run in &next.guest {
            match self.guest.last_mut() {
                Some(last) if last.end == run.start => last.end = run.end,
                _ => self.guest.push(run.clone()),
            }
        }
        true
    }
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(part_name(&self.part))?;
        if let Part::L2Table(range) = &self.part {
            write!(f, " of bytes {} to {} of the disk", range.start, range.end)?;
        }
        for (number, run) in self.guest.iter().take(RUNS_SHOWN).enumerate() {
            let before = if number == 0 { " of bytes" } else { "," };
            write!(f, "{before} {} to {}", run.start, run.end)?;
        }
        match self.guest.len() {
            0 => {}
            length if length > RUNS_SHOWN => {
                write!(f, " and {} more stretches of the disk", length - RUNS_SHOWN)?;
            }
            _ => f.write_str(" of the disk")?,
        }
        match &self.error {
            None => Ok(()),
            Some(error) => write!(f, ", which cannot be read: {error}"),
        }
    }
}

/// What a part of a file is called.
pub(super) fn part_name(part: &Part) -> &'static str {
    match part {
        Part::Header => "the header",
        Part::RefcountTable => "the refcount table",
        Part::RefcountBlock => "a refcount block",
        Part::L1Table => "the L1 table",
        Part::L2Table(_) => "the L2 table",
        Part::Data(_) => "data",
        Part::Padding => "padding",
    }
}

/// Of each file: more than anybody reads; and what is damaged beyond that is not to be patched up.
pub(super) const FAULTS_MAX: usize = 1000;

/// Of a fault, in a line for people.
const RUNS_SHOWN: usize = 4;

/// How many pieces wait for the hasher; and of how many that it has done with the memory is kept.
const BUFFERS: usize = 2;
