//! Compressed clusters.

use std::collections::VecDeque;
use std::io;
use std::sync::{Arc, Mutex, PoisonError};

use miniz_oxide::inflate::TINFLStatus;
use miniz_oxide::inflate::core::{DecompressorOxide, decompress};
use zstd_safe::{DCtx, DParameter, InBuffer, OutBuffer};

use super::header::Compression;
use super::layer::damaged;

/// The cluster of `length` bytes that `packed` begins with.
pub(crate) fn unpack(how: Compression, packed: &[u8], length: usize) -> io::Result<Vec<u8>> {
    let mut cluster = vec![0; length];
    let whole = match how {
        Compression::Zlib => inflate(packed, &mut cluster),
        Compression::Zstd => decompress_zstd(packed, &mut cluster),
    };
    if !whole {
        return Err(damaged("a compressed cluster cannot be read"));
    }
    Ok(cluster)
}

/// Says whether it is as long as it should be. What follows it in the same sector is not its own.
fn inflate(packed: &[u8], cluster: &mut [u8]) -> bool {
    let mut state = Box::<DecompressorOxide>::default();
    let flags = miniz_oxide::inflate::core::inflate_flags::TINFL_FLAG_USING_NON_WRAPPING_OUTPUT_BUF;
    let (status, _, written) = decompress(&mut state, packed, cluster, 0, flags);
    // A full buffer may hide the end of the stream, which has no bytes of its own.
    let is_whole = matches!(status, TINFLStatus::Done | TINFLStatus::HasMoreOutput);
    is_whole && written == cluster.len()
}

/// The same. There may be several frames.
fn decompress_zstd(packed: &[u8], cluster: &mut [u8]) -> bool {
    let Some(mut context) = DCtx::try_create() else {
        return false;
    };
    let limit = DParameter::WindowLogMax(WINDOW_BITS_MAX);
    if context.set_parameter(limit).is_err() {
        return false;
    }
    let wanted = cluster.len();
    let mut input = InBuffer::around(packed);
    let mut output = OutBuffer::around(cluster);
    while output.pos() < wanted {
        let before = (input.pos(), output.pos());
        let step = context.decompress_stream(&mut output, &mut input);
        if step.is_err() || (input.pos(), output.pos()) == before {
            return false;
        }
    }
    true
}

/// The clusters that were unpacked last: who reads in pieces smaller than a cluster asks for each
/// several times.
#[derive(Default)]
pub(crate) struct Unpacked(Mutex<VecDeque<(Key, Arc<Vec<u8>>)>>);

/// Which image of the chain, and where in it.
type Key = (usize, u64);

impl Unpacked {
    pub(crate) fn find(&self, key: Key) -> Option<Arc<Vec<u8>>> {
        let kept = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let mut kept = kept.iter();
        kept.find(|(found, _)| *found == key)
            .map(|(_, cluster)| Arc::clone(cluster))
    }

    pub(crate) fn put(&self, key: Key, cluster: &Arc<Vec<u8>>) {
        let mut kept = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let room = (KEPT_BYTES_MAX / cluster.len()).clamp(1, KEPT_MAX);
        kept.truncate(room - 1);
        kept.push_front((key, Arc::clone(cluster)));
    }
}

/// How much of its output a frame may refer back to, which is kept in memory: 8 MiB, which any reader is
/// to accept by the document (RFC 8878), and four times the largest cluster.
const WINDOW_BITS_MAX: u32 = 23;

/// Four of the largest clusters.
const KEPT_BYTES_MAX: usize = 8 << 20;

/// As many as are looked through for one.
const KEPT_MAX: usize = 128;

#[cfg(test)]
mod tests {
    use super::*;

    /// A frame whose blocks repeat a byte, 128 KiB each, after which there is always another.
    fn bomb(head: &[u8]) -> Vec<u8> {
        let block = ((128_u32 << 10) << 3 | 1 << 1).to_le_bytes();
        let mut frame = [&[0x28, 0xb5, 0x2f, 0xfd], head].concat();
        for _ in 0..10_000 {
            frame.extend([block[0], block[1], block[2], 7]);
        }
        frame
    }

    #[test]
    fn a_frame_takes_no_more_memory_than_a_few_clusters() {
        // 1 MiB may be referred to.
        let frame = bomb(&[0, 10 << 3]);
        let cluster = unpack(Compression::Zstd, &frame, 65_536).unwrap();
        assert!(cluster.iter().all(|&byte| byte == 7));
        // 16 MiB; 1 TiB; all of it, which is 2^60 bytes.
        let whole: &[u8] = &[0xe0, 0, 0, 0, 0, 0, 0, 0, 0x10];
        for head in [&[0, 14 << 3], &[0, 30 << 3], whole] {
            assert!(
                unpack(Compression::Zstd, &bomb(head), 65_536).is_err(),
                "{head:?}"
            );
        }
    }

    #[test]
    fn what_is_cut_off_or_too_short_or_nothing_is_an_error() {
        for how in [Compression::Zlib, Compression::Zstd] {
            for packed in [&[][..], &[0], &[0x28, 0xb5, 0x2f, 0xfd, 0], &[0xff; 100]] {
                assert!(unpack(how, packed, 4096).is_err(), "{how:?}, {packed:?}");
            }
        }
        // A stored block of three bytes.
        let stored = [1, 3, 0, 0xfc, 0xff, 7, 7, 7];
        assert_eq!(unpack(Compression::Zlib, &stored, 3).unwrap(), [7; 3]);
        assert!(unpack(Compression::Zlib, &stored, 4).is_err());
    }
}
