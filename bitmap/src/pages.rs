use std::io;
use std::sync::{Arc, PoisonError};

use crate::PageStore;
use crate::growing::Growing;
use crate::kept::{Kept, Stores};
use crate::sync::{Mutex, MutexGuard};

/// What is durably known about each page of an era map: which of its regions were ever written,
/// which are active, and what it sums to while none is.
///
/// A region is active while a mark or a byte written in it may not be durable. Of a page with an
/// active region nothing is promised but that its other chunks are right; of a page with none, that
/// it is what the checksum says. All of this for one page lies in one sector, so that it changes at
/// once; and every sector is there from the beginning, so what is missing or does not add up is
/// damage, and not an end.
#[derive(Debug)]
pub struct PageTable<P> {
    sectors: Growing<Mutex<Sector>>,
    stores: Stores<P>,
}

/// What is known about one page.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct PageRecord {
    /// One bit for each region of the page.
    pub active: u16,
    /// One bit for each region of the page: once it is set, every chunk there has an entry.
    pub filled: u16,
    /// The [sum](crate::Eras::checksum) of the page, while something is filled and nothing active.
    pub checksum: u32,
}

/// The records of some neighbouring pages, which are stored as one.
type Sector = [PageRecord; RECORDS];

impl<P: PageStore> PageTable<P> {
    /// The table of `pages` pages on which nothing is stored yet, stored whole.
    pub fn create(pages: u64, store: P) -> io::Result<Self> {
        let count = pages.div_ceil(RECORDS as u64);
        let sectors = (0..count)
            .map(|_| Mutex::new([PageRecord::default(); RECORDS]))
            .collect();
        let table = Self {
            sectors,
            stores: Stores::new(store),
        };
        for number in 0..count as usize {
            table.store_sector(number, &table.sector(number))?;
        }
        Ok(table)
    }

    /// The table that is in `store`, and the pages of which nothing is known because their sector
    /// is damaged. Those are taken to have every region filled and active.
    pub fn load(pages: u64, store: P) -> io::Result<(Self, Vec<u64>)> {
        let count = pages.div_ceil(RECORDS as u64);
        let (mut sectors, mut damaged) = (Vec::with_capacity(count as usize), Vec::new());
        for number in 0..count {
            let mut bytes = [0; SECTOR_BYTES];
            store.load(number * SECTOR_BYTES as u64, &mut bytes)?;
            let sector = decode(number as u32, &bytes).unwrap_or_else(|| {
                let first = number * RECORDS as u64;
                damaged.extend(first..(first + RECORDS as u64).min(pages));
                [PageRecord {
                    active: u16::MAX,
                    filled: u16::MAX,
                    checksum: 0,
                }; RECORDS]
            });
            sectors.push(Mutex::new(sector));
        }
        Ok((
            Self {
                sectors: sectors.into_iter().collect(),
                stores: Stores::new(store),
            },
            damaged,
        ))
    }

    /// Makes room for `pages` pages, of which the new ones begin as those of a new table, where there
    /// was room for `before`. One at a time may call this.
    pub fn make_room(&self, before: u64, pages: u64) -> io::Result<()> {
        let count = pages.div_ceil(RECORDS as u64) as usize;
        for number in self.sectors.len()..count {
            self.store_sector(number, &[PageRecord::default(); RECORDS])?;
        }
        // What a sector has behind the last page may be left of a disk that was larger once.
        for page in before..pages.min(self.sectors.len() as u64 * RECORDS as u64) {
            self.update(page, |record| *record = PageRecord::default())?;
        }
        let empty = || Mutex::new([PageRecord::default(); RECORDS]);
        self.sectors.grow(count, empty);
        Ok(())
    }

    /// What is known about `page`.
    pub fn record(&self, page: u64) -> PageRecord {
        let (number, place) = split(page);
        self.sector(number)[place]
    }

    /// Changes what is known about `page`, in the store and then in memory.
    ///
    /// `change` sees the record as it is now, alone. On an error nothing has changed in memory.
    pub fn update(&self, page: u64, change: impl FnOnce(&mut PageRecord)) -> io::Result<()> {
        let (number, place) = split(page);
        let mut sector = self.sector(number);
        let mut next = *sector;
        change(&mut next[place]);
        if next != *sector {
            self.store_sector(number, &next)?;
            *sector = next;
        }
        Ok(())
    }

    /// The same, if `change` succeeds, and stores the sector even if nothing in it has changed.
    pub fn rewrite(
        &self,
        page: u64,
        change: impl FnOnce(&mut PageRecord) -> io::Result<()>,
    ) -> io::Result<()> {
        let (number, place) = split(page);
        let mut sector = self.sector(number);
        change(&mut sector[place])?;
        self.store_sector(number, &sector)
    }

    /// The store, to be synced.
    pub fn store(&self) -> Arc<P> {
        self.stores.current()
    }

    fn sector(&self, number: usize) -> MutexGuard<'_, Sector> {
        self.sectors
            .at(number)
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    fn store_sector(&self, number: usize, sector: &Sector) -> io::Result<()> {
        self.stores.shared().store(
            (number * SECTOR_BYTES) as u64,
            &encode(number as u32, sector),
        )
    }
}

/// A part is a sector, whose lock keeps stores out while it is copied.
impl<P: PageStore> Kept for PageTable<P> {
    type Store = P;

    fn store(&self) -> Arc<P> {
        self.stores.current()
    }

    fn parts(&self) -> u64 {
        self.sectors.len() as u64
    }

    fn begin_anew(&self, next: Arc<P>) {
        self.stores.begin(next);
    }

    fn copy_part(&self, number: u64) -> io::Result<()> {
        let sector = self.sector(number as usize);
        let bytes = encode(number as u32, &sector);
        match &self.stores.shared().next {
            Some(next) => next.store(number * SECTOR_BYTES as u64, &bytes),
            None => Ok(()),
        }
    }

    fn end_anew(&self, succeeded: bool) {
        self.stores.end(succeeded);
    }
}

fn split(page: u64) -> (usize, usize) {
    (
        (page / RECORDS as u64) as usize,
        (page % RECORDS as u64) as usize,
    )
}

/// A sector: its CRC-32 (of all that follows), its number, and the records.
fn encode(number: u32, sector: &Sector) -> [u8; SECTOR_BYTES] {
    let mut bytes = [0; SECTOR_BYTES];
    bytes[4..8].copy_from_slice(&number.to_le_bytes());
    for (record, place) in sector
        .iter()
        .zip(bytes[HEAD_BYTES..].chunks_exact_mut(RECORD_BYTES))
    {
        place[0..4].copy_from_slice(&record.checksum.to_le_bytes());
        place[4..6].copy_from_slice(&record.active.to_le_bytes());
        place[6..8].copy_from_slice(&record.filled.to_le_bytes());
    }
    let sum = crc32fast::hash(&bytes[4..]);
    bytes[0..4].copy_from_slice(&sum.to_le_bytes());
    bytes
}

/// `None` unless every byte is as [`encode`] could have written it for this place.
fn decode(number: u32, bytes: &[u8; SECTOR_BYTES]) -> Option<Sector> {
    let mut sector = [PageRecord::default(); RECORDS];
    for (record, place) in sector
        .iter_mut()
        .zip(bytes[HEAD_BYTES..].chunks_exact(RECORD_BYTES))
    {
        record.checksum = u32::from_le_bytes(place[0..4].try_into().ok()?);
        record.active = u16::from_le_bytes(place[4..6].try_into().ok()?);
        record.filled = u16::from_le_bytes(place[6..8].try_into().ok()?);
    }
    // Nothing is active that was not filled before.
    let possible = sector.iter().all(|r| r.active & !r.filled == 0);
    (possible && encode(number, &sector) == *bytes).then_some(sector)
}

/// What storage writes whole or not at all.
const SECTOR_BYTES: usize = 512;
const HEAD_BYTES: usize = 8;
const RECORD_BYTES: usize = 8;
const RECORDS: usize = (SECTOR_BYTES - HEAD_BYTES) / RECORD_BYTES;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::MemoryPages;

    #[test]
    fn what_was_updated_is_loaded_again() {
        let table = PageTable::create(130, MemoryPages::default()).unwrap();
        let record = PageRecord {
            active: 0x8001,
            filled: 0x8003,
            checksum: 7,
        };
        table.update(129, |r| *r = record).unwrap();

        let store = MemoryPages::from(table.store().contents());
        let (loaded, damaged) = PageTable::load(130, store).unwrap();
        assert_eq!(damaged, Vec::<u64>::new());
        assert_eq!(loaded.record(129), record);
        assert_eq!(loaded.record(128), PageRecord::default());
    }

    #[test]
    fn every_flipped_bit_is_noticed_and_costs_one_sector() {
        let table = PageTable::create(130, MemoryPages::default()).unwrap();
        table.update(64, |record| record.filled = 1).unwrap();
        let good = table.store().contents();
        for bit in 0..SECTOR_BYTES * 8 {
            let mut bad = good.clone();
            bad[SECTOR_BYTES + bit / 8] ^= 1 << (bit % 8);
            let (loaded, damaged) = PageTable::load(130, MemoryPages::from(bad)).unwrap();
            assert_eq!(damaged, (63..126).collect::<Vec<_>>(), "bit {bit}");
            assert_eq!(loaded.record(64).active, u16::MAX);
            assert_eq!(loaded.record(62), PageRecord::default());
        }
    }

    #[test]
    fn what_is_missing_zeroed_or_in_another_place_is_damage() {
        let table = PageTable::create(130, MemoryPages::default()).unwrap();
        let good = table.store().contents();
        let short = MemoryPages::from(good[..SECTOR_BYTES].to_vec());
        assert_eq!(PageTable::load(130, short).unwrap().1.len(), 130 - 63);
        let zeroed = MemoryPages::from(vec![0; good.len()]);
        assert_eq!(PageTable::load(130, zeroed).unwrap().1.len(), 130);
        let mut moved = good.clone();
        moved.copy_within(0..SECTOR_BYTES, SECTOR_BYTES);
        assert_eq!(
            PageTable::load(130, MemoryPages::from(moved))
                .unwrap()
                .1
                .len(),
            63
        );
    }
}
