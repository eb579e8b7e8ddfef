//! Which chunks of a draft are stored, and what their data was when it came.
//!
//! A record is appended after the data of its chunk was stored; neither is synced. So a kill leaves
//! records that are true, and a power cut leaves anything: whoever goes on reads the data again and
//! believes a record only if it is that of the data.

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;
use std::sync::{Condvar, Mutex};

use super::digest::Digest;

/// The file of records of one disk.
#[derive(Debug)]
pub(super) struct Records {
    file: File,
    state: Mutex<State>,
    /// Something of the state has changed.
    changed: Condvar,
}

#[derive(Debug)]
struct State {
    hashes: BTreeMap<u64, Digest>,
    /// Where the next record goes.
    end: u64,
    /// Nobody waits for any more.
    is_given_up: bool,
}

impl Records {
    /// A new file, or an empty one.
    pub(super) fn create(path: &Path) -> io::Result<Self> {
        let mut options = File::options();
        let options = options.read(true).write(true).create(true).truncate(true);
        let file = options.mode(0o600).open(path)?;
        Ok(Self::of(file, BTreeMap::new(), 0))
    }

    /// The file that another run has left, of which only those are kept that `are_true`.
    pub(super) fn open<E: From<io::Error>>(
        path: &Path,
        mut is_true: impl FnMut(u64, Digest) -> Result<bool, E>,
    ) -> Result<Self, E> {
        let file = File::options().read(true).write(true).open(path)?;
        let length = file.metadata()?.len();
        let mut found = BTreeMap::new();
        let mut record = [0; RECORD];
        // A record that is torn, or never came to the disk, is passed over; what is after it counts.
        for at in (0..length / RECORD as u64).map(|number| number * RECORD as u64) {
            file.read_exact_at(&mut record, at)?;
            if let Some((index, hash)) = decode(&record) {
                found.insert(index, hash);
            }
        }
        let mut hashes = BTreeMap::new();
        for (index, hash) in found {
            if is_true(index, hash)? {
                hashes.insert(index, hash);
            }
        }
        let end = length.next_multiple_of(RECORD as u64);
        Ok(Self::of(file, hashes, end))
    }

    fn of(file: File, hashes: BTreeMap<u64, Digest>, end: u64) -> Self {
        Self {
            file,
            state: Mutex::new(State {
                hashes,
                end,
                is_given_up: false,
            }),
            changed: Condvar::new(),
        }
    }

    /// Records that the data of a chunk is stored.
    pub(super) fn add(&self, index: u64, hash: Digest) -> io::Result<()> {
        let mut state = self.state.lock().expect("nobody panics with it");
        self.file.write_all_at(&encode(index, hash), state.end)?;
        state.end += RECORD as u64;
        state.hashes.insert(index, hash);
        self.changed.notify_all();
        Ok(())
    }

    /// The hash of the data of a chunk, if that is stored.
    pub(super) fn hash_of(&self, index: u64) -> Option<Digest> {
        let state = self.state.lock().expect("nobody panics with it");
        state.hashes.get(&index).copied()
    }

    /// The same, when it is stored; none if that is given up before.
    pub(super) fn wait_for(&self, index: u64) -> Option<Digest> {
        let state = self.state.lock().expect("nobody panics with it");
        let is_coming =
            |state: &mut State| !state.hashes.contains_key(&index) && !state.is_given_up;
        let state = self.changed.wait_while(state, is_coming);
        let state = state.expect("nobody panics with it");
        state.hashes.get(&index).copied()
    }

    /// Lets go whoever waits.
    pub(super) fn give_up(&self) {
        self.state
            .lock()
            .expect("nobody panics with it")
            .is_given_up = true;
        self.changed.notify_all();
    }

    /// All of them.
    pub(super) fn hashes(&self) -> Vec<(u64, Digest)> {
        let state = self.state.lock().expect("nobody panics with it");
        state.hashes.iter().map(|(i, hash)| (*i, *hash)).collect()
    }
}

fn encode(index: u64, hash: Digest) -> [u8; RECORD] {
    let mut record = [0; RECORD];
    record[..8].copy_from_slice(&index.to_le_bytes());
    record[8..40].copy_from_slice(hash.0.as_bytes());
    let check = Digest::of(&record[..40]);
    record[40..].copy_from_slice(&check.0.as_bytes()[..8]);
    record
}

fn decode(record: &[u8; RECORD]) -> Option<(u64, Digest)> {
    let (index, rest) = record.split_first_chunk::<8>()?;
    let (hash, _) = rest.split_first_chunk::<32>()?;
    let index = u64::from_le_bytes(*index);
    let hash = Digest(blake3::Hash::from_bytes(*hash));
    (encode(index, hash) == *record).then_some((index, hash))
}

/// Index, hash, and a check of the two.
const RECORD: usize = 48;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn torn_records_are_passed_over() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("vda.done");
        let records = Records::create(&path).unwrap();
        for index in 0..4 {
            records.add(index, Digest::of(&[index as u8])).unwrap();
        }
        let file = File::options().write(true).open(&path).unwrap();
        file.write_all_at(&[9], 48 + 20).unwrap();
        file.set_len(4 * 48 - 1).unwrap();
        let open = || Records::open::<io::Error>(&path, |index, _| Ok(index != 0)).unwrap();
        let found = open();
        assert_eq!(found.hashes(), [(2, Digest::of(&[2]))]);
        found.add(7, Digest::of(b"x")).unwrap();
        assert_eq!(open().hash_of(7), Some(Digest::of(b"x")));
        assert_eq!(open().hash_of(1), None);
    }
}
