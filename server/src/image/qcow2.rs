//! Images of the format qcow2: they are read, and never written.

use std::error::Error as _;
use std::fs::{self, File};
use std::os::unix::fs::FileTypeExt;
use std::path::Path;
use std::sync::Arc;

use bitmap::{BitGranularity, Bits};
use block::qcow2::{NameError, OpenError, Qcow2Image, Refusal, Room, StoredBitmap, Unreadable};
use block::{Engine, Storage};

use super::lock::lock;
use super::{SECTOR, cannot_open};
use crate::failure::Failure;
use crate::served::{Cache, DiskSpec};

/// A dirty bitmap that is stored in an image: nobody can change it here.
#[derive(Clone, Debug)]
pub(crate) struct Stored {
    /// Its name, which no other has.
    pub(crate) name: String,
    /// How much of the disk one bit stands for.
    pub(crate) granularity: BitGranularity,
    /// Whether it records while whoever owns the image runs.
    pub(crate) recording: bool,
    /// What is dirty, or why that is not known.
    pub(crate) bits: Result<Arc<Bits>, String>,
}

/// Opens and locks the image of `spec`, with all that it names.
pub(super) async fn open(spec: &DiskSpec, engine: Engine) -> Result<Qcow2Image, Failure> {
    let path = &spec.path;
    if !spec.read_only {
        let message = format!("'{}' is qcow2, which is never written", path.display());
        let hint = "add ,read-only; a disk that is to be written is served as raw, \
                    or on top of qemu-nbd";
        return Err(Failure::new("read-only-format", message).hint(hint));
    }
    if spec.cache != Cache::Writeback {
        let message = format!(
            "'{}' is qcow2, which is read with cache=writeback",
            path.display()
        );
        return Err(Failure::new("no-direct-io", message).hint("leave cache= out"));
    }
    let kind = fs::metadata(path).map_err(|error| cannot_open(path, &error))?;
    if !kind.is_file() && !kind.file_type().is_block_device() {
        let message = format!("'{}' is neither a file nor a block device", path.display());
        return Err(Failure::new("bad-image", message));
    }
    let file = File::open(path).map_err(|error| cannot_open(path, &error))?;
    lock(path, &file).await?;
    let opened = Qcow2Image::open(file, path, &spec.allow_backing, engine).await;
    let image = opened.map_err(|error| cannot_use(&error))?;
    if image.size() == 0 || !image.size().is_multiple_of(SECTOR) {
        let message = format!(
            "the disk in '{}' has {} bytes, and not some sectors of {SECTOR}",
            path.display(),
            image.size()
        );
        return Err(Failure::new("bad-image", message));
    }
    Ok(image)
}

/// The dirty bitmaps that are stored in the image at `path`. What is wrong with them is no reason not to
/// serve the disk.
pub(crate) async fn stored_bitmaps(path: &Path, image: &Qcow2Image) -> Vec<Stored> {
    let listed = image.bitmaps().await.unwrap_or_else(|error| {
        let path = path.display();
        tracing::warn!(%path, %error, "the dirty bitmaps in the image are left out");
        Vec::new()
    });
    let mut room = Room(BITS_MAX);
    let mut bitmaps = Vec::with_capacity(listed.len());
    for bitmap in listed {
        let Ok(granularity) = BitGranularity::new(bitmap.granularity) else {
            continue;
        };
        let bits = load(image, &bitmap, granularity, &mut room).await;
        if let Err(reason) = &bits {
            let (path, bitmap) = (path.display(), &bitmap.name);
            tracing::warn!(%path, bitmap, reason, "a bitmap in the image is inconsistent");
        }
        bitmaps.push(Stored {
            name: bitmap.name,
            granularity,
            recording: bitmap.recording,
            bits,
        });
    }
    bitmaps
}

async fn load(
    image: &Qcow2Image,
    bitmap: &StoredBitmap,
    granularity: BitGranularity,
    room: &mut Room,
) -> Result<Arc<Bits>, String> {
    if let Some(why) = bitmap.inconsistent {
        return Err(why.to_owned());
    }
    let mut bits = Bits::new(granularity);
    let read = image.dirty(bitmap, room, |range| bits.set(&range)).await;
    read.map_err(|error| error.to_string())?;
    Ok(Arc::new(bits))
}

/// In words for whoever has the image, with what can be done about it.
fn cannot_use(error: &OpenError) -> Failure {
    let mut message = format!("cannot use {error}");
    let mut cause = error.why.source();
    while let Some(more) = cause {
        message = format!("{message}: {more}");
        cause = more.source();
    }
    let repair = "see what qemu-img check says of it; qemu-img check -r all repairs what can be";
    let (code, hint) = match &error.why {
        Unreadable::Refused(refusal) => match refusal {
            Refusal::Encrypted(_) => (
                "image-encrypted",
                Some("serve it through qemu-nbd, which can be given the key"),
            ),
            Refusal::UnknownFeatures(_) => ("image-features", Some("serve it through qemu-nbd")),
            Refusal::Corrupt => ("image-corrupt", Some(repair)),
            Refusal::Dirty => ("image-dirty", Some(repair)),
            _ => ("bad-image", None),
        },
        Unreadable::NoFormat => (
            "no-backing-format",
            Some("qemu-img rebase -u -b BACKING -F FORMAT writes it into the image"),
        ),
        Unreadable::Name(NameError::Outside(_)) => (
            "backing-not-allowed",
            Some("if you trust whoever wrote the image, name the folder with --allow-backing DIR"),
        ),
        Unreadable::Name(NameError::Protocol(_) | NameError::Link(_)) => (
            "backing-not-allowed",
            Some("qemu-img rebase -u -b BACKING -F FORMAT has it name the file itself"),
        ),
        Unreadable::Lock(_) => ("image-locked", None),
        _ => ("bad-image", None),
    };
    let failure = Failure::new(code, message);
    match hint {
        Some(hint) => failure.hint(hint),
        None => failure,
    }
}

/// What the bits of all bitmaps of an image may take in memory: 64 bitmaps of a disk of 2 TiB in which
/// everything is dirty. What is clean takes next to nothing.
const BITS_MAX: u64 = 256 << 20;
