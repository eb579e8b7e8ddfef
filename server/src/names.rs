//! What disks, checkpoints and backups may be called.

use std::borrow::Borrow;
use std::fmt;

use serde::{Deserialize, Serialize};
use thiserror::Error;

/// The name of a disk, checkpoint, backup or consumer.
///
/// 1 to 64 of `A-Z a-z 0-9 _ . -`, first a letter or a digit, without `..` and without a dot at the
/// end: so a name is a file name, a part of an export name, and never two of them.
#[derive(Clone, Debug, Eq, Hash, Ord, PartialEq, PartialOrd, Serialize)]
#[serde(transparent)]
pub(crate) struct Name(String);

/// A text that is no name.
#[derive(Clone, Debug, Eq, Error, PartialEq)]
#[error("the name '{text}' {rule}")]
pub(crate) struct NameError {
    text: String,
    rule: &'static str,
}

impl Name {
    /// Refuses what the rules forbid, and says which of them.
    pub(crate) fn parse(text: &str) -> Result<Self, NameError> {
        let wrong = |rule| {
            Err(NameError {
                text: text.chars().take(80).collect(),
                rule,
            })
        };
        if text.is_empty() || text.len() > NAME_MAX {
            return wrong("is not 1 to 64 characters long");
        }
        if !text
            .bytes()
            .all(|byte| byte.is_ascii_alphanumeric() || b"_.-".contains(&byte))
        {
            return wrong("has a character other than A-Z a-z 0-9 _ . -");
        }
        if !text.as_bytes()[0].is_ascii_alphanumeric() {
            return wrong("does not begin with a letter or a digit");
        }
        if text.contains("..") {
            return wrong("has two dots in a row");
        }
        if text.ends_with('.') {
            return wrong("ends with a dot");
        }
        if RESERVED.contains(&text) {
            return wrong("is a reserved word");
        }
        Ok(Self(text.to_owned()))
    }

    /// The name as text.
    pub(crate) fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl Borrow<str> for Name {
    fn borrow(&self) -> &str {
        &self.0
    }
}

impl std::str::FromStr for Name {
    type Err = NameError;

    fn from_str(text: &str) -> Result<Self, NameError> {
        Self::parse(text)
    }
}

impl<'de> Deserialize<'de> for Name {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        Self::parse(&text).map_err(serde::de::Error::custom)
    }
}

/// Long enough for a host, a purpose and a time; short enough for a file name with an ending.
pub(crate) const NAME_MAX: usize = 64;

/// Words that mean something where a name may stand.
const RESERVED: [&str; 4] = ["last", "latest", "auto", "none"];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_what_file_names_and_export_names_have_in_common() {
        for good in ["vda", "0", "a.b-c_d", "CP1", &"x".repeat(64)] {
            assert_eq!(Name::parse(good).unwrap().as_str(), good);
        }
        let long = "x".repeat(65);
        for bad in [
            "", &long, "a/b", "a..b", "a.", ".a", "-a", "é", "a b", "last", "none", "a@b",
        ] {
            assert!(Name::parse(bad).is_err(), "{bad:?}");
        }
    }
}
