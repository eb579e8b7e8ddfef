//! Reading a file of a point as a whole, and telling what in it is not what was written.

use std::fmt;
use std::fs::{File, Metadata};
use std::io;
use std::ops::Range;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::sync::mpsc::{self, Receiver, SyncSender};
use std::thread;

use block::Buffer;
use block::qcow2::{Layout, Part};
use rustix::fs::{Advice, OFlags, fadvise};

use super::chunk::Chunk;
use super::digest::Digest;
use super::error::ArchiveError;
use super::progress::{Progress, step};

/// What a file is to be.
pub(super) struct Expected<'a> {
    pub(super) layout: &'a Layout,
    pub(super) cluster_size: u64,
    /// The chunks with their hashes, ascending.
    pub(super) chunks: &'a mut dyn Iterator<Item = (Chunk, Digest)>,
}

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
    for _ in 0..BUFFERS {
        empty.send(Buffer::of(0)).expect("there is room for them");
    }
    let (inspected, hash) = thread::scope(|scope| {
        let hasher = thread::Builder::new().name("hash".to_owned());
        let hasher = hasher.spawn_scoped(scope, move || hash_all(&filled, &empty));
        let hasher = hasher.map_err(ArchiveError::NoThread)?;
        let mut reader = Reader {
            file,
            direct: past_the_cache(file),
            full,
            emptied,
            faults: Faults::default(),
            at: 0,
        };
        let read = reader.read(expected, progress);
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
    for offset in layout.metadata_offsets() {
        if faults.end(file, layout, offset) {
            break;
        }
        let error = read(file, &mut found, offset);
        layout.fill(offset, &mut expected);
        faults.compare(layout, offset, &found, &expected, error.as_deref());
    }
    faults.list
}

/// The same file once more, for reads that go past the page cache: what comes then comes from the device,
/// and costs no memory for pages that nobody looks at twice. All reads here are of whole clusters.
fn past_the_cache(file: &File) -> Option<File> {
    let itself = format!("/proc/self/fd/{}", file.as_raw_fd());
    let flags = OFlags::DIRECT.bits().cast_signed();
    let mut options = File::options();
    options.read(true).custom_flags(flags).open(itself).ok()
}

fn hash_all(filled: &Receiver<Buffer>, empty: &SyncSender<Buffer>) -> blake3::Hash {
    let mut hasher = blake3::Hasher::new();
    for buffer in filled {
        hasher.update(&buffer);
        // Nobody wants it back at the end.
        let _ = empty.send(buffer);
    }
    hasher.finalize()
}

struct Reader<'a> {
    file: &'a File,
    /// The same file, read past the page cache, where that can be had.
    direct: Option<File>,
    full: SyncSender<Buffer>,
    emptied: Receiver<Buffer>,
    faults: Faults,
    /// How far it has read.
    at: u64,
}

#[derive(Default)]
struct Faults {
    list: Vec<Fault>,
    more: u64,
}

impl Reader<'_> {
    fn read(
        &mut self,
        expected: Expected<'_>,
        progress: &dyn Progress,
    ) -> Result<(), ArchiveError> {
        let Expected {
            layout,
            cluster_size,
            chunks,
        } = expected;
        let mut cluster = vec![0; cluster_size as usize];
        for offset in layout.metadata_offsets() {
            if self.faults.end(self.file, layout, offset) {
                self.at = layout.metadata_size();
                break;
            }
            let (buffer, error) = self.next(cluster_size);
            layout.fill(offset, &mut cluster);
            let error = error.as_deref();
            self.faults
                .compare(layout, offset, &buffer, &cluster, error);
            self.done(buffer, progress)?;
        }
        for (chunk, hash) in chunks {
            let bytes = chunk.bytes();
            let (buffer, error) = self.next(bytes.next_multiple_of(cluster_size));
            let (data, padding) = buffer.split_at(bytes as usize);
            let is_sound = error.is_none();
            if !is_sound || Digest::of(data) != hash {
                self.faults.add(Fault::of_data(self.at, chunk, error));
            }
            if is_sound && !block::is_zero(padding) {
                self.faults.add(Fault {
                    offset: self.at + bytes,
                    length: padding.len() as u64,
                    part: Part::Padding,
                    guest: Vec::new(),
                    error: None,
                });
            }
            self.done(buffer, progress)?;
        }
        Ok(())
    }

    /// The next bytes, and what went wrong with reading them.
    fn next(&mut self, length: u64) -> (Buffer, Option<String>) {
        let mut buffer = self.emptied.recv().expect("the hasher gives them back");
        if buffer.len() as u64 != length {
            buffer = Buffer::of(length as usize);
        }
        let direct = self.direct.as_ref();
        let is_read = direct.is_some_and(|file| file.read_exact_at(&mut buffer, self.at).is_ok());
        // What is wrong with a read, such as that the file ends within a block, is for the page cache
        // to say.
        let error = if is_read {
            None
        } else {
            read(self.file, &mut buffer, self.at)
        };
        (buffer, error)
    }

    fn done(&mut self, buffer: Buffer, progress: &dyn Progress) -> Result<(), ArchiveError> {
        let length = buffer.len() as u64;
        if self.direct.is_none() {
            // What was read once here is of no use to anybody.
            let _ = fadvise(self.file, self.at, length.try_into().ok(), Advice::DontNeed);
        }
        self.at += length;
        self.full.send(buffer).expect("the hasher takes all");
        step(progress, length)
    }
}

/// Fills the buffer, with zeroes if it cannot be read, and says why not.
pub(super) fn read(file: &File, buffer: &mut [u8], offset: u64) -> Option<String> {
    let error = file.read_exact_at(buffer, offset).err()?;
    buffer.fill(0);
    match error.kind() {
        io::ErrorKind::UnexpectedEof => Some(ENDS.to_owned()),
        _ => Some(error.to_string()),
    }
}

impl Faults {
    /// Whether the file ends at or before `offset`, which is before the data; notes it if so. A manifest can
    /// say that tables are longer than anybody waits for.
    fn end(&mut self, file: &File, layout: &Layout, offset: u64) -> bool {
        let is_there = |found: Metadata| found.len() > offset;
        if file.metadata().map_or(true, is_there) {
            return false;
        }
        self.add(Fault {
            offset,
            length: layout.metadata_size() - offset,
            part: layout.part_at(offset),
            guest: Vec::new(),
            error: Some(ENDS.to_owned()),
        });
        true
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

/// Why what is beyond the end cannot be read.
const ENDS: &str = "the file ends before";

/// Of each file: more than anybody reads; and what is damaged beyond that is not to be patched up.
pub(super) const FAULTS_MAX: usize = 1000;

/// Of a fault, in a line for people.
const RUNS_SHOWN: usize = 4;

/// Chunks that are in memory at once: one is read, one is hashed, one waits.
const BUFFERS: usize = 3;
