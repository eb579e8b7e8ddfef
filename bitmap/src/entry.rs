use crate::Era;

/// Tells the entries of one map from those of another.
///
/// Part of what each of them sums to: an entry that comes from the file of another disk, or of
/// another backup, is damage.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct Salt(u32);

impl Salt {
    /// The salt with this number.
    pub const fn from_number(number: u32) -> Self {
        Self(number)
    }

    /// That of what is put aside of this map when `era` begins.
    #[must_use]
    pub const fn aside(self, era: Era) -> Self {
        Self(self.0 ^ era.number())
    }
}

/// The era of `chunk` as it is stored: its number, and a CRC-32 of salt, chunk and number.
///
/// So each entry says by itself whether it is whole, whoever writes beside it; nothing that is
/// zeroed, or lies in another place, is. An entry is never cut by the border of a sector.
pub(crate) fn encode(salt: Salt, chunk: u64, era: Era) -> [u8; ENTRY_BYTES] {
    let number = era.number().to_le_bytes();
    let mut summed = [0; 16];
    summed[..4].copy_from_slice(&salt.0.to_le_bytes());
    summed[4..12].copy_from_slice(&chunk.to_le_bytes());
    summed[12..].copy_from_slice(&number);
    let mut entry = [0; ENTRY_BYTES];
    entry[..4].copy_from_slice(&number);
    entry[4..].copy_from_slice(&crc32fast::hash(&summed).to_le_bytes());
    entry
}

/// `None` unless `entry` is as [`encode`] made it for this place from an era other than never,
/// which is not stored.
pub(crate) fn decode(salt: Salt, chunk: u64, entry: [u8; ENTRY_BYTES]) -> Option<Era> {
    let [a, b, c, d, ..] = entry;
    let era = Era::from_number(u32::from_le_bytes([a, b, c, d]));
    (era > Era::NEVER && encode(salt, chunk, era) == entry).then_some(era)
}

pub(crate) const ENTRY_BYTES: usize = 8;

#[cfg(test)]
mod tests {
    use super::*;

    const SALT: Salt = Salt::from_number(0x1234_5678);

    #[test]
    fn an_entry_is_whole_only_as_it_was_stored_and_where() {
        let era = Era::from_number(7);
        let entry = encode(SALT, 99, era);
        assert_eq!(decode(SALT, 99, entry), Some(era));
        assert_eq!(decode(SALT, 98, entry), None);
        assert_eq!(decode(SALT.aside(era), 99, entry), None);
        for first in 0..64 {
            for second in 0..=first {
                let mut flipped = u64::from_le_bytes(entry) ^ 1 << first;
                if second < first {
                    flipped ^= 1 << second;
                }
                let found = decode(SALT, 99, flipped.to_le_bytes());
                assert_eq!(found, None, "bits {first} and {second}");
            }
        }
    }

    #[test]
    fn zeroes_are_never_whole() {
        for chunk in 0..100_000 {
            assert_eq!(decode(SALT, chunk, [0; ENTRY_BYTES]), None, "chunk {chunk}");
        }
    }
}
