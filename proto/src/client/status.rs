//! What selected contexts say about a range, put together from a server's chunks.

use std::ops::Range;

use super::violation::ServerViolation;
use crate::extents::{ContextId, Extent};

/// How many extents one reply may have, for all its contexts. The protocol advises servers against
/// more than this for a single one.
pub const EXTENTS_ACCEPTED_MAX: usize = 1 << 20;

/// What contexts say about a range.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct BlockStatus {
    /// What they all say something about: it starts where the request did, and is never empty.
    /// Servers may say less than was asked about; then ask again from its end.
    pub range: Range<u64>,
    /// For each context extents from the start of the range to its end. None is empty, and
    /// neighbours may be equal.
    pub contexts: Vec<(ContextId, Vec<Extent>)>,
}

impl BlockStatus {
    /// What one context says.
    pub fn extents(&self, context: ContextId) -> Option<&[Extent]> {
        let mut contexts = self.contexts.iter();
        let (_, extents) = contexts.find(|(id, _)| *id == context)?;
        Some(extents)
    }
}

/// What has arrived of a block status.
#[derive(Debug)]
pub(crate) struct StatusAssembly {
    range: Range<u64>,
    one: bool,
    /// What extents have to be multiples of, except at the end of the export.
    alignment: u64,
    export_size: u64,
    contexts: Vec<(ContextId, Option<Vec<Extent>>)>,
    extents: usize,
}

impl StatusAssembly {
    pub(crate) fn new(
        (range, one): (Range<u64>, bool),
        (export_size, alignment): (u64, u64),
        contexts: Vec<ContextId>,
    ) -> Self {
        Self {
            range,
            one,
            alignment,
            export_size,
            contexts: contexts.into_iter().map(|id| (id, None)).collect(),
            extents: 0,
        }
    }

    /// How many contexts there are to be told about.
    pub(crate) fn contexts(&self) -> u64 {
        self.contexts.len() as u64
    }

    /// How many extents can still come.
    pub(crate) fn room(&self) -> u64 {
        if self.one {
            return 1;
        }
        // Each is longer than nothing, and all but the last end within the request.
        let asked = self.range.end - self.range.start;
        asked.min((EXTENTS_ACCEPTED_MAX - self.extents) as u64)
    }

    pub(crate) fn add(
        &mut self,
        context: ContextId,
        mut extents: Vec<Extent>,
    ) -> Result<(), ServerViolation> {
        self.extents += extents.len();
        if self.extents > EXTENTS_ACCEPTED_MAX {
            return Err(ServerViolation::TooManyExtents(EXTENTS_ACCEPTED_MAX));
        }
        self.check(&extents)?;
        clip(&mut extents, self.range.end - self.range.start);

        let mut contexts = self.contexts.iter_mut();
        match contexts.find(|(id, _)| *id == context) {
            None => Err(ServerViolation::ContextNotSelected(context)),
            Some((_, Some(_))) => Err(ServerViolation::StatusTwice(context)),
            Some((_, none)) => {
                *none = Some(extents);
                Ok(())
            }
        }
    }

    /// What all contexts say, shortened to what they all say something about.
    pub(crate) fn finish(self) -> Result<BlockStatus, ServerViolation> {
        let mut contexts = Vec::with_capacity(self.contexts.len());
        for (id, extents) in self.contexts {
            contexts.push((id, extents.ok_or(ServerViolation::StatusMissing(id))?));
        }
        let covered = contexts.iter().map(|(_, extents)| total(extents)).min();
        let covered = covered.unwrap_or(0);
        for (_, extents) in &mut contexts {
            clip(extents, covered);
        }
        Ok(BlockStatus {
            range: self.range.start..self.range.start + covered,
            contexts,
        })
    }

    fn check(&self, extents: &[Extent]) -> Result<(), ServerViolation> {
        let asked = self.range.end - self.range.start;
        let beyond = ServerViolation::ExtentsBeyond(asked);
        if self.one && extents.len() > 1 {
            return Err(beyond);
        }
        // Only the last may go on behind the end, and only if more than one was asked for.
        let mut covered = 0_u64;
        for extent in extents {
            if covered >= asked {
                return Err(beyond);
            }
            covered = covered.saturating_add(extent.length);
            let at_the_end = self.range.start.saturating_add(covered) >= self.export_size;
            if extent.length % self.alignment != 0 && !at_the_end {
                return Err(ServerViolation::ExtentUnaligned(extent.length));
            }
        }
        if self.one && covered > asked {
            return Err(beyond);
        }
        Ok(())
    }
}

/// Shortens a list to at most so many bytes.
fn clip(extents: &mut Vec<Extent>, length: u64) {
    let mut left = length;
    for extent in extents.iter_mut() {
        extent.length = extent.length.min(left);
        left -= extent.length;
    }
    let keep = extents
        .iter()
        .take_while(|extent| extent.length > 0)
        .count();
    extents.truncate(keep);
}

fn total(extents: &[Extent]) -> u64 {
    extents.iter().map(|extent| extent.length).sum()
}
