//! What stands in the `arguments` of a command, taken out one by one.

use serde_json::{Map, Value};

use super::request::Refusal;
use crate::failure::Failure;
use crate::names::Name;

/// What has not been looked at of a command's arguments, or of an object among them.
pub(super) struct Arguments {
    members: Map<String, Value>,
    /// Where it stands, as QEMU writes it before the name of a member.
    path: String,
}

impl Arguments {
    /// The members of an object, whose names stand after `path`.
    pub(super) fn nested(members: Map<String, Value>, path: String) -> Self {
        Self { members, path }
    }

    pub(super) fn text(&mut self, key: &str) -> Result<Option<String>, Refusal> {
        match self.members.remove(key) {
            None | Some(Value::Null) => Ok(None),
            Some(Value::String(text)) => Ok(Some(text)),
            Some(_) => Err(self.wrong_type(key, "string")),
        }
    }

    pub(super) fn required_text(&mut self, key: &str) -> Result<String, Refusal> {
        self.text(key)?.ok_or_else(|| self.missing(key))
    }

    pub(super) fn texts(&mut self, key: &str) -> Result<Option<Vec<String>>, Refusal> {
        let Some(members) = self.array(key)? else {
            return Ok(None);
        };
        let text = |(member, _): (Value, String)| match member {
            Value::String(text) => Ok(text),
            _ => Err(self.wrong_type(key, "array of strings")),
        };
        members
            .into_iter()
            .map(text)
            .collect::<Result<_, _>>()
            .map(Some)
    }

    /// A number from 0 to `most`, of which QEMU says how many bits it has.
    pub(super) fn number(&mut self, key: &str, most: u64) -> Result<Option<u64>, Refusal> {
        let number = match self.members.remove(key) {
            None | Some(Value::Null) => return Ok(None),
            Some(Value::Number(number)) if !number.is_f64() => number,
            Some(_) => {
                let key = format!("{}{key}", self.path);
                return Err(bad_argument(format!("Parameter '{key}' expects uint64")));
            }
        };
        let number = number.as_u64().filter(|number| *number <= most);
        if number.is_none() {
            let bits = u64::BITS - most.leading_zeros();
            return Err(bad_argument(format!(
                "Parameter '{key}' expects uint{bits}_t"
            )));
        }
        Ok(number)
    }

    /// The members of a list, each with the path of its own members.
    fn array(&mut self, key: &str) -> Result<Option<Vec<(Value, String)>>, Refusal> {
        let members = match self.members.remove(key) {
            None | Some(Value::Null) => return Ok(None),
            Some(Value::Array(members)) => members,
            Some(_) => return Err(self.wrong_type(key, "array")),
        };
        let path = |number| format!("{}{key}[{number}].", self.path);
        let members = members.into_iter().zip(0..);
        Ok(Some(members.map(|(m, number)| (m, path(number))).collect()))
    }

    pub(super) fn required_number(&mut self, key: &str, most: u64) -> Result<u64, Refusal> {
        self.number(key, most)?.ok_or_else(|| self.missing(key))
    }

    pub(super) fn required_array(&mut self, key: &str) -> Result<Vec<(Value, String)>, Refusal> {
        self.array(key)?.ok_or_else(|| self.missing(key))
    }

    pub(super) fn required_objects(&mut self, key: &str) -> Result<Vec<Self>, Refusal> {
        let members = self.required_array(key)?.into_iter();
        let object = |(member, path): (Value, String)| {
            let Value::Object(members) = member else {
                let name = path.trim_end_matches('.');
                return Err(bad_argument(format!(
                    "Invalid parameter type for '{name}', expected: object"
                )));
            };
            Ok(Self::nested(members, path))
        };
        members.map(object).collect()
    }

    pub(super) fn object(&mut self, key: &str) -> Result<Option<Self>, Refusal> {
        match self.members.remove(key) {
            None => Ok(None),
            Some(Value::Object(members)) => {
                let path = format!("{}{key}.", self.path);
                Ok(Some(Self::nested(members, path)))
            }
            Some(_) => Err(self.wrong_type(key, "object")),
        }
    }

    pub(super) fn required_object(&mut self, key: &str) -> Result<Self, Refusal> {
        self.object(key)?.ok_or_else(|| self.missing(key))
    }

    fn missing(&self, key: &str) -> Refusal {
        bad_argument(format!("Parameter '{}{key}' is missing", self.path))
    }

    fn wrong_type(&self, key: &str, expected: &str) -> Refusal {
        let path = &self.path;
        bad_argument(format!(
            "Invalid parameter type for '{path}{key}', expected: {expected}"
        ))
    }

    pub(super) fn name(&mut self, key: &str) -> Result<Option<Name>, Refusal> {
        self.text(key)?.as_deref().map(parse_name).transpose()
    }

    pub(super) fn required_name(&mut self, key: &str) -> Result<Name, Refusal> {
        self.name(key)?.ok_or_else(|| self.missing(key))
    }

    pub(super) fn names(&mut self, key: &str) -> Result<Option<Vec<Name>>, Refusal> {
        let Some(texts) = self.texts(key)? else {
            return Ok(None);
        };
        let names = texts.iter().map(|text| parse_name(text));
        names.collect::<Result<_, _>>().map(Some)
    }

    pub(super) fn flag(&mut self, key: &str) -> Result<bool, Refusal> {
        match self.members.remove(key) {
            None | Some(Value::Null) => Ok(false),
            Some(Value::Bool(flag)) => Ok(flag),
            Some(_) => Err(self.wrong_type(key, "boolean")),
        }
    }

    /// Clients may name the capabilities that they want, of which there are none.
    pub(super) fn no_capability(&mut self) -> Result<(), Refusal> {
        match self.members.remove("enable") {
            None => Ok(()),
            Some(Value::Array(wanted)) => match wanted.first() {
                None => Ok(()),
                Some(capability) => {
                    let capability = shortened(capability.as_str().unwrap_or_default());
                    Err(bad_argument(format!(
                        "Capability '{capability}' is not available"
                    )))
                }
            },
            Some(_) => Err(self.wrong_type("enable", "array")),
        }
    }

    pub(super) fn finish(self) -> Result<(), Refusal> {
        match self.members.keys().next() {
            None => Ok(()),
            Some(key) => {
                let (path, key) = (&self.path, shortened(key));
                Err(bad_argument(format!(
                    "Parameter '{path}{key}' is unexpected"
                )))
            }
        }
    }
}

fn parse_name(text: &str) -> Result<Name, Refusal> {
    Name::parse(text)
        .map_err(|error| Refusal::Failure(Failure::new("invalid-name", error.to_string())))
}

pub(super) fn bad_argument(reason: impl Into<String>) -> Refusal {
    Refusal::Failure(Failure::new("bad-argument", reason))
}

pub(super) fn bad_request(reason: impl Into<String>) -> Refusal {
    Refusal::Failure(Failure::new("bad-request", reason))
}

/// Enough of what a client said to know it again.
pub(super) fn shortened(text: &str) -> String {
    text.chars().take(80).collect()
}
