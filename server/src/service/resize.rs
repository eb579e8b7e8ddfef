//! Disks that become larger, while they are served or while nobody has them.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use block::{Engine, Storage};

use super::{Service, next_era, refuse_untrusted};
use crate::disk::{Cover, Ending, Freeze, Growth, NotGrown, OnTrackingError, freeze};
use crate::failure::Failure;
use crate::files::Files;
use crate::image::SECTOR;
use crate::names::Name;
use crate::new_size::NewSize;
use crate::served::{DiskSpec, ServedDisk};

/// How large a disk was, and is.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) struct Resized {
    /// In bytes.
    pub(crate) before: u64,
    /// In bytes.
    pub(crate) now: u64,
}

impl Service {
    /// Makes a disk `size` bytes large, if it is smaller. No instant is taken meanwhile, and no
    /// other disk resized.
    pub(crate) async fn resize_disk(&self, name: &Name, size: u64) -> Result<Resized, Failure> {
        let _alone = self.instants.lock().await;
        let disk = self.disk(name)?;
        disk.resizing.store(true, Ordering::Relaxed);
        let resized = self.resize_served(&disk, size).await;
        disk.resizing.store(false, Ordering::Relaxed);
        resized
    }

    async fn resize_served(&self, disk: &Arc<ServedDisk>, size: u64) -> Result<Resized, Failure> {
        check(disk, size).await?;
        if size == disk.disk.size() {
            return Ok(unchanged(size));
        }
        if let Some(remote) = disk.disk.image().remote() {
            // A server that was started anew for it has that size by now, and is to take a flush.
            let expected = remote.expect(size).await;
            expected.map_err(|error| unreachable(&disk.name, &error))?;
        }
        self.freeze(vec![next_instant(disk)?]).await?;
        grow(disk, size).await
    }
}

/// The same for a disk that no server has.
///
/// Only if its last server ended in good order, or no backup is open: what else a start finds and
/// records, about backups of several disks too, is a server's business. Refused, it is as if a
/// server had been killed when it had hardly started.
pub(crate) async fn resize_alone(spec: &DiskSpec, size: NewSize) -> Result<Resized, Failure> {
    refuse_read_only(&spec.name, spec.read_only)?;
    let terms = (OnTrackingError::FailWrite, Engine::Threads);
    let opened = ServedDisk::open(spec, None, terms, Some(size)).await;
    let (disk, past) = opened.map_err(|failure| match failure.code {
        "image-locked" | "locked" => {
            failure.hint("if a server has it, that resizes it: leave --disk out")
        }
        _ => failure,
    })?;
    disk.stays();
    if past.ending != Ending::Clean && !past.ledger.open.is_empty() {
        let message = format!(
            "disk '{}': its last server did not end in good order, and left backups open",
            disk.name
        );
        let hint = "serve it, and resize it then: what became of the backups is found out first";
        return Err(Failure::new("not-clean", message).hint(hint));
    }
    let caught_up = async {
        disk.catch_up().await?;
        disk.settle().await
    };
    caught_up.await.map_err(|error| not_closed(&disk, &error))?;
    let disk = Arc::new(disk);
    let resized = resize_opened(&disk, size, past.growth).await;
    disk.close()
        .await
        .map_err(|error| not_closed(&disk, &error))?;
    resized
}

async fn resize_opened(
    disk: &Arc<ServedDisk>,
    size: NewSize,
    done: Option<Growth>,
) -> Result<Resized, Failure> {
    let found = disk.disk.size();
    // What this start has ended, or found in a block device, was what is asked for.
    let before = done.map_or(found, |growth| growth.from);
    let Some(size) = size.from(before) else {
        return Err(impossible(disk, before));
    };
    check(disk, size).await?;
    if size == found {
        return Ok(Resized { before, now: size });
    }
    let freezes = vec![next_instant(disk)?];
    let cover = Cover::of(&freezes);
    let taken = freeze(freezes, std::future::pending()).await;
    cover
        .finish(taken)
        .await
        .map_err(|error| Failure::new("image-failed", error.to_string()))?;
    grow(disk, size).await
}

/// Refuses what cannot be.
async fn check(disk: &ServedDisk, size: u64) -> Result<(), Failure> {
    let name = &disk.name;
    refuse_read_only(name, disk.read_only)?;
    let now = disk.disk.size();
    if let Some(Growth { to, .. }) = disk.growth().await.filter(|growth| growth.to != size) {
        let message =
            format!("disk '{name}': its image was enlarged to {to} bytes, which is not ended yet");
        return Err(Failure::new("resize-unfinished", message).hint("ask for that size first"));
    }
    if size < now {
        let message = format!("disk '{name}' has {now} bytes, and cannot be made {size}");
        let hint = "a disk only grows: what is behind the new end would be lost, to the machine \
                    that uses it and to open backups";
        return Err(Failure::new("cannot-shrink", message).hint(hint));
    }
    if !size.is_multiple_of(SECTOR) {
        let message = format!("{size} bytes are no multiple of {SECTOR}");
        return Err(Failure::new("bad-argument", message));
    }
    let chunk = disk.disk.map().granularity().bytes();
    if size > now && size.div_ceil(chunk) > CHUNKS_MAX {
        let message = format!(
            "{size} bytes are more than the {} that a disk with a granularity of {chunk} grows to",
            CHUNKS_MAX * chunk
        );
        return Err(Failure::new("bad-argument", message));
    }
    if size > now {
        refuse_untrusted(disk)?;
    }
    check_image(disk, size)
}

/// Refuses a size that the image cannot have, or not without losing something.
fn check_image(disk: &ServedDisk, size: u64) -> Result<(), Failure> {
    let image = disk.disk.image();
    let (path, now) = (disk.path.display(), disk.disk.size());
    let length = image.length().map_err(|error| {
        Failure::new("cannot-resize", format!("cannot look at '{path}': {error}"))
    })?;
    // Whether another server has it by now turns out when it is connected to anew.
    if size == now || image.remote().is_some() {
        return Ok(());
    }
    if image.is_device() && length != size {
        let message = format!("'{path}' is a block device of {length} bytes, not {size}");
        let hint = "enlarge the device first, then ask for the size that it has";
        return Err(Failure::new("other-size", message).hint(hint));
    }
    if let Some(block) = image.block().filter(|block| !size.is_multiple_of(*block)) {
        let message = format!(
            "{size} bytes are no multiple of {block}, of which direct I/O to '{path}' is made"
        );
        let hint = "choose a size that is, or serve the disk with cache=writeback";
        return Err(Failure::new("bad-argument", message).hint(hint));
    }
    if length > size || length < now {
        let message = format!(
            "'{path}' has {length} bytes, which someone else has made of {}",
            image.size()
        );
        let hint = "a size that is not smaller than both will do";
        return Err(Failure::new("other-size", message).hint(hint));
    }
    Ok(())
}

fn refuse_read_only(name: &Name, read_only: bool) -> Result<(), Failure> {
    if read_only {
        let message = format!("disk '{name}' is read-only");
        return Err(Failure::new("read-only", message));
    }
    Ok(())
}

fn next_instant(disk: &Arc<ServedDisk>) -> Result<Freeze<Files>, Failure> {
    let tracking = disk.disk.tracking();
    let era = next_era(disk, &tracking)?;
    Ok(Freeze {
        disk: Arc::clone(&disk.disk),
        next: tracking.followed_by(era, None),
    })
}

async fn grow(disk: &ServedDisk, size: u64) -> Result<Resized, Failure> {
    let before = disk.disk.size();
    let grown = disk.disk.grow(size, &mut &*disk).await;
    let name = &disk.name;
    grown.map_err(|error| match error {
        NotGrown::Refused(error) => {
            let message = format!("disk '{name}' cannot be made {size} bytes large: {error}");
            Failure::new("cannot-resize", message).hint("nothing has changed")
        }
        NotGrown::Unfinished(error) => {
            let message = format!(
                "disk '{name}': its image has {size} bytes, but what is new cannot be recorded: \
                 {error}"
            );
            let hint = "nobody is told of the new size yet: see to the storage and ask again; \
                        the next start does it too";
            Failure::new("resize-unfinished", message).hint(hint)
        }
    })?;
    tracing::info!(disk = %name, from = before, to = size, "the disk has been enlarged");
    Ok(Resized { before, now: size })
}

fn unreachable(disk: &Name, error: &std::io::Error) -> Failure {
    let message = format!("disk '{disk}': {error}");
    let hint = "see that the server which has the image is there, with the old size or this one";
    Failure::new("base-unreachable", message).hint(hint)
}

fn unchanged(size: u64) -> Resized {
    Resized {
        before: size,
        now: size,
    }
}

fn impossible(disk: &ServedDisk, size: u64) -> Failure {
    let message = format!(
        "disk '{}' has {size} bytes, and cannot have as many as that",
        disk.name
    );
    Failure::new("bad-argument", message)
}

fn not_closed(disk: &ServedDisk, error: &std::io::Error) -> Failure {
    let message = format!(
        "disk '{}': not everything could be made durable: {error}",
        disk.name
    );
    Failure::new("not-durable", message)
}

/// With chunks of 64 KiB a disk of 16 TiB: marking what is new takes 8 bytes of the state's file
/// system for each of its chunks, and 4 of memory.
const CHUNKS_MAX: u64 = 1 << 28;
