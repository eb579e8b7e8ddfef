//! A disk moves to another machine, with all that is known of it.
//!
//! What is known is about one image, byte by byte. Here an image is known by its inode and its times,
//! which mean nothing elsewhere; so all of it is read when its state leaves, and again when that
//! arrives, and only the same bytes are the same disk.

use std::fs::File;
use std::io::{self, Read, Seek};
use std::path::Path;

use block::{Engine, Storage};
use time::OffsetDateTime;

use super::aside::{NotWritten, Occupied, write_aside};
use crate::archive::Digest;
use crate::control::answers::time_text;
use crate::disk::OnTrackingError;
use crate::failure::Failure;
use crate::image::Image;
use crate::served::{DiskSpec, ServedDisk, claim_state, locate};
use crate::state::{
    Description, ImageIdentity, NotTaken, State, Unfit, open_parcel, verify_parcel,
};

/// Whether every byte of an image is read, to know it again.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum ImageHash {
    /// It is.
    Read,
    /// The user says that it is the same.
    Skipped,
}

/// Packs the state of a disk that nobody serves into a file.
///
/// It is started and stopped first, as a server would: what is packed was left in good order, and can be
/// served here again.
pub(crate) async fn export_state(
    spec: &DiskSpec,
    to: &Path,
    occupied: Occupied,
    hash: ImageHash,
) -> Result<Description, Failure> {
    occupied.look(to).map_err(|error| not_written(to, &error))?;
    look(spec).await.map_err(|failure| of_disk(spec, failure))?;
    let terms = (OnTrackingError::FailWrite, Engine::Threads);
    let (disk, _) = ServedDisk::open(spec, None, terms, None).await?;
    disk.stays();
    let image = disk.disk.image();
    let closed = async {
        disk.catch_up().await?;
        disk.settle().await?;
        disk.close().await
    };
    closed.await.map_err(|error| not_durable(spec, &error))?;
    // What its state is about, and not what somebody may have made of it since.
    let left = disk.state.lock().await.image();
    let image_blake3 = match hash {
        ImageHash::Read => Some(digest(image).await.map_err(|e| unreadable(spec, &e))?),
        ImageHash::Skipped => None,
    };
    refuse_changed(spec, image, left)?;
    let state = disk.state.lock().await;
    let (checkpoints, bitmaps) = state.names();
    let description = Description {
        disk: spec.name.to_string(),
        disk_uuid: disk.uuid,
        size: disk.disk.size(),
        granularity: disk.disk.map().granularity().bytes(),
        image_blake3,
        exported_at: time_text(OffsetDateTime::now_utc()),
        stillpoint: env!("CARGO_PKG_VERSION").to_owned(),
        checkpoints,
        bitmaps,
    };
    let written = write_aside(to, occupied, |file| state.pack(file, &description));
    written.map_err(|error| not_written(to, &error))?;
    Ok(description)
}

/// Makes what a file has the state of a disk that nobody serves.
pub(crate) async fn import_state(
    spec: &DiskSpec,
    from: &Path,
    occupied: Occupied,
    hash: ImageHash,
) -> Result<Description, Failure> {
    let unfit = |error: Unfit| not_fit(from, &error);
    let mut file = File::open(from).map_err(|error| unfit(error.into()))?;
    let body = verify_parcel(&mut file).map_err(unfit)?;
    file.rewind().map_err(|error| unfit(error.into()))?;
    let mut parcel = io::BufReader::with_capacity(READ_AT_ONCE, file).take(body);
    let description = open_parcel(&mut parcel).map_err(unfit)?;
    let taken = take_in(spec, from, &mut parcel, &description, (occupied, hash)).await;
    taken.map_err(|failure| of_disk(spec, failure))?;
    Ok(description)
}

async fn take_in(
    spec: &DiskSpec,
    from: &Path,
    parcel: &mut impl Read,
    description: &Description,
    (occupied, hash): (Occupied, ImageHash),
) -> Result<(), Failure> {
    let (image, dir) = locate(spec, Engine::Threads).await?;
    refuse_elsewhere(&image)?;
    let (size, expected) = (image.size(), description.size);
    if size != expected {
        let message = format!("its image has {size} bytes, and the state is of {expected}");
        return Err(Failure::new("other-size", message));
    }
    if let Some(wanted) = spec.granularity.map(bitmap::Granularity::bytes)
        && wanted != description.granularity
    {
        let message = format!(
            "the state has a granularity of {} bytes, not {wanted}",
            description.granularity
        );
        return Err(Failure::new("other-granularity", message).hint("leave granularity= out"));
    }
    let _claimed = claim_state(spec, &dir)?;
    let cannot_use = |error: io::Error| {
        let message = format!("cannot use the state in '{}': {error}", dir.display());
        Failure::new("state", message)
    };
    State::settle_in(&dir).map_err(cannot_use)?;
    if occupied == Occupied::Stays && State::exists_in(&dir) {
        let message = format!("there is a state in '{}' already", dir.display());
        let hint = "with --force it is replaced, and what it knows is lost";
        return Err(Failure::new("state-exists", message).hint(hint));
    }
    // The state will say that all of the image is as it was left, and a power cut may not make that untrue:
    // whoever copied it may have left it in the page cache.
    image.sync_all().await.map_err(|error| {
        let message = format!("its image cannot be made durable: {error}");
        Failure::new("not-durable", message)
    })?;
    let found = ImageIdentity::of(&image).map_err(|error| unreadable(spec, &error))?;
    compare(spec, &image, description, hash).await?;
    refuse_changed(spec, &image, found)?;
    let taken = State::take_in(&dir, parcel, description, &image, found).await;
    taken.map_err(|error| match error {
        NotTaken::Changed => changed(),
        NotTaken::Unfit(error) => not_fit(from, &error),
        NotTaken::Senseless(what) => {
            let message = format!("'{}' cannot be used: its {what}", from.display());
            Failure::new("damaged-export", message).hint("export it again")
        }
        NotTaken::Io(error) => cannot_use(error),
    })
}

/// Whether there is a state that can leave.
async fn look(spec: &DiskSpec) -> Result<(), Failure> {
    let (image, dir) = locate(spec, Engine::Threads).await?;
    refuse_elsewhere(&image)?;
    let failed = |error: io::Error| {
        let message = format!("cannot use the state in '{}': {error}", dir.display());
        Failure::new("state", message)
    };
    let missing = || {
        let message = format!("there is no state in '{}'", dir.display());
        let hint = "it has never been served there; state=DIR says where its state is";
        Failure::new("no-state", message).hint(hint)
    };
    if !dir.is_dir() {
        return Err(missing());
    }
    let _claimed = claim_state(spec, &dir)?;
    State::settle_in(&dir).map_err(failed)?;
    if !State::exists_in(&dir) {
        return Err(missing());
    }
    let open = State::open_backups(&dir).map_err(failed)?;
    if open.is_empty() {
        return Ok(());
    }
    let names: Vec<_> = open.iter().map(ToString::to_string).collect();
    let message = format!("it has open backups: {}", names.join(", "));
    let hint = "what they keep cannot be moved: serve the disk, and commit or abort them";
    Err(Failure::new("open-backups", message).hint(hint))
}

/// Refuses an image that is not the one whose state it is, as far as is asked for.
async fn compare(
    spec: &DiskSpec,
    image: &Image,
    description: &Description,
    hash: ImageHash,
) -> Result<(), Failure> {
    if hash == ImageHash::Skipped {
        return Ok(());
    }
    let Some(expected) = description.image_blake3 else {
        let message = "the state was exported without a hash of the image";
        let hint = "if you know that the image is the same, byte for byte: --no-image-hash";
        return Err(Failure::new("no-image-hash", message).hint(hint));
    };
    let found = digest(image)
        .await
        .map_err(|error| unreadable(spec, &error))?;
    if found != expected {
        let message = format!(
            "its image is not the one that was exported at {}: the BLAKE3 hash is {found}, not \
             {expected}",
            description.exported_at
        );
        let hint =
            "copy the image again, or export the state again: it has to be of the same moment";
        return Err(Failure::new("other-image", message).hint(hint));
    }
    Ok(())
}

async fn digest(image: &Image) -> io::Result<Digest> {
    let mut hash = blake3::Hasher::new();
    let mut buffer = vec![0; READ_AT_ONCE];
    let mut at = 0;
    while at < image.size() {
        let length = buffer.len().min((image.size() - at) as usize);
        image.read(at, &mut buffer[..length]).await?;
        hash.update(&buffer[..length]);
        at += length as u64;
    }
    Ok(hash.finalize().into())
}

fn refuse_elsewhere(image: &Image) -> Result<(), Failure> {
    if image.remote().is_none() {
        return Ok(());
    }
    let message =
        "its image is on another server, which may still perform writes that were given up";
    Err(Failure::new("not-movable", message).hint("move an image that is a file or a device"))
}

fn refuse_changed(spec: &DiskSpec, image: &Image, left: ImageIdentity) -> Result<(), Failure> {
    let now = ImageIdentity::of(image).map_err(|error| unreadable(spec, &error))?;
    if now == left {
        return Ok(());
    }
    Err(changed())
}

fn changed() -> Failure {
    let message = "its image was changed while it was read";
    Failure::new("image-changed", message).hint("see who writes it, and try again")
}

fn of_disk(spec: &DiskSpec, failure: Failure) -> Failure {
    Failure {
        message: format!("disk '{}': {}", spec.name, failure.message),
        ..failure
    }
}

fn not_fit(path: &Path, error: &Unfit) -> Failure {
    let message = format!("cannot use '{}': {error}", path.display());
    match error {
        Unfit::Stranger => Failure::new("no-export", message),
        Unfit::Newer(_) => Failure::new("newer-export", message).hint("use the newer version"),
        Unfit::Damaged(_) => {
            Failure::new("damaged-export", message).hint("copy it again, or export it again")
        }
        Unfit::Io(_) => Failure::new("cannot-open", message),
    }
}

fn not_written(path: &Path, error: &NotWritten) -> Failure {
    if matches!(error, NotWritten::Exists) {
        let message = format!("'{}' exists", path.display());
        return Failure::new("output-exists", message).hint("with --force it is replaced");
    }
    let message = format!("cannot write '{}': {error}", path.display());
    Failure::new("not-writable", message)
}

fn not_durable(spec: &DiskSpec, error: &io::Error) -> Failure {
    let message = format!(
        "disk '{}': not everything could be made durable: {error}",
        spec.name
    );
    Failure::new("not-durable", message)
}

fn unreadable(spec: &DiskSpec, error: &io::Error) -> Failure {
    let message = format!("'{}' cannot be read: {error}", spec.path.display());
    Failure::new("cannot-open", message)
}

const READ_AT_ONCE: usize = 1 << 20;
