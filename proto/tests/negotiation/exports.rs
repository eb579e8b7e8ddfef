//! Looking at exports, entering them, and every way not to.

use bytes::BufMut;

use crate::proto::{
    ANSWERS_MAX, Headers, OPTION_DATA_MAX, OPTION_SKIPPED_MAX, OPTIONS_MAX, STRING_MAX, Step,
    TlsMode, Violation,
};
use crate::talk::{Talk, info, kinds, option_header};
use crate::wire::*;

#[test]
fn a_client_learns_about_an_export_and_enters_it() {
    let mut talk = Talk::new(3);
    assert_eq!(talk.ask(STRUCTURED_REPLY, b""), [(ACK, vec![])]);
    let told = talk.ask(INFO, &info("vda", &[1, 2, 3]));
    let kinds: Vec<_> = told
        .iter()
        .map(|(kind, data)| (*kind, data.get(1).copied()))
        .collect();
    let info_of = |item| (REP_INFO, Some(item));
    assert_eq!(
        kinds,
        [info_of(0), info_of(3), info_of(1), info_of(2), (ACK, None)]
    );
    assert_eq!(told[0].1, b"\0\0\0\0\0\0\0\x10\0\0\x00\x81");
    assert_eq!(told[1].1, b"\0\x03\0\0\0\x01\0\0\x10\0\x02\0\0\0");
    assert_eq!(told[2].1, b"\0\x01vda");
    assert_eq!(told[3].1, b"\0\x02a disk");

    let session = talk.go("vda");
    assert_eq!(
        (session.export, session.info.size, session.headers),
        ("vda", 1 << 20, Headers::Structured)
    );
    assert!(session.contexts.is_empty());
}

#[test]
fn a_list_names_the_exports_and_takes_no_data() {
    let mut talk = Talk::new(3);
    let vda = (SERVER, b"\0\0\0\x03vdaa disk".to_vec());
    assert_eq!(talk.ask(LIST, b""), [vda, (ACK, vec![])]);
    assert_eq!(kinds(&talk.ask(LIST, b"x")), [ERR_INVALID]);
    assert_eq!(kinds(&talk.ask(STRUCTURED_REPLY, b"x")), [ERR_INVALID]);
}

#[test]
fn what_is_denied_gets_the_error_of_its_reason() {
    let mut talk = Talk::new(3);
    for (name, error) in [
        ("no", ERR_UNKNOWN),
        ("mine", ERR_POLICY),
        ("late", ERR_SHUTDOWN),
    ] {
        assert_eq!(kinds(&talk.ask(INFO, &info(name, &[]))), [error]);
        assert_eq!(kinds(&talk.ask(GO, &info(name, &[]))), [error]);
    }
    talk.go("vda");
}

#[test]
fn unknown_options_are_skipped_and_declined() {
    let mut talk = Talk::new(3);
    assert_eq!(kinds(&talk.ask(12, b"")), [ERR_UNSUP]);
    assert_eq!(
        kinds(&talk.ask(0xffff_ffff, &vec![7; 100_000])),
        [ERR_UNSUP]
    );
    talk.go("vda");
}

#[test]
fn too_much_data_is_skipped_as_it_arrives() {
    let mut talk = Talk::new(3);
    let length = OPTION_DATA_MAX + 1;
    talk.input.put_slice(&option_header(GO, length));
    for _ in 0..length - 1 {
        talk.input.put_u8(0);
        assert!(matches!(talk.advance(), Ok(Step::NeedMore)));
        assert!(talk.input.is_empty());
    }
    talk.input.put_u8(0);
    assert!(matches!(talk.advance(), Ok(Step::NeedMore)));
    assert_eq!(kinds(&talk.answers()), [ERR_TOO_BIG]);
    talk.go("vda");
}

#[test]
fn an_absurd_length_a_wrong_magic_and_unknown_flags_end_the_connection() {
    let mut talk = Talk::new(3);
    talk.input
        .put_slice(&option_header(99, OPTION_SKIPPED_MAX + 1));
    assert!(matches!(
        talk.advance(),
        Err(Violation::OptionLength { option: 99, .. })
    ));
    assert!(
        matches!(talk.advance(), Ok(Step::Hangup(_))),
        "nothing comes after a violation"
    );

    let mut talk = Talk::new(3);
    talk.input.put_slice(&[0; 16]);
    assert!(matches!(talk.advance(), Err(Violation::OptionMagic(0))));

    let mut talk = Talk::new(3 | 1 << 9);
    assert_eq!(talk.advance().err(), Some(Violation::ClientFlags(1 << 9)));
}

#[test]
fn an_absurd_length_is_told_before_the_end_unless_there_is_no_telling() {
    let absurd = |talk: &mut Talk, option| {
        talk.input
            .put_slice(&option_header(option, OPTION_SKIPPED_MAX + 1));
        let end = talk.advance();
        assert!(matches!(end, Err(Violation::OptionLength { .. })));
        kinds(&talk.answers())
    };
    for option in [LIST, GO, ABORT, 99] {
        assert_eq!(absurd(&mut Talk::new(3), option), [ERR_TOO_BIG]);
        assert_eq!(absurd(&mut Talk::new(2), option), [], "not fixed newstyle");
    }
    assert_eq!(absurd(&mut Talk::new(3), EXPORT_NAME), []);
    let mut talk = Talk::with_tls(TlsMode::Require);
    talk.input.put_u32(3);
    assert_eq!(absurd(&mut talk, GO), [ERR_TLS_REQD]);
}

#[test]
fn while_the_server_ends_everything_but_a_goodbye_is_told_so() {
    let data = info("vda", &[]);
    for mode in [TlsMode::Off, TlsMode::On] {
        let mut talk = Talk::with_tls(mode);
        talk.input.put_u32(3);
        assert_eq!(kinds(&talk.ask(LIST, b"")), [SERVER, ACK]);
        // Of this option one half comes before the end, and one after it.
        talk.input.put_slice(&option_header(GO, data.len() as u32));
        talk.input.put_slice(&data[..5]);
        assert!(matches!(talk.advance(), Ok(Step::NeedMore)));
        talk.shut_down();
        talk.input.put_slice(&data[5..]);
        assert!(matches!(talk.advance(), Ok(Step::NeedMore)));
        assert_eq!(kinds(&talk.answers()), [ERR_SHUTDOWN]);
        for option in [LIST, STARTTLS, INFO, GO, STRUCTURED_REPLY, 99] {
            assert_eq!(kinds(&talk.ask(option, &data)), [ERR_SHUTDOWN], "{option}");
        }
        talk.input.put_slice(&option_header(ABORT, 0));
        assert!(matches!(talk.advance(), Ok(Step::Abort)));
        assert_eq!(kinds(&talk.answers()), [ACK]);
    }

    let mut talk = Talk::new(3);
    talk.shut_down();
    talk.input.put_slice(&option_header(LIST, 0));
    talk.input.put_slice(&option_header(EXPORT_NAME, 3));
    talk.input.put_slice(b"vda");
    assert!(matches!(talk.advance(), Ok(Step::Hangup(_))));
    assert_eq!(kinds(&talk.answers()), [ERR_SHUTDOWN]);

    let mut talk = Talk::with_tls(TlsMode::Require);
    talk.input.put_u32(3);
    talk.shut_down();
    assert_eq!(kinds(&talk.ask(LIST, b"")), [ERR_TLS_REQD]);
    assert_eq!(kinds(&talk.ask(STARTTLS, b"")), [ERR_SHUTDOWN]);
}

#[test]
fn nobody_negotiates_for_ever() {
    let mut talk = Talk::new(3);
    for _ in 0..OPTIONS_MAX {
        talk.ask(STARTTLS, b"");
    }
    talk.input.put_slice(&option_header(STARTTLS, 0));
    assert_eq!(
        talk.advance().err(),
        Some(Violation::TooManyOptions(OPTIONS_MAX))
    );
}

#[test]
fn answers_are_written_before_more_of_them_are_made() {
    let mut talk = Talk::new(3);
    for _ in 0..OPTIONS_MAX {
        talk.input.put_slice(&option_header(INFO, 9));
        talk.input.put_slice(&info("vda", &[]));
    }
    assert!(matches!(talk.advance(), Ok(Step::WriteFirst)));
    assert!(talk.output.len() < 2 * ANSWERS_MAX);
    assert!(!talk.input.is_empty());
}

#[test]
fn an_export_name_is_answered_without_a_header_and_padded_unless_declined() {
    for (flags, size) in [(3, 10), (2, 10), (1, 134), (0, 134)] {
        let mut talk = Talk::new(flags);
        talk.input.put_slice(&option_header(EXPORT_NAME, 3));
        talk.input.put_slice(b"vda");
        assert!(matches!(talk.advance(), Ok(Step::Ready(_))));
        assert_eq!(talk.output.len(), size, "client flags {flags}");
        assert_eq!(&talk.output[..10], b"\0\0\0\0\0\x10\0\0\x00\x01");
        assert!(talk.output[10..].iter().all(|byte| *byte == 0));
    }
}

#[test]
fn an_export_name_that_cannot_be_had_ends_the_connection() {
    let mut talk = Talk::new(3);
    talk.input.put_slice(&option_header(EXPORT_NAME, 2));
    talk.input.put_slice(b"no");
    assert!(matches!(talk.advance(), Ok(Step::Hangup(_))));
    assert!(talk.output.is_empty());

    for name in [&b"a\0b"[..], b"\xff", &[b'x'; STRING_MAX + 1]] {
        let mut talk = Talk::new(3);
        talk.input
            .put_slice(&option_header(EXPORT_NAME, name.len() as u32));
        talk.input.put_slice(name);
        assert_eq!(talk.advance().err(), Some(Violation::ExportName));
    }
}

#[test]
fn who_does_not_speak_fixed_newstyle_can_only_name_an_export() {
    let mut talk = Talk::new(0);
    talk.input.put_slice(&option_header(LIST, 0));
    assert_eq!(
        talk.advance().err(),
        Some(Violation::NotFixedNewstyle(LIST))
    );
}

#[test]
fn a_goodbye_is_acknowledged_whatever_comes_with_it() {
    let mut talk = Talk::new(3);
    talk.input.put_slice(&option_header(ABORT, 3));
    talk.input.put_slice(b"bye");
    assert!(matches!(talk.advance(), Ok(Step::Abort)));
    assert_eq!(talk.answers(), [(ACK, vec![])]);
}

#[test]
fn malformed_questions_are_invalid_and_not_repeated() {
    let mut talk = Talk::new(3);
    talk.ask(STRUCTURED_REPLY, b"");
    let mut trailing = info("vda", &[]);
    trailing.push(0);
    let overlong = info(&"x".repeat(STRING_MAX + 1), &[]);
    let cases: [&[u8]; 8] = [
        b"",
        // As many questions as there can be, and none of them is there.
        b"\0\0\0\x03vda\xff\xff\xff\xff",
        b"\0\0\0\x04vda\0\0",
        b"\xff\xff\xff\xffvda\0\0",
        b"\0\0\0\x03v\0a\0\0",
        b"\0\0\0\x03v\xffa\0\0",
        &trailing,
        &overlong,
    ];
    for data in cases {
        for option in [INFO, GO, LIST_META_CONTEXT, SET_META_CONTEXT] {
            let answers = talk.ask(option, data);
            assert_eq!(kinds(&answers), [ERR_INVALID], "option {option}, {data:?}");
            assert!(!answers[0].1.contains(&0) && !answers[0].1.contains(&0xff));
        }
    }
    talk.go("vda");
}
