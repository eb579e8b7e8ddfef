//! A state has come from another machine.
//!
//! It is unpacked beside the files that are there, looked at, bound to the image that it is to be about, and
//! made durable; then one rename decides. What each crash point leaves behind:
//!
//! - before the rename: what was there, and a folder that the next start removes;
//! - after it: whoever comes next, a server too, moves the files to their places, the header last. Nothing
//!   else looks at the state before that is done, and without its header nothing would believe it.

use std::fs::{self, DirBuilder, File};
use std::io::{self, Read};
use std::os::unix::fs::{DirBuilderExt, FileExt};
use std::path::{Path, PathBuf};

use bitmap::PAGE_BYTES;
use block::{Cells, Storage};

use super::bits::FOLDER as BITMAPS;
use super::header::{Header, HeaderError, Life};
use super::identity::ImageIdentity;
use super::journal::{Damage, JOURNAL, replay};
use super::ledger::Ledger;
use super::parcel::{Description, Part, Unfit, Unpacking, unpack};
use super::start::life_here;
use super::{ERAS, HEADER, LEASE, PAGES, State, eras_bytes, load_map, pages_of};
use crate::image::Image;

/// Why a state is not taken in.
#[derive(Debug, thiserror::Error)]
pub(crate) enum NotTaken {
    /// What it was carried in.
    #[error(transparent)]
    Unfit(#[from] Unfit),
    /// What its files say.
    #[error("its {0}")]
    Senseless(String),
    /// The image, which is not as it was found any more.
    #[error("its image was changed")]
    Changed,
    /// It cannot be stored.
    #[error(transparent)]
    Io(#[from] io::Error),
}

impl State {
    /// Takes in the files that `parcel` has next, in the place of whatever is in `dir`, as the state of
    /// the disk on `image`, of which nobody knows but the caller that it is the same, and durable, as it
    /// was `found`.
    pub(crate) async fn take_in(
        dir: &Path,
        parcel: &mut impl Read,
        description: &Description,
        image: &Image,
        found: ImageIdentity,
    ) -> Result<(), NotTaken> {
        let aside = dir.join(ARRIVING);
        remove_folder(&aside)?;
        make_folder(&aside)?;
        make_folder(&aside.join(BITMAPS))?;
        let mut files = Files {
            dir: aside.clone(),
            open: None,
        };
        unpack(parcel, &mut files)?;
        files.end()?;
        Cells::create(&aside.join(LEASE))?.sync().await?;

        let (mut header, life) = check(&aside, description, image)?;
        let here = life_here(dir, image)?;
        header.store(&Life {
            boot: here.boot,
            mounts: here.mounts,
            image: found,
            ..life
        })?;
        header.sync().await?;
        sync(&aside.join(BITMAPS))?;
        sync(&aside)?;
        // Whoever writes it from here on makes it another than the state says.
        if ImageIdentity::of(image)? != found {
            remove_folder(&aside)?;
            return Err(NotTaken::Changed);
        }
        fs::rename(&aside, dir.join(ARRIVED))?;
        sync(dir)?;
        Self::settle_in(dir)?;
        Ok(())
    }

    /// Moves what has arrived in `dir` to its places, if something has. To be called before anything
    /// else looks at what is in there.
    pub(crate) fn settle_in(dir: &Path) -> io::Result<()> {
        remove_folder(&dir.join(ARRIVING))?;
        let from = dir.join(ARRIVED);
        if !fs::exists(&from)? {
            return Ok(());
        }
        // The header comes last: without it all else is where it belongs.
        if fs::exists(from.join(HEADER))? {
            remove_file(&dir.join(HEADER))?;
            sync(dir)?;
            if fs::exists(from.join(BITMAPS))? {
                remove_folder(&dir.join(BITMAPS))?;
                fs::rename(from.join(BITMAPS), dir.join(BITMAPS))?;
            }
            for name in [ERAS, PAGES, JOURNAL, LEASE] {
                if fs::exists(from.join(name))? {
                    fs::rename(from.join(name), dir.join(name))?;
                }
            }
            sync(dir)?;
            fs::rename(from.join(HEADER), dir.join(HEADER))?;
            sync(dir)?;
        }
        remove_folder(&from)?;
        sync(dir)
    }
}

/// Refuses what is whole and makes no sense.
fn check(dir: &Path, description: &Description, image: &Image) -> Result<(Header, Life), NotTaken> {
    let senseless = |what: &str| NotTaken::Senseless(what.to_owned());
    let (header, format, life) = match Header::open(Cells::open(&dir.join(HEADER))?) {
        Ok(found) => found,
        Err(HeaderError::Io(error)) => return Err(error.into()),
        Err(error) => return Err(NotTaken::Senseless(format!("header: {error}"))),
    };
    let life = life.ok_or_else(|| senseless("header does not say how it was left"))?;
    let is_described = format.uuid == description.disk_uuid
        && format.granularity.bytes() == description.granularity
        && life.image.size() == description.size;
    if !is_described || description.size != image.size() {
        return Err(senseless("header is of another disk than it says"));
    }
    if !life.clean || life.in_doubt || life.growth.is_some() {
        return Err(senseless("header says that it was not left in good order"));
    }
    let (records, damage, _) = replay(&fs::read(dir.join(JOURNAL))?);
    let ledger: Ledger = records.iter().collect();
    if damage != Damage::default() || ledger == Ledger::default() {
        return Err(senseless("journal is damaged"));
    }
    if !ledger.open.is_empty() {
        return Err(senseless("journal has open backups"));
    }
    let chunks = description.size.div_ceil(description.granularity);
    let eras = Cells::open(&dir.join(ERAS))?;
    let pages = Cells::open(&dir.join(PAGES))?.length()?;
    if eras.length()? != eras_bytes(chunks) || pages > pages_of(chunks) * PAGE_BYTES + PAGE_BYTES {
        return Err(senseless("map is of another disk than it says"));
    }
    let known = life.era_high.max(life.lost_era).max(ledger.highest_era);
    if !load_map(dir, eras, description.size, &format, known)?.is_whole() {
        return Err(senseless("map is damaged"));
    }
    Ok((header, life))
}

/// Files that are being unpacked, each durable before the next.
struct Files {
    dir: PathBuf,
    open: Option<File>,
}

impl Files {
    fn end(&mut self) -> io::Result<()> {
        self.open.take().map_or(Ok(()), |file| file.sync_all())
    }
}

impl Unpacking for Files {
    fn begin(&mut self, part: Part, length: u64) -> io::Result<()> {
        self.end()?;
        let path = self.dir.join(part.name());
        let cells = Cells::create(&path)?;
        cells.extend(length)?;
        self.open = Some(File::options().write(true).open(&path)?);
        Ok(())
    }

    fn store(&mut self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        let file = self.open.as_ref().ok_or(io::ErrorKind::NotFound)?;
        file.write_all_at(bytes, offset)
    }
}

fn make_folder(path: &Path) -> io::Result<()> {
    DirBuilder::new().mode(0o700).create(path)
}

fn remove_folder(path: &Path) -> io::Result<()> {
    ignore_missing(fs::remove_dir_all(path))
}

fn remove_file(path: &Path) -> io::Result<()> {
    ignore_missing(fs::remove_file(path))
}

fn ignore_missing(removed: io::Result<()>) -> io::Result<()> {
    match removed {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        other => other,
    }
}

fn sync(folder: &Path) -> io::Result<()> {
    File::open(folder)?.sync_all()
}

/// Where it is until it is decided that it counts, and from then on.
const ARRIVING: &str = "arriving";
pub(super) const ARRIVED: &str = "arrived";
