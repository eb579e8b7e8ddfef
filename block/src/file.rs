use std::cell::Cell;
use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::{FileExt, FileTypeExt};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use bytes::Bytes;
use rustix::fs::{
    Advice, AtFlags, FallocateFlags, OFlags, SeekFrom, StatxFlags, fadvise, fallocate, fcntl_getfl,
    seek, statx,
};
use rustix::io::{Errno, ReadWriteFlags, preadv2};

use crate::buffer::{ALIGNMENT, Buffer};
use crate::direct::Direct;
use crate::engine::{Data, Engine};
use crate::fiemap;
use crate::lock::ImageLock;
use crate::pool::blocking;
use crate::storage::{Extent, Storage, Zeroing};

/// A regular file or a block device, through the page cache or past it.
///
/// What the page cache can answer is done at once on the caller's thread; what may wait for a device
/// is left to an [`Engine`].
#[derive(Debug)]
pub struct FileStorage {
    file: Arc<File>,
    size: AtomicU64,
    device: bool,
    engine: Engine,
    /// Of a file that was opened for direct I/O: all access is.
    direct: Option<Direct>,
}

impl FileStorage {
    /// Takes over `file`, at the size that it has now. One that was opened with `O_DIRECT` is read
    /// and written past the page cache, whatever the offsets; its size must be
    /// [a multiple](Self::block) of what the file system takes.
    pub fn new(file: File, engine: Engine) -> io::Result<Self> {
        let direct = fcntl_getfl(&file)?.contains(OFlags::DIRECT);
        let direct = direct.then(|| Direct::new(direct_block(&file)));
        let device = file.metadata()?.file_type().is_block_device();
        let size = AtomicU64::new(length(&file, device)?);
        // Small writes cost several times less in a page cache that was not filled by read-ahead.
        // Advice that is not taken changes no result.
        let _ = fadvise(&file, 0, None, Advice::Random);
        Ok(Self {
            file: Arc::new(file),
            size,
            device,
            engine,
            direct,
        })
    }

    /// What all access is made of where it is direct, in bytes.
    pub fn block(&self) -> Option<u64> {
        self.direct.as_ref().map(Direct::block)
    }

    /// What does what may wait for a device.
    pub fn engine(&self) -> Engine {
        self.engine
    }

    /// The descriptor that all access goes through.
    pub fn file(&self) -> &File {
        &self.file
    }

    /// How long the file or the device is now, whoever made it so.
    pub fn length(&self) -> io::Result<u64> {
        length(&self.file, self.device)
    }

    /// Whether it is a block device.
    pub fn is_device(&self) -> bool {
        self.device
    }

    async fn zero_range(&self, range: Range<u64>, how: Zeroing) -> io::Result<()> {
        let flags = if how.unmaps() {
            FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE
        } else {
            FallocateFlags::ZERO_RANGE | FallocateFlags::KEEP_SIZE
        };
        // A device refuses what is not made of whole sectors; the edges are written.
        let aligned = if self.device {
            inner(&range, DEVICE_ALIGNMENT)
        } else {
            range.clone()
        };
        if !aligned.is_empty() {
            match self.allocate(aligned.clone(), flags).await {
                Err(error) if is_unsupported(&error) && how.fast() => {
                    return Err(io::ErrorKind::Unsupported.into());
                }
                Err(error) if is_unsupported(&error) => self.write_zeroes(aligned.clone()).await?,
                other => other?,
            }
        }
        for edge in edges(&range, &aligned) {
            self.write_zeroes(edge).await?;
        }
        Ok(())
    }

    async fn write_zeroes(&self, range: Range<u64>) -> io::Result<()> {
        let file = Arc::clone(&self.file);
        blocking(move || {
            let mut zeroes = Buffer::of(ZEROES_PIECE.min((range.end - range.start) as usize));
            zeroes.fill(0);
            let mut at = range.start;
            while at < range.end {
                let length = zeroes.len().min((range.end - at) as usize);
                file.write_all_at(&zeroes[..length], at)?;
                at += length as u64;
            }
            Ok(())
        })
        .await
    }

    async fn allocate(&self, range: Range<u64>, flags: FallocateFlags) -> io::Result<()> {
        let file = Arc::clone(&self.file);
        blocking(move || {
            Ok(fallocate(
                &*file,
                flags,
                range.start,
                range.end - range.start,
            )?)
        })
        .await
    }
}

impl Drop for FileStorage {
    /// Nobody waits for a read any more that a device still holds up, and which has the file open: the
    /// lock is not to outlive us with it. Of a write the outcome is waited for by who holds us.
    fn drop(&mut self) {
        ImageLock::release(&self.file);
    }
}

impl Storage for FileStorage {
    fn size(&self) -> u64 {
        self.size.load(Ordering::Acquire)
    }

    async fn grow(&self, size: u64) -> io::Result<()> {
        let (file, device) = (Arc::clone(&self.file), self.device);
        blocking(move || {
            let found = length(&file, device)?;
            match found {
                _ if found == size => Ok(()),
                // What is longer has been enlarged by someone else, and is never cut.
                _ if device || found > size => Err(io::Error::other(format!(
                    "it has {found} bytes, and is to have {size}"
                ))),
                _ => file.set_len(size),
            }
        })
        .await?;
        self.size.fetch_max(size, Ordering::AcqRel);
        Ok(())
    }

    async fn read(&self, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
        if let Some(direct) = &self.direct {
            return direct.read((&self.file, self.engine), offset, buffer).await;
        }
        let cached = read_cached(&self.file, offset, buffer)?;
        let mut at = offset + cached as u64;
        // In pieces, as each takes its size in memory once more.
        for piece in buffer[cached..].chunks_mut(READ_PIECE) {
            let engine = match piece.len() {
                ..=RING_READ_MAX => self.engine,
                _ => Engine::Threads,
            };
            let read = engine.read(&self.file, at, Buffer::of(piece.len())).await?;
            piece.copy_from_slice(&read);
            at += piece.len() as u64;
        }
        Ok(())
    }

    async fn write(&self, offset: u64, data: &Bytes) -> io::Result<()> {
        if let Some(direct) = &self.direct {
            return direct.write((&self.file, self.engine), offset, data).await;
        }
        if data.len() <= INLINE_WRITE_MAX && Pace::is_fast() {
            let begun = Instant::now();
            let result = self.file.write_all_at(data, offset);
            Pace::note(begun.elapsed());
            return result;
        }
        // The kernel would hand a write through the page cache to a thread of its own.
        let threads = Engine::Threads;
        threads
            .write(&self.file, offset, Data::Received(data.clone()))
            .await
    }

    async fn zero(&self, range: Range<u64>, how: Zeroing) -> io::Result<()> {
        match &self.direct {
            _ if range.is_empty() => Ok(()),
            None => self.zero_range(range, how).await,
            Some(direct) => {
                let whole = |range| self.zero_range(range, how);
                direct.zero((&self.file, self.engine), range, whole).await
            }
        }
    }

    async fn sync(&self) -> io::Result<()> {
        let file = Arc::clone(&self.file);
        blocking(move || file.sync_data()).await
    }

    async fn extents(&self, range: Range<u64>) -> io::Result<Vec<Extent>> {
        if self.device {
            return Ok(vec![Extent { range, hole: false }]);
        }
        let file = Arc::clone(&self.file);
        blocking(move || match fiemap::extents(&file, &range) {
            Err(Errno::OPNOTSUPP | Errno::NOTTY | Errno::NOSYS) => seek_extents(&file, &range),
            other => Ok(other?),
        })
        .await
    }
}

fn length(file: &File, device: bool) -> io::Result<u64> {
    if device {
        return Ok(seek(file, SeekFrom::End(0))?);
    }
    Ok(file.metadata()?.len())
}

/// What direct I/O on `file` must be made of; more than that where it is not told.
fn direct_block(file: &File) -> u64 {
    let told = statx(file, c"", AtFlags::EMPTY_PATH, StatxFlags::DIOALIGN);
    match told {
        Ok(told) if told.stx_dio_offset_align > 0 => u64::from(told.stx_dio_offset_align),
        _ => ALIGNMENT as u64,
    }
}

/// Reads what the page cache has from the start of `buffer` on, and says how much that was.
fn read_cached(file: &File, offset: u64, buffer: &mut [u8]) -> io::Result<usize> {
    let mut done = 0;
    while done < buffer.len() {
        let rest = &mut [io::IoSliceMut::new(&mut buffer[done..])];
        match preadv2(file, rest, offset + done as u64, ReadWriteFlags::NOWAIT) {
            Ok(0) | Err(Errno::AGAIN | Errno::OPNOTSUPP) => break,
            Ok(length) => done += length,
            Err(Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(done)
}

/// The extents of `range` as a file system without a better answer tells them.
fn seek_extents(file: &File, range: &Range<u64>) -> io::Result<Vec<Extent>> {
    let mut extents = Vec::new();
    let mut at = range.start;
    while at < range.end && extents.len() < SEEK_EXTENTS_MAX {
        let data = match seek(file, SeekFrom::Data(at)) {
            Ok(data) => data.min(range.end),
            Err(Errno::NXIO) => range.end,
            Err(error) => return Err(error.into()),
        };
        if data > at {
            extents.push(Extent {
                range: at..data,
                hole: true,
            });
            at = data;
        }
        if at < range.end {
            let hole = seek(file, SeekFrom::Hole(at))?.clamp(at + 1, range.end);
            extents.push(Extent {
                range: at..hole,
                hole: false,
            });
            at = hole;
        }
    }
    Ok(extents)
}

/// The whole blocks of `alignment` within `range`.
fn inner(range: &Range<u64>, alignment: u64) -> Range<u64> {
    let start = range.start.next_multiple_of(alignment).min(range.end);
    start..(range.end / alignment * alignment).max(start)
}

/// What `outer` has beyond `inner`, which lies within it.
fn edges(outer: &Range<u64>, inner: &Range<u64>) -> impl Iterator<Item = Range<u64>> {
    let parts = [outer.start..inner.start, inner.end..outer.end];
    parts.into_iter().filter(|edge| !edge.is_empty())
}

fn is_unsupported(error: &io::Error) -> bool {
    error.raw_os_error() == Some(Errno::OPNOTSUPP.raw_os_error())
        || error.raw_os_error() == Some(Errno::NOSYS.raw_os_error())
}

/// Whether this thread's last writes were fast enough to be done without the pool.
struct Pace;

impl Pace {
    fn is_fast() -> bool {
        PENALTY.with(|penalty| match penalty.get() {
            0 => true,
            left => {
                penalty.set(left - 1);
                false
            }
        })
    }

    fn note(took: Duration) {
        if took > SLOW_WRITE {
            PENALTY.with(|penalty| penalty.set(POOLED_AFTER_SLOW));
        }
    }
}

thread_local! {
    /// How many more writes of this thread go to the pool.
    static PENALTY: Cell<u32> = const { Cell::new(0) };
}

/// A write that takes this long waited for the journal, for space or for writeback, and so did
/// every connection of its thread.
const SLOW_WRITE: Duration = Duration::from_millis(2);

/// How many writes a thread hands to the pool after a slow one, before it tries again itself.
const POOLED_AFTER_SLOW: u32 = 64;

/// Larger writes take long enough, by copying alone, to keep other connections waiting.
const INLINE_WRITE_MAX: usize = 256 << 10;

/// Of more, copying out of the page cache is most of the work, which threads share and a ring leaves to
/// the one that asks.
const RING_READ_MAX: usize = 256 << 10;

/// What is read from a device at once. Larger requests gain nothing from it, and readers are many.
const READ_PIECE: usize = 1 << 20;

/// Zeroes are written from a buffer of this size.
const ZEROES_PIECE: usize = 1 << 20;

/// No device has larger logical blocks than a page.
const DEVICE_ALIGNMENT: u64 = 4096;

/// As many as [`fiemap`] tells at a time, and for the same reason.
const SEEK_EXTENTS_MAX: usize = 64;

#[cfg(test)]
mod tests {
    use super::*;

    fn sparse(size: u64) -> FileStorage {
        let file = tempfile::tempfile().unwrap();
        file.set_len(size).unwrap();
        FileStorage::new(file, Engine::Threads).unwrap()
    }

    async fn contents(storage: &FileStorage, range: Range<u64>) -> Vec<u8> {
        let mut buffer = vec![0xee; (range.end - range.start) as usize];
        storage.read(range.start, &mut buffer).await.unwrap();
        buffer
    }

    #[tokio::test]
    async fn what_is_written_is_read_back_and_takes_space() {
        let storage = sparse(1 << 20);
        storage
            .write(65_536, &Bytes::from(vec![7; 4096]))
            .await
            .unwrap();
        assert_eq!(contents(&storage, 65_535..65_538).await, [0, 7, 7]);

        let extents = storage.extents(0..1 << 20).await.unwrap();
        assert!(
            extents.iter().any(|e| !e.hole && e.range.contains(&65_536)),
            "{extents:?}"
        );
        assert!(
            extents[0].hole && extents[0].range.start == 0,
            "{extents:?}"
        );
        assert_eq!(extents.last().unwrap().range.end, 1 << 20);
    }

    #[tokio::test]
    async fn a_fragmented_file_is_told_piece_by_piece_from_where_the_last_piece_ended() {
        const BLOCKS: u64 = 1500;
        let storage = sparse(BLOCKS * 8192);
        for block in 0..BLOCKS {
            let data = Bytes::from_static(&[1; 4096]);
            storage.write(block * 8192, &data).await.unwrap();
        }
        let mut told = Vec::new();
        let mut at = 0;
        while at < storage.size() {
            let extents = storage.extents(at..storage.size()).await.unwrap();
            assert!(extents[0].range.start == at && !extents[0].range.is_empty());
            at = extents.last().unwrap().range.end;
            told.extend(extents);
        }
        for (number, extent) in told.into_iter().enumerate() {
            let start = number as u64 * 4096;
            let hole = number % 2 == 1;
            let range = start..start + 4096;
            assert_eq!(extent, Extent { range, hole });
        }
        assert_eq!(at, BLOCKS * 8192);
    }

    #[tokio::test]
    async fn a_large_write_and_a_large_read_go_through_the_pool() {
        let storage = sparse(4 << 20);
        storage
            .write(1, &Bytes::from(vec![9; 2 << 20]))
            .await
            .unwrap();
        let read = contents(&storage, 0..(2 << 20) + 2).await;
        assert!(read[0] == 0 && read[read.len() - 1] == 0);
        assert!(read[1..read.len() - 1].iter().all(|&byte| byte == 9));
    }

    #[tokio::test]
    async fn every_way_of_zeroing_zeroes_exactly_its_range() {
        for how in [Zeroing::MayUnmap, Zeroing::Keep] {
            let storage = sparse(1 << 20);
            storage
                .write(0, &Bytes::from(vec![1; 1 << 20]))
                .await
                .unwrap();
            storage.zero(5000..100_001, how).await.unwrap();
            let read = contents(&storage, 0..1 << 20).await;
            for (at, byte) in read.into_iter().enumerate() {
                assert_eq!(
                    byte == 0,
                    (5000..100_001).contains(&at),
                    "{how:?}, byte {at}"
                );
            }
        }
    }

    #[tokio::test]
    async fn a_file_that_lost_its_end_is_an_error_and_not_zeroes() {
        let storage = sparse(1 << 20);
        storage.file().set_len(4096).unwrap();
        let mut buffer = [0; 512];
        assert!(storage.read(8192, &mut buffer).await.is_err());
    }

    #[test]
    fn edges_and_inner_blocks_make_up_the_range() {
        let outer = 5000..20_000;
        let whole = inner(&outer, 4096);
        assert_eq!(whole, 8192..16_384);
        assert_eq!(
            edges(&outer, &whole).collect::<Vec<_>>(),
            [5000..8192, 16_384..20_000]
        );
        assert!(inner(&(5000..6000), 4096).is_empty());
        let small = 5000..6000;
        let total: u64 = edges(&small, &inner(&small, 4096))
            .map(|e| e.end - e.start)
            .sum();
        assert_eq!(total, 1000);
    }
}
