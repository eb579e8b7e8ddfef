//! Disks that come and go while others are served.
//!
//! A disk comes as at a start: it is opened, its journal and those of the others are made to agree, and
//! what was found is recorded. Then it is there, for clients and for the next instant at once. It goes
//! as at a stop: nobody is a client any more, all that was begun has ended, everything is durable, and
//! the end is recorded last. Both hold `instants` where the disk comes or goes, so an instant has it or has it
//! not.

use std::io;
use std::path::PathBuf;
use std::sync::atomic::Ordering;
use std::sync::{Arc, PoisonError};
use std::thread;
use std::time::Duration;

use block::Engine;
use tokio::runtime;
use tokio::sync::oneshot;
use tokio::task::{LocalSet, spawn_blocking};

use super::agree::{Told, agree};
use super::book::Book;
use super::restore::restore_one;
use super::same_image::{DiskState, refuse_same_image, refuse_same_state};
use super::{Backup, Disks, Event, Service, blocking};
use crate::disk::{Ending, OnTrackingError};
use crate::failure::Failure;
use crate::names::Name;
use crate::served::{DiskSpec, Past, ServedDisk};
use crate::state::{Outcome, Record};

/// How a server opens its disks.
#[derive(Clone, Debug)]
pub(crate) struct Opening {
    /// Where scratch goes, if not beside each disk's state.
    pub(crate) scratch_dir: Option<PathBuf>,
    /// From where else than its own folder an image may have the files that it names.
    pub(crate) allow_backing: Vec<PathBuf>,
    /// What becomes of a write that cannot be tracked.
    pub(crate) on_tracking_error: OnTrackingError,
    /// What does what waits for a device.
    pub(crate) engine: Engine,
}

impl Opening {
    /// Opens a disk.
    pub(crate) async fn open(&self, spec: &DiskSpec) -> Result<(ServedDisk, Past), Failure> {
        let spec = DiskSpec {
            allow_backing: self.allow_backing.clone(),
            ..spec.clone()
        };
        let terms = (self.on_tracking_error, self.engine);
        ServedDisk::open(&spec, self.scratch_dir.as_deref(), terms, None).await
    }

    /// The same on a thread of its own, as reading a large map takes a while.
    async fn open_aside(&self, spec: DiskSpec) -> Result<(ServedDisk, Past), Failure> {
        let opening = self.clone();
        let (say, said) = oneshot::channel();
        let open = move || {
            // Nobody hears it where the server is gone, which waits for it.
            let _ = say.send(opening.open_here(&spec));
        };
        let thread = thread::Builder::new().name("add".to_owned()).spawn(open);
        let thread = thread.map_err(|error| cannot_start(&error))?;
        let opened = said.await;
        // It has said its last word; what is left is its own end.
        let ended = thread.join();
        match (opened, ended) {
            (Ok(opened), Ok(())) => opened,
            _ => Err(Failure::new(
                "internal",
                "the thread that opened the disk panicked",
            )),
        }
    }

    fn open_here(&self, spec: &DiskSpec) -> Result<(ServedDisk, Past), Failure> {
        let runtime = runtime::Builder::new_current_thread().enable_all().build();
        let runtime = runtime.map_err(|error| cannot_start(&error))?;
        LocalSet::new().block_on(&runtime, self.open(spec))
    }
}

/// What was found of a disk that is about to come.
struct Found {
    /// What the book is to have of it.
    book: Book,
    /// What it and the others have to be told, in order.
    owed: Vec<(Name, Record)>,
}

impl Service {
    /// Serves one disk more. On an error nothing of it is there.
    pub(crate) async fn add_disk(
        self: &Arc<Self>,
        spec: DiskSpec,
        opening: &Opening,
    ) -> Result<Arc<ServedDisk>, Failure> {
        let _alone = self.changing.lock().await;
        self.refuse_taken(&spec)?;
        let states = self.states();
        let asked = spec.clone();
        blocking(move || refuse_same_state(&asked, &states)).await??;
        let (disk, past) = opening.open_aside(spec).await?;
        let (disk, ending) = (Arc::new(disk), past.ending);
        let has_open = !past.ledger.open.is_empty();
        let _instants = self.instants.lock().await;
        match self.come(&disk, past).await {
            Ok(()) => Ok(disk),
            Err(failure) => {
                give_back(disk, ending, has_open).await;
                Err(failure)
            }
        }
    }

    fn states(&self) -> Vec<DiskState> {
        let disks = self.disks();
        disks.values().map(|disk| (&**disk).into()).collect()
    }

    /// Serves this disk no more, so that another server can have it. Who has it open is in the way,
    /// except by `force`: then they are disconnected.
    pub(crate) async fn remove_disk(&self, name: &Name, force: bool) -> Result<(), Failure> {
        // Whoever makes it larger may take long, and is not waited for.
        if self.disk(name)?.resizing.load(Ordering::Relaxed) {
            let message = format!("disk '{name}' is being made larger");
            return Err(Failure::new("disk-in-use", message).hint("wait until that is done"));
        }
        let _alone = self.changing.lock().await;
        let disk = self.disk(name)?;
        self.refuse_backed_up(name)?;
        // Where that cannot be, better now than when nobody has the disk any more.
        let flushed = disk.disk.flush().await;
        if let (Err(error), false) = (flushed, force) {
            let message = format!("disk '{name}' cannot be made durable: {error}");
            let hint =
                "see to the storage; with --force the disk goes as if its server were killed";
            return Err(Failure::new("not-durable", message).hint(hint));
        }
        {
            let _instants = self.instants.lock().await;
            self.refuse_backed_up(name)?;
            if force {
                disk.clients.dismiss(GOES);
            } else {
                let dismissed = disk.clients.dismiss_unless_used(GOES);
                dismissed.map_err(|peers| used(name, &peers))?;
            }
            self.leave_out(&disk);
        }
        disk.clients.gone().await;
        self.let_go(name).await;
        // Nobody reads or writes it any more.
        let closed = disk.close().await;
        release(disk).await;
        self.space.forget_unused();
        tracing::info!(disk = %name, "the disk has gone");
        self.announce(Event::DiskRemoved { disk: name.clone() });
        closed.map_err(|error| {
            let message = format!(
                "disk '{name}' is removed, but not everything could be made durable: {error}"
            );
            let hint = "whoever serves it next finds it as after a kill of its server";
            Failure::new("not-durable", message).hint(hint)
        })
    }

    /// Tells all clients to leave, since the server stops; there will be none.
    pub(crate) fn dismiss_clients(&self) {
        self.dismissed.store(true, Ordering::SeqCst);
        for disk in self.disks().values() {
            disk.clients.dismiss(STOPS);
        }
    }

    /// Finds out what there is to know of a disk, records it, and has everyone see it.
    ///
    /// A server that is killed leaves, before anything is recorded: a disk whose server was killed when
    /// it had hardly started. In between: some of what the journals have to be told, and the next
    /// start tells the rest. Nobody has written by then, nor was told of the disk.
    async fn come(self: &Arc<Self>, disk: &Arc<ServedDisk>, past: Past) -> Result<(), Failure> {
        // That was looked at before it was opened; what it has now counts.
        DiskState::from(&**disk).refuse_copy(&self.states())?;
        let found = self.find(disk, past).await?;
        self.refuse_clashes(disk, &found.book)?;
        self.settle_one(disk, &found).await.map_err(|error| {
            let message = format!(
                "disk '{}': what was found cannot be recorded: {error}",
                disk.name
            );
            Failure::new("state", message).hint("see to the storage and try again")
        })?;
        disk.stays();
        self.take_in(disk, found.book);
        self.keep(disk);
        let open = self.book().backups.clone();
        for backup in open
            .iter()
            .filter(|backup| backup.disks.contains_key(&disk.name))
        {
            self.watch(backup);
        }
        self.drop_left_behind().await;
        disk.tidy().await;
        tracing::info!(disk = %disk.name, path = %disk.path.display(), "the disk is served");
        self.announce(Event::DiskAdded {
            disk: disk.name.clone(),
        });
        Ok(())
    }

    /// What the disk's journal says, when it agrees with those of the others.
    async fn find(&self, disk: &Arc<ServedDisk>, past: Past) -> Result<Found, Failure> {
        let mut disks = Disks::clone(&self.disks());
        let mut told = Told::new();
        for (name, served) in &disks {
            told.insert(name.clone(), (served.uuid, served.ledger().await));
        }
        let mut ledger = past.ledger;
        let mut owed = Vec::new();
        for record in self.book().missed(disk.uuid) {
            ledger.take(record);
            owed.push((disk.name.clone(), record.clone()));
        }
        told.insert(disk.name.clone(), (disk.uuid, ledger));
        owed.extend(agree(&mut told));
        let (_, ledger) = told.remove(&disk.name).expect("it has just been put there");
        disks.insert(disk.name.clone(), Arc::clone(disk));
        let known = self.book();
        let book = restore_one((disk, past.ending), ledger, (&known, &disks), &self.space);
        let book = book
            .map_err(|error| Failure::new("system", format!("cannot restore backups: {error}")))?;
        Ok(Found { book, owed })
    }

    /// As [`settle`](Self::settle), before anything of the disk is written.
    async fn settle_one(&self, disk: &Arc<ServedDisk>, found: &Found) -> io::Result<()> {
        let backups = &found.book.backups;
        let open: Vec<&Name> = backups.iter().map(|backup| &backup.id).collect();
        disk.remove_leftovers(&open);
        disk.catch_up().await?;
        for (name, record) in &found.owed {
            if *name == disk.name {
                disk.record(record).await?;
            } else {
                self.be_told(name, record).await;
            }
        }
        for backup in backups {
            let part = backup.disks.values().next();
            if let Some(reason) = part.and_then(|part| part.frozen.snapshot().broken()) {
                let (uuid, reason) = (backup.uuid, reason.to_owned());
                disk.record(&Record::Broken { uuid, reason }).await?;
            }
        }
        let bitmaps = &found.book.bitmaps;
        bitmaps.remove_leftovers([disk].into_iter());
        disk.settle().await
    }

    /// Tells a disk that is served what the one that comes knows better.
    async fn be_told(&self, disk: &Name, record: &Record) {
        self.record_or_owe([disk].into_iter(), record).await;
        match record {
            Record::Committed { uuid } => self.end_by_uuid(*uuid, Outcome::Committed).await,
            Record::Aborted { uuid } => self.end_by_uuid(*uuid, Outcome::Aborted).await,
            Record::Deleted { uuid, .. } => {
                let disks = std::slice::from_ref(disk);
                self.book_mut().remove_checkpoint(*uuid, disks);
            }
            Record::Forgotten { consumer, at } => {
                self.book_mut().forget_consumer_at(consumer, disk, at);
            }
            // Whatever else there is changes nothing of what is known of a disk that is served.
            _ => {}
        }
    }

    /// Shows everyone that the disk is there.
    fn take_in(&self, disk: &Arc<ServedDisk>, found: Book) {
        let mut book = self.book_mut();
        book.away.remove(&disk.uuid);
        book.join(found);
        let mut disks = self.disks.write().unwrap_or_else(PoisonError::into_inner);
        Arc::make_mut(&mut disks).insert(disk.name.clone(), Arc::clone(disk));
        drop((disks, book));
        if self.dismissed.load(Ordering::SeqCst) {
            disk.clients.dismiss(STOPS);
        }
    }

    /// Shows everyone that the disk is not there any more.
    fn leave_out(&self, disk: &ServedDisk) {
        let mut book = self.book_mut();
        book.leave_out(&disk.name, disk.uuid);
        let mut disks = self.disks.write().unwrap_or_else(PoisonError::into_inner);
        Arc::make_mut(&mut disks).remove(&disk.name);
    }

    /// Refuses what is there already.
    fn refuse_taken(&self, spec: &DiskSpec) -> Result<(), Failure> {
        let (disks, name) = (self.disks(), &spec.name);
        if let Some(disk) = disks.get(name) {
            let message = format!("disk '{name}' is served already: '{}'", disk.path.display());
            return Err(Failure::new("disk-exists", message).hint("choose another name"));
        }
        if disks.len() >= DISKS_MAX {
            let message = format!("{DISKS_MAX} disks are served, and no more may be");
            return Err(Failure::new("too-many-disks", message));
        }
        let bitmap = format!("backup-{name}");
        if self.book().checkpoint(&bitmap).is_some() {
            let message = format!(
                "there is a checkpoint '{bitmap}', and that is what the backup bitmap of a disk '{name}' \
                 goes by"
            );
            let hint = "delete the checkpoint, or choose another name for the disk";
            return Err(Failure::new("invalid-name", message).hint(hint));
        }
        refuse_same_image(spec, disks.values().map(Arc::as_ref))
    }

    /// Refuses a disk with an open backup by whose id another one goes here.
    fn refuse_clashes(&self, disk: &ServedDisk, found: &Book) -> Result<(), Failure> {
        let book = self.book();
        let clashes = |open: &&Arc<Backup>| {
            let known = book.backup(open.id.as_str());
            known.is_some_and(|known| known.uuid != open.uuid)
        };
        let Some(backup) = found.backups.iter().find(clashes) else {
            return Ok(());
        };
        let (name, id) = (&disk.name, &backup.id);
        let message =
            format!("disk '{name}' has an open backup '{id}', and so has this server another");
        let hint = "commit or abort that one first, or serve the disk alone and end its own";
        Err(Failure::new("backup-exists", message).hint(hint))
    }

    /// Refuses to let a disk go that a backup needs.
    fn refuse_backed_up(&self, disk: &Name) -> Result<(), Failure> {
        let book = self.book();
        let has_it = book
            .backups
            .iter()
            .filter(|open| open.disks.contains_key(disk));
        let ids: Vec<_> = has_it.map(|open| format!("'{}'", open.id)).collect();
        if ids.is_empty() {
            return Ok(());
        }
        let message = format!("disk '{disk}' is in an open backup: {}", ids.join(", "));
        let hint = "commit or abort it first: stillpoint backup list";
        Err(Failure::new("disk-in-use", message).hint(hint))
    }
}

/// Undoes the opening of a disk that is not to be served.
///
/// Where backups were left open by a server that did not end in good order, what became of them is still
/// to be recorded: then it is as if a server had been killed when it had hardly started.
async fn give_back(disk: Arc<ServedDisk>, ending: Ending, has_open: bool) {
    if ending == Ending::Clean || !has_open {
        let closed = async {
            disk.catch_up().await?;
            disk.settle().await?;
            disk.close().await
        };
        if let Err(error) = closed.await {
            tracing::warn!(disk = %disk.name, %error, "not everything could be made durable");
        }
    }
    release(disk).await;
}

/// Lets go of the image and the state, and returns when others can have them.
async fn release(mut disk: Arc<ServedDisk>) {
    let alone = loop {
        disk = match Arc::try_unwrap(disk) {
            Ok(disk) => break disk,
            Err(disk) => disk,
        };
        // Somebody is still counting what has changed on it, say.
        tokio::time::sleep(LOOK).await;
    };
    // Not here, as the end of a connection to another server is waited for.
    if let Err(error) = spawn_blocking(move || drop(alone)).await {
        tracing::error!(%error, "a disk was not let go of in good order");
    }
}

fn cannot_start(error: &io::Error) -> Failure {
    let message = format!("cannot start a thread to open the disk: {error}");
    Failure::new("system", message)
}

fn used(name: &Name, peers: &[String]) -> Failure {
    let count = match peers.len() {
        1 => "a client".to_owned(),
        more => format!("{more} clients"),
    };
    let mut who = peers[..peers.len().min(PEERS_TOLD_MAX)].join("; ");
    if peers.len() > PEERS_TOLD_MAX {
        who += "; and others";
    }
    let message = format!("disk '{name}' is in use by {count}: {who}");
    let hint = "take it from the machine first; --force disconnects whoever has it";
    Failure::new("disk-in-use", message).hint(hint)
}

const GOES: &str = "the disk is being removed";
const STOPS: &str = "the server is shutting down";

/// More than a machine has. Each takes some ten descriptors.
const DISKS_MAX: usize = 256;

/// Clients that are named to whoever wants their disk removed.
const PEERS_TOLD_MAX: usize = 8;

/// Until a disk is looked at again that somebody has not let go of.
const LOOK: Duration = Duration::from_millis(5);
