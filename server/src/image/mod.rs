//! What the bytes of a disk are in.

mod file;
mod qcow2;

use std::io;
use std::ops::Range;
use std::path::Path;

use block::qcow2::{Depth, Qcow2Image};
use block::{Engine, Extent, FileStorage, Storage, Zeroing};
use bytes::Bytes;

use crate::failure::Failure;
pub(crate) use qcow2::Stored;

use crate::served::{DiskSpec, Format};

/// The image of a disk. Of which kind it is was settled when it was opened.
#[derive(Debug)]
pub(crate) enum Image {
    /// A file or a block device, as its bytes are.
    File(FileStorage),
    /// A file that says where the bytes of the disk are.
    Qcow2(Box<Qcow2Image>),
}

impl Image {
    /// Opens and locks the image of `spec`.
    pub(crate) async fn open(spec: &DiskSpec, engine: Engine) -> Result<Self, Failure> {
        match spec.format {
            None | Some(Format::Raw) => file::open(spec, engine).await.map(Self::File),
            Some(Format::Qcow2) => {
                let image = qcow2::open(spec, engine).await?;
                Ok(Self::Qcow2(Box::new(image)))
            }
        }
    }

    /// How large it is now, whoever made it so.
    pub(crate) fn length(&self) -> io::Result<u64> {
        match self {
            Self::File(file) => file.length(),
            Self::Qcow2(image) => Ok(image.size()),
        }
    }

    /// Whether it is a block device, whose size is not ours to choose.
    pub(crate) fn is_device(&self) -> bool {
        match self {
            Self::File(file) => file.is_device(),
            Self::Qcow2(_) => false,
        }
    }

    /// Whether nobody ever writes it here, so that any change of it is another's.
    pub(crate) fn is_constant(&self) -> bool {
        matches!(self, Self::Qcow2(_))
    }

    /// As QEMU calls the format.
    pub(crate) fn format(&self) -> &'static str {
        match self {
            Self::File(_) => "raw",
            Self::Qcow2(_) => "qcow2",
        }
    }

    /// How deep in a chain of images `range` is, from its start on: at least one stretch and at most
    /// `limit`, adjacent.
    pub(crate) async fn depths(&self, range: Range<u64>, limit: usize) -> io::Result<Vec<Depth>> {
        match self {
            Self::File(_) => Ok(vec![Depth { range, depth: 1 }]),
            Self::Qcow2(image) => image.depths(range, limit).await,
        }
    }

    /// The dirty bitmaps that are stored in it; it was opened at `path`.
    pub(crate) async fn stored_bitmaps(&self, path: &Path) -> Vec<Stored> {
        match self {
            Self::File(_) => Vec::new(),
            Self::Qcow2(image) => qcow2::stored_bitmaps(path, image).await,
        }
    }
}

impl Storage for Image {
    fn size(&self) -> u64 {
        match self {
            Self::File(file) => file.size(),
            Self::Qcow2(image) => image.size(),
        }
    }

    async fn grow(&self, size: u64) -> io::Result<()> {
        match self {
            Self::File(file) => file.grow(size).await,
            Self::Qcow2(image) => image.grow(size).await,
        }
    }

    async fn read(&self, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
        match self {
            Self::File(file) => file.read(offset, buffer).await,
            Self::Qcow2(image) => image.read(offset, buffer).await,
        }
    }

    async fn write(&self, offset: u64, data: &Bytes) -> io::Result<()> {
        match self {
            Self::File(file) => file.write(offset, data).await,
            Self::Qcow2(image) => image.write(offset, data).await,
        }
    }

    async fn zero(&self, range: Range<u64>, how: Zeroing) -> io::Result<()> {
        match self {
            Self::File(file) => file.zero(range, how).await,
            Self::Qcow2(image) => image.zero(range, how).await,
        }
    }

    async fn sync(&self) -> io::Result<()> {
        match self {
            Self::File(file) => file.sync().await,
            Self::Qcow2(image) => image.sync().await,
        }
    }

    async fn extents(&self, range: Range<u64>) -> io::Result<Vec<Extent>> {
        match self {
            Self::File(file) => file.extents(range).await,
            Self::Qcow2(image) => image.extents(range).await,
        }
    }
}

/// That what lies at `path` cannot be opened.
pub(crate) fn cannot_open(path: &Path, error: &io::Error) -> Failure {
    Failure::new(
        "cannot-open",
        format!("cannot open '{}': {error}", path.display()),
    )
}

/// What the sizes of disks are made of.
pub(crate) const SECTOR: u64 = 512;
