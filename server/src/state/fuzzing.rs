//! What must hold of any bytes in a state file, for fuzzing.

use std::fs::File;
use std::io::{self, Cursor};
use std::os::unix::fs::FileExt;

use bitmap::BitGranularity;
use block::Cells;
use rustix::fs::{MemfdFlags, memfd_create};

use uuid::Uuid;

use super::BitsId;
use super::header::{Header, HeaderError};
use super::ledger::Ledger;
use super::parcel::{Description, Packing, Part, Unpacking, open, unpack, verify};
use super::{bits as files, journal};

/// Reads `bytes` as a header; what is accepted is read the same after it was written again.
///
/// # Panics
///
/// If it is not.
pub fn header(bytes: &[u8]) {
    let (format, life) = match Header::open(cells(&file(bytes))) {
        Ok((_, format, life)) => (format, life),
        Err(HeaderError::Damaged | HeaderError::Newer(_)) => return,
        Err(HeaderError::Io(error)) => panic!("memory does not fail: {error}"),
    };
    let Some(mut life) = life else {
        return;
    };
    let again = file(&[]);
    let mut header = Header::create(cells(&again), &format).expect("memory does not fail");
    header.store(&life).expect("memory does not fail");
    let (_, format_again, life_again) = Header::open(cells(&again)).expect("it was just written");
    let mut life_again = life_again.expect("it was just written");
    assert_eq!(format_again, format);
    // A reason that was no text has become longer, and is cut to what fits.
    assert!(life.lost_reason.starts_with(&life_again.lost_reason));
    life.lost_reason.clear();
    life_again.lost_reason.clear();
    assert_eq!(life_again, life);
}

/// Replays `bytes` as a journal; what is found is found again after it was written again.
///
/// # Panics
///
/// If it is not.
pub fn journal(bytes: &[u8]) {
    let (records, damage, number) = journal::replay(bytes);
    assert!(records.len() as u64 <= number, "numbers rise");
    assert!(damage.within + damage.at_end <= bytes.len().div_ceil(512) as u64);
    let mut again = Vec::new();
    for (record, number) in records.iter().zip(1..) {
        again.extend(journal::encode(number, record).expect("it was JSON before"));
    }
    let (found, damage, _) = journal::replay(&again);
    assert_eq!((&found, damage.within, damage.at_end), (&records, 0, 0));
    // Written anew, it says the same, but for presumed eras that nobody asks for.
    let mut ledger: Ledger = records.iter().collect();
    let mut anew: Ledger = ledger.records().iter().collect();
    assert!(
        anew.presumed
            .iter()
            .all(|era| ledger.presumed.contains(era))
    );
    ledger.presumed.clear();
    anew.presumed.clear();
    assert_eq!(anew, ledger);
}

/// Reads `bytes` as the bits of the bitmap that they say they are of; what is accepted is what would be
/// written of it.
///
/// # Panics
///
/// If it is not.
pub fn bits(bytes: &[u8]) {
    let field = |at: usize| {
        bytes
            .get(at..at + 8)
            .map(|b| b.try_into().expect("eight bytes"))
    };
    let (Some(uuid), Some(revision), Some(granularity)) = (
        bytes
            .get(24..40)
            .and_then(|uuid| Uuid::from_slice(uuid).ok()),
        field(40).map(u64::from_le_bytes),
        field(48).map(u64::from_le_bytes),
    ) else {
        return;
    };
    let Ok(granularity) = BitGranularity::new(granularity) else {
        return;
    };
    let id = BitsId { uuid, revision };
    if let Ok(bits) = files::decode(id, granularity, bytes) {
        assert_eq!(files::encode(id, &bits), bytes);
        let dirty = bits.dirty(0..u64::MAX).map(|range| range.end - range.start);
        assert_eq!(dirty.sum::<u64>(), bits.dirty_bytes());
    }
}

/// Reads `bytes` as an exported state, as they are and with the hash that belongs to them; what is
/// accepted is read the same after it was packed again.
///
/// # Panics
///
/// If it is not.
pub fn parcel(bytes: &[u8]) {
    let found = unpacked(bytes);
    let hash = blake3::hash(bytes);
    let sealed = unpacked(&[bytes, hash.as_bytes()].concat());
    for (description, Stretches(files)) in found.into_iter().chain(sealed) {
        let mut packing = Packing::begin(Vec::new(), &description).expect("memory does not fail");
        for (part, length, stretches) in &files {
            packing.file(*part, *length).expect("memory does not fail");
            for (offset, bytes) in stretches {
                packing.bytes(*offset, bytes).expect("memory does not fail");
            }
        }
        let again = packing.finish().expect("memory does not fail");
        let (description_again, Stretches(again)) = unpacked(&again).expect("it was just packed");
        assert_eq!(description_again, description);
        // Stretches of zeroes are not packed.
        assert_eq!(again, without_zeroes(files));
    }
}

/// Files.
#[derive(Default)]
struct Stretches(Vec<Unpacked>);

/// A file: which, how long, and what is stored in it.
type Unpacked = (Part, u64, Vec<(u64, Vec<u8>)>);

impl Unpacking for Stretches {
    fn begin(&mut self, part: Part, length: u64) -> io::Result<()> {
        assert!(self.0.last().is_none_or(|(last, ..)| *last < part));
        self.0.push((part, length, Vec::new()));
        Ok(())
    }

    fn store(&mut self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        let (_, length, stretches) = self.0.last_mut().expect("a file has begun");
        let end = stretches
            .last()
            .map_or(0, |(at, last)| at + last.len() as u64);
        assert!(offset >= end && offset + bytes.len() as u64 <= *length && !bytes.is_empty());
        stretches.push((offset, bytes.to_vec()));
        Ok(())
    }
}

fn without_zeroes(mut files: Vec<Unpacked>) -> Vec<Unpacked> {
    for (_, _, stretches) in &mut files {
        stretches.retain(|(_, bytes)| !block::is_zero(bytes));
    }
    files
}

fn unpacked(bytes: &[u8]) -> Option<(Description, Stretches)> {
    let body = verify(&mut Cursor::new(bytes)).ok()?;
    let mut parcel = &bytes[..body as usize];
    let description = open(&mut parcel).ok()?;
    let mut files = Stretches::default();
    unpack(&mut parcel, &mut files).ok()?;
    Some((description, files))
}

fn file(bytes: &[u8]) -> File {
    let file = File::from(memfd_create("fuzzing", MemfdFlags::CLOEXEC).expect("there is memory"));
    file.write_all_at(bytes, 0).expect("there is memory");
    file
}

fn cells(file: &File) -> Cells {
    Cells::from(file.try_clone().expect("there are descriptors"))
}
