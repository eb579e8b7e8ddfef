//! The numbers of the commands, and of the flags on them.

/// Reads a range.
pub const READ: u16 = 0;
/// Writes the payload that follows.
pub const WRITE: u16 = 1;
/// Says goodbye; there is no reply.
pub const DISCONNECT: u16 = 2;
/// Makes durable every write that was answered before.
pub const FLUSH: u16 = 3;
/// Says that a range is no longer needed.
pub const TRIM: u16 = 4;
/// Says that a range will be read soon.
pub const CACHE: u16 = 5;
/// Makes a range read as zeroes.
pub const WRITE_ZEROES: u16 = 6;
/// Asks what the selected metadata contexts say about a range.
pub const BLOCK_STATUS: u16 = 7;

/// The reply waits until what was written is durable. Valid on every command.
pub const FUA: u16 = 1 << 0;
/// The zeroed range stays allocated.
pub const NO_HOLE: u16 = 1 << 1;
/// The data of a read comes in one piece.
pub const DO_NOT_FRAGMENT: u16 = 1 << 2;
/// One extent per context is enough.
pub const REQUEST_ONE: u16 = 1 << 3;
/// Zeroing fails rather than be as slow as writing.
pub const FAST_ZERO: u16 = 1 << 4;
/// With extended headers: the header's length is that of the payload that follows. Without this flag
/// nothing follows, except behind a write.
pub const PAYLOAD_LENGTH: u16 = 1 << 5;
