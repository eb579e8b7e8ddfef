//! Requests that have been begun and not been answered, and what they hold meanwhile.

use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::sync::Arc;

use proto::{Command, EXTENTS_MAX, Errno, Origin, Replies};
use tokio::sync::Notify;

use super::output::Reply;
use super::perform::PREFETCH_PIECE;
use super::vigil::Waiting;

/// The requests of a connection that have been begun and not been answered.
pub(super) struct UnderWay {
    /// Those of all connections.
    waiting: Arc<Waiting>,
    pub(super) count: Cell<usize>,
    /// Bytes that they hold, or will hold when they end.
    pub(super) bytes: Cell<usize>,
    /// A short payload among them is a slice of what was received with it, and keeps all of that.
    pub(super) has_slice: Cell<bool>,
    /// The replies of those that have ended.
    pub(super) ended: RefCell<Vec<Reply>>,
    pub(super) news: Notify,
}

/// A request begun and not yet answered.
///
/// It is answered exactly once: by [`answer`](Self::answer), or with an I/O error if whoever held
/// it gave up. No client waits for ever.
#[must_use = "dropping a request answers it with an error"]
pub(super) struct Pending {
    under_way: Rc<UnderWay>,
    replies: Replies,
    origin: Origin,
    weight: usize,
    reply: Option<Reply>,
}

impl UnderWay {
    pub(super) fn new(waiting: &Arc<Waiting>) -> Rc<Self> {
        Rc::new(Self {
            waiting: Arc::clone(waiting),
            count: Cell::default(),
            bytes: Cell::default(),
            has_slice: Cell::default(),
            ended: RefCell::default(),
            news: Notify::default(),
        })
    }
}

impl Pending {
    pub(super) fn new(
        under_way: &Rc<UnderWay>,
        replies: Replies,
        origin: Origin,
        weight: usize,
    ) -> Self {
        under_way.waiting.begin();
        under_way.count.set(under_way.count.get() + 1);
        under_way.bytes.set(under_way.bytes.get() + weight);
        Self {
            under_way: Rc::clone(under_way),
            replies,
            origin,
            weight,
            reply: None,
        }
    }

    pub(super) fn answer(mut self, reply: Reply) {
        self.reply = Some(reply);
    }
}

impl Drop for Pending {
    fn drop(&mut self) {
        let reply = self.reply.take().unwrap_or_else(|| {
            let mut reply = Reply::default();
            self.replies.error(
                reply.end(),
                self.origin,
                Errno::Io,
                "the request was given up",
            );
            reply
        });
        self.under_way.waiting.end();
        self.under_way.count.set(self.under_way.count.get() - 1);
        self.under_way
            .bytes
            .set(self.under_way.bytes.get() - self.weight);
        self.under_way.ended.borrow_mut().push(reply);
        self.under_way.news.notify_one();
    }
}

/// How many bytes a request holds, or its reply may.
pub(super) fn weight(command: &Command) -> usize {
    match command {
        Command::Read { range, .. } => (range.end - range.start) as usize,
        Command::Write { data, .. } => data.len(),
        Command::BlockStatus {
            range,
            contexts,
            one,
        } => {
            let extents = if *one {
                1
            } else {
                (range.end - range.start) / EXTENT_MIN + 2
            };
            let all = extents.saturating_mul(contexts.len() as u64);
            all.min(EXTENTS_MAX as u64) as usize * EXTENT_BYTES
        }
        // A piece of it, once where it is put and once where it is read.
        Command::Cache { range } => 2 * PREFETCH_PIECE.min((range.end - range.start) as usize),
        _ => 0,
    }
}

/// What an extent takes: 16 bytes until it is in the reply, and there as many if it is extended.
const EXTENT_BYTES: usize = 32;

/// No file system tells smaller holes, and no map has smaller chunks.
const EXTENT_MIN: u64 = 512;

#[cfg(test)]
mod tests {
    use proto::ContextId;

    use super::*;

    #[test]
    fn a_cache_weighs_what_is_read_of_it_at_a_time() {
        let weigh = |length: u64| {
            let range = 4096..4096 + length;
            weight(&Command::Cache { range })
        };
        assert_eq!(weigh(512), 2 * 512);
        assert_eq!(weigh(1 << 40), 2 * PREFETCH_PIECE);
    }

    #[test]
    fn a_block_status_weighs_what_its_reply_may_take() {
        let weigh = |length: u64, one, contexts| {
            let range = 4096..4096 + length;
            let contexts = (0..contexts).map(ContextId).collect();
            weight(&Command::BlockStatus {
                range,
                contexts,
                one,
            })
        };
        assert_eq!(weigh(1 << 32, false, 3), EXTENTS_MAX * EXTENT_BYTES);
        assert_eq!(weigh(1 << 60, false, 1), EXTENTS_MAX * EXTENT_BYTES);
        assert!(weigh(64 << 10, false, 1) < 8 << 10);
        assert_eq!(weigh(1 << 32, true, 3), 3 * EXTENT_BYTES);
    }
}
