//! JSON documents that say themselves whether they are whole.
//!
//! The last member is `"blake3"`: the hash of every byte before its comma. So what is added to a
//! document, in whatever version, is covered, and it can be checked with `head` and `b3sum`.

use std::io::Read;

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use super::digest::Digest;

/// What is wrong with a document.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(super) enum Unsound {
    /// It is not what was written.
    Damaged(String),
    /// It is whole, and of this newer version.
    Newer(u64),
}

/// Writes a document.
pub(super) fn seal(document: &impl Serialize) -> Vec<u8> {
    let mut text = serde_json::to_vec(document).expect("texts, numbers and lists can be JSON");
    assert_eq!(text.pop(), Some(b'}'), "a document is an object");
    let hash = Digest::of(&text);
    text.extend(format!("{BEFORE}{hash}{AFTER}").bytes());
    text
}

/// Reads a document of a version that is known here.
pub(super) fn unseal<T: DeserializeOwned>(text: &[u8], version: u64) -> Result<T, Unsound> {
    let damaged = |reason: &str| Unsound::Damaged(reason.to_owned());
    let body_length = text.len().checked_sub(SEAL);
    let (body, seal) = body_length
        .and_then(|length| text.split_at_checked(length))
        .ok_or_else(|| damaged("it is too short"))?;
    if seal != format!("{BEFORE}{}{AFTER}", Digest::of(body)).as_bytes() {
        return Err(damaged("its hash is not that of its contents"));
    }
    let malformed = |error: serde_json::Error| damaged(&error.to_string());
    let found: Version = serde_json::from_slice(text).map_err(malformed)?;
    if found.version > version {
        return Err(Unsound::Newer(found.version));
    }
    serde_json::from_slice(text).map_err(malformed)
}

/// Reads at most `most` bytes; `None` if there are more.
pub(super) fn read_at_most(file: impl Read, most: u64) -> std::io::Result<Option<Vec<u8>>> {
    let mut text = Vec::new();
    file.take(most + 1).read_to_end(&mut text)?;
    Ok(Some(text).filter(|text| text.len() as u64 <= most))
}

/// All that is asked of a document before its version is known.
#[derive(Deserialize)]
struct Version {
    version: u64,
}

const BEFORE: &str = ",\"blake3\":\"";
const AFTER: &str = "\"}\n";
const SEAL: usize = BEFORE.len() + 2 * blake3::OUT_LEN + AFTER.len();

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    #[test]
    fn every_flipped_bit_is_damage() {
        let sealed = seal(&json!({"version": 1, "what": "a text"}));
        assert!(unseal::<Value>(&sealed, 1).is_ok());
        for bit in 0..sealed.len() * 8 {
            let mut flipped = sealed.clone();
            flipped[bit / 8] ^= 1 << (bit % 8);
            let found = unseal::<Value>(&flipped, 1);
            assert!(matches!(found, Err(Unsound::Damaged(_))), "bit {bit}");
        }
        for length in 0..sealed.len() {
            let found = unseal::<Value>(&sealed[..length], 1);
            assert!(matches!(found, Err(Unsound::Damaged(_))), "{length}");
        }
    }

    #[test]
    fn a_newer_version_is_told_by_its_number() {
        let sealed = seal(&json!({"version": 7, "disks": "by other rules"}));
        assert_eq!(unseal::<Value>(&sealed, 1), Err(Unsound::Newer(7)));
        let sealed = seal(&json!({"version": "x"}));
        assert!(matches!(
            unseal::<Value>(&sealed, 1),
            Err(Unsound::Damaged(_))
        ));
    }
}
