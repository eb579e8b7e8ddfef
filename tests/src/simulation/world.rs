use std::cell::RefCell;
use std::io;
use std::ops::Range;
use std::rc::Rc;
use std::sync::{Arc, Mutex, PoisonError};

use bitmap::PageStore;
use scratch::{Durable, Pace, Snapshot, Step, World};

use super::capture::Capture;
use super::executor::pause;
use super::sim::{Place, Sim};
use super::storage::SimStorage;

/// Disks and snapshots in memory, with everyone else stepping in wherever they may.
pub(super) struct SimWorld;

impl World for SimWorld {
    type Image = SimStorage;
    type Scratch = SimStorage;
    type Pages = SimPages;
    type Pace = SimPace;
}

/// What outlives the process, as a killed process would leave it.
#[derive(Clone)]
pub(super) struct SimPages {
    sim: Arc<Sim>,
    place: Place,
    contents: Arc<Mutex<Vec<u8>>>,
}

impl SimPages {
    pub(super) fn new(sim: &Arc<Sim>, place: Place) -> Self {
        Self {
            sim: Arc::clone(sim),
            place,
            contents: Arc::default(),
        }
    }

    /// The same as a process that is killed now would leave it, to be changed by its successor.
    pub(super) fn left_by_a_kill(&self) -> Self {
        let contents = self.contents.lock().unwrap_or_else(PoisonError::into_inner);
        Self {
            sim: Arc::clone(&self.sim),
            place: Place::Nowhere,
            contents: Arc::new(Mutex::new(contents.clone())),
        }
    }

    /// The byte at `offset`.
    pub(super) fn byte(&self, offset: u64) -> u8 {
        let contents = self.contents.lock().unwrap_or_else(PoisonError::into_inner);
        contents.get(offset as usize).copied().unwrap_or(0)
    }

    /// The number in the entry of eight bytes at `index`.
    pub(super) fn number(&self, index: u64) -> u32 {
        u32::from_le_bytes([0, 1, 2, 3].map(|byte| self.byte(index * 8 + byte)))
    }

    fn put(&self, offset: u64, bytes: &[u8]) {
        let mut contents = self.contents.lock().unwrap_or_else(PoisonError::into_inner);
        let end = offset as usize + bytes.len();
        if contents.len() < end {
            contents.resize(end, 0);
        }
        contents[offset as usize..end].copy_from_slice(bytes);
    }
}

impl PageStore for SimPages {
    fn store(&self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        let place = match self.place {
            Place::States(snapshot) if offset < Snapshot::<SimWorld>::RECORD_BYTES => {
                Place::Record(snapshot)
            }
            place => place,
        };
        if self
            .sim
            .fails(place, &(offset..offset + bytes.len() as u64))
        {
            // Whole entries of it may have got there.
            let entry = match place {
                Place::Record(_) => bytes.len(),
                Place::Map(_) | Place::Aside(_) => 8,
                Place::States(_) | Place::Second(_) => 1,
                _ => 4,
            };
            let stored = self.sim.below((bytes.len() / entry) as u64 + 1) as usize * entry;
            self.put(offset, &bytes[..stored]);
            return Err(io::Error::other("drawn"));
        }
        self.put(offset, bytes);
        Ok(())
    }

    fn load(&self, offset: u64, bytes: &mut [u8]) -> io::Result<()> {
        for (at, byte) in (offset..).zip(bytes) {
            *byte = self.byte(at);
        }
        Ok(())
    }

    fn stored(&self, offset: u64) -> io::Result<Option<Range<u64>>> {
        let contents = self.contents.lock().unwrap_or_else(PoisonError::into_inner);
        let end = contents.len() as u64;
        Ok((offset < end).then_some(offset..end))
    }
}

impl Durable for SimPages {
    async fn sync(&self) -> io::Result<()> {
        pause(&self.sim).await;
        Ok(())
    }
}

/// Everyone else steps in, at every step.
pub(super) struct SimPace {
    pub(super) sim: Arc<Sim>,
    /// Takes the copies when gates are closed; one for all disks.
    pub(super) capture: Rc<RefCell<Capture>>,
}

impl Pace for SimPace {
    async fn step(&self, before: Step) {
        if before == Step::CopyAhead {
            self.sim.copies_ahead();
        }
        if before != Step::Swap {
            return pause(&self.sim).await;
        }
        self.capture.borrow_mut().take();
        pause(&self.sim).await;
        self.capture.borrow_mut().take();
    }

    fn now(&self) -> u64 {
        0
    }
}
