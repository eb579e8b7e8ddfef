//! A disk under its name: image, lock, and where its state lies.

use std::fs;
use std::io;
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Duration;

use bitmap::{Era, Granularity};
use block::{Engine, Storage};
use tokio::sync::{Mutex, watch};
use uuid::Uuid;

use crate::clients::Clients;
use crate::disk::{Disk, Durability, Ending, Growth, GrowthRecord, LossRecord, OnTrackingError};
use crate::failure::Failure;
use crate::files::Files;
use crate::folder::{Folder, cannot_write};
use crate::hooks::Hooks;
use crate::image::{Image, RemoteSpec, Stored, cannot_open};
use crate::lookups::Lookups;
use crate::names::Name;
use crate::new_size::NewSize;
use crate::state::{BitsFolder, Ledger, Lost, Record, State};

/// Which image to serve, and how.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(crate) struct DiskSpec {
    /// What clients call it.
    pub(crate) name: Name,
    /// The image, or the URI that names it.
    pub(crate) path: PathBuf,
    /// The export of another server that it is, if it is one.
    pub(crate) remote: Option<RemoteSpec>,
    /// What it is, if the user says so.
    pub(crate) format: Option<Format>,
    /// From where else than its own folder it may have the files that it names.
    pub(crate) allow_backing: Vec<PathBuf>,
    /// The chunk size of the era map, if the user has one in mind.
    pub(crate) granularity: Option<Granularity>,
    /// Where its state goes, if not to the default place.
    pub(crate) state: Option<PathBuf>,
    /// Nobody may write it.
    pub(crate) read_only: bool,
    /// What its tracking survives.
    pub(crate) durability: Durability,
    /// Whether it is read and written through the page cache.
    pub(crate) cache: Cache,
}

/// What the bytes of an image mean.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Format {
    /// They are those of the disk, whatever they look like.
    Raw,
    /// They say where those of the disk are, and what was dirty.
    Qcow2,
}

/// How an image is read and written.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub(crate) enum Cache {
    /// Through the page cache.
    #[default]
    Writeback,
    /// Past it.
    None,
}

impl Cache {
    /// As QEMU calls them, and nothing else.
    pub(crate) fn named(name: &str) -> Option<Self> {
        [Self::Writeback, Self::None]
            .into_iter()
            .find(|cache| cache.name() == name)
    }

    /// As QEMU calls it.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Writeback => "writeback",
            Self::None => "none",
        }
    }
}

/// A disk that is being served.
pub(crate) struct ServedDisk {
    /// What clients call it.
    pub(crate) name: Name,
    /// Made once and never reused.
    pub(crate) uuid: Uuid,
    /// The image: an absolute path, if that can be told, or a URI.
    pub(crate) path: PathBuf,
    /// Nobody may write it.
    pub(crate) read_only: bool,
    /// What its tracking survives.
    pub(crate) durability: Durability,
    /// Whether it is read and written through the page cache.
    pub(crate) cache: Cache,
    /// What does what waits for a device.
    pub(crate) engine: Engine,
    /// The disk itself.
    pub(crate) disk: Arc<Disk<Files>>,
    /// The eras in which nothing was written, but presumed.
    pub(crate) presumed: Vec<Era>,
    /// What was of no use when this server began, because of what happened to the image or its
    /// state, and why.
    lost_before: Option<Lost>,
    /// Why checkpoints may not be known any more that once were, if so.
    pub(crate) forgotten: Option<String>,
    /// Whoever holds this appends to the journal.
    pub(crate) state: Mutex<State>,
    /// The bits of its dirty bitmaps.
    pub(crate) bits: BitsFolder,
    /// The dirty bitmaps that are stored in its image.
    pub(crate) stored: Vec<Stored>,
    /// How many ask at once what of it is where.
    pub(crate) lookups: Lookups,
    /// Who has it open, or what a backup keeps of it.
    pub(crate) clients: Arc<Clients>,
    /// It is made larger at this moment.
    pub(crate) resizing: AtomicBool,
    /// Where its state is.
    pub(crate) state_dir: PathBuf,
    scratch_dir: PathBuf,
    /// Its last server was killed.
    was_killed: bool,
    folders: Vec<Folder>,
}

/// What a disk's state says of the time before.
pub(crate) struct Past {
    /// What happened.
    pub(crate) ledger: Ledger,
    /// Whether backups that were open can go on.
    pub(crate) ending: Ending,
    /// How the disk has grown with this start.
    pub(crate) growth: Option<Growth>,
}

impl ServedDisk {
    /// Opens and locks the image, and begins to track it. A block device may have the `enlarged` size.
    pub(crate) async fn open(
        spec: &DiskSpec,
        scratch_root: Option<&Path>,
        (policy, engine): (OnTrackingError, Engine),
        enlarged: Option<NewSize>,
    ) -> Result<(Self, Past), Failure> {
        let context = |failure: Failure| Failure {
            message: format!("disk '{}': {}", spec.name, failure.message),
            ..failure
        };
        let opened = open_disk(spec, scratch_root, (policy, engine), enlarged).await;
        opened.map_err(context)
    }

    /// Whatever was made for it stays; else that goes when this is dropped.
    pub(crate) fn stays(&self) {
        self.folders.iter().for_each(Folder::stays);
    }

    /// Makes `record` durable in the journal.
    pub(crate) async fn record(&self, record: &Record) -> io::Result<()> {
        self.state.lock().await.record(record).await
    }

    /// The same for what is so in any case: durable at the latest before the next record.
    pub(crate) async fn record_or_owe(&self, record: &Record) {
        if let Err(error) = self.state.lock().await.record_or_owe(record).await {
            tracing::warn!(disk = %self.name, %error, "the journal cannot be written");
        }
    }

    /// Writes the journal anew if that is worth it.
    pub(crate) async fn tidy(&self) {
        if let Err(error) = self.state.lock().await.tidy().await {
            tracing::warn!(disk = %self.name, %error, "the journal cannot be written anew");
        }
    }

    /// What the journal says.
    pub(crate) async fn ledger(&self) -> Ledger {
        self.state.lock().await.ledger().clone()
    }

    /// How much changed in `era` or later, and how much of that is only presumed: all of it, where
    /// nothing is known.
    pub(crate) fn dirty_bytes(&self, era: Era) -> (u64, u64) {
        if self.why_lost(era).is_some() {
            return (self.disk.size(), self.disk.size());
        }
        let map = self.disk.map();
        (
            map.changed_bytes(era),
            map.presumed_bytes(era, &self.presumed),
        )
    }

    /// Why a checkpoint of era `era` is of no use, if it is.
    pub(crate) fn why_lost(&self, era: Era) -> Option<String> {
        let lost = self.lost().filter(|lost| era <= lost.era)?;
        Some(lost.reason)
    }

    /// The checkpoints that are of no use any more, and why.
    pub(crate) fn lost(&self) -> Option<Lost> {
        let untracked = self
            .disk
            .loss()
            .map(|LossRecord { era, reason }| Lost { era, reason });
        let both = self.lost_before.clone().into_iter().chain(untracked);
        both.max_by_key(|lost| lost.era)
    }

    /// Why an instant of era `era` that was kept when this server began cannot be, if so. That a
    /// write went untracked is no reason: for the instant, its old contents were kept.
    pub(crate) fn why_not_kept(&self, era: Era) -> Option<&str> {
        let lost = self.lost_before.as_ref().filter(|lost| era <= lost.era)?;
        Some(&lost.reason)
    }

    /// Why changes are not tracked now, if so.
    pub(crate) fn untracked(&self) -> Option<String> {
        let loss = self.disk.loss()?;
        let now = self.disk.is_lost_in(self.disk.tracking().era);
        now.then_some(loss.reason)
    }

    /// Removes what is left of backups other than `open`.
    pub(crate) fn remove_leftovers(&self, open: &[&Name]) {
        let Ok(entries) = fs::read_dir(&self.scratch_dir) else {
            return;
        };
        for entry in entries.flatten() {
            let name = entry.file_name();
            if open.iter().any(|id| name == *id.as_str()) {
                continue;
            }
            if let Err(error) = fs::remove_dir_all(entry.path()) {
                let path = entry.path();
                tracing::warn!(path = %path.display(), %error, "scratch files are left behind");
            }
        }
    }

    /// Keeps some regions free, and records what must be known after a kill, for as long as the
    /// disk is served. Told to stop, it ends what it has begun.
    pub(crate) async fn look_after(&self, stop: &mut watch::Receiver<bool>) {
        let mut idle = tokio::time::interval(IDLE_CHECK);
        loop {
            let retired = tokio::select! {
                _ = stop.wait_for(|stop| *stop) => return,
                () = self.disk.crowded() => self.disk.retire_some().await,
                _ = idle.tick() => self.disk.retire_idle().await,
                () = self.disk.sync_fails() => {
                    tracing::error!(disk = %self.name, "a sync failed");
                    Ok(())
                }
            };
            if let Err(error) = retired {
                tracing::error!(disk = %self.name, %error, "regions cannot be retired");
            }
            self.record_doubt().await;
        }
    }

    /// Marks what storage elsewhere may have lost with the last server. To be done when the instants
    /// that were open are kept again, and before anything is written or made durable.
    pub(crate) async fn catch_up(&self) -> io::Result<()> {
        if self.was_killed && self.disk.image().is_elsewhere() {
            self.disk.mark_active().await?;
        }
        Ok(())
    }

    /// Takes the user's word for it that the server which has the image has ended all that was given up.
    pub(crate) fn settle_base(&self) -> Result<(), Failure> {
        let Some(remote) = self.disk.image().remote() else {
            let message = format!("the image of disk '{}' is on this machine", self.name);
            return Err(Failure::new("bad-argument", message));
        };
        remote.settle().map_err(|error| {
            let message = format!("disk '{}': its state cannot be written: {error}", self.name);
            Failure::new("state", message)
        })
    }

    /// How it is growing, if it is, or was to be and could not.
    pub(crate) async fn growth(&self) -> Option<Growth> {
        self.state.lock().await.growth()
    }

    /// Records that nothing is in doubt any more.
    pub(crate) async fn settle(&self) -> io::Result<()> {
        self.state.lock().await.settle().await
    }

    /// Makes everything durable, and records that it is; or else, what is in doubt. Nobody writes any
    /// more.
    pub(crate) async fn close(&self) -> io::Result<()> {
        let closed = self.end().await;
        if closed.is_err() {
            self.record_doubt().await;
        }
        closed
    }

    async fn end(&self) -> io::Result<()> {
        self.disk.flush().await?;
        self.disk.retire_all().await?;
        self.disk.sync_tracking().await?;
        for snapshot in &self.disk.tracking().snapshots {
            if let Err(error) = snapshot.sync().await {
                snapshot.break_with(format!("scratch cannot be synced: {error}"))?;
                // Else another boot would take it for whole, as after any clean end.
                snapshot.sync_record().await?;
            }
        }
        let era = self.disk.tracking().era;
        let mut state = self.state.lock().await;
        state.close(era, self.disk.image(), self.disk.map()).await
    }

    /// Records that what was stored lately in the map or the table cannot be believed, if a sync of it has failed.
    pub(crate) async fn record_doubt(&self) {
        let in_doubt = self.disk.in_doubt();
        if let Err(error) = self.state.lock().await.record_doubt(in_doubt).await {
            tracing::error!(disk = %self.name, %error, "a failed sync cannot be recorded");
        }
    }

    /// The folder for this disk's share of a backup.
    pub(crate) fn snapshot_dir(&self, backup: &Name) -> PathBuf {
        self.scratch_dir.join(backup.as_str())
    }
}

/// In the header of the disk's state.
impl GrowthRecord for &ServedDisk {
    async fn begins(&mut self, growth: Growth) -> io::Result<()> {
        self.state.lock().await.record_growth(Some(growth)).await
    }

    async fn ends(&mut self, _: Growth) -> io::Result<()> {
        let era = self.disk.tracking().era;
        let mut state = self.state.lock().await;
        state.record_grown(era, self.disk.image()).await
    }

    async fn undone(&mut self) -> io::Result<()> {
        self.state.lock().await.record_growth(None).await
    }
}

async fn open_disk(
    spec: &DiskSpec,
    scratch_root: Option<&Path>,
    (policy, engine): (OnTrackingError, Engine),
    enlarged: Option<NewSize>,
) -> Result<(ServedDisk, Past), Failure> {
    let image = Image::open(spec, engine).await?;
    let state = state_dir(spec, &image)?;
    let mut folders = vec![Folder::claim(&state, "state")?];
    let scratch_dir = match scratch_root {
        Some(root) => {
            let dir = root.join(spec.name.as_str());
            folders.push(Folder::claim(&dir, "scratch")?);
            dir.join("backups")
        }
        None => state.join("backups"),
    };
    refuse_memory(spec, &state)?;
    if let Some(remote) = image.remote() {
        let kept = remote.keep_account_in(&state, !State::exists_in(&state));
        kept.await.map_err(|error| cannot_write(&state, &error))?;
    }
    let tracking = (spec.durability, policy);
    let opened = State::open(&state, spec.granularity, tracking, &image, enlarged).await?;
    if let Some(Growth { from, to }) = opened.growth {
        tracing::info!(disk = %spec.name, from, to, "the disk has been enlarged: what is new is marked");
    }
    let stored = image.stored_bitmaps(&spec.path).await;
    let disk = Disk::new(image, opened.map, Some(opened.intents), opened.era, Hooks)
        .with_loss(opened.loss)
        .with_doubt(opened.doubt);
    if let (Some(remote), Ending::PowerCut) = (disk.image().remote(), opened.ending) {
        // Which writes were under way when the machine stopped is not known so exactly.
        let added = remote.add_unsettled(disk.active_ranges());
        added.await.map_err(|error| cannot_write(&state, &error))?;
    }
    let served = ServedDisk {
        name: spec.name.clone(),
        uuid: opened.uuid,
        path: shown_path(spec),
        read_only: spec.read_only,
        durability: spec.durability,
        cache: spec.cache,
        engine,
        disk: Arc::new(disk),
        presumed: opened.presumed,
        lost_before: opened.lost,
        forgotten: opened.ledger.loss.clone(),
        state: Mutex::new(opened.state),
        bits: BitsFolder::of(&state),
        stored,
        lookups: Lookups::default(),
        state_dir: state,
        scratch_dir,
        was_killed: opened.ending == Ending::Killed,
        clients: Clients::new(),
        resizing: AtomicBool::new(false),
        folders,
    };
    Ok((
        served,
        Past {
            ledger: opened.ledger,
            ending: opened.ending,
            growth: opened.growth,
        },
    ))
}

/// The image of a disk that is not served, locked, and where its state is or would be.
pub(crate) async fn locate(spec: &DiskSpec, engine: Engine) -> Result<(Image, PathBuf), Failure> {
    let image = Image::open(spec, engine).await?;
    let dir = state_dir(spec, &image)?;
    Ok((image, dir))
}

/// Keeps everyone else out of the state in `dir`, which is made if need be, and then stays.
pub(crate) fn claim_state(spec: &DiskSpec, dir: &Path) -> Result<Folder, Failure> {
    let folder = Folder::claim(dir, "state")?;
    refuse_memory(spec, dir)?;
    folder.stays();
    Ok(folder)
}

/// As people are told of it.
fn shown_path(spec: &DiskSpec) -> PathBuf {
    match &spec.remote {
        Some(remote) => remote.uri.to_string().into(),
        None => std::path::absolute(&spec.path).unwrap_or_else(|_| spec.path.clone()),
    }
}

/// Where the state of a disk is or would be, as far as that can be told without opening its image.
pub(crate) fn likely_state_dir(spec: &DiskSpec) -> Option<PathBuf> {
    let is_device = || {
        let found = fs::metadata(&spec.path);
        found.is_ok_and(|found| found.file_type().is_block_device())
    };
    // As `Image::is_device` has it.
    let is_file = spec.remote.is_none() && (spec.format == Some(Format::Qcow2) || !is_device());
    place_of_state(spec, is_file).ok()
}

fn state_dir(spec: &DiskSpec, image: &Image) -> Result<PathBuf, Failure> {
    place_of_state(spec, !image.is_device() && image.remote().is_none())
}

fn place_of_state(spec: &DiskSpec, is_file: bool) -> Result<PathBuf, Failure> {
    if let Some(dir) = &spec.state {
        return Ok(dir.clone());
    }
    if is_file {
        let mut dir = fs::canonicalize(&spec.path)
            .map_err(|error| cannot_open(&spec.path, &error))?
            .into_os_string();
        dir.push(".stillpoint");
        return Ok(dir.into());
    }
    if rustix::process::geteuid().is_root() {
        return Ok(Path::new("/var/lib/stillpoint/disks").join(spec.name.as_str()));
    }
    let message = format!(
        "'{}' is no file, and its state needs a place",
        spec.path.display()
    );
    Err(Failure::new("no-state-dir", message).hint("add ,state=DIR"))
}

/// What lies in memory is gone with the machine, and everything that is said about a power cut would
/// be empty.
fn refuse_memory(spec: &DiskSpec, state: &Path) -> Result<(), Failure> {
    if spec.durability == Durability::None {
        return Ok(());
    }
    let found = rustix::fs::statfs(state).map_err(|error| cannot_write(state, &error.into()))?;
    // How wide the type is differs between platforms.
    if !MEMORY_MAGICS.contains(&i128::from(found.f_type)) {
        return Ok(());
    }
    let message = format!(
        "the state directory '{}' is on a file system in memory",
        state.display()
    );
    let hint = "name one on a disk with state=DIR, or add durability=none and have a full backup \
                after anything but a clean stop";
    Err(Failure::new("state-in-memory", message).hint(hint))
}

/// A region that nobody enters for this long, or up to twice as long, is retired; about as long as
/// the kernel leaves written pages in memory.
const IDLE_CHECK: Duration = Duration::from_secs(30);

/// Of tmpfs, which devtmpfs is as well, and of ramfs (Linux `magic.h`).
const MEMORY_MAGICS: [i128; 2] = [0x0102_1994, 0x8584_58f6];
