//! What is kept about a disk, so that it outlives the server.
//!
//! A state directory has a header (what it is about, and how the last server left it), the era map
//! with its table of pages, a lease, and a journal. All of it is advice about one image: where the
//! image is not the one that was left, or not as it was left, nothing that was known of it can be
//! used, and the next backup is a full one with the reason.

mod arrival;
mod bits;
mod departure;
mod fingerprint;
#[cfg(feature = "fuzzing")]
pub(crate) mod fuzzing;
mod growth;
mod header;
mod identity;
mod journal;
mod ledger;
mod parcel;
mod start;

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use bitmap::{Era, EraMap, Granularity, PAGE_BYTES, PageTable, Salt};
use block::{Cells, Storage};
use uuid::Uuid;

use arrival::ARRIVED;
pub(crate) use arrival::NotTaken;
pub(crate) use bits::{BitsFolder, BitsId, read as read_bits, write as write_bits};
pub(crate) use identity::ImageIdentity;
pub(crate) use journal::{
    BackupRecord, BitmapRecord, BitmapsRecord, CheckpointRecord, FrozenBitmapRecord, Outcome,
    Record, RequestRecord,
};
pub(crate) use ledger::{ENDED_MAX, Ledger};
pub(crate) use parcel::{Description, Unfit, open as open_parcel, verify as verify_parcel};

use crate::disk::{
    Before, Doubt, Durability, Ending, Growth, Intents, Lease, Loss, OnTrackingError, Recovery,
};
use crate::failure::Failure;
use crate::files::{CellPages, Files};
use crate::image::Image;
use crate::new_size::NewSize;
use growth::admit_enlarged;
use header::{Format, Header, HeaderError, Life};
use journal::{Damage, JOURNAL, Journal};
use start::{Start, changed_image, ending_of, journal_loss, life_here};

/// The state of a disk that is being served.
pub(crate) struct State {
    dir: PathBuf,
    header: Header,
    life: Life,
    /// The header is known to say this of the life.
    is_stored: bool,
    journal: Journal,
}

/// A state directory, opened.
pub(crate) struct Opened {
    /// To be told what happens.
    pub(crate) state: State,
    /// The disk's identity.
    pub(crate) uuid: Uuid,
    /// The map, with everything marked that may have changed.
    pub(crate) map: Arc<EraMap<CellPages>>,
    /// The regions and the lease.
    pub(crate) intents: Intents<Files>,
    /// The era that begins with this server.
    pub(crate) era: Era,
    /// The eras in which nothing was written, but presumed.
    pub(crate) presumed: Vec<Era>,
    /// Whether backups that were open can go on.
    pub(crate) ending: Ending,
    /// Checkpoints of this era and before are of no use, and why.
    pub(crate) lost: Option<Lost>,
    /// Where it is recorded that tracking was lost, if a write may go on untracked.
    pub(crate) loss: Loss<CellPages>,
    /// Where it is recorded that a sync of the image has failed.
    pub(crate) doubt: Doubt<CellPages>,
    /// What happened before.
    pub(crate) ledger: Ledger,
    /// How the disk has grown with this start.
    pub(crate) growth: Option<Growth>,
}

/// What was known, and is of no use any more.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(crate) struct Lost {
    /// Everything of this era and before.
    pub(crate) era: Era,
    /// Why, in words.
    pub(crate) reason: String,
}

/// What was found in a directory, before anything in it is changed.
struct Found {
    header: Header,
    format: Format,
    life: Option<Life>,
}

impl State {
    /// Opens the state in `dir` of the disk on `image`, or begins one. A block device that has been
    /// enlarged while nobody had it may have the `enlarged` size, and no file may.
    ///
    /// What crash points leave behind: nothing here is believed before the header is there, and it
    /// is renamed into place last. Afterwards the first thing that is stored is that this server
    /// runs, so whoever comes after an interruption does all of this again.
    pub(crate) async fn open(
        dir: &Path,
        granularity: Option<Granularity>,
        (durability, policy): (Durability, OnTrackingError),
        image: &Image,
        enlarged: Option<NewSize>,
    ) -> Result<Opened, Failure> {
        Self::settle_in(dir).map_err(|error| cannot_use(dir, &error))?;
        let mut lost = None;
        let mut found = match find(dir)? {
            Ok(Some(found)) => found,
            Ok(None) => create(dir, granularity, image).await?,
            Err(reason) => {
                tracing::warn!(dir = %dir.display(), reason, "the state is begun anew");
                lost = Some(reason);
                create(dir, granularity, image).await?
            }
        };
        refuse_other_granularity(dir, granularity, found.format.granularity)?;
        let format = found.format;
        if let Some(life) = &mut found.life {
            admit_enlarged(dir, life, &format, image, enlarged)
                .await
                .map_err(|error| cannot_use(dir, &error))?;
        }
        let opened = begin(dir, found, (durability, policy), image, lost).await;
        opened.map_err(|error| cannot_use(dir, &error))
    }

    /// Whether there is one in `dir`, in whatever state.
    pub(crate) fn exists_in(dir: &Path) -> bool {
        [HEADER, ERAS, PAGES, JOURNAL]
            .iter()
            .any(|name| dir.join(name).exists())
    }

    /// Which disk the one in `dir` is of, if there is one that says so. Nothing there is changed.
    pub(crate) fn disk_in(dir: &Path) -> Option<Uuid> {
        // What has arrived takes the place of what is there.
        let places = [dir.join(ARRIVED), dir.to_owned()];
        let found = places
            .iter()
            .find_map(|dir| File::open(dir.join(HEADER)).ok())?;
        let (_, format, _) = Header::open(Cells::from(found)).ok()?;
        Some(format.uuid)
    }

    /// What the journal says.
    pub(crate) fn ledger(&self) -> &Ledger {
        self.journal.ledger()
    }

    /// The image that it is about, as it was recorded last.
    pub(crate) fn image(&self) -> ImageIdentity {
        self.life.image
    }

    /// Makes `record` durable.
    pub(crate) async fn record(&mut self, record: &Record) -> io::Result<()> {
        self.journal.append(record).await
    }

    /// Makes `record` durable, at the latest before the next one.
    pub(crate) async fn record_or_owe(&mut self, record: &Record) -> io::Result<()> {
        self.journal.append_or_owe(record).await
    }

    /// Writes the journal anew if most of it is of no use any more.
    pub(crate) async fn tidy(&mut self) -> io::Result<()> {
        self.journal.tidy().await
    }

    /// Records that nothing is in doubt any more: all of that is marked by now, or recorded.
    pub(crate) async fn settle(&mut self) -> io::Result<()> {
        self.record_doubt(false).await
    }

    /// Records whether a sync of the map or the table has failed: then the next start cannot believe what is newer.
    pub(crate) async fn record_doubt(&mut self, in_doubt: bool) -> io::Result<()> {
        if self.is_stored && self.life.in_doubt == in_doubt {
            return Ok(());
        }
        let life = Life {
            in_doubt,
            ..self.life.clone()
        };
        self.replace(life).await
    }

    /// On an error the header may say either.
    async fn replace(&mut self, life: Life) -> io::Result<()> {
        self.is_stored = false;
        self.header.store(&life)?;
        self.header.sync().await?;
        self.life = life;
        self.is_stored = true;
        Ok(())
    }

    /// Records a clean end, after which nothing is written. All else has been synced before.
    pub(crate) async fn close(
        &mut self,
        era: Era,
        image: &Image,
        map: &EraMap<CellPages>,
    ) -> io::Result<()> {
        self.journal.settle().await?;
        if image.is_elsewhere() {
            // Nobody writes in an era that comes after the last.
            let after = era.next().unwrap_or(era);
            fingerprint::store(&self.dir, image, map, after).await?;
        }
        self.life.clean = true;
        self.life.era_high = era.number();
        self.life.image = ImageIdentity::of(image)?;
        self.header.store(&self.life)?;
        self.header.sync().await
    }
}

/// Looks for a state; the inner error says why what is there is of no use.
fn find(dir: &Path) -> Result<Result<Option<Found>, String>, Failure> {
    let cells = match Cells::open(&dir.join(HEADER)) {
        Ok(cells) => cells,
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            let others = [ERAS, PAGES, JOURNAL]
                .iter()
                .any(|name| dir.join(name).exists());
            let reason = "the header of its state is missing".to_owned();
            return Ok(if others { Err(reason) } else { Ok(None) });
        }
        Err(error) => return Err(cannot_use(dir, &error)),
    };
    match Header::open(cells) {
        Ok((header, format, life)) => Ok(Ok(Some(Found {
            header,
            format,
            life,
        }))),
        Err(HeaderError::Damaged) => Ok(Err("the header of its state is damaged".to_owned())),
        Err(HeaderError::Newer(what)) => {
            let message = format!(
                "the state in '{}' {}",
                dir.display(),
                HeaderError::Newer(what)
            );
            let hint = "nothing there was changed: use the newer version, or another state=DIR";
            Err(Failure::new("newer-state", message).hint(hint))
        }
        Err(HeaderError::Io(error)) => Err(cannot_use(dir, &error)),
    }
}

/// Begins a state: everything else, synced; then the header, renamed into place.
async fn create(
    dir: &Path,
    granularity: Option<Granularity>,
    image: &Image,
) -> Result<Found, Failure> {
    let granularity = granularity.unwrap_or(Granularity::DEFAULT);
    let made = async {
        let chunks = image.size().div_ceil(granularity.bytes());
        let eras = Cells::create(&dir.join(ERAS))?;
        eras.extend(eras_bytes(chunks))?;
        eras.sync().await?;
        let table = PageTable::create(pages_of(chunks), CellPages::create(&dir.join(PAGES))?)?;
        scratch::Durable::sync(&*table.store()).await?;
        Journal::create(dir).await?;
        Cells::create(&dir.join(LEASE))?.sync().await?;
        let format = Format {
            uuid: Uuid::new_v4(),
            granularity,
        };
        let aside = dir.join(HEADER_ASIDE);
        let mut header = Header::create(Cells::create(&aside)?, &format)?;
        let life = Life {
            image: ImageIdentity::of(image)?,
            ..Life::default()
        };
        let life = Life {
            clean: true,
            ..life
        };
        header.store(&life)?;
        header.sync().await?;
        std::fs::rename(&aside, dir.join(HEADER))?;
        File::open(dir)?.sync_all()?;
        Ok(Found {
            header,
            format,
            life: Some(life),
        })
    };
    made.await
        .map_err(|error: io::Error| cannot_use(dir, &error))
}

#[expect(
    clippy::too_many_lines,
    reason = "one thing told in order, and the order matters"
)]
async fn begin(
    dir: &Path,
    found: Found,
    (durability, policy): (Durability, OnTrackingError),
    image: &Image,
    mut lost: Option<String>,
) -> io::Result<Opened> {
    let Found {
        mut header,
        format,
        life,
    } = found;
    let begun_anew = lost.clone();
    let (mut journal, damage) = Journal::open(dir)?;
    if damage != Damage::default() {
        tracing::warn!(dir = %dir.display(), ?damage, "blocks of the journal are damaged");
    }
    let (lease, lease_record) = Lease::open(CellPages::from(open_or_create(dir, LEASE)?))?;

    let here = life_here(dir, image)?;
    let ending = ending_of(life.as_ref(), &here, image).await;
    let forgotten = begun_anew
        .clone()
        .or_else(|| journal_loss(&journal, damage, ending, life.as_ref()));
    if let Some(reason) = forgotten.filter(|_| journal.ledger().loss.is_none()) {
        // With the record of this start, before what is damaged is gone.
        journal.owe(&Record::Lost { reason });
    }
    if let Some(life) = life.as_ref().filter(|_| ending == Ending::PowerCut) {
        // At once: after a sync that failed, the next one may well succeed, and would prove nothing.
        header.store(&Life {
            in_doubt: true,
            ..life.clone()
        })?;
    }
    let before = life.unwrap_or_else(|| {
        lost = Some("how its last server ended cannot be read".to_owned());
        here.clone()
    });
    let eras = open_or_create(dir, ERAS)?;
    let whole = eras_bytes(image.size().div_ceil(format.granularity.bytes()));
    // What is missing would count as changed, chunk by chunk; but no server left it so.
    if eras.length()? < whole {
        lost = Some("the map of what changed is missing, or short".to_owned());
    }
    let weakness = before.durability.why_lost(ending).map(str::to_owned);
    // Without a lease, what was our own change and what someone else's is not known either.
    if let Some(why) =
        weakness.or_else(|| changed_image(&before, &here, ending, lease_record, image))
    {
        lost = Some(why);
    }

    let pages = || CellPages::from(header.cells().clone());
    let (record_of_loss, untracked) = Loss::open(pages(), policy).await?;
    let doubt = Doubt::of(pages());
    if untracked.is_none() {
        lost = Some("the record of whether tracking was lost is damaged".to_owned());
    }
    let has_record = untracked.is_some();
    let untracked = untracked.map_or(0, |record| record.era.number());
    let known = before
        .era_high
        .max(untracked)
        .max(before.lost_era)
        .max(journal.ledger().highest_era);
    // Of an image that was not enlarged yet there is nothing to be marked.
    let growth = before.growth.filter(|growth| growth.to == image.size());
    let recovery = load_map(dir, eras, image.size(), &format, known)?.ending(growth);
    // A state that no server has used knows of nothing.
    if image.is_elsewhere() && before.boot != [0; 16] && lost.is_none() {
        lost = fingerprint::differs(dir, image, (&recovery, ending)).await?;
    }
    if let (Some(why), None) = (&lost, &begun_anew) {
        tracing::warn!(dir = %dir.display(), why, "everything counts as changed: the next backup is a full one");
    }
    let mut start = Start {
        life: Life {
            lost_era: before.lost_era,
            lost_reason: before.lost_reason,
            growth,
            ..here
        },
        header,
        journal,
        lost,
    };
    let before = Before {
        ending,
        durability: before.durability,
        known: Era::from_number(known),
    };
    let recovered = recovery.start(before, durability, &mut start).await?;
    start.recovered(has_record, image).await?;
    if doubt.is_told()? {
        // The life says by now whether anything is in doubt.
        start.header.forget_doubt()?;
        start.header.sync().await?;
    }
    fit_eras(dir, whole)?;
    if recovered.damaged_bytes > 0 {
        let bytes = recovered.damaged_bytes;
        tracing::warn!(dir = %dir.display(), bytes, "the map is damaged: these count as changed");
    }
    let Start {
        header,
        life,
        journal,
        ..
    } = start;
    if image.is_elsewhere() {
        fingerprint::store(dir, image, &recovered.map, recovered.eras.guests).await?;
    }
    let ledger = journal.ledger().clone();
    let presumed = ledger.presumed.iter().map(|era| Era::from_number(*era));
    Ok(Opened {
        presumed: presumed.collect(),
        uuid: format.uuid,
        map: recovered.map,
        intents: Intents::new(recovered.regions, lease, durability),
        era: recovered.eras.guests,
        ending,
        lost: lost_before(&life),
        loss: record_of_loss,
        doubt,
        state: State {
            dir: dir.to_owned(),
            header,
            life,
            is_stored: true,
            journal,
        },
        ledger,
        growth,
    })
}

/// After it is recorded why, if the map is short. It may be long: of a disk that was to be larger.
fn fit_eras(dir: &Path, whole: u64) -> io::Result<()> {
    let eras = open_or_create(dir, ERAS)?;
    eras.extend(whole)?;
    eras.cut(whole)
}

/// The map as it is, in `eras` and what is told of its pages, where no era above `known` is recorded.
fn load_map(
    dir: &Path,
    eras: Cells,
    size: u64,
    format: &Format,
    known: u32,
) -> io::Result<Recovery<CellPages>> {
    let files = (
        CellPages::at(&dir.join(ERAS), eras),
        CellPages::at(&dir.join(PAGES), open_or_create(dir, PAGES)?),
    );
    let plausible = Era::from_number(known.saturating_add(UNRECORDED_ERAS_MAX));
    let salt = salt_of(&format.uuid);
    Recovery::load(size, format.granularity, salt, files, plausible)
}

fn lost_before(life: &Life) -> Option<Lost> {
    let era = Era::from_number(life.lost_era);
    (era > Era::NEVER).then(|| Lost {
        era,
        reason: life.lost_reason.clone(),
    })
}

fn refuse_other_granularity(
    dir: &Path,
    wanted: Option<Granularity>,
    found: Granularity,
) -> Result<(), Failure> {
    let Some(wanted) = wanted.filter(|wanted| *wanted != found) else {
        return Ok(());
    };
    let message = format!(
        "its state in '{}' has a granularity of {} bytes, not {}",
        dir.display(),
        found.bytes(),
        wanted.bytes()
    );
    let hint = format!(
        "say granularity={}, or remove the state to begin a new chain",
        found.bytes()
    );
    Err(Failure::new("other-granularity", message).hint(hint))
}

/// A file that is missing is empty; whatever should be in it is found to be damaged.
fn open_or_create(dir: &Path, name: &str) -> io::Result<Cells> {
    let path: PathBuf = dir.join(name);
    match Cells::open(&path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Cells::create(&path),
        other => other,
    }
}

fn pages_of(chunks: u64) -> u64 {
    chunks.div_ceil(bitmap::ERAS_PER_PAGE)
}

fn eras_bytes(chunks: u64) -> u64 {
    pages_of(chunks) * PAGE_BYTES
}

/// What the entries of the map of the disk `uuid` are summed up with.
fn salt_of(uuid: &Uuid) -> Salt {
    let [a, b, c, d, ..] = uuid.into_bytes();
    Salt::from_number(u32::from_le_bytes([a, b, c, d]))
}

fn cannot_use(dir: &Path, error: &io::Error) -> Failure {
    Failure::new(
        "state",
        format!("cannot use the state in '{}': {error}", dir.display()),
    )
}

const HEADER: &str = "header";
const HEADER_ASIDE: &str = "header.new";
const ERAS: &str = "eras";
const PAGES: &str = "pages";
const LEASE: &str = "lease";

/// Every era but those of instants that failed is in the journal; more of those than this is damage.
const UNRECORDED_ERAS_MAX: u32 = 1 << 20;
