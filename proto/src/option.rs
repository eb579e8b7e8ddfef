//! What a client asks for before transmission, from bytes to questions.
//!
//! Two steps, so that nothing is believed too early and nothing large is kept: [`OptionDecoder`]
//! cuts the stream into options, dropping the data that nobody will look at as it arrives;
//! [`parse`] turns what is left into a question that can be answered, or into why it cannot.

use std::borrow::Cow;

use bytes::{Buf, Bytes, BytesMut};

use crate::export::Denied;
use crate::string;
use crate::violation::Violation;
use crate::wire::{OPTION_MAGIC, answer, option};

/// The most data that an option can mean something with: a name of the longest kind and more
/// queries than any client has. More is skipped, and the option declined.
pub const OPTION_DATA_MAX: u32 = 64 << 10;

/// The most data that is skipped for the sake of an orderly answer: as much as the longest write.
/// Who announces more is not negotiating.
pub const OPTION_SKIPPED_MAX: u32 = 32 << 20;

/// The most contexts that can be asked for at once. Each one selected is work in every block-status
/// request of the session.
pub const QUERIES_MAX: u32 = 256;

/// Cuts the stream into options.
#[derive(Default)]
pub(crate) struct OptionDecoder {
    expecting: Expecting,
}

#[derive(Clone, Copy, Default)]
enum Expecting {
    #[default]
    Header,
    Data {
        code: u32,
        length: usize,
    },
    Skipping {
        code: u32,
        length: u32,
        left: usize,
    },
}

/// An option with its data, neither yet believed.
pub(crate) struct RawOption {
    pub(crate) code: u32,
    pub(crate) data: Data,
}

pub(crate) enum Data {
    Whole(Bytes),
    /// It has been read past: this option has no use for it, or there was too much.
    Skipped(u32),
}

impl OptionDecoder {
    /// Takes the next option off the front of `input`, or `None` until more has arrived.
    pub(crate) fn decode(&mut self, input: &mut BytesMut) -> Result<Option<RawOption>, Violation> {
        if matches!(self.expecting, Expecting::Header) {
            if input.len() < HEADER_SIZE {
                return Ok(None);
            }
            self.expecting = read_header(input)?;
        }

        let raw = match &mut self.expecting {
            Expecting::Header => return Ok(None),
            Expecting::Data { code, length } => {
                if input.len() < *length {
                    return Ok(None);
                }
                RawOption {
                    code: *code,
                    data: Data::Whole(input.split_to(*length).freeze()),
                }
            }
            Expecting::Skipping { code, length, left } => {
                let arrived = input.len().min(*left);
                input.advance(arrived);
                *left -= arrived;
                if *left > 0 {
                    return Ok(None);
                }
                RawOption {
                    code: *code,
                    data: Data::Skipped(*length),
                }
            }
        };
        self.expecting = Expecting::Header;
        Ok(Some(raw))
    }
}

fn read_header(input: &mut BytesMut) -> Result<Expecting, Violation> {
    let magic = input.get_u64();
    let code = input.get_u32();
    let length = input.get_u32();

    if magic != OPTION_MAGIC {
        return Err(Violation::OptionMagic(magic));
    }
    if length > OPTION_SKIPPED_MAX {
        return Err(Violation::OptionLength {
            option: code,
            length,
        });
    }
    if has_use_for_data(code) && length <= OPTION_DATA_MAX {
        return Ok(Expecting::Data {
            code,
            length: length as usize,
        });
    }
    Ok(Expecting::Skipping {
        code,
        length,
        left: length as usize,
    })
}

fn has_use_for_data(code: u32) -> bool {
    use option::{EXPORT_NAME, GO, INFO, LIST_META_CONTEXT, SET_META_CONTEXT};
    matches!(
        code,
        EXPORT_NAME | INFO | GO | LIST_META_CONTEXT | SET_META_CONTEXT
    )
}

/// A question that makes sense.
pub(crate) enum Question {
    ExportName(String),
    Abort,
    List,
    StartTls,
    Info(InfoRequest),
    Go(InfoRequest),
    StructuredReply,
    ExtendedHeaders,
    ListContexts(ContextRequest),
    SetContexts(ContextRequest),
}

/// An export, and what to tell about it.
pub(crate) struct InfoRequest {
    pub(crate) export: String,
    pub(crate) items: Vec<u16>,
}

/// An export, and which of its contexts.
pub(crate) struct ContextRequest {
    pub(crate) export: String,
    pub(crate) queries: Vec<String>,
}

/// An option that gets an error for an answer, and no more than that.
#[derive(Debug)]
pub(crate) struct Declined {
    /// The type of the answer.
    pub(crate) answer: u32,
    /// What the client can show to people.
    pub(crate) text: Cow<'static, str>,
}

impl From<Denied> for Declined {
    fn from(denied: Denied) -> Self {
        let answer = match denied {
            Denied::Unknown => answer::ERR_UNKNOWN,
            Denied::Policy(_) => answer::ERR_POLICY,
            Denied::Shutdown => answer::ERR_SHUTDOWN,
        };
        Self {
            answer,
            text: denied.to_string().into(),
        }
    }
}

/// Declines an option as invalid.
pub(crate) fn invalid(text: impl Into<Cow<'static, str>>) -> Declined {
    Declined {
        answer: answer::ERR_INVALID,
        text: text.into(),
    }
}

/// Declines an option for what it announced.
pub(crate) fn too_much_data(length: u32, most: u32) -> Declined {
    too_big(format!("{length} bytes of option data, more than {most}"))
}

/// Makes sense of an option, or says why there is none in it.
pub(crate) fn parse(raw: RawOption) -> Result<Question, Declined> {
    match raw.code {
        option::EXPORT_NAME => {
            let mut data = whole(raw.data)?;
            let length = data.len();
            Ok(Question::ExportName(take_string(&mut data, length)?))
        }
        // Data here is wrong, but `proto.md` lets a client go in peace.
        option::ABORT => Ok(Question::Abort),
        option::LIST => empty(&raw.data).map(|()| Question::List),
        option::STARTTLS => empty(&raw.data).map(|()| Question::StartTls),
        option::INFO => info_request(whole(raw.data)?).map(Question::Info),
        option::GO => info_request(whole(raw.data)?).map(Question::Go),
        option::STRUCTURED_REPLY => empty(&raw.data).map(|()| Question::StructuredReply),
        option::EXTENDED_HEADERS => empty(&raw.data).map(|()| Question::ExtendedHeaders),
        option::LIST_META_CONTEXT => context_request(whole(raw.data)?).map(Question::ListContexts),
        option::SET_META_CONTEXT => context_request(whole(raw.data)?).map(Question::SetContexts),
        _ => Err(Declined {
            answer: answer::ERR_UNSUPPORTED,
            text: format!("option {} is not supported", raw.code).into(),
        }),
    }
}

fn whole(data: Data) -> Result<Bytes, Declined> {
    match data {
        Data::Whole(data) => Ok(data),
        Data::Skipped(length) => Err(too_much_data(length, OPTION_DATA_MAX)),
    }
}

fn empty(data: &Data) -> Result<(), Declined> {
    match data {
        Data::Skipped(0) => Ok(()),
        _ => Err(invalid("this option takes no data")),
    }
}

fn info_request(mut data: Bytes) -> Result<InfoRequest, Declined> {
    let export = take_counted_string(&mut data)?;
    let count = data.try_get_u16().map_err(|_| cut_short())?;
    let mut items = Vec::new();
    for _ in 0..count {
        items.push(data.try_get_u16().map_err(|_| cut_short())?);
    }
    expect_end(&data)?;
    Ok(InfoRequest { export, items })
}

fn context_request(mut data: Bytes) -> Result<ContextRequest, Declined> {
    let export = take_counted_string(&mut data)?;
    let count = data.try_get_u32().map_err(|_| cut_short())?;
    let mut queries = Vec::new();
    for number in 0..count {
        // Also those that are too many must be there, which is little beside the most that an option has.
        let query = take_counted_string(&mut data)?;
        if number < QUERIES_MAX {
            queries.push(query);
        }
    }
    expect_end(&data)?;
    if count > QUERIES_MAX {
        return Err(too_big(format!("{count} queries, more than {QUERIES_MAX}")));
    }
    Ok(ContextRequest { export, queries })
}

fn take_counted_string(data: &mut Bytes) -> Result<String, Declined> {
    let length = data.try_get_u32().map_err(|_| cut_short())?;
    take_string(data, length as usize)
}

fn take_string(data: &mut Bytes, length: usize) -> Result<String, Declined> {
    if length > data.len() {
        return Err(cut_short());
    }
    // Never repeated in the text: these bytes are not fit for anyone's terminal.
    let text = string::parse(&data[..length])
        .ok_or_else(|| invalid("a string that is not UTF-8, has a NUL or exceeds 4096 bytes"))?
        .to_owned();
    data.advance(length);
    Ok(text)
}

fn expect_end(data: &Bytes) -> Result<(), Declined> {
    if data.is_empty() {
        Ok(())
    } else {
        Err(invalid("there is data after the option's end"))
    }
}

fn cut_short() -> Declined {
    invalid("the option's data ends too early")
}

fn too_big(text: String) -> Declined {
    Declined {
        answer: answer::ERR_TOO_BIG,
        text: text.into(),
    }
}

/// Magic, number and length of an option.
const HEADER_SIZE: usize = 16;
