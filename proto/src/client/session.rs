//! Requests and replies of one connection, from commands to bytes and from bytes to outcomes.

use std::collections::HashMap;
use std::fmt;
use std::ops::Range;

use bytes::{Bytes, BytesMut};
use thiserror::Error;

use super::answer::Printable;
use super::assembly::{Assembly, Piece};
use super::header::{Announced, announced};
use super::pending::{Gathered, Pending};
use super::status::{BlockStatus, StatusAssembly};
use super::violation::ServerViolation;
use crate::admission::{Admission, Command, Refusal};
use crate::command::{
    BLOCK_STATUS, CACHE, DISCONNECT, DO_NOT_FRAGMENT, FAST_ZERO, FLUSH, FUA, NO_HOLE,
    PAYLOAD_LENGTH, READ, REQUEST_ONE, TRIM, WRITE, WRITE_ZEROES,
};
use crate::context_filter::ContextFilter;
use crate::errno::Errno;
use crate::export::ExportInfo;
use crate::extents::ContextId;
use crate::headers::Headers;
use crate::incoming_reply::Reply;
use crate::request::{Cookie, Request};

/// The longest chunk that reports an error: a text of the longest kind, numbers, and some room for
/// numbers that are not known yet.
pub const ERROR_CHUNK_MAX: u64 = 8 << 10;

/// An export that has been entered.
///
/// A command becomes a request with [`submit`](Self::submit); what arrives is handed in to
/// [`receive`](Self::receive), which returns each outcome as soon as it is complete. The order in
/// which requests are answered is the server's.
#[derive(Debug)]
pub struct Session {
    info: ExportInfo,
    headers: Headers,
    contexts: Vec<(ContextId, String)>,
    admission: Admission,
    under_way: HashMap<u64, Pending>,
    /// Of the next request; none is used twice.
    next_cookie: u64,
    /// The read whose data is next in the stream, after a simple reply.
    data_of: Option<(u64, usize)>,
}

/// A request that has been put into bytes.
#[derive(Clone, Debug, Eq, PartialEq)]
#[must_use = "the payload is part of the request"]
pub struct Submitted {
    /// What its completion goes by.
    pub cookie: Cookie,
    /// To be sent right behind the output; empty but for writes.
    pub payload: Bytes,
}

/// A request that has been answered.
#[derive(Clone, Debug, Eq, PartialEq)]
#[must_use = "what failed has to be told"]
pub struct Completion {
    /// Which one.
    pub cookie: Cookie,
    /// What came of it.
    pub result: Result<Outcome, Failure>,
}

/// What came of a request that succeeded.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum Outcome {
    /// It was done.
    Done,
    /// All of what was to be read, in order and without gaps.
    Data(Vec<Piece>),
    /// What was to be known.
    BlockStatus(BlockStatus),
}

/// What a server says of a request that failed.
#[derive(Clone, Debug, Eq, Error, PartialEq)]
pub struct Failure {
    /// How it failed.
    pub errno: Errno,
    /// In words, which there may be none of.
    pub text: String,
    /// Where, if that is known.
    pub offset: Option<u64>,
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let what = match self.errno {
            Errno::Perm => "operation not permitted",
            Errno::Io => "input/output error",
            Errno::NoMem => "out of memory",
            Errno::Inval => "invalid argument",
            Errno::NoSpc => "no space left",
            Errno::Overflow => "too long for one piece",
            Errno::NotSup => "not supported",
            Errno::Shutdown => "the server is shutting down",
        };
        write!(f, "{what}")?;
        if let Some(offset) = self.offset {
            write!(f, " at {offset}")?;
        }
        if !self.text.is_empty() {
            write!(f, ": {}", Printable(&self.text))?;
        }
        Ok(())
    }
}

impl Session {
    /// A session as it was negotiated.
    pub(crate) fn new(
        info: ExportInfo,
        headers: Headers,
        contexts: Vec<(ContextId, String)>,
    ) -> Self {
        let ids = contexts.iter().map(|(id, _)| *id).collect();
        Self {
            admission: Admission::new(&info, headers, ids),
            info,
            headers,
            contexts,
            under_way: HashMap::new(),
            next_cookie: 1,
            data_of: None,
        }
    }

    /// What has been entered. The flags are those that can be relied on.
    pub fn info(&self) -> &ExportInfo {
        &self.info
    }

    /// The form of requests and replies.
    pub fn headers(&self) -> Headers {
        self.headers
    }

    /// The contexts that block states are about: those that were asked for and that there are.
    pub fn contexts(&self) -> &[(ContextId, String)] {
        &self.contexts
    }

    /// How many requests have not been answered.
    pub fn under_way(&self) -> usize {
        self.under_way.len()
    }

    /// Appends a request to `output`; its payload follows.
    ///
    /// It is held to the rules that a server holds requests to: what could only be refused is not
    /// sent. What it takes in memory until it is answered is what it asks for, and little more.
    pub fn submit(
        &mut self,
        command: Command,
        output: &mut BytesMut,
    ) -> Result<Submitted, Refusal> {
        let cookie = Cookie(self.next_cookie);
        let mut request = self.request(cookie, command).ok_or(BACKWARDS)?;
        if self.headers != Headers::Extended && request.length > u64::from(u32::MAX) {
            return Err(TOO_LONG);
        }
        let command = self.admission.admit(request.clone())?;

        let pending = self.pending(request.kind, command);
        self.under_way.insert(cookie.0, pending);
        self.next_cookie += 1;
        let payload = std::mem::take(&mut request.data);
        request.encode(self.headers, output);
        Ok(Submitted { cookie, payload })
    }

    /// Appends the goodbye. To be called when nothing is under way; nothing may follow.
    pub fn disconnect(&mut self, output: &mut BytesMut) {
        let goodbye = Request {
            cookie: Cookie(self.next_cookie),
            kind: DISCONNECT,
            flags: 0,
            offset: 0,
            length: 0,
            data: Bytes::new(),
        };
        goodbye.encode(self.headers, output);
    }

    /// Takes replies off the front of `input` until one is complete; `None` until more has arrived.
    ///
    /// After a violation nothing in `input` means anything.
    pub fn receive(&mut self, input: &mut BytesMut) -> Result<Option<Completion>, ServerViolation> {
        loop {
            if self.data_of.is_some() {
                return self.receive_data(input);
            }
            self.check_announced(input)?;
            let completion = match Reply::decode(self.headers, input)? {
                None => return Ok(None),
                Some(Reply::Simple { cookie, result }) => self.receive_simple(cookie, result)?,
                Some(Reply::Chunk {
                    cookie,
                    request_offset,
                    done,
                    chunk,
                }) => {
                    let pending = self.find(cookie)?;
                    pending.check_offset(request_offset)?;
                    pending.add(chunk)?;
                    if done {
                        Some(self.finish(cookie)?)
                    } else {
                        None
                    }
                }
            };
            if completion.is_some() {
                return Ok(completion);
            }
        }
    }

    /// How many bytes of `input` there have to be at least before [`receive`](Self::receive), which
    /// has just returned `None`, can get on. It is no more than what was asked for can take.
    pub fn wanted(&self, input: &[u8]) -> usize {
        if let Some((_, length)) = self.data_of {
            return length;
        }
        announced(self.headers, input).map_or(1, Announced::size)
    }

    fn check_announced(&mut self, input: &[u8]) -> Result<(), ServerViolation> {
        let Some(announced) = announced(self.headers, input) else {
            return Ok(());
        };
        self.find(announced.cookie)?.expect(announced)
    }

    /// A simple reply is the whole reply, but for the data of a read.
    fn receive_simple(
        &mut self,
        cookie: Cookie,
        result: Result<(), Errno>,
    ) -> Result<Option<Completion>, ServerViolation> {
        let chunks = self.headers.has_chunks();
        let pending = self.find(cookie)?;
        if chunks && !pending.may_be_simple(result.is_ok()) {
            return Err(ServerViolation::ReplyForm("simple"));
        }
        match result {
            Ok(()) if pending.simple_data() > 0 => {
                self.data_of = Some((cookie.0, pending.simple_data() as usize));
                return Ok(None);
            }
            Ok(()) => {}
            Err(errno) => pending.fail(errno, String::new(), None)?,
        }
        self.finish(cookie).map(Some)
    }

    fn receive_data(
        &mut self,
        input: &mut BytesMut,
    ) -> Result<Option<Completion>, ServerViolation> {
        let Some((cookie, length)) = self.data_of else {
            return Ok(None);
        };
        if input.len() < length {
            input.reserve(length - input.len());
            return Ok(None);
        }
        self.data_of = None;
        let cookie = Cookie(cookie);
        let data = input.split_to(length).freeze();
        self.find(cookie)?.add_all(data)?;
        self.finish(cookie).map(Some)
    }

    fn find(&mut self, cookie: Cookie) -> Result<&mut Pending, ServerViolation> {
        self.under_way
            .get_mut(&cookie.0)
            .ok_or(ServerViolation::UnknownCookie(cookie))
    }

    fn finish(&mut self, cookie: Cookie) -> Result<Completion, ServerViolation> {
        let pending = self.under_way.remove(&cookie.0);
        let pending = pending.ok_or(ServerViolation::UnknownCookie(cookie))?;
        let result = pending.finish()?;
        Ok(Completion { cookie, result })
    }

    fn pending(&self, kind: u16, command: Command) -> Pending {
        match command {
            Command::Read {
                range,
                do_not_fragment,
            } => {
                let assembly = Assembly::new(range.clone(), do_not_fragment);
                Pending::new(kind, range, Gathered::Data(assembly))
            }
            Command::BlockStatus {
                range,
                contexts,
                one,
            } => {
                let alignment = u64::from(self.info.block_size.minimum());
                let export = (self.info.size, alignment);
                let status = StatusAssembly::new((range.clone(), one), export, contexts);
                Pending::new(kind, range, Gathered::Status(status))
            }
            Command::Write { range, .. }
            | Command::Trim { range, .. }
            | Command::WriteZeroes { range, .. }
            | Command::Cache { range } => Pending::new(kind, range, Gathered::Nothing),
            Command::Flush => Pending::new(kind, 0..0, Gathered::Nothing),
        }
    }

    /// The request that says the same as a command; `None` for a range that ends before it starts.
    fn request(&self, cookie: Cookie, command: Command) -> Option<Request> {
        let flag = |set: bool, flag: u16| if set { flag } else { 0 };
        let mut data = Bytes::new();
        let (kind, mut flags, range) = match command {
            Command::Read {
                range,
                do_not_fragment,
            } => (READ, flag(do_not_fragment, DO_NOT_FRAGMENT), range),
            Command::Write {
                range,
                data: payload,
                fua,
            } => {
                data = payload;
                (WRITE, flag(fua, FUA), range)
            }
            Command::Flush => (FLUSH, 0, 0..0),
            Command::Trim { range, fua } => (TRIM, flag(fua, FUA), range),
            Command::WriteZeroes {
                range,
                fua,
                no_hole,
                fast,
            } => {
                let flags = flag(fua, FUA) | flag(no_hole, NO_HOLE) | flag(fast, FAST_ZERO);
                (WRITE_ZEROES, flags, range)
            }
            Command::Cache { range } => (CACHE, 0, range),
            Command::BlockStatus {
                range,
                contexts,
                one,
            } => {
                data = self.filter(&range, contexts);
                (BLOCK_STATUS, flag(one, REQUEST_ONE), range)
            }
        };
        let mut length = range.end.checked_sub(range.start)?;
        let has_payload = kind == WRITE || !data.is_empty();
        if has_payload && self.headers == Headers::Extended {
            flags |= PAYLOAD_LENGTH;
        }
        if kind == BLOCK_STATUS && has_payload {
            flags |= PAYLOAD_LENGTH;
            length = data.len() as u64;
        }
        Some(Request {
            cookie,
            kind,
            flags,
            offset: range.start,
            length,
            data,
        })
    }

    /// What says that a block status is about some of the contexts; nothing if it is about all.
    fn filter(&self, range: &Range<u64>, contexts: Vec<ContextId>) -> Bytes {
        let mut selected = self.contexts.iter();
        if selected.all(|(id, _)| contexts.contains(id)) && contexts.len() == self.contexts.len() {
            return Bytes::new();
        }
        let filter = ContextFilter {
            length: range.end.saturating_sub(range.start),
            contexts,
        };
        filter.encode()
    }
}

const BACKWARDS: Refusal = Refusal {
    errno: Errno::Inval,
    reason: "range that ends before it starts",
};
const TOO_LONG: Refusal = Refusal {
    errno: Errno::Inval,
    reason: "range longer than 32 bits can say",
};
