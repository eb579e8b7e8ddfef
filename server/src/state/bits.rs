//! The bits of dirty bitmaps, each set in a file of its own.
//!
//! A file is written once, complete and synced, and only then named by a record of the journal; what
//! changes gets a new file, and the old one goes. So a file that is there is whole or damaged, and
//! one that is damaged or missing costs its own bitmap and no other.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use bitmap::{BitGranularity, Bits};
use uuid::Uuid;

/// Which bits: of which bitmap, after which of its changes.
#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub(crate) struct BitsId {
    /// The bitmap.
    pub(crate) uuid: Uuid,
    /// How often it had been changed.
    pub(crate) revision: u64,
}

impl BitsId {
    /// The bits of the bitmap `uuid` in the folder of a backup, of which there is one set.
    pub(crate) fn frozen(uuid: Uuid) -> Self {
        Self { uuid, revision: 0 }
    }
}

/// Where the bits of one disk's persistent bitmaps lie.
#[derive(Clone, Debug)]
pub(crate) struct BitsFolder(PathBuf);

impl BitsFolder {
    /// The one in the state directory `state`, whether or not it is there yet.
    pub(crate) fn of(state: &Path) -> Self {
        Self(state.join(FOLDER))
    }

    /// Writes new files, each with what it is to hold, and makes them durable.
    pub(crate) fn store(&self, files: &[(BitsId, &Bits)]) -> io::Result<()> {
        if files.is_empty() {
            return Ok(());
        }
        if !self.0.is_dir() {
            fs::DirBuilder::new().mode(0o700).create(&self.0)?;
            let state = self.0.parent().unwrap_or(&self.0);
            File::open(state)?.sync_all()?;
        }
        let aside = self.0.join(ASIDE);
        for (id, bits) in files {
            write(&aside, *id, bits)?;
            fs::rename(&aside, self.path(*id))?;
        }
        self.sync()
    }

    /// The bits in a file, or why they are not to be had.
    pub(crate) fn load(&self, id: BitsId, granularity: BitGranularity) -> Result<Bits, String> {
        read(&self.path(id), id, granularity)
    }

    /// Removes files, durably. What is left of them is harmless where their bitmaps live on; that
    /// they are gone is what shows later that a record of the journal is missing.
    pub(crate) fn remove(&self, ids: &[BitsId]) -> io::Result<()> {
        if ids.is_empty() {
            return Ok(());
        }
        for id in ids {
            match fs::remove_file(self.path(*id)) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
                _ => {}
            }
        }
        self.sync()
    }

    /// Removes everything but the files of `known`.
    pub(crate) fn remove_others(&self, known: &BTreeSet<BitsId>) -> io::Result<()> {
        let entries = match fs::read_dir(&self.0) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
            other => other?,
        };
        let names: BTreeSet<String> = known.iter().map(|id| file_name(*id)).collect();
        for entry in entries {
            let entry = entry?;
            let is_known = entry
                .file_name()
                .to_str()
                .is_some_and(|n| names.contains(n));
            if !is_known {
                fs::remove_file(entry.path())?;
            }
        }
        self.sync()
    }

    /// Where the bits are.
    pub(super) fn path(&self, id: BitsId) -> PathBuf {
        self.0.join(file_name(id))
    }

    fn sync(&self) -> io::Result<()> {
        File::open(&self.0)?.sync_all()
    }
}

fn file_name(id: BitsId) -> String {
    format!("{}-{}", id.uuid, id.revision)
}

/// Writes `bits` to `path`, in the place of anything that is there, and makes the file durable, but
/// not its name.
pub(crate) fn write(path: &Path, id: BitsId, bits: &Bits) -> io::Result<()> {
    let mut options = File::options();
    // Names and maps of a disk are its owner's business alone.
    let options = options.write(true).create(true).truncate(true).mode(0o600);
    let mut file = options.open(path)?;
    file.write_all(&encode(id, bits))?;
    file.sync_all()
}

/// The bits that [`write`] put into `path`, or why they are not there.
pub(crate) fn read(path: &Path, id: BitsId, granularity: BitGranularity) -> Result<Bits, String> {
    let mut bytes = Vec::new();
    File::open(path)
        .and_then(|mut file| file.read_to_end(&mut bytes))
        .map_err(|error| format!("its bits cannot be read: {error}"))?;
    decode(id, granularity, &bytes)
}

/// Head, then the pages.
pub(super) fn encode(id: BitsId, bits: &Bits) -> Vec<u8> {
    let pages = bits.to_bytes();
    let mut bytes = Vec::with_capacity(HEAD + pages.len());
    bytes.extend(MAGIC);
    bytes.extend(VERSION.to_le_bytes());
    bytes.extend([0; 4]);
    bytes.extend((pages.len() as u64).to_le_bytes());
    bytes.extend(id.uuid.as_bytes());
    bytes.extend(id.revision.to_le_bytes());
    bytes.extend(bits.granularity().bytes().to_le_bytes());
    bytes.extend(pages);
    let sum = crc32fast::hash(&bytes[SUMMED_FROM..]);
    bytes[SUM..SUMMED_FROM].copy_from_slice(&sum.to_le_bytes());
    bytes
}

pub(super) fn decode(
    id: BitsId,
    granularity: BitGranularity,
    bytes: &[u8],
) -> Result<Bits, String> {
    let damaged = || "its bits are damaged".to_owned();
    let field = |at: usize| -> Result<u64, String> {
        let bytes = bytes.get(at..at + 8).ok_or_else(damaged)?;
        bytes
            .try_into()
            .map(u64::from_le_bytes)
            .map_err(|_| damaged())
    };
    let pages = bytes.get(HEAD..).ok_or_else(damaged)?;
    if bytes[..8] != *MAGIC {
        return Err(damaged());
    }
    let version = (field(8)? & u64::from(u32::MAX)) as u32;
    if version > VERSION {
        return Err(format!(
            "its bits have version {version}, which is newer than this server's"
        ));
    }
    let sum = crc32fast::hash(&bytes[SUMMED_FROM..]);
    let is_whole = bytes[SUM..SUMMED_FROM] == sum.to_le_bytes()
        && version == VERSION
        && field(16)? == pages.len() as u64
        && bytes[24..40] == *id.uuid.as_bytes()
        && field(40)? == id.revision
        && field(48)? == granularity.bytes();
    if !is_whole {
        return Err(damaged());
    }
    Bits::from_bytes(granularity, pages).ok_or_else(damaged)
}

/// In a state directory.
pub(super) const FOLDER: &str = "bitmaps";
const ASIDE: &str = "new";

const MAGIC: &[u8; 8] = b"SPBITMAP";
const VERSION: u32 = 1;
/// Where the checksum stands, and what it is of: all that follows.
const SUM: usize = 12;
const SUMMED_FROM: usize = 16;
const HEAD: usize = 56;

#[cfg(test)]
mod tests {
    use super::*;

    fn id(revision: u64) -> BitsId {
        let uuid = Uuid::from_u128(7);
        BitsId { uuid, revision }
    }

    fn granularity() -> BitGranularity {
        BitGranularity::new(65_536).unwrap()
    }

    fn bits() -> Bits {
        let mut bits = Bits::new(granularity());
        bits.set(&(1 << 20..2 << 20));
        bits
    }

    #[test]
    fn what_was_encoded_is_decoded_and_no_damaged_byte_is_believed() {
        let good = encode(id(3), &bits());
        assert_eq!(decode(id(3), granularity(), &good), Ok(bits()));
        for at in 0..good.len() {
            let mut bad = good.clone();
            bad[at] ^= 0x20;
            assert!(decode(id(3), granularity(), &bad).is_err(), "byte {at}");
        }
        for length in 0..good.len() {
            let short = &good[..length];
            assert!(
                decode(id(3), granularity(), short).is_err(),
                "{length} bytes"
            );
        }
    }

    #[test]
    fn the_bits_of_another_bitmap_or_of_another_time_are_not_taken() {
        let stored = encode(id(3), &bits());
        assert!(decode(id(4), granularity(), &stored).is_err());
        let coarser = BitGranularity::new(1 << 20).unwrap();
        assert!(decode(id(3), coarser, &stored).is_err());
    }

    #[test]
    fn a_newer_version_is_named() {
        let mut newer = encode(id(3), &bits());
        newer[8] = 2;
        let why = decode(id(3), granularity(), &newer).unwrap_err();
        assert!(why.contains("version 2"), "{why}");
    }

    #[test]
    fn a_folder_keeps_what_is_known_and_removes_the_rest() {
        let state = tempfile::tempdir().unwrap();
        let folder = BitsFolder::of(state.path());
        folder.remove_others(&BTreeSet::new()).unwrap();
        folder.store(&[(id(1), &bits()), (id(2), &bits())]).unwrap();
        fs::write(state.path().join("bitmaps/new"), "half").unwrap();
        folder.remove_others(&BTreeSet::from([id(2)])).unwrap();
        assert!(folder.load(id(1), granularity()).is_err());
        assert_eq!(folder.load(id(2), granularity()), Ok(bits()));
        assert_eq!(
            fs::read_dir(state.path().join("bitmaps")).unwrap().count(),
            1
        );
        folder.remove(&[id(2), id(9)]).unwrap();
        assert!(folder.load(id(2), granularity()).is_err());
    }
}
