//! What a server answers to an option, from bytes to values.
//!
//! As little is kept as possible: no answer, no number of them and no sum of their lengths is more
//! than a named maximum, whatever a server has to say.

use std::fmt;

use bytes::{Buf, Bytes, BytesMut};
use thiserror::Error;

use super::violation::ServerViolation;
use crate::export::Listed;
use crate::extents::ContextId;
use crate::string;
use crate::wire::{OPTION_REPLY_MAGIC, answer};

/// The most data that one answer can have: a name and a description of the longest kind, and room
/// for numbers. Servers have no more to say in any answer that is understood here.
pub const ANSWER_DATA_MAX: u32 = 16 << 10;

/// How many answers one option may have: more exports or contexts than any server has.
pub const ANSWERS_MAX: u32 = 1 << 16;

/// How long the answers to one option may be in all. A list of 65,536 exports with names and
/// descriptions of 64 bytes each fits.
pub const ANSWERS_LENGTH_MAX: u64 = 8 << 20;

/// Cuts the stream into answers to one option.
#[derive(Debug, Default)]
pub(crate) struct AnswerDecoder {
    answers: u32,
    length: u64,
}

/// An answer with its data, not yet believed.
#[derive(Debug)]
pub(crate) struct RawAnswer {
    pub(crate) kind: u32,
    pub(crate) data: Bytes,
}

impl RawAnswer {
    /// A violation: this length is wrong for what the answer is.
    pub(crate) fn wrong_length(&self) -> ServerViolation {
        ServerViolation::AnswerLength {
            kind: self.kind,
            length: self.data.len() as u32,
        }
    }
}

impl AnswerDecoder {
    /// Takes the next answer to `option` off the front of `input`, or `None` until all of it has
    /// arrived.
    pub(crate) fn decode(
        &mut self,
        option: u32,
        input: &mut BytesMut,
    ) -> Result<Option<RawAnswer>, ServerViolation> {
        if input.len() < HEADER_SIZE {
            return Ok(None);
        }
        let mut header = &input[..HEADER_SIZE];
        let magic = header.get_u64();
        let found = header.get_u32();
        let kind = header.get_u32();
        let length = header.get_u32();

        if magic != OPTION_REPLY_MAGIC {
            return Err(ServerViolation::AnswerMagic(magic));
        }
        if found != option {
            return Err(ServerViolation::AnswerTo {
                expected: option,
                found,
            });
        }
        if length > ANSWER_DATA_MAX {
            return Err(ServerViolation::AnswerLength { kind, length });
        }
        if input.len() < HEADER_SIZE + length as usize {
            return Ok(None);
        }

        self.count(length)?;
        input.advance(HEADER_SIZE);
        Ok(Some(RawAnswer {
            kind,
            data: input.split_to(length as usize).freeze(),
        }))
    }

    fn count(&mut self, length: u32) -> Result<(), ServerViolation> {
        self.answers += 1;
        self.length += u64::from(length);
        if self.answers > ANSWERS_MAX {
            return Err(ServerViolation::TooManyAnswers(ANSWERS_MAX));
        }
        if self.length > ANSWERS_LENGTH_MAX {
            return Err(ServerViolation::TooLongAnswers(ANSWERS_LENGTH_MAX));
        }
        Ok(())
    }
}

/// An export in a list.
pub(crate) fn listed(raw: &RawAnswer) -> Result<Listed, ServerViolation> {
    let mut data = raw.data.clone();
    let length = data.try_get_u32().map_err(|_| raw.wrong_length())? as usize;
    if length > data.len() {
        return Err(raw.wrong_length());
    }
    let name = name(&data.split_to(length))?;
    Ok(Listed {
        name,
        description: description(&data),
    })
}

/// A context, listed or selected.
pub(crate) fn context(raw: &RawAnswer) -> Result<(ContextId, String), ServerViolation> {
    let mut data = raw.data.clone();
    let id = ContextId(data.try_get_u32().map_err(|_| raw.wrong_length())?);
    Ok((id, name(&data)?))
}

/// A name has to be one: it is what we would ask by.
pub(crate) fn name(bytes: &[u8]) -> Result<String, ServerViolation> {
    string::parse(bytes)
        .map(str::to_owned)
        .ok_or(ServerViolation::Name)
}

/// A description that is no string is no reason to lose the export.
pub(crate) fn description(bytes: &[u8]) -> Option<String> {
    string::parse(bytes)
        .filter(|text| !text.is_empty())
        .map(str::to_owned)
}

/// An option that the server did not do, and why.
#[derive(Clone, Debug, Eq, Error, PartialEq)]
pub struct Declined {
    /// What kind of no it is.
    pub reason: Reason,
    /// What the server has to say about it, which may be nothing.
    pub text: String,
}

/// Why a server declines an option, as the protocol has it.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Reason {
    /// It does not know the option.
    Unsupported,
    /// It does not want to.
    Policy,
    /// It finds fault with the question.
    Invalid,
    /// Where it runs this cannot be done.
    Platform,
    /// It wants TLS first.
    TlsRequired,
    /// There is no such export, or none for us.
    Unknown,
    /// It is about to stop.
    Shutdown,
    /// It wants us to ask for its block sizes first, which we always do.
    BlockSizeRequired,
    /// The question or the answer is too long for it.
    TooBig,
    /// It wants extended headers first.
    ExtendedHeadersRequired,
    /// A number that the protocol does not list.
    Other(u32),
}

impl Declined {
    /// Whether this means more than that the option is not to be had: nothing else will be.
    pub(crate) fn ends_all(&self) -> bool {
        matches!(self.reason, Reason::TlsRequired | Reason::Shutdown)
    }

    /// The error that an answer is, if it is one.
    pub(crate) fn from_answer(raw: &RawAnswer) -> Option<Self> {
        if raw.kind & ERROR_BIT == 0 {
            return None;
        }
        let reason = match raw.kind {
            answer::ERR_UNSUPPORTED => Reason::Unsupported,
            answer::ERR_POLICY => Reason::Policy,
            answer::ERR_INVALID => Reason::Invalid,
            ERR_PLATFORM => Reason::Platform,
            ERR_TLS_REQUIRED => Reason::TlsRequired,
            answer::ERR_UNKNOWN => Reason::Unknown,
            answer::ERR_SHUTDOWN => Reason::Shutdown,
            ERR_BLOCK_SIZE_REQUIRED => Reason::BlockSizeRequired,
            answer::ERR_TOO_BIG => Reason::TooBig,
            answer::ERR_EXTENDED_HEADERS => Reason::ExtendedHeadersRequired,
            other => Reason::Other(other),
        };
        Some(Self {
            reason,
            text: description(&raw.data).unwrap_or_default(),
        })
    }
}

impl fmt::Display for Declined {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.reason {
            Reason::Unsupported => write!(f, "the server does not know this option")?,
            Reason::Policy => write!(f, "the server does not want to")?,
            Reason::Invalid => write!(f, "the server takes the question for invalid")?,
            Reason::Platform => write!(f, "the server cannot do this where it runs")?,
            Reason::TlsRequired => write!(f, "the server requires TLS")?,
            Reason::Unknown => write!(f, "the server has no such export")?,
            Reason::Shutdown => write!(f, "the server is shutting down")?,
            Reason::BlockSizeRequired => write!(f, "the server wants its block sizes heeded")?,
            Reason::TooBig => write!(f, "too long for the server")?,
            Reason::ExtendedHeadersRequired => write!(f, "the server requires extended headers")?,
            Reason::Other(number) => write!(f, "the server declined with {number:#x}")?,
        }
        if !self.text.is_empty() {
            write!(f, ": {}", Printable(&self.text))?;
        }
        Ok(())
    }
}

/// A text of a server's, fit for a terminal.
pub(crate) struct Printable<'a>(pub(crate) &'a str);

impl fmt::Display for Printable<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for character in self.0.trim_end().chars() {
            if character.is_control() {
                f.write_str("\u{fffd}")?;
            } else {
                write!(f, "{character}")?;
            }
        }
        Ok(())
    }
}

/// Set in the type of every answer that is an error.
const ERROR_BIT: u32 = 1 << 31;

const ERR_PLATFORM: u32 = ERROR_BIT | 4;
const ERR_TLS_REQUIRED: u32 = ERROR_BIT | 5;
const ERR_BLOCK_SIZE_REQUIRED: u32 = ERROR_BIT | 8;

/// Magic, option, type and length of an answer.
const HEADER_SIZE: usize = 20;
