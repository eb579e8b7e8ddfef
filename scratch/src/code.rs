use crate::preserved::Kept;

/// How the state of a granule is stored, twice: so that damage is told from a state.
///
/// A byte of one granule, or of one snapshot, is most likely none of another, and whatever differs
/// from nothing in one or two bits is none at all. The two bytes of a granule have nothing to do
/// with each other, so what turns both into another state does not look like damage to one.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Code {
    /// Drawn for each snapshot.
    nonce: u64,
}

/// Of which of the two copies a byte is.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Copy {
    First,
    Second,
}

impl Code {
    pub(crate) const fn new(nonce: u64) -> Self {
        Self { nonce }
    }

    /// The byte that says that `granule` is kept so.
    pub(crate) fn byte(self, copy: Copy, granule: u64, kept: Kept) -> u8 {
        if kept == Kept::Not {
            return 0;
        }
        let drawn = self.drawn(granule);
        let kept = kept as u32;
        // The steps are a third of each alphabet, so the three states have three letters.
        match copy {
            Copy::First => {
                let length = LETTERS.len() as u32;
                LETTERS[((drawn % length + kept * (length / 3)) % length) as usize]
            }
            Copy::Second => ((drawn >> 16) % 255 + kept * (255 / 3)).rem_euclid(255) as u8 + 1,
        }
    }

    /// What `byte` says of `granule`, unless it is damaged.
    pub(crate) fn kept(self, copy: Copy, granule: u64, byte: u8) -> Option<Kept> {
        if byte == 0 {
            return Some(Kept::Not);
        }
        let states = [Kept::Data, Kept::Zero, Kept::Hole];
        states
            .into_iter()
            .find(|kept| self.byte(copy, granule, *kept) == byte)
    }

    fn drawn(self, granule: u64) -> u32 {
        let mut sum = crc32fast::Hasher::new();
        sum.update(&self.nonce.to_le_bytes());
        sum.update(&granule.to_le_bytes());
        sum.finalize()
    }
}

/// The bytes with at least three bits set: no one and no two of them that flip make a state of
/// nothing.
const LETTERS: [u8; 219] = letters();

const fn letters() -> [u8; 219] {
    let mut letters = [0; 219];
    let (mut byte, mut count) = (0_u8, 0);
    while count < letters.len() {
        if byte.count_ones() >= 3 {
            letters[count] = byte;
            count += 1;
        }
        byte = byte.wrapping_add(1);
    }
    letters
}

#[cfg(test)]
mod tests {
    use super::*;

    const STATES: [Kept; 4] = [Kept::Not, Kept::Data, Kept::Zero, Kept::Hole];

    #[test]
    fn each_state_is_read_back_and_has_a_byte_of_its_own() {
        for nonce in [0, 1, u64::MAX] {
            let code = Code::new(nonce);
            for granule in 0..2000 {
                for copy in [Copy::First, Copy::Second] {
                    for kept in STATES {
                        let byte = code.byte(copy, granule, kept);
                        assert_eq!(code.kept(copy, granule, byte), Some(kept));
                    }
                }
            }
        }
    }

    #[test]
    fn where_nothing_is_kept_two_bits_that_flip_are_damage() {
        let code = Code::new(7);
        for (a, b) in (0..8).flat_map(|a| (0..8).map(move |b| (a, b))) {
            for granule in 0..500 {
                assert_eq!(code.kept(Copy::First, granule, 1 << a | 1 << b), None);
            }
        }
    }

    #[test]
    fn a_byte_of_another_granule_or_snapshot_is_seldom_a_state() {
        let (code, other) = (Code::new(1), Code::new(2));
        let mut believed = 0;
        for granule in 0..10_000 {
            let byte = code.byte(Copy::First, granule, Kept::Data);
            for (code, granule) in [
                (code, granule + 1),
                (code, granule ^ 4096),
                (other, granule),
            ] {
                let found = code.kept(Copy::First, granule, byte);
                believed += u32::from(found.is_some());
            }
        }
        // Three of 219.
        assert!((300..600).contains(&believed), "{believed} of 30000");
    }
}
