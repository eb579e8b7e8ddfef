//! What a context says about a range: a list of extents that cannot be wrong.

/// In `base:allocation`: nothing is allocated here.
pub const STATE_HOLE: u32 = 1 << 0;
/// In `base:allocation`: this reads as zeroes.
pub const STATE_ZERO: u32 = 1 << 1;
/// In QEMU's `qemu:dirty-bitmap:` contexts: this has changed.
pub const DIRTY: u32 = 1 << 0;

/// The most extents in a reply, all its contexts taken together. `proto.md` advises against more
/// than 2^20 for one; this many cover 4 GiB, the longest compact request, when every other chunk of
/// 64 KiB differs, and take 1 MiB on the wire at most.
pub const EXTENTS_MAX: usize = 1 << 16;

/// A stretch with one status.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Extent {
    /// In bytes, never zero.
    pub length: u64,
    /// What the context says. Only extended replies say more than 32 bits.
    pub flags: u64,
}

/// What one context says about the range of one request, from its start.
///
/// Neighbours differ, and together they are never longer than the request.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Extents {
    list: Vec<Extent>,
    list_max: usize,
    covered: u64,
    /// How much more fits; zero as soon as the list is closed for any reason.
    room: u64,
}

impl Extents {
    /// An empty list for a request of `length` bytes, with room for as many extents as a reply of so
    /// many `contexts` has for each of them.
    pub fn new(length: u64, contexts: usize) -> Self {
        Self {
            list: Vec::new(),
            list_max: (EXTENTS_MAX / contexts.max(1)).max(1),
            covered: 0,
            room: length,
        }
    }

    /// An empty list for a request of `length` bytes that asks for one extent.
    pub fn one(length: u64) -> Self {
        Self {
            list_max: 1,
            ..Self::new(length, 1)
        }
    }

    /// Says that the next `length` bytes have the status `flags`. What does not fit is left out.
    #[inline]
    pub fn push(&mut self, length: u64, flags: u32) {
        let length = length.min(self.room);
        if length == 0 {
            return;
        }
        let has_place = self.list.len() < self.list_max;
        let flags = u64::from(flags);
        match self.list.last_mut() {
            Some(last) if last.flags == flags => last.length += length,
            _ if has_place => self.list.push(Extent { length, flags }),
            _ => {
                self.room = 0;
                return;
            }
        }
        self.covered += length;
        self.room -= length;
    }

    /// Whether nothing more fits: whoever computes extents can stop.
    pub fn is_full(&self) -> bool {
        self.room == 0
    }

    /// How many bytes the list is about.
    pub fn covered(&self) -> u64 {
        self.covered
    }

    /// The list.
    pub fn as_slice(&self) -> &[Extent] {
        &self.list
    }

    /// Shortens the list to `covered` bytes and closes it.
    pub fn truncate(&mut self, covered: u64) {
        while self.covered > covered {
            let Some(last) = self.list.last_mut() else {
                break;
            };
            let excess = last.length.min(self.covered - covered);
            last.length -= excess;
            self.covered -= excess;
            if last.length == 0 {
                self.list.pop();
            }
        }
        self.room = 0;
    }
}

/// What a block-status reply calls a context by.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
pub struct ContextId(pub u32);

/// Shortens all lists to the shortest, so that every context of a reply covers the same length.
pub fn cover_the_same_length(contexts: &mut [(ContextId, Extents)]) {
    let shortest = contexts
        .iter()
        .map(|(_, extents)| extents.covered)
        .min()
        .unwrap_or(0);
    for (_, extents) in contexts {
        extents.truncate(shortest);
    }
}

#[cfg(test)]
mod tests {
    use super::{ContextId, EXTENTS_MAX, Extent, Extents, cover_the_same_length};

    #[test]
    fn equal_neighbours_are_one_extent() {
        let list = build(100, false, &[(10, 0), (0, 1), (20, 0), (5, 1), (5, 1)]);
        assert_eq!(lengths_and_flags(&list), [(30, 0), (10, 1)]);
        assert_eq!(list.covered(), 40);
        assert!(!list.is_full());
    }

    #[test]
    fn extents_never_pass_the_end_of_the_request() {
        let list = build(100, false, &[(60, 0), (60, 1), (60, 0)]);
        assert_eq!(lengths_and_flags(&list), [(60, 0), (40, 1)]);
        assert!(list.is_full());
        assert_eq!(
            lengths_and_flags(&build(100, false, &[(u64::MAX, 3)])),
            [(100, 3)]
        );
    }

    #[test]
    fn one_extent_is_one_extent_and_what_follows_it_is_left_out() {
        let list = build(100, true, &[(10, 0), (10, 0), (10, 1), (10, 0)]);
        assert_eq!(lengths_and_flags(&list), [(20, 0)]);
        assert!(list.is_full());
    }

    #[test]
    fn the_lists_of_a_reply_have_a_maximum_length_together() {
        for (contexts, most) in [(1, EXTENTS_MAX), (4, EXTENTS_MAX / 4), (1 << 20, 1)] {
            let mut list = Extents::new(u64::MAX, contexts);
            let mut flags = 0;
            while !list.is_full() {
                list.push(1, flags);
                flags ^= 1;
            }
            assert_eq!(list.as_slice().len(), most);
            assert_eq!(list.covered(), most as u64);
        }
    }

    #[test]
    fn all_contexts_of_a_reply_cover_the_same_length() {
        let mut contexts = [
            (ContextId(1), build(100, false, &[(60, 0), (40, 1)])),
            (
                ContextId(2),
                build(100, false, &[(10, 0), (20, 1), (30, 0), (40, 1)]),
            ),
            (ContextId(3), build(100, true, &[(30, 0), (70, 1)])),
        ];
        cover_the_same_length(&mut contexts);
        assert_eq!(lengths_and_flags(&contexts[0].1), [(30, 0)]);
        assert_eq!(lengths_and_flags(&contexts[1].1), [(10, 0), (20, 1)]);
        assert_eq!(lengths_and_flags(&contexts[2].1), [(30, 0)]);
        assert!(contexts.iter().all(|(_, extents)| extents.covered() == 30));
    }

    fn build(length: u64, one: bool, runs: &[(u64, u32)]) -> Extents {
        let mut extents = if one {
            Extents::one(length)
        } else {
            Extents::new(length, 1)
        };
        for (length, flags) in runs {
            extents.push(*length, *flags);
        }
        extents
    }

    fn lengths_and_flags(extents: &Extents) -> Vec<(u64, u64)> {
        extents
            .as_slice()
            .iter()
            .map(|Extent { length, flags }| (*length, *flags))
            .collect()
    }
}
