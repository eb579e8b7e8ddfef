//! What must hold of any bytes on the control socket, for fuzzing.

use super::decoder::{Decoder, Malformed};
use super::request::Request;

/// Takes `bytes` for what a client sends: where the stream is cut makes no difference, and every
/// value in it is a command or has an answer.
///
/// # Panics
///
/// If that is not so.
pub fn control(bytes: &[u8]) {
    let found = decode(bytes.chunks(bytes.len().max(1)));
    assert_eq!(found, decode(bytes.chunks(1)));
    for value in found.into_iter().flatten() {
        let Request { id, command } = Request::parse(&value);
        if let Err(refusal) = command {
            let answer = serde_json::to_vec(&refusal.reply(id)).expect("it is JSON");
            let answer: serde_json::Value = serde_json::from_slice(&answer).expect("it is JSON");
            assert!(answer["error"]["desc"].is_string(), "{answer}");
        }
    }
}

fn decode<'a>(pieces: impl Iterator<Item = &'a [u8]>) -> Vec<Result<Vec<u8>, Malformed>> {
    let (mut decoder, mut found) = (Decoder::default(), Vec::new());
    for mut piece in pieces {
        while let Some(next) = decoder.next(&mut piece) {
            found.push(next);
        }
    }
    found
}
