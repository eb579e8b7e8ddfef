//! What the fuzz targets share: state files in memory, and images.

pub mod images;

use std::io;
use std::ops::Range;
use std::pin::pin;
use std::task::{Context, Poll, Waker};

use bitmap::{MemoryPages, PageStore};
use scratch::Durable;

/// Pages in memory, of which everything is durable at once.
#[derive(Debug, Default)]
pub struct Pages(pub MemoryPages);

impl From<Vec<u8>> for Pages {
    fn from(contents: Vec<u8>) -> Self {
        Self(contents.into())
    }
}

impl PageStore for Pages {
    fn store(&self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        self.0.store(offset, bytes)
    }

    fn load(&self, offset: u64, bytes: &mut [u8]) -> io::Result<()> {
        self.0.load(offset, bytes)
    }

    fn stored(&self, offset: u64) -> io::Result<Option<Range<u64>>> {
        self.0.stored(offset)
    }
}

impl Durable for Pages {
    async fn sync(&self) -> io::Result<()> {
        Ok(())
    }

    fn successor(&self) -> io::Result<Self> {
        Ok(Self::default())
    }

    fn succeed(&self) -> io::Result<()> {
        Ok(())
    }

    async fn sync_place(&self) -> io::Result<()> {
        Ok(())
    }
}

/// Runs what never waits.
pub fn now<T>(future: impl Future<Output = T>) -> T {
    match pin!(future).poll(&mut Context::from_waker(Waker::noop())) {
        Poll::Ready(value) => value,
        Poll::Pending => unreachable!("everything is in memory"),
    }
}

/// The sectors of `bytes`, each with the sum in its first four bytes put right: what storage could
/// never have damaged like that, so that a fuzzer gets past the sum.
pub fn sealed(bytes: &[u8]) -> Vec<u8> {
    let mut bytes = bytes.to_vec();
    for sector in bytes.chunks_exact_mut(512) {
        let sum = crc32fast::hash(&sector[4..]).to_le_bytes();
        sector[..4].copy_from_slice(&sum);
    }
    bytes
}
