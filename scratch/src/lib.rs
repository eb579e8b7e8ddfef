//! A disk as it was at one moment, while the guest goes on writing to it.
//!
//! [`preserve`] keeps old bytes alive: before the guest changes a granule, its contents are copied
//! to the scratch of each [`Snapshot`] that lacks it. [`Frozen`] reads the past: from scratch where
//! the guest has written since, from the disk everywhere else.

mod ahead;
mod allocation;
mod allowance;
mod claims;
mod code;
mod frozen;
mod granules;
mod head;
mod preserve;
mod preserved;
mod quota;
mod room;
mod snapshot;
mod sync;
mod terms;
mod world;

pub use allowance::{Allowance, Budget, Use, WATERMARKS};
pub use claims::Claims;
pub use frozen::{Frozen, FrozenError};
pub use granules::GRANULE;
pub use preserve::preserve;
pub use preserved::Kept;
pub use quota::Quota;
pub use room::{FreeSpace, Room};
pub use snapshot::{Snapshot, SnapshotFiles};
pub use terms::{OnError, Terms};
pub use world::{Durable, Pace, Step, Unpaced, World};
