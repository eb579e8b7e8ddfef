use bitmap::PageStore;
use block::Storage;

/// What a disk and its snapshots run on: one set of types for files, another for simulation.
pub trait World: 'static {
    /// Where the disk's bytes are.
    type Image: Storage;
    /// Where before-images go.
    type Scratch: Storage;
    /// Where eras and preserved bits go.
    type Pages: PageStore;
    /// Who may step in between.
    type Pace: Pace;
}

/// Who may step in between two steps of an order that matters.
///
/// Nobody, in production. A simulation lets others run there, as a preempting scheduler would.
pub trait Pace: 'static {
    /// A point between two steps.
    fn step(&self) -> impl Future<Output = ()>;
}

/// Nobody steps in.
#[derive(Clone, Copy, Debug, Default)]
pub struct Unpaced;

impl Pace for Unpaced {
    async fn step(&self) {}
}
