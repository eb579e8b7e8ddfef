//! The head of an image, as it is written.

use std::fs::File;
use std::os::unix::fs::FileExt;

use super::directory::List;
use super::refcounts::NewTable;
use super::{NotStored, SECTOR, be32, be64, read_at};
use crate::qcow2::header::{
    BITMAPS, BITMAPS_BYTES, CONSISTENT_BITMAPS, Header, RAW_DATA, Refusal, START_BYTES,
};

/// The first cluster, and where things are in it.
pub(super) struct Head {
    header: Header,
    bytes: Vec<u8>,
    /// What an extension that lists bitmaps says.
    bitmaps_at: Option<u64>,
    /// Where the next extension would begin.
    free_at: u64,
}

impl Head {
    pub(super) fn read(file: &File) -> Result<Self, NotStored> {
        let length = file.metadata()?.len();
        if length < START_BYTES as u64 {
            return Err(Refusal::NotQcow2.into());
        }
        let start = read_at(file, 0, START_BYTES as u64)?;
        let start = start.first_chunk().expect("as many were read");
        let cluster = Header::length(start)? as u64;
        let mut bytes = read_at(file, 0, length.min(cluster))?;
        let header = Header::parse(&bytes)?;
        if header.version < 3 {
            return Err(NotStored::Version2);
        }
        bytes.resize(cluster as usize, 0);
        let (bitmaps_at, free_at) = extensions(&bytes)?;
        if bitmaps_at.is_some() != header.bitmaps.is_some() {
            return Err(NotStored::Damaged(
                "its list of bitmaps is not as long as one",
            ));
        }
        Ok(Self {
            header,
            bytes,
            bitmaps_at,
            free_at,
        })
    }

    pub(super) fn header(&self) -> &Header {
        &self.header
    }

    /// Of the disk, in bytes.
    pub(super) fn size(&self) -> u64 {
        self.header.size
    }

    pub(super) fn cluster(&self) -> u64 {
        1 << self.header.cluster_bits
    }

    /// Where clusters are counted: where that begins, and how many clusters long it is.
    pub(super) fn refcount_table(&self) -> (u64, u64) {
        (be64(&self.bytes, 48), be32(&self.bytes, 56).into())
    }

    /// Where the first table of the disk begins, and how long it is in bytes.
    pub(super) fn first_table(&self) -> (u64, u64) {
        let entries = u64::from(be32(&self.bytes, 36));
        (self.header.l1_offset, 8 * entries)
    }

    /// How wide a count is, as a power of two of bits.
    pub(super) fn refcount_order(&self) -> u32 {
        be32(&self.bytes, 96)
    }

    /// Refuses where the head has no room for one more extension.
    pub(super) fn check_room(&self) -> Result<(), NotStored> {
        if self.bitmaps_at.is_some() {
            return Ok(());
        }
        let end = self.free_at + EXTENSION + END;
        let end = self
            .moved_name(end)
            .map_or(end, |(_, to, length)| to + length);
        // Without a marker of their end it is the name behind them that ends the extensions.
        let has_marker = self.free_at + END <= self.extensions_end();
        if end > self.cluster() || (!has_marker && self.free_at + END > SECTOR) {
            return Err(NotStored::NoRoom("its head has no room for bitmaps"));
        }
        Ok(())
    }

    /// Names another table of counts, durably.
    pub(super) fn name_refcounts(
        &mut self,
        file: &File,
        table: &NewTable,
    ) -> Result<(), NotStored> {
        let mut fields = table.offset.to_be_bytes().to_vec();
        fields.extend((table.clusters as u32).to_be_bytes());
        self.write(file, 48, &fields)
    }

    /// Names a list of bitmaps, which is at `offset`, durably.
    pub(super) fn name_bitmaps(
        &mut self,
        file: &File,
        list: &List,
        offset: u64,
    ) -> Result<(), NotStored> {
        let mut says = list.count.to_be_bytes().to_vec();
        says.extend([0; 4]);
        says.extend((list.bytes.len() as u64).to_be_bytes());
        says.extend(offset.to_be_bytes());
        let cleared = self.autoclear() & KEPT;
        if cleared != self.autoclear() {
            self.set_autoclear(file, cleared)?;
        }
        match self.bitmaps_at {
            Some(at) if self.is_consistent() && at / SECTOR == (at + 23) / SECTOR => {
                return self.write(file, at, &says);
            }
            Some(at) => {
                // Two stores: what is half of each is not to be believed.
                self.set_autoclear(file, cleared & !CONSISTENT_BITMAPS)?;
                self.write(file, at, &says)?;
            }
            None => self.add_extension(file, &says)?,
        }
        if self.is_consistent() {
            return Ok(());
        }
        self.set_autoclear(file, cleared | CONSISTENT_BITMAPS)
    }

    /// Behind the end first, where nobody looks yet; then the end becomes its beginning.
    fn add_extension(&mut self, file: &File, says: &[u8]) -> Result<(), NotStored> {
        let at = self.free_at;
        if let Some((from, to, length)) = self.moved_name(at + EXTENSION + END) {
            let name = self.bytes[from as usize..(from + length) as usize].to_vec();
            self.write(file, to, &name)?;
            if at + END <= self.extensions_end() {
                self.write(file, 8, &to.to_be_bytes())?;
            } else {
                // Else the old name would be taken for an extension: the end goes there in one sector with
                // the place of the name.
                self.bytes[8..16].copy_from_slice(&to.to_be_bytes());
                self.bytes[at as usize..(at + END) as usize].fill(0);
                let sector = self.bytes[..SECTOR as usize].to_vec();
                self.write(file, 0, &sector)?;
            }
        }
        let mut behind = says.to_vec();
        behind.extend([0; END as usize]);
        self.write(file, at + 8, &behind)?;
        let mut begins = BITMAPS.to_be_bytes().to_vec();
        begins.extend((BITMAPS_BYTES as u32).to_be_bytes());
        self.bitmaps_at = Some(at + 8);
        if at + 8 > SECTOR {
            return self.write(file, at, &begins);
        }
        // In one sector with the bit that says that it can be believed.
        let end = at as usize + begins.len();
        self.bytes[at as usize..end].copy_from_slice(&begins);
        let bits = self.autoclear() | CONSISTENT_BITMAPS;
        self.bytes[AUTOCLEAR as usize..][..8].copy_from_slice(&bits.to_be_bytes());
        let sector = self.bytes[..SECTOR as usize].to_vec();
        self.write(file, 0, &sector)
    }

    /// From where to where the name of the backing file has to go, and how long it is, if what ends at
    /// `end` would lie on it.
    fn moved_name(&self, end: u64) -> Option<(u64, u64, u64)> {
        let (from, length) = (be64(&self.bytes, 8), u64::from(be32(&self.bytes, 16)));
        (from != 0 && from < end)
            .then(|| (from, end.max(from + length).next_multiple_of(8), length))
    }

    /// Where extensions end without a marker that says so.
    fn extensions_end(&self) -> u64 {
        extensions_end(&self.bytes) as u64
    }

    fn is_consistent(&self) -> bool {
        self.autoclear() & CONSISTENT_BITMAPS != 0
    }

    fn autoclear(&self) -> u64 {
        be64(&self.bytes, AUTOCLEAR as usize)
    }

    fn set_autoclear(&mut self, file: &File, bits: u64) -> Result<(), NotStored> {
        self.write(file, AUTOCLEAR, &bits.to_be_bytes())
    }

    fn write(&mut self, file: &File, at: u64, bytes: &[u8]) -> Result<(), NotStored> {
        self.bytes[at as usize..at as usize + bytes.len()].copy_from_slice(bytes);
        file.write_all_at(bytes, at)?;
        file.sync_data()?;
        Ok(())
    }
}

/// What the extension says that lists bitmaps, and where the extensions end.
fn extensions(head: &[u8]) -> Result<(Option<u64>, u64), NotStored> {
    let end = extensions_end(head);
    let mut at = be32(head, 100) as usize;
    if !at.is_multiple_of(8) {
        return Err(NotStored::Damaged("its head is of no whole length"));
    }
    let mut bitmaps_at = None;
    while at + 8 <= end {
        let (kind, length) = (be32(head, at), be32(head, at + 4) as usize);
        if kind == 0 {
            break;
        }
        if kind == BITMAPS {
            if bitmaps_at.is_some() || length != BITMAPS_BYTES {
                return Err(NotStored::Damaged("its list of bitmaps is no list"));
            }
            bitmaps_at = Some(at as u64 + 8);
        }
        at += 8 + length.next_multiple_of(8);
    }
    Ok((bitmaps_at, at as u64))
}

fn extensions_end(head: &[u8]) -> usize {
    match be64(head, 8) {
        0 => head.len(),
        offset => head.len().min(offset as usize),
    }
}

const AUTOCLEAR: u64 = 88;

/// What says that it is still true after a bitmap was stored. Whoever writes an image clears what it does
/// not know.
const KEPT: u64 = CONSISTENT_BITMAPS | RAW_DATA;

/// An extension that lists bitmaps, and the end of all.
const EXTENSION: u64 = 8 + BITMAPS_BYTES as u64;
const END: u64 = 8;
