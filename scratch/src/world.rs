use std::io;

use bitmap::{MemoryPages, PageStore};
use block::Storage;

/// What a disk and its snapshots run on: one set of types for files, another for simulation.
pub trait World: 'static {
    /// Where the disk's bytes are.
    type Image: Storage;
    /// Where before-images go.
    type Scratch: Storage;
    /// Where eras and preserved bits go.
    type Pages: Durable;
    /// Who may step in between.
    type Pace: Pace;
}

/// Pages that can be made to outlive the machine.
pub trait Durable: PageStore {
    /// Makes durable what was stored before the call.
    fn sync(&self) -> impl Future<Output = io::Result<()>>;

    /// New pages, on which nothing is stored, that can take the place of these.
    fn successor(&self) -> io::Result<Self>
    where
        Self: Sized,
    {
        Err(io::ErrorKind::Unsupported.into())
    }

    /// Takes the place of the pages that these succeed: whoever looks for those finds these. What is
    /// to be there after a power cut must be durable before.
    fn succeed(&self) -> io::Result<()> {
        Err(io::ErrorKind::Unsupported.into())
    }

    /// Makes durable which pages are found.
    fn sync_place(&self) -> impl Future<Output = io::Result<()>> {
        std::future::ready(Err(io::ErrorKind::Unsupported.into()))
    }
}

/// Nothing there outlives the process, so that all is as durable as it can be at once.
impl Durable for MemoryPages {
    async fn sync(&self) -> io::Result<()> {
        Ok(())
    }

    fn successor(&self) -> io::Result<Self> {
        Ok(Self::default())
    }

    fn succeed(&self) -> io::Result<()> {
        Ok(())
    }

    async fn sync_place(&self) -> io::Result<()> {
        Ok(())
    }
}

/// Who may step in between two steps of an order that matters.
///
/// Nobody, in production. A simulation lets others run there, as a preempting scheduler would.
pub trait Pace: 'static {
    /// A point between two steps.
    fn step(&self, before: Step) -> impl Future<Output = ()>;

    /// The time on the machine's clock, in seconds since 1970, as file systems stamp it.
    fn now(&self) -> u64;
}

/// What comes next.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Step {
    /// A write stores that a region is active.
    Activate,
    /// A write looks at the map.
    Look,
    /// A write puts its era into the map.
    Mark,
    /// A write looks for what it has to keep.
    Preserve,
    /// A write copies granules that it has claimed.
    Copy,
    /// The same, of a stretch of which it will change a part.
    CopyAhead,
    /// A write sets preserved bits.
    Keep,
    /// A write gives its claim back.
    Release,
    /// A write changes the disk.
    Write,
    /// It is recorded that a region is inactive.
    Retire,
    /// A disk that grows enlarges its image.
    Grow,
    /// A disk that has grown tells of its new size.
    Offer,
    /// A freeze gives the next disk its new tracking.
    Swap,
    /// A reader of the past, who has read the disk, looks at the preserved bits.
    ReadPast,
}

/// Nobody steps in.
#[derive(Clone, Copy, Debug, Default)]
pub struct Unpaced;

impl Pace for Unpaced {
    async fn step(&self, _: Step) {}

    fn now(&self) -> u64 {
        0
    }
}
