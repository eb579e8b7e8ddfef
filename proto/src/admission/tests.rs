use super::*;
use crate::command::DISCONNECT;
use crate::export::BlockSize;
use crate::request::Cookie;

const SIZE: u64 = 1 << 20;
const CONTEXTS: [ContextId; 2] = [ContextId(1), ContextId(2)];

#[test]
fn past_the_end_is_no_space_for_writes_and_invalid_for_everything_else() {
    for (kind, errno) in [
        (WRITE, Errno::NoSpc),
        (WRITE_ZEROES, Errno::NoSpc),
        (READ, Errno::Inval),
        (TRIM, Errno::Inval),
        (CACHE, Errno::Inval),
        (BLOCK_STATUS, Errno::Inval),
    ] {
        check_refused(request(kind, SIZE, 1), errno);
        check_refused(request(kind, SIZE - 1, 2), errno);
        check_refused(request(kind, u64::MAX, 1), errno);
        assert!(all().admit(request(kind, SIZE - 1, 1)).is_ok(), "{kind}");
    }
}

#[test]
fn changes_to_a_read_only_export_are_not_permitted() {
    let mut admission = all();
    admission.flags = Flags::READ_ONLY;
    for kind in [WRITE, TRIM, WRITE_ZEROES] {
        assert_eq!(
            admission.admit(request(kind, 0, 1)).unwrap_err().errno,
            Errno::Perm
        );
    }
    assert!(admission.admit(request(READ, 0, 1)).is_ok());
}

#[test]
fn a_flag_is_refused_where_it_has_no_meaning_and_fua_never_is() {
    let meaning = [
        (READ, DO_NOT_FRAGMENT),
        (WRITE, 0),
        (FLUSH, 0),
        (TRIM, 0),
        (CACHE, 0),
    ]
    .into_iter()
    .chain([
        (WRITE_ZEROES, NO_HOLE | FAST_ZERO),
        (BLOCK_STATUS, REQUEST_ONE),
    ]);
    for (kind, flags) in meaning {
        for bit in (0..16).map(|bit| 1 << bit) {
            let length = u64::from(kind != FLUSH);
            let request = Request {
                flags: bit,
                ..request(kind, 0, length)
            };
            let allowed = (flags | FUA) & bit != 0;
            assert_eq!(
                all().admit(request).is_ok(),
                allowed,
                "{kind} with {bit:#x}"
            );
        }
    }
}

#[test]
fn what_was_not_offered_is_refused() {
    let mut none = all();
    none.flags = Flags::HAS_FLAGS;
    for (kind, flags) in [
        (READ, DO_NOT_FRAGMENT),
        (WRITE, FUA),
        (FLUSH, 0),
        (TRIM, 0),
        (CACHE, 0),
        (WRITE_ZEROES, 0),
    ] {
        let request = Request {
            flags,
            ..request(kind, 0, u64::from(kind != FLUSH))
        };
        assert_eq!(
            none.admit(request).unwrap_err().errno,
            Errno::Inval,
            "{kind}"
        );
    }
    let mut slow = all();
    slow.flags = slow.flags.without(Flags::SEND_FAST_ZERO);
    let fast = Request {
        flags: FAST_ZERO,
        ..request(WRITE_ZEROES, 0, 1)
    };
    assert_eq!(slow.admit(fast).unwrap_err().errno, Errno::Inval);
}

#[test]
fn a_block_status_needs_a_context_and_a_length() {
    check_refused(request(BLOCK_STATUS, 0, 0), Errno::Inval);
    let without = Admission {
        contexts: Vec::new(),
        ..all()
    };
    assert_eq!(
        without
            .admit(request(BLOCK_STATUS, 0, 1))
            .unwrap_err()
            .errno,
        Errno::Inval
    );
    let without = Admission {
        headers: Headers::Simple,
        ..all()
    };
    assert_eq!(
        without
            .admit(request(BLOCK_STATUS, 0, 1))
            .unwrap_err()
            .errno,
        Errno::Inval
    );
}

#[test]
fn only_what_carries_a_payload_is_bound_by_the_longest_one() {
    let large = Admission {
        size: 1 << 40,
        ..all()
    };
    for kind in [TRIM, WRITE_ZEROES, CACHE, BLOCK_STATUS] {
        assert!(
            large.admit(request(kind, 0, PAYLOAD_MAX + 1)).is_ok(),
            "{kind}"
        );
    }
    assert!(large.admit(request(READ, 0, PAYLOAD_MAX)).is_ok());
    for kind in [READ, WRITE] {
        let skipped = Request {
            data: Bytes::new(),
            ..request(kind, 0, 0)
        };
        let skipped = Request {
            length: PAYLOAD_MAX + 1,
            ..skipped
        };
        let errno = if kind == READ {
            Errno::Overflow
        } else {
            Errno::Inval
        };
        assert_eq!(large.admit(skipped).unwrap_err().errno, errno, "{kind}");
    }
}

#[test]
fn requests_of_no_length_are_fine_up_to_the_very_end() {
    for kind in [READ, WRITE, TRIM, WRITE_ZEROES, CACHE] {
        assert!(all().admit(request(kind, SIZE, 0)).is_ok(), "{kind}");
        assert!(all().admit(request(kind, SIZE + 1, 0)).is_err(), "{kind}");
    }
}

#[test]
fn ranges_keep_to_the_minimum_block_size() {
    let sectors = Admission {
        alignment: 512,
        ..all()
    };
    assert!(sectors.admit(request(READ, 512, 1024)).is_ok());
    assert!(sectors.admit(request(READ, 1, 512)).is_err());
    assert!(sectors.admit(request(READ, 512, 513)).is_err());
}

#[test]
fn unknown_commands_and_flushes_of_a_range_are_invalid() {
    check_refused(request(8, 0, 0), Errno::Inval);
    check_refused(request(u16::MAX, 0, 0), Errno::Inval);
    check_refused(request(DISCONNECT, 0, 0), Errno::Inval);
    check_refused(request(FLUSH, 0, 1), Errno::Inval);
}

#[test]
fn a_command_says_what_the_request_said() {
    let zeroes = Request {
        flags: NO_HOLE | FUA,
        ..request(WRITE_ZEROES, 4, 8)
    };
    let expected = Command::WriteZeroes {
        range: 4..12,
        fua: true,
        no_hole: true,
        fast: false,
    };
    assert_eq!(all().admit(zeroes), Ok(expected));
    let expected = Command::Write {
        range: 4..6,
        data: Bytes::from(vec![0; 2]),
        fua: false,
    };
    assert_eq!(all().admit(request(WRITE, 4, 2)), Ok(expected));
}

#[test]
fn a_read_that_is_too_long_overflows_only_where_replies_have_chunks_and_it_is_in_range() {
    for (headers, errno) in [
        (Headers::Simple, Errno::Inval),
        (Headers::Structured, Errno::Overflow),
        (Headers::Extended, Errno::Overflow),
    ] {
        let admission = Admission {
            size: 1 << 40,
            headers,
            ..all()
        };
        let refused = |length| admission.admit(request(READ, 0, length)).unwrap_err();
        assert_eq!(refused(PAYLOAD_MAX + 1).errno, errno);
        assert_eq!(refused(1 << 40).errno, errno);
        assert_eq!(refused((1 << 40) + 1).errno, Errno::Inval);
    }
}

#[test]
fn an_extended_write_may_say_that_its_data_follows_and_a_compact_one_may_not() {
    let flagged = |flags, kind| Request {
        flags,
        ..request(kind, 0, 2)
    };
    assert!(extended().admit(flagged(PAYLOAD_LENGTH, WRITE)).is_ok());
    assert!(
        extended()
            .admit(flagged(PAYLOAD_LENGTH | FUA, WRITE))
            .is_ok()
    );
    assert!(extended().admit(flagged(0, WRITE)).is_ok());
    let compact = flagged(PAYLOAD_LENGTH, WRITE);
    assert_eq!(all().admit(compact).unwrap_err().errno, Errno::Inval);
}

#[test]
fn a_payload_where_none_has_a_meaning_is_invalid() {
    for kind in [READ, FLUSH, TRIM, CACHE, WRITE_ZEROES, 77] {
        let flagged = Request {
            flags: PAYLOAD_LENGTH,
            ..request(kind, 0, u64::from(kind != FLUSH))
        };
        let refusal = extended().admit(flagged).unwrap_err();
        assert_eq!(refusal.errno, Errno::Inval, "{kind}");
    }
    let unoffered = Admission {
        flags: all().flags.without(Flags::BLOCK_STATUS_PAYLOAD),
        ..extended()
    };
    let refusal = unoffered.admit(filtered(0, filter(512, &[1]))).unwrap_err();
    assert_eq!(refusal.errno, Errno::Inval);
}

#[test]
fn a_block_status_is_of_all_contexts_or_of_those_that_it_lists() {
    let status = |range, contexts: &[u32]| Command::BlockStatus {
        range,
        contexts: contexts.iter().copied().map(ContextId).collect(),
        one: false,
    };
    let whole = extended().admit(request(BLOCK_STATUS, 512, 512));
    assert_eq!(whole, Ok(status(512..1024, &[1, 2])));
    for list in [&[1][..], &[2], &[2, 1]] {
        let some = extended().admit(filtered(512, filter(512, list)));
        assert_eq!(some, Ok(status(512..1024, list)));
    }
}

#[test]
fn a_list_of_contexts_that_are_unknown_or_repeated_or_none_is_invalid() {
    let payloads = [
        filter(512, &[]),
        filter(512, &[3]),
        filter(512, &[1, 0]),
        filter(512, &[1, 1]),
        filter(512, &[1, 2, 1]),
        filter(0, &[1]),
        filter(SIZE + 1, &[1]),
        filter(u64::MAX, &[1]),
        filter(512, &[1]).slice(..11),
        filter(512, &[1]).slice(..7),
        Bytes::new(),
    ];
    for payload in payloads {
        let refused = extended().admit(filtered(512, payload.clone()));
        let errno = refused.map_err(|refusal| refusal.errno);
        assert_eq!(errno, Err(Errno::Inval), "{payload:x?}");
    }
}

fn check_refused(request: Request, errno: Errno) {
    let (kind, offset, length) = (request.kind, request.offset, request.length);
    let refusal = all().admit(request).unwrap_err();
    assert_eq!(
        refusal.errno, errno,
        "{kind} at {offset}, {length} bytes: {refusal}"
    );
}

/// Everything on offer.
fn all() -> Admission {
    let info = ExportInfo {
        name: "vda".into(),
        description: None,
        size: SIZE,
        flags: Flags::from_bits(u16::MAX).without(Flags::READ_ONLY),
        block_size: BlockSize::default(),
    };
    Admission::new(&info, Headers::Structured, CONTEXTS.to_vec())
}

/// The same with extended headers.
fn extended() -> Admission {
    Admission {
        headers: Headers::Extended,
        flags: all().flags | Flags::BLOCK_STATUS_PAYLOAD,
        ..all()
    }
}

/// A block status whose payload is `payload`.
fn filtered(offset: u64, payload: Bytes) -> Request {
    Request {
        flags: PAYLOAD_LENGTH,
        length: payload.len() as u64,
        data: payload,
        ..request(BLOCK_STATUS, offset, 0)
    }
}

fn filter(length: u64, contexts: &[u32]) -> Bytes {
    let contexts = contexts.iter().copied().map(ContextId).collect();
    ContextFilter { length, contexts }.encode()
}

fn request(kind: u16, offset: u64, length: u64) -> Request {
    let data = if kind == WRITE {
        Bytes::from(vec![0; length as usize])
    } else {
        Bytes::new()
    };
    Request {
        cookie: Cookie(1),
        kind,
        flags: 0,
        offset,
        length,
        data,
    }
}
