use std::sync::Arc;

use bitmap::Era;
use scratch::{Snapshot, World};

/// What a write has to know: the era it marks, and whose old bytes it has to keep.
///
/// Read inside the gate, and replaced only while the gate is closed, except that an instant that
/// nobody needs any more may be dropped at any time.
pub struct Tracking<W: World> {
    /// What a write puts into the map.
    pub era: Era,
    /// The instants that are kept, oldest first.
    pub snapshots: Vec<Arc<Snapshot<W>>>,
}

impl<W: World> Tracking<W> {
    /// Era `era`, with no instant kept.
    pub fn new(era: Era) -> Self {
        Self {
            era,
            snapshots: Vec::new(),
        }
    }

    /// What follows this when `era` begins: the same instants, and `new` if one is to be kept.
    #[must_use]
    pub fn followed_by(&self, era: Era, new: Option<Arc<Snapshot<W>>>) -> Self {
        Self {
            era,
            snapshots: self.snapshots.iter().cloned().chain(new).collect(),
        }
    }

    /// The same without `ended`.
    #[must_use]
    pub fn without(&self, ended: &Arc<Snapshot<W>>) -> Self {
        let others = self
            .snapshots
            .iter()
            .filter(|snapshot| !Arc::ptr_eq(snapshot, ended));
        Self {
            era: self.era,
            snapshots: others.cloned().collect(),
        }
    }
}
