//! What a disk at a point is made of: the file of that point, what that builds on, and so on to a full.

use std::ops::Range;
use std::path::PathBuf;

use block::qcow2::Layout;

use super::chunk::Chunk;
use super::digest::Digest;
use super::error::ArchiveError;
use super::folder::Archive;
use super::manifest::{Contents, DiskEntry, Manifest};
use super::runs;

/// The files of a disk at a point, the newest first.
pub(super) struct Chain {
    pub(super) layers: Vec<Layer>,
    /// Why it does not reach down to a full, if it does not.
    pub(super) broken: Option<ArchiveError>,
}

/// One of them.
pub(super) struct Layer {
    pub(super) point: u64,
    pub(super) entry: DiskEntry,
    pub(super) contents: Contents,
    pub(super) layout: Layout,
    pub(super) path: PathBuf,
}

/// A stretch of the disk, and where its contents come from.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(super) struct Segment {
    pub(super) range: Range<u64>,
    pub(super) from: Source,
}

/// Where contents come from.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Source {
    /// The layer of this number has the data.
    Layer(usize),
    /// They are zeroes.
    Zero,
    /// From what is missing.
    Lost,
}

impl Chain {
    /// The chain of a disk at a point that is there.
    pub(super) fn of(archive: &Archive, point: u64, disk: &str) -> Result<Self, ArchiveError> {
        let mut chain = Self {
            layers: vec![Layer::of(archive, point, disk)?],
            broken: None,
        };
        while let Some(parent) = chain.top().entry.parent.clone() {
            match Layer::below(archive, chain.top(), parent.point, parent.blake3) {
                Ok(layer) => chain.layers.push(layer),
                Err(error) => {
                    chain.broken = Some(error);
                    break;
                }
            }
        }
        Ok(chain)
    }

    /// The one reached last.
    fn top(&self) -> &Layer {
        self.layers.last().expect("there is at least one")
    }

    /// The size of the disk.
    pub(super) fn size(&self) -> u64 {
        self.layers[0].entry.size
    }

    /// Where all of the disk comes from, in order and without gaps.
    pub(super) fn segments(&self) -> Vec<Segment> {
        let mut segments = Vec::new();
        let mut add = |ranges: Vec<Range<u64>>, from: Source| {
            segments.extend(ranges.into_iter().map(|range| Segment { range, from }));
        };
        let mut left = vec![0..self.size()];
        for (number, layer) in self.layers.iter().enumerate() {
            // What a smaller disk had not is zeroes in a larger one.
            let disk = 0..layer.entry.size;
            add(
                runs::difference(&left, std::slice::from_ref(&disk)),
                Source::Zero,
            );
            left = runs::within(&left, &disk).collect();
            let Contents { data, zero, .. } = &layer.contents;
            add(runs::intersection(&left, data), Source::Layer(number));
            add(runs::intersection(&left, zero), Source::Zero);
            left = runs::difference(&runs::difference(&left, data), zero);
        }
        let last = match self.broken {
            None => Source::Zero,
            Some(_) => Source::Lost,
        };
        add(left, last);
        segments.sort_unstable_by_key(|segment| segment.range.start);
        segments
    }
}

impl Layer {
    fn of(archive: &Archive, point: u64, disk: &str) -> Result<Self, ArchiveError> {
        let Manifest {
            point: found,
            contents,
        } = archive.manifest(point)?;
        let both = found.disks.into_iter().zip(contents);
        let (entry, contents) = both
            .into_iter()
            .find(|(entry, _)| entry.name == disk)
            .ok_or_else(|| ArchiveError::Unknown(format!("point {point} has no disk {disk}")))?;
        Ok(Self {
            point,
            layout: entry.layout(&contents),
            path: archive.folder_of(point).join(&entry.file),
            entry,
            contents,
        })
    }

    fn below(
        archive: &Archive,
        child: &Self,
        parent: u64,
        hash: Digest,
    ) -> Result<Self, ArchiveError> {
        let disk = &child.entry.name;
        if !archive.has(parent) {
            return Err(ArchiveError::MissingLink {
                point: child.point,
                disk: disk.clone(),
                missing: parent,
            });
        }
        let layer = Self::of(archive, parent, disk)?;
        if layer.entry.blake3 != hash {
            return Err(ArchiveError::OtherParent {
                point: child.point,
                disk: disk.clone(),
                parent,
            });
        }
        Ok(layer)
    }

    /// The chunks that any of `wanted` is in, each with its hash and its place in the file.
    pub(super) fn chunks_of<'a>(
        &'a self,
        wanted: &'a [Range<u64>],
    ) -> impl Iterator<Item = (Chunk, Digest, u64)> + 'a {
        let size = self.entry.chunk_size;
        let mut indices: Vec<_> = wanted
            .iter()
            .flat_map(|range| range.start / size..=(range.end - 1) / size)
            .collect();
        indices.dedup();
        indices.into_iter().filter_map(move |index| {
            let hashes = &self.contents.hashes;
            let at = hashes.binary_search_by_key(&index, |(index, _)| *index);
            let hash = hashes[at.ok()?].1;
            let all = index * size..(index + 1) * size;
            let runs: Vec<_> = runs::within(&self.contents.data, &all).collect();
            let host = self.layout.host_offset(runs.first()?.start)?;
            Some((Chunk { index, runs }, hash, host))
        })
    }
}
