//! A disk of this very process, as it was at an instant.

use std::ops::Range;
use std::sync::Arc;

use bitmap::Era;
use bytes::BytesMut;
use proto::client::Piece;
use proto::{STATE_HOLE, STATE_ZERO};

use super::source::{Content, Source, SourceError, Stretch};
use crate::export::{Context, Export, ExportError, Since, Status};
use crate::failure::Failure;
use crate::nbd::zero_runs;
use crate::service::FrozenDisk;

/// What a client of the backup's exports would see, without one.
pub(crate) struct FrozenSource {
    /// What is read: use of it is counted there.
    whole: Export,
    /// What says which parts of it there are to copy.
    shown: Export,
}

impl FrozenSource {
    /// All of a disk; or, of a checkpoint's name and the era that began with it, what has changed since.
    pub(crate) fn new(part: &Arc<FrozenDisk>, since: Option<(String, Era)>) -> Self {
        let whole = Export::Frozen(Arc::clone(part));
        let shown = match since {
            None => whole.clone(),
            Some((name, era)) => {
                let usage = part.differences.usage_of(&name);
                Export::Difference(Arc::clone(part), name, Since::Era(era), usage)
            }
        };
        Self { whole, shown }
    }
}

impl Source for FrozenSource {
    fn size(&self) -> u64 {
        self.whole.size()
    }

    async fn map(&self, offset: u64) -> Result<Vec<Stretch>, SourceError> {
        let end = self.size().min(offset + STEP);
        let turn = self.shown.lookups().acquire().await;
        let _turn = turn.expect("it is never closed");
        let context = Context::Allocation;
        let found = self
            .shown
            .status(&context, offset..end, LOOKUPS_MAX)
            .await?;
        Ok(found.iter().map(stretch).collect())
    }

    async fn read(&self, ranges: &[Range<u64>]) -> Result<Vec<Piece>, SourceError> {
        let mut pieces = Vec::with_capacity(ranges.len());
        for range in ranges {
            let mut data = BytesMut::zeroed((range.end - range.start) as usize);
            self.whole.read(range.start, &mut data).await?;
            let data = data.freeze();
            // What is zeroes takes no space in the copy, as with a client.
            pieces.extend(zero_runs(range.start, &data).into_iter().map(|run| {
                let offset = range.start + run.range.start as u64;
                if run.zero {
                    let length = run.range.len() as u64;
                    Piece::Hole { offset, length }
                } else {
                    let data = data.slice(run.range);
                    Piece::Data { offset, data }
                }
            }));
        }
        Ok(pieces)
    }
}

/// As a client reads what `base:allocation` says, of a disk or of a difference.
fn stretch(status: &Status) -> Stretch {
    let content = match status.flags {
        flags if flags & STATE_ZERO != 0 => Content::Zero,
        flags if flags & STATE_HOLE != 0 => Content::Clean,
        _ => Content::Data,
    };
    Stretch {
        length: status.length,
        content,
    }
}

impl From<ExportError> for SourceError {
    fn from(error: ExportError) -> Self {
        match error {
            ExportError::Io(error) => Self::Io(error),
            ExportError::Broken(_) => {
                Self::Unusable(Failure::new("backup-broken", error.to_string()))
            }
            ExportError::Ended | ExportError::GivenUp => {
                Self::Unusable(Failure::new("backup-ended", error.to_string()))
            }
        }
    }
}

/// What is looked up at once, as for a client: then others have their turn.
const STEP: u64 = 16 << 30;

/// The most stretches of it.
const LOOKUPS_MAX: usize = 8192;
