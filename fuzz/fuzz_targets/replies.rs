//! Any bytes from a server: where the stream is cut makes no difference to what a client reads.
#![no_main]

use bytes::BytesMut;
use libfuzzer_sys::fuzz_target;
use proto::{Chunk, Headers, Reply};

fuzz_target!(|data: &[u8]| {
    for headers in [Headers::Simple, Headers::Structured, Headers::Extended] {
        check(headers, data);
    }
});

fn check(headers: Headers, data: &[u8]) {
    let (replies, wrong) = decode(headers, data.chunks(data.len().max(1)));
    for reply in &replies {
        if let Reply::Chunk {
            chunk: Chunk::BlockStatus { extents, .. },
            ..
        } = reply
        {
            assert!(!extents.is_empty() && extents.iter().all(|extent| extent.length > 0));
        }
    }
    assert_eq!((replies, wrong), decode(headers, data.chunks(1)));
}

fn decode<'a>(
    headers: Headers,
    pieces: impl Iterator<Item = &'a [u8]>,
) -> (Vec<Reply>, Option<String>) {
    let (mut input, mut found) = (BytesMut::new(), Vec::new());
    for piece in pieces {
        input.extend_from_slice(piece);
        loop {
            match Reply::decode(headers, &mut input) {
                Ok(None) => break,
                Ok(Some(reply)) => found.push(reply),
                Err(violation) => return (found, Some(violation.to_string())),
            }
        }
    }
    (found, None)
}
