//! Why a command did not do what it was asked.

use thiserror::Error;

/// A refusal: a code for scripts, and a message and a hint for people.
#[derive(Clone, Debug, Eq, Error, PartialEq)]
#[error("{message}")]
pub(crate) struct Failure {
    /// A word that scripts can compare.
    pub(crate) code: &'static str,
    /// What is wrong, with the names and numbers.
    pub(crate) message: String,
    /// What to do, where that is not obvious.
    pub(crate) hint: Option<String>,
}

impl Failure {
    /// Without a hint.
    pub(crate) fn new(code: &'static str, message: impl Into<String>) -> Self {
        Self {
            code,
            message: message.into(),
            hint: None,
        }
    }

    /// The same with what to do about it.
    #[must_use]
    pub(crate) fn hint(mut self, hint: impl Into<String>) -> Self {
        self.hint = Some(hint.into());
        self
    }
}
