use std::io;

use scratch::Durable;

/// That a sync of the image has failed, which whoever starts next has to know: what was acknowledged
/// may be lost, and a later sync that succeeds proves nothing.
///
/// The record has a place of its own, which was written when the state was made: storing it takes no
/// room, and waits for nobody.
#[derive(Debug)]
pub struct Doubt<P> {
    store: P,
}

impl<P: Durable> Doubt<P> {
    /// Where in the store the record is.
    pub const OFFSET: u64 = 4 * SECTOR_BYTES as u64;

    /// The sector of an image of which no sync has failed.
    pub fn none() -> [u8; SECTOR_BYTES] {
        encode(false)
    }

    /// The record in `store`.
    pub fn of(store: P) -> Self {
        Self { store }
    }

    /// Whether it tells of a sync that failed. So it does if it is damaged.
    pub fn is_told(&self) -> io::Result<bool> {
        let mut bytes = [0; SECTOR_BYTES];
        self.store.load(Self::OFFSET, &mut bytes)?;
        Ok(bytes != Self::none())
    }

    /// Stores that a sync has failed: from here on a process that is killed leaves that.
    pub(super) fn store(&self) -> io::Result<()> {
        self.store.store(Self::OFFSET, &encode(true))
    }

    /// Makes that durable.
    pub(super) async fn sync(&self) -> io::Result<()> {
        self.store.sync().await
    }
}

/// CRC-32 of all that follows, and 1 if a sync has failed.
fn encode(failed: bool) -> [u8; SECTOR_BYTES] {
    let mut bytes = [0; SECTOR_BYTES];
    bytes[4] = u8::from(failed);
    let sum = crc32fast::hash(&bytes[4..]);
    bytes[..4].copy_from_slice(&sum.to_le_bytes());
    bytes
}

const SECTOR_BYTES: usize = 512;

#[cfg(test)]
mod tests {
    use bitmap::{MemoryPages, PageStore as _};

    use super::*;

    fn told(bytes: &[u8]) -> bool {
        let store = MemoryPages::default();
        store.store(Doubt::<MemoryPages>::OFFSET, bytes).unwrap();
        Doubt::of(store).is_told().unwrap()
    }

    #[test]
    fn a_failure_is_told_and_so_is_any_damage_to_the_record_that_there_was_none() {
        let none = Doubt::<MemoryPages>::none();
        assert!(!told(&none));
        assert!(told(&encode(true)));
        for bit in 0..SECTOR_BYTES * 8 {
            let mut bytes = none;
            bytes[bit / 8] ^= 1 << (bit % 8);
            assert!(told(&bytes), "bit {bit}");
        }
        assert!(told(&[0; SECTOR_BYTES]), "nothing was stored");
    }
}
