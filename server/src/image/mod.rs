//! What the bytes of a disk are in.

mod file;
mod remote;

use std::io;
use std::ops::Range;
use std::path::Path;

use block::{Engine, Extent, FileStorage, Storage, Zeroing};
use bytes::Bytes;

use crate::failure::Failure;

use crate::served::DiskSpec;
pub(crate) use remote::RemoteSpec;
use remote::RemoteStorage;

/// The image of a disk. Of which kind it is was settled when it was opened.
#[derive(Debug)]
pub(crate) enum Image {
    /// A file or a block device, as its bytes are.
    File(FileStorage),
    /// An export of another NBD server.
    Nbd(RemoteStorage),
}

impl Image {
    /// Opens and locks the image of `spec`.
    pub(crate) async fn open(spec: &DiskSpec, engine: Engine) -> Result<Self, Failure> {
        match &spec.remote {
            None => file::open(spec, engine).await.map(Self::File),
            Some(remote) => open_remote(spec, remote).await,
        }
    }

    /// The other server that has it, if one has.
    pub(crate) fn remote(&self) -> Option<&RemoteStorage> {
        match self {
            Self::File(_) => None,
            Self::Nbd(remote) => Some(remote),
        }
    }

    /// How large it is now, whoever made it so. What another server has is asked for its size when it
    /// is [enlarged](Storage::grow).
    pub(crate) fn length(&self) -> io::Result<u64> {
        match self {
            Self::File(file) => file.length(),
            Self::Nbd(remote) => Ok(remote.size()),
        }
    }

    /// Whether it is a block device, whose size is not ours to choose.
    pub(crate) fn is_device(&self) -> bool {
        match self {
            Self::File(file) => file.is_device(),
            Self::Nbd(_) => false,
        }
    }
}

impl Storage for Image {
    fn size(&self) -> u64 {
        match self {
            Self::File(file) => file.size(),
            Self::Nbd(remote) => remote.size(),
        }
    }

    async fn grow(&self, size: u64) -> io::Result<()> {
        match self {
            Self::File(file) => file.grow(size).await,
            Self::Nbd(remote) => remote.grow(size).await,
        }
    }

    async fn read(&self, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
        match self {
            Self::File(file) => file.read(offset, buffer).await,
            Self::Nbd(remote) => remote.read(offset, buffer).await,
        }
    }

    async fn write(&self, offset: u64, data: &Bytes) -> io::Result<()> {
        match self {
            Self::File(file) => file.write(offset, data).await,
            Self::Nbd(remote) => remote.write(offset, data).await,
        }
    }

    async fn zero(&self, range: Range<u64>, how: Zeroing) -> io::Result<()> {
        match self {
            Self::File(file) => file.zero(range, how).await,
            Self::Nbd(remote) => remote.zero(range, how).await,
        }
    }

    async fn sync(&self) -> io::Result<()> {
        match self {
            Self::File(file) => file.sync().await,
            Self::Nbd(remote) => remote.sync().await,
        }
    }

    async fn extents(&self, range: Range<u64>) -> io::Result<Vec<Extent>> {
        match self {
            Self::File(file) => file.extents(range).await,
            Self::Nbd(remote) => remote.extents(range).await,
        }
    }

    fn unsettled(&self) -> Vec<Range<u64>> {
        self.remote()
            .map_or_else(Vec::new, RemoteStorage::unsettled)
    }

    fn is_elsewhere(&self) -> bool {
        self.remote().is_some()
    }
}

async fn open_remote(spec: &DiskSpec, remote: &RemoteSpec) -> Result<Image, Failure> {
    let image = RemoteStorage::open(spec.name.as_str(), remote).await?;
    let (address, size, block) = (&remote.uri, image.size(), image.block());
    if image.is_read_only() && !spec.read_only {
        let message = format!("'{address}' is read-only");
        return Err(Failure::new("cannot-open", message).hint("add ,read-only"));
    }
    if size == 0 || !size.is_multiple_of(SECTOR.max(block)) {
        let unit = SECTOR.max(block);
        let message = format!("the size of '{address}', {size} bytes, is no multiple of {unit}");
        return Err(Failure::new("bad-image", message));
    }
    if !image.can_sync() && !spec.read_only {
        tracing::warn!(
            disk = %spec.name,
            "the base has no flush: what was written is as durable as its server makes it"
        );
    }
    let image = Image::Nbd(image);
    if !spec.raw {
        file::refuse_other_formats(&spec.path, &image).await?;
    }
    Ok(image)
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
