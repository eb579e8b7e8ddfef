//! One request, from what was asked to the bytes of its reply.

use std::cell::Cell;
use std::io;
use std::ops::Range;

use block::{Buffer, Zeroing, is_zero};
use bytes::{Bytes, BytesMut};
use proto::{Command, ContextId, Errno, Origin, Replies};
use tokio::sync::Semaphore;

use super::block_status::Question;
use super::output::Reply;
use crate::disk::Disk;
use crate::export::{Context, Export, ExportError};
use crate::files::Files;

/// What all requests of a connection are about.
pub(super) struct Target {
    /// Whose requests they are, and the name of the export: for the log.
    pub(super) peer: String,
    pub(super) name: String,
    pub(super) export: Export,
    pub(super) contexts: Vec<(ContextId, Context)>,
    pub(super) replies: Replies,
    /// The client has gone or the server stops: what is long enough to have steps ends after one.
    pub(super) leaving: Cell<bool>,
    /// Whoever has its permit asks contexts. Closed when nobody hears the answers any more.
    pub(super) asking: Semaphore,
}

impl Target {
    /// Does what `command` says and returns `reply` with the answer appended.
    pub(super) async fn perform(
        &self,
        origin: Origin,
        command: Command,
        mut reply: Reply,
    ) -> Reply {
        let begun = reply.first_bytes();
        let asks = Asks::of(&command);
        let outcome = match command {
            Command::Read {
                range,
                do_not_fragment,
            } => self.read(origin, range, do_not_fragment, &mut reply).await,
            Command::BlockStatus {
                range,
                contexts,
                one,
            } => {
                let question = Question {
                    range,
                    contexts,
                    one,
                };
                self.block_status(origin, &question, reply.end()).await
            }
            other => self
                .change(other)
                .await
                .map(|()| self.replies.ok(reply.end(), origin)),
        };
        if let Err(error) = outcome {
            // Whatever of the answer there was is worth nothing.
            reply.truncate(begun);
            self.fail(origin, asks, &error, reply.end());
        }
        reply
    }

    /// The answer to a request that came to nothing.
    pub(super) fn failed(&self, origin: Origin, error: &ExportError) -> Reply {
        let mut reply = Reply::default();
        self.fail(origin, Asks::Answer, error, reply.end());
        reply
    }

    fn fail(&self, origin: Origin, asks: Asks, error: &ExportError, reply: &mut BytesMut) {
        let errno = errno_of(asks, error);
        let (peer, export) = (&self.peer, &self.name);
        // Here the cause is known for the last time, unless it was told when it happened.
        match error {
            ExportError::Io(_) => {
                tracing::warn!(%peer, export, %error, ?errno, "a request failed");
            }
            ExportError::Ended | ExportError::Broken(_) | ExportError::GivenUp => {
                tracing::debug!(%peer, export, %error, ?errno, "a request failed");
            }
        }
        self.replies.error(reply, origin, errno, &error.to_string());
    }

    async fn read(
        &self,
        origin: Origin,
        range: Range<u64>,
        do_not_fragment: bool,
        reply: &mut Reply,
    ) -> Result<(), ExportError> {
        let (start, length) = (range.start, (range.end - range.start) as usize);
        if length < LONG_MIN {
            let end = reply.end();
            self.replies
                .begin_data(end, origin, start, length as u64, true);
            let head = end.len();
            end.resize(head + length, 0);
            return self.export.read(start, &mut end[head..]).await;
        }
        let mut data = Buffer::of(length);
        self.export.read(start, &mut data).await?;
        let mut runs = Vec::new();
        if self.replies.may_fragment() && !do_not_fragment {
            runs = zero_runs(start, &data);
        }
        let data = Bytes::from_owner(data);
        if runs.iter().any(|run| run.zero) {
            fragments(self.replies, origin, start, &data, &runs, reply);
        } else {
            self.replies
                .begin_data(reply.end(), origin, start, length as u64, true);
            reply.append(data, length);
        }
        Ok(())
    }

    async fn change(&self, command: Command) -> Result<(), ExportError> {
        let disk = match &self.export {
            Export::Live(disk) => &disk.disk,
            Export::Frozen(_) | Export::Difference(..) => return self.keep(command).await,
        };
        match command {
            Command::Write { range, data, fua } => {
                disk.write(range.start, data).await?;
                flush_if(disk, fua).await?;
            }
            Command::WriteZeroes {
                range,
                fua,
                no_hole,
                fast,
            } => {
                let how = match (no_hole, fast) {
                    (false, false) => Zeroing::MayUnmap,
                    (true, false) => Zeroing::Keep,
                    (false, true) => Zeroing::FastMayUnmap,
                    (true, true) => Zeroing::FastKeep,
                };
                self.zero(disk, range, how).await?;
                flush_if(disk, fua).await?;
            }
            Command::Trim { range, fua } => {
                match self.zero(disk, range, Zeroing::FastMayUnmap).await {
                    // A trim is advice: storage that cannot take it keeps its bytes.
                    Err(ExportError::Io(error)) if error.kind() == io::ErrorKind::Unsupported => {}
                    other => other?,
                }
                flush_if(disk, fua).await?;
            }
            Command::Flush => disk.flush().await?,
            Command::Cache { range } => self.prefetch(range).await?,
            // The two that answer more than yes or no are performed above.
            Command::Read { .. } | Command::BlockStatus { .. } => {}
        }
        Ok(())
    }

    /// What can be asked of an export that never changes.
    async fn keep(&self, command: Command) -> Result<(), ExportError> {
        match command {
            Command::Cache { range } => self.prefetch(range).await,
            Command::Flush => Ok(()),
            // Admission lets no change through to a read-only export; nothing is changed here.
            _ => Err(io::Error::from(io::ErrorKind::PermissionDenied).into()),
        }
    }

    /// Zeroes a range of any length in steps, each of which is several writes.
    async fn zero(
        &self,
        disk: &Disk<Files>,
        range: Range<u64>,
        how: Zeroing,
    ) -> Result<(), ExportError> {
        for step in steps(&range, ZERO_STEP) {
            let more = step.end < range.end;
            disk.zero(step, how).await?;
            if more {
                self.pause().await?;
            }
        }
        Ok(())
    }

    /// Reads a range to have it in memory; of a long one its beginning.
    async fn prefetch(&self, range: Range<u64>) -> Result<(), ExportError> {
        let range = range.start..range.end.min(range.start + PREFETCH_MAX);
        let mut buffer = vec![0; PREFETCH_PIECE.min((range.end - range.start) as usize)];
        for step in steps(&range, PREFETCH_PIECE as u64) {
            let piece = &mut buffer[..(step.end - step.start) as usize];
            self.export.prefetch(step.start, piece).await?;
            if step.end < range.end {
                self.pause().await?;
            }
        }
        Ok(())
    }

    /// Lets others have their turn in the middle of something long, unless nobody waits for it.
    async fn pause(&self) -> Result<(), ExportError> {
        if self.leaving.get() {
            return Err(ExportError::GivenUp);
        }
        tokio::task::yield_now().await;
        Ok(())
    }
}

async fn flush_if(disk: &Disk<Files>, fua: bool) -> io::Result<()> {
    if fua { disk.flush().await } else { Ok(()) }
}

/// What a request asks, as far as errors differ.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Asks {
    Answer,
    Change,
    FastChange,
}

impl Asks {
    fn of(command: &Command) -> Self {
        match command {
            Command::Read { .. } | Command::BlockStatus { .. } | Command::Cache { .. } => {
                Self::Answer
            }
            Command::WriteZeroes { fast: true, .. } => Self::FastChange,
            _ => Self::Change,
        }
    }
}

/// What storage says is passed on where the protocol has it for such a request. Else a client would take it
/// for something that it is not: a server of an image may say anything.
fn errno_of(asks: Asks, error: &ExportError) -> Errno {
    match error {
        ExportError::Ended | ExportError::GivenUp => Errno::Shutdown,
        ExportError::Broken(_) => Errno::Io,
        ExportError::Io(error) => match (error.kind(), asks) {
            (_, Asks::Answer) => Errno::Io,
            (
                io::ErrorKind::StorageFull
                | io::ErrorKind::QuotaExceeded
                | io::ErrorKind::FileTooLarge,
                _,
            ) => Errno::NoSpc,
            (io::ErrorKind::PermissionDenied, _) => Errno::Perm,
            (io::ErrorKind::Unsupported, Asks::FastChange) => Errno::NotSup,
            _ => Errno::Io,
        },
    }
}

/// Appends `data` in pieces: holes where it is zero.
fn fragments(
    replies: Replies,
    origin: Origin,
    start: u64,
    data: &Bytes,
    runs: &[ZeroRun],
    reply: &mut Reply,
) {
    let is_sliced = |run: &ZeroRun| !run.zero && run.range.len() >= LONG_MIN;
    let last_slice = runs.iter().rposition(is_sliced);
    for (at, run) in runs.iter().enumerate() {
        let last = at + 1 == runs.len();
        let (offset, length) = (start + run.range.start as u64, run.range.len());
        let end = reply.end();
        if run.zero {
            replies.hole(end, origin, offset, length as u64, last);
            continue;
        }
        replies.begin_data(end, origin, offset, length as u64, last);
        if is_sliced(run) {
            let memory = if last_slice == Some(at) {
                data.len()
            } else {
                0
            };
            reply.append(data.slice(run.range.clone()), memory);
        } else {
            end.extend_from_slice(&data[run.range.clone()]);
        }
    }
}

/// Cuts `range` at multiples of `length`.
fn steps(range: &Range<u64>, length: u64) -> impl Iterator<Item = Range<u64>> {
    let Range { start: mut at, end } = *range;
    std::iter::from_fn(move || {
        let start = at;
        at = end.min((start / length + 1) * length);
        (start < end).then_some(start..at)
    })
}

/// A stretch of a buffer that is wholly zero, or is not.
pub(crate) struct ZeroRun {
    /// Where in the buffer.
    pub(crate) range: Range<usize>,
    /// Which of the two.
    pub(crate) zero: bool,
}

/// Cuts `data`, which begins at byte `start` of an export, at blocks that are wholly zero.
pub(crate) fn zero_runs(start: u64, data: &[u8]) -> Vec<ZeroRun> {
    let mut runs: Vec<ZeroRun> = Vec::new();
    let mut at = 0;
    while at < data.len() {
        let in_block = (start + at as u64) as usize % ZERO_BLOCK;
        let end = (at + ZERO_BLOCK - in_block).min(data.len());
        let zero = is_zero(&data[at..end]);
        match runs.last_mut() {
            Some(last) if last.zero == zero => last.range.end = end,
            _ => runs.push(ZeroRun {
                range: at..end,
                zero,
            }),
        }
        at = end;
    }
    runs
}

/// Shorter data is cheaper to copy than to send as a piece of its own, and a hole in it saves less than
/// it costs to find.
const LONG_MIN: usize = 32 << 10;

/// Shorter zeroes are sent as data: a chunk's head is 32 bytes, and receivers like blocks.
const ZERO_BLOCK: usize = 4096;

/// How much is read at a time when nobody waits for the bytes.
pub(super) const PREFETCH_PIECE: usize = 256 << 10;

/// The most that is read ahead for one request, which is advice: no cache is the better for more.
const PREFETCH_MAX: u64 = 1 << 30;

/// How much is zeroed before it is asked whether anybody still waits for it: one sync of the table
/// of regions, and what 16 writes take.
const ZERO_STEP: u64 = 64 << 20;

#[cfg(test)]
mod tests {
    use proto::{Cookie, Headers};
    use rustix::io::Errno as Kernel;

    use super::*;
    use crate::nbd::output::Output;

    #[test]
    fn quotas_and_limits_of_size_are_no_space() {
        for number in [Kernel::NOSPC, Kernel::DQUOT, Kernel::FBIG] {
            let error = ExportError::Io(number.into());
            assert_eq!(errno_of(Asks::Change, &error), Errno::NoSpc, "{number}");
            assert_eq!(errno_of(Asks::Answer, &error), Errno::Io, "{number}");
        }
    }

    #[test]
    fn what_the_protocol_has_for_other_requests_is_told_as_an_io_error() {
        let told = |number: Kernel, asks| errno_of(asks, &ExportError::Io(io::Error::from(number)));
        assert_eq!(told(Kernel::NOTSUP, Asks::FastChange), Errno::NotSup);
        assert_eq!(told(Kernel::NOTSUP, Asks::Change), Errno::Io);
        assert_eq!(told(Kernel::PERM, Asks::Change), Errno::Perm);
        assert_eq!(told(Kernel::PERM, Asks::Answer), Errno::Io);
        assert_eq!(told(Kernel::NOMEM, Asks::Change), Errno::Io);
    }

    #[test]
    fn slices_count_with_the_buffer_they_are_of() {
        let (long, short) = (LONG_MIN, ZERO_BLOCK);
        let origin = Origin {
            cookie: Cookie(1),
            offset: 0,
        };
        // Stretches that are not zero, each with zeroes behind it.
        for (stretches, whole) in [
            (&[long][..], true),
            (&[long, short], true),
            (&[long, short, long], true),
            (&[short, short], false),
        ] {
            let mut data = Vec::new();
            for &stretch in stretches {
                data.resize(data.len() + stretch, 1);
                data.resize(data.len() + 8 * LONG_MIN, 0);
            }
            let (runs, data) = (zero_runs(0, &data), Bytes::from(data));
            let mut reply = Reply::default();
            let replies = Replies::new(Headers::Structured);
            fragments(replies, origin, 0, &data, &runs, &mut reply);
            let mut output = Output::default();
            output.push(reply);
            let besides = output.memory() - if whole { data.len() } else { 0 };
            let copied = stretches.iter().filter(|&&it| it == short);
            assert!(
                besides < 1000 + copied.sum::<usize>(),
                "{stretches:?}: {besides}"
            );
        }
    }

    #[test]
    fn zero_runs_begin_and_end_at_blocks_of_the_export() {
        let mut data = vec![0; 5 * ZERO_BLOCK];
        data[0] = 1;
        data[3 * ZERO_BLOCK] = 1;
        let found: Vec<_> = zero_runs(512, &data)
            .into_iter()
            .map(|run| (run.range, run.zero))
            .collect();
        let border = ZERO_BLOCK - 512;
        let expected = [
            (0..border, false),
            (border..border + 2 * ZERO_BLOCK, true),
            (border + 2 * ZERO_BLOCK..border + 3 * ZERO_BLOCK, false),
            (border + 3 * ZERO_BLOCK..5 * ZERO_BLOCK, true),
        ];
        assert_eq!(found, expected);
    }
}
