//! How extended headers are agreed on, and what follows from it.

use stillpoint_tests::raw_nbd::{can, option, rep};
use stillpoint_tests::{MIB, RawNbd, Server};

use crate::{ALLOCATION, in_step, server};

#[test]
fn extended_headers_are_agreed_on_with_and_without_structured_replies() {
    let server = server();
    for structured_first in [false, true] {
        let mut nbd = RawNbd::connect(&server.live());
        if structured_first {
            nbd.structured_replies();
        }
        nbd.extended_headers();
        nbd.go("vda").unwrap();
        in_step(&mut nbd);
    }
}

#[test]
fn extended_headers_take_no_data() {
    let server = server();
    let mut nbd = RawNbd::connect(&server.live());
    let refused = nbd.option(option::EXTENDED_HEADERS, b"x");
    assert_eq!(refused, Err(rep::ERR_INVALID));
    nbd.go("vda").unwrap();
    // Requests are compact still.
    in_step(&mut nbd);
}

#[test]
fn extended_headers_asked_for_twice_are_agreed_on_twice() {
    let server = server();
    let mut nbd = RawNbd::connect(&server.live());
    nbd.extended_headers();
    nbd.extended_headers();
    nbd.go("vda").unwrap();
    in_step(&mut nbd);
}

#[test]
fn structured_replies_are_refused_afterwards() {
    let server = server();
    let mut nbd = RawNbd::connect(&server.live());
    nbd.extended_headers();
    let refused = nbd.option(option::STRUCTURED_REPLY, &[]);
    assert_eq!(refused, Err(rep::ERR_EXT_HEADER_REQD));
    nbd.go("vda").unwrap();
    in_step(&mut nbd);
}

#[test]
fn the_old_way_in_ends_the_connection() {
    let server = server();
    let mut nbd = RawNbd::connect(&server.live());
    nbd.extended_headers();
    nbd.send_option(option::EXPORT_NAME, b"vda");
    assert!(nbd.is_closed());
    server.is_well();
}

#[test]
fn contexts_and_df_need_nothing_else() {
    let server = server();
    let mut nbd = RawNbd::connect(&server.live());
    nbd.extended_headers();
    let listed = nbd.list_contexts("vda", &["base:"]).unwrap();
    assert_eq!(listed, [ALLOCATION]);
    assert_eq!(nbd.set_contexts("vda", &[ALLOCATION]).unwrap(), listed);
    assert_eq!(nbd.go("vda").unwrap().flags & can::DF, can::DF);
}

#[test]
fn filters_are_offered_to_whoever_chose_contexts_of_the_export() {
    let two = Server::builder().disk("vda", MIB).disk("vdb", MIB).start();
    let offered = |extended: bool, chosen_for: Option<&str>| {
        let mut nbd = RawNbd::connect(&two.live());
        nbd.structured_replies();
        if extended {
            nbd.extended_headers();
        }
        if let Some(name) = chosen_for {
            nbd.set_contexts(name, &[ALLOCATION]).unwrap();
        }
        let told = nbd.info("vda").unwrap();
        assert_eq!(nbd.go("vda"), Ok(told.clone()), "INFO and GO");
        told.flags & can::BLOCK_STATUS_PAYLOAD != 0
    };
    assert!(offered(true, Some("vda")));
    assert!(!offered(true, Some("vdb")));
    assert!(!offered(true, None));
    assert!(!offered(false, Some("vda")));
}
