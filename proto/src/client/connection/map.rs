//! What contexts say about a long range, without keeping all of it.

use std::ops::Range;

use super::error::Error;
use super::requests::Client;
use crate::client::BlockStatus;

/// What the selected contexts say about a range, a stretch at a time and in order.
#[derive(Debug)]
pub struct Map<'a> {
    client: &'a Client,
    left: Range<u64>,
}

impl<'a> Map<'a> {
    pub(super) fn new(client: &'a Client, range: Range<u64>) -> Self {
        Self {
            client,
            left: range,
        }
    }

    /// The next stretch; `None` at the end of the range. It can be called again after an error, for
    /// the same stretch.
    pub async fn next(&mut self) -> Result<Option<BlockStatus>, Error> {
        if self.left.start == self.left.end {
            return Ok(None);
        }
        let status = self.client.block_status(self.left.clone()).await?;
        // Never empty, and never past what was asked about.
        self.left.start = status.range.end;
        Ok(Some(status))
    }
}
