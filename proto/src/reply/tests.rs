use bytes::{BufMut, BytesMut};

use super::{Origin, Replies};
use crate::{Chunk, ContextId, Cookie, Errno, Extent, Extents, Headers, Reply};

const COOKIE: Cookie = Cookie(0x0102_0304_0506_0708);

const ORIGIN: Origin = Origin {
    cookie: COOKIE,
    offset: 0x1112_1314_1516_1718,
};

#[test]
fn simple_replies_are_sixteen_bytes_and_then_the_data() {
    let replies = Replies::new(Headers::Simple);
    let mut output = BytesMut::new();
    replies.ok(&mut output, ORIGIN);
    assert_eq!(
        &output[..],
        b"\x67\x44\x66\x98\0\0\0\0\x01\x02\x03\x04\x05\x06\x07\x08"
    );

    output.clear();
    replies.error(&mut output, ORIGIN, Errno::NoSpc, "lost");
    assert_eq!(output[7], 28);
    assert_eq!(output.len(), 16);

    output.clear();
    replies.hole(&mut output, ORIGIN, 512, 3, true);
    assert_eq!(output.len(), 19);
    assert_eq!(
        Reply::decode(Headers::Simple, &mut output),
        Ok(Some(Reply::Simple {
            cookie: COOKIE,
            result: Ok(())
        }))
    );
    assert_eq!(&output[..], [0; 3]);
}

#[test]
fn chunks_say_what_they_were_told_in_either_form() {
    for headers in [Headers::Structured, Headers::Extended] {
        check_chunks(headers);
    }
}

fn check_chunks(headers: Headers) {
    let replies = Replies::new(headers);
    let mut output = BytesMut::new();
    replies.begin_data(&mut output, ORIGIN, 1 << 40, 2, false);
    output.put_slice(b"hi");
    replies.hole(&mut output, ORIGIN, 7, 9, false);
    replies.error_at(&mut output, ORIGIN, 8, Errno::Io, "bad sector");
    replies.error(&mut output, ORIGIN, Errno::Perm, "");
    replies.ok(&mut output, ORIGIN);

    let error = |errno, text: &str, offset| Chunk::Error {
        errno,
        text: text.into(),
        offset,
    };
    let expected = [
        (
            false,
            Chunk::Data {
                offset: 1 << 40,
                data: "hi".into(),
            },
        ),
        (
            false,
            Chunk::Hole {
                offset: 7,
                length: 9,
            },
        ),
        (true, error(Errno::Io, "bad sector", Some(8))),
        (true, error(Errno::Perm, "", None)),
        (true, Chunk::None),
    ];
    assert_eq!(chunks(headers, &mut output), expected);
}

#[test]
fn an_empty_read_is_answered_without_an_empty_chunk() {
    let mut output = BytesMut::new();
    Replies::new(Headers::Structured).begin_data(&mut output, ORIGIN, 0, 0, true);
    assert_eq!(
        chunks(Headers::Structured, &mut output),
        [(true, Chunk::None)]
    );
    Replies::new(Headers::Structured).hole(&mut output, ORIGIN, 0, 0, true);
    assert_eq!(
        chunks(Headers::Structured, &mut output),
        [(true, Chunk::None)]
    );
}

#[test]
fn a_block_status_ends_with_its_last_context_and_covers_one_length() {
    for headers in [Headers::Structured, Headers::Extended] {
        check_block_status(headers);
    }
}

fn check_block_status(headers: Headers) {
    let mut first = Extents::new(100, 1);
    first.push(100, 3);
    let mut second = Extents::new(100, 1);
    second.push(10, 0);
    second.push(20, 1);
    let mut output = BytesMut::new();
    let mut contexts = [(ContextId(1), first), (ContextId(2), second)];
    Replies::new(headers).block_status(&mut output, ORIGIN, &mut contexts);

    let status = |id, extents: &[(u64, u64)]| Chunk::BlockStatus {
        context: ContextId(id),
        extents: extents
            .iter()
            .map(|(length, flags)| Extent {
                length: *length,
                flags: *flags,
            })
            .collect(),
    };
    let expected = [
        (false, status(1, &[(30, 3)])),
        (true, status(2, &[(10, 0), (20, 1)])),
    ];
    assert_eq!(chunks(headers, &mut output), expected);
}

#[test]
fn a_block_status_that_covers_nothing_is_an_error() {
    let mut some = Extents::new(100, 1);
    some.push(100, 0);
    let mut contexts = [(ContextId(1), some), (ContextId(2), Extents::new(100, 1))];
    let mut output = BytesMut::new();
    Replies::new(Headers::Structured).block_status(&mut output, ORIGIN, &mut contexts);
    assert!(matches!(
        chunks(Headers::Structured, &mut output)[..],
        [(true, Chunk::Error { .. })]
    ));
}

#[test]
fn an_extended_chunk_has_a_head_of_32_bytes_with_the_offset_of_the_request() {
    let replies = Replies::new(Headers::Extended);
    let mut output = BytesMut::new();
    replies.begin_data(&mut output, ORIGIN, 5, 2, true);
    output.put_slice(b"hi");
    let head = b"\x6e\x8a\x27\x8c\0\x01\0\x01\x01\x02\x03\x04\x05\x06\x07\x08\
        \x11\x12\x13\x14\x15\x16\x17\x18\0\0\0\0\0\0\0\x0a";
    assert_eq!(&output[..32], head);
    assert_eq!(&output[32..], b"\0\0\0\0\0\0\0\x05hi");
}

#[test]
fn an_extended_block_status_counts_its_extents_and_has_lengths_of_64_bits() {
    let mut extents = Extents::new(1 << 44, 1);
    extents.push(1 << 40, 3);
    extents.push(1 << 41, 0);
    let mut output = BytesMut::new();
    let mut contexts = [(ContextId(9), extents)];
    Replies::new(Headers::Extended).block_status(&mut output, ORIGIN, &mut contexts);
    assert_eq!(output[6..8], [0, 6]);
    let payload = b"\0\0\0\x09\0\0\0\x02\0\0\x01\0\0\0\0\0\0\0\0\0\0\0\0\x03\
        \0\0\x02\0\0\0\0\0\0\0\0\0\0\0\0\0";
    assert_eq!(&output[32..], payload);
}

#[test]
fn a_client_accepts_only_the_form_that_was_agreed_on() {
    use Headers::{Extended, Simple, Structured};
    for (sent, agreed, fine) in [
        (Simple, Simple, true),
        (Simple, Structured, true),
        (Simple, Extended, false),
        (Structured, Simple, false),
        (Structured, Extended, false),
        (Extended, Simple, false),
        (Extended, Structured, false),
    ] {
        let mut output = BytesMut::new();
        Replies::new(sent).ok(&mut output, ORIGIN);
        assert_eq!(Reply::decode(agreed, &mut output).is_ok(), fine, "{sent:?}");
    }
}

#[test]
fn a_block_status_of_the_other_form_or_with_a_wrong_count_ends_the_connection() {
    let mut extents = Extents::new(100, 1);
    extents.push(100, 3);
    let mut contexts = [(ContextId(1), extents)];
    let mut wrong_kind = BytesMut::new();
    Replies::new(Headers::Extended).block_status(&mut wrong_kind, ORIGIN, &mut contexts);
    for count in [0, 2, 255] {
        let mut wrong_count = wrong_kind.clone();
        wrong_count[39] = count;
        assert!(Reply::decode(Headers::Extended, &mut wrong_count).is_err());
    }
    wrong_kind[7] = 5;
    assert!(Reply::decode(Headers::Extended, &mut wrong_kind).is_err());

    let mut wrong_kind = BytesMut::new();
    Replies::new(Headers::Structured).block_status(&mut wrong_kind, ORIGIN, &mut contexts);
    wrong_kind[7] = 6;
    assert!(Reply::decode(Headers::Structured, &mut wrong_kind).is_err());
}

fn chunks(headers: Headers, output: &mut BytesMut) -> Vec<(bool, Chunk)> {
    let echoed = (headers == Headers::Extended).then_some(ORIGIN.offset);
    std::iter::from_fn(|| Reply::decode(headers, output).unwrap())
        .map(|reply| match reply {
            Reply::Chunk {
                cookie: COOKIE,
                request_offset,
                done,
                chunk,
            } if request_offset == echoed => (done, chunk),
            other => panic!("expected a chunk, found {other:?}"),
        })
        .collect()
}
