//! A file that says what is dirty.

use std::fs::{self, File};
use std::io::{self, BufReader, Read};
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use bitmap::{BitGranularity, Bits};
use block::Engine;
use block::qcow2::{BitmapFile, Refusal, Room, Unreadable};
use rustix::fs::OFlags;
use tokio::runtime;

use super::extents;
use crate::failure::Failure;

/// What is to be read.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(crate) struct Wanted {
    /// The file, by a path from the root on.
    pub(crate) from: PathBuf,
    /// Of a file that has several, the bitmap.
    pub(crate) bitmap: String,
    /// How large the disk is that it is to be about, in bytes.
    pub(crate) size: u64,
    /// How much of it one bit is to stand for.
    pub(crate) granularity: BitGranularity,
}

/// Reads what is dirty, rounded outwards to whole bits. May wait for storage.
///
/// What a file is can be told without guessing: no JSON begins as a qcow2 image does.
pub(crate) fn read(wanted: &Wanted) -> Result<Bits, Failure> {
    let path = &wanted.from;
    let file = open(path)?;
    let mut start = [0; MAGIC.len()];
    let length = read_start(&file, &mut start).map_err(|error| cannot_read(path, &error))?;
    let mut dirty = Dirty {
        bits: Bits::new(wanted.granularity),
        size: wanted.size,
    };
    if start[..length] == *MAGIC {
        let runtime = runtime::Builder::new_current_thread().build();
        let runtime = runtime.map_err(|error| cannot_read(path, &error))?;
        runtime.block_on(read_bitmap(wanted, file, &mut dirty))?;
    } else {
        read_list(wanted, &file, &mut dirty)?;
    }
    Ok(dirty.bits)
}

/// What was found dirty so far.
struct Dirty {
    bits: Bits,
    size: u64,
}

impl Dirty {
    fn add(&mut self, range: &Range<u64>) {
        // The last bit of a coarser bitmap may reach beyond the disk, where nothing is dirty.
        self.bits.set(&(range.start..range.end.min(self.size)));
    }
}

fn open(path: &Path) -> Result<File, Failure> {
    let found = fs::metadata(path).map_err(|error| cannot_read(path, &error))?;
    if !found.is_file() {
        let message = format!("'{}' is no file", path.display());
        return Err(Failure::new("cannot-open", message));
    }
    let opened = rustix::fs::open(
        path,
        OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NONBLOCK | OFlags::NOCTTY,
        rustix::fs::Mode::empty(),
    );
    let opened = opened.map_err(|error| cannot_read(path, &error.into()))?;
    Ok(File::from(opened))
}

/// Reads the first bytes, and leaves the file at its start.
fn read_start(file: &File, start: &mut [u8]) -> io::Result<usize> {
    let mut length = 0;
    while length < start.len() {
        match file.read_at(&mut start[length..], length as u64)? {
            0 => break,
            more => length += more,
        }
    }
    Ok(length)
}

fn read_list(wanted: &Wanted, file: &File, dirty: &mut Dirty) -> Result<(), Failure> {
    let path = &wanted.from;
    let length = file.metadata().map_err(|error| cannot_read(path, &error))?;
    if length.len() > LIST_MAX {
        let message = format!(
            "the list in '{}' has {} bytes, and may have {LIST_MAX}",
            path.display(),
            length.len()
        );
        let hint = "a bitmap of a coarser granularity has fewer extents";
        return Err(Failure::new("list-too-long", message).hint(hint));
    }
    let list = BufReader::with_capacity(READ_AT_ONCE, file.take(LIST_MAX));
    let read = extents::read(list, wanted.size, |range| dirty.add(&range));
    read.map_err(|error| {
        let message = format!("'{}': {error}", path.display());
        let hint = "nbdinfo --json --map=qemu:dirty-bitmap:NAME URI prints one";
        Failure::new("bad-extents", message).hint(hint)
    })
}

async fn read_bitmap(wanted: &Wanted, file: File, dirty: &mut Dirty) -> Result<(), Failure> {
    let path = &wanted.from;
    let image = BitmapFile::open(file, Engine::Threads).await;
    let image = image.map_err(|error| cannot_use(path, &error))?;
    let shown = path.display();
    if image.size() != wanted.size {
        let message = format!(
            "'{shown}' is of a disk of {} bytes, and this one has {}",
            image.size(),
            wanted.size
        );
        return Err(Failure::new("other-size", message));
    }
    let bitmaps = image.bitmaps().await;
    let bitmaps = bitmaps.map_err(|error| cannot_read(path, &error))?;
    let found = bitmaps.iter().find(|bitmap| bitmap.name == wanted.bitmap);
    let bitmap = found.ok_or_else(|| {
        let message = format!("'{shown}' has no bitmap '{}'", wanted.bitmap);
        let names: Vec<_> = bitmaps
            .iter()
            .take(LISTED)
            .map(|b| b.name.as_str())
            .collect();
        let hint = match names.as_slice() {
            [] => "it has none at all".to_owned(),
            names => format!(
                "--bitmap says which one is meant; it has: {}",
                names.join(", ")
            ),
        };
        Failure::new("unknown-bitmap", message).hint(hint)
    })?;
    if let Some(why) = bitmap.inconsistent {
        let message = format!(
            "the bitmap '{}' in '{shown}' is inconsistent: {why}",
            bitmap.name
        );
        let hint = "what has changed since is not known: begin with a full backup";
        return Err(Failure::new("bitmap-inconsistent", message).hint(hint));
    }
    let mut room = Room(BITS_MAX);
    let read = image
        .dirty(bitmap, &mut room, |range| dirty.add(&range))
        .await;
    read.map_err(|error| cannot_read(path, &error))
}

fn cannot_read(path: &Path, error: &io::Error) -> Failure {
    let message = format!("cannot read '{}': {error}", path.display());
    Failure::new("cannot-open", message)
}

fn cannot_use(path: &Path, error: &Unreadable) -> Failure {
    let message = format!("cannot use '{}': {error}", path.display());
    let code = match error {
        Unreadable::Refused(Refusal::Encrypted(_)) => "image-encrypted",
        Unreadable::Refused(Refusal::UnknownFeatures(_)) => "image-features",
        Unreadable::Refused(Refusal::Corrupt) => "image-corrupt",
        Unreadable::Refused(Refusal::Dirty) => "image-dirty",
        Unreadable::Lock(_) => "image-locked",
        _ => "bad-image",
    };
    Failure::new(code, message)
}

/// How a qcow2 image begins.
const MAGIC: &[u8] = b"QFI\xfb";

/// Ten million extents and more.
const LIST_MAX: u64 = 1 << 30;

const READ_AT_ONCE: usize = 64 << 10;

/// QEMU's limit for the bits of one bitmap, and as much again for those that are kept.
const BITS_MAX: u64 = 1 << 30;

/// How many names are told to whoever asked for another.
const LISTED: usize = 16;
