//! When TLS may begin, must begin, and what is left of what was said before.

use bytes::BufMut;

use crate::proto::{Headers, Step, TlsMode, Violation};
use crate::talk::{Talk, contexts, info, kinds, option_header};
use crate::wire::*;

fn fixed(mode: TlsMode) -> Talk {
    let mut talk = Talk::with_tls(mode);
    talk.input.put_u32(3);
    talk
}

fn start_tls(talk: &mut Talk) {
    talk.input.put_slice(&option_header(STARTTLS, 0));
    assert!(matches!(talk.advance(), Ok(Step::StartTls)));
    assert_eq!(talk.answers(), [(ACK, vec![])]);
}

#[test]
fn where_tls_is_required_nothing_else_is_answered_before_it() {
    let mut talk = fixed(TlsMode::Require);
    for (option, data) in [
        (LIST, vec![]),
        (INFO, info("vda", &[])),
        (INFO, vec![1]),
        (GO, info("no", &[])),
        (STRUCTURED_REPLY, vec![]),
        (LIST_META_CONTEXT, contexts("vda", &[])),
        (SET_META_CONTEXT, contexts("vda", &["base:allocation"])),
        (11, vec![]),
        (77, vec![7; 100]),
    ] {
        assert_eq!(kinds(&talk.ask(option, &data)), [ERR_TLS_REQD], "{option}");
    }
    start_tls(&mut talk);
    assert_eq!(kinds(&talk.ask(LIST, b"")), [SERVER, ACK]);
    assert_eq!(kinds(&talk.ask(77, b"")), [ERR_UNSUP]);
    talk.go("vda");
}

#[test]
fn where_tls_is_required_a_client_may_leave_and_one_that_cannot_ask_is_left() {
    let mut talk = fixed(TlsMode::Require);
    talk.input.put_slice(&option_header(ABORT, 0));
    assert!(matches!(talk.advance(), Ok(Step::Abort)));
    assert_eq!(kinds(&talk.answers()), [ACK]);

    for flags in [2, 3] {
        let mut talk = Talk::with_tls(TlsMode::Require);
        talk.input.put_u32(flags);
        talk.input.put_slice(&option_header(EXPORT_NAME, 3));
        talk.input.put_slice(b"vda");
        assert!(matches!(talk.advance(), Ok(Step::Hangup(_))));
        assert!(talk.output.is_empty());
    }
}

#[test]
fn where_there_is_no_tls_it_is_declined_and_the_client_goes_on() {
    let mut talk = fixed(TlsMode::Off);
    assert_eq!(kinds(&talk.ask(STARTTLS, b"")), [ERR_POLICY]);
    assert_eq!(kinds(&talk.ask(STARTTLS, b"x")), [ERR_INVALID]);
    talk.go("vda");
}

#[test]
fn who_may_choose_is_served_either_way() {
    fixed(TlsMode::On).go("vda");
    let mut talk = fixed(TlsMode::On);
    start_tls(&mut talk);
    talk.go("vda");
}

#[test]
fn starttls_takes_no_data_and_comes_once() {
    for mode in [TlsMode::On, TlsMode::Require] {
        let mut talk = fixed(mode);
        assert_eq!(kinds(&talk.ask(STARTTLS, b"x")), [ERR_INVALID]);
        start_tls(&mut talk);
        assert_eq!(kinds(&talk.ask(STARTTLS, b"")), [ERR_INVALID]);
        talk.go("vda");
    }
}

#[test]
fn what_was_agreed_before_tls_is_forgotten() {
    let mut talk = fixed(TlsMode::On);
    talk.ask(STRUCTURED_REPLY, b"");
    let chosen = talk.ask(SET_META_CONTEXT, &contexts("vda", &["base:allocation"]));
    assert_eq!(kinds(&chosen), [META_CONTEXT, ACK]);
    start_tls(&mut talk);
    let again = talk.ask(SET_META_CONTEXT, &contexts("vda", &["base:allocation"]));
    assert_eq!(kinds(&again), [ERR_INVALID], "structured replies are gone");
    let session = talk.go("vda");
    assert_eq!(session.headers, Headers::Simple);
    assert!(session.contexts.is_empty());

    let mut talk = fixed(TlsMode::On);
    talk.ask(STRUCTURED_REPLY, b"");
    talk.ask(SET_META_CONTEXT, &contexts("vda", &["base:allocation"]));
    start_tls(&mut talk);
    talk.ask(STRUCTURED_REPLY, b"");
    assert!(talk.go("vda").contexts.is_empty(), "the choice is gone");

    let mut talk = fixed(TlsMode::On);
    assert_eq!(kinds(&talk.ask(EXTENDED_HEADERS, b"")), [ACK]);
    start_tls(&mut talk);
    assert_eq!(talk.go("vda").headers, Headers::Simple);
}

#[test]
fn plain_text_behind_starttls_is_never_read() {
    for mode in [TlsMode::On, TlsMode::Require] {
        let mut talk = fixed(mode);
        talk.input.put_slice(&option_header(STARTTLS, 0));
        talk.input.put_slice(&option_header(STRUCTURED_REPLY, 0));
        assert!(matches!(talk.advance(), Err(Violation::PlainText(16))));
        assert!(talk.output.is_empty(), "TLS is not acknowledged");
        assert!(matches!(talk.advance(), Ok(Step::Hangup(_))));
    }
}
