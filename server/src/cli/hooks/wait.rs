//! Waiting for one thing, with a deadline, for as long as somebody wants it.

use std::os::fd::{AsFd, BorrowedFd};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};

/// For how long something is waited for, and for whom.
#[derive(Clone, Copy, Debug)]
pub(super) struct Limit<'a> {
    deadline: Instant,
    /// Readable as soon as nobody wants it any more.
    client: Option<BorrowedFd<'a>>,
}

/// How a wait ended.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Wait {
    /// It is there.
    Ready,
    /// The deadline is over.
    Late,
    /// Nobody wants it any more.
    Abandoned,
}

impl<'a> Limit<'a> {
    /// So long from now on.
    pub(super) fn within(time: Duration) -> Self {
        let now = Instant::now();
        // Longer than any machine runs.
        let deadline = now.checked_add(time).unwrap_or(now + FOREVER);
        Self {
            deadline,
            client: None,
        }
    }

    /// Only for as long as `client` neither speaks nor hangs up.
    pub(super) fn unless(self, client: Option<BorrowedFd<'a>>) -> Self {
        Self { client, ..self }
    }

    /// Whether the deadline is over.
    pub(super) fn is_over(&self) -> bool {
        Instant::now() >= self.deadline
    }

    /// Waits until `fd` can be read, or its other end is closed.
    pub(super) fn readable(&self, fd: BorrowedFd<'_>) -> Wait {
        self.wait(Some(fd), PollFlags::IN)
    }

    /// Waits until `fd` can be written.
    pub(super) fn writable(&self, fd: BorrowedFd<'_>) -> Wait {
        self.wait(Some(fd), PollFlags::OUT)
    }

    /// Waits before something is tried again.
    pub(super) fn pause(&self) -> Wait {
        let pause = Self {
            deadline: self.deadline.min(Instant::now() + PAUSE),
            ..*self
        };
        match pause.wait(None, PollFlags::empty()) {
            Wait::Late if !self.is_over() => Wait::Ready,
            end => end,
        }
    }

    fn wait(&self, fd: Option<BorrowedFd<'_>>, flags: PollFlags) -> Wait {
        loop {
            let mut fds = Vec::with_capacity(2);
            fds.extend(fd.map(|fd| PollFd::from_borrowed_fd(fd, flags)));
            fds.extend(
                self.client
                    .map(|fd| PollFd::from_borrowed_fd(fd, PollFlags::IN)),
            );
            let left = self.deadline.saturating_duration_since(Instant::now());
            let left = Timespec::try_from(left).expect("less than FOREVER and a bit");
            match poll(&mut fds, Some(&left)) {
                Err(rustix::io::Errno::INTR) => {}
                // There is no memory to wait with; what was waited for is tried instead.
                Err(_) => {
                    return if self.is_over() {
                        Wait::Late
                    } else {
                        Wait::Ready
                    };
                }
                Ok(0) => return Wait::Late,
                Ok(_) if fd.is_some() && !fds[0].revents().is_empty() => return Wait::Ready,
                Ok(_) => return Wait::Abandoned,
            }
        }
    }
}

/// Waits until a process has ended, of which this is the descriptor.
pub(super) fn ended(process: &impl AsFd, limit: &Limit<'_>) -> Wait {
    limit.readable(process.as_fd())
}

/// Soon enough for a guest that is held, rare enough to cost nothing.
const PAUSE: Duration = Duration::from_millis(50);

/// A hundred years.
const FOREVER: Duration = Duration::from_secs(100 * 365 * 86_400);
