//! A disk that is a qcow2 image, with all that is behind it.

use std::fmt;
use std::fs::File;
use std::io;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use bytes::Bytes;

use super::chain::{Link, OpenError, open_chain};
use super::entry::Place;
use super::layer::{Layer, damaged};
use super::tables::Tables;
use super::unpack::{Unpacked, unpack};
use crate::pool::blocking;
use crate::{Engine, Extent, FileStorage, Storage, Zeroing};

/// A qcow2 image, which is read and never written, with its backing chain and its data files.
///
/// What it says of itself is not believed: whatever is in it, a read gives bytes of the files that
/// were opened with it, or zeroes, or an error. Its tables are kept in memory within a bound.
pub struct Qcow2Image {
    /// The first is the image; each next one is behind.
    links: Vec<Link>,
    tables: Tables,
    unpacked: Unpacked,
    size: u64,
}

impl fmt::Debug for Qcow2Image {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut shown = f.debug_struct("Qcow2Image");
        shown
            .field("size", &self.size)
            .field("images", &self.links.len());
        shown.finish_non_exhaustive()
    }
}

/// How deep in the chain a stretch of the disk is.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Depth {
    /// In bytes.
    pub range: Range<u64>,
    /// 1 is the image itself, 2 what is directly behind it; 0 is nowhere.
    pub depth: u32,
}

/// A stretch of the disk, from an offset that was asked for on.
struct Found<'a> {
    length: u64,
    depth: u32,
    source: Source<'a>,
}

/// Where the bytes of a stretch come from.
enum Source<'a> {
    Zero,
    Raw(&'a FileStorage),
    Data(&'a Layer, u64),
    Packed {
        layer: &'a Layer,
        number: usize,
        offset: u64,
        length: u64,
    },
}

impl Qcow2Image {
    /// Opens `file`, which the user calls `path`, and what it names: from its own folder, and from
    /// those that are `allowed`.
    ///
    /// Every file but `file` itself is locked against writers.
    pub async fn open(
        file: File,
        path: &Path,
        allowed: &[PathBuf],
        engine: Engine,
    ) -> Result<Self, OpenError> {
        let links = open_chain(file, path, allowed, engine).await?;
        Ok(Self {
            size: links.first().map_or(0, Link::size),
            links,
            tables: Tables::default(),
            unpacked: Unpacked::default(),
        })
    }

    /// The files that the disk is in: first the image itself.
    pub fn files(&self) -> impl Iterator<Item = &FileStorage> {
        self.links
            .iter()
            .flat_map(|link| match link {
                Link::Raw(file) => [Some(file), None],
                Link::Qcow2(layer) => [Some(&layer.file), layer.data_file()],
            })
            .flatten()
    }

    /// How deep in the chain `range` is, from its start on: at least one stretch, as many as are
    /// cheap to tell and at most `limit`, adjacent.
    pub async fn depths(&self, range: Range<u64>, limit: usize) -> io::Result<Vec<Depth>> {
        let mut told: Vec<Depth> = Vec::new();
        let mut at = range.start;
        for _ in 0..STEPS_MAX {
            if at >= range.end {
                break;
            }
            let Found { length, depth, .. } = self.find(at, range.end - at).await?;
            let next = at + length;
            let is_full = told.len() == limit;
            match told.last_mut() {
                Some(last) if last.depth == depth => last.range.end = next,
                _ if is_full => break,
                _ => told.push(Depth {
                    range: at..next,
                    depth,
                }),
            }
            at = next;
        }
        Ok(told)
    }

    /// The image itself.
    pub(super) fn top(&self) -> Option<&Layer> {
        match self.links.first() {
            Some(Link::Qcow2(layer)) => Some(layer),
            _ => None,
        }
    }

    /// Where the bytes at `at` are, and how many behind them are so too: at least one and at most
    /// `limit`.
    async fn find(&self, at: u64, limit: u64) -> io::Result<Found<'_>> {
        let mut length = limit;
        for (number, link) in self.links.iter().enumerate() {
            let depth = number as u32 + 1;
            let found = |length, source| {
                Ok(Found {
                    length,
                    depth,
                    source,
                })
            };
            // What is behind may be shorter: what would be in the rest of it counts as its zeroes.
            if at >= link.size() {
                return found(length, Source::Zero);
            }
            length = length.min(link.size() - at);
            let layer = match link {
                Link::Raw(file) => return found(length, Source::Raw(file)),
                Link::Qcow2(layer) => layer,
            };
            let stretch = layer.find(&self.tables, at, length).await?;
            length = stretch.length;
            match stretch.place {
                Place::Absent => {}
                Place::Zero => return found(length, Source::Zero),
                Place::Data(offset) => return found(length, Source::Data(layer, offset)),
                Place::Packed {
                    offset,
                    length: packed,
                } => {
                    let length_on_disk = length;
                    let source = Source::Packed {
                        layer,
                        number,
                        offset,
                        length: packed,
                    };
                    return found(length_on_disk, source);
                }
            }
        }
        Ok(Found {
            length,
            depth: 0,
            source: Source::Zero,
        })
    }

    async fn read_found(&self, source: Source<'_>, at: u64, target: &mut [u8]) -> io::Result<()> {
        match source {
            Source::Zero => {
                target.fill(0);
                Ok(())
            }
            Source::Raw(file) => file.read(at, target).await,
            Source::Data(layer, offset) => layer.read(offset, target).await,
            Source::Packed {
                layer,
                number,
                offset,
                length,
            } => {
                let cluster = self.unpack(layer, number, offset, length).await?;
                let within = (at & (layer.geometry.cluster() - 1)) as usize;
                let wanted = cluster.get(within..within + target.len());
                target.copy_from_slice(wanted.ok_or_else(|| damaged("a cluster is too short"))?);
                Ok(())
            }
        }
    }

    async fn unpack(
        &self,
        layer: &Layer,
        number: usize,
        offset: u64,
        length: u64,
    ) -> io::Result<Arc<Vec<u8>>> {
        let key = (number, offset);
        if let Some(cluster) = self.unpacked.find(key) {
            return Ok(cluster);
        }
        let packed = layer.packed(offset, length).await?;
        let (how, cluster) = (layer.header.compression, layer.geometry.cluster() as usize);
        // It takes longer than a request should keep others waiting.
        let cluster = blocking(move || unpack(how, &packed, cluster)).await?;
        let cluster = Arc::new(cluster);
        self.unpacked.put(key, &cluster);
        Ok(cluster)
    }

    /// Which parts of a stretch take space: all of it, unless a file has holes.
    async fn extents_of(&self, found: Found<'_>, at: u64) -> io::Result<Vec<Extent>> {
        let all = |hole| {
            let range = at..at + found.length;
            Ok(vec![Extent { range, hole }])
        };
        let (file, offset) = match found.source {
            Source::Zero => return all(true),
            Source::Raw(file) => (file, at),
            Source::Data(layer, offset) if layer.sparse => (layer.data(), offset),
            Source::Data(..) | Source::Packed { .. } => return all(false),
        };
        let end = (offset + found.length).min(file.size());
        if offset >= end {
            // What of it is zero, and what an error, is seen when it is read.
            return all(false);
        }
        let mut extents = file.extents(offset..end).await?;
        for extent in &mut extents {
            let Range { start, end } = extent.range;
            extent.range = start - offset + at..end - offset + at;
        }
        Ok(extents)
    }
}

impl Link {
    fn size(&self) -> u64 {
        match self {
            Self::Qcow2(layer) => layer.header.size,
            Self::Raw(file) => file.size(),
        }
    }
}

impl Storage for Qcow2Image {
    fn size(&self) -> u64 {
        self.size
    }

    async fn read(&self, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
        let end = offset + buffer.len() as u64;
        if end > self.size {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        let (mut at, mut rest) = (offset, buffer);
        while !rest.is_empty() {
            let Found { length, source, .. } = self.find(at, rest.len() as u64).await?;
            let (target, behind) = rest.split_at_mut(length as usize);
            self.read_found(source, at, target).await?;
            at += length;
            rest = behind;
        }
        Ok(())
    }

    async fn write(&self, _: u64, _: &Bytes) -> io::Result<()> {
        Err(io::ErrorKind::ReadOnlyFilesystem.into())
    }

    async fn zero(&self, _: Range<u64>, _: Zeroing) -> io::Result<()> {
        Err(io::ErrorKind::ReadOnlyFilesystem.into())
    }

    async fn sync(&self) -> io::Result<()> {
        Ok(())
    }

    async fn extents(&self, range: Range<u64>) -> io::Result<Vec<Extent>> {
        let mut told: Vec<Extent> = Vec::new();
        let mut at = range.start;
        for _ in 0..STEPS_MAX {
            if at >= range.end || told.len() >= EXTENTS_MAX {
                break;
            }
            let found = self.find(at, range.end - at).await?;
            for extent in self.extents_of(found, at).await? {
                at = extent.range.end;
                match told.last_mut() {
                    Some(last) if last.hole == extent.hole => last.range.end = at,
                    _ => told.push(extent),
                }
            }
        }
        Ok(told)
    }
}

/// How many lookups one question is worth: each tells of a compressed cluster, or of as much as a page
/// of a table does.
const STEPS_MAX: usize = 1024;

/// Enough to answer a block status; the rest is asked for again.
const EXTENTS_MAX: usize = 128;
