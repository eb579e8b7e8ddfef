//! One request to another server, made of whole blocks of its export.

use std::ops::Range;

use block::{Extent, Zeroing};
use bytes::{Bytes, BytesMut};
use proto::client::{self, Client, Durability, Error};
use proto::{STATE_HOLE, STATE_ZERO};

use super::connect::{Abilities, BASE_ALLOCATION};
use super::unsynced::{Change, What};

/// Reads `range`.
pub(super) async fn read(
    client: &Client,
    can: &Abilities,
    range: &Range<u64>,
) -> Result<Bytes, Error> {
    let whole = around(range, can.block);
    let data = client.read(whole.clone()).await?;
    let from = (range.start - whole.start) as usize;
    Ok(data.slice(from..from + (range.end - range.start) as usize))
}

/// Performs `change`, and returns what was changed in whole blocks.
///
/// Blocks that are changed in part are read first: whoever asks sees to it that nobody else changes
/// them meanwhile.
pub(super) async fn change(
    client: &Client,
    can: &Abilities,
    change: Change,
) -> Result<Vec<Change>, Error> {
    let mut done = Vec::with_capacity(1);
    match &change.what {
        What::Write(data) => {
            let whole = around(&change.range, can.block);
            let data = if whole == change.range {
                data.clone()
            } else {
                patched(client, can, &change.range, data).await?
            };
            write(client, can, whole.start, data.clone()).await?;
            done.push(Change {
                range: whole,
                what: What::Write(data),
            });
        }
        What::Zero(how) => {
            let inner = within(&change.range, can.block);
            // First what may be refused as a whole.
            if !inner.is_empty() {
                done.extend(zero(client, can, inner.clone(), *how).await?);
            }
            for edge in [change.range.start..inner.start, inner.end..change.range.end] {
                if edge.is_empty() {
                    continue;
                }
                let zeroes = Bytes::from(vec![0; (edge.end - edge.start) as usize]);
                let whole = around(&edge, can.block);
                let data = patched(client, can, &edge, &zeroes).await?;
                write(client, can, whole.start, data.clone()).await?;
                done.push(Change {
                    range: whole,
                    what: What::Write(data),
                });
            }
        }
    }
    Ok(done)
}

/// The blocks around `range` with `data` in it.
async fn patched(
    client: &Client,
    can: &Abilities,
    range: &Range<u64>,
    data: &[u8],
) -> Result<Bytes, Error> {
    let whole = around(range, can.block);
    let first = whole.start..(whole.start + can.block).min(whole.end);
    let last = (whole.end - can.block).max(first.end)..whole.end;
    let mut bytes = BytesMut::zeroed((whole.end - whole.start) as usize);
    for edge in [first, last] {
        if !edge.is_empty() {
            let from = (edge.start - whole.start) as usize;
            let old = client.read(edge).await?;
            bytes[from..from + old.len()].copy_from_slice(&old);
        }
    }
    let from = (range.start - whole.start) as usize;
    bytes[from..from + data.len()].copy_from_slice(data);
    Ok(bytes.freeze())
}

async fn write(client: &Client, can: &Abilities, offset: u64, data: Bytes) -> Result<(), Error> {
    client.write(offset, data, durability(can)).await
}

async fn zero(
    client: &Client,
    can: &Abilities,
    range: Range<u64>,
    how: Zeroing,
) -> Result<Vec<Change>, Error> {
    if can.zero {
        let how_there = client::Zeroing {
            durability: durability(can),
            no_hole: !how.unmaps(),
            fast: how.fast(),
        };
        client.write_zeroes(range.clone(), how_there).await?;
        // What was fast once need not be so again.
        let what = What::Zero(if how.unmaps() {
            Zeroing::MayUnmap
        } else {
            Zeroing::Keep
        });
        return Ok(vec![Change { range, what }]);
    }
    let zeroes = Bytes::from(vec![0; ZEROES_PIECE.min(range.end - range.start) as usize]);
    let mut done = Vec::new();
    let mut at = range.start;
    while at < range.end {
        let data = zeroes.slice(..zeroes.len().min((range.end - at) as usize));
        write(client, can, at, data.clone()).await?;
        let range = at..at + data.len() as u64;
        at = range.end;
        done.push(Change {
            range,
            what: What::Write(data),
        });
    }
    Ok(done)
}

/// Where nothing can be flushed each write is durable, if that is to be had.
fn durability(can: &Abilities) -> Durability {
    if can.fua && !can.flush {
        Durability::Now
    } else {
        Durability::Later
    }
}

/// What of `range` takes space, from its start on.
pub(super) async fn extents(
    client: &Client,
    can: &Abilities,
    range: &Range<u64>,
) -> Result<Vec<Extent>, Error> {
    let all = Extent {
        range: range.clone(),
        hole: false,
    };
    let Ok(context) = client.context(BASE_ALLOCATION) else {
        return Ok(vec![all]);
    };
    let whole = around(range, can.block);
    let status = client.block_status(whole.clone()).await?;
    let mut at = status.range.start;
    let mut extents = Vec::new();
    for told in status.extents(context).unwrap_or_default() {
        let end = at + told.length;
        let part = at.max(range.start)..end.min(range.end);
        at = end;
        if !part.is_empty() {
            // What is allocated and zero is none: its allocation may go for reasons of the server's.
            let hole = u64::from(STATE_HOLE | STATE_ZERO);
            extents.push(Extent {
                range: part,
                hole: told.flags & hole == hole,
            });
        }
    }
    Ok(if extents.is_empty() {
        vec![all]
    } else {
        extents
    })
}

/// The whole blocks that `range` touches.
pub(super) fn around(range: &Range<u64>, block: u64) -> Range<u64> {
    range.start / block * block..range.end.next_multiple_of(block)
}

/// The whole blocks within `range`; where there are none, an empty range in it.
fn within(range: &Range<u64>, block: u64) -> Range<u64> {
    let start = range.start.next_multiple_of(block).min(range.end);
    start..(range.end / block * block).max(start)
}

/// Zeroes are written from a buffer of this size where they cannot be asked for.
const ZEROES_PIECE: u64 = 1 << 20;
