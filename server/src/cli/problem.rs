//! How a command says that it failed.

use std::error::Error;
use std::fmt::Write as _;
use std::io::Write;
use std::process::ExitCode;

use clap::error::ErrorKind;
use serde::Serialize;

use crate::archive::ArchiveError;
use crate::control::messages::Fault;
use crate::failure::Failure;

/// Exit codes.
pub(super) mod exit {
    /// It failed.
    pub(crate) const FAILED: u8 = 1;
    /// The command line is wrong.
    pub(crate) const USAGE: u8 = 2;
    /// Done, but a disk for which an incremental was asked came out full.
    pub(crate) const FULL: u8 = 3;
    /// The backup is broken; its base is intact, unless the hint says otherwise.
    pub(crate) const BROKEN: u8 = 4;
    /// What is stored is not what it should be.
    pub(crate) const DAMAGED: u8 = 5;
}

/// Why a command failed, for whoever typed it.
#[derive(Debug)]
pub(super) struct Problem {
    fault: Report,
    exit: u8,
}

#[derive(Debug, Serialize)]
struct Report {
    code: String,
    message: String,
    hint: Option<String>,
}

#[derive(Serialize)]
struct Envelope<'a> {
    error: &'a Report,
}

impl Problem {
    /// Something failed.
    pub(super) fn new(code: impl Into<String>, message: impl Into<String>) -> Self {
        let fault = Report {
            code: code.into(),
            message: message.into(),
            hint: None,
        };
        let exit = match fault.code.as_str() {
            "backup-broken" => exit::BROKEN,
            "verification-failed" => exit::DAMAGED,
            _ => exit::FAILED,
        };
        Self { fault, exit }
    }

    /// The command line is wrong.
    pub(super) fn usage(message: impl Into<String>) -> Self {
        Self {
            exit: exit::USAGE,
            ..Self::new("usage", message)
        }
    }

    /// The same for what the parser found, in one line.
    /// `command` is what was typed of commands, as far as it is one.
    pub(super) fn usage_from(error: &clap::Error, command: &str) -> Self {
        let help = format!("see: {command} --help");
        if let ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand | ErrorKind::MissingSubcommand =
            error.kind()
        {
            return Self::usage(format!("a command is missing behind '{command}'")).hint(help);
        }
        let text = error.render().to_string();
        let mut paragraphs = text.split("\n\n").map(|paragraph| {
            let words: Vec<_> = paragraph.split_whitespace().collect();
            words.join(" ")
        });
        let first = paragraphs.next().unwrap_or_default();
        let message = first.strip_prefix("error: ").unwrap_or(&first);
        let tip = paragraphs.find_map(|p| p.strip_prefix("tip: ").map(str::to_owned));
        // What begins with a dash is hardly ever meant as a value.
        let tip = tip.filter(|tip| !tip.contains("use '-- "));
        Self::usage(message).hint(tip.unwrap_or(help))
    }

    /// The backup is lost.
    pub(super) fn broken(message: impl Into<String>) -> Self {
        Self::new("backup-broken", message)
    }

    /// With what to do about it.
    pub(super) fn hint(mut self, hint: impl Into<String>) -> Self {
        self.fault.hint = Some(hint.into());
        self
    }

    /// The word that scripts compare.
    pub(super) fn code(&self) -> &str {
        &self.fault.code
    }

    /// What went wrong.
    pub(super) fn message(&self) -> &str {
        &self.fault.message
    }

    /// Prints it, as what came of `what`, and says how to exit.
    pub(super) fn report(&self, what: &str, is_json: bool) -> ExitCode {
        let Report { message, hint, .. } = &self.fault;
        // When even this cannot be printed, the exit code still says it.
        let _ = if is_json {
            let envelope = Envelope { error: &self.fault };
            let text = serde_json::to_string(&envelope).expect("texts can be JSON");
            writeln!(std::io::stdout(), "{text}")
        } else {
            let hint = hint.as_ref().map(|hint| format!("\nhint: {hint}"));
            let hint = hint.unwrap_or_default();
            writeln!(
                std::io::stderr(),
                "stillpoint: error: {what}: {message}{hint}"
            )
        };
        ExitCode::from(self.exit)
    }
}

impl From<Failure> for Problem {
    fn from(failure: Failure) -> Self {
        let mut problem = Self::new(failure.code, failure.message);
        problem.fault.hint = failure.hint;
        problem
    }
}

impl From<ArchiveError> for Problem {
    fn from(error: ArchiveError) -> Self {
        let mut problem = Self::new(error.code(), error_chain(&error));
        problem.fault.hint = error.hint().map(Into::into);
        if error.is_damage() {
            problem.exit = exit::DAMAGED;
        }
        problem
    }
}

impl From<Fault> for Problem {
    fn from(fault: Fault) -> Self {
        let mut problem = Self::new(fault.code, fault.desc);
        problem.fault.hint = fault.hint;
        problem
    }
}

/// An error with all its causes, which its own text leaves out.
pub(super) fn error_chain(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let _ = write!(text, ": {error}");
        cause = error.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exit_codes_tell_apart_who_has_to_do_something() {
        assert_eq!(Problem::new("unknown-disk", "").exit, 1);
        assert_eq!(Problem::usage("").exit, 2);
        assert_eq!(Problem::from(Failure::new("backup-broken", "")).exit, 4);
    }
}
