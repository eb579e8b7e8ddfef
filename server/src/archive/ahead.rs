//! Reading a file piece by piece, some pieces ahead of whoever looks at them.
//!
//! Past the page cache: what comes then comes from the device, and costs no memory for pages that nobody
//! looks at twice. A read past the cache that its thread waits for has the file to itself meanwhile, and
//! whoever writes to it waits too; the ring of the kernel's lets go when it has asked the device. So where
//! there is no ring, the page cache is read, which the kernel is told to fill.

use std::collections::VecDeque;
use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::sync::Arc;
use std::sync::mpsc::Receiver;

use block::{Buffer, Engine};
use rustix::fs::{Advice, OFlags, fadvise};
use tokio::runtime::{Builder, Runtime};
use tokio::task::{JoinHandle, yield_now};

/// A piece of a file that was read.
pub(super) struct Piece<T> {
    /// What it was asked for as.
    pub(super) what: T,
    pub(super) offset: u64,
    /// Its bytes; zeroes if they cannot be read.
    pub(super) buffer: Buffer,
    /// Why they cannot be.
    pub(super) error: Option<String>,
}

/// A reader of a file.
pub(super) struct Ahead<'a, T> {
    file: &'a File,
    past_the_cache: Option<PastTheCache>,
    asked: VecDeque<(Wanted<T>, Option<Reading>)>,
    /// Memory that was used before.
    emptied: Receiver<Buffer>,
}

/// A piece to be read.
pub(super) struct Wanted<T> {
    pub(super) what: T,
    pub(super) offset: u64,
    pub(super) length: u64,
}

type Reading = JoinHandle<io::Result<Buffer>>;

/// The same file once more. Whoever reads here asks for whole blocks.
struct PastTheCache {
    file: Arc<File>,
    engine: Engine,
    runtime: Runtime,
}

impl<'a, T> Ahead<'a, T> {
    pub(super) fn of(file: &'a File, emptied: Receiver<Buffer>) -> Self {
        Self {
            file,
            past_the_cache: PastTheCache::of(file).ok(),
            asked: VecDeque::new(),
            emptied,
        }
    }

    /// The next piece, and reads of those that are `wanted` after it.
    pub(super) fn next(&mut self, wanted: &mut dyn Iterator<Item = Wanted<T>>) -> Option<Piece<T>> {
        while (self.asked.len() < 2 || self.ahead() < AHEAD)
            && let Some(wanted) = wanted.next()
        {
            let reading = self.ask(&wanted);
            self.asked.push_back((wanted, reading));
        }
        let (wanted, reading) = self.asked.pop_front()?;
        let past_the_cache = self.past_the_cache.as_ref().zip(reading);
        let read = past_the_cache.and_then(|(file, reading)| file.outcome(reading));
        let mut error = None;
        let buffer = read.unwrap_or_else(|| {
            let mut buffer = self.memory(wanted.length);
            // What is wrong with a read, such as that the file ends within a block, is for the page
            // cache to say.
            error = read_cached(self.file, &mut buffer, wanted.offset);
            buffer
        });
        let Wanted { what, offset, .. } = wanted;
        Some(Piece {
            what,
            offset,
            buffer,
            error,
        })
    }

    fn ahead(&self) -> u64 {
        self.asked.iter().map(|(wanted, _)| wanted.length).sum()
    }

    fn ask(&self, wanted: &Wanted<T>) -> Option<Reading> {
        if let Some(file) = &self.past_the_cache {
            return Some(file.ask(wanted.offset, self.memory(wanted.length)));
        }
        let length = wanted.length.try_into().ok();
        let _ = fadvise(self.file, wanted.offset, length, Advice::WillNeed);
        None
    }

    fn memory(&self, length: u64) -> Buffer {
        let emptied = self.emptied.try_recv().ok();
        let emptied = emptied.filter(|buffer| buffer.len() as u64 == length);
        emptied.unwrap_or_else(|| Buffer::of(length as usize))
    }

    /// Lets the page cache forget a piece.
    pub(super) fn forget(&self, offset: u64, length: u64) {
        if self.past_the_cache.is_none() {
            let _ = fadvise(self.file, offset, length.try_into().ok(), Advice::DontNeed);
        }
    }
}

impl PastTheCache {
    fn of(file: &File) -> io::Result<Self> {
        let engine = Engine::io_uring()?;
        let itself = format!("/proc/self/fd/{}", file.as_raw_fd());
        let flags = OFlags::DIRECT.bits().cast_signed();
        let file = File::options()
            .read(true)
            .custom_flags(flags)
            .open(itself)?;
        Ok(Self {
            file: Arc::new(file),
            engine,
            runtime: Builder::new_current_thread().enable_all().build()?,
        })
    }

    fn ask(&self, offset: u64, buffer: Buffer) -> JoinHandle<io::Result<Buffer>> {
        let (file, engine) = (Arc::clone(&self.file), self.engine);
        let read = async move { engine.read(&file, offset, buffer).await };
        self.runtime.spawn(read)
    }

    /// What was read, if it was.
    fn outcome(&self, read: JoinHandle<io::Result<Buffer>>) -> Option<Buffer> {
        let read = self.runtime.block_on(async {
            // What has been asked since goes to the kernel before anything is waited for.
            yield_now().await;
            yield_now().await;
            read.await
        });
        read.ok()?.ok()
    }
}

/// Fills the buffer, with zeroes if it cannot be read, and says why not.
pub(super) fn read_cached(file: &File, buffer: &mut [u8], offset: u64) -> Option<String> {
    let error = file.read_exact_at(buffer, offset).err()?;
    buffer.fill(0);
    match error.kind() {
        io::ErrorKind::UnexpectedEof => Some(ENDS.to_owned()),
        _ => Some(error.to_string()),
    }
}

/// Why what is beyond the end cannot be read.
pub(super) const ENDS: &str = "the file ends before";

/// How many bytes are asked for before they are looked at, so that a device never waits; or two pieces, if
/// those are longer.
const AHEAD: u64 = 4 << 20;

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use super::*;

    #[test]
    fn pieces_come_in_order_and_what_is_not_there_is_told_with_a_ring_and_without() {
        const LENGTH: u64 = 64 << 10;
        let file = tempfile::tempfile().unwrap();
        for number in 0..100 {
            let bytes = vec![number as u8; LENGTH as usize];
            file.write_all_at(&bytes, number * LENGTH).unwrap();
        }
        // The last one is cut, and nothing is where the next would be.
        file.set_len(100 * LENGTH - 1).unwrap();
        for is_past_the_cache in [true, false] {
            let (_empty, emptied) = mpsc::sync_channel(1);
            let mut ahead = Ahead::of(&file, emptied);
            assert!(ahead.past_the_cache.is_some(), "this machine has rings");
            if !is_past_the_cache {
                ahead.past_the_cache = None;
            }
            let mut wanted = (0..101).map(|number| Wanted {
                what: number,
                offset: number * LENGTH,
                length: LENGTH,
            });
            for number in 0..101 {
                let piece = ahead.next(&mut wanted).expect("there are more");
                assert_eq!((piece.what, piece.offset), (number, number * LENGTH));
                let is_there = number < 99;
                let expected = if is_there { number as u8 } else { 0 };
                assert!(piece.buffer.iter().all(|byte| *byte == expected));
                assert_eq!(piece.error.as_deref(), (!is_there).then_some(ENDS));
                ahead.forget(piece.offset, LENGTH);
            }
            assert!(ahead.next(&mut wanted).is_none());
        }
    }
}
