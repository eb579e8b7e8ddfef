//! What bitmaps are to become, worked out before anything is done.
//!
//! All the rules are here, and nothing else is: what a command may do, in which order it finds out
//! that it may not, and in whose words. Actions see what those before them did, and a draft that is
//! dropped has changed nothing.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use bitmap::{BitGranularity, Bits, DirtySet, Era};
use uuid::Uuid;

use super::{Bitmap, in_use, inconsistent, not_found, read_only};
use crate::failure::Failure;
use crate::names::Name;

/// One thing to do to a bitmap of a disk, which QEMU calls a node.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(crate) enum Action {
    /// There is to be a new one.
    Add(Addition),
    /// It is to be forgotten.
    Remove {
        /// Of this disk.
        node: String,
        /// Which.
        name: String,
    },
    /// Nothing is dirty any more.
    Clear {
        /// On this disk.
        node: String,
        /// Which.
        name: String,
    },
    /// It records from now on.
    Enable {
        /// On this disk.
        node: String,
        /// Which.
        name: String,
    },
    /// It records no more.
    Disable {
        /// On this disk.
        node: String,
        /// Which.
        name: String,
    },
    /// What is dirty in others is dirty in it.
    Merge {
        /// On this disk.
        node: String,
        /// Into which.
        target: String,
        /// The others.
        sources: Vec<Source>,
    },
    /// What is dirty elsewhere is dirty in it.
    Populate {
        /// On this disk.
        node: String,
        /// Which.
        name: String,
        /// What is dirty.
        bits: Arc<Bits>,
        /// So is what has changed since this era.
        since: Era,
    },
    /// The transaction is to fail.
    Abort,
}

/// A bitmap to be.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub(crate) struct Addition {
    /// Of this disk.
    pub(crate) node: String,
    /// What it is to be called.
    pub(crate) name: String,
    /// In bytes; QEMU's default without.
    pub(crate) granularity: Option<u64>,
    /// Whether it is to outlive the server.
    pub(crate) persistent: bool,
    /// Whether it is not to record.
    pub(crate) disabled: bool,
}

/// A bitmap to merge from.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(crate) struct Source {
    /// Of this disk, else of the target's.
    pub(crate) node: Option<String>,
    /// Which.
    pub(crate) name: String,
}

/// Disks and their bitmaps, as they would be.
pub(super) struct Draft(BTreeMap<Name, DiskDraft>);

/// One disk, as it would be.
pub(super) struct DiskDraft {
    /// In bytes.
    pub(super) size: u64,
    /// The chunk size of its era map.
    pub(super) granularity: u64,
    /// Its bitmaps, oldest first.
    pub(super) bitmaps: Vec<BitmapDraft>,
    /// Something began or ended to record here, at an instant.
    pub(super) needs_instant: bool,
}

/// One bitmap, as it would be.
pub(super) struct BitmapDraft {
    /// As it is; of a new one, as it would be with nothing dirty.
    pub(super) bitmap: Bitmap,
    /// What would be dirty, besides what it records.
    pub(super) parts: Vec<Part>,
    /// Since when it would record.
    pub(super) recording: Recording,
    /// It has not been there before.
    pub(super) is_new: bool,
    /// What would happen to it.
    pub(super) fate: Fate,
    trouble: Option<Trouble>,
}

/// What would happen to a bitmap.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Fate {
    /// Nothing.
    Stays,
    /// It would not be as it is.
    Changes,
    /// It would be forgotten; its name is taken until then.
    Leaves,
}

/// Why a bitmap can be used by nobody now.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Trouble {
    /// A backup serves it.
    Busy,
    /// What was dirty is lost.
    Inconsistent,
}

/// Something that is dirty.
#[derive(Clone, Debug)]
pub(super) enum Part {
    /// Bits.
    Bits(Arc<Bits>),
    /// What has changed on a disk since an era, in blocks of this size.
    Changed(Name, Era, BitGranularity),
}

/// Since when a bitmap records.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Recording {
    /// Not at all.
    Off,
    /// Since this era.
    Since(Era),
    /// From the instant on.
    FromNow,
}

impl DiskDraft {
    /// A disk as it is, with its bitmaps, each with whether it is of any use.
    pub(super) fn new<'a>(
        size: u64,
        granularity: u64,
        bitmaps: impl Iterator<Item = (&'a Bitmap, bool)>,
        busy: &BTreeSet<Uuid>,
    ) -> Self {
        let bitmaps = bitmaps.map(|(bitmap, is_good)| {
            let trouble = match (busy.contains(&bitmap.uuid), is_good) {
                (true, _) => Some(Trouble::Busy),
                (false, false) => Some(Trouble::Inconsistent),
                (false, true) => None,
            };
            BitmapDraft::of(bitmap.clone(), trouble)
        });
        Self {
            size,
            granularity,
            bitmaps: bitmaps.collect(),
            needs_instant: false,
        }
    }

    fn find(&self, name: &str) -> Result<usize, Failure> {
        let found = self.bitmaps.iter().position(|b| b.bitmap.name == name);
        found.ok_or_else(|| not_found(name))
    }
}

impl BitmapDraft {
    fn of(bitmap: Bitmap, trouble: Option<Trouble>) -> Self {
        let (parts, recording) = match &bitmap.dirty {
            Ok(DirtySet { bits, since }) => (
                vec![Part::Bits(Arc::clone(bits))],
                since.map_or(Recording::Off, Recording::Since),
            ),
            Err(_) => (Vec::new(), Recording::Off),
        };
        Self {
            bitmap,
            parts,
            recording,
            is_new: false,
            fate: Fate::Stays,
            trouble,
        }
    }

    /// Refuses what is of no use to any command but a removal.
    fn check(&self) -> Result<(), Failure> {
        self.check_free()?;
        if self.trouble == Some(Trouble::Inconsistent) {
            return Err(inconsistent(&self.bitmap.name));
        }
        Ok(())
    }

    fn check_free(&self) -> Result<(), Failure> {
        // One that this very transaction removes is in use by that.
        if self.trouble == Some(Trouble::Busy) || self.fate == Fate::Leaves {
            return Err(in_use(&self.bitmap.name));
        }
        Ok(())
    }

    /// Refuses what is in an image.
    fn check_own(&self) -> Result<(), Failure> {
        match self.bitmap.in_image {
            Some(_) => Err(read_only(&self.bitmap.name)),
            None => Ok(()),
        }
    }

    /// What is dirty in it, as parts that hold for any other.
    fn all_parts(&self, disk: &Name) -> Vec<Part> {
        let mut parts = self.parts.clone();
        if let Recording::Since(era) = self.recording {
            let granularity = self.bitmap.granularity;
            parts.push(Part::Changed(disk.clone(), era, granularity));
        }
        parts
    }
}

impl Draft {
    /// Everything as it is.
    pub(super) fn new(disks: BTreeMap<Name, DiskDraft>) -> Self {
        Self(disks)
    }

    /// The disks, each with what is to become of it.
    pub(super) fn into_disks(self) -> BTreeMap<Name, DiskDraft> {
        self.0
    }

    /// Does it in the draft, or says why it cannot be done.
    pub(super) fn perform(&mut self, action: Action) -> Result<(), Failure> {
        match action {
            Action::Add(addition) => self.add(addition),
            Action::Remove { node, name } => {
                let (_, disk) = self.disk(&node)?;
                let at = disk.find(&name)?;
                disk.bitmaps[at].check_free()?;
                disk.bitmaps[at].check_own()?;
                disk.bitmaps[at].fate = Fate::Leaves;
                Ok(())
            }
            Action::Clear { node, name } => {
                let (_, bitmap) = self.bitmap(&node, &name)?;
                bitmap.parts.clear();
                if bitmap.recording != Recording::Off {
                    bitmap.recording = Recording::FromNow;
                }
                Ok(())
            }
            Action::Enable { node, name } => {
                let (_, bitmap) = self.bitmap(&node, &name)?;
                if bitmap.recording == Recording::Off {
                    bitmap.recording = Recording::FromNow;
                }
                Ok(())
            }
            Action::Disable { node, name } => {
                let (disk, bitmap) = self.bitmap(&node, &name)?;
                bitmap.parts = bitmap.all_parts(&disk);
                bitmap.recording = Recording::Off;
                Ok(())
            }
            Action::Merge {
                node,
                target,
                sources,
            } => self.merge(&node, &target, &sources),
            Action::Populate {
                node,
                name,
                bits,
                since,
            } => {
                let (disk, bitmap) = self.bitmap(&node, &name)?;
                bitmap.parts.push(Part::Bits(bits));
                match bitmap.recording {
                    Recording::Off => {
                        let granularity = bitmap.bitmap.granularity;
                        bitmap.parts.push(Part::Changed(disk, since, granularity));
                    }
                    // As if it had recorded all the time; so it is lost with what it might miss.
                    Recording::FromNow => bitmap.recording = Recording::Since(since),
                    Recording::Since(era) => bitmap.recording = Recording::Since(era.min(since)),
                }
                Ok(())
            }
            Action::Abort => Err(Failure::new(
                "aborted",
                "Transaction aborted using Abort action",
            )),
        }
    }

    fn add(&mut self, addition: Addition) -> Result<(), Failure> {
        let Addition {
            node,
            name,
            granularity,
            persistent,
            disabled,
        } = addition;
        if name.is_empty() {
            return Err(bad("Bitmap name cannot be empty"));
        }
        let (_, disk) = self.disk(&node).map_err(|_| {
            let message = format!("Cannot find device='{node}' nor node-name='{node}'");
            Failure::new("unknown-disk", message)
        })?;
        let granularity = granularity_on(&node, disk.granularity, granularity)?;
        if disk.find(&name).is_ok() {
            return Err(Failure::new(
                "bitmap-exists",
                format!("Bitmap already exists: {name}"),
            ));
        }
        let because = |why: &str| {
            bad(format!(
                "Can't make bitmap '{name}' persistent in '{node}': {why}"
            ))
        };
        if name.len() > NAME_MAX {
            return Err(if persistent {
                because("Name length exceeds maximum (1023 characters)")
            } else {
                bad(format!("Bitmap name too long: {name}"))
            });
        }
        if name.contains('\0') {
            return Err(bad("Bitmap name cannot contain NUL"));
        }
        if disk.bitmaps.len() >= BITMAPS_MAX {
            let hint = format!("a disk has at most {BITMAPS_MAX}: remove one that nobody needs");
            let full = if persistent {
                because("Maximum number of persistent bitmaps is already reached")
            } else {
                bad(format!(
                    "Maximum number of bitmaps of '{node}' is already reached"
                ))
            };
            return Err(full.hint(hint));
        }
        let bitmap = Bitmap {
            name,
            uuid: Uuid::new_v4(),
            granularity,
            persistent,
            revision: 0,
            era: Era::NEVER,
            dirty: Ok(DirtySet {
                bits: Arc::new(Bits::new(granularity)),
                since: None,
            }),
            in_image: None,
        };
        let mut draft = BitmapDraft::of(bitmap, None);
        draft.parts.clear();
        (draft.is_new, draft.fate) = (true, Fate::Changes);
        if !disabled {
            draft.recording = Recording::FromNow;
        }
        disk.needs_instant = true;
        disk.bitmaps.push(draft);
        Ok(())
    }

    fn merge(&mut self, node: &str, target: &str, sources: &[Source]) -> Result<(), Failure> {
        let (disk_name, disk) = self.disk(node)?;
        let (size, at) = (disk.size, disk.find(target)?);
        let target_found = &disk.bitmaps[at];
        let is_target_good = target_found.check_own().and_then(|()| target_found.check());
        let mut parts = Vec::new();
        for source in sources {
            let (name, disk) = match &source.node {
                Some(node) => self.disk(node)?,
                None => self.disk(node)?,
            };
            let found = &disk.bitmaps[disk.find(&source.name)?];
            // In QEMU's order: that a source is there, that the target is good, that the source is.
            is_target_good.clone()?;
            found.check()?;
            if disk.size != size {
                return Err(bad(format!(
                    "Bitmaps are of different sizes (destination size is {size}, source size is \
                     {}) and can't be merged",
                    disk.size
                )));
            }
            parts.extend(found.all_parts(&name));
        }
        let disk = self
            .0
            .get_mut(&disk_name)
            .expect("it was there a moment ago");
        let target = &mut disk.bitmaps[at];
        if !parts.is_empty() {
            target.parts.extend(parts);
            target.fate = Fate::Changes;
        }
        Ok(())
    }

    fn disk(&mut self, node: &str) -> Result<(Name, &mut DiskDraft), Failure> {
        let name = self.0.get_key_value(node).map(|(name, _)| name.clone());
        let unknown = || Failure::new("unknown-disk", format!("Node '{node}' not found"));
        let name = name.ok_or_else(unknown)?;
        let disk = self.0.get_mut(&name).ok_or_else(unknown)?;
        Ok((name, disk))
    }

    /// One that is about to be changed, at an instant.
    fn bitmap(&mut self, node: &str, name: &str) -> Result<(Name, &mut BitmapDraft), Failure> {
        let (disk_name, disk) = self.disk(node)?;
        let at = disk.find(name)?;
        disk.bitmaps[at].check_own()?;
        disk.bitmaps[at].check()?;
        disk.needs_instant = true;
        let bitmap = &mut disk.bitmaps[at];
        bitmap.fate = Fate::Changes;
        Ok((disk_name, bitmap))
    }
}

/// How coarse a bitmap of a disk is whose chunks have `chunk` bytes, if it is `wanted` so.
pub(in crate::service) fn granularity_on(
    node: &str,
    chunk: u64,
    wanted: Option<u64>,
) -> Result<BitGranularity, Failure> {
    let granularity = BitGranularity::new(wanted.unwrap_or(GRANULARITY.max(chunk)))
        .map_err(|_| bad("Granularity must be power of 2 and at least 512"))?;
    if granularity.bytes() < chunk {
        let message = format!(
            "Granularity must be at least {chunk}: more finely disk '{node}' is not tracked"
        );
        let hint = "a disk's own granularity is chosen when its state is made: \
                    serve --disk NAME=PATH,granularity=SIZE";
        return Err(Failure::new("bitmap-too-fine", message).hint(hint));
    }
    Ok(granularity)
}

fn bad(message: impl Into<String>) -> Failure {
    Failure::new("bad-argument", message)
}

/// QEMU's default, and that of a disk.
const GRANULARITY: u64 = 64 << 10;

/// In bytes; QEMU's, so that a name fits wherever it goes there.
const NAME_MAX: usize = 1023;

/// QEMU has no limit in memory and 65,535 in an image. Each of ours is a file when it persists, and
/// in every list; a thousand are more than anyone keeps apart.
const BITMAPS_MAX: usize = 1024;

#[cfg(test)]
mod tests;
