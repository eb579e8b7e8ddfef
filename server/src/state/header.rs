//! What a state directory is about, and how the last server left it.
//!
//! One file of sectors, each with a CRC-32 of its own, so that storage writes each of them
//! whole or not at all. Sector 0 never changes; sectors 1 and 2 take turns, and the valid one with
//! the higher number counts. Sector 3 is [where it is recorded](Loss) that tracking was lost, and
//! sector 4 that [a sync of the image failed](Doubt).

use std::io;

use bitmap::Granularity;
use block::Cells;
use thiserror::Error;
use uuid::Uuid;

use super::identity::ImageIdentity;
use crate::disk::{Doubt, Durability, Growth, Loss};
use crate::files::CellPages;

/// The file, whose room was taken when it was made.
pub(crate) struct Header {
    cells: Cells,
    number: u64,
}

/// What never changes.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) struct Format {
    /// The disk.
    pub(crate) uuid: Uuid,
    /// Of the era map.
    pub(crate) granularity: Granularity,
}

/// How the last server left things.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub(crate) struct Life {
    /// Its end was recorded, last of all.
    pub(crate) clean: bool,
    /// Nothing that was not durable can be believed: a sync failed, or a recovery from a power cut was
    /// not finished. Of the image's syncs it is found, and not stored, here.
    pub(crate) in_doubt: bool,
    /// The boot of the machine in which it ran.
    pub(crate) boot: [u8; 16],
    /// The mounts of the image and of this directory.
    pub(crate) mounts: [u64; 2],
    /// No era above this was ever used.
    pub(crate) era_high: u32,
    /// Checkpoints of this era and before are of no use: what changed since is not known.
    pub(crate) lost_era: u32,
    /// Why, in words; cut to what fits.
    pub(crate) lost_reason: String,
    /// The image, at a clean end as it was then.
    pub(crate) image: ImageIdentity,
    /// What its tracking survived.
    pub(crate) durability: Durability,
    /// The disk was being enlarged. The image may have either size, and what is new need not be
    /// marked.
    pub(crate) growth: Option<Growth>,
}

/// Why a state directory cannot be used.
#[derive(Debug, Error)]
pub(crate) enum HeaderError {
    /// It is not a state directory, or its first sector is damaged.
    #[error("the header is damaged")]
    Damaged,
    /// A later version made it.
    #[error("it was made by a newer version ({0}), which this one cannot read")]
    Newer(String),
    /// It cannot be read.
    #[error(transparent)]
    Io(#[from] io::Error),
}

impl Header {
    /// Writes a new header. It must be synced before anything relies on it.
    pub(crate) fn create(cells: Cells, format: &Format) -> io::Result<Self> {
        // Written and not only reserved: nothing that is stored here later may need room.
        cells.store(0, &[0; FILE_BYTES])?;
        cells.store(Loss::<CellPages>::OFFSET, &Loss::<CellPages>::empty())?;
        cells.store(Doubt::<CellPages>::OFFSET, &Doubt::<CellPages>::none())?;
        let mut sector = Sector::new();
        sector.put(MAGIC);
        sector.put(&VERSION.to_le_bytes());
        // Feature bits: compatible, read-only compatible, incompatible. None is in use yet.
        sector.put(&[0; 24]);
        sector.put(format.uuid.as_bytes());
        sector.put(&format.granularity.bytes().to_le_bytes());
        cells.store(0, &sector.seal())?;
        Ok(Self { cells, number: 0 })
    }

    /// Reads what never changes, and how things were left; `None` for the latter where neither
    /// copy is whole.
    pub(crate) fn open(cells: Cells) -> Result<(Self, Format, Option<Life>), HeaderError> {
        let format = read_format(&cells)?;
        let mut found: Option<(u64, Life)> = None;
        for place in 1..=2 {
            let mut bytes = [0; SECTOR_BYTES];
            cells.load(place * SECTOR_BYTES as u64, &mut bytes)?;
            let Some(copy) = Sector::open(&bytes).and_then(read_life) else {
                continue;
            };
            if found.as_ref().is_none_or(|(number, _)| *number < copy.0) {
                found = Some(copy);
            }
        }
        let number = found.as_ref().map_or(0, |(number, _)| *number);
        let sync_failed = Doubt::of(CellPages::from(cells.clone())).is_told()?;
        let life = found.map(|(_, life)| Life {
            // After a clean end everything was durable.
            in_doubt: life.in_doubt || sync_failed && !life.clean,
            ..life
        });
        Ok((Self { cells, number }, format, life))
    }

    /// Stores how things stand, over the older copy. Durable after a [`sync`](Self::sync).
    pub(crate) fn store(&mut self, life: &Life) -> io::Result<()> {
        let number = self.number + 1;
        let place = 1 + number % 2;
        self.cells
            .store(place * SECTOR_BYTES as u64, &write_life(number, life))?;
        self.number = number;
        Ok(())
    }

    /// Stores that tracking was never lost, where that cannot be read. Durable after a
    /// [`sync`](Self::sync), which must come after what makes up for it is stored as well.
    pub(crate) fn forget_loss(&self) -> io::Result<()> {
        self.cells
            .store(Loss::<CellPages>::OFFSET, &Loss::<CellPages>::empty())
    }

    /// Stores that no sync of the image has failed. Durable after a [`sync`](Self::sync), which must come
    /// after the sector of the life says the rest.
    pub(crate) fn forget_doubt(&self) -> io::Result<()> {
        self.cells
            .store(Doubt::<CellPages>::OFFSET, &Doubt::<CellPages>::none())
    }

    /// The file, for what has a sector of its own.
    pub(crate) fn cells(&self) -> &Cells {
        &self.cells
    }

    /// Makes durable what was stored.
    pub(crate) async fn sync(&self) -> io::Result<()> {
        self.cells.sync().await
    }
}

fn read_format(cells: &Cells) -> Result<Format, HeaderError> {
    let mut bytes = [0; SECTOR_BYTES];
    cells.load(0, &mut bytes)?;
    let mut sector = Sector::open(&bytes).ok_or(HeaderError::Damaged)?;
    if sector.take::<8>() != Some(*MAGIC) {
        return Err(HeaderError::Damaged);
    }
    let version = sector.take().map_or(0, u32::from_le_bytes);
    if version != VERSION {
        return Err(HeaderError::Newer(format!("version {version}")));
    }
    let _compatible = sector.number();
    let read_only_compatible = sector.number().unwrap_or(0);
    let incompatible = sector.number().unwrap_or(0);
    if (read_only_compatible, incompatible) != (0, 0) {
        let features = format!("features {read_only_compatible:#x}, {incompatible:#x}");
        return Err(HeaderError::Newer(features));
    }
    let uuid = Uuid::from_bytes(sector.take().ok_or(HeaderError::Damaged)?);
    let granularity = sector
        .number()
        .and_then(|bytes| Granularity::new(bytes).ok());
    Ok(Format {
        uuid,
        granularity: granularity.ok_or(HeaderError::Damaged)?,
    })
}

fn write_life(number: u64, life: &Life) -> [u8; SECTOR_BYTES] {
    let mut sector = Sector::new();
    sector.put(&number.to_le_bytes());
    sector.put(&[u8::from(life.clean), u8::from(life.in_doubt)]);
    sector.put(&life.boot);
    life.mounts
        .iter()
        .for_each(|mount| sector.put(&mount.to_le_bytes()));
    sector.put(&life.era_high.to_le_bytes());
    sector.put(&life.lost_era.to_le_bytes());
    life.image
        .numbers()
        .iter()
        .for_each(|number| sector.put(&number.to_le_bytes()));
    let mut length = life.lost_reason.len().min(REASON_MAX);
    while !life.lost_reason.is_char_boundary(length) {
        length -= 1;
    }
    sector.put(&(length as u64).to_le_bytes());
    sector.put(&life.lost_reason.as_bytes()[..length]);
    sector.at = AFTER_REASON;
    sector.put(&[match life.durability {
        Durability::Power => 0,
        Durability::Process => 1,
        Durability::None => 2,
    }]);
    let growth = life
        .growth
        .map_or([0; 2], |growth| [growth.from, growth.to]);
    for size in growth {
        sector.put(&size.to_le_bytes());
    }
    sector.seal()
}

fn read_life(mut sector: Sector) -> Option<(u64, Life)> {
    let number = sector.number()?;
    let [clean, in_doubt] = sector.take()?;
    let boot = sector.take()?;
    let mounts = [sector.number()?, sector.number()?];
    let era_high = u32::from_le_bytes(sector.take()?);
    let lost_era = u32::from_le_bytes(sector.take()?);
    let mut image = [0; ImageIdentity::NUMBERS];
    for value in &mut image {
        *value = sector.number()?;
    }
    let length = sector.number()? as usize;
    let reason = sector.rest().get(..length.min(REASON_MAX))?;
    let lost_reason = String::from_utf8_lossy(reason).into_owned();
    sector.at = AFTER_REASON;
    let [durability] = sector.take()?;
    let [from, to] = [sector.number()?, sector.number()?];
    let life = Life {
        clean: clean != 0,
        in_doubt: in_doubt != 0,
        boot,
        mounts,
        era_high,
        lost_era,
        lost_reason,
        image: ImageIdentity::from_numbers(image),
        durability: match durability {
            0 => Durability::Power,
            1 => Durability::Process,
            // Whatever it means, less is not promised.
            _ => Durability::None,
        },
        growth: (to > 0).then_some(Growth { from, to }),
    };
    Some((number, life))
}

/// A sector that is being written or read: its CRC-32, and then whatever is put into it.
struct Sector {
    bytes: [u8; SECTOR_BYTES],
    at: usize,
}

impl Sector {
    fn new() -> Self {
        Self {
            bytes: [0; SECTOR_BYTES],
            at: 4,
        }
    }

    fn open(bytes: &[u8; SECTOR_BYTES]) -> Option<Self> {
        let sum = u32::from_le_bytes(bytes[..4].try_into().ok()?);
        (sum == crc32fast::hash(&bytes[4..])).then_some(Self {
            bytes: *bytes,
            at: 4,
        })
    }

    fn put(&mut self, part: &[u8]) {
        self.bytes[self.at..self.at + part.len()].copy_from_slice(part);
        self.at += part.len();
    }

    fn seal(mut self) -> [u8; SECTOR_BYTES] {
        let sum = crc32fast::hash(&self.bytes[4..]);
        self.bytes[..4].copy_from_slice(&sum.to_le_bytes());
        self.bytes
    }

    fn take<const N: usize>(&mut self) -> Option<[u8; N]> {
        let part = self.bytes.get(self.at..self.at + N)?.try_into().ok()?;
        self.at += N;
        Some(part)
    }

    fn number(&mut self) -> Option<u64> {
        self.take().map(u64::from_le_bytes)
    }

    fn rest(&self) -> &[u8] {
        &self.bytes[self.at..]
    }
}

const MAGIC: &[u8; 8] = b"STILLPNT";
const VERSION: u32 = 1;
const SECTOR_BYTES: usize = 512;
/// One page of a file system.
const FILE_BYTES: usize = 4096;
/// What the sector of a life has room for.
const REASON_MAX: usize = 300;
/// What came later has its place behind the longest reason.
const AFTER_REASON: usize = 110 + REASON_MAX;

#[cfg(test)]
mod tests {
    use super::*;

    fn life(number: u32) -> Life {
        Life {
            era_high: number,
            lost_reason: "é".repeat(400),
            growth: (number > 2).then_some(Growth {
                from: 512,
                to: 1024,
            }),
            ..Life::default()
        }
    }

    fn header(dir: &tempfile::TempDir) -> Header {
        let format = Format {
            uuid: Uuid::from_u128(7),
            granularity: Granularity::DEFAULT,
        };
        Header::create(Cells::create(&dir.path().join("header")).unwrap(), &format).unwrap()
    }

    fn reopen(dir: &tempfile::TempDir) -> Result<(Header, Format, Option<Life>), HeaderError> {
        Header::open(Cells::open(&dir.path().join("header")).unwrap())
    }

    #[test]
    fn the_newest_whole_copy_counts() {
        let dir = tempfile::tempdir().unwrap();
        let mut header = header(&dir);
        for number in 1..=3 {
            header.store(&life(number)).unwrap();
        }
        let (_, format, found) = reopen(&dir).unwrap();
        assert_eq!(format.uuid, Uuid::from_u128(7));
        let found = found.unwrap();
        assert_eq!((found.era_high, found.lost_reason.len()), (3, 300));
        assert_eq!(found.growth, life(3).growth);

        // The copy of the third is in sector 2, that of the second in sector 1.
        header.cells.store(2 * 512 + 40, &[0xff]).unwrap();
        assert_eq!(reopen(&dir).unwrap().2.unwrap().era_high, 2);
        header.cells.store(512 + 40, &[0xff]).unwrap();
        assert_eq!(reopen(&dir).unwrap().2, None);
    }

    #[test]
    fn a_newer_or_a_foreign_header_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let header = header(&dir);
        let mut bytes = [0; 512];
        header.cells.load(0, &mut bytes).unwrap();
        for (at, value) in [(12, 2), (24, 1), (32, 1)] {
            let mut newer = Sector { bytes, at: 0 };
            newer.bytes[at] = value;
            header.cells.store(0, &newer.seal()).unwrap();
            assert!(
                matches!(reopen(&dir), Err(HeaderError::Newer(_))),
                "byte {at}"
            );
        }
        header.cells.store(0, &[0; 512]).unwrap();
        assert!(matches!(reopen(&dir), Err(HeaderError::Damaged)));
    }
}
