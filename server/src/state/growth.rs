//! A disk that is enlarged, as its state has it.

use std::io;
use std::path::Path;

use bitmap::{Era, PageTable};
use block::Storage;

use super::header::{Format, Life};
use super::identity::ImageIdentity;
use super::{ERAS, PAGES, State, eras_bytes, open_or_create, pages_of};
use crate::disk::Growth;
use crate::files::CellPages;
use crate::image::Image;
use crate::new_size::NewSize;

impl State {
    /// How the disk is growing, if it is, or was to be and could not.
    pub(crate) fn growth(&self) -> Option<Growth> {
        self.life.growth
    }

    /// Records how the disk grows, or that it does not.
    pub(crate) async fn record_growth(&mut self, growth: Option<Growth>) -> io::Result<()> {
        let life = Life {
            growth,
            ..self.life.clone()
        };
        self.replace(life).await
    }

    /// Records that the disk has grown, in era `era`: its image is as it should be.
    pub(crate) async fn record_grown(&mut self, era: Era, image: &Image) -> io::Result<()> {
        let life = Life {
            growth: None,
            era_high: self.life.era_high.max(era.number()),
            image: ImageIdentity::of(image)?,
            ..self.life.clone()
        };
        self.replace(life).await
    }
}

/// Takes it for the beginning of a growth that a block device has the `enlarged` size, if nothing
/// else has happened to it since its server ended.
///
/// Room for what is new is made here, as [`Disk::grow`](crate::disk::Disk::grow) makes it. Whoever is
/// killed before the start is recorded leaves a map that is longer than it need be.
pub(super) async fn admit_enlarged(
    dir: &Path,
    life: &mut Life,
    format: &Format,
    image: &Image,
    enlarged: Option<NewSize>,
) -> io::Result<()> {
    let (from, to) = (life.image.size(), image.size());
    let is_meant = enlarged.is_some_and(|size| size.from(from) == Some(to));
    if !is_meant || !life.image.has_given_size() || from >= to || life.growth.is_some() {
        return Ok(());
    }
    let [before, after] = [from, to].map(|size| size.div_ceil(format.granularity.bytes()));
    let eras = open_or_create(dir, ERAS)?;
    if eras.length()? < eras_bytes(before) {
        return Ok(());
    }
    eras.extend(eras_bytes(after))?;
    eras.sync().await?;
    let pages = CellPages::at(&dir.join(PAGES), open_or_create(dir, PAGES)?);
    let (table, _) = PageTable::load(pages_of(before), pages)?;
    table.make_room(pages_of(before), pages_of(after))?;
    scratch::Durable::sync(&*table.store()).await?;
    life.growth = Some(Growth { from, to });
    Ok(())
}
