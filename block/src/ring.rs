//! A ring of the kernel's for each thread, driven by the thread's executor.
//!
//! What is asked while the executor has other work is handed to the kernel together, by a task of
//! its own that comes when they have had their turn. The same task wakes whoever asked.

#![expect(
    unsafe_code,
    reason = "the kernel is given addresses, which the compiler cannot see it use"
)]

use std::cell::RefCell;
use std::fs::File;
use std::io;
use std::mem;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use io_uring::{IoUring, Probe, opcode, squeue, types};
use slab::Slab;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::sync::Notify;

use crate::buffer::Buffer;
use crate::engine::Data;

/// The way to the ring of this thread.
#[derive(Clone)]
pub(crate) struct Ring(Arc<Shared>);

struct Shared {
    state: Mutex<State>,
    /// Something is to be handed to the kernel.
    asked: Notify,
}

struct State {
    uring: IoUring,
    transfers: Slab<Transfer>,
    /// The executor is gone, and nobody drives the ring any more.
    closed: bool,
}

/// What the kernel was asked to do, and what it uses meanwhile.
struct Transfer {
    held: Held,
    progress: Progress,
}

enum Progress {
    /// With whoever waits for it.
    UnderWay(Option<Waker>),
    /// Nobody waits any more; it ends on its own.
    GivenUp,
    /// As the system call would have returned.
    Ended(i32),
}

/// Nothing of this goes, or moves in memory, before the kernel has done with it.
struct Held {
    file: Arc<File>,
    memory: Memory,
}

enum Memory {
    Read(Buffer),
    Write(Data),
}

/// Whether the kernel has what is needed, and lets this process use it.
pub(crate) fn probe() -> io::Result<()> {
    let uring = IoUring::new(1)?;
    let mut probe = Probe::new();
    uring.submitter().register_probe(&mut probe)?;
    let has = [opcode::Read::CODE, opcode::Write::CODE];
    if has.into_iter().all(|code| probe.is_supported(code)) {
        Ok(())
    } else {
        Err(io::Error::new(
            io::ErrorKind::Unsupported,
            "the kernel's io_uring cannot read and write",
        ))
    }
}

impl Ring {
    /// Made at the first call. None where that fails, or where the thread has no executor.
    pub(crate) fn of_this_thread() -> Option<Self> {
        RING.with_borrow_mut(|known| match known {
            Known::Is(ring) if !ring.0.state().closed => Some(ring.clone()),
            Known::Cannot => None,
            Known::Not | Known::Is(_) => {
                *known = Self::start().map_or(Known::Cannot, Known::Is);
                match known {
                    Known::Is(ring) => Some(ring.clone()),
                    _ => None,
                }
            }
        })
    }

    fn start() -> io::Result<Self> {
        let uring = IoUring::new(ENTRIES)?;
        // SAFETY: the ring is open, and stays so to the end of this statement.
        let fd = unsafe { BorrowedFd::borrow_raw(uring.as_raw_fd()) }.try_clone_to_owned()?;
        let executor = tokio::runtime::Handle::try_current().map_err(io::Error::other)?;
        // SAFETY: this descriptor is nobody else's, and always says the same number.
        let fd = unsafe { AsyncFd::register_with_interest(fd, Interest::READABLE) }?;
        let shared = Arc::new(Shared {
            state: Mutex::new(State {
                uring,
                transfers: Slab::new(),
                closed: false,
            }),
            asked: Notify::new(),
        });
        executor.spawn(drive(Driver(Arc::clone(&shared)), fd));
        Ok(Self(shared))
    }

    /// Fills `buffer` with what is at `offset`.
    pub(crate) async fn read(
        &self,
        file: &Arc<File>,
        offset: u64,
        buffer: Buffer,
    ) -> io::Result<Buffer> {
        let end = buffer.len();
        let held = Held::of(file, Memory::Read(buffer));
        let held = self.all(held, offset, end, io::ErrorKind::UnexpectedEof);
        match held.await?.memory {
            Memory::Read(buffer) => Ok(buffer),
            Memory::Write(_) => unreachable!("what is read into stays that"),
        }
    }

    /// Puts `data` at `offset`.
    pub(crate) async fn write(&self, file: &Arc<File>, offset: u64, data: Data) -> io::Result<()> {
        let end = data.len();
        let held = Held::of(file, Memory::Write(data));
        let held = self.all(held, offset, end, io::ErrorKind::WriteZero);
        held.await.map(drop)
    }

    /// Moves all up to byte `end`; where the kernel moves nothing any more, that is `stuck`.
    async fn all(
        &self,
        mut held: Held,
        offset: u64,
        end: usize,
        stuck: io::ErrorKind,
    ) -> io::Result<Held> {
        let mut done = 0;
        while done < end {
            let moved;
            (moved, held) = self.transfer(held, offset, done).await;
            done += match moved? {
                0 => return Err(stuck.into()),
                length => length,
            };
        }
        Ok(held)
    }

    /// Goes on at byte `done`; returns how far that came.
    async fn transfer(&self, held: Held, offset: u64, done: usize) -> (io::Result<usize>, Held) {
        let mut held = held;
        loop {
            let key = self.0.state().ask(held, offset, done);
            self.0.asked.notify_one();
            let waiting = Waiting {
                shared: &self.0,
                key: Some(key),
            };
            let result;
            (result, held) = waiting.await;
            if let Ok(length) = usize::try_from(result) {
                return (Ok(length), held);
            }
            let error = io::Error::from_raw_os_error(-result);
            match error.kind() {
                io::ErrorKind::Interrupted | io::ErrorKind::WouldBlock => {}
                _ => return (Err(error), held),
            }
        }
    }
}

impl Held {
    fn of(file: &Arc<File>, memory: Memory) -> Self {
        Self {
            file: Arc::clone(file),
            memory,
        }
    }

    /// What the kernel is asked for the part from byte `done` on.
    fn entry(&mut self, offset: u64, done: usize) -> squeue::Entry {
        let file = types::Fd(self.file.as_raw_fd());
        let at = offset + done as u64;
        match &mut self.memory {
            Memory::Read(buffer) => {
                let rest = &mut buffer[done..];
                let length = rest.len().min(TRANSFER_MAX) as u32;
                let entry = opcode::Read::new(file, rest.as_mut_ptr(), length);
                entry.offset(at).build()
            }
            Memory::Write(data) => {
                let rest = &data[done..];
                let length = rest.len().min(TRANSFER_MAX) as u32;
                let entry = opcode::Write::new(file, rest.as_ptr(), length);
                entry.offset(at).build()
            }
        }
    }
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    /// Puts a transfer where the kernel finds it when it is asked next.
    fn ask(&mut self, held: Held, offset: u64, done: usize) -> usize {
        let key = self.transfers.insert(Transfer {
            held,
            progress: Progress::UnderWay(None),
        });
        let entry = self.transfers[key].held.entry(offset, done);
        let entry = entry.user_data(key as u64);
        // SAFETY: what the entry points to lies in memory that `held` owns and that does not move
        // with it, and the descriptor is open as long as `held` is. It is kept in `transfers` until
        // the kernel has said that it has done with it, or for ever.
        while unsafe { self.uring.submission().push(&entry) }.is_err() {
            // The kernel takes what is there, if it must wait for something to end first.
            let _ = self.uring.submit_and_wait(1);
            self.reap();
        }
        key
    }

    /// Hands over what has been asked, and wakes everyone whose transfer has ended. An error leaves
    /// something to be handed over.
    fn turn(&mut self) -> io::Result<()> {
        let queue = self.uring.submission();
        let is_idle = queue.is_empty() && !queue.cq_overflow();
        drop(queue);
        let submitted = if is_idle { Ok(0) } else { self.uring.submit() };
        self.reap();
        submitted.map(drop)
    }

    /// Wakes everyone whose transfer has ended.
    fn reap(&mut self) {
        let Self {
            uring, transfers, ..
        } = self;
        for ended in uring.completion() {
            let key = ended.user_data() as usize;
            let result = Progress::Ended(ended.result());
            match mem::replace(&mut transfers[key].progress, result) {
                Progress::UnderWay(waker) => waker.into_iter().for_each(Waker::wake),
                Progress::GivenUp => drop(transfers.remove(key)),
                Progress::Ended(_) => {}
            }
        }
    }

    /// Whether the kernel uses memory of ours.
    fn is_under_way(&self) -> bool {
        let ended = |transfer: &Transfer| matches!(transfer.progress, Progress::Ended(_));
        self.transfers.iter().any(|(_, transfer)| !ended(transfer))
    }
}

/// Waits for a transfer. If it is dropped before, the transfer goes on and nobody learns of its end.
struct Waiting<'a> {
    shared: &'a Shared,
    key: Option<usize>,
}

impl Future for Waiting<'_> {
    type Output = (i32, Held);

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
        let mut state = self.shared.state();
        let key = self.key.expect("not polled after its end");
        let transfer = &mut state.transfers[key];
        if let Progress::Ended(result) = transfer.progress {
            let held = state.transfers.remove(key).held;
            drop(state);
            self.key = None;
            return Poll::Ready((result, held));
        }
        transfer.progress = Progress::UnderWay(Some(context.waker().clone()));
        Poll::Pending
    }
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        let Some(key) = self.key else { return };
        let mut state = self.shared.state();
        let transfer = &mut state.transfers[key];
        match transfer.progress {
            Progress::Ended(_) => drop(state.transfers.remove(key)),
            _ => transfer.progress = Progress::GivenUp,
        }
    }
}

/// Whoever drives the ring of a thread, for as long as the thread's executor lives.
struct Driver(Arc<Shared>);

async fn drive(driver: Driver, ring: AsyncFd<OwnedFd>) {
    loop {
        tokio::select! {
            () = driver.0.asked.notified() => {}
            ready = ring.readable() => match ready {
                // Before looking: what ends from here on makes it ready again.
                Ok(mut ready) => ready.clear_ready(),
                Err(_) => return,
            }
        }
        let turn = driver.0.state().turn();
        if turn.is_err() {
            // The kernel is out of memory, or wants its answers taken first.
            tokio::time::sleep(AGAIN).await;
            driver.0.asked.notify_one();
        }
    }
}

impl Drop for Driver {
    /// Waits for what is under way, or memory would be freed that the kernel still uses.
    fn drop(&mut self) {
        let mut state = self.0.state();
        state.closed = true;
        while state.is_under_way() {
            if let Err(error) = state.uring.submit_and_wait(1)
                && error.kind() != io::ErrorKind::Interrupted
            {
                mem::forget(mem::take(&mut state.transfers));
            }
            state.reap();
        }
    }
}

enum Known {
    Not,
    Is(Ring),
    Cannot,
}

thread_local! {
    static RING: RefCell<Known> = const { RefCell::new(Known::Not) };
}

/// More than are asked for in one turn as a rule; what is more is handed over in between.
const ENTRIES: u32 = 256;

/// The kernel moves no more at a time.
const TRANSFER_MAX: usize = 1 << 30;

/// How soon the kernel is asked again what it could not take.
const AGAIN: Duration = Duration::from_millis(1);

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt;

    use super::*;

    fn file(contents: &[u8]) -> Arc<File> {
        let file = tempfile::tempfile().unwrap();
        file.write_all_at(contents, 0).unwrap();
        Arc::new(file)
    }

    fn ring() -> Ring {
        Ring::of_this_thread().expect("this machine has rings")
    }

    #[tokio::test]
    async fn more_transfers_than_the_queue_holds_all_end() {
        let contents: Vec<u8> = (0..4 * ENTRIES).flat_map(u32::to_ne_bytes).collect();
        let file = file(&contents);
        let mut reads = tokio::task::JoinSet::new();
        let tasks = tokio::task::LocalSet::new();
        for number in 0..4 * ENTRIES {
            let (ring, file) = (ring(), Arc::clone(&file));
            let read = async move {
                let read = ring.read(&file, u64::from(number) * 4, Buffer::of(4)).await;
                assert_eq!(read.unwrap()[..], number.to_ne_bytes());
            };
            reads.spawn_local_on(read, &tasks);
        }
        let all = async {
            while let Some(read) = reads.join_next().await {
                read.expect("what was written");
            }
        };
        tasks.run_until(all).await;
    }

    #[tokio::test]
    async fn what_is_not_there_is_an_error_and_the_ring_goes_on() {
        let (ring, file) = (ring(), file(&[7; 100]));
        let short = ring.read(&file, 50, Buffer::of(100)).await;
        assert_eq!(short.unwrap_err().kind(), io::ErrorKind::UnexpectedEof);
        let full = File::options().write(true).open("/dev/full").unwrap();
        let data = Data::Received(vec![1; 10].into());
        let refused = ring.write(&Arc::new(full), 0, data).await;
        assert_eq!(refused.unwrap_err().kind(), io::ErrorKind::StorageFull);
        let read = ring.read(&file, 0, Buffer::of(100)).await.unwrap();
        assert_eq!(read[..], [7; 100]);
    }

    #[tokio::test]
    async fn a_write_that_is_given_up_is_written_all_the_same() {
        let (ring, file) = (ring(), file(&[0; 4096]));
        let mut write = Box::pin(ring.write(&file, 0, Data::Received(vec![5; 4096].into())));
        let begun = write.as_mut().poll(&mut Context::from_waker(Waker::noop()));
        assert!(begun.is_pending());
        drop(write);
        let ends = async {
            while !ring.0.state().transfers.is_empty() {
                tokio::task::yield_now().await;
            }
        };
        let patience = Duration::from_secs(20);
        tokio::time::timeout(patience, ends).await.expect("it ends");
        let read = ring.read(&file, 0, Buffer::of(4096)).await.unwrap();
        assert_eq!(read[..], [5; 4096]);
    }

    #[test]
    fn an_executor_that_goes_leaves_nothing_under_way_and_the_next_has_a_ring_of_its_own() {
        let file = file(&[9; 4096]);
        let executor = || {
            let mut builder = tokio::runtime::Builder::new_current_thread();
            builder.enable_all().build().unwrap()
        };
        let first = executor();
        let left = first.block_on(async {
            let ring = ring();
            let (reader, read_from) = (ring.clone(), Arc::clone(&file));
            let mut read =
                Box::pin(async move { reader.read(&read_from, 0, Buffer::of(4096)).await });
            let begun = read.as_mut().poll(&mut Context::from_waker(Waker::noop()));
            assert!(begun.is_pending());
            drop(read);
            ring
        });
        drop(first);
        assert!(left.0.state().closed && left.0.state().transfers.is_empty());
        executor().block_on(async {
            assert!(!Arc::ptr_eq(&left.0, &ring().0));
            let read = ring().read(&file, 0, Buffer::of(4096)).await.unwrap();
            assert_eq!(read[..], [9; 4096]);
        });
    }
}
