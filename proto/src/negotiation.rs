//! From the greeting to a session.

use std::borrow::Cow;

use bytes::{Buf, BufMut, BytesMut};

use crate::admission::Admission;
use crate::answers::Answers;
use crate::export::{Catalog, Denied, ExportInfo};
use crate::extents::ContextId;
use crate::headers::Headers;
use crate::option::{
    ContextRequest, Declined, InfoRequest, OPTION_SKIPPED_MAX, OptionDecoder, Question, RawOption,
    invalid, parse, too_much_data,
};
use crate::reply::Replies;
use crate::request::RequestDecoder;
use crate::selection::{Selection, matching};
use crate::tls::{Tls, TlsMode};
use crate::violation::Violation;
use crate::wire::{CLIENT_FIXED_NEWSTYLE, CLIENT_NO_ZEROES, answer, option};

/// What the server says first: fixed newstyle, and no padding for who does not want it.
pub const GREETING: &[u8; 18] = b"NBDMAGICIHAVEOPT\x00\x03";

/// How many options a client may send before it enters an export. A tool that looks at each of
/// hundreds of exports stays below it; who needs more is not looking for anything.
pub const OPTIONS_MAX: u32 = 1000;

/// How many bytes of answers collect before they must be written: a client that asks without
/// listening does not make the server remember all it has to say.
pub const ANSWERS_MAX: usize = 64 << 10;

/// A client that is choosing an export.
///
/// The server sends the [`GREETING`], and from then on hands in what arrives and sends what comes
/// out. Exactly the bytes of the handshake are consumed: what follows [`Step::Ready`] in the input
/// is the first requests.
pub struct Negotiation<C: Catalog> {
    catalog: C,
    stage: Stage,
    options: OptionDecoder,
    options_seen: u32,
    headers: Headers,
    tls: Tls,
    shutting_down: bool,
    /// The last choice, for as long as no other is attempted.
    selection: Option<Selection>,
}

#[derive(Clone, Copy)]
enum Stage {
    Greeted,
    Haggling { fixed: bool, zeroes: bool },
    Over,
}

/// What is to be done next.
pub enum Step<C: Catalog> {
    /// Write the output, then come back with more input.
    NeedMore,
    /// Write the output, then come back; more input may not be needed.
    WriteFirst,
    /// Write the output, then carry on over TLS, or not at all. There is no input left.
    StartTls,
    /// Write the output; the client has entered an export.
    Ready(Session<C>),
    /// Write the output and close; the client has said goodbye.
    Abort,
    /// Write the output and close, for the reason given: the client used the one option that has no
    /// error reply.
    Hangup(Cow<'static, str>),
}

/// An export that a client has entered, and what was agreed about it.
pub struct Session<C: Catalog> {
    /// The handle from the catalog.
    pub export: C::Export,
    /// What the client has been told; the flags are those that it saw.
    pub info: ExportInfo,
    /// The form of what follows.
    pub headers: Headers,
    /// What a block-status request is about.
    pub contexts: Vec<(ContextId, C::Context)>,
}

impl<C: Catalog> Session<C> {
    /// The rules that its requests are held to.
    pub fn admission(&self) -> Admission {
        let contexts = self.contexts.iter().map(|(id, _)| *id).collect();
        Admission::new(&self.info, self.headers, contexts)
    }

    /// What finds its requests.
    pub fn requests(&self) -> RequestDecoder {
        RequestDecoder::new(self.headers)
    }

    /// The form that its replies take.
    pub fn replies(&self) -> Replies {
        Replies::new(self.headers)
    }
}

impl<C: Catalog> Negotiation<C> {
    /// Begins after the greeting, on a connection that has no TLS.
    pub fn new(catalog: C) -> Self {
        Self::with_tls(catalog, TlsMode::Off)
    }

    /// Begins after the greeting, in plain text, on a connection that can be given TLS.
    pub fn with_tls(catalog: C, mode: TlsMode) -> Self {
        Self {
            catalog,
            stage: Stage::Greeted,
            options: OptionDecoder::default(),
            options_seen: 0,
            headers: Headers::default(),
            tls: Tls::Plain(mode),
            shutting_down: false,
            selection: None,
        }
    }

    /// The server is to end: from here on no option gets what it asks for, and is told why.
    ///
    /// One that has arrived in part is declined too. Only a client's goodbye is still acknowledged.
    pub fn shut_down(&mut self) {
        self.shutting_down = true;
    }

    /// Takes what it understands off the front of `input` and appends the answers to `output`.
    ///
    /// After a violation or one of the steps that end it there is only [`Step::Hangup`]. What is in
    /// the output by then is to be written all the same.
    pub fn advance(
        &mut self,
        input: &mut BytesMut,
        output: &mut BytesMut,
    ) -> Result<Step<C>, Violation> {
        let step = self.step(input, output);
        if !matches!(step, Ok(Step::NeedMore | Step::WriteFirst | Step::StartTls)) {
            self.stage = Stage::Over;
        }
        step
    }

    fn step(&mut self, input: &mut BytesMut, output: &mut BytesMut) -> Result<Step<C>, Violation> {
        loop {
            let said = output.len();
            let end = match self.stage {
                Stage::Over => return Ok(Step::Hangup("the negotiation is over".into())),
                Stage::Greeted => {
                    if input.len() < size_of::<u32>() {
                        return Ok(Step::NeedMore);
                    }
                    self.stage = read_client_flags(input.get_u32())?;
                    None
                }
                Stage::Haggling { fixed, zeroes } => {
                    let decoded = self.options.decode(input);
                    let decoded = decoded.inspect_err(|&violation| {
                        if fixed {
                            self.answer_the_last(violation, output);
                        }
                    });
                    let Some(raw) = decoded? else {
                        return Ok(Step::NeedMore);
                    };
                    self.count(&raw, fixed)?;
                    self.answer(raw, zeroes, output)?
                }
            };
            if matches!(end, Some(Step::StartTls)) && !input.is_empty() {
                // No acknowledgement goes out: whoever sees one begins TLS.
                output.truncate(said);
                return Err(Violation::PlainText(input.len()));
            }
            if let Some(end) = end {
                return Ok(end);
            }
            if output.len() >= ANSWERS_MAX {
                return Ok(Step::WriteFirst);
            }
        }
    }

    fn count(&mut self, raw: &RawOption, fixed: bool) -> Result<(), Violation> {
        if !fixed && raw.code != option::EXPORT_NAME {
            return Err(Violation::NotFixedNewstyle(raw.code));
        }
        self.options_seen += 1;
        if self.options_seen > OPTIONS_MAX {
            return Err(Violation::TooManyOptions(OPTIONS_MAX));
        }
        Ok(())
    }

    /// Answers one option; returns how the negotiation ends, if it does.
    fn answer(
        &mut self,
        raw: RawOption,
        zeroes: bool,
        output: &mut BytesMut,
    ) -> Result<Option<Step<C>>, Violation> {
        let code = raw.code;
        if code == option::SET_META_CONTEXT {
            // An attempt replaces the choice before it, even one that fails.
            self.selection = None;
        }

        let mut answers = Answers::to(code, output);
        if let Err(declined) = self.admit(code) {
            if code == option::EXPORT_NAME {
                return Ok(Some(Step::Hangup(declined.text)));
            }
            answers.decline(&declined);
            return Ok(None);
        }
        let end = match parse(raw) {
            Ok(Question::ExportName(name)) => {
                return Ok(Some(self.enter_without_errors(&name, zeroes, output)));
            }
            Err(_) if code == option::EXPORT_NAME => return Err(Violation::ExportName),
            Err(declined) => Err(declined),
            Ok(Question::Abort) => Ok(Some(Step::Abort)),
            Ok(Question::List) => {
                self.list(&mut answers);
                Ok(None)
            }
            Ok(Question::StartTls) => self.start_tls().map(|()| Some(Step::StartTls)),
            Ok(Question::Info(request)) => self.info(&request, &mut answers).map(|()| None),
            Ok(Question::Go(request)) => self
                .go(&request, &mut answers)
                .map(|session| Some(Step::Ready(session))),
            Ok(Question::StructuredReply) => self.take_structured_replies().map(|()| None),
            Ok(Question::ExtendedHeaders) => {
                self.headers = Headers::Extended;
                Ok(None)
            }
            Ok(Question::ListContexts(request)) => {
                self.list_contexts(&request, &mut answers).map(|()| None)
            }
            Ok(Question::SetContexts(request)) => {
                self.set_contexts(request, &mut answers).map(|()| None)
            }
        };

        match end {
            Ok(end) => {
                answers.acknowledge();
                Ok(end)
            }
            Err(declined) => {
                answers.decline(&declined);
                Ok(None)
            }
        }
    }

    /// Answers an option that ends the connection, as nobody will read past its data. The client has
    /// hardly begun to send them.
    fn answer_the_last(&self, violation: Violation, output: &mut BytesMut) {
        if let Violation::OptionLength {
            option: code,
            length,
        } = violation
            && code != option::EXPORT_NAME
        {
            let declined = self.admit(code).err();
            let declined = declined.unwrap_or_else(|| too_much_data(length, OPTION_SKIPPED_MAX));
            Answers::to(code, output).decline(&declined);
        }
    }

    /// Declines what may not be asked now, whether or not it makes sense.
    fn admit(&self, code: u32) -> Result<(), Declined> {
        self.tls.admit(code)?;
        if self.shutting_down && code != option::ABORT {
            return Err(Denied::Shutdown.into());
        }
        Ok(())
    }

    /// What was agreed in plain text may have been agreed with somebody else: it is forgotten.
    fn start_tls(&mut self) -> Result<(), Declined> {
        self.tls = self.tls.start()?;
        self.headers = Headers::default();
        self.selection = None;
        Ok(())
    }

    fn list(&self, answers: &mut Answers<'_>) {
        for listed in self.catalog.list() {
            answers.server(&listed);
        }
    }

    fn info(&self, request: &InfoRequest, answers: &mut Answers<'_>) -> Result<(), Declined> {
        let (_, info) = self.open(&request.export)?;
        answers.describe(&info, &request.items);
        Ok(())
    }

    fn go(&self, request: &InfoRequest, answers: &mut Answers<'_>) -> Result<Session<C>, Declined> {
        let session = self.enter(&request.export)?;
        answers.describe(&session.info, &request.items);
        Ok(session)
    }

    fn enter_without_errors(&self, name: &str, zeroes: bool, output: &mut BytesMut) -> Step<C> {
        if self.headers == Headers::Extended {
            return Step::Hangup("extended headers were negotiated, which need GO".into());
        }
        match self.enter(name) {
            Ok(session) => {
                output.put_u64(session.info.size);
                output.put_u16(session.info.flags.bits());
                if zeroes {
                    output.put_bytes(0, EXPORT_NAME_PADDING);
                }
                Step::Ready(session)
            }
            Err(declined) => Step::Hangup(declined.text),
        }
    }

    fn enter(&self, name: &str) -> Result<Session<C>, Declined> {
        let (export, info) = self.open(name)?;
        let contexts = match &self.selection {
            Some(selection) => selection.resolve(&self.catalog, name, &export)?,
            None => Vec::new(),
        };
        Ok(Session {
            export,
            info,
            headers: self.headers,
            contexts,
        })
    }

    /// There is no way back from extended headers, which are structured replies and more.
    fn take_structured_replies(&mut self) -> Result<(), Declined> {
        if self.headers == Headers::Extended {
            return Err(Declined {
                answer: answer::ERR_EXTENDED_HEADERS,
                text: "extended headers have been negotiated".into(),
            });
        }
        self.headers = Headers::Structured;
        Ok(())
    }

    fn list_contexts(
        &self,
        request: &ContextRequest,
        answers: &mut Answers<'_>,
    ) -> Result<(), Declined> {
        self.need_chunks()?;
        let (export, _) = self.open(&request.export)?;
        for name in matching(&self.catalog, &export, &request.queries) {
            answers.listed_context(&name);
        }
        Ok(())
    }

    fn set_contexts(
        &mut self,
        request: ContextRequest,
        answers: &mut Answers<'_>,
    ) -> Result<(), Declined> {
        self.need_chunks()?;
        let (export, _) = self.open(&request.export)?;
        let selection =
            Selection::choose(&self.catalog, (&request.export, &export), request.queries);
        for (id, name) in selection.names() {
            answers.selected_context(*id, name);
        }
        self.selection = Some(selection);
        Ok(())
    }

    fn need_chunks(&self) -> Result<(), Declined> {
        if self.headers.has_chunks() {
            return Ok(());
        }
        Err(invalid(
            "metadata contexts need structured replies or extended headers",
        ))
    }

    fn open(&self, name: &str) -> Result<(C::Export, ExportInfo), Declined> {
        let (export, mut info) = self.catalog.open(name)?;
        // The same for INFO and for GO: who asks for both in a row is told the same.
        let chosen = self.selection.as_ref().map_or(0, |it| it.count_for(name));
        info.flags = info.flags.offered(self.headers, chosen);
        Ok((export, info))
    }
}

fn read_client_flags(flags: u32) -> Result<Stage, Violation> {
    let unknown = flags & !(CLIENT_FIXED_NEWSTYLE | CLIENT_NO_ZEROES);
    if unknown != 0 {
        return Err(Violation::ClientFlags(unknown));
    }
    Ok(Stage::Haggling {
        fixed: flags & CLIENT_FIXED_NEWSTYLE != 0,
        zeroes: flags & CLIENT_NO_ZEROES == 0,
    })
}

/// Zeroes after the answer to an export name, for clients that do not decline them.
const EXPORT_NAME_PADDING: usize = 124;
