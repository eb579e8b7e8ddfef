//! What the bytes of a disk are in.

mod file;

use std::io;
use std::ops::Range;
use std::path::Path;

use block::{Engine, Extent, FileStorage, Storage, Zeroing};
use bytes::Bytes;

use crate::failure::Failure;
use crate::served::DiskSpec;

/// The image of a disk. Of which kind it is was settled when it was opened.
#[derive(Debug)]
pub(crate) enum Image {
    /// A file or a block device, as its bytes are.
    File(FileStorage),
}

impl Image {
    /// Opens and locks the image of `spec`.
    pub(crate) async fn open(spec: &DiskSpec, engine: Engine) -> Result<Self, Failure> {
        file::open(spec, engine).await.map(Self::File)
    }

    /// How large it is now, whoever made it so.
    pub(crate) fn length(&self) -> io::Result<u64> {
        match self {
            Self::File(file) => file.length(),
        }
    }

    /// Whether it is a block device, whose size is not ours to choose.
    pub(crate) fn is_device(&self) -> bool {
        match self {
            Self::File(file) => file.is_device(),
        }
    }
}

impl Storage for Image {
    fn size(&self) -> u64 {
        match self {
            Self::File(file) => file.size(),
        }
    }

    async fn grow(&self, size: u64) -> io::Result<()> {
        match self {
            Self::File(file) => file.grow(size).await,
        }
    }

    async fn read(&self, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
        match self {
            Self::File(file) => file.read(offset, buffer).await,
        }
    }

    async fn write(&self, offset: u64, data: &Bytes) -> io::Result<()> {
        match self {
            Self::File(file) => file.write(offset, data).await,
        }
    }

    async fn zero(&self, range: Range<u64>, how: Zeroing) -> io::Result<()> {
        match self {
            Self::File(file) => file.zero(range, how).await,
        }
    }

    async fn sync(&self) -> io::Result<()> {
        match self {
            Self::File(file) => file.sync().await,
        }
    }

    async fn extents(&self, range: Range<u64>) -> io::Result<Vec<Extent>> {
        match self {
            Self::File(file) => file.extents(range).await,
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
