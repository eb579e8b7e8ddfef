//! Agreeing on extended headers, and what they change about the other options.

use crate::proto::{Headers, Step};
use crate::talk::{Talk, contexts, info, kinds, option_header};
use crate::wire::*;

/// Of the transmission flags.
const BLOCK_STATUS_PAYLOAD: u16 = 1 << 12;

#[test]
fn extended_headers_are_agreed_on_with_or_without_structured_replies_before() {
    let mut talk = Talk::new(3);
    assert_eq!(talk.ask(EXTENDED_HEADERS, b""), [(ACK, vec![])]);
    assert_eq!(talk.go("vda").headers, Headers::Extended);

    let mut talk = Talk::structured();
    assert_eq!(talk.ask(EXTENDED_HEADERS, b""), [(ACK, vec![])]);
    assert_eq!(talk.go("vda").headers, Headers::Extended);
}

#[test]
fn extended_headers_take_no_data() {
    let mut talk = Talk::new(3);
    assert_eq!(kinds(&talk.ask(EXTENDED_HEADERS, b"x")), [ERR_INVALID]);
    assert_eq!(talk.go("vda").headers, Headers::Simple);
}

#[test]
fn extended_headers_asked_for_again_are_still_agreed_on() {
    let mut talk = Talk::extended();
    assert_eq!(talk.ask(EXTENDED_HEADERS, b""), [(ACK, vec![])]);
    assert_eq!(talk.go("vda").headers, Headers::Extended);
}

#[test]
fn there_is_no_way_back_to_structured_replies() {
    let mut talk = Talk::extended();
    let answers = talk.ask(STRUCTURED_REPLY, b"");
    assert_eq!(kinds(&answers), [ERR_EXT_HEADER_REQD]);
    assert_eq!(talk.go("vda").headers, Headers::Extended);
}

#[test]
fn extended_headers_are_enough_for_contexts_and_for_unfragmented_reads() {
    let mut talk = Talk::extended();
    let base = contexts("vda", &["base:allocation"]);
    for option in [LIST_META_CONTEXT, SET_META_CONTEXT] {
        assert_eq!(kinds(&talk.ask(option, &base)), [META_CONTEXT, ACK]);
    }
    let told = talk.ask(INFO, &info("vda", &[]));
    assert_eq!(flags(&told) & 1 << 7, 1 << 7);
    assert_eq!(talk.go("vda").contexts.len(), 1);
}

#[test]
fn the_old_way_in_is_closed_once_headers_are_extended() {
    let mut talk = Talk::extended();
    talk.input.extend_from_slice(&option_header(EXPORT_NAME, 3));
    talk.input.extend_from_slice(b"vda");
    assert!(matches!(talk.advance(), Ok(Step::Hangup(_))));
    assert!(talk.output.is_empty());
}

#[test]
fn some_contexts_can_be_asked_for_only_where_some_were_chosen() {
    for (mut talk, name, offered) in [
        (Talk::extended(), "vda", true),
        (Talk::extended(), "", false),
        (Talk::structured(), "vda", false),
    ] {
        let before = talk.ask(INFO, &info("vda", &[]));
        assert_eq!(flags(&before) & BLOCK_STATUS_PAYLOAD, 0);
        talk.ask(SET_META_CONTEXT, &contexts(name, &["base:allocation"]));
        let told = flags(&talk.ask(INFO, &info("vda", &[])));
        assert_eq!(
            told & BLOCK_STATUS_PAYLOAD != 0,
            offered,
            "chosen for {name:?}"
        );
        assert_eq!(talk.go("vda").info.flags.bits(), told);
    }
}

fn flags(told: &[(u32, Vec<u8>)]) -> u16 {
    let export = &told[0].1;
    assert_eq!(export[..2], [0, 0], "the first item describes the export");
    u16::from_be_bytes(export[10..].try_into().unwrap())
}
