use std::io;
use std::sync::{Arc, OnceLock};

use bitmap::{Era, EraMap, EraRun, FrozenEras, PageStore};
use block::Storage;
use tokio::sync::Notify;

use crate::granules::{GRANULE, granules};
use crate::preserved::Preserved;
use crate::sync::{AtomicU64, Ordering};
use crate::world::{Durable, World};

/// What is kept of one disk at one instant: old bytes, and old eras.
///
/// Everything rests on one order: old bytes in scratch, then the preserved bit, then the guest's
/// write. So whoever reads the past takes no lock: it reads the disk, looks at the bits again, and
/// where one is set by now takes those granules from scratch. A guest never waits for a reader.
///
/// A snapshot that could not keep something is broken, for good: the record of that is stored
/// before the write that it could not keep up with is issued.
pub struct Snapshot<W: World> {
    pub(crate) scratch: W::Scratch,
    pub(crate) preserved: Preserved<W::Pages>,
    pub(crate) eras: FrozenEras<W::Pages>,
    broken: OnceLock<String>,
    breaking: Notify,
    scratch_used: AtomicU64,
}

/// Where a snapshot keeps things. All three hold only zeroes when it begins.
pub struct SnapshotFiles<W: World> {
    /// Old bytes, each at its own offset; as large as the disk.
    pub scratch: W::Scratch,
    /// The snapshot's own record, and a byte for each granule.
    pub states: W::Pages,
    /// Old eras.
    pub eras: W::Pages,
}

impl<W: World> Snapshot<W> {
    /// The instant at which era `frozen_in` begins on the disk whose live map is `live`.
    ///
    /// Room for the record of a break must have been reserved in `files.states`:
    /// [`RECORD_BYTES`](Self::RECORD_BYTES).
    pub fn new(live: Arc<EraMap<W::Pages>>, frozen_in: Era, files: SnapshotFiles<W>) -> Self {
        let count = granules(&(0..live.size())).end;
        Self {
            scratch: files.scratch,
            preserved: Preserved::new(count, files.states),
            eras: FrozenEras::new(live, frozen_in, files.eras),
            broken: OnceLock::new(),
            breaking: Notify::new(),
            scratch_used: AtomicU64::new(0),
        }
    }

    /// The same instant after a restart within one life of the machine, from what is in `files`.
    pub fn reopen(
        live: Arc<EraMap<W::Pages>>,
        frozen_in: Era,
        files: SnapshotFiles<W>,
    ) -> io::Result<Self> {
        let count = granules(&(0..live.size())).end;
        let (preserved, in_scratch) = Preserved::reopen(count, files.states)?;
        let snapshot = Self {
            scratch: files.scratch,
            preserved,
            eras: FrozenEras::reopen(live, frozen_in, files.eras)?,
            broken: OnceLock::new(),
            breaking: Notify::new(),
            scratch_used: AtomicU64::new(in_scratch * GRANULE),
        };
        if let Some(reason) = snapshot.recorded_break()? {
            snapshot.lose(reason);
        }
        Ok(snapshot)
    }

    fn recorded_break(&self) -> io::Result<Option<String>> {
        let mut record = [0; REASON_MAX + 2];
        self.preserved.store().load(BREAK_OFFSET, &mut record)?;
        let length = usize::from(u16::from_le_bytes([record[0], record[1]]));
        let reason = &record[2..2 + length.min(REASON_MAX)];
        Ok((length > 0).then(|| String::from_utf8_lossy(reason).into_owned()))
    }

    /// How much of the states file belongs to the snapshot's own record.
    pub const RECORD_BYTES: u64 = crate::preserved::STATES_OFFSET;

    /// The size of the disk in bytes.
    pub fn size(&self) -> u64 {
        self.scratch.size()
    }

    /// The eras of the disk at this instant.
    pub fn eras(&self) -> &FrozenEras<W::Pages> {
        &self.eras
    }

    /// Keeps eras that are about to be overwritten.
    pub fn put_aside(&self, run: &EraRun) -> io::Result<()> {
        self.eras.put_aside(run)
    }

    /// Why the instant is lost, if it is.
    pub fn broken(&self) -> Option<&str> {
        self.broken.get().map(String::as_str)
    }

    /// Waits until the instant is lost, and says why.
    pub async fn breaks(&self) -> &str {
        loop {
            let breaking = self.breaking.notified();
            tokio::pin!(breaking);
            breaking.as_mut().enable();
            if let Some(reason) = self.broken() {
                return reason;
            }
            breaking.await;
        }
    }

    /// Gives the instant up. When this returns, everyone who asks knows, after a kill as well.
    ///
    /// An error means that the break could not be stored, and that the write for which the
    /// snapshot was to be given up must not be issued.
    pub fn break_with(&self, reason: String) -> io::Result<()> {
        self.record_break(&reason)?;
        self.lose(reason);
        Ok(())
    }

    /// Gives the instant up, whether or not that can be stored: for a loss that also the next start
    /// will know of.
    pub fn give_up(&self, reason: String) {
        let _ = self.record_break(&reason);
        self.lose(reason);
    }

    fn record_break(&self, reason: &str) -> io::Result<()> {
        let mut record = Vec::with_capacity(REASON_MAX + 2);
        let mut length = reason.len().min(REASON_MAX);
        while !reason.is_char_boundary(length) {
            length -= 1;
        }
        record.extend((length as u16).to_le_bytes());
        record.extend(&reason.as_bytes()[..length]);
        self.preserved.store().store(BREAK_OFFSET, &record)
    }

    fn lose(&self, reason: String) {
        // Whoever came first has said why.
        let _ = self.broken.set(reason);
        self.breaking.notify_waiters();
    }

    /// Makes durable what is kept.
    pub async fn sync(&self) -> io::Result<()> {
        self.scratch.sync().await?;
        self.preserved.store().sync().await?;
        self.eras.store().sync().await
    }

    /// How many bytes of old contents are in scratch.
    pub fn scratch_used(&self) -> u64 {
        self.scratch_used.load(Ordering::Relaxed)
    }

    pub(crate) fn count_scratch(&self, granules: u64) {
        self.scratch_used
            .fetch_add(granules * GRANULE, Ordering::Relaxed);
    }
}

/// Where the record of a break begins; a length of zero says that there is none.
const BREAK_OFFSET: u64 = 0;

/// Fits into the first sector with its length.
const REASON_MAX: usize = 500;
