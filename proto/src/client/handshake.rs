//! From a server's greeting to a session.

use bytes::{Buf, BufMut, BytesMut};

use super::answer::{AnswerDecoder, Declined, RawAnswer, Reason};
use super::description::{Description, undescribed};
use super::dialogue::{Answer, Question, Unaskable, check};
use super::gathering::Gathering;
use super::question::{put_bare, put_contexts, put_export, put_export_name};
use super::session::Session;
use super::violation::ServerViolation;
use crate::extents::ContextId;
use crate::headers::Headers;
use crate::wire::{CLIENT_FIXED_NEWSTYLE, CLIENT_NO_ZEROES, OPTION_MAGIC, answer, option};

/// A client that is looking for an export.
///
/// What the server sends is handed in to [`advance`](Self::advance), beginning with its greeting,
/// and what comes out is sent. Each [`Answer`] is the time for the next [`Question`].
///
/// Where a server does not know an option, the older way of doing the same is tried before the
/// answer is given: structured replies for extended headers, simple ones for structured ones, and
/// for entering an export the option that every server knows. A server from before there were other
/// options declines every other question.
#[derive(Debug)]
pub struct Handshake {
    stage: Stage,
    fixed: bool,
    zeroes: bool,
    headers: Headers,
}

#[derive(Debug)]
enum Stage {
    /// Nothing has been heard.
    Greeting,
    /// It is our turn.
    Asking,
    /// The answer is known before the server has said anything.
    Known(Box<Answer>),
    /// It is the server's turn.
    Waiting(Box<Waiting>),
    /// The one option whose answer has no header.
    EnteringByName(String, Vec<(ContextId, String)>),
    Over,
}

/// An option that has been asked.
#[derive(Debug)]
struct Waiting {
    option: u32,
    decoder: AnswerDecoder,
    gathering: Gathering,
}

impl Default for Handshake {
    fn default() -> Self {
        Self::new()
    }
}

impl Handshake {
    /// Begins with nothing heard and nothing agreed on.
    pub fn new() -> Self {
        Self {
            stage: Stage::Greeting,
            fixed: false,
            zeroes: true,
            headers: Headers::Simple,
        }
    }

    /// The form of what follows the handshake, as far as it has been agreed on.
    pub fn headers(&self) -> Headers {
        self.headers
    }

    /// Appends a question to `output`. To be called when the question before has been answered.
    pub fn ask(&mut self, question: Question, output: &mut BytesMut) -> Result<(), Unaskable> {
        if !matches!(self.stage, Stage::Asking) {
            return Err(Unaskable::OutOfTurn);
        }
        check(&question)?;

        self.stage = match question {
            Question::Enter { export, .. } if !self.fixed => {
                enter_by_name(export, Vec::new(), output)
            }
            _ if !self.fixed => Stage::Known(Box::new(Answer::Declined(no_options()))),
            Question::StartTls => wait(option::STARTTLS, Gathering::StartTls, |option| {
                put_bare(output, option);
            }),
            Question::Agree(headers) => self.agree(headers, output),
            Question::List => wait(option::LIST, Gathering::List(Vec::new()), |option| {
                put_bare(output, option);
            }),
            Question::ListContexts { export, queries } => wait(
                option::LIST_META_CONTEXT,
                Gathering::ListContexts(Vec::new()),
                |option| put_contexts(output, option, &export, &queries),
            ),
            Question::Info { export } => {
                put_export(output, option::INFO, &export);
                let gathering = Gathering::Info(export, Description::default());
                wait(option::INFO, gathering, |_| ())
            }
            Question::Enter { export, contexts } => self.enter(export, contexts, output),
            Question::Abort => wait(option::ABORT, Gathering::Abort, |option| {
                put_bare(output, option);
            }),
        };
        Ok(())
    }

    /// Takes what it understands off the front of `input`, and appends to `output` what has to be
    /// said. Returns an answer as soon as there is one; `None` until more has arrived.
    ///
    /// After a violation nothing more comes of it.
    pub fn advance(
        &mut self,
        input: &mut BytesMut,
        output: &mut BytesMut,
    ) -> Result<Option<Answer>, ServerViolation> {
        let answer = self.step(input, output);
        if answer.is_err() {
            self.stage = Stage::Over;
        }
        answer
    }

    /// What it means that the server has closed the connection now, if that is an answer: the
    /// oldest way of entering an export knows no other no.
    pub fn closed(&self) -> Option<Declined> {
        matches!(self.stage, Stage::EnteringByName(..)).then(|| Declined {
            reason: Reason::Unknown,
            text: "it closed the connection, the only no that it knows".to_owned(),
        })
    }

    fn step(
        &mut self,
        input: &mut BytesMut,
        output: &mut BytesMut,
    ) -> Result<Option<Answer>, ServerViolation> {
        loop {
            match std::mem::replace(&mut self.stage, Stage::Over) {
                Stage::Greeting => return self.greet(input, output),
                Stage::Asking => {
                    self.stage = Stage::Asking;
                    return Ok(None);
                }
                Stage::Known(answer) => {
                    self.stage = Stage::Asking;
                    return Ok(Some(*answer));
                }
                Stage::Waiting(mut waiting) => {
                    let Some(raw) = waiting.decoder.decode(waiting.option, input)? else {
                        self.stage = Stage::Waiting(waiting);
                        return Ok(None);
                    };
                    if let Some(answer) = self.hear(*waiting, &raw, input, output)? {
                        return Ok(Some(answer));
                    }
                }
                Stage::EnteringByName(export, contexts) => {
                    return self.entered_by_name(export, contexts, input);
                }
                Stage::Over => return Ok(None),
            }
        }
    }

    fn greet(
        &mut self,
        input: &mut BytesMut,
        output: &mut BytesMut,
    ) -> Result<Option<Answer>, ServerViolation> {
        // Whoever is no NBD server may not have sixteen bytes to say.
        let mut greeting = &input[..];
        match greeting.try_get_u64() {
            Ok(SERVER_MAGIC) => {}
            Ok(other) => return Err(ServerViolation::NotNbd(other)),
            Err(_) => {
                self.stage = Stage::Greeting;
                return Ok(None);
            }
        }
        match greeting.try_get_u64() {
            Ok(OPTION_MAGIC) => {}
            Ok(OLDSTYLE_MAGIC) => return Err(ServerViolation::Oldstyle),
            Ok(other) => return Err(ServerViolation::UnknownHandshake(other)),
            Err(_) => {
                self.stage = Stage::Greeting;
                return Ok(None);
            }
        }
        let Ok(flags) = greeting.try_get_u16() else {
            self.stage = Stage::Greeting;
            return Ok(None);
        };
        input.advance(GREETING_SIZE);

        // What it offers and we know; the numbers are the same in both directions.
        let agreed = u32::from(flags) & (CLIENT_FIXED_NEWSTYLE | CLIENT_NO_ZEROES);
        self.fixed = agreed & CLIENT_FIXED_NEWSTYLE != 0;
        self.zeroes = agreed & CLIENT_NO_ZEROES == 0;
        output.put_u32(agreed);
        self.stage = Stage::Asking;
        Ok(Some(Answer::Greeting {
            knows_options: self.fixed,
        }))
    }

    /// Takes in one answer to an option; returns the answer to the question once it is complete.
    fn hear(
        &mut self,
        mut waiting: Waiting,
        raw: &RawAnswer,
        input: &BytesMut,
        output: &mut BytesMut,
    ) -> Result<Option<Answer>, ServerViolation> {
        if let Some(declined) = Declined::from_answer(raw) {
            let (stage, answer) = self.declined(waiting.gathering, declined, output);
            self.stage = stage;
            return Ok(answer);
        }
        if raw.kind != answer::ACK {
            waiting.gathering.add(waiting.option, raw)?;
            self.stage = Stage::Waiting(Box::new(waiting));
            return Ok(None);
        }
        if !raw.data.is_empty() {
            return Err(raw.wrong_length());
        }
        let (stage, answer) = self.acknowledged(waiting.gathering, input, output)?;
        self.stage = stage;
        Ok(answer)
    }

    fn acknowledged(
        &mut self,
        gathering: Gathering,
        input: &BytesMut,
        output: &mut BytesMut,
    ) -> Result<(Stage, Option<Answer>), ServerViolation> {
        let answer = match gathering {
            Gathering::StartTls if !input.is_empty() => {
                return Err(ServerViolation::PlaintextAfterStartTls(input.len()));
            }
            Gathering::StartTls => {
                self.headers = Headers::Simple;
                Answer::StartTls
            }
            Gathering::Extended => {
                self.headers = Headers::Extended;
                Answer::Agreed(self.headers)
            }
            Gathering::Structured => {
                self.headers = Headers::Structured;
                Answer::Agreed(self.headers)
            }
            Gathering::List(exports) => Answer::Exports(exports),
            Gathering::ListContexts(names) => Answer::Contexts(names),
            Gathering::SelectContexts {
                export, selected, ..
            } => return Ok((go(export, selected, output), None)),
            Gathering::Info(export, description) => {
                Answer::Info(description.finish(&export, self.headers, 0)?)
            }
            Gathering::Go {
                export,
                contexts,
                description,
            } => {
                let info = description.finish(&export, self.headers, contexts.len())?;
                let session = Session::new(info, self.headers, contexts);
                return Ok((Stage::Over, Some(Answer::Entered(Box::new(session)))));
            }
            Gathering::Abort => return Ok((Stage::Over, Some(Answer::Aborted))),
        };
        Ok((Stage::Asking, Some(answer)))
    }

    /// Falls back to an older way, where there is one.
    fn declined(
        &mut self,
        gathering: Gathering,
        declined: Declined,
        output: &mut BytesMut,
    ) -> (Stage, Option<Answer>) {
        let unsupported = declined.reason == Reason::Unsupported;
        let answer = match gathering {
            Gathering::Extended if !declined.ends_all() => {
                return (self.agree(Headers::Structured, output), None);
            }
            // No is an answer to this question.
            Gathering::Structured if !declined.ends_all() => Answer::Agreed(self.headers),
            Gathering::SelectContexts { export, .. } if unsupported => {
                return (go(export, Vec::new(), output), None);
            }
            // With extended headers there is no other way in.
            Gathering::Go {
                export, contexts, ..
            } if unsupported && self.headers != Headers::Extended => {
                return (enter_by_name(export, contexts, output), None);
            }
            // Whatever it says, we are leaving.
            Gathering::Abort => return (Stage::Over, Some(Answer::Aborted)),
            _ => Answer::Declined(declined),
        };
        (Stage::Asking, Some(answer))
    }

    fn agree(&mut self, headers: Headers, output: &mut BytesMut) -> Stage {
        // What has been agreed on cannot be taken back.
        if headers <= self.headers {
            return Stage::Known(Box::new(Answer::Agreed(self.headers)));
        }
        let (option, gathering) = match headers {
            Headers::Extended => (option::EXTENDED_HEADERS, Gathering::Extended),
            Headers::Structured | Headers::Simple => {
                (option::STRUCTURED_REPLY, Gathering::Structured)
            }
        };
        wait(option, gathering, |option| put_bare(output, option))
    }

    fn enter(&self, export: String, contexts: Vec<String>, output: &mut BytesMut) -> Stage {
        if contexts.is_empty() || !self.headers.has_chunks() {
            return go(export, Vec::new(), output);
        }
        put_contexts(output, option::SET_META_CONTEXT, &export, &contexts);
        let gathering = Gathering::SelectContexts {
            export,
            queries: contexts,
            selected: Vec::new(),
        };
        wait(option::SET_META_CONTEXT, gathering, |_| ())
    }

    fn entered_by_name(
        &mut self,
        export: String,
        contexts: Vec<(ContextId, String)>,
        input: &mut BytesMut,
    ) -> Result<Option<Answer>, ServerViolation> {
        let padding = if self.zeroes { EXPORT_NAME_PADDING } else { 0 };
        if input.len() < EXPORT_NAME_ANSWER_SIZE + padding {
            self.stage = Stage::EnteringByName(export, contexts);
            return Ok(None);
        }
        let (size, flags) = (input.get_u64(), input.get_u16());
        input.advance(padding);
        let told = (size, flags);
        let info = undescribed(&export, told, self.headers, contexts.len())?;
        let session = Session::new(info, self.headers, contexts);
        Ok(Some(Answer::Entered(Box::new(session))))
    }
}

fn go(export: String, contexts: Vec<(ContextId, String)>, output: &mut BytesMut) -> Stage {
    put_export(output, option::GO, &export);
    let gathering = Gathering::Go {
        export,
        contexts,
        description: Description::default(),
    };
    wait(option::GO, gathering, |_| ())
}

fn enter_by_name(
    export: String,
    contexts: Vec<(ContextId, String)>,
    output: &mut BytesMut,
) -> Stage {
    put_export_name(output, option::EXPORT_NAME, &export);
    Stage::EnteringByName(export, contexts)
}

fn wait(option: u32, gathering: Gathering, put: impl FnOnce(u32)) -> Stage {
    put(option);
    Stage::Waiting(Box::new(Waiting {
        option,
        decoder: AnswerDecoder::default(),
        gathering,
    }))
}

fn no_options() -> Declined {
    Declined {
        reason: Reason::Unsupported,
        text: "it speaks newstyle, but not fixed newstyle".to_owned(),
    }
}

const SERVER_MAGIC: u64 = u64::from_be_bytes(*b"NBDMAGIC");
const OLDSTYLE_MAGIC: u64 = 0x0000_4202_8186_1253;

/// Two magics and the flags.
const GREETING_SIZE: usize = 18;
/// Size and flags of an export that was entered the old way, and the zeroes that may follow.
const EXPORT_NAME_ANSWER_SIZE: usize = 10;
const EXPORT_NAME_PADDING: usize = 124;
