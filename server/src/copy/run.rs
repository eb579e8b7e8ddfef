//! Fetches what a target lacks.

use std::collections::VecDeque;
use std::num::NonZero;
use std::rc::Rc;
use std::sync::Arc;
use std::thread::available_parallelism;

use proto::client::Piece;
use thiserror::Error;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::task::{JoinError, JoinSet, spawn_blocking};

use super::source::{Source, SourceError};
use super::target::Target;
use crate::archive::{self, ArchiveError, Chunk};

/// Hears how far a copy is.
pub(crate) trait Progress {
    /// So many more bytes of a disk, counted as they are given to [`run`], are stored.
    fn copied(&self, disk: usize, bytes: u64);
}

/// Why a copy is not complete.
#[derive(Debug, Error)]
pub(crate) enum CopyError {
    /// It cannot be read. Which disk, as they are counted in [`run`].
    #[error("{1}")]
    Source(usize, #[source] SourceError),
    /// It cannot be stored.
    #[error(transparent)]
    Archive(#[from] ArchiveError),
    /// A thread that stored something ended before it was done.
    #[error("a copying thread has ended early: {0}")]
    Thread(#[from] JoinError),
}

/// Fetches what each target lacks from its source.
///
/// What is under way is bounded in bytes, and what is read is hashed and stored on other threads. Each
/// chunk that is stored stays: after an error, or when this is dropped, another run has the rest to
/// do. It runs in a local set, and its sources are read by tasks of that.
pub(crate) async fn run<S: Source + 'static, T: Target>(
    disks: Vec<(Rc<S>, Arc<T>)>,
    progress: Arc<dyn Progress>,
) -> Result<(), CopyError> {
    let in_flight_max = in_flight_max(disks.iter().map(|(_, target)| target.data_bytes()).sum());
    let room = Arc::new(Semaphore::new(in_flight_max as usize));
    let storing = Arc::new(Semaphore::new(storing_max()));
    let mut under_way: JoinSet<Result<(), CopyError>> = JoinSet::new();

    // The disks take turns, so that all of them get on.
    let mut waiting: VecDeque<_> = disks.iter().map(|(_, target)| target.missing()).collect();
    let mut turns: VecDeque<usize> = (0..disks.len()).collect();
    while let Some(disk) = turns.pop_front() {
        let Some(chunk) = waiting[disk].next() else {
            continue;
        };
        turns.push_back(disk);
        let length = chunk.bytes();
        // One that is longer than all there is has the room for itself.
        let wanted = u32::try_from(length).unwrap_or(u32::MAX).min(in_flight_max);
        let room = Arc::clone(&room).acquire_many_owned(wanted).await;
        let fetch = Fetch {
            source: Rc::clone(&disks[disk].0),
            target: Arc::clone(&disks[disk].1),
            disk,
            chunk,
            length,
            _room: room.expect("it is never closed"),
        };
        // Whoever failed has given its room back, so this is asked soon enough.
        while let Some(ended) = under_way.try_join_next() {
            end(ended, &mut under_way).await?;
        }
        let (storing, progress) = (Arc::clone(&storing), Arc::clone(&progress));
        under_way.spawn_local(fetch.perform(storing, progress));
    }
    while let Some(ended) = under_way.join_next().await {
        end(ended, &mut under_way).await?;
    }
    Ok(())
}

type Ended = Result<Result<(), CopyError>, JoinError>;

/// What came of one fetch. If it failed, the others come to their ends too before that is told: so
/// nothing is stored any more.
async fn end(
    ended: Ended,
    under_way: &mut JoinSet<Result<(), CopyError>>,
) -> Result<(), CopyError> {
    let failed = match ended {
        Ok(Ok(())) => return Ok(()),
        Ok(Err(error)) => error,
        Err(error) => error.into(),
    };
    while under_way.join_next().await.is_some() {}
    Err(failed)
}

/// One chunk on its way.
struct Fetch<S, T> {
    source: Rc<S>,
    target: Arc<T>,
    disk: usize,
    chunk: Chunk,
    length: u64,
    /// Given back when the chunk is stored.
    _room: OwnedSemaphorePermit,
}

impl<S: Source, T: Target> Fetch<S, T> {
    async fn perform(
        self,
        storing: Arc<Semaphore>,
        progress: Arc<dyn Progress>,
    ) -> Result<(), CopyError> {
        let Self {
            source,
            target,
            disk,
            chunk,
            length,
            _room,
        } = self;
        let read = source.read(&chunk.runs).await;
        let pieces = read.map_err(|error| CopyError::Source(disk, error))?;
        let pieces: Vec<_> = pieces.into_iter().map(stored).collect();
        let turn = storing.acquire_owned().await;
        let store = spawn_blocking(move || {
            let _turn = turn;
            target.put(&chunk, &pieces)
        });
        store.await??;
        progress.copied(disk, length);
        Ok(())
    }
}

fn stored(piece: Piece) -> archive::Piece {
    match piece {
        Piece::Data { data, .. } => archive::Piece::Data(data),
        Piece::Hole { length, .. } => archive::Piece::Zero(length),
    }
}

/// As many as there are processors: hashing is what they wait for.
fn storing_max() -> usize {
    available_parallelism().map_or(1, NonZero::get)
}

/// How many bytes may be asked for and not stored yet. They are what a copy that is killed has read in
/// vain: so of a small copy they are a small part.
fn in_flight_max(all: u64) -> u32 {
    let part = (all / 32).clamp(IN_FLIGHT_MIN.into(), IN_FLIGHT_MAX.into());
    u32::try_from(part).expect("it is no more than the maximum")
}

/// What a fast network holds, and more than a disk is asked for at once.
const IN_FLIGHT_MAX: u32 = 32 << 20;

/// Enough for several connections to have something to do.
const IN_FLIGHT_MIN: u32 = 4 << 20;
