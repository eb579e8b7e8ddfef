//! Any bytes from a client that has entered an export: where the stream is cut makes no difference,
//! what was found is what was sent, and what is admitted is legal.
#![no_main]

use std::collections::HashSet;

use bytes::BytesMut;
use libfuzzer_sys::fuzz_target;
use proto::command::{BLOCK_STATUS, PAYLOAD_LENGTH, WRITE};
use proto::{
    Admission, BlockSize, Command, ContextFilter, ContextId, ExportInfo, Headers, Incoming,
    PAYLOAD_MAX, Request, RequestDecoder, TransmissionFlags,
};

const SIZE: u64 = 1 << 20;
const CONTEXTS: [ContextId; 3] = [ContextId(1), ContextId(2), ContextId(3)];

fuzz_target!(|data: &[u8]| {
    for headers in [Headers::Structured, Headers::Extended] {
        check(headers, data);
    }
});

fn check(headers: Headers, data: &[u8]) {
    let (requests, wrong) = decode(headers, data.chunks(data.len().max(1)));
    assert_eq!((requests.clone(), wrong), decode(headers, data.chunks(1)));

    let mut again = BytesMut::new();
    for request in &requests {
        request.encode(headers, &mut again);
        if is_skipped(headers, request) {
            // What was not kept cannot be sent again.
            again.extend_from_slice(&data[again.len()..][..request.length as usize]);
        }
    }
    assert!(data.starts_with(&again), "{requests:?}");
    let all = TransmissionFlags::from_bits(u16::MAX).without(TransmissionFlags::READ_ONLY);
    let admission = Admission::new(
        &ExportInfo {
            name: String::new(),
            description: None,
            size: SIZE,
            flags: all,
            block_size: BlockSize::default(),
        },
        headers,
        CONTEXTS.to_vec(),
    );
    for request in requests {
        let length = match ContextFilter::decode(request.data.clone()) {
            Some(filter) if request.kind == BLOCK_STATUS && !request.data.is_empty() => {
                filter.length
            }
            _ => request.length,
        };
        let asked = request.offset..request.offset.saturating_add(length);
        let range = match admission.admit(request) {
            Ok(Command::Read { range, .. }) => {
                assert!(range.end - range.start <= PAYLOAD_MAX);
                range
            }
            Ok(Command::Write { range, data, .. }) => {
                assert_eq!(range.end - range.start, data.len() as u64);
                range
            }
            Ok(
                Command::Trim { range, .. }
                | Command::WriteZeroes { range, .. }
                | Command::Cache { range },
            ) => range,
            Ok(Command::BlockStatus {
                range, contexts, ..
            }) => {
                let different: HashSet<_> = contexts.iter().collect();
                assert!(!contexts.is_empty() && different.len() == contexts.len());
                assert!(contexts.iter().all(|id| CONTEXTS.contains(id)));
                range
            }
            Ok(Command::Flush) | Err(_) => continue,
        };
        assert_eq!(range, asked);
        assert!(range.end <= SIZE, "{range:?}");
    }
}

fn is_skipped(headers: Headers, request: &Request) -> bool {
    let has_payload = match headers {
        Headers::Extended => request.kind == WRITE || request.flags & PAYLOAD_LENGTH != 0,
        Headers::Simple | Headers::Structured => request.kind == WRITE,
    };
    has_payload && request.data.is_empty()
}

/// The requests up to the end, to a violation or to a farewell; and the violation.
fn decode<'a>(
    headers: Headers,
    pieces: impl Iterator<Item = &'a [u8]>,
) -> (Vec<Request>, Option<String>) {
    let mut decoder = RequestDecoder::new(headers);
    let (mut input, mut found) = (BytesMut::new(), Vec::new());
    for piece in pieces {
        input.extend_from_slice(piece);
        loop {
            match decoder.decode(&mut input) {
                Ok(None) => break,
                Ok(Some(Incoming::Request(request))) => found.push(request),
                Ok(Some(Incoming::Disconnect)) => return (found, None),
                Err(violation) => return (found, Some(violation.to_string())),
            }
        }
    }
    (found, None)
}
