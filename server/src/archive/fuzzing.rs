//! What must hold of any bytes in a manifest, for fuzzing.

use super::digest::Digest;
use super::manifest::Manifest;
use super::runs;

/// Reads `bytes` as a manifest, as they are and with the hash that belongs to them; what is accepted is
/// read the same after it was written again, and says where all of its data lies.
///
/// # Panics
///
/// If it is not, or does not.
pub fn manifest(bytes: &[u8]) {
    check(bytes);
    let end = bytes.len().saturating_sub(SEAL);
    let is_seal = |end: &&[u8]| end.starts_with(b",\"blake3\"");
    let body = match bytes.get(end..).filter(is_seal) {
        Some(_) => &bytes[..end],
        None => bytes,
    };
    let hash = Digest::of(body);
    check(&[body, format!(",\"blake3\":\"{hash}\"}}\n").as_bytes()].concat());
}

fn check(bytes: &[u8]) {
    let Ok(manifest) = Manifest::parse(bytes) else {
        return;
    };
    let again = Manifest::parse(&manifest.text());
    assert_eq!(again.as_ref(), Ok(&manifest), "it was just written");
    for (disk, contents) in manifest.point.disks.iter().zip(&manifest.contents) {
        assert!(!disk.file.contains(['/', '\0']), "it stays in its folder");
        assert!(runs::are_runs(&contents.data, disk.size));
        assert!(runs::are_runs(&contents.zero, disk.size));
        assert!(runs::intersection(&contents.data, &contents.zero).is_empty());
        let layout = disk.layout(contents);
        let mut cluster = vec![0; disk.cluster_size as usize];
        layout.fill(0, &mut cluster);
        layout.fill(layout.metadata_size() - disk.cluster_size, &mut cluster);
        // In the file the chunks follow one another.
        let mut at = layout.metadata_size();
        for (chunk, _) in contents.chunks(disk.chunk_size) {
            assert_eq!(layout.host_offset(chunk.runs[0].start), Some(at));
            assert!(chunk.bytes() <= disk.chunk_size);
            at += chunk.bytes().next_multiple_of(disk.cluster_size);
        }
        assert_eq!(at, disk.file_size, "every byte of data is in a chunk");
    }
}

/// How long the last member of a manifest is.
const SEAL: usize = 78;
