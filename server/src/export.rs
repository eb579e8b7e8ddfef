//! What NBD clients can open, and what each of them may do there.

use std::io;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use bitmap::{DirtySet, Era, Run};
use block::Extent;
use block::qcow2::Depth;
use proto::{DIRTY, STATE_HOLE, STATE_ZERO};
use scratch::FrozenError;
use thiserror::Error;
use tokio::sync::Semaphore;

use crate::clients::Clients;
use crate::served::ServedDisk;
use crate::service::{Base, Book, FrozenDisk, Service, Usage};

/// Something that an NBD client has open.
#[derive(Clone)]
pub(crate) enum Export {
    /// A disk as it is, read-write.
    Live(Arc<ServedDisk>),
    /// A disk as it was.
    Frozen(Arc<FrozenDisk>),
    /// A disk as it was, seen as a difference from what has this name.
    Difference(Arc<FrozenDisk>, String, Since, Arc<Usage>),
}

/// What a disk can be seen as a difference from.
#[derive(Clone, Debug)]
pub(crate) enum Since {
    /// The checkpoint at which this era began.
    Era(Era),
    /// The instant since which a dirty bitmap in the image knows what changed.
    Bitmap(DirtySet),
}

/// A way of describing a disk, stretch by stretch.
#[derive(Clone, Debug)]
pub(crate) enum Context {
    /// `base:allocation`.
    Allocation,
    /// `qemu:allocation-depth`.
    Depth,
    /// What had changed in this era or later, as a dirty bitmap.
    Dirty(Era),
    /// A dirty bitmap.
    Bitmap(DirtySet),
}

/// A stretch of a disk, and what a context says of it.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) struct Status {
    /// In bytes.
    pub(crate) length: u64,
    /// As the context's specification defines them.
    pub(crate) flags: u32,
}

/// Why a request failed.
#[derive(Debug, Error)]
pub(crate) enum ExportError {
    /// The backup has been committed or aborted.
    #[error("the backup has ended")]
    Ended,
    /// Something of the instant is lost.
    #[error("the backup is broken: {0}")]
    Broken(String),
    /// Storage failed.
    #[error(transparent)]
    Io(#[from] io::Error),
    /// It was long, and nobody waits for it any more; some of it has been done.
    #[error("given up half done, as the client has gone or the server stops")]
    GivenUp,
}

impl From<FrozenError> for ExportError {
    fn from(error: FrozenError) -> Self {
        match error {
            FrozenError::Broken(reason) => Self::Broken(reason),
            FrozenError::Ended => Self::Ended,
            FrozenError::Io(error) => Self::Io(error),
        }
    }
}

/// Which exports a socket offers.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Role {
    /// Live exports only.
    Live,
    /// Frozen exports only.
    Backup,
}

/// Finds the export that `role` offers under `name`.
pub(crate) fn find(service: &Service, role: Role, name: &str) -> Option<Export> {
    match role {
        Role::Live => {
            let disk = match name {
                "" => only(service)?,
                _ => service.disks().get(name).cloned()?,
            };
            Some(Export::Live(disk))
        }
        Role::Backup => find_frozen(service, name),
    }
}

fn find_frozen(service: &Service, name: &str) -> Option<Export> {
    let book = service.book();
    let Some((disk, instant)) = name.split_once('@') else {
        let only = match name {
            "" => Some(only(service)?),
            _ => None,
        };
        let disk = only.as_ref().map_or(name, |disk| disk.name.as_str());
        let parts = book
            .backups
            .iter()
            .filter_map(|backup| backup.disks.get(disk));
        return parts
            .filter(|part| part.has_disk_name)
            .cloned()
            .map(Export::Frozen)
            .next();
    };
    // Names of bitmaps may have dots in them, and those of backups do not.
    let Some((since, id)) = instant.rsplit_once("..") else {
        let part = book.backup(instant)?.disks.get(disk)?;
        return Some(Export::Frozen(Arc::clone(part)));
    };
    let part = book.backup(id)?.disks.get(disk)?;
    let mut checkpoints = difference_bases(&book, part).into_iter();
    let known = match checkpoints.find(|(name, _)| name == since) {
        Some((_, era)) => Since::Era(era),
        None => Since::Bitmap(stored_bitmap(&book, part, since)?),
    };
    let usage = part.differences.usage_of(since);
    Some(Export::Difference(
        Arc::clone(part),
        since.to_owned(),
        known,
        usage,
    ))
}

/// The dirty bitmaps in the image of a frozen disk, which are served with every backup: those that can
/// be believed, and whose name a client cannot take for something else.
fn stored_bitmaps<'a>(
    book: &'a Book,
    part: &'a FrozenDisk,
) -> impl Iterator<Item = (&'a str, DirtySet)> {
    let bitmaps = part.disk.stored.iter();
    bitmaps.filter_map(|stored| {
        let bits = Arc::clone(stored.bits.as_ref().ok()?);
        let name = stored.name.as_str();
        let is_taken = part.bitmaps.iter().any(|bitmap| bitmap.name == name)
            || book.checkpoint(name).is_some()
            || default_bitmap(part, name).is_some();
        (!is_taken).then_some((name, DirtySet { bits, since: None }))
    })
}

fn stored_bitmap(book: &Book, part: &FrozenDisk, name: &str) -> Option<DirtySet> {
    let mut bitmaps = stored_bitmaps(book, part);
    bitmaps
        .find(|(found, _)| *found == name)
        .map(|(_, set)| set)
}

/// The checkpoints for which a frozen disk can be seen as a difference.
fn difference_bases(book: &Book, part: &FrozenDisk) -> Vec<(String, Era)> {
    match &part.base {
        Base::Checkpoint { name, era, .. } => vec![(name.to_string(), *era)],
        Base::None => book
            .bases(part)
            .map(|(name, era)| (name.to_string(), era))
            .collect(),
        Base::Unusable(_) => Vec::new(),
    }
}

fn only(service: &Service) -> Option<Arc<ServedDisk>> {
    let served = service.disks();
    let mut disks = served.values();
    disks.next().filter(|_| disks.next().is_none()).cloned()
}

/// The names that `role` lists, each with what it is.
pub(crate) fn list(service: &Service, role: Role) -> Vec<(String, String)> {
    if role == Role::Live {
        let live = |disk: &Arc<ServedDisk>| {
            let description = Export::Live(Arc::clone(disk)).description();
            (disk.name.to_string(), description)
        };
        return service.disks().values().map(live).collect();
    }
    let book = service.book();
    let mut listed = Vec::new();
    for part in book.backups.iter().flat_map(|backup| backup.disks.values()) {
        let description = Export::Frozen(Arc::clone(part)).description();
        if part.has_disk_name {
            listed.push((part.disk.name.to_string(), description.clone()));
        }
        listed.push((frozen_name(part), description));
    }
    listed
}

/// The name of a frozen disk's export.
pub(crate) fn frozen_name(part: &FrozenDisk) -> String {
    format!("{}@{}", part.disk.name, part.backup)
}

/// The name of a frozen disk's export as a difference from `checkpoint`.
pub(crate) fn difference_name(part: &FrozenDisk, checkpoint: &str) -> String {
    format!("{}@{checkpoint}..{}", part.disk.name, part.backup)
}

impl Export {
    /// The size in bytes.
    pub(crate) fn size(&self) -> u64 {
        match self {
            Self::Live(disk) => disk.disk.size(),
            Self::Frozen(part) | Self::Difference(part, ..) => part.frozen.size(),
        }
    }

    /// The name that it is listed by, if it was found by `name`: the empty one is in no list.
    pub(crate) fn name_for<'a>(&'a self, name: &'a str) -> &'a str {
        match self {
            _ if !name.is_empty() => name,
            Self::Live(disk) => disk.name.as_str(),
            Self::Frozen(part) | Self::Difference(part, ..) => part.disk.name.as_str(),
        }
    }

    /// Whether nobody may write it.
    pub(crate) fn read_only(&self) -> bool {
        match self {
            Self::Live(disk) => disk.read_only,
            Self::Frozen(_) | Self::Difference(..) => true,
        }
    }

    /// What it is, for people.
    pub(crate) fn description(&self) -> String {
        match self {
            Self::Live(disk) => format!("disk '{}' as it is", disk.name),
            Self::Frozen(part) => {
                format!("disk '{}' as frozen by '{}'", part.disk.name, part.backup)
            }
            Self::Difference(_, checkpoint, ..) => {
                format!("difference since {checkpoint}: needs its base")
            }
        }
    }

    /// The contexts that it lists.
    pub(crate) fn contexts(&self, service: &Service) -> Vec<String> {
        let mut names = vec![ALLOCATION.to_owned(), DEPTH.to_owned()];
        let dirty = |name: &str| format!("{BITMAP}{name}");
        match self {
            Self::Live(_) => {}
            Self::Frozen(part) => {
                match &part.base {
                    Base::Checkpoint { name, .. } => names.push(dirty(name.as_str())),
                    Base::None => {
                        let book = service.book();
                        let all: Vec<_> = book.bases(part).map(|(name, _)| name.clone()).collect();
                        let newest = all.iter().rev().take(LISTED_BITMAPS_MAX);
                        names.extend(newest.map(|name| dirty(name.as_str())));
                    }
                    Base::Unusable(_) => {}
                }
                names.extend(part.bitmaps.iter().map(|bitmap| dirty(&bitmap.name)));
                let book = service.book();
                names.extend(stored_bitmaps(&book, part).map(|(name, _)| dirty(name)));
            }
            Self::Difference(_, checkpoint, ..) => names.push(dirty(checkpoint.as_str())),
        }
        names
    }

    /// The context of this name, listed or not.
    pub(crate) fn context(&self, service: &Service, name: &str) -> Option<Context> {
        match name {
            ALLOCATION => return Some(Context::Allocation),
            DEPTH => return Some(Context::Depth),
            _ => {}
        }
        let bitmap = name.strip_prefix(BITMAP)?;
        match self {
            Self::Live(_) => None,
            Self::Frozen(part) => {
                let asked_for = part.bitmaps.iter().find(|found| found.name == bitmap);
                if let Some(asked_for) = asked_for {
                    return Some(Context::Bitmap(asked_for.dirty.clone()));
                }
                let book = service.book();
                let exact = book.bases(part).find(|(name, _)| name.as_str() == bitmap);
                let era = exact.map(|(_, era)| era);
                match era.or_else(|| default_bitmap(part, bitmap)) {
                    Some(era) => Some(Context::Dirty(era)),
                    None => stored_bitmap(&book, part, bitmap).map(Context::Bitmap),
                }
            }
            Self::Difference(part, name, since, _) => match since {
                _ if name != bitmap => default_bitmap(part, bitmap).map(Context::Dirty),
                Since::Era(era) => Some(Context::Dirty(*era)),
                Since::Bitmap(set) => Some(Context::Bitmap(set.clone())),
            },
        }
    }

    /// Fills `buffer` with what is at `offset`, for a client.
    pub(crate) async fn read(&self, offset: u64, buffer: &mut [u8]) -> Result<(), ExportError> {
        self.prefetch(offset, buffer).await?;
        if let Some(usage) = self.usage() {
            usage
                .bytes_read
                .fetch_add(buffer.len() as u64, Ordering::Relaxed);
        }
        Ok(())
    }

    /// Fills `buffer` with what is at `offset`, and counts it for nobody.
    pub(crate) async fn prefetch(&self, offset: u64, buffer: &mut [u8]) -> Result<(), ExportError> {
        self.still_open()?;
        match self {
            Self::Live(disk) => disk.disk.read(offset, buffer).await?,
            Self::Frozen(part) | Self::Difference(part, ..) => {
                part.frozen.read(offset, buffer).await?;
            }
        }
        self.still_open()
    }

    /// What `context` says of `range`, from its start on: at most `limit` stretches, which is not zero.
    pub(crate) async fn status(
        &self,
        context: &Context,
        range: Range<u64>,
        limit: usize,
    ) -> Result<Vec<Status>, ExportError> {
        self.still_open()?;
        let length = range.end - range.start;
        let found = match (context, self) {
            (Context::Depth, _) => {
                let depths = self.disk().disk.image().depths(range, limit).await?;
                depths.iter().map(depth_of).collect()
            }
            (Context::Allocation, Self::Difference(part, _, since, _)) => {
                difference(part, range, since, limit).await?
            }
            (Context::Allocation, Self::Live(disk)) => {
                let extents = disk.disk.extents(range).await?;
                first(extents.iter().map(allocation_of), limit)
            }
            (Context::Allocation, Self::Frozen(part)) => {
                let extents = part.frozen.extents(range, limit).await?;
                extents.iter().map(allocation_of).collect()
            }
            (Context::Dirty(since), Self::Frozen(part) | Self::Difference(part, ..)) => {
                let runs = part.frozen.changes(range, *since, limit)?;
                runs.iter().map(dirty_of).collect()
            }
            (Context::Bitmap(set), Self::Frozen(part) | Self::Difference(part, ..)) => {
                let runs = part.frozen.dirty(range, set, limit)?;
                runs.iter().map(dirty_of).collect()
            }
            // A live disk has no bitmaps to ask for.
            (Context::Dirty(_) | Context::Bitmap(_), Self::Live(_)) => vec![Status {
                length,
                flags: DIRTY,
            }],
        };
        self.still_open()?;
        Ok(found)
    }

    /// Waits until nothing more can be read here, and says why; for ever, if that never happens.
    pub(crate) async fn withdrawn(&self) -> ExportError {
        match self {
            Self::Live(_) => std::future::pending().await,
            Self::Frozen(part) | Self::Difference(part, ..) => tokio::select! {
                biased;
                () = part.ends() => ExportError::Ended,
                why = part.frozen.snapshot().breaks() => ExportError::Broken(why.to_owned()),
            },
        }
    }

    /// What a backup keeps, it keeps until it ends; what is read later is worth nothing.
    fn still_open(&self) -> Result<(), ExportError> {
        match self {
            Self::Frozen(part) | Self::Difference(part, ..) if part.has_ended() => {
                Err(ExportError::Ended)
            }
            _ => Ok(()),
        }
    }

    fn disk(&self) -> &ServedDisk {
        match self {
            Self::Live(disk) => disk,
            Self::Frozen(part) | Self::Difference(part, ..) => &part.disk,
        }
    }

    /// Whoever performs requests here has a seat among these.
    pub(crate) fn clients(&self) -> &Arc<Clients> {
        &self.disk().clients
    }

    /// Whoever has its permit is the one of its role that asks contexts of this disk.
    pub(crate) fn lookups(&self) -> &Semaphore {
        match self {
            Self::Live(disk) => &disk.lookups.live,
            Self::Frozen(part) | Self::Difference(part, ..) => &part.disk.lookups.backup,
        }
    }

    /// Whoever has its permit asks once.
    pub(crate) fn lookup_turn(&self) -> &Semaphore {
        &self.disk().lookups.turn
    }

    /// What clients do here is counted here.
    pub(crate) fn usage(&self) -> Option<&Usage> {
        match self {
            Self::Live(_) => None,
            Self::Frozen(part) => Some(&part.whole),
            Self::Difference(.., usage) => Some(usage),
        }
    }
}

/// What is clean is a hole that a reader has to fill from its base; what is dirty is as it is.
async fn difference(
    part: &FrozenDisk,
    range: Range<u64>,
    since: &Since,
    limit: usize,
) -> Result<Vec<Status>, ExportError> {
    let mut found: Vec<Status> = Vec::new();
    let runs = match since {
        Since::Era(era) => part.frozen.changes(range, *era, limit)?,
        Since::Bitmap(set) => part.frozen.dirty(range, set, limit)?,
    };
    for run in runs {
        if !run.dirty {
            push(&mut found, run.range.end - run.range.start, STATE_HOLE);
        }
        let mut at = if run.dirty {
            run.range.start
        } else {
            run.range.end
        };
        while at < run.range.end {
            if found.len() >= limit {
                return Ok(found);
            }
            for extent in part.frozen.extents(at..run.range.end, limit).await? {
                at = extent.range.end;
                let Status { length, flags } = allocation_of(&extent);
                push(&mut found, length, flags);
            }
        }
    }
    Ok(found)
}

fn default_bitmap(part: &FrozenDisk, bitmap: &str) -> Option<Era> {
    // The name that libvirt gives the bitmap of a disk when nobody chose one.
    match &part.base {
        Base::Checkpoint { era, .. } => {
            (bitmap.strip_prefix("backup-")? == part.disk.name.as_str()).then_some(*era)
        }
        Base::None | Base::Unusable(_) => None,
    }
}

fn allocation_of(extent: &Extent) -> Status {
    let flags = if extent.hole {
        STATE_HOLE | STATE_ZERO
    } else {
        0
    };
    Status {
        length: extent.range.end - extent.range.start,
        flags,
    }
}

fn depth_of(stretch: &Depth) -> Status {
    Status {
        length: stretch.range.end - stretch.range.start,
        flags: stretch.depth,
    }
}

fn dirty_of(run: &Run) -> Status {
    let flags = if run.dirty { DIRTY } else { 0 };
    Status {
        length: run.range.end - run.range.start,
        flags,
    }
}

/// The first `limit` stretches, of which those that say the same are one.
fn first(told: impl Iterator<Item = Status>, limit: usize) -> Vec<Status> {
    let mut found = Vec::new();
    for Status { length, flags } in told {
        push(&mut found, length, flags);
        if found.len() > limit {
            found.pop();
            break;
        }
    }
    found
}

fn push(found: &mut Vec<Status>, length: u64, flags: u32) {
    match found.last_mut() {
        Some(last) if last.flags == flags => last.length += length,
        _ => found.push(Status { length, flags }),
    }
}

const ALLOCATION: &str = "base:allocation";
const DEPTH: &str = "qemu:allocation-depth";
const BITMAP: &str = "qemu:dirty-bitmap:";

/// How many bitmaps a client is told of when none was asked for at begin; all can be asked for.
const LISTED_BITMAPS_MAX: usize = 16;
