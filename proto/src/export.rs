//! What a server has to offer, as negotiation needs to know it.

use std::ops::BitOr;

use thiserror::Error;

use crate::headers::Headers;

/// Answers the questions of a [`Negotiation`](crate::Negotiation): what exists, and what it is.
///
/// `Export` and `Context` are the server's own handles. A session ends up with the very handle that
/// was described to its client, not with a name to be looked up once more.
pub trait Catalog {
    /// An export, opened.
    type Export;
    /// A metadata context of an export.
    type Context;

    /// What a client that asks for a list gets to see.
    fn list(&self) -> Vec<Listed>;

    /// Opens the export of that name; the empty name is the default export.
    ///
    /// A handle may be dropped right away: clients ask before they enter, and about several.
    fn open(&self, name: &str) -> Result<(Self::Export, ExportInfo), Denied>;

    /// The full names of the contexts that a client which asks for a list gets to see.
    fn listed_contexts(&self, export: &Self::Export) -> Vec<String>;

    /// The context of exactly that name, listed or not. Names that end in a colon are no wildcards
    /// here.
    fn find_context(&self, export: &Self::Export, name: &str) -> Option<Self::Context>;
}

impl<C: Catalog + ?Sized> Catalog for &C {
    type Export = C::Export;
    type Context = C::Context;

    fn list(&self) -> Vec<Listed> {
        (**self).list()
    }

    fn open(&self, name: &str) -> Result<(Self::Export, ExportInfo), Denied> {
        (**self).open(name)
    }

    fn listed_contexts(&self, export: &Self::Export) -> Vec<String> {
        (**self).listed_contexts(export)
    }

    fn find_context(&self, export: &Self::Export, name: &str) -> Option<Self::Context> {
        (**self).find_context(export, name)
    }
}

/// An export in a list.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct Listed {
    /// What to ask for it by.
    pub name: String,
    /// A line for people.
    pub description: Option<String>,
}

/// Why an export is not to be had.
#[derive(Clone, Debug, Eq, Error, PartialEq)]
pub enum Denied {
    /// There is none of that name.
    #[error("no such export")]
    Unknown,
    /// There is one, but not for this client or not now; the text says why.
    #[error("{0}")]
    Policy(String),
    /// The server is about to stop.
    #[error("the server is shutting down")]
    Shutdown,
}

/// What a client is told about an export before it enters.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct ExportInfo {
    /// The name it goes by, whatever name it was asked for by.
    pub name: String,
    /// A line for people.
    pub description: Option<String>,
    /// In bytes.
    pub size: u64,
    /// What the server can do for it.
    pub flags: TransmissionFlags,
    /// What sizes of requests suit it.
    pub block_size: BlockSize,
}

/// What the server can do, told to the client as it enters.
#[derive(Clone, Copy, Debug, Default, Eq, Hash, PartialEq)]
pub struct TransmissionFlags(u16);

impl TransmissionFlags {
    /// Always set.
    pub const HAS_FLAGS: Self = Self(1 << 0);
    /// Whatever would change the export is refused.
    pub const READ_ONLY: Self = Self(1 << 1);
    /// Flushes are understood.
    pub const SEND_FLUSH: Self = Self(1 << 2);
    /// Writes can be made durable one by one.
    pub const SEND_FUA: Self = Self(1 << 3);
    /// The medium turns.
    pub const ROTATIONAL: Self = Self(1 << 4);
    /// Trims are understood.
    pub const SEND_TRIM: Self = Self(1 << 5);
    /// Zeroing is understood, and zeroing without making holes.
    pub const SEND_WRITE_ZEROES: Self = Self(1 << 6);
    /// Replies in chunks can be had in one piece. Negotiation removes it where there are none.
    pub const SEND_DF: Self = Self(1 << 7);
    /// A flush on one connection covers writes answered on another.
    pub const CAN_MULTI_CONN: Self = Self(1 << 8);
    /// Reserved for an extension that is not spoken here; negotiation removes it.
    pub const SEND_RESIZE: Self = Self(1 << 9);
    /// Prefetching is understood.
    pub const SEND_CACHE: Self = Self(1 << 10);
    /// Zeroing can be asked to be fast or to fail. Needs `SEND_WRITE_ZEROES`.
    pub const SEND_FAST_ZERO: Self = Self(1 << 11);
    /// A block status can be asked for some of the chosen contexts. Negotiation removes it where
    /// headers are not extended, or no context was chosen.
    pub const BLOCK_STATUS_PAYLOAD: Self = Self(1 << 12);

    /// The flags as they stand on the wire.
    pub fn bits(self) -> u16 {
        self.0
    }

    /// Flags read from the wire; unknown ones are kept.
    pub fn from_bits(bits: u16) -> Self {
        Self(bits)
    }

    /// Whether all of `flags` are set.
    pub fn contains(self, flags: Self) -> bool {
        self.0 & flags.0 == flags.0
    }

    /// These flags except `flags`.
    #[must_use]
    pub fn without(self, flags: Self) -> Self {
        Self(self.0 & !flags.0)
    }

    /// What of these may be offered, given what was negotiated.
    pub(crate) fn offered(self, headers: Headers, contexts_chosen: usize) -> Self {
        let mut flags = (self | Self::HAS_FLAGS).without(Self::SEND_RESIZE);
        if !headers.has_chunks() {
            flags = flags.without(Self::SEND_DF);
        }
        if headers != Headers::Extended || contexts_chosen == 0 {
            flags = flags.without(Self::BLOCK_STATUS_PAYLOAD);
        }
        if !flags.contains(Self::SEND_WRITE_ZEROES) {
            flags = flags.without(Self::SEND_FAST_ZERO);
        }
        flags
    }
}

impl BitOr for TransmissionFlags {
    type Output = Self;

    fn bitor(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }
}

/// Which sizes of requests an export takes, in bytes.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct BlockSize {
    minimum: u32,
    preferred: u32,
    maximum: u32,
}

impl BlockSize {
    /// Returns `None` unless `proto.md` allows the three: `minimum` a power of two up to 64 KiB,
    /// `preferred` a power of two not below `minimum` nor 512, `maximum` not below `preferred`.
    pub fn new(minimum: u32, preferred: u32, maximum: u32) -> Option<Self> {
        let minimum_fits = minimum.is_power_of_two() && minimum <= 64 << 10;
        let preferred_fits = preferred.is_power_of_two() && preferred >= minimum.max(512);
        (minimum_fits && preferred_fits && maximum >= preferred).then_some(Self {
            minimum,
            preferred,
            maximum,
        })
    }

    /// What offsets and lengths must be multiples of.
    pub fn minimum(self) -> u32 {
        self.minimum
    }

    /// What they had better be multiples of.
    pub fn preferred(self) -> u32 {
        self.preferred
    }

    /// The longest read or write.
    pub fn maximum(self) -> u32 {
        self.maximum
    }
}

impl Default for BlockSize {
    /// What `proto.md` lets every client presume: any byte, best by 4 KiB, up to 32 MiB.
    fn default() -> Self {
        Self {
            minimum: 1,
            preferred: 4 << 10,
            maximum: 32 << 20,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{BlockSize, Headers, TransmissionFlags};

    #[test]
    fn block_sizes_are_what_the_protocol_allows() {
        assert!(BlockSize::new(1, 512, 512).is_some());
        assert!(BlockSize::new(64 << 10, 64 << 10, 32 << 20).is_some());
        assert!(BlockSize::new(0, 512, 1 << 20).is_none());
        assert!(BlockSize::new(128 << 10, 128 << 10, 32 << 20).is_none());
        assert!(BlockSize::new(1, 256, 1 << 20).is_none());
        assert!(BlockSize::new(4096, 512, 1 << 20).is_none());
        assert!(BlockSize::new(1, 4096, 1024).is_none());
    }

    #[test]
    fn flags_that_need_another_are_not_offered_without_it() {
        use TransmissionFlags as Flags;
        let flags = Flags::SEND_DF | Flags::SEND_FAST_ZERO | Flags::SEND_RESIZE;
        assert_eq!(flags.offered(Headers::Simple, 0), Flags::HAS_FLAGS);
        assert_eq!(
            flags.offered(Headers::Structured, 0),
            Flags::HAS_FLAGS | Flags::SEND_DF
        );
        let flags = flags | Flags::SEND_WRITE_ZEROES;
        let offered = flags.offered(Headers::Simple, 0);
        assert!(offered.contains(Flags::SEND_FAST_ZERO));
    }

    #[test]
    fn some_contexts_can_be_asked_for_where_there_are_any_and_requests_have_payloads() {
        use TransmissionFlags as Flags;
        for (headers, contexts_chosen, offered) in [
            (Headers::Extended, 1, true),
            (Headers::Extended, 0, false),
            (Headers::Structured, 1, false),
        ] {
            let flags = Flags::BLOCK_STATUS_PAYLOAD.offered(headers, contexts_chosen);
            assert_eq!(flags.contains(Flags::BLOCK_STATUS_PAYLOAD), offered);
        }
    }
}
