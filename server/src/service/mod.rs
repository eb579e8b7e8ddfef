//! What can be asked of a server: checkpoints and backups, across all its disks.
//!
//! Everything that takes or ends an instant goes through one lock, in the order: prepare what can
//! fail, freeze, enter in the book. Looking never waits for that.

mod agree;
mod backups;
mod bases;
mod bitmaps;
mod book;
mod changes;
mod checkpoints;
mod consumers;
mod disks;
mod expiry;
mod import;
mod keepers;
mod members;
mod reserve;
mod resize;
mod restore;
mod same_image;
mod space;

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};
use std::time::{Duration, Instant};

use bitmap::Era;
use time::OffsetDateTime;
use tokio::sync::{Mutex, broadcast};

pub(crate) use bases::FIRST_BACKUP;
pub(crate) use bitmaps::{Action, Addition, Bitmap, InImage, Source};
pub(crate) use book::{
    Backup, Base, BeginRequest, Book, Checkpoint, FrozenDisk, Last, Outcome, Usage,
};
pub(crate) use changes::{Changes, ChangesOf};
pub(crate) use disks::Opening;
pub(crate) use import::{Import, Imported, ImportedBitmap};
use keepers::Keepers;
pub(crate) use resize::{Resized, resize_alone};

use crate::disk::{Cover, Freeze, NotFrozen, Tracking, freeze};
use crate::failure::Failure;
use crate::files::Files;
use crate::names::Name;
use crate::served::{Past, ServedDisk};
use crate::state::Record;
use restore::Restored;
pub(crate) use same_image::{refuse_copies, refuse_same_image};
use space::Space;
pub(crate) use space::{Reserve, ScratchOptions};

/// Disks, and what is known of their past.
pub(crate) struct Service {
    /// Replaced as a whole, together with what the book says of them, by whoever holds `instants`.
    disks: RwLock<Arc<Disks>>,
    book: RwLock<Book>,
    /// Held by whoever adds or removes a disk, from before it holds `instants`.
    changing: Mutex<()>,
    /// Held by whoever takes or ends an instant.
    instants: Mutex<Counter>,
    freeze_timeout: Duration,
    clock: Clock,
    /// What disks have to be told before anything else happens.
    owed: std::sync::Mutex<Vec<(Name, Record)>>,
    /// The longest time for which the guests were held, in microseconds.
    longest_pause_us: AtomicU64,
    events: broadcast::Sender<Event>,
    space: Space,
    /// What is done for each disk for as long as it is served.
    keepers: std::sync::Mutex<BTreeMap<Name, Keepers>>,
    /// Nobody is to be a client any more.
    dismissed: AtomicBool,
    /// It began with some, as every server does: where there are none, all were removed.
    had_disks: bool,
}

/// Disks by name.
pub(crate) type Disks = BTreeMap<Name, Arc<ServedDisk>>;

/// What time it is.
pub(crate) type Clock = fn() -> OffsetDateTime;

/// Numbers for backups without an id.
#[derive(Default)]
struct Counter(u64);

/// Something that happened.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(crate) enum Event {
    /// A backup is open.
    Begun {
        /// Its id.
        id: Name,
    },
    /// A backup was committed or aborted.
    Ended {
        /// Its id.
        id: Name,
        /// Which of the two.
        outcome: Outcome,
    },
    /// A backup lost its instant.
    Broken {
        /// Its id.
        id: Name,
        /// Why.
        reason: String,
    },
    /// A backup has come near the end of its scratch.
    ScratchThreshold {
        /// Its id.
        id: Name,
        /// How much is used, and the limit of that.
        nearest: scratch::Use,
    },
    /// Something was written that nobody tracked: checkpoints so far are of no use.
    TrackingLost {
        /// On which disk.
        disk: Name,
        /// Why.
        reason: String,
    },
    /// A disk is served from now on.
    DiskAdded {
        /// Which.
        disk: Name,
    },
    /// A disk is not served any more, and another server may have it.
    DiskRemoved {
        /// Which.
        disk: Name,
    },
    /// A job is somewhere else than before.
    Job {
        /// Its id.
        id: Name,
        /// Where, in QEMU's words.
        status: &'static str,
    },
}

impl Service {
    /// Serves `disks`, with the checkpoints and backups that their journals tell of; a freeze gives
    /// up when writes in flight take longer than `freeze_timeout`. Nothing else may be asked of it
    /// before it has [settled](Self::settle).
    pub(crate) fn new(
        disks: Vec<(ServedDisk, Past)>,
        freeze_timeout: Duration,
        clock: Clock,
        scratch: ScratchOptions,
    ) -> io::Result<Arc<Self>> {
        let (mut served, mut pasts) = (BTreeMap::new(), BTreeMap::new());
        for (disk, past) in disks {
            pasts.insert(disk.name.clone(), past);
            served.insert(disk.name.clone(), Arc::new(disk));
        }
        let space = Space::new(scratch);
        let Restored { book, owed } = restore::restore(&served, pasts, &space)?;
        let open: Vec<&Name> = book.backups.iter().map(|backup| &backup.id).collect();
        for disk in served.values() {
            disk.remove_leftovers(&open);
        }
        let service = Arc::new(Self {
            had_disks: !served.is_empty(),
            disks: RwLock::new(Arc::new(served)),
            changing: Mutex::default(),
            book: RwLock::new(book),
            instants: Mutex::default(),
            freeze_timeout,
            clock,
            owed: std::sync::Mutex::new(owed),
            longest_pause_us: AtomicU64::new(0),
            events: broadcast::channel(EVENTS_MAX).0,
            space,
            keepers: std::sync::Mutex::default(),
            dismissed: AtomicBool::new(false),
        });
        for backup in &service.book().backups {
            service.watch(backup);
        }
        Ok(service)
    }

    /// Records what was found, before anything is written.
    ///
    /// What a disk has not heard of yet: another start may be without those that know. Which backups
    /// were found broken: a later start may find their files again, and another end of its
    /// predecessor. Then what has expired meanwhile ends, and what nobody needs goes.
    pub(crate) async fn settle(&self) -> io::Result<()> {
        let disks = self.disks();
        for disk in disks.values() {
            disk.catch_up().await?;
        }
        let owed = std::mem::take(&mut *self.owed.lock().unwrap_or_else(PoisonError::into_inner));
        for (disk, record) in owed {
            disks[&disk].record(&record).await?;
        }
        let backups = self.book().backups.clone();
        for backup in backups {
            for part in backup.disks.values() {
                let Some(reason) = part.frozen.snapshot().broken() else {
                    continue;
                };
                let record = Record::Broken {
                    uuid: backup.uuid,
                    reason: reason.to_owned(),
                };
                part.disk.record(&record).await?;
            }
        }
        self.book().bitmaps.remove_leftovers(disks.values());
        for disk in disks.values() {
            disk.state.lock().await.settle().await?;
        }
        self.abort_expired().await;
        self.drop_left_behind().await;
        for disk in disks.values() {
            disk.tidy().await;
            disk.stays();
        }
        Ok(())
    }

    /// The disks as they are now.
    pub(crate) fn disks(&self) -> Arc<Disks> {
        let disks = self.disks.read().unwrap_or_else(PoisonError::into_inner);
        Arc::clone(&disks)
    }

    /// Checkpoints and backups as they are now.
    pub(crate) fn book(&self) -> RwLockReadGuard<'_, Book> {
        self.book.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn book_mut(&self) -> RwLockWriteGuard<'_, Book> {
        self.book.write().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits until no instant is being taken and no disk added, removed or resized; for as long as
    /// what is returned is there, none is.
    pub(crate) async fn rest(&self) -> impl Sized {
        let changing = self.changing.lock().await;
        (changing, self.instants.lock().await)
    }

    /// What happens from now on.
    pub(crate) fn events(&self) -> broadcast::Receiver<Event> {
        self.events.subscribe()
    }

    /// What all backups use of scratch and may use.
    pub(crate) fn scratch(&self) -> &scratch::Quota {
        self.space.all()
    }

    /// The longest time for which a freeze held the guests.
    pub(crate) fn longest_pause(&self) -> Duration {
        Duration::from_micros(self.longest_pause_us.load(Ordering::Relaxed))
    }

    /// The disk of this name.
    pub(crate) fn disk(&self, name: &Name) -> Result<Arc<ServedDisk>, Failure> {
        let disks = self.disks();
        disks.get(name).cloned().ok_or_else(|| {
            let known: Vec<_> = disks.keys().map(Name::as_str).collect();
            let failure = Failure::new("unknown-disk", format!("there is no disk '{name}'"));
            if known.is_empty() {
                return failure.hint(NO_DISK);
            }
            failure.hint(format!("the disks are: {}", known.join(", ")))
        })
    }

    fn select(&self, wanted: Option<&[Name]>) -> Result<Vec<Arc<ServedDisk>>, Failure> {
        let Some(wanted) = wanted else {
            let disks = self.disks();
            if disks.is_empty() && self.had_disks {
                return Err(Failure::new("unknown-disk", "the server has no disk").hint(NO_DISK));
            }
            return Ok(disks.values().cloned().collect());
        };
        if wanted.is_empty() {
            return Err(Failure::new("unknown-disk", "no disk is named"));
        }
        let names: BTreeSet<&Name> = wanted.iter().collect();
        names.into_iter().map(|name| self.disk(name)).collect()
    }

    /// Takes the instant, and says for how long the guests were held.
    async fn freeze(&self, freezes: Vec<Freeze<Files>>) -> Result<Duration, Failure> {
        let cover = Cover::of(&freezes);
        let begun = Instant::now();
        let outcome = freeze(freezes, tokio::time::sleep(self.freeze_timeout)).await;
        let pause = begun.elapsed();
        self.longest_pause_us
            .fetch_max(pause.as_micros() as u64, Ordering::Relaxed);
        match cover.finish(outcome).await {
            Ok(()) => Ok(pause),
            Err(busy @ NotFrozen::Busy) => {
                let message = format!("{busy}: no instant within {:?}", self.freeze_timeout);
                let hint =
                    "the storage is slow: try again, or serve with a longer --freeze-timeout";
                Err(Failure::new("busy", message).hint(hint))
            }
            Err(failed @ NotFrozen::Image(_)) => Err(image_failed(failed.to_string())),
            Err(failed @ NotFrozen::Elsewhere(_)) => {
                let hint = "see to the server that has the image, and try again";
                Err(Failure::new("base-unreachable", failed.to_string()).hint(hint))
            }
        }
    }

    /// For what is so as soon as one disk says so: that of the first decides.
    async fn record_decision(
        &self,
        mut disks: impl Iterator<Item = &Name>,
        record: &Record,
    ) -> Result<(), Failure> {
        let Some(first) = disks.next() else {
            return Ok(());
        };
        let decided = self.disks()[first].record(record).await;
        decided.map_err(|error| not_recorded(first, &error))?;
        self.record_or_owe(disks, record).await;
        Ok(())
    }

    /// For what is so in any case: what it undoes was not acknowledged, or another disk has said it.
    async fn record_or_owe(&self, disks: impl Iterator<Item = &Name>, record: &Record) {
        for disk in disks {
            self.disks()[disk].record_or_owe(record).await;
        }
    }

    /// Tells everyone.
    pub(crate) fn announce(&self, event: Event) {
        // Nobody has to listen.
        let _ = self.events.send(event);
    }
}

/// Files and maps may make whoever works with them wait, which is not to be the main thread.
async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> T + Send + 'static,
) -> Result<T, Failure> {
    tokio::task::spawn_blocking(work)
        .await
        .map_err(|error| Failure::new("internal", format!("the command failed: {error}")))
}

fn refuse_untrusted(disk: &ServedDisk) -> Result<(), Failure> {
    if disk.disk.sync_failed() {
        let message = format!("disk '{}': a sync of the image failed", disk.name);
        return Err(image_failed(message));
    }
    Ok(())
}

/// Refuses where something may have been written in `since` or later that the map does not know.
fn still_known(disk: &ServedDisk, since: Era) -> Result<(), Failure> {
    let Some(why) = disk.why_lost(since) else {
        return Ok(());
    };
    let message = format!(
        "disk '{}': what has changed since then is not known: {why}",
        disk.name
    );
    let hint = "where a file tells how the disk was at a later checkpoint, name that with --as-of; \
                else begin with a full backup";
    Err(Failure::new("changes-not-known", message).hint(hint))
}

fn image_failed(message: String) -> Failure {
    let hint = "what the image holds is not certain any more: check the storage, then restart";
    Failure::new("image-failed", message).hint(hint)
}

fn next_era(disk: &ServedDisk, tracking: &Tracking<Files>) -> Result<Era, Failure> {
    tracking.era.next().ok_or_else(|| {
        Failure::new(
            "eras-used-up",
            format!("disk '{}': all eras are used up", disk.name),
        )
    })
}

fn not_recorded(disk: &Name, error: &io::Error) -> Failure {
    let message = format!("disk '{disk}': the journal cannot be written: {error}");
    Failure::new("state", message).hint("nothing has changed: see to the storage and try again")
}

/// What there is to do where there is no disk.
const NO_DISK: &str = "add one: stillpoint disk add NAME=PATH";

/// A listener that falls this far behind loses the oldest events.
const EVENTS_MAX: usize = 256;
