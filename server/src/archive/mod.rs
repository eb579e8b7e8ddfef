//! A folder that holds backups: points in time of disks, each a qcow2 file and what is known of it.
//!
//! A point is made aside as a [`Draft`], and published by one rename when all of it is there, synced
//! and read back. What is published never changes. [`Archive`] is the folder; `docs/backup-folder.md`
//! says what lies in it, and how to read it without this program.
//!
//! Everything here blocks. Whoever is async runs it on a blocking thread.

mod entries;
mod folder;

mod ahead;
mod begin;
mod draft;
mod map;
mod plan;
mod publish;
mod read_back;
mod records;

mod manifest;
mod sealed;

mod chain;
mod damage;
mod find;
mod output;
mod prune;
mod restore;
mod verify;

mod inspect;
mod progress;

mod bounded;
mod chunk;
mod digest;
mod error;
mod runs;
mod zeroes;

#[cfg(feature = "fuzzing")]
pub(crate) mod fuzzing;

pub use begin::{Interrupted, Leftover};
pub use chunk::Chunk;
pub use damage::{Damage, Watch};
pub use digest::Digest;
pub use draft::{DiskDraft, Draft, Piece};
pub use error::ArchiveError;
pub use folder::Archive;
pub use manifest::{DiskEntry, Parent, Point};
pub use output::{Existing, Format, Owner};
pub use plan::{DiskPlan, Identity, Mode, Origin, Plan, Since};
pub use progress::Progress;
pub use prune::{Fate, Keep, fates};
pub use restore::{OnDamage, Restoration, Restored, read_through, restore};
pub use verify::{Scope, Verified, verify};
