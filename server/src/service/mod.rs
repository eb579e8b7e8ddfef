//! What can be asked of a server: checkpoints and backups, across all its disks.
//!
//! Everything that takes or ends an instant goes through one lock, in the order: prepare what can
//! fail, freeze, enter in the book. Looking never waits for that.

mod backups;
mod bitmaps;
mod book;
mod checkpoints;
mod restore;

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};
use std::time::{Duration, Instant};

use bitmap::Era;
use time::OffsetDateTime;
use tokio::sync::{Mutex, broadcast};

pub(crate) use bitmaps::{Action, Addition, Bitmap, Source};
pub(crate) use book::{Backup, Base, BeginRequest, Book, Checkpoint, FrozenDisk, Outcome, Usage};

use bitmaps::{Restored, Settlement, restore as restore_bitmaps};

use crate::disk::{Freeze, Tracking, freeze};
use crate::failure::Failure;
use crate::files::Files;
use crate::names::Name;
use crate::served::{Past, ServedDisk};
use crate::state::Record;

/// Disks, and what is known of their past.
pub(crate) struct Service {
    disks: BTreeMap<Name, Arc<ServedDisk>>,
    book: RwLock<Book>,
    /// Held by whoever takes or ends an instant.
    instants: Mutex<Counter>,
    freeze_timeout: Duration,
    /// The longest time for which the guests were held, in microseconds.
    longest_pause_us: AtomicU64,
    events: broadcast::Sender<Event>,
    /// What was found undecided at the start, until it is recorded.
    undecided: std::sync::Mutex<Vec<Settlement>>,
}

/// Numbers for backups without an id.
#[derive(Default)]
struct Counter(u64);

/// Something that happened to a backup.
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
}

impl Service {
    /// Serves `disks`, with the checkpoints and backups that their journals tell of; a freeze gives
    /// up when writes in flight take longer than `freeze_timeout`.
    pub(crate) fn new(
        disks: Vec<(ServedDisk, Past)>,
        freeze_timeout: Duration,
    ) -> io::Result<Arc<Self>> {
        let (mut served, mut pasts) = (BTreeMap::new(), BTreeMap::new());
        for (disk, past) in disks {
            pasts.insert(disk.name.clone(), past);
            served.insert(disk.name.clone(), Arc::new(disk));
        }
        let mut book = restore::book(&served, &pasts)?;
        let Restored {
            bitmaps,
            settlements,
        } = restore_bitmaps(&served, &pasts);
        book.bitmaps = bitmaps;
        let open: Vec<&Name> = book.backups.iter().map(|backup| &backup.id).collect();
        for disk in served.values() {
            disk.remove_leftovers(&open);
        }
        let service = Arc::new(Self {
            disks: served,
            book: RwLock::new(book),
            instants: Mutex::default(),
            freeze_timeout,
            longest_pause_us: AtomicU64::new(0),
            events: broadcast::channel(EVENTS_MAX).0,
            undecided: std::sync::Mutex::new(settlements),
        });
        for backup in &service.book().backups {
            service.watch(backup);
        }
        Ok(service)
    }

    /// Records which backups were found broken, before anything is written that they should have
    /// kept: a later start may find their files again, and another end of its predecessor.
    pub(crate) async fn settle(&self) -> io::Result<()> {
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
        self.settle_bitmaps_found().await?;
        for disk in self.disks.values() {
            disk.state.lock().await.settle().await?;
        }
        Ok(())
    }

    /// The disks by name.
    pub(crate) fn disks(&self) -> &BTreeMap<Name, Arc<ServedDisk>> {
        &self.disks
    }

    /// Checkpoints and backups as they are now.
    pub(crate) fn book(&self) -> RwLockReadGuard<'_, Book> {
        self.book.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn book_mut(&self) -> RwLockWriteGuard<'_, Book> {
        self.book.write().unwrap_or_else(PoisonError::into_inner)
    }

    /// What happens from now on.
    pub(crate) fn events(&self) -> broadcast::Receiver<Event> {
        self.events.subscribe()
    }

    /// The longest time for which a freeze held the guests.
    pub(crate) fn longest_pause(&self) -> Duration {
        Duration::from_micros(self.longest_pause_us.load(Ordering::Relaxed))
    }

    /// The disk of this name.
    pub(crate) fn disk(&self, name: &Name) -> Result<&Arc<ServedDisk>, Failure> {
        self.disks.get(name).ok_or_else(|| {
            let known: Vec<_> = self.disks.keys().map(Name::as_str).collect();
            let failure = Failure::new("unknown-disk", format!("there is no disk '{name}'"));
            failure.hint(format!("the disks are: {}", known.join(", ")))
        })
    }

    fn select(&self, wanted: Option<&[Name]>) -> Result<Vec<Arc<ServedDisk>>, Failure> {
        let Some(wanted) = wanted else {
            return Ok(self.disks.values().cloned().collect());
        };
        if wanted.is_empty() {
            return Err(Failure::new("unknown-disk", "no disk is named"));
        }
        let names: BTreeSet<&Name> = wanted.iter().collect();
        names
            .into_iter()
            .map(|name| self.disk(name).cloned())
            .collect()
    }

    /// Takes the instant, and says for how long the guests were held.
    async fn freeze(&self, freezes: Vec<Freeze<Files>>) -> Result<Duration, Failure> {
        let begun = Instant::now();
        let outcome = freeze(freezes, tokio::time::sleep(self.freeze_timeout)).await;
        let pause = begun.elapsed();
        self.longest_pause_us
            .fetch_max(pause.as_micros() as u64, Ordering::Relaxed);
        outcome.map_err(|busy| {
            let message = format!("{busy}: no instant within {:?}", self.freeze_timeout);
            let hint = "the storage is slow: try again, or serve with a longer --freeze-timeout";
            Failure::new("busy", message).hint(hint)
        })?;
        Ok(pause)
    }

    /// For what need not be everywhere: what it undoes was not acknowledged, or one disk's word is
    /// enough.
    async fn record_where_possible(&self, disks: impl Iterator<Item = &Name>, record: &Record) {
        for disk in disks {
            if let Err(error) = self.disks[disk].record(record).await {
                tracing::warn!(%disk, %error, "the journal cannot be written");
            }
        }
    }

    fn announce(&self, event: Event) {
        // Nobody has to listen.
        let _ = self.events.send(event);
    }
}

fn refuse_untrusted(disk: &ServedDisk) -> Result<(), Failure> {
    if disk.disk.sync_failed() {
        let message = format!("disk '{}': a sync of the image failed", disk.name);
        let hint = "what the image holds is not certain any more: check the storage, then restart";
        return Err(Failure::new("image-failed", message).hint(hint));
    }
    Ok(())
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

fn now() -> OffsetDateTime {
    OffsetDateTime::now_utc()
}

/// A listener that falls this far behind loses the oldest events.
const EVENTS_MAX: usize = 256;
