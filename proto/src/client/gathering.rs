//! Answers to one option, collected until the last.

use super::answer::{RawAnswer, context, listed};
use super::description::Description;
use super::violation::ServerViolation;
use crate::export::Listed;
use crate::extents::ContextId;
use crate::option::QUERIES_MAX;
use crate::wire::answer;

/// What answers are about, and what they have told so far.
#[derive(Debug)]
pub(crate) enum Gathering {
    StartTls,
    Extended,
    Structured,
    List(Vec<Listed>),
    ListContexts(Vec<String>),
    SelectContexts {
        export: String,
        queries: Vec<String>,
        selected: Vec<(ContextId, String)>,
    },
    Info(String, Description),
    Go {
        export: String,
        contexts: Vec<(ContextId, String)>,
        description: Description,
    },
    Abort,
}

impl Gathering {
    /// Takes in an answer that is not the last.
    pub(crate) fn add(&mut self, option: u32, raw: &RawAnswer) -> Result<(), ServerViolation> {
        match (self, raw.kind) {
            (Self::List(exports), answer::SERVER) => exports.push(listed(raw)?),
            (Self::ListContexts(names), answer::META_CONTEXT) => names.push(context(raw)?.1),
            (
                Self::SelectContexts {
                    queries, selected, ..
                },
                answer::META_CONTEXT,
            ) => select(queries, selected, context(raw)?)?,
            (Self::Info(_, description) | Self::Go { description, .. }, answer::INFO) => {
                description.add(raw)?;
            }
            (_, kind) => return Err(ServerViolation::AnswerKind { option, kind }),
        }
        Ok(())
    }
}

/// Takes a context for selected, if it was asked for, and neither it nor its id has come before.
fn select(
    queries: &[String],
    selected: &mut Vec<(ContextId, String)>,
    (id, name): (ContextId, String),
) -> Result<(), ServerViolation> {
    // Some servers take the beginning of a name for all that begins like it.
    let asked = queries
        .iter()
        .any(|query| *query == name || query.ends_with(':') && name.starts_with(query.as_str()));
    if !asked {
        return Err(ServerViolation::ContextNotAsked(name));
    }
    if selected.iter().any(|(other, _)| *other == id) {
        return Err(ServerViolation::ContextIdTwice(id));
    }
    if selected.iter().any(|(_, other)| *other == name) {
        return Err(ServerViolation::ContextTwice(name));
    }
    if selected.len() >= QUERIES_MAX as usize {
        return Err(ServerViolation::TooManyAnswers(QUERIES_MAX));
    }
    selected.push((id, name));
    Ok(())
}
