//! Metadata contexts: which are selected, and for what.

use std::collections::BTreeSet;

use stillpoint_tests::RawNbd;
use stillpoint_tests::raw_nbd::{command, errno, option, rep};

use crate::peer::{EXPORT, Peer};
use crate::rows::rows;
use crate::talk::{
    BASE, ask, context_data, in_step, info_data, is_error, list, named, selected,
    server_with_backup, set, verdict,
};

rows![
    (
        "selection-1",
        "NBD_OPT_SET_META_CONTEXT",
        "Contexts need structured replies: without them SET is ERR_INVALID, and LIST may be",
        Any(contexts_need_structured_replies)
    ),
    (
        "selection-2",
        "The base: metadata namespace",
        "`base:` selects nothing in SET",
        Any(base_selects_nothing)
    ),
    (
        "selection-3",
        "NBD_OPT_SET_META_CONTEXT",
        "SET without queries selects nothing",
        Any(no_queries_select_nothing)
    ),
    (
        "selection-4",
        "NBD_OPT_SET_META_CONTEXT",
        "SET answers with one reply for each context selected, of its name byte for byte, each \
         with an id of its own, and an acknowledgement",
        Any(each_context_selected_has_an_id_of_its_own)
    ),
    (
        "selection-5",
        "NBD_OPT_SET_META_CONTEXT",
        "SET replaces what was selected before",
        Any(a_selection_replaces_the_one_before)
    ),
    (
        "selection-6",
        "NBD_OPT_SET_META_CONTEXT",
        "SET replaces what was selected before also when it fails",
        Any(a_selection_that_fails_replaces_too)
    ),
    (
        "selection-7",
        "NBD_CMD_BLOCK_STATUS",
        "A selection counts for the export of that very name, and for no other",
        Any(a_selection_counts_for_its_export_alone)
    ),
    (
        "selection-8",
        "NBD_CMD_BLOCK_STATUS",
        "INFO or a failed GO of another export leaves the selection alone, and so does LIST",
        Any(questions_about_others_leave_the_selection_alone)
    ),
    (
        "selection-9",
        "Metadata querying",
        "BLOCK_STATUS without a selected context is EINVAL, and the connection goes on",
        Any(a_block_status_needs_a_context)
    ),
    (
        "selection-10",
        "NBD_OPT_SET_META_CONTEXT",
        "A selection counts for EXPORT_NAME too",
        Any(a_selection_counts_for_the_old_way_in)
    ),
    (
        "selection-11",
        "NBD_OPT_SET_META_CONTEXT",
        "A context that was selected and is gone when the export is entered is an error of GO: its \
         id was told",
        Ours(a_context_that_is_gone_is_an_error)
    ),
];

fn contexts_need_structured_replies(peer: Peer) {
    let server = peer.serve();
    let mut nbd = server.connect();
    let data = context_data(EXPORT.as_bytes(), &[BASE]);
    let kind = verdict(&mut nbd, option::SET_META_CONTEXT, &data);
    assert_eq!(kind, rep::ERR_INVALID, "{kind:#x}");
    let kind = verdict(&mut nbd, option::LIST_META_CONTEXT, &data);
    assert!([rep::ACK, rep::ERR_INVALID].contains(&kind), "{kind:#x}");
    assert_eq!(selected(&mut nbd), 0);
}

fn base_selects_nothing(peer: Peer) {
    let server = peer.serve();
    let mut nbd = server.structured();
    assert_eq!(set(&mut nbd, &[b"base:"]), [[0; 0]; 0]);
    assert_eq!(selected(&mut nbd), 0);
}

fn no_queries_select_nothing(peer: Peer) {
    let server = peer.serve();
    let mut nbd = server.structured();
    assert_eq!(set(&mut nbd, &[]), [[0; 0]; 0]);
    assert_eq!(selected(&mut nbd), 0);
}

fn each_context_selected_has_an_id_of_its_own(peer: Peer) {
    let server = peer.serve();
    let mut nbd = server.structured();
    let names = list(&mut nbd, &[]);
    let queries: Vec<&[u8]> = names.iter().rev().map(Vec::as_slice).collect();
    let data = context_data(EXPORT.as_bytes(), &queries);
    let found = named(&ask(&mut nbd, option::SET_META_CONTEXT, &data));
    let told: BTreeSet<_> = found.iter().map(|(_, name)| name.clone()).collect();
    assert_eq!(told, names.iter().cloned().collect());
    let ids: BTreeSet<_> = found.iter().map(|(id, _)| *id).collect();
    assert_eq!((ids.len(), found.len()), (names.len(), names.len()));
    assert_eq!(selected(&mut nbd), names.len());
}

fn a_selection_replaces_the_one_before(peer: Peer) {
    let server = peer.serve();
    let mut nbd = server.structured();
    assert_eq!(set(&mut nbd, &[BASE]), [BASE]);
    assert_eq!(set(&mut nbd, &[b"x-other:thing"]), [[0; 0]; 0]);
    assert_eq!(selected(&mut nbd), 0);
}

fn a_selection_that_fails_replaces_too(peer: Peer) {
    let server = peer.serve();
    let mut cut_short = context_data(EXPORT.as_bytes(), &[BASE]);
    cut_short.pop();
    for data in [context_data(b"nothing", &[BASE]), cut_short, vec![]] {
        let mut nbd = server.structured();
        assert_eq!(set(&mut nbd, &[BASE]), [BASE]);
        let kind = verdict(&mut nbd, option::SET_META_CONTEXT, &data);
        assert!(is_error(kind), "it does not fail with {data:?}");
        assert_eq!(selected(&mut nbd), 0, "after {data:?}");
    }
}

fn a_selection_counts_for_its_export_alone(peer: Peer) {
    let Some(server) = peer.serve_two() else {
        return;
    };
    let mut nbd = server.structured();
    let data = context_data(b"vdb", &[BASE]);
    named(&ask(&mut nbd, option::SET_META_CONTEXT, &data));
    assert_eq!(selected(&mut nbd), 0);
    in_step(&mut nbd);
}

fn questions_about_others_leave_the_selection_alone(peer: Peer) {
    let server = peer.serve_two().unwrap_or_else(|| peer.serve());
    for (option, data) in [
        (option::INFO, info_data(b"vdb", &[])),
        (option::INFO, info_data(b"nothing", &[])),
        (option::GO, info_data(b"nothing", &[])),
        (option::GO, vec![]),
        (option::LIST, vec![]),
        (option::LIST_META_CONTEXT, context_data(b"vdb", &[BASE])),
        (
            option::LIST_META_CONTEXT,
            context_data(EXPORT.as_bytes(), &[]),
        ),
        (option::STRUCTURED_REPLY, vec![]),
    ] {
        let mut nbd = server.structured();
        assert_eq!(set(&mut nbd, &[BASE]), [BASE]);
        ask(&mut nbd, option, &data);
        assert_eq!(selected(&mut nbd), 1, "after option {option} {data:?}");
    }
}

fn a_block_status_needs_a_context(peer: Peer) {
    let server = peer.serve();
    for structured in [false, true] {
        let mut nbd = server.connect();
        if structured {
            nbd.structured_replies();
        }
        nbd.go(EXPORT).unwrap();
        let answer = nbd.call((command::BLOCK_STATUS, 0), 0, 4096, &[]);
        assert_eq!(answer.error, errno::EINVAL, "structured: {structured}");
        in_step(&mut nbd);
    }
}

fn a_selection_counts_for_the_old_way_in(peer: Peer) {
    let server = peer.serve();
    let mut nbd = server.structured();
    set(&mut nbd, &[BASE]);
    nbd.export_name(EXPORT).expect("the export");
    let status = nbd.block_status(0, 4096, 0).unwrap();
    assert_eq!(status.len(), 1);
}

fn a_context_that_is_gone_is_an_error() {
    let server = server_with_backup();
    server.checkpoint("cp2");
    server.begin("b2", &[]);
    let mut nbd = RawNbd::connect(&server.frozen());
    nbd.structured_replies();
    let context = ["qemu:dirty-bitmap:cp2"];
    assert_eq!(nbd.set_contexts("vda@b2", &context).unwrap(), context);
    server.cli(&["checkpoint", "delete", "cp2"]).ok();
    assert_eq!(nbd.go("vda@b2"), Err(rep::ERR_INVALID));
    assert_eq!(nbd.set_contexts("vda@b2", &[]).unwrap(), [""; 0]);
    nbd.go("vda@b2").unwrap();
}
