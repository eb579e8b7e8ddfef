//! Consumers: whoever pulls backups, each with its own last checkpoint on each disk.
//!
//! A consumer comes into being with its first commit, which moves it to the checkpoint that it makes.
//! Where nobody named that checkpoint, it lives for as long as the consumer is there, or an open
//! backup begins from it.

use std::collections::{BTreeMap, BTreeSet};

use time::OffsetDateTime;
use time::format_description::BorrowedFormatItem;
use time::macros::format_description;
use uuid::Uuid;

use super::Service;
use super::book::{Backup, BeginRequest, Book};
use crate::failure::Failure;
use crate::names::{NAME_MAX, Name};
use crate::state::Record;

impl Service {
    /// Forgets where a consumer is, on all the disks that are served; checkpoints that were made for
    /// it and that nobody else needs go with it. A commit of a backup that it still has open makes it
    /// known again.
    pub(crate) async fn forget_consumer(&self, consumer: &Name) -> Result<(), Failure> {
        let _alone = self.instants.lock().await;
        let lasts = self.book().consumers.get(consumer).cloned();
        let lasts = lasts.ok_or_else(|| {
            let message = format!("there is no consumer '{consumer}'");
            Failure::new("unknown-consumer", message).hint("see: stillpoint consumer list")
        })?;
        // Those that are away hear of it when they are back.
        let (away, there) = self.book().away_at(consumer);
        let here = lasts.values().map(|last| last.uuid);
        let at: BTreeSet<Uuid> = here.chain(there).collect();
        let record = Record::Forgotten {
            consumer: consumer.clone(),
            at: at.into_iter().collect(),
        };
        self.record_decision(lasts.keys(), &record).await?;
        {
            let mut book = self.book_mut();
            book.consumers.remove(consumer);
            book.owe(&record, &away);
        }
        self.drop_left_behind().await;
        Ok(())
    }

    /// Refuses a new consumer when there are too many.
    pub(super) fn check_consumer(&self, request: &BeginRequest) -> Result<(), Failure> {
        let Some(consumer) = &request.consumer else {
            return Ok(());
        };
        let book = self.book();
        let open = book
            .backups
            .iter()
            .filter_map(|open| open.request.consumer.as_ref());
        let known: BTreeSet<&Name> = book.consumers.keys().chain(open).collect();
        if known.contains(consumer) || known.len() < CONSUMERS_MAX {
            return Ok(());
        }
        let message = format!("there are {CONSUMERS_MAX} consumers already, and no more may be");
        Err(Failure::new("too-many-consumers", message)
            .hint("forget those that are not in use: stillpoint consumer forget NAME"))
    }

    /// What the checkpoint of a backup is called: as asked, or a name made up for its consumer.
    pub(super) fn checkpoint_name(
        &self,
        request: &BeginRequest,
        now: OffsetDateTime,
    ) -> Result<Option<Name>, Failure> {
        match (&request.checkpoint, &request.consumer) {
            (None, None) => Ok(None),
            (Some(name), _) => {
                self.check_checkpoint_name(name)?;
                Ok(Some(name.clone()))
            }
            (None, Some(consumer)) => {
                let names = (1..).map(|number| automatic_name(consumer, now, number));
                let mut free = names.filter(|name| self.check_checkpoint_name(name).is_ok());
                Ok(free.next())
            }
        }
    }

    /// Moves the consumer of a backup that is committed, as the record of that has it.
    pub(super) fn move_consumer(book: &mut Book, backup: &Backup) {
        let (Some(consumer), Some(last)) = (&backup.request.consumer, backup.last()) else {
            return;
        };
        let lasts: &mut BTreeMap<_, _> = book.consumers.entry(consumer.clone()).or_default();
        for disk in backup.disks.keys() {
            lasts.insert(disk.clone(), last.clone());
        }
    }

    /// Deletes the checkpoints that were made for a consumer and that nobody needs any more. One
    /// that stays, because the server is killed, goes at the next start.
    pub(super) async fn drop_left_behind(&self) {
        let left = self.book().left_behind();
        for (uuid, disks) in left {
            let record = Record::Deleted {
                uuid,
                disks: self.identities(disks.iter()),
            };
            self.record_or_owe(disks.iter(), &record).await;
            self.book_mut().remove_checkpoint(uuid, &disks);
        }
    }
}

/// `CONSUMER.20261120T211403Z`, with a number where that is taken. What does not fit a name is cut
/// off the consumer's.
fn automatic_name(consumer: &Name, now: OffsetDateTime, number: u32) -> Name {
    let utc = now.to_offset(time::UtcOffset::UTC);
    let time = utc
        .format(SECONDS)
        .expect("years of this clock have four digits");
    let ending = match number {
        1 => time,
        _ => format!("{time}-{number}"),
    };
    let room = NAME_MAX - 1 - ending.len();
    let consumer = consumer.as_str();
    let consumer = consumer[..consumer.len().min(room)].trim_end_matches('.');
    Name::parse(&format!("{consumer}.{ending}")).expect("a name, a dot, and letters and digits")
}

const SECONDS: &[BorrowedFormatItem<'_>] =
    format_description!("[year][month][day]T[hour][minute][second]Z");

/// More than anyone has who pulls; each costs a record on each disk, and a line of each list.
const CONSUMERS_MAX: usize = 1024;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn made_up_names_are_names_however_long_the_consumers_is() {
        let now = OffsetDateTime::from_unix_timestamp(1_795_209_243).unwrap();
        let name = |consumer: &str, number| {
            automatic_name(&Name::parse(consumer).unwrap(), now, number).to_string()
        };
        assert_eq!(name("nightly", 1), "nightly.20261120T211403Z");
        assert_eq!(name("nightly", 2), "nightly.20261120T211403Z-2");
        for length in 1..=NAME_MAX {
            for number in [1, 2, u32::MAX] {
                assert!(name(&"x".repeat(length), number).len() <= NAME_MAX);
                let dots = format!("x{}y", "._".repeat(length / 2));
                if dots.len() <= NAME_MAX {
                    name(&dots, number);
                }
            }
        }
    }
}
