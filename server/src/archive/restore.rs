//! The contents of a disk at a point, put together again.
//!
//! The tables of the qcow2 files are not needed for that: where everything lies follows from the
//! manifests, and what is read has the hashes that are there, or is told of as lost.

use std::collections::BTreeMap;
use std::fs::File;
use std::ops::Range;
use std::path::Path;

use super::ahead::read_cached;
use super::chain::{Chain, Layer, Segment, Source};
use super::chunk::{CHUNK_SIZE_MAX, Chunk};
use super::damage::{Damage, Watch};
use super::digest::Digest;
use super::error::ArchiveError;
use super::folder::Archive;
use super::inspect::{Fault, inspect_tables};
use super::manifest::MANIFEST;
use super::output::{Existing, Format, Output, Owner};
use super::progress::step;
use super::runs;

/// What to restore, and where to.
#[derive(Clone, Copy, Debug)]
pub struct Restoration<'a> {
    /// The disk.
    pub disk: &'a str,
    /// The point.
    pub point: u64,
    /// The file or device to write.
    pub output: &'a Path,
    /// Its format.
    pub format: Format,
    /// What becomes of what is there.
    pub existing: Existing,
    /// What to do about damage.
    pub damage: OnDamage,
}

/// What to do about damage.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum OnDamage {
    /// Restore nothing.
    Refuse,
    /// Restore what there is, with zeroes for what is lost, and tell of that.
    KeepGoing,
}

/// What was restored.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Restored {
    /// The size of the disk.
    pub size: u64,
    /// How much of it is data that was read from the folder.
    pub data_bytes: u64,
    /// What of it is lost, and zeroes now.
    pub lost: Vec<Range<u64>>,
    /// How many damages were met.
    pub damages: u64,
    /// Whom the file belongs to.
    pub owner: Owner,
}

/// Restores a disk.
pub fn restore(
    archive: &Archive,
    wanted: &Restoration<'_>,
    watch: &dyn Watch,
) -> Result<Restored, ArchiveError> {
    let mut chain = Chain::of(archive, wanted.point, wanted.disk)?;
    let segments = chain.segments();
    let broken = chain.broken.take();
    let mut restorer = Restorer {
        wanted,
        watch,
        chain: &chain,
        files: Vec::new(),
        lost: Vec::new(),
        damages: 0,
        data_bytes: 0,
    };
    if let Some(error) = broken {
        restorer.tell_broken(error, &segments)?;
    }
    restorer.open_files()?;

    let data = segments
        .iter()
        .filter(|segment| matches!(segment.from, Source::Layer(_)));
    let data = runs::union(data.map(|segment| segment.range.clone()));
    watch.expect(runs::bytes(&data));
    let Restoration {
        output,
        format,
        existing,
        ..
    } = *wanted;
    if archive.has_file(output) {
        let (path, reason) = (output.to_owned(), "is a file of these backups".to_owned());
        return Err(ArchiveError::Output { path, reason });
    }
    let output = Output::begin(output, format, existing, chain.size(), &data)?;
    for segment in &segments {
        if !matches!(segment.from, Source::Layer(_)) {
            output.zero(&segment.range)?;
        }
    }
    for (_, layers) in windows(&segments) {
        for (layer, ranges) in layers {
            restorer.restore_from(layer, &ranges, &mut |guest, bytes| {
                output.write(guest, bytes)
            })?;
        }
    }
    for lost in &restorer.lost {
        output.zero(lost)?;
    }
    let owner = output.finish()?;
    Ok(Restored {
        size: chain.size(),
        data_bytes: restorer.data_bytes,
        lost: runs::union(restorer.lost),
        damages: restorer.damages,
        owner,
    })
}

/// Takes bytes of the disk, at an offset of it.
type Take<'a> = dyn FnMut(u64, &[u8]) -> Result<(), ArchiveError> + 'a;

struct Restorer<'a> {
    wanted: &'a Restoration<'a>,
    watch: &'a dyn Watch,
    chain: &'a Chain,
    /// Of each layer; none where it cannot be opened.
    files: Vec<Result<File, String>>,
    lost: Vec<Range<u64>>,
    damages: u64,
    data_bytes: u64,
}

impl Restorer<'_> {
    /// The chain does not reach down to a full.
    fn tell_broken(
        &mut self,
        error: ArchiveError,
        segments: &[Segment],
    ) -> Result<(), ArchiveError> {
        let lowest = self.chain.layers.last().expect("there is at least one");
        let file = format!("{}/{MANIFEST}", lowest.point);
        let lost = segments
            .iter()
            .filter(|segment| segment.from == Source::Lost);
        let lost = lost.map(|segment| segment.range.clone()).collect();
        let damage = Damage {
            lost,
            ..Damage::of(lowest.point, Path::new(&file), &error)
        };
        self.meet(damage, error)
    }

    /// Opens the files of all layers, and looks at what is before their data.
    fn open_files(&mut self) -> Result<(), ArchiveError> {
        for layer in &self.chain.layers {
            let (point, entry) = (layer.point, &layer.entry);
            match File::open(&layer.path) {
                Ok(file) => {
                    for fault in inspect_tables(&file, &layer.layout, entry.cluster_size) {
                        let damage = Damage::in_file(point, &entry.name, &entry.file, &fault);
                        self.meet(damage, differs(layer, &fault))?;
                    }
                    self.files.push(Ok(file));
                }
                Err(error) => {
                    let text = error.to_string();
                    let (name, file) = (&entry.name, &entry.file);
                    let message = format!("cannot be read: {text}");
                    let damage = Damage::of_file(point, name, file, "the file", &message);
                    let refusal = ArchiveError::Differs {
                        path: layer.path.clone(),
                        offset: 0,
                        what: message,
                    };
                    self.meet(damage, refusal)?;
                    self.files.push(Err(text));
                }
            }
        }
        Ok(())
    }

    /// Restores what is wanted of one layer, in a part of the disk that whole chunks of it fit in.
    fn restore_from(
        &mut self,
        number: usize,
        wanted: &[Range<u64>],
        take: &mut Take<'_>,
    ) -> Result<(), ArchiveError> {
        let chain = self.chain;
        let layer = &chain.layers[number];
        let mut buffer = Vec::new();
        for (chunk, hash, offset) in layer.chunks_of(wanted) {
            buffer.resize(chunk.bytes() as usize, 0);
            let error = match &self.files[number] {
                Ok(file) => read_cached(file, &mut buffer, offset),
                Err(error) => Some(error.clone()),
            };
            let pieces = runs::intersection(&chunk.runs, wanted);
            if error.is_none() && Digest::of(&buffer) == hash {
                for piece in &pieces {
                    let at = place_in(&chunk, piece.start);
                    let length = (piece.end - piece.start) as usize;
                    take(piece.start, &buffer[at..at + length])?;
                }
                self.data_bytes += runs::bytes(&pieces);
            } else {
                let fault = Fault::of_data(offset, chunk, error);
                let (name, file) = (&layer.entry.name, &layer.entry.file);
                let damage = Damage {
                    lost: pieces.clone(),
                    ..Damage::in_file(layer.point, name, file, &fault)
                };
                self.meet(damage, differs(layer, &fault))?;
            }
            step(self.watch, runs::bytes(&pieces))?;
        }
        Ok(())
    }

    /// Goes on after damage, or does not.
    fn meet(&mut self, damage: Damage, error: ArchiveError) -> Result<(), ArchiveError> {
        if self.wanted.damage == OnDamage::Refuse {
            return Err(error);
        }
        self.watch.found(&damage);
        self.damages += 1;
        self.lost.extend(damage.lost);
        Ok(())
    }
}

/// Reads a disk at a point from its beginning to its end, and gives away one stretch after the other;
/// where there is no data, without bytes: it is zeroes. Damage ends it.
pub fn read_through(
    archive: &Archive,
    point: u64,
    disk: &str,
    watch: &dyn Watch,
    give: &mut dyn FnMut(Range<u64>, Option<Vec<u8>>) -> Result<(), ArchiveError>,
) -> Result<(), ArchiveError> {
    let wanted = Restoration {
        disk,
        point,
        output: Path::new(""),
        format: Format::Raw,
        existing: Existing::Keep,
        damage: OnDamage::Refuse,
    };
    let mut chain = Chain::of(archive, point, disk)?;
    if let Some(error) = chain.broken.take() {
        return Err(error);
    }
    let (segments, size) = (chain.segments(), chain.size());
    let mut restorer = Restorer {
        wanted: &wanted,
        watch,
        chain: &chain,
        files: Vec::new(),
        lost: Vec::new(),
        damages: 0,
        data_bytes: 0,
    };
    restorer.open_files()?;
    let data = segments
        .iter()
        .filter(|segment| matches!(segment.from, Source::Layer(_)));
    watch.expect(data.map(|it| it.range.end - it.range.start).sum());
    let mut at = 0;
    for (window, layers) in windows(&segments) {
        if at < window.start {
            give(at..window.start, None)?;
        }
        let range = window.start..window.end.min(size);
        let mut bytes = vec![0; (range.end - range.start) as usize];
        for (layer, ranges) in layers {
            restorer.restore_from(layer, &ranges, &mut |guest, data| {
                let place = (guest - range.start) as usize;
                bytes[place..place + data.len()].copy_from_slice(data);
                Ok(())
            })?;
        }
        at = range.end;
        give(range, Some(bytes))?;
    }
    if at < size {
        give(at..size, None)?;
    }
    Ok(())
}

/// Where in the data of a chunk a byte of the disk is.
fn place_in(chunk: &Chunk, guest: u64) -> usize {
    let before = runs::within(&chunk.runs, &(0..guest));
    before.map(|run| run.end - run.start).sum::<u64>() as usize
}

fn differs(layer: &Layer, fault: &Fault) -> ArchiveError {
    ArchiveError::Differs {
        path: layer.path.clone(),
        offset: fault.offset,
        what: fault.to_string(),
    }
}

/// What is to be read of each layer, for one part of the disk after the other: whole chunks of any
/// layer fit in each.
fn windows(
    segments: &[Segment],
) -> impl Iterator<Item = (Range<u64>, BTreeMap<usize, Vec<Range<u64>>>)> + use<'_> {
    let mut at = 0;
    let mut next = 0;
    std::iter::from_fn(move || {
        let is_done = |segment: &Segment| {
            segment.range.end <= next || !matches!(segment.from, Source::Layer(_))
        };
        at += segments[at..].iter().take_while(|s| is_done(s)).count();
        let first = segments.get(at)?.range.start.max(next);
        let start = first / CHUNK_SIZE_MAX * CHUNK_SIZE_MAX;
        next = start + CHUNK_SIZE_MAX;
        let mut wanted = BTreeMap::<_, Vec<_>>::new();
        for Segment { range, from } in &segments[at..] {
            if range.start >= next {
                break;
            }
            if let Source::Layer(number) = from {
                let range = range.start.max(first)..range.end.min(next);
                wanted.entry(*number).or_default().push(range);
            }
        }
        Some((start..next, wanted))
    })
}
