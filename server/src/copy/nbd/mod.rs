//! A disk that an NBD server has frozen, over as many connections as it allows.

mod connect;

use std::cell::Cell;
use std::ops::Range;

use proto::client::{BlockStatus, Client, Piece};
use proto::{ContextId, DIRTY, STATE_ZERO, TransmissionFlags};

use super::source::{Content, Source, SourceError, Stretch};
use crate::nbd_uri::NbdUri;
use crate::tls::ClientTls;

/// An export of an NBD server.
pub(crate) struct NbdSource {
    /// All of the same export; never empty.
    connections: Vec<Client>,
    next: Cell<usize>,
    /// What reads as zeroes, where the server can say.
    allocation: Option<ContextId>,
    /// What has changed, where that is what is copied.
    dirty: Option<ContextId>,
}

impl NbdSource {
    /// Enters an export; with the name of a dirty bitmap, what is clean in it will not be copied.
    ///
    /// The connections are tasks of the local set that this runs in.
    pub(crate) async fn open(
        uri: &NbdUri,
        tls: Option<&ClientTls>,
        bitmap: Option<&str>,
    ) -> Result<Self, SourceError> {
        let dirty = bitmap.map(|name| format!("{DIRTY_BITMAP}{name}"));
        let contexts = [Some(ALLOCATION), dirty.as_deref()];
        let contexts: Vec<&str> = contexts.into_iter().flatten().collect();
        let first = connect::enter(uri, tls, &contexts).await?;

        let allocation = first.context(ALLOCATION).ok();
        let dirty = match &dirty {
            None => None,
            Some(name) => Some(first.context(name)?),
        };
        let mut connections = vec![first];
        let first = &connections[0];
        if first
            .info()
            .flags
            .contains(TransmissionFlags::CAN_MULTI_CONN)
        {
            let info = first.info().clone();
            while connections.len() < CONNECTIONS {
                let another = connect::enter(uri, tls, &[]).await?;
                connect::check_same(&info, another.info())?;
                connections.push(another);
            }
        }
        Ok(Self {
            connections,
            next: Cell::new(0),
            allocation,
            dirty,
        })
    }

    /// Says goodbye on all connections. What the server says to that changes nothing.
    pub(crate) async fn close(&self) {
        for connection in &self.connections {
            let _ = connection.clone().disconnect().await;
        }
    }

    fn stretches(&self, status: &BlockStatus) -> Vec<Stretch> {
        let length = status.range.end - status.range.start;
        let flags = |context: Option<ContextId>, otherwise: u32| {
            let extents = context.and_then(|context| status.extents(context));
            let extents = extents.unwrap_or_default().iter();
            let extents: Vec<_> = extents
                .map(|extent| (extent.length, extent.flags))
                .collect();
            if extents.is_empty() {
                vec![(length, u64::from(otherwise))]
            } else {
                extents
            }
        };
        let dirty = flags(self.dirty, DIRTY);
        let allocation = flags(self.allocation, 0);
        overlay(&dirty, &allocation)
    }
}

impl Source for NbdSource {
    fn size(&self) -> u64 {
        self.connections[0].info().size
    }

    async fn map(&self, offset: u64) -> Result<Vec<Stretch>, SourceError> {
        let length = self.size() - offset;
        if self.allocation.is_none() && self.dirty.is_none() {
            return Ok(vec![Stretch {
                length,
                content: Content::Data,
            }]);
        }
        // Only the first connection has asked for contexts.
        let status = self.connections[0]
            .block_status(offset..offset + length)
            .await?;
        Ok(self.stretches(&status))
    }

    async fn read(&self, ranges: &[Range<u64>]) -> Result<Vec<Piece>, SourceError> {
        let turn = self.next.get();
        self.next.set((turn + 1) % self.connections.len());
        Ok(self.connections[turn].read_ranges(ranges).await?)
    }
}

/// What two contexts say together, of ranges that are equally long.
fn overlay(dirty: &[(u64, u64)], allocation: &[(u64, u64)]) -> Vec<Stretch> {
    let (mut dirty, mut allocation) = (dirty.iter(), allocation.iter());
    let (mut changed, mut kind) = ((0, 0), (0, 0));
    let mut stretches: Vec<Stretch> = Vec::new();
    loop {
        for (left, more) in [(&mut changed, &mut dirty), (&mut kind, &mut allocation)] {
            if left.0 == 0 {
                match more.next() {
                    Some(extent) => *left = *extent,
                    None => return stretches,
                }
            }
        }
        let length = changed.0.min(kind.0);
        let content = match (changed.1 & u64::from(DIRTY), kind.1 & u64::from(STATE_ZERO)) {
            (0, _) => Content::Clean,
            (_, 0) => Content::Data,
            _ => Content::Zero,
        };
        match stretches.last_mut() {
            Some(last) if last.content == content => last.length += length,
            _ => stretches.push(Stretch { length, content }),
        }
        changed.0 -= length;
        kind.0 -= length;
    }
}

/// What is a hole, and what reads as zeroes.
const ALLOCATION: &str = "base:allocation";

/// What a dirty bitmap's name is put behind.
const DIRTY_BITMAP: &str = "qemu:dirty-bitmap:";

/// One for each of the server's threads on most machines; more gain nothing where the disk or the
/// network is what is waited for.
const CONNECTIONS: usize = 4;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_dirty_is_data_or_zero_and_what_is_clean_is_neither() {
        let (data, hole, zero) = (0, 3, 2);
        let found = overlay(
            &[(10, 1), (10, 0), (10, 1)],
            &[(5, data), (20, hole), (3, zero), (2, data)],
        );
        let expected = [
            (5, Content::Data),
            (5, Content::Zero),
            (10, Content::Clean),
            (8, Content::Zero),
            (2, Content::Data),
        ];
        let expected = expected.map(|(length, content)| Stretch { length, content });
        assert_eq!(found, expected);
    }

    #[test]
    fn a_hole_that_does_not_read_as_zeroes_is_fetched() {
        let hole = u64::from(proto::STATE_HOLE);
        let stretches = overlay(&[(4096, 1)], &[(4096, hole)]);
        assert_eq!(stretches[0].content, Content::Data);
    }
}
