//! Any bytes from a client that has entered an export: where the stream is cut makes no difference,
//! what was found is what was sent, and what is admitted is legal.
#![no_main]

use bytes::BytesMut;
use libfuzzer_sys::fuzz_target;
use proto::{
    Admission, BlockSize, Command, ExportInfo, Incoming, PAYLOAD_MAX, Request, RequestDecoder,
    TransmissionFlags,
};

const SIZE: u64 = 1 << 20;

fuzz_target!(|data: &[u8]| {
    let (requests, wrong) = decode(data.chunks(data.len().max(1)));
    assert_eq!((requests.clone(), wrong), decode(data.chunks(1)));

    let mut again = BytesMut::new();
    for request in &requests {
        request.encode(&mut again);
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
        true,
        true,
    );
    for request in requests {
        let asked = request.offset..request.offset.saturating_add(request.length);
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
                | Command::Cache { range }
                | Command::BlockStatus { range, .. },
            ) => range,
            Ok(Command::Flush) | Err(_) => continue,
        };
        assert_eq!(range, asked);
        assert!(range.end <= SIZE, "{range:?}");
    }
});

/// The requests up to the end, to a violation or to a farewell; and the violation.
fn decode<'a>(pieces: impl Iterator<Item = &'a [u8]>) -> (Vec<Request>, Option<String>) {
    let mut decoder = RequestDecoder::default();
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
