//! What the bytes of a disk are in.

mod file;
mod lock;
mod qcow2;
mod remote;

use std::io;
use std::ops::Range;
use std::path::Path;

use block::qcow2::{Depth, Qcow2Image};
use block::{Engine, Extent, FileStorage, Storage, Zeroing};
use bytes::Bytes;

use crate::failure::Failure;
pub(crate) use qcow2::Stored;
pub(crate) use remote::RemoteSpec;
use remote::RemoteStorage;

use crate::served::{DiskSpec, Format};

/// The image of a disk. Of which kind it is was settled when it was opened.
#[derive(Debug)]
pub(crate) enum Image {
    /// A file or a block device, as its bytes are.
    File(FileStorage),
    /// An export of another NBD server.
    Nbd(RemoteStorage),
    /// A file that says where the bytes of the disk are.
    Qcow2(Box<Qcow2Image>),
}

impl Image {
    /// Opens and locks the image of `spec`.
    pub(crate) async fn open(spec: &DiskSpec, engine: Engine) -> Result<Self, Failure> {
        match (&spec.remote, spec.format) {
            (Some(remote), None | Some(Format::Raw)) => open_remote(spec, remote).await,
            (Some(_), Some(Format::Qcow2)) => {
                let message = "what another server exports is taken as it is, raw";
                let hint = "let qemu-nbd read the qcow2 image, and serve what it exports";
                Err(Failure::new("bad-argument", message.to_owned()).hint(hint))
            }
            (None, None | Some(Format::Raw)) => file::open(spec, engine).await.map(Self::File),
            (None, Some(Format::Qcow2)) => {
                let image = qcow2::open(spec, engine).await?;
                Ok(Self::Qcow2(Box::new(image)))
            }
        }
    }

    /// The other server that has it, if one has.
    pub(crate) fn remote(&self) -> Option<&RemoteStorage> {
        match self {
            Self::Nbd(remote) => Some(remote),
            Self::File(_) | Self::Qcow2(_) => None,
        }
    }

    /// How large it is now, whoever made it so. What another server has is asked for its size when it
    /// is [enlarged](Storage::grow).
    pub(crate) fn length(&self) -> io::Result<u64> {
        match self {
            Self::File(file) => file.length(),
            Self::Nbd(remote) => Ok(remote.size()),
            Self::Qcow2(image) => Ok(image.size()),
        }
    }

    /// Whether it is a block device, whose size is not ours to choose.
    pub(crate) fn is_device(&self) -> bool {
        match self {
            Self::File(file) => file.is_device(),
            Self::Nbd(_) | Self::Qcow2(_) => false,
        }
    }

    /// What all access to it is made of where that is direct, in bytes.
    pub(crate) fn block(&self) -> Option<u64> {
        match self {
            Self::File(file) => file.block(),
            Self::Nbd(_) | Self::Qcow2(_) => None,
        }
    }

    /// Whether nobody ever writes it here, so that any change of it is another's.
    pub(crate) fn is_constant(&self) -> bool {
        matches!(self, Self::Qcow2(_))
    }

    /// Makes durable what others have written: also an image that is never written here, with all that is
    /// behind it.
    pub(crate) async fn sync_all(&self) -> io::Result<()> {
        let Self::Qcow2(image) = self else {
            return self.sync().await;
        };
        for file in image.files() {
            match file.sync().await {
                // A file system that nobody can write has nothing to make durable.
                Err(error) if error.kind() == io::ErrorKind::InvalidInput => {}
                synced => synced?,
            }
        }
        Ok(())
    }

    /// As QEMU calls the format.
    pub(crate) fn format(&self) -> &'static str {
        match self {
            Self::File(_) | Self::Nbd(_) => "raw",
            Self::Qcow2(_) => "qcow2",
        }
    }

    /// How deep in a chain of images `range` is, from its start on: at least one stretch and at most
    /// `limit`, adjacent.
    pub(crate) async fn depths(&self, range: Range<u64>, limit: usize) -> io::Result<Vec<Depth>> {
        match self {
            Self::File(_) | Self::Nbd(_) => Ok(vec![Depth { range, depth: 1 }]),
            Self::Qcow2(image) => image.depths(range, limit).await,
        }
    }

    /// The dirty bitmaps that are stored in it; it was opened at `path`.
    pub(crate) async fn stored_bitmaps(&self, path: &Path) -> Vec<Stored> {
        match self {
            Self::File(_) | Self::Nbd(_) => Vec::new(),
            Self::Qcow2(image) => qcow2::stored_bitmaps(path, image).await,
        }
    }
}

impl Storage for Image {
    fn size(&self) -> u64 {
        match self {
            Self::File(file) => file.size(),
            Self::Nbd(remote) => remote.size(),
            Self::Qcow2(image) => image.size(),
        }
    }

    async fn grow(&self, size: u64) -> io::Result<()> {
        match self {
            Self::File(file) => file.grow(size).await,
            Self::Nbd(remote) => remote.grow(size).await,
            Self::Qcow2(image) => image.grow(size).await,
        }
    }

    async fn read(&self, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
        match self {
            Self::File(file) => file.read(offset, buffer).await,
            Self::Nbd(remote) => remote.read(offset, buffer).await,
            Self::Qcow2(image) => image.read(offset, buffer).await,
        }
    }

    async fn write(&self, offset: u64, data: &Bytes) -> io::Result<()> {
        match self {
            Self::File(file) => file.write(offset, data).await,
            Self::Nbd(remote) => remote.write(offset, data).await,
            Self::Qcow2(image) => image.write(offset, data).await,
        }
    }

    async fn zero(&self, range: Range<u64>, how: Zeroing) -> io::Result<()> {
        match self {
            Self::File(file) => file.zero(range, how).await,
            Self::Nbd(remote) => remote.zero(range, how).await,
            Self::Qcow2(image) => image.zero(range, how).await,
        }
    }

    async fn sync(&self) -> io::Result<()> {
        match self {
            Self::File(file) => file.sync().await,
            Self::Nbd(remote) => remote.sync().await,
            Self::Qcow2(image) => image.sync().await,
        }
    }

    async fn extents(&self, range: Range<u64>) -> io::Result<Vec<Extent>> {
        match self {
            Self::File(file) => file.extents(range).await,
            Self::Nbd(remote) => remote.extents(range).await,
            Self::Qcow2(image) => image.extents(range).await,
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
    if spec.format.is_none() {
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
