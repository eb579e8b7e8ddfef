use bytes::{BufMut, Bytes, BytesMut};

use super::{Cookie, HEADER_SIZE, Incoming, PAYLOAD_MAX, PAYLOAD_SKIPPED_MAX, Request};
use super::{FILTER_MAX, Headers, RequestDecoder, Violation};
use crate::command::{BLOCK_STATUS, DISCONNECT, FUA, PAYLOAD_LENGTH, READ, WRITE};

#[test]
fn requests_survive_the_wire_however_it_cuts_them() {
    let requests = [
        request(READ, 4096, b""),
        request(WRITE, 5, b"hello"),
        request(WRITE, 0, b""),
        request(77, 1 << 31, b""),
    ];
    check_survival(Headers::Simple, &requests);
}

#[test]
fn extended_requests_have_a_payload_if_they_say_so_and_writes_always() {
    let requests = [
        request(READ, 1 << 40, b""),
        announced(WRITE, b"hello"),
        announced(WRITE, b""),
        request(WRITE, 5, b"hello"),
        announced(BLOCK_STATUS, b"\0\0\0\0\0\0\x10\0\0\0\0\x01"),
        request(BLOCK_STATUS, u64::MAX, b""),
        request(77, 1 << 31, b""),
    ];
    check_survival(Headers::Extended, &requests);
}

#[test]
fn an_extended_request_is_32_bytes_and_its_payload() {
    let mut wire = BytesMut::new();
    announced(WRITE, b"hello").encode(Headers::Extended, &mut wire);
    let expected = b"\x21\xe4\x1c\x71\0\x21\0\x01\0\0\0\0\0\0\0\x07\
        \0\0\x01\0\0\0\0\0\0\0\0\0\0\0\0\x05hello";
    assert_eq!(&wire[..], expected);
}

#[test]
fn a_payload_that_no_command_can_use_is_skipped_without_being_kept() {
    for (kind, length) in [(READ, 5), (77, PAYLOAD_MAX), (BLOCK_STATUS, FILTER_MAX + 1)] {
        let mut decoder = RequestDecoder::new(Headers::Extended);
        let mut input = BytesMut::new();
        let unwanted = Request {
            length,
            ..announced(kind, b"")
        };
        unwanted.encode(Headers::Extended, &mut input);
        for _ in 0..length - 1 {
            assert_eq!(decoder.decode(&mut input), Ok(None));
            assert!(input.is_empty());
            input.put_u8(7);
        }
        input.put_u8(7);
        let found = decoder.decode(&mut input);
        assert_eq!(found, Ok(Some(Incoming::Request(unwanted))), "{kind}");

        request(READ, 1, b"").encode(Headers::Extended, &mut input);
        let next = Incoming::Request(request(READ, 1, b""));
        assert_eq!(decoder.decode(&mut input), Ok(Some(next)));
    }
}

#[test]
fn a_payload_that_is_not_wanted_any_more_is_not_kept_either() {
    let mut decoder = RequestDecoder::new(Headers::Simple);
    let mut input = BytesMut::new();
    request(WRITE, 5, b"he").encode(Headers::Simple, &mut input);
    assert_eq!(decoder.decode(&mut input), Ok(None));
    assert_eq!(decoder.payload(), 5);
    decoder.skip_payload();
    assert_eq!(decoder.payload(), 0);
    assert_eq!(decoder.decode(&mut input), Ok(None));
    assert!(input.is_empty() && decoder.is_within());
    input.put_slice(b"llo");
    let skipped = request(WRITE, 5, b"");
    let found = decoder.decode(&mut input);
    assert_eq!(found, Ok(Some(Incoming::Request(skipped))));
    assert!(input.is_empty() && !decoder.is_within());
}

#[test]
fn an_extended_payload_beyond_the_maximum_ends_the_connection() {
    for kind in [READ, WRITE, BLOCK_STATUS, 77] {
        for length in [PAYLOAD_MAX + 1, u64::MAX] {
            let absurd = Request {
                length,
                ..announced(kind, b"")
            };
            let mut input = BytesMut::new();
            absurd.encode(Headers::Extended, &mut input);
            assert_eq!(
                RequestDecoder::new(Headers::Extended).decode(&mut input),
                Err(Violation::PayloadLength(length))
            );
        }
    }
}

#[test]
fn a_request_in_the_other_form_ends_the_connection() {
    for (sent, agreed) in [
        (Headers::Structured, Headers::Extended),
        (Headers::Extended, Headers::Structured),
    ] {
        let mut input = BytesMut::new();
        request(READ, 1, b"").encode(sent, &mut input);
        input.put_bytes(0, 8);
        assert!(matches!(
            RequestDecoder::new(agreed).decode(&mut input),
            Err(Violation::RequestMagic(_))
        ));
    }
}

#[test]
fn a_payload_is_a_slice_of_what_was_received() {
    let mut input = BytesMut::new();
    request(WRITE, 5, b"hello").encode(Headers::Simple, &mut input);
    let payload_at = input[HEADER_SIZE..].as_ptr();
    let Some(Incoming::Request(request)) = RequestDecoder::default().decode(&mut input).unwrap()
    else {
        panic!("expected a request");
    };
    assert_eq!(request.data.as_ptr(), payload_at);
}

#[test]
fn an_overlong_payload_is_skipped_without_being_kept() {
    let mut decoder = RequestDecoder::default();
    let mut input = BytesMut::new();
    request(WRITE, PAYLOAD_MAX + 1, b"").encode(Headers::Simple, &mut input);
    let piece = vec![0; 1 << 20];
    for _ in 0..PAYLOAD_MAX / (1 << 20) {
        input.put_slice(&piece);
        assert_eq!(decoder.decode(&mut input), Ok(None));
        assert!(input.is_empty());
    }
    input.put_u8(0);
    let refused = request(WRITE, PAYLOAD_MAX + 1, b"");
    assert_eq!(
        decoder.decode(&mut input),
        Ok(Some(Incoming::Request(refused)))
    );

    request(READ, 1, b"").encode(Headers::Simple, &mut input);
    let next = Incoming::Request(request(READ, 1, b""));
    assert_eq!(decoder.decode(&mut input), Ok(Some(next)));
}

#[test]
fn an_absurd_payload_or_a_wrong_magic_ends_the_connection() {
    let mut input = BytesMut::new();
    request(WRITE, PAYLOAD_SKIPPED_MAX + 1, b"").encode(Headers::Simple, &mut input);
    assert_eq!(
        RequestDecoder::default().decode(&mut input),
        Err(Violation::PayloadLength(PAYLOAD_SKIPPED_MAX + 1))
    );

    let mut input = BytesMut::from(&[0x11; HEADER_SIZE][..]);
    assert_eq!(
        RequestDecoder::default().decode(&mut input),
        Err(Violation::RequestMagic(0x1111_1111))
    );
}

fn check_survival(headers: Headers, requests: &[Request]) {
    let mut wire = BytesMut::new();
    for request in requests {
        request.encode(headers, &mut wire);
    }
    let mut goodbye = request(DISCONNECT, 0, b"");
    goodbye.flags = 0;
    goodbye.encode(headers, &mut wire);

    for step in 1..wire.len() {
        let (mut decoder, mut input, mut found) =
            (RequestDecoder::new(headers), BytesMut::new(), Vec::new());
        for piece in wire.chunks(step) {
            input.put_slice(piece);
            while let Some(incoming) = decoder.decode(&mut input).unwrap() {
                found.push(incoming);
            }
        }
        let expected: Vec<_> = requests
            .iter()
            .cloned()
            .map(Incoming::Request)
            .chain([Incoming::Disconnect])
            .collect();
        assert_eq!(found, expected, "{step} bytes at a time");
        assert!(input.is_empty());
    }
}

/// A request that says that its data follows.
fn announced(kind: u16, data: &'static [u8]) -> Request {
    Request {
        flags: FUA | PAYLOAD_LENGTH,
        ..request(kind, data.len() as u64, data)
    }
}

fn request(kind: u16, length: u64, data: &'static [u8]) -> Request {
    let data = Bytes::from_static(data);
    Request {
        cookie: Cookie(7),
        kind,
        flags: FUA,
        offset: 1 << 40,
        length,
        data,
    }
}
