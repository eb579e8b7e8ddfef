//! What may be asked of an export, in one place.

use std::ops::Range;

use bytes::Bytes;
use thiserror::Error;

use crate::command::{
    BLOCK_STATUS, CACHE, DO_NOT_FRAGMENT, FAST_ZERO, FLUSH, FUA, NO_HOLE, READ, REQUEST_ONE, TRIM,
    WRITE, WRITE_ZEROES,
};
use crate::errno::Errno;
use crate::export::{ExportInfo, TransmissionFlags as Flags};
use crate::request::{PAYLOAD_MAX, Request};

/// A request that is legal: its range lies within the export, its flags were negotiated, and what
/// it does is allowed.
///
/// Ranges can be empty, except for a block status; there is nothing to do for those.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum Command {
    /// Read a range, no longer than a payload may be.
    Read {
        /// What to read.
        range: Range<u64>,
        /// Whether the data must come in one piece.
        do_not_fragment: bool,
    },
    /// Write to a range.
    Write {
        /// Where; as long as `data`.
        range: Range<u64>,
        /// What to write.
        data: Bytes,
        /// Whether the reply waits until it is durable.
        fua: bool,
    },
    /// Make durable every write that was answered before.
    Flush,
    /// Forget a range.
    Trim {
        /// What is no longer needed.
        range: Range<u64>,
        /// Whether the reply waits until it is durable.
        fua: bool,
    },
    /// Make a range read as zeroes.
    WriteZeroes {
        /// Where.
        range: Range<u64>,
        /// Whether the reply waits until it is durable.
        fua: bool,
        /// Whether the range stays allocated.
        no_hole: bool,
        /// Whether to fail with [`Errno::NotSup`] rather than be as slow as a write.
        fast: bool,
    },
    /// Expect a range to be read.
    Cache {
        /// What is going to be read.
        range: Range<u64>,
    },
    /// Tell what the selected contexts say about a range; it is not empty.
    BlockStatus {
        /// What is asked about.
        range: Range<u64>,
        /// Whether one extent is enough.
        one: bool,
    },
}

/// A request we decline, and what to tell the client.
#[derive(Clone, Copy, Debug, Eq, Error, PartialEq)]
#[error("{reason}")]
pub struct Refusal {
    /// What the reply will say.
    pub errno: Errno,
    /// What the log will say.
    pub reason: &'static str,
}

/// The rules that the requests of one session are held to.
#[derive(Clone, Copy, Debug)]
pub struct Admission {
    size: u64,
    flags: Flags,
    structured: bool,
    has_contexts: bool,
    alignment: u64,
    payload_max: u64,
}

impl Admission {
    /// The rules for an export as it was described to the client.
    pub fn new(info: &ExportInfo, structured: bool, has_contexts: bool) -> Self {
        Self {
            size: info.size,
            flags: info.flags.offered(structured),
            structured,
            has_contexts,
            alignment: u64::from(info.block_size.minimum()),
            payload_max: PAYLOAD_MAX.min(u64::from(info.block_size.maximum())),
        }
    }

    /// Turns a request into a command, or says why not.
    pub fn admit(&self, request: Request) -> Result<Command, Refusal> {
        let fua = request.flags & FUA != 0;
        match request.kind {
            READ => {
                self.allow_flags(&request, DO_NOT_FRAGMENT)?;
                self.limit_payload(&request)?;
                Ok(Command::Read {
                    range: self.range(&request, Errno::Inval)?,
                    do_not_fragment: request.flags & DO_NOT_FRAGMENT != 0,
                })
            }
            WRITE => {
                self.allow_flags(&request, 0)?;
                self.allow_changes("write to a read-only export")?;
                self.limit_payload(&request)?;
                let range = self.range(&request, Errno::NoSpc)?;
                if request.data.len() as u64 != request.length {
                    return Err(refuse(Errno::Inval, "write without its payload"));
                }
                Ok(Command::Write {
                    range,
                    data: request.data,
                    fua,
                })
            }
            FLUSH => {
                self.allow_flags(&request, 0)?;
                self.need(Flags::SEND_FLUSH, "flush was not offered")?;
                if (request.offset, request.length) != (0, 0) {
                    return Err(refuse(Errno::Inval, "flush of a range"));
                }
                Ok(Command::Flush)
            }
            TRIM => {
                self.allow_flags(&request, 0)?;
                self.allow_changes("trim of a read-only export")?;
                self.need(Flags::SEND_TRIM, "trim was not offered")?;
                Ok(Command::Trim {
                    range: self.range(&request, Errno::Inval)?,
                    fua,
                })
            }
            WRITE_ZEROES => {
                self.allow_flags(&request, NO_HOLE | FAST_ZERO)?;
                self.allow_changes("write of zeroes to a read-only export")?;
                self.need(Flags::SEND_WRITE_ZEROES, "write of zeroes was not offered")?;
                Ok(Command::WriteZeroes {
                    range: self.range(&request, Errno::NoSpc)?,
                    fua,
                    no_hole: request.flags & NO_HOLE != 0,
                    fast: request.flags & FAST_ZERO != 0,
                })
            }
            CACHE => {
                self.allow_flags(&request, 0)?;
                self.need(Flags::SEND_CACHE, "cache was not offered")?;
                Ok(Command::Cache {
                    range: self.range(&request, Errno::Inval)?,
                })
            }
            BLOCK_STATUS => {
                self.allow_flags(&request, REQUEST_ONE)?;
                if !self.structured || !self.has_contexts {
                    return Err(refuse(
                        Errno::Inval,
                        "block status without a metadata context",
                    ));
                }
                if request.length == 0 {
                    return Err(refuse(Errno::Inval, "block status of nothing"));
                }
                Ok(Command::BlockStatus {
                    range: self.range(&request, Errno::Inval)?,
                    one: request.flags & REQUEST_ONE != 0,
                })
            }
            _ => Err(refuse(Errno::Inval, "unknown command")),
        }
    }

    /// Allows the flags of this kind of request, as far as they were negotiated. FUA was if the
    /// server can do it at all: clients are known to set it on everything.
    fn allow_flags(&self, request: &Request, of_this_kind: u16) -> Result<(), Refusal> {
        if request.flags & !(of_this_kind | FUA) != 0 {
            return Err(refuse(Errno::Inval, "flag that the command does not have"));
        }
        for (flag, offer) in [
            (FUA, Flags::SEND_FUA),
            (DO_NOT_FRAGMENT, Flags::SEND_DF),
            (FAST_ZERO, Flags::SEND_FAST_ZERO),
        ] {
            if request.flags & flag != 0 && !self.flags.contains(offer) {
                return Err(refuse(Errno::Inval, "flag that was not offered"));
            }
        }
        Ok(())
    }

    fn allow_changes(&self, otherwise: &'static str) -> Result<(), Refusal> {
        if self.flags.contains(Flags::READ_ONLY) {
            return Err(refuse(Errno::Perm, otherwise));
        }
        Ok(())
    }

    fn need(&self, offer: Flags, otherwise: &'static str) -> Result<(), Refusal> {
        if self.flags.contains(offer) {
            return Ok(());
        }
        Err(refuse(Errno::Inval, otherwise))
    }

    fn limit_payload(&self, request: &Request) -> Result<(), Refusal> {
        if request.length <= self.payload_max {
            return Ok(());
        }
        Err(refuse(Errno::Inval, "payload longer than the maximum"))
    }

    fn range(&self, request: &Request, past_the_end: Errno) -> Result<Range<u64>, Refusal> {
        let end = request
            .offset
            .checked_add(request.length)
            .filter(|end| *end <= self.size)
            .ok_or(refuse(past_the_end, "range past the end of the export"))?;
        // A power of two divides both if it divides their bits together.
        if (request.offset | request.length) & (self.alignment - 1) != 0 {
            return Err(refuse(
                Errno::Inval,
                "range not aligned to the minimum block size",
            ));
        }
        Ok(request.offset..end)
    }
}

fn refuse(errno: Errno, reason: &'static str) -> Refusal {
    Refusal { errno, reason }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::command::DISCONNECT;
    use crate::export::BlockSize;
    use crate::request::Cookie;

    const SIZE: u64 = 1 << 20;

    #[test]
    fn past_the_end_is_no_space_for_writes_and_invalid_for_everything_else() {
        for (kind, errno) in [
            (WRITE, Errno::NoSpc),
            (WRITE_ZEROES, Errno::NoSpc),
            (READ, Errno::Inval),
            (TRIM, Errno::Inval),
            (CACHE, Errno::Inval),
            (BLOCK_STATUS, Errno::Inval),
        ] {
            check_refused(request(kind, SIZE, 1), errno);
            check_refused(request(kind, SIZE - 1, 2), errno);
            check_refused(request(kind, u64::MAX, 1), errno);
            assert!(all().admit(request(kind, SIZE - 1, 1)).is_ok(), "{kind}");
        }
    }

    #[test]
    fn changes_to_a_read_only_export_are_not_permitted() {
        let mut admission = all();
        admission.flags = Flags::READ_ONLY;
        for kind in [WRITE, TRIM, WRITE_ZEROES] {
            assert_eq!(
                admission.admit(request(kind, 0, 1)).unwrap_err().errno,
                Errno::Perm
            );
        }
        assert!(admission.admit(request(READ, 0, 1)).is_ok());
    }

    #[test]
    fn a_flag_is_refused_where_it_has_no_meaning_and_fua_never_is() {
        let meaning = [
            (READ, DO_NOT_FRAGMENT),
            (WRITE, 0),
            (FLUSH, 0),
            (TRIM, 0),
            (CACHE, 0),
        ]
        .into_iter()
        .chain([
            (WRITE_ZEROES, NO_HOLE | FAST_ZERO),
            (BLOCK_STATUS, REQUEST_ONE),
        ]);
        for (kind, flags) in meaning {
            for bit in (0..16).map(|bit| 1 << bit) {
                let length = u64::from(kind != FLUSH);
                let request = Request {
                    flags: bit,
                    ..request(kind, 0, length)
                };
                let allowed = (flags | FUA) & bit != 0;
                assert_eq!(
                    all().admit(request).is_ok(),
                    allowed,
                    "{kind} with {bit:#x}"
                );
            }
        }
    }

    #[test]
    fn what_was_not_offered_is_refused() {
        let mut none = all();
        none.flags = Flags::HAS_FLAGS;
        for (kind, flags) in [
            (READ, DO_NOT_FRAGMENT),
            (WRITE, FUA),
            (FLUSH, 0),
            (TRIM, 0),
            (CACHE, 0),
            (WRITE_ZEROES, 0),
        ] {
            let request = Request {
                flags,
                ..request(kind, 0, u64::from(kind != FLUSH))
            };
            assert_eq!(
                none.admit(request).unwrap_err().errno,
                Errno::Inval,
                "{kind}"
            );
        }
        let mut slow = all();
        slow.flags = slow.flags.without(Flags::SEND_FAST_ZERO);
        let fast = Request {
            flags: FAST_ZERO,
            ..request(WRITE_ZEROES, 0, 1)
        };
        assert_eq!(slow.admit(fast).unwrap_err().errno, Errno::Inval);
    }

    #[test]
    fn a_block_status_needs_a_context_and_a_length() {
        check_refused(request(BLOCK_STATUS, 0, 0), Errno::Inval);
        let without = Admission {
            has_contexts: false,
            ..all()
        };
        assert_eq!(
            without
                .admit(request(BLOCK_STATUS, 0, 1))
                .unwrap_err()
                .errno,
            Errno::Inval
        );
        let without = Admission {
            structured: false,
            ..all()
        };
        assert_eq!(
            without
                .admit(request(BLOCK_STATUS, 0, 1))
                .unwrap_err()
                .errno,
            Errno::Inval
        );
    }

    #[test]
    fn only_what_carries_a_payload_is_bound_by_the_longest_one() {
        let large = Admission {
            size: 1 << 40,
            ..all()
        };
        for kind in [TRIM, WRITE_ZEROES, CACHE, BLOCK_STATUS] {
            assert!(
                large.admit(request(kind, 0, PAYLOAD_MAX + 1)).is_ok(),
                "{kind}"
            );
        }
        assert!(large.admit(request(READ, 0, PAYLOAD_MAX)).is_ok());
        for kind in [READ, WRITE] {
            let skipped = Request {
                data: Bytes::new(),
                ..request(kind, 0, 0)
            };
            let skipped = Request {
                length: PAYLOAD_MAX + 1,
                ..skipped
            };
            assert_eq!(
                large.admit(skipped).unwrap_err().errno,
                Errno::Inval,
                "{kind}"
            );
        }
    }

    #[test]
    fn requests_of_no_length_are_fine_up_to_the_very_end() {
        for kind in [READ, WRITE, TRIM, WRITE_ZEROES, CACHE] {
            assert!(all().admit(request(kind, SIZE, 0)).is_ok(), "{kind}");
            assert!(all().admit(request(kind, SIZE + 1, 0)).is_err(), "{kind}");
        }
    }

    #[test]
    fn ranges_keep_to_the_minimum_block_size() {
        let sectors = Admission {
            alignment: 512,
            ..all()
        };
        assert!(sectors.admit(request(READ, 512, 1024)).is_ok());
        assert!(sectors.admit(request(READ, 1, 512)).is_err());
        assert!(sectors.admit(request(READ, 512, 513)).is_err());
    }

    #[test]
    fn unknown_commands_and_flushes_of_a_range_are_invalid() {
        check_refused(request(8, 0, 0), Errno::Inval);
        check_refused(request(u16::MAX, 0, 0), Errno::Inval);
        check_refused(request(DISCONNECT, 0, 0), Errno::Inval);
        check_refused(request(FLUSH, 0, 1), Errno::Inval);
    }

    #[test]
    fn a_command_says_what_the_request_said() {
        let zeroes = Request {
            flags: NO_HOLE | FUA,
            ..request(WRITE_ZEROES, 4, 8)
        };
        let expected = Command::WriteZeroes {
            range: 4..12,
            fua: true,
            no_hole: true,
            fast: false,
        };
        assert_eq!(all().admit(zeroes), Ok(expected));
        let expected = Command::Write {
            range: 4..6,
            data: Bytes::from(vec![0; 2]),
            fua: false,
        };
        assert_eq!(all().admit(request(WRITE, 4, 2)), Ok(expected));
    }

    fn check_refused(request: Request, errno: Errno) {
        let (kind, offset, length) = (request.kind, request.offset, request.length);
        let refusal = all().admit(request).unwrap_err();
        assert_eq!(
            refusal.errno, errno,
            "{kind} at {offset}, {length} bytes: {refusal}"
        );
    }

    /// Everything on offer.
    fn all() -> Admission {
        let info = ExportInfo {
            name: "vda".into(),
            description: None,
            size: SIZE,
            flags: Flags::from_bits(u16::MAX).without(Flags::READ_ONLY),
            block_size: BlockSize::default(),
        };
        Admission::new(&info, true, true)
    }

    fn request(kind: u16, offset: u64, length: u64) -> Request {
        let data = if kind == WRITE {
            Bytes::from(vec![0; length as usize])
        } else {
            Bytes::new()
        };
        Request {
            cookie: Cookie(1),
            kind,
            flags: 0,
            offset,
            length,
            data,
        }
    }
}
