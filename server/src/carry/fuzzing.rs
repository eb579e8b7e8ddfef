//! What must hold of any bytes as a list of extents, for fuzzing.

use super::extents;

/// Reads `bytes` as the list of a disk of 1 MiB; what is dirty is in order and on the disk, and is read
/// the same after it was written again.
///
/// # Panics
///
/// If it is not.
pub fn list(bytes: &[u8]) {
    let (mut dirty, mut at) = (Vec::new(), 0);
    let read = extents::read(bytes, SIZE, |range| {
        assert!(at <= range.start && range.start < range.end && range.end <= SIZE);
        at = range.end;
        dirty.push(range);
    });
    if read.is_err() {
        return;
    }
    let mut text = Vec::new();
    extents::write(&mut text, SIZE, dirty.iter().cloned()).expect("memory does not fail");
    let mut again = Vec::new();
    let read = extents::read(text.as_slice(), SIZE, |range| again.push(range));
    read.expect("it was just written");
    assert_eq!(again, dirty);
}

const SIZE: u64 = 1 << 20;
