//! What the fuzz targets share: state files in memory, and images.

pub mod images;

use std::pin::pin;
use std::task::{Context, Poll, Waker};

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
