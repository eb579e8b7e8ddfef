//! How what may wait for a device is done: by a ring of the kernel's, or by threads that wait.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use bytes::Bytes;

use crate::buffer::Buffer;
use crate::pool::blocking;
use crate::ring;

/// Does what may wait for a device, beside the caller's thread.
///
/// What the page cache can answer never comes here. Each transfer owns its memory, so that it can
/// be given up: it then ends on its own.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub enum Engine {
    /// A pool of threads that wait, on any kernel.
    #[default]
    Threads,
    /// A ring for each thread that asks: no other thread is woken for a transfer.
    IoUring,
}

/// What is written: a part of what was received, or memory of ours.
#[derive(Debug)]
pub(crate) enum Data {
    Received(Bytes),
    Own(Buffer),
}

impl Engine {
    /// The ring, where the kernel has it and lets this process use it; else why not.
    pub fn io_uring() -> io::Result<Self> {
        ring::probe()?;
        Ok(Self::IoUring)
    }

    /// As `--io-engine` has it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Threads => "threads",
            Self::IoUring => "io_uring",
        }
    }

    /// Fills `buffer` with what is at `offset`, in a runtime of tokio's.
    pub async fn read(
        self,
        file: &Arc<File>,
        offset: u64,
        mut buffer: Buffer,
    ) -> io::Result<Buffer> {
        if let Some(ring) = self.ring() {
            return ring.read(file, offset, buffer).await;
        }
        let file = Arc::clone(file);
        blocking(move || {
            file.read_exact_at(&mut buffer, offset)?;
            Ok(buffer)
        })
        .await
    }

    /// Puts `data` at `offset`.
    pub(crate) async fn write(self, file: &Arc<File>, offset: u64, data: Data) -> io::Result<()> {
        if let Some(ring) = self.ring() {
            return ring.write(file, offset, data).await;
        }
        let file = Arc::clone(file);
        blocking(move || file.write_all_at(&data, offset)).await
    }

    /// Where no ring can be had after all, as when the process has too many open files, threads do
    /// the same.
    fn ring(self) -> Option<ring::Ring> {
        match self {
            Self::Threads => None,
            Self::IoUring => ring::Ring::of_this_thread(),
        }
    }
}

impl std::ops::Deref for Data {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        match self {
            Self::Received(bytes) => bytes,
            Self::Own(buffer) => buffer,
        }
    }
}
