//! What somebody else says has changed.
//!
//! A file tells what had changed on the disk when nobody here knew it yet. From then on the era map
//! knows; so both together are what has changed, and nothing of either is left out. As a dirty bitmap
//! that is bits of its own. As a checkpoint it is an era: all of it is marked in the one that begins
//! now, as if it had been written again, and so is in the changes since every other checkpoint too,
//! which is more than need be and never less. (An older era for the checkpoint would spare those what
//! was written here; but then backups that are open would take it for one from before their instant.)

use std::ops::Range;
use std::path::PathBuf;
use std::sync::Arc;

use bitmap::{BitGranularity, Bits, Era};
use uuid::Uuid;

use super::bitmaps::granularity_on;
use super::book::Checkpoint;
use super::{Action, Addition, Service, blocking, next_era, refuse_untrusted, still_known};
use crate::carry;
use crate::disk::Freeze;
use crate::failure::Failure;
use crate::names::Name;
use crate::served::ServedDisk;

/// What is to be taken in.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(crate) struct Import {
    /// What the file is about.
    pub(crate) disk: Name,
    /// The file.
    pub(crate) from: PathBuf,
    /// The bitmap in it that is meant, if it can have several; else that of the same name.
    pub(crate) bitmap: Option<String>,
    /// The checkpoint at which the disk was as the file tells; else it was so when its state was made.
    pub(crate) as_of: Option<String>,
}

/// What a bitmap is to be like that is made of it.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub(crate) struct ImportedBitmap {
    /// What it is to be called.
    pub(crate) name: String,
    /// In bytes; QEMU's default without.
    pub(crate) granularity: Option<u64>,
    /// Whether it goes with the server.
    pub(crate) transient: bool,
    /// Whether it is not to record.
    pub(crate) disabled: bool,
}

/// What was taken in.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) struct Imported {
    /// How much the file says is dirty, rounded outwards.
    pub(crate) told_bytes: u64,
    /// How much has changed with what changed here.
    pub(crate) dirty_bytes: u64,
}

impl Service {
    /// Makes a dirty bitmap of what a file tells.
    pub(crate) async fn import_bitmap(
        &self,
        import: &Import,
        wanted: ImportedBitmap,
    ) -> Result<Imported, Failure> {
        let ImportedBitmap {
            name,
            granularity,
            transient,
            disabled,
        } = wanted;
        let disk = self.disk(&import.disk)?;
        let node = disk.name.to_string();
        let granularity = granularity_on(&node, chunk_of(&disk), granularity)?;
        let bits = read(import, &name, &disk, granularity).await?;
        let told_bytes = bits.dirty_bytes();
        let addition = Addition {
            node: node.clone(),
            name: name.clone(),
            granularity: Some(granularity.bytes()),
            persistent: !transient,
            disabled,
        };
        let _alone = self.instants.lock().await;
        self.refuse_removed(&disk)?;
        let population = Action::Populate {
            node,
            name: name.clone(),
            bits: Arc::new(bits),
            since: self.known_since(import, &disk)?,
        };
        self.change_bitmaps_alone(vec![Action::Add(addition), population])
            .await?;
        let book = self.book();
        let made = book.bitmaps.find(disk.name.as_str(), &name);
        let dirty = made.and_then(|bitmap| bitmap.dirty(&disk).ok().cloned());
        drop(book);
        Ok(Imported {
            told_bytes,
            dirty_bytes: dirty.map_or(0, |dirty| dirty.dirty_bytes(disk.disk.map())),
        })
    }

    /// Makes a checkpoint of what a file tells: what has changed since it is that, and what changes
    /// from now on.
    ///
    /// A server that is killed leaves, before the record, chunks marked that somebody may take for
    /// changed; after it, the checkpoint with all that is to be marked.
    pub(crate) async fn import_checkpoint(
        &self,
        import: &Import,
        name: Name,
    ) -> Result<(Checkpoint, Imported), Failure> {
        let disk = self.disk(&import.disk)?;
        self.check_checkpoint_name(&name)?;
        let granularity = BitGranularity::new(chunk_of(&disk))
            .map_err(|error| Failure::new("internal", error.to_string()))?;
        let bits = read(import, name.as_str(), &disk, granularity).await?;
        let told_bytes = bits.dirty_bytes();

        let _alone = self.instants.lock().await;
        self.refuse_removed(&disk)?;
        self.check_checkpoint_name(&name)?;
        self.check_room(std::iter::once(&disk.name))?;
        refuse_untrusted(&disk)?;
        let since = self.known_since(import, &disk)?;
        let tracking = disk.disk.tracking();
        let era = next_era(&disk, &tracking)?;
        self.freeze(vec![Freeze {
            disk: Arc::clone(&disk.disk),
            next: tracking.followed_by(era, None),
        }])
        .await?;
        // After the instant: what was written before it is in the map by now, or went untracked.
        let changed = all_changed(&disk, bits, since).await?;
        still_known(&disk, since)?;
        disk.disk
            .mark_changed(changed)
            .await
            .map_err(|error| not_marked(&disk, &error))?;
        let checkpoint = Checkpoint {
            name,
            uuid: Uuid::new_v4(),
            created: (self.clock)(),
            eras: std::iter::once((disk.name.clone(), era)).collect(),
            pending_of: None,
            automatic: false,
        };
        self.record_checkpoint(&checkpoint).await?;
        self.book_mut().checkpoints.push(checkpoint.clone());
        let (dirty_bytes, _) = disk.dirty_bytes(era);
        let imported = Imported {
            told_bytes,
            dirty_bytes,
        };
        Ok((checkpoint, imported))
    }

    /// Reading takes its time, and the disk may have been removed meanwhile, also added again.
    fn refuse_removed(&self, disk: &Arc<ServedDisk>) -> Result<(), Failure> {
        if Arc::ptr_eq(disk, &self.disk(&disk.name)?) {
            return Ok(());
        }
        let message = format!("disk '{}' was removed meanwhile", disk.name);
        Err(Failure::new("unknown-disk", message).hint("try again"))
    }

    /// The era from which on the map knows what the file cannot.
    fn known_since(&self, import: &Import, disk: &ServedDisk) -> Result<Era, Failure> {
        let era = match &import.as_of {
            None => WRITTEN_FIRST,
            Some(checkpoint) => self.checkpoint_on(checkpoint, disk)?.0,
        };
        still_known(disk, era)?;
        Ok(era)
    }

    /// The era of a checkpoint that `disk` has, whether or not it is of use, and its identity.
    pub(super) fn checkpoint_on(
        &self,
        checkpoint: &str,
        disk: &ServedDisk,
    ) -> Result<(Era, Uuid), Failure> {
        let book = self.book();
        let mut visible = book.checkpoints.iter().filter(|c| c.pending_of.is_none());
        let found = visible
            .find(|c| c.name.as_str() == checkpoint || c.uuid.to_string() == checkpoint)
            .and_then(|c| Some((*c.eras.get(&disk.name)?, c.uuid)));
        found.ok_or_else(|| {
            let message = format!("disk '{}' has no checkpoint '{checkpoint}'", disk.name);
            Failure::new("unknown-checkpoint", message).hint("see: stillpoint checkpoint list")
        })
    }
}

async fn read(
    import: &Import,
    name: &str,
    disk: &ServedDisk,
    granularity: BitGranularity,
) -> Result<Bits, Failure> {
    let wanted = carry::Wanted {
        from: import.from.clone(),
        bitmap: import.bitmap.clone().unwrap_or_else(|| name.to_owned()),
        size: disk.disk.size(),
        granularity,
    };
    blocking(move || carry::read(&wanted)).await?
}

/// All that the file tells, and all that changed in `since` or later: ranges in order.
async fn all_changed(
    disk: &ServedDisk,
    mut bits: Bits,
    since: Era,
) -> Result<Vec<Range<u64>>, Failure> {
    let map = Arc::clone(disk.disk.map());
    blocking(move || {
        let size = map.size();
        let changed = map.changes(0..size, since).filter(|run| run.dirty);
        changed.for_each(|run| bits.set(&run.range));
        let dirty = bits.dirty(0..size);
        dirty
            .map(|range| range.start..range.end.min(size))
            .collect()
    })
    .await
}

fn chunk_of(disk: &ServedDisk) -> u64 {
    disk.disk.map().granularity().bytes()
}

fn not_marked(disk: &ServedDisk, error: &std::io::Error) -> Failure {
    let message = format!(
        "disk '{}': what has changed cannot be recorded: {error}",
        disk.name
    );
    let hint = "there is no such checkpoint now: see to the storage and try again";
    Failure::new("state", message).hint(hint)
}

/// What is older was there when the disk's state was made.
const WRITTEN_FIRST: Era = Era::from_number(Era::FIRST.number() + 1);
