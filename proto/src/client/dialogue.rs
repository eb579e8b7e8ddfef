//! What a client and a server say to each other before an export is entered.

use thiserror::Error;

use super::answer::Declined;
use super::question::is_string;
use super::session::Session;
use crate::export::{ExportInfo, Listed};
use crate::headers::Headers;
use crate::option::QUERIES_MAX;

/// What a server can be asked before an export has been entered.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum Question {
    /// May we go on with TLS? If so, all that was agreed on before is forgotten.
    StartTls,
    /// Which form can requests and replies have, this one or an older one?
    Agree(Headers),
    /// Which exports are there?
    List,
    /// Which metadata contexts has an export?
    ListContexts {
        /// Its name.
        export: String,
        /// Full names, or the beginnings of some up to a colon; none asks for all.
        queries: Vec<String>,
    },
    /// What is an export like?
    Info {
        /// Its name.
        export: String,
    },
    /// Let us in.
    Enter {
        /// The export's name.
        export: String,
        /// The full names of the contexts to select. Without structured replies there are none.
        contexts: Vec<String>,
    },
    /// Goodbye.
    Abort,
}

/// What a server says.
#[derive(Debug)]
pub enum Answer {
    /// It is an NBD server. The first answer, without a question.
    Greeting {
        /// Whether anything but [`Question::Enter`] makes sense.
        knows_options: bool,
    },
    /// Now the TLS handshake. Everything from now on, in both directions, goes through it.
    StartTls,
    /// Requests and replies have this form.
    Agreed(Headers),
    /// These are its exports.
    Exports(Vec<Listed>),
    /// These are its contexts.
    Contexts(Vec<String>),
    /// This is the export.
    Info(ExportInfo),
    /// The export has been entered; what follows are replies.
    Entered(Box<Session>),
    /// It has let us go.
    Aborted,
    /// It does not do what was asked. Something else can be.
    Declined(Declined),
}

/// A question that cannot be put.
#[derive(Clone, Copy, Debug, Eq, Error, PartialEq)]
pub enum Unaskable {
    /// The one before has not been answered, or there is nobody left to answer.
    #[error("this is not the time for questions")]
    OutOfTurn,
    /// The name of an export or of a context is too long, or has a NUL.
    #[error("a name has a NUL or exceeds 4096 bytes")]
    Name,
    /// More contexts than any server answers about.
    #[error("more than {QUERIES_MAX} contexts")]
    TooManyContexts,
}

/// Whether a question can be put at all.
pub(crate) fn check(question: &Question) -> Result<(), Unaskable> {
    let none = &Vec::new();
    let (export, contexts) = match question {
        Question::ListContexts { export, queries } => (export, queries),
        Question::Enter { export, contexts } => (export, contexts),
        Question::Info { export } => (export, none),
        _ => return Ok(()),
    };
    if contexts.len() > QUERIES_MAX as usize {
        return Err(Unaskable::TooManyContexts);
    }
    if !is_string(export) || !contexts.iter().all(|context| is_string(context)) {
        return Err(Unaskable::Name);
    }
    Ok(())
}
