//! What another server must still hold when it comes back.
//!
//! Sums of some of its image: of samples all over it, and of what was made durable last. What is about
//! to be changed is forgotten. So another image of the same size is told from the one that it was, and
//! so is an older state of it, before anything is written there or believed of it.

use std::collections::VecDeque;
use std::ops::Range;

use proto::client::{Client, Error};
use tokio::task::JoinSet;

use super::connect::{Abilities, told};
use super::perform;
use super::unsynced::{Change, What, meets};

#[derive(Clone, Debug, Default)]
pub(super) struct Witnesses {
    samples: Vec<Witness>,
    /// From the oldest to the latest.
    durable: VecDeque<Witness>,
    /// Where a change has failed, which may have been performed all the same, after one that is not
    /// durable yet.
    doubtful: Vec<Range<u64>>,
}

#[derive(Clone, Debug)]
struct Witness {
    range: Range<u64>,
    sum: u32,
}

impl Witnesses {
    /// How many of the changes that became durable last are worth knowing.
    pub(super) const LATEST: usize = 64;

    /// Samples of what is there now, as far as it can be read.
    pub(super) async fn of(client: &Client, can: &Abilities) -> Result<Self, Error> {
        let length = LENGTH_MAX.min(can.size);
        let last = (can.size - length) / LENGTH_MAX;
        let mut starts: Vec<u64> = (0..SAMPLES)
            .map(|number| last * number / (SAMPLES - 1) * LENGTH_MAX)
            .collect();
        starts.dedup();
        let ranges = starts.into_iter().map(|start| start..start + length);
        Ok(Self {
            samples: sums_of(client, can, ranges).await?,
            ..Self::default()
        })
    }

    /// Adds what has become durable, and that nobody has changed since.
    pub(super) fn add(&mut self, change: &Change) {
        let What::Write(data) = &change.what else {
            return;
        };
        let data = &data[..data.len().min(LENGTH_MAX as usize)];
        let range = change.range.start..change.range.start + data.len() as u64;
        if self.doubtful.iter().any(|other| meets(other, &range)) {
            return;
        }
        self.forget(&range);
        if self.durable.len() >= Self::LATEST {
            self.durable.pop_front();
        }
        let sum = crc32fast::hash(data);
        self.durable.push_back(Witness { range, sum });
    }

    /// `range` is about to be changed.
    pub(super) fn forget(&mut self, range: &Range<u64>) {
        self.samples.retain(|known| !meets(&known.range, range));
        self.durable.retain(|known| !meets(&known.range, range));
    }

    /// A change of `range` has failed: what it holds is not known, before it is changed once more.
    pub(super) fn doubt(&mut self, range: Range<u64>) {
        self.doubtful.push(range);
        if self.doubtful.len() > Self::LATEST {
            let start = self.doubtful.iter().map(|range| range.start).min();
            let end = self.doubtful.iter().map(|range| range.end).max();
            self.doubtful = vec![start.unwrap_or(0)..end.unwrap_or(u64::MAX)];
        }
    }

    /// Nothing is left that was answered and is not durable.
    pub(super) fn all_is_durable(&mut self) {
        self.doubtful.clear();
    }

    /// Those of which nothing is in `unsettled`, which may change by itself.
    pub(super) fn outside(&self, unsettled: &[Range<u64>]) -> Self {
        let mut left = self.clone();
        for range in unsettled {
            left.forget(range);
        }
        left
    }

    /// Whether all of it is there still. What the other side cannot read says nothing.
    pub(super) async fn are_held(self, client: &Client, can: &Abilities) -> Result<(), String> {
        let known: Vec<Witness> = self.samples.into_iter().chain(self.durable).collect();
        let ranges = known.iter().map(|known| known.range.clone());
        let found = sums_of(client, can, ranges).await;
        let found = found.map_err(|error| told(&error))?;
        let differs = |now: &Witness| {
            let mut before = known.iter().filter(|known| known.range == now.range);
            before.any(|known| known.sum != now.sum)
        };
        if found.iter().any(differs) {
            return Err("it came back with another image, or with an older state of it".to_owned());
        }
        Ok(())
    }
}

/// Of each range that can be read, in any order.
async fn sums_of(
    client: &Client,
    can: &Abilities,
    ranges: impl Iterator<Item = Range<u64>>,
) -> Result<Vec<Witness>, Error> {
    let mut reads = JoinSet::new();
    for range in ranges {
        let (client, can) = (client.clone(), *can);
        reads.spawn_local(async move {
            let data = perform::read(&client, &can, &range).await?;
            let sum = crc32fast::hash(&data);
            Ok::<_, Error>(Witness { range, sum })
        });
    }
    let mut sums = Vec::new();
    while let Some(read) = reads.join_next().await {
        match read.unwrap_or(Err(Error::Ended)) {
            Ok(sum) => sums.push(sum),
            Err(Error::Failed(_) | Error::Refused(_)) => {}
            Err(error) => return Err(error),
        }
    }
    Ok(sums)
}

/// How many samples there are all over the image.
const SAMPLES: u64 = 16;

/// How much is looked at in one place, in bytes.
const LENGTH_MAX: u64 = 4096;
