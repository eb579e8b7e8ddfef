//! Reading a file piece by piece, some pieces ahead of whoever looks at them.
//!
//! Past the page cache where the file system can: what comes then comes from the device, and costs no
//! memory for pages that nobody looks at twice. Such a read has the file to itself while its thread waits
//! for it, and whoever writes to the file waits too; the ring of the kernel's lets go when it has asked the
//! device. So where there is a ring, it is asked ahead; where there is none, whoever wants a piece waits.

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
    ring: Option<Ring>,
}

/// What can be asked without waiting for the answer.
struct Ring {
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
        let (buffer, error) = self.read(&wanted, reading);
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

    /// Has it on the way, where that can be.
    fn ask(&self, wanted: &Wanted<T>) -> Option<Reading> {
        let Some(PastTheCache { file, ring }) = &self.past_the_cache else {
            let length = wanted.length.try_into().ok();
            let _ = fadvise(self.file, wanted.offset, length, Advice::WillNeed);
            return None;
        };
        let ring = ring.as_ref()?;
        Some(ring.ask(file, wanted.offset, self.memory(wanted.length)))
    }

    /// Its bytes, and what went wrong with reading them.
    fn read(&self, wanted: &Wanted<T>, reading: Option<Reading>) -> (Buffer, Option<String>) {
        let direct = self.past_the_cache.as_ref();
        if let Some(reading) = reading
            && let Some(ring) = direct.and_then(|it| it.ring.as_ref())
            && let Some(buffer) = ring.outcome(reading)
        {
            return (buffer, None);
        }
        let mut buffer = self.memory(wanted.length);
        let is_read =
            direct.is_some_and(|it| it.file.read_exact_at(&mut buffer, wanted.offset).is_ok());
        // What is wrong with a read, such as that the file ends within a block, is for the page cache
        // to say.
        let error = if is_read {
            None
        } else {
            read_cached(self.file, &mut buffer, wanted.offset)
        };
        (buffer, error)
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
        let itself = format!("/proc/self/fd/{}", file.as_raw_fd());
        let flags = OFlags::DIRECT.bits().cast_signed();
        let file = File::options()
            .read(true)
            .custom_flags(flags)
            .open(itself)?;
        Ok(Self {
            file: Arc::new(file),
            ring: Ring::new().ok(),
        })
    }
}

impl Ring {
    fn new() -> io::Result<Self> {
        Ok(Self {
            engine: Engine::io_uring()?,
            runtime: Builder::new_current_thread().enable_all().build()?,
        })
    }

    fn ask(&self, file: &Arc<File>, offset: u64, buffer: Buffer) -> Reading {
        let (file, engine) = (Arc::clone(file), self.engine);
        let read = async move { engine.read(&file, offset, buffer).await };
        self.runtime.spawn(read)
    }

    /// What was read, if it was.
    fn outcome(&self, reading: Reading) -> Option<Buffer> {
        let read = self.runtime.block_on(async {
            // What has been asked since goes to the kernel before anything is waited for.
            yield_now().await;
            yield_now().await;
            reading.await
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
    fn pieces_come_in_order_and_what_is_not_there_is_told_whatever_way_is_there() {
        const LENGTH: u64 = 64 << 10;
        let file = tempfile::tempfile().unwrap();
        for number in 0..100 {
            let bytes = vec![number as u8; LENGTH as usize];
            file.write_all_at(&bytes, number * LENGTH).unwrap();
        }
        // The last one is cut, and nothing is where the next would be.
        file.set_len(100 * LENGTH - 1).unwrap();
        for way in ["ring", "direct", "cached"] {
            let (_empty, emptied) = mpsc::sync_channel(1);
            let mut ahead = Ahead::of(&file, emptied);
            let past_the_cache = ahead.past_the_cache.as_mut().expect("a file on a device");
            assert!(past_the_cache.ring.is_some(), "this machine has rings");
            match way {
                "ring" => {}
                "direct" => past_the_cache.ring = None,
                _ => ahead.past_the_cache = None,
            }
            let mut wanted = (0..101).map(|number| Wanted {
                what: number,
                offset: number * LENGTH,
                length: LENGTH,
            });
            for number in 0..101 {
                let piece = ahead.next(&mut wanted).expect("there are more");
                assert_eq!(
                    (piece.what, piece.offset),
                    (number, number * LENGTH),
                    "{way}"
                );
                let is_there = number < 99;
                let expected = if is_there { number as u8 } else { 0 };
                assert!(piece.buffer.iter().all(|byte| *byte == expected), "{way}");
                assert_eq!(piece.error.as_deref(), (!is_there).then_some(ENDS), "{way}");
                ahead.forget(piece.offset, LENGTH);
            }
            assert!(ahead.next(&mut wanted).is_none());
        }
    }
}
