//! Whether everything is still what was written.

use std::collections::BTreeSet;
use std::fs::File;
use std::io;
use std::iter;
use std::path::{Path, PathBuf};

use super::damage::{Damage, Watch};
use super::error::ArchiveError;
use super::folder::Archive;
use super::inspect::{Expected, Fault, Stretch, inspect};
use super::manifest::{Contents, DiskEntry, MANIFEST, Manifest};

/// What to look at.
#[derive(Clone, Debug, Default)]
pub struct Scope {
    /// This disk alone.
    pub disk: Option<String>,
    /// This point alone, and what it builds on.
    pub point: Option<u64>,
}

/// What was looked at, and what came of it.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct Verified {
    /// How many points.
    pub points: u64,
    /// How many files of disks.
    pub files: u64,
    /// How many bytes of them.
    pub bytes: u64,
    /// How many damages; each was told of.
    pub damages: u64,
}

/// Reads everything in a folder, or what `scope` says of it, and tells of everything in it that is not
/// what was written.
pub fn verify(
    archive: &Archive,
    scope: &Scope,
    watch: &dyn Watch,
) -> Result<Verified, ArchiveError> {
    let mut verifier = Verifier {
        archive,
        scope,
        watch,
        verified: Verified::default(),
    };
    if scope.point.is_none() {
        verifier.identity()?;
    }
    let numbers = verifier.numbers();
    watch.expect(verifier.bytes(&numbers));
    for number in numbers {
        verifier.point(number)?;
    }
    Ok(verifier.verified)
}

struct Verifier<'a> {
    archive: &'a Archive,
    scope: &'a Scope,
    watch: &'a dyn Watch,
    verified: Verified,
}

impl Verifier<'_> {
    /// The points to look at, ascending, whether or not they are sound.
    fn numbers(&self) -> Vec<u64> {
        let sound = self.archive.points().iter().map(|point| point.number);
        let unsound = self.archive.unsound().iter().map(|(number, _)| *number);
        let all: BTreeSet<_> = sound.chain(unsound).collect();
        let Some(point) = self.scope.point else {
            return all.into_iter().collect();
        };
        // What a point builds on is older: one pass downwards finds all of it.
        let mut wanted = BTreeSet::from([point]);
        for number in all.iter().rev() {
            let point = wanted.contains(number).then(|| self.archive.point(*number));
            for disk in point.flatten().iter().flat_map(|point| &point.disks) {
                if self.wants(&disk.name) {
                    wanted.extend(disk.parent.as_ref().map(|parent| parent.point));
                }
            }
        }
        // Of what is not there its child tells.
        wanted.intersection(&all).copied().collect()
    }

    /// How many bytes there are to read of these, by those that are sound.
    fn bytes(&self, numbers: &[u64]) -> u64 {
        let points = numbers.iter().filter_map(|it| self.archive.point(*it));
        let disks = points.flat_map(|point| &point.disks);
        let wanted = disks.filter(|disk| self.wants(&disk.name));
        wanted.map(|disk| disk.file_size).sum()
    }

    fn wants(&self, disk: &str) -> bool {
        self.scope.disk.as_deref().is_none_or(|only| only == disk)
    }

    fn identity(&mut self) -> Result<(), ArchiveError> {
        match self.archive.identity() {
            Ok(_) => Ok(()),
            Err(error @ ArchiveError::Manifest { .. }) => {
                self.tell(&Damage::of(0, Path::new("folder.json"), &error));
                Ok(())
            }
            // Whoever next writes there makes another one.
            Err(ArchiveError::Io { source, .. }) if source.kind() == io::ErrorKind::NotFound => {
                Ok(())
            }
            Err(error) => Err(error),
        }
    }

    fn point(&mut self, number: u64) -> Result<(), ArchiveError> {
        let file = PathBuf::from(format!("{number}/{MANIFEST}"));
        let Manifest { point, contents } = match self.archive.manifest(number) {
            Ok(manifest) => manifest,
            // That is not for us to judge.
            Err(error @ ArchiveError::Newer { .. }) => return Err(error),
            Err(error) => {
                self.tell(&Damage::of(number, &file, &error));
                return Ok(());
            }
        };
        self.verified.points += 1;
        for (disk, contents) in point.disks.iter().zip(&contents) {
            if self.wants(&disk.name) {
                self.parent(number, &file, disk);
                self.disk(number, disk, contents)?;
            }
        }
        Ok(())
    }

    /// Whether what a disk builds on is there, and is that still.
    fn parent(&mut self, number: u64, file: &Path, disk: &DiskEntry) {
        let Some(parent) = &disk.parent else {
            return;
        };
        let name = disk.name.clone();
        let entry = self.archive.point(parent.point);
        let entry = entry.and_then(|point| point.disk(&name));
        let error = match entry {
            Some(entry) if entry.blake3 == parent.blake3 => return,
            Some(_) => ArchiveError::OtherParent {
                point: number,
                disk: name,
                parent: parent.point,
            },
            // Its own damage is told by itself.
            None if self.archive.has(parent.point)
                && self.archive.point(parent.point).is_none() =>
            {
                return;
            }
            None => ArchiveError::MissingLink {
                point: number,
                disk: name,
                missing: parent.point,
            },
        };
        self.tell(&Damage::of(number, file, &error));
    }

    fn disk(
        &mut self,
        number: u64,
        disk: &DiskEntry,
        contents: &Contents,
    ) -> Result<(), ArchiveError> {
        let path = self.archive.folder_of(number).join(&disk.file);
        let whole = |what: &str, message: &str| {
            Damage::of_file(number, &disk.name, &disk.file, what, message)
        };
        let opened = File::open(&path).and_then(|file| Ok((file.metadata()?.len(), file)));
        let (length, file) = match opened {
            Ok(opened) => opened,
            Err(error) => {
                let lost = contents.data.clone();
                let damage = whole("the file", &format!("cannot be read: {error}"));
                self.tell(&Damage { lost, ..damage });
                return Ok(());
            }
        };
        let layout = disk.layout(contents);
        let mut chunks = contents.chunks(disk.chunk_size);
        let mut stretches = iter::from_fn(|| {
            let stretch: Stretch = chunks.by_ref().take(CHUNKS_AT_ONCE).collect();
            Some(stretch).filter(|stretch| !stretch.is_empty())
        });
        let expected = Expected {
            layout: &layout,
            cluster_size: disk.cluster_size,
            stretches: &mut stretches,
        };
        let found = inspect(&file, expected, self.watch)?;
        self.verified.files += 1;
        self.verified.bytes += disk.file_size;
        let is_told = !found.faults.is_empty();
        for fault in found.faults {
            self.tell(&Damage::in_file(number, &disk.name, &disk.file, &fault));
        }
        if found.more > 0 {
            let more = format!("differs at {} more places", found.more);
            self.tell(&whole("the file", &more));
        }
        if length > disk.file_size {
            let fault = Fault {
                offset: disk.file_size,
                length: length - disk.file_size,
                part: block::qcow2::Part::Padding,
                guest: Vec::new(),
                error: None,
            };
            self.tell(&Damage::in_file(number, &disk.name, &disk.file, &fault));
        } else if !is_told && found.blake3 != disk.blake3 {
            let message = format!(
                "has the hash {}, and should have {}",
                found.blake3, disk.blake3
            );
            self.tell(&whole("the file", &message));
        }
        Ok(())
    }

    fn tell(&mut self, damage: &Damage) {
        self.verified.damages += 1;
        self.watch.found(damage);
    }
}

/// How many chunks are prepared at a time to be read.
const CHUNKS_AT_ONCE: usize = 1024;
