//! What the tables of an image say of one stretch of the disk.

use super::header::{Header, OFFSET_MAX};

/// Where the bytes of a stretch are.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Place {
    /// In the image behind, if there is one.
    Absent,
    /// Nowhere: they are zero.
    Zero,
    /// At this offset of the file that has the data.
    Data(u64),
    /// In a compressed cluster, of which this much at most is at this offset of the image.
    Packed { offset: u64, length: u64 },
}

/// How the tables of an image divide its disk.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Geometry {
    /// The size of a cluster, as a power of two.
    pub(crate) cluster_bits: u32,
    /// Of a part of a cluster that can be there by itself: the same, unless clusters have parts.
    pub(crate) part_bits: u32,
    version: u32,
    extended: bool,
    external: bool,
    /// Data is where it is on the disk.
    raw: bool,
}

impl Geometry {
    pub(crate) fn of(header: &Header) -> Self {
        let parts = if header.extended_l2 { PARTS_BITS } else { 0 };
        Self {
            cluster_bits: header.cluster_bits,
            part_bits: header.cluster_bits - parts,
            version: header.version,
            extended: header.extended_l2,
            external: header.data_file.is_some(),
            raw: header.data_file.as_ref().is_some_and(|file| file.raw),
        }
    }

    /// The size of a cluster.
    pub(crate) fn cluster(self) -> u64 {
        1 << self.cluster_bits
    }

    /// How many bytes one entry takes that says where a cluster is.
    pub(crate) fn entry_bytes(self) -> u64 {
        if self.extended { 16 } else { 8 }
    }

    /// How much of a disk a table says where it is, as a power of two.
    pub(crate) fn table_bits(self) -> u32 {
        self.cluster_bits + self.cluster_bits - self.entry_bytes().trailing_zeros()
    }

    /// The table that an entry of the first table leads to, if there is one.
    pub(crate) fn table(self, entry: u64) -> Result<Option<u64>, &'static str> {
        match entry & OFFSET {
            0 => Ok(None),
            offset if offset.is_multiple_of(self.cluster()) => Ok(Some(offset)),
            _ => Err("a table is at no cluster"),
        }
    }

    /// Where the part of a cluster is that has `at`, by the cluster's entry and, where clusters have
    /// parts, by what is said of those. An offset is that of the part.
    pub(crate) fn place(self, at: u64, entry: u64, parts: u64) -> Result<Place, &'static str> {
        if entry & PACKED != 0 {
            return self.packed(entry);
        }
        let offset = entry & OFFSET;
        // Where data is in another file, offset 0 is one like any other.
        let mapped = offset != 0 || self.external && entry & COPIED != 0;
        if !offset.is_multiple_of(self.cluster()) {
            return Err("data is at no cluster");
        }
        let (zero, data) = if self.extended {
            let part = at >> self.part_bits & (PARTS - 1);
            let (zero, data) = (parts >> 32 >> part & 1 != 0, parts >> part & 1 != 0);
            if data && (zero || !mapped) {
                return Err("part of a cluster is said to be two things");
            }
            (zero, data)
        } else {
            (entry & ZERO != 0, mapped)
        };
        if zero && self.version < 3 {
            return Err("a cluster of zeroes is in an image of version 2");
        }
        match () {
            () if zero => Ok(Place::Zero),
            () if !data => Ok(Place::Absent),
            () if self.raw && offset != at & !(self.cluster() - 1) => {
                Err("data is not where it is on the disk, as it is said to be")
            }
            () => {
                let within = at & (self.cluster() - 1) & !((1 << self.part_bits) - 1);
                Ok(Place::Data(offset + within))
            }
        }
    }

    fn packed(self, entry: u64) -> Result<Place, &'static str> {
        if self.external {
            return Err("a compressed cluster is in an image whose data is elsewhere");
        }
        let offset_bits = 62 - (self.cluster_bits - 8);
        let offset = entry & ((1 << offset_bits) - 1);
        let more_sectors = (entry & !(COPIED | PACKED)) >> offset_bits;
        let length = (more_sectors + 1) * SECTOR - offset % SECTOR;
        if offset > OFFSET_MAX {
            return Err("a compressed cluster is where no file can be");
        }
        Ok(Place::Packed { offset, length })
    }
}

/// Bits 9 to 55 of an entry.
const OFFSET: u64 = OFFSET_MAX & !(SECTOR - 1);

const COPIED: u64 = 1 << 63;
const PACKED: u64 = 1 << 62;
const ZERO: u64 = 1;

/// What the length of compressed data is counted in.
const SECTOR: u64 = 512;

/// How many parts a cluster has that has parts.
const PARTS: u64 = 1 << PARTS_BITS;
const PARTS_BITS: u32 = 5;

#[cfg(test)]
mod tests {
    use super::*;

    const PLAIN: Geometry = Geometry {
        cluster_bits: 16,
        part_bits: 16,
        version: 3,
        extended: false,
        external: false,
        raw: false,
    };

    #[test]
    fn an_entry_is_absent_zero_or_data() {
        assert_eq!(PLAIN.place(0, 0, 0), Ok(Place::Absent));
        assert_eq!(PLAIN.place(0, COPIED, 0), Ok(Place::Absent));
        assert_eq!(PLAIN.place(0, 1, 0), Ok(Place::Zero));
        assert_eq!(PLAIN.place(0, 1 << 16 | 1, 0), Ok(Place::Zero));
        let data = COPIED | 5 << 16;
        assert_eq!(PLAIN.place(7, data, 0), Ok(Place::Data(5 << 16)));
        assert!(PLAIN.place(0, data + 512, 0).is_err());
    }

    #[test]
    fn version_2_knows_no_zeroes() {
        let old = Geometry {
            version: 2,
            ..PLAIN
        };
        assert!(old.place(0, 1, 0).is_err());
        assert_eq!(old.place(0, 0, 0), Ok(Place::Absent));
    }

    #[test]
    fn in_another_file_data_may_be_at_the_very_start_and_must_be_in_place_if_raw() {
        let external = Geometry {
            external: true,
            ..PLAIN
        };
        assert_eq!(external.place(0, 0, 0), Ok(Place::Absent));
        assert_eq!(external.place(0, COPIED, 0), Ok(Place::Data(0)));
        assert!(external.place(0, PACKED | 4096, 0).is_err());
        let raw = Geometry {
            raw: true,
            ..external
        };
        assert_eq!(
            raw.place(70_000, COPIED | 1 << 16, 0),
            Ok(Place::Data(1 << 16))
        );
        assert!(raw.place(140_000, COPIED | 1 << 16, 0).is_err());
    }

    #[test]
    fn parts_are_there_each_by_itself() {
        let parts = Geometry {
            part_bits: 11,
            extended: true,
            ..PLAIN
        };
        // Part 1 is data, part 2 zero, part 3 neither.
        let says = 1 << 1 | 1 << 34;
        let entry = COPIED | 5 << 16;
        assert_eq!(
            parts.place(2048, entry, says),
            Ok(Place::Data((5 << 16) + 2048))
        );
        assert_eq!(parts.place(4096, entry, says), Ok(Place::Zero));
        assert_eq!(parts.place(6144, entry, says), Ok(Place::Absent));
        assert_eq!(parts.place(4096, 0, 1 << 34), Ok(Place::Zero));
        assert!(parts.place(2048, 0, says).is_err(), "data that is nowhere");
        assert!(
            parts.place(2048, entry, says | 1 << 33).is_err(),
            "data and zero"
        );
    }

    #[test]
    fn compressed_data_ends_with_a_sector() {
        let offset = 4000;
        let entry = PACKED | 2 << 54 | offset;
        let length = 3 * 512 - offset % 512;
        assert_eq!(
            PLAIN.place(0, entry, 0),
            Ok(Place::Packed { offset, length })
        );
    }
}
