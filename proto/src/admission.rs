//! What may be asked of an export, in one place.

use std::collections::HashSet;
use std::ops::Range;

use bytes::Bytes;
use thiserror::Error;

use crate::command::{
    BLOCK_STATUS, CACHE, DO_NOT_FRAGMENT, FAST_ZERO, FLUSH, FUA, NO_HOLE, PAYLOAD_LENGTH, READ,
    REQUEST_ONE, TRIM, WRITE, WRITE_ZEROES,
};
use crate::context_filter::ContextFilter;
use crate::errno::Errno;
use crate::export::{ExportInfo, TransmissionFlags as Flags};
use crate::extents::ContextId;
use crate::headers::Headers;
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
    /// Tell what contexts say about a range; it is not empty.
    BlockStatus {
        /// What is asked about.
        range: Range<u64>,
        /// Which of the chosen contexts: at least one, and each once.
        contexts: Vec<ContextId>,
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
#[derive(Clone, Debug)]
pub struct Admission {
    size: u64,
    flags: Flags,
    headers: Headers,
    contexts: Vec<ContextId>,
    alignment: u64,
    payload_max: u64,
}

impl Admission {
    /// The rules for an export as it was described to a client that chose `contexts`.
    pub fn new(info: &ExportInfo, headers: Headers, contexts: Vec<ContextId>) -> Self {
        Self {
            size: info.size,
            flags: info.flags.offered(headers, contexts.len()),
            headers,
            contexts,
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
                let range = self.range(&request, Errno::Inval)?;
                // Where replies have chunks this is the client's cue to ask for less at a time.
                let too_long = if self.headers.has_chunks() {
                    Errno::Overflow
                } else {
                    Errno::Inval
                };
                self.limit_payload(&request, too_long)?;
                Ok(Command::Read {
                    range,
                    do_not_fragment: request.flags & DO_NOT_FRAGMENT != 0,
                })
            }
            WRITE => {
                // It may be left out, as there is no write without a payload.
                let payload_flag = match self.headers {
                    Headers::Extended => PAYLOAD_LENGTH,
                    Headers::Simple | Headers::Structured => 0,
                };
                self.allow_flags(&request, payload_flag)?;
                self.allow_changes("write to a read-only export")?;
                self.limit_payload(&request, Errno::Inval)?;
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
                let may_filter = self.flags.contains(Flags::BLOCK_STATUS_PAYLOAD);
                let payload_flag = if may_filter { PAYLOAD_LENGTH } else { 0 };
                self.allow_flags(&request, REQUEST_ONE | payload_flag)?;
                let one = request.flags & REQUEST_ONE != 0;
                self.block_status(request, one)
            }
            _ => Err(refuse(Errno::Inval, "unknown command")),
        }
    }

    fn block_status(&self, mut request: Request, one: bool) -> Result<Command, Refusal> {
        if !self.headers.has_chunks() || self.contexts.is_empty() {
            return Err(refuse(
                Errno::Inval,
                "block status without a metadata context",
            ));
        }
        let mut contexts = self.contexts.clone();
        if request.flags & PAYLOAD_LENGTH != 0 {
            let filter = ContextFilter::decode(request.data.clone())
                .filter(|filter| self.have_each_once(&filter.contexts))
                .ok_or(refuse(
                    Errno::Inval,
                    "block status of no list of different contexts",
                ))?;
            (request.length, contexts) = (filter.length, filter.contexts);
        }
        if request.length == 0 {
            return Err(refuse(Errno::Inval, "block status of nothing"));
        }
        Ok(Command::BlockStatus {
            range: self.range(&request, Errno::Inval)?,
            contexts,
            one,
        })
    }

    fn have_each_once(&self, asked: &[ContextId]) -> bool {
        let mut different = HashSet::new();
        let known = |id| self.contexts.contains(id) && different.insert(*id);
        !asked.is_empty() && asked.iter().all(known)
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

    fn limit_payload(&self, request: &Request, too_long: Errno) -> Result<(), Refusal> {
        if request.length <= self.payload_max {
            return Ok(());
        }
        Err(refuse(too_long, "payload longer than the maximum"))
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
mod tests;
