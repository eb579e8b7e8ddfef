//! What contexts say about a range, however long it is, in bounded memory and without keeping the
//! thread from others.

use std::ops::Range;

use bytes::BytesMut;
use proto::{ContextId, Extents, Origin};

use super::perform::Target;
use crate::export::{Context, ExportError};

/// What one block status asks.
pub(super) struct Question {
    pub(super) range: Range<u64>,
    pub(super) contexts: Vec<ContextId>,
    /// Whether one extent of each is enough.
    pub(super) one: bool,
}

impl Target {
    /// Appends the answer to `reply`.
    ///
    /// All contexts are asked about one step of the range, then about the next: none is looked up
    /// beyond the step in which another's answer ends. A connection's questions are answered one
    /// after the other, and those about a disk some at a time, step by step in turn: however many
    /// there are, the threads of the pool are there for others.
    pub(super) async fn block_status(
        &self,
        origin: Origin,
        question: &Question,
        reply: &mut BytesMut,
    ) -> Result<(), ExportError> {
        let asking = self.asking.acquire().await;
        let _asking = asking.map_err(|_| ExportError::GivenUp)?;
        let Range { start, end } = question.range;
        let asked = self.contexts.iter();
        let asked = asked.filter(|(id, _)| question.contexts.contains(id));
        let (mut answers, contexts): (Vec<_>, Vec<_>) = asked
            .map(|(id, context)| ((*id, question.empty_answer()), context))
            .unzip();

        let (mut at, mut lookups) = (start, 0);
        while at < end && lookups < LOOKUPS_MAX && !answers.iter().any(|(_, it)| it.is_full()) {
            if at > start && self.leaving.get() {
                break;
            }
            tokio::task::yield_now().await;
            let lookup = self.export.lookups().acquire().await;
            let _lookup = lookup.expect("it is never closed");
            at = end.min(at + STEP);
            for ((_, answer), context) in answers.iter_mut().zip(&contexts) {
                lookups += self.look_up(context, start..at, question, answer).await?;
                // No context needs to say more than the one that says least.
                at = at.min(start + answer.covered());
            }
        }
        self.replies.block_status(reply, origin, &mut answers);
        Ok(())
    }

    /// Goes on with `answer`, which is about `range` from its start; returns how often it asked.
    async fn look_up(
        &self,
        context: &Context,
        range: Range<u64>,
        question: &Question,
        answer: &mut Extents,
    ) -> Result<usize, ExportError> {
        for lookups in 0..LOOKUPS_MAX {
            let rest = range.start + answer.covered()..range.end;
            if rest.is_empty() || answer.is_full() {
                return Ok(lookups);
            }
            let turn = self.export.lookup_turn().acquire().await;
            let found = self.export.status(context, rest, question.batch()).await;
            drop(turn.expect("it is never closed"));
            for status in found? {
                answer.push(status.length, status.flags);
            }
        }
        Ok(LOOKUPS_MAX)
    }
}

impl Question {
    /// How many stretches of a context are asked for at a time. Who wants one extent asks again for each of
    /// them, so that what is looked up in vain would be so for each.
    fn batch(&self) -> usize {
        if self.one { 1 } else { BATCH }
    }

    fn empty_answer(&self) -> Extents {
        let length = self.range.end - self.range.start;
        if self.one {
            Extents::one(length)
        } else {
            Extents::new(length, self.contexts.len())
        }
    }
}

/// How far the contexts are looked up before others have their turn: 1 MiB of the map of eras at
/// the usual granularity, which takes some hundreds of microseconds to scan.
const STEP: u64 = 16 << 30;

/// So many stretches of a context at a time take some hundreds of microseconds to find.
const BATCH: usize = 4096;

/// How often a request asks the file system and the maps; then the answer ends, and the client asks
/// on from there. A file whose extents are 128 MiB long is answered for 15 TiB at once.
const LOOKUPS_MAX: usize = 8192;
