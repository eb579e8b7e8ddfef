//! Reading back what is stored of a disk, while the rest of it still comes.
//!
//! What has come without a gap is made durable and dropped from the page cache, a stretch at a time, and
//! only then read: so what is compared with the hash of what was received comes from where it will be
//! read one day. Done beside the copy, it leaves little to wait for when the last chunk has come.

use std::iter;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};

use rustix::fs::{Advice, fadvise};

use super::chunk::{self, Chunk};
use super::draft::DiskDraft;
use super::error::ArchiveError;
use super::inspect::{Expected, Inspection, Stretch, inspect};
use super::progress::Progress;

/// Reads back all of a disk. What has not come yet is waited for.
pub(super) fn read_back(
    disk: &DiskDraft,
    progress: &dyn Progress,
) -> Result<Inspection, ArchiveError> {
    let map = &disk.map;
    let mut coming = Coming {
        disk,
        rest: Box::new(chunk::chunks(&map.data, map.chunk_size)),
        end: 0,
        failed: None,
    };
    // The tables are read before the first chunk, and settle with it.
    let first = coming.settle()?;
    let expected = Expected {
        layout: &map.layout,
        cluster_size: map.cluster_size,
        stretches: &mut iter::once(first).chain(&mut coming),
    };
    let found = inspect(&disk.file, expected, progress)?;
    match coming.failed {
        None => Ok(found),
        Some(error) => Err(error),
    }
}

/// The chunks of a disk with their hashes, ascending, by stretches: each is durable when it comes, and not
/// in the page cache.
struct Coming<'a> {
    disk: &'a DiskDraft,
    rest: Box<dyn Iterator<Item = Chunk> + 'a>,
    /// Where in the file the last of them ends.
    end: u64,
    /// Why there are no more, if not because that was all.
    failed: Option<ArchiveError>,
}

impl Coming<'_> {
    /// Waits for the next stretch, and makes it durable with all that was stored before it.
    fn settle(&mut self) -> Result<Stretch, ArchiveError> {
        let DiskDraft { map, records, .. } = self.disk;
        let (start, mut stretch) = (self.end, Stretch::new());
        while self.end - start < STRETCH {
            let Some(chunk) = self.rest.next() else {
                break;
            };
            let hash = records.wait_for(chunk.index);
            let hash = hash.ok_or(ArchiveError::Stopped)?;
            let end = map.host(&chunk) + chunk.bytes();
            self.end = end.next_multiple_of(map.cluster_size);
            stretch.push((chunk, hash));
        }
        let DiskDraft { file, path, .. } = self.disk;
        let synced = file.sync_data();
        synced.map_err(|error| ArchiveError::writing(path, error))?;
        // It is advice: in a file system in memory there is no other place.
        let length = (self.end - start).try_into().ok();
        let _ = fadvise(file, start, length, Advice::DontNeed);
        Ok(stretch)
    }
}

impl Iterator for Coming<'_> {
    type Item = Stretch;

    fn next(&mut self) -> Option<Stretch> {
        match self.settle() {
            Ok(stretch) => Some(stretch).filter(|stretch| !stretch.is_empty()),
            Err(error) => {
                self.failed = Some(error);
                None
            }
        }
    }
}

/// A thread that reads back what comes of a disk.
#[derive(Debug)]
pub(super) struct Follower {
    disk: Arc<DiskDraft>,
    is_given_up: Arc<AtomicBool>,
    /// None when it has been joined.
    thread: Option<JoinHandle<Result<Inspection, ArchiveError>>>,
}

impl Follower {
    /// Begins, unless there is no thread to be had.
    pub(super) fn of(disk: &Arc<DiskDraft>, progress: Arc<dyn Progress>) -> Option<Self> {
        let is_given_up = Arc::new(AtomicBool::new(false));
        let watched = Watched {
            progress,
            is_given_up: Arc::clone(&is_given_up),
        };
        let followed = Arc::clone(disk);
        let follow = move || read_back(&followed, &watched);
        let thread = thread::Builder::new().name("read back".to_owned());
        Some(Self {
            disk: Arc::clone(disk),
            is_given_up,
            thread: Some(thread.spawn(follow).ok()?),
        })
    }

    /// What it has found, when it has read all. To be called when all has come.
    pub(super) fn outcome(mut self) -> Result<Inspection, ArchiveError> {
        let thread = self.thread.take().expect("it is joined once");
        thread.join().expect("reading back does not panic")
    }
}

impl Drop for Follower {
    fn drop(&mut self) {
        if let Some(thread) = self.thread.take() {
            self.is_given_up.store(true, Ordering::Relaxed);
            self.disk.records.give_up();
            // What it has found is of no use.
            let _ = thread.join();
        }
    }
}

/// What is told of progress, by a thread that nobody may wait for any more.
struct Watched {
    progress: Arc<dyn Progress>,
    is_given_up: Arc<AtomicBool>,
}

impl Progress for Watched {
    fn checked(&self, bytes: u64) {
        self.progress.checked(bytes);
    }

    fn is_stopped(&self) -> bool {
        self.is_given_up.load(Ordering::Relaxed) || self.progress.is_stopped()
    }
}

/// What is made durable at once: for a file system that has to write its journal each time that is little
/// to do, and for whoever waits for the last stretch it is not long.
const STRETCH: u64 = 64 << 20;
