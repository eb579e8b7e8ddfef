//! Lists from files that anyone can have written: never longer than was agreed.

use std::fmt;
use std::marker::PhantomData;

use serde::de::{Deserialize, Deserializer, Error, SeqAccess, Visitor};

/// Reads a list of at most `most` members, and makes of each what `make` does.
pub(super) fn list<'de, D, T, U>(
    deserializer: D,
    most: usize,
    make: impl FnMut(T) -> Result<U, D::Error>,
) -> Result<Vec<U>, D::Error>
where
    D: Deserializer<'de>,
    T: Deserialize<'de>,
{
    let members = PhantomData;
    deserializer.deserialize_seq(List {
        most,
        make,
        members,
    })
}

struct List<T, F> {
    most: usize,
    make: F,
    members: PhantomData<T>,
}

impl<'de, T, U, E, F> Visitor<'de> for List<T, F>
where
    T: Deserialize<'de>,
    F: FnMut(T) -> Result<U, E>,
    E: fmt::Display,
{
    type Value = Vec<U>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "a list of at most {}", self.most)
    }

    fn visit_seq<A: SeqAccess<'de>>(mut self, mut members: A) -> Result<Vec<U>, A::Error> {
        let mut list = Vec::new();
        while let Some(member) = members.next_element()? {
            if list.len() == self.most {
                return Err(A::Error::invalid_length(self.most + 1, &self));
            }
            list.push((self.make)(member).map_err(A::Error::custom)?);
        }
        Ok(list)
    }
}
