//! Which chunks of a disk changed since when.
//!
//! A disk has an [`Era`], a counter that only rises. An [`EraMap`] holds, for each chunk, the era of
//! its last change, so that one number answers for every checkpoint: what changed since a checkpoint
//! is what carries its era or a later one. [`FrozenEras`] is the same map as it was at one moment.
//! A [`DirtySet`], of which a disk can have any number, is [`Bits`] from before and an era to go on
//! from: what changed since then is dirty too.
//!
//! Nothing here does I/O or waits: what must outlive the process is handed to a [`PageStore`].

mod bits;
mod entry;
mod era;
mod eras;
mod frozen;
mod growing;
mod kept;
mod map;
mod pages;
mod regions;
mod run;
mod store;
mod sync;

pub use bits::{BitGranularity, BitGranularityError, Bits, DirtySet};
pub use entry::Salt;
pub use era::{Chunks, Era, Granularity, GranularityError};
pub use eras::{ERAS_PER_PAGE, EraRun, Eras, PAGE_BYTES};
pub use frozen::FrozenEras;
pub use kept::Kept;
pub use map::EraMap;
pub use pages::{PageRecord, PageTable};
pub use regions::{Region, Regions};
pub use run::Run;
pub use store::{MemoryPages, PageStore};
