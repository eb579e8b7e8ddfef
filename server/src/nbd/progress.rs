//! Whether a client does its part: finishes what it began to send, and takes what it asked for.
//!
//! A client that owes nothing may be silent for as long as it likes; a guest often is. One that owes
//! something has to move some bytes in every stretch of the time that it is given, which is long
//! while it harms nobody, and short while others wait for what it holds.

use std::time::Duration;

use thiserror::Error;
use tokio::time::Instant;

use crate::limits::Limits;

/// What a client has moved lately.
#[derive(Debug)]
pub(super) struct Progress {
    taken: Window,
    sent: Window,
    idle: Window,
    patience: Patience,
}

/// What a connection is waiting for from its client.
#[derive(Clone, Copy, Debug)]
#[expect(
    clippy::struct_excessive_bools,
    reason = "each is a question of its own"
)]
pub(super) struct Owed {
    /// That it takes replies.
    pub(super) takes: bool,
    /// That it sends the rest of something.
    pub(super) sends: bool,
    /// Nothing, and nothing is under way for it or waits for its turn.
    pub(super) nothing: bool,
    /// What it holds is waited for by others.
    pub(super) in_the_way: bool,
}

/// Why a client is not waited for any longer.
#[derive(Clone, Copy, Debug, Eq, Error, PartialEq)]
pub(super) enum Lapse {
    #[error("the client takes no replies, for {0:?} now")]
    Deaf(Duration),
    #[error("the client leaves a request unfinished, for {0:?} now")]
    Unfinished(Duration),
    #[error("the client has done nothing for {0:?}")]
    Idle(Duration),
}

#[derive(Clone, Copy, Debug)]
struct Patience {
    stall: Duration,
    idle: Option<Duration>,
}

/// A time in which something is to move.
#[derive(Debug, Default)]
struct Window {
    /// Not set before it has been looked at.
    begun: Option<Instant>,
    moved: usize,
}

impl Progress {
    /// Of a client that may be idle for ever, or may not.
    pub(super) fn new(limits: &Limits, may_be_idle: bool) -> Self {
        Self {
            taken: Window::default(),
            sent: Window::default(),
            idle: Window::default(),
            patience: Patience {
                stall: limits.stall,
                idle: limits.idle.filter(|_| !may_be_idle),
            },
        }
    }

    /// The client has taken `bytes`, perhaps all that there were.
    pub(super) fn took(&mut self, bytes: usize, all: bool) {
        if all {
            self.taken = Window::default();
        } else {
            self.taken.count(bytes);
        }
        self.idle = Window::default();
    }

    /// The client has sent `bytes`.
    pub(super) fn sent(&mut self, bytes: usize) {
        self.sent.count(bytes);
        self.idle = Window::default();
    }

    /// The client has sent what it began.
    pub(super) fn completed(&mut self) {
        self.sent = Window::default();
    }

    /// When to look, seen from `now`; never, if that would tell nothing.
    pub(super) fn next_look(&self, owed: Owed, now: impl FnOnce() -> Instant) -> Option<Instant> {
        let watched = owed.takes || owed.sends || self.patience.idle.is_some();
        let often = [Some(self.patience.stall), self.patience.idle];
        let often = often.into_iter().flatten().min().unwrap_or(LOOK_MAX) / 4;
        watched.then(|| now() + often.min(LOOK_MAX))
    }

    /// Fails if the client has had its time.
    pub(super) fn look(&mut self, owed: Owed, now: Instant) -> Result<(), Lapse> {
        let stall = if owed.in_the_way {
            self.patience.stall.min(IN_THE_WAY_MAX)
        } else {
            self.patience.stall
        };
        if let Some(time) = self.taken.overdue(owed.takes, stall, now) {
            return Err(Lapse::Deaf(time));
        }
        if let Some(time) = self.sent.overdue(owed.sends, stall, now) {
            return Err(Lapse::Unfinished(time));
        }
        if let Some(patience) = self.patience.idle
            && let Some(time) = self.idle.overdue(owed.nothing, patience, now)
        {
            return Err(Lapse::Idle(time));
        }
        Ok(())
    }
}

impl Window {
    fn count(&mut self, bytes: usize) {
        self.moved += bytes;
        if self.moved >= WORTH_WAITING {
            // It begins anew with the next look, so that whoever moves much asks for no time.
            *self = Self::default();
        }
    }

    /// How long `owed` has been outstanding, if that is longer than `patience`.
    fn overdue(&mut self, owed: bool, patience: Duration, now: Instant) -> Option<Duration> {
        if !owed {
            *self = Self::default();
            return None;
        }
        let begun = *self.begun.get_or_insert(now);
        let time = now.saturating_duration_since(begun);
        (time >= patience).then_some(time)
    }
}

/// What a client has to move in its time, unless it is done with less: slower than any link that
/// one would pull a backup over, and far more than who sends byte by byte.
const WORTH_WAITING: usize = 64 << 10;

/// How long a client may hold without a move what others need: longer than a disk that a client
/// writes to makes it wait, as a rule.
const IN_THE_WAY_MAX: Duration = Duration::from_secs(5);

/// How exact all this is.
const LOOK_MAX: Duration = Duration::from_secs(1);

#[cfg(test)]
mod tests {
    use super::*;

    const NOTHING: Owed = Owed {
        takes: false,
        sends: false,
        nothing: true,
        in_the_way: false,
    };
    const REPLIES: Owed = Owed {
        takes: true,
        nothing: false,
        ..NOTHING
    };
    const REST: Owed = Owed {
        sends: true,
        nothing: false,
        ..NOTHING
    };

    fn progress(may_be_idle: bool) -> Progress {
        let limits = Limits {
            handshake: Duration::MAX,
            connections: 1,
            peer_connections: 1,
            requests: 1,
            request_bytes: 1,
            buffers: 1,
            idle: Some(Duration::from_secs(60)),
            stall: Duration::from_secs(20),
        };
        Progress::new(&limits, may_be_idle)
    }

    /// When a client is given up that owes this and moves so much each second.
    fn given_up(progress: &mut Progress, owed: Owed, moved: usize) -> Option<(u64, Lapse)> {
        let begun = Instant::now();
        for second in 0..200 {
            let looked = progress.look(owed, begun + Duration::from_secs(second));
            if let Err(lapse) = looked {
                return Some((second, lapse));
            }
            if moved > 0 && owed.takes {
                progress.took(moved, false);
            } else if moved > 0 {
                progress.sent(moved);
            }
        }
        None
    }

    #[test]
    fn who_owes_something_has_to_move() {
        let time = Duration::from_secs(20);
        for slow in [0, 1, 1 << 10] {
            let found = given_up(&mut progress(true), REPLIES, slow);
            assert_eq!(
                found,
                Some((20, Lapse::Deaf(time))),
                "{slow} bytes a second"
            );
            let found = given_up(&mut progress(true), REST, slow);
            assert_eq!(found, Some((20, Lapse::Unfinished(time))), "{slow}");
        }
        assert_eq!(given_up(&mut progress(true), REPLIES, 16 << 10), None);
        assert_eq!(given_up(&mut progress(true), REST, 16 << 10), None);
    }

    #[test]
    fn who_holds_what_others_need_has_less_time() {
        let owed = Owed {
            in_the_way: true,
            ..REPLIES
        };
        let found = given_up(&mut progress(true), owed, 1);
        assert_eq!(found, Some((5, Lapse::Deaf(IN_THE_WAY_MAX))));
    }

    #[test]
    fn only_who_may_not_be_idle_is_given_up_for_it() {
        assert_eq!(given_up(&mut progress(true), NOTHING, 0), None);
        let found = given_up(&mut progress(false), NOTHING, 0);
        assert_eq!(found, Some((60, Lapse::Idle(Duration::from_secs(60)))));
        assert_eq!(given_up(&mut progress(false), NOTHING, 1), None);
        assert!(progress(true).next_look(NOTHING, Instant::now).is_none());
    }
}
