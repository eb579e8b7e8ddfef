//! What a start finds of the life before it, and what it records of its own.

use std::fs::File;
use std::io;
use std::path::Path;

use bitmap::Era;
use block::Storage;

use super::header::{Header, Life};
use super::identity::{self, ImageIdentity};
use super::journal::{Damage, Journal, Record};
use super::ledger::Ledger;
use crate::disk::{Chronicle, Ending, LeaseRecord, Running};
use crate::image::Image;

/// A start, as it is recorded.
pub(super) struct Start {
    pub(super) header: Header,
    pub(super) life: Life,
    pub(super) journal: Journal,
    /// Why nothing that was known is of use, if so.
    pub(super) lost: Option<String>,
}

impl Start {
    /// Everything that may have changed is marked, durably: what says so otherwise goes, and a
    /// damaged record of loss, unless it is whole.
    pub(super) async fn recovered(&mut self, has_record: bool, image: &Image) -> io::Result<()> {
        if self.life.growth.take().is_some() {
            // Whoever was killed may not have lived to make its size durable.
            image.sync().await?;
            self.header.store(&self.life)?;
            self.header.sync().await?;
        }
        if !has_record {
            self.header.forget_loss()?;
            self.header.sync().await?;
        }
        Ok(())
    }
}

impl Chronicle for Start {
    async fn runs(&mut self, running: Running) -> io::Result<()> {
        let eras = running.eras;
        self.life.era_high = eras.guests.number();
        // It ends when what it broke is recorded as well: with `State::settle`.
        self.life.in_doubt |= running.in_doubt;
        self.life.durability = running.durability;
        if let Some(reason) = self.lost.take() {
            self.life.lost_era = eras.presumed.number();
            self.life.lost_reason = reason;
        }
        self.header.store(&self.life)?;
        self.header.sync().await
    }

    async fn started(&mut self, presumed: Era) -> io::Result<()> {
        let era = presumed.number();
        self.journal.append(&Record::Started { era }).await
    }
}

pub(super) async fn ending_of(life: Option<&Life>, here: &Life, image: &Image) -> Ending {
    let Some(life) = life else {
        return Ending::PowerCut;
    };
    let same_machine = life.boot == here.boot && life.mounts == here.mounts;
    Ending::of(life.clean, same_machine, life.in_doubt, image).await
}

/// This machine, these mounts, and the image as it is.
pub(super) fn life_here(dir: &Path, image: &Image) -> io::Result<Life> {
    Ok(Life {
        boot: identity::boot()?,
        mounts: [
            identity::mount_of(image)?,
            identity::mount(&File::open(dir)?)?,
        ],
        image: ImageIdentity::of(image)?,
        ..Life::default()
    })
}

/// Why the image is not the one that was left, or not as it was left, if so.
pub(super) fn changed_image(
    before: &Life,
    here: &Life,
    ending: Ending,
    lease: LeaseRecord,
    image: &Image,
) -> Option<String> {
    let recorded = match ending {
        _ if image.is_constant() => None,
        Ending::Clean => None,
        Ending::Killed => Some(lease.clock.map(|clock| clock + CLOCK_SLACK_S)),
        Ending::PowerCut => Some(lease.end),
    };
    // Before the first write there is no lease; then the time of change is the one that was left.
    let last_change = recorded.map(|last| last.unwrap_or(0).max(before.image.changed_seconds()));
    let same_boot = before.boot == here.boot || before.boot == [0; 16];
    let size = here.image.size();
    let ours = before
        .growth
        .is_some_and(|g| [g.from, g.to].contains(&size));
    let left = if ours {
        before.image.with_size(size)
    } else {
        before.image
    };
    let differs = left.differs(&here.image, same_boot, last_change);
    match recorded {
        Some(None) => differs
            .map(|why| format!("{why}, or else: when its last server wrote to it cannot be read")),
        _ => differs,
    }
}

/// Why the journal may not say what it once said, if so. What is at its end may have been a record
/// that was never complete, except after a clean end.
pub(super) fn journal_loss(
    journal: &Journal,
    damage: Damage,
    ending: Ending,
    life: Option<&Life>,
) -> Option<String> {
    let has_run = life.is_some_and(|life| life.boot != [0; 16]);
    if damage.within > 0 || (damage.at_end > 0 && ending == Ending::Clean) {
        return Some("records of its journal are damaged".to_owned());
    }
    let is_empty = *journal.ledger() == Ledger::default();
    (has_run && is_empty).then(|| "its journal is missing, or empty".to_owned())
}

/// File systems stamp changes with a coarse clock, and a write of a process that was killed may
/// land a moment later. Both times are whole seconds: a change by someone else goes unnoticed if it comes
/// after a kill and less than a second more than this after our last write.
const CLOCK_SLACK_S: u64 = 2;
