//! A block status of only some contexts: the one request besides a write that has a payload.

use bytes::{Buf, BufMut, Bytes, BytesMut};

use crate::extents::ContextId;
use crate::option::QUERIES_MAX;

/// The payload of a block status that asks for some of the chosen contexts.
///
/// The length in its header is the payload's own, so what it is about stands here.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct ContextFilter {
    /// How long the range is that is asked about.
    pub length: u64,
    /// What to answer for.
    pub contexts: Vec<ContextId>,
}

impl ContextFilter {
    /// The payload as it is sent.
    pub fn encode(&self) -> Bytes {
        let mut payload = BytesMut::with_capacity(8 + 4 * self.contexts.len());
        payload.put_u64(self.length);
        for id in &self.contexts {
            payload.put_u32(id.0);
        }
        payload.freeze()
    }

    /// Reads a payload, or returns `None` if it has no length or ends within an id.
    pub fn decode(mut payload: Bytes) -> Option<Self> {
        let length = payload.try_get_u64().ok()?;
        let mut contexts = Vec::with_capacity(payload.len() / 4);
        while payload.has_remaining() {
            contexts.push(ContextId(payload.try_get_u32().ok()?));
        }
        Some(Self { length, contexts })
    }
}

/// The longest that can be right: every context that a session can have, once.
pub(crate) const FILTER_MAX: u64 = 8 + 4 * QUERIES_MAX as u64;

#[cfg(test)]
mod tests {
    use super::{Bytes, ContextFilter, ContextId};

    #[test]
    fn a_filter_survives_the_wire_and_half_an_id_is_none() {
        let filter = ContextFilter {
            length: 1 << 40,
            contexts: vec![ContextId(7), ContextId(1)],
        };
        let payload = filter.encode();
        assert_eq!(&payload[..], b"\0\0\x01\0\0\0\0\0\0\0\0\x07\0\0\0\x01");
        assert_eq!(ContextFilter::decode(payload.clone()), Some(filter));
        for cut in [0, 7, 9, 15] {
            assert_eq!(ContextFilter::decode(payload.slice(..cut)), None, "{cut}");
        }
        let empty = ContextFilter::decode(Bytes::from_static(&[0; 8]));
        assert!(empty.is_some_and(|filter| filter.contexts.is_empty()));
    }
}
