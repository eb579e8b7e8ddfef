use std::io;

use bitmap::PageStore;

/// The snapshot's own record: what it is, and why it is broken, if it is.
///
/// One sector, the first of the states. It is there from the beginning, and is stored whole or, after
/// damage, does not sum up: so neither a record that was lost nor one that was never made looks like
/// a snapshot that is whole.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(crate) struct Head {
    /// Drawn for the snapshot.
    pub(crate) nonce: u64,
    /// Why it is broken.
    pub(crate) broken: Option<String>,
}

impl Head {
    /// Stores it at the beginning of `states`.
    pub(crate) fn store(&self, states: &impl PageStore) -> io::Result<()> {
        states.store(0, &self.encode())
    }

    /// The one at the beginning of `states`.
    pub(crate) fn load(states: &impl PageStore) -> io::Result<Self> {
        let mut sector = [0; SECTOR];
        states.load(0, &mut sector)?;
        Self::decode(&sector).ok_or_else(|| damaged("the record of the backup is damaged"))
    }

    fn encode(&self) -> [u8; SECTOR] {
        let mut sector = [0; SECTOR];
        sector[MAGIC_AT..NONCE_AT].copy_from_slice(MAGIC);
        sector[NONCE_AT..LENGTH_AT].copy_from_slice(&self.nonce.to_le_bytes());
        let reason = self.broken.as_deref().unwrap_or_default();
        let mut length = reason.len().min(REASON_MAX);
        while !reason.is_char_boundary(length) {
            length -= 1;
        }
        // A break for no reason is a break.
        let reason = if length == 0 {
            "unknown"
        } else {
            &reason[..length]
        };
        if self.broken.is_some() {
            let bytes = reason.as_bytes();
            sector[LENGTH_AT..REASON_AT].copy_from_slice(&(bytes.len() as u16).to_le_bytes());
            sector[REASON_AT..REASON_AT + bytes.len()].copy_from_slice(bytes);
        }
        let sum = crc32fast::hash(&sector[MAGIC_AT..]);
        sector[..MAGIC_AT].copy_from_slice(&sum.to_le_bytes());
        sector
    }

    fn decode(sector: &[u8; SECTOR]) -> Option<Self> {
        let sum = crc32fast::hash(&sector[MAGIC_AT..]);
        if sector[..MAGIC_AT] != sum.to_le_bytes() || sector[MAGIC_AT..NONCE_AT] != *MAGIC {
            return None;
        }
        let nonce = u64::from_le_bytes(sector[NONCE_AT..LENGTH_AT].try_into().ok()?);
        let length = u16::from_le_bytes(sector[LENGTH_AT..REASON_AT].try_into().ok()?);
        let reason = sector.get(REASON_AT..REASON_AT + usize::from(length))?;
        let broken = (length > 0).then(|| String::from_utf8_lossy(reason).into_owned());
        Some(Self { nonce, broken })
    }
}

pub(crate) fn damaged(what: impl Into<String>) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what.into())
}

const SECTOR: usize = 512;
const MAGIC: &[u8; 8] = b"SPSTATES";
/// Behind the CRC-32 of all that follows.
const MAGIC_AT: usize = 4;
const NONCE_AT: usize = 12;
const LENGTH_AT: usize = 20;
const REASON_AT: usize = 22;

/// Fits into the sector.
const REASON_MAX: usize = SECTOR - REASON_AT;

#[cfg(test)]
mod tests {
    use bitmap::MemoryPages;

    use super::*;

    #[test]
    fn a_head_is_read_back_and_any_bit_that_flips_is_damage() {
        let long = "ä".repeat(400);
        for broken in [None, Some("why"), Some(""), Some(&*long)] {
            let head = Head {
                nonce: 0x0123_4567_89ab_cdef,
                broken: broken.map(str::to_owned),
            };
            let sector = head.encode();
            let found = Head::decode(&sector).unwrap();
            assert_eq!(
                (found.nonce, found.broken.is_some()),
                (head.nonce, broken.is_some())
            );
            for bit in 0..SECTOR * 8 {
                let mut bad = sector;
                bad[bit / 8] ^= 1 << (bit % 8);
                assert_eq!(Head::decode(&bad), None, "bit {bit}");
            }
        }
    }

    #[test]
    fn a_head_that_is_missing_is_damage() {
        assert!(Head::load(&MemoryPages::default()).is_err());
    }
}
