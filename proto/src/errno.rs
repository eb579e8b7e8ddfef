//! The errors that a reply can carry.

/// An error as the protocol numbers it, whatever the system calls it.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
#[repr(u32)]
pub enum Errno {
    /// Operation not permitted: a change to a read-only export.
    Perm = 1,
    /// Input/output error.
    Io = 5,
    /// Cannot allocate memory.
    NoMem = 12,
    /// Invalid argument.
    Inval = 22,
    /// No space left, or a write past the end of the export.
    NoSpc = 28,
    /// A read too long to send in one piece, when the client insists on one.
    Overflow = 75,
    /// A fast zeroing that would not be fast.
    NotSup = 95,
    /// The server is about to stop.
    Shutdown = 108,
}

impl Errno {
    /// The number on the wire; never zero.
    pub fn to_wire(self) -> u32 {
        self as u32
    }

    /// Reads a number that is known not to be zero.
    ///
    /// One that `proto.md` does not list counts as `Inval`, as it asks of clients.
    pub fn from_wire(number: u32) -> Self {
        match number {
            1 => Self::Perm,
            5 => Self::Io,
            12 => Self::NoMem,
            28 => Self::NoSpc,
            75 => Self::Overflow,
            95 => Self::NotSup,
            108 => Self::Shutdown,
            _ => Self::Inval,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::Errno;

    #[test]
    fn a_number_survives_the_wire_and_an_unknown_one_is_invalid() {
        use Errno::{Inval, Io, NoMem, NoSpc, NotSup, Overflow, Perm, Shutdown};
        for errno in [Perm, Io, NoMem, Inval, NoSpc, Overflow, NotSup, Shutdown] {
            assert_eq!(Errno::from_wire(errno.to_wire()), errno);
        }
        assert_eq!(Errno::from_wire(2), Inval);
        assert_eq!(Errno::from_wire(u32::MAX), Inval);
    }
}
