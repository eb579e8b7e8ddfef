//! Metadata contexts: their names, and how they are found.

use stillpoint_tests::raw_nbd::{option, rep};
use stillpoint_tests::{CHUNK, RawNbd, Server};

use crate::peer::{EXPORT, Peer, SIZE};
use crate::rows::rows;
use crate::talk::{
    BASE, ask, context_data, haggles_on, is_error, list, named, selected, server_with_backup, set,
    verdict,
};

rows![
    (
        "contexts-1",
        "NBD_OPT_LIST_META_CONTEXT",
        "LIST without queries names the contexts of an export, of its dirty bitmaps 16 checkpoints at most, and SET takes each",
        Any(a_list_without_queries_names_them_all)
    ),
    (
        "contexts-2",
        "NBD_OPT_LIST_META_CONTEXT",
        "LIST with queries names the contexts that match one of them, and no other",
        Any(a_list_with_queries_names_what_matches)
    ),
    (
        "contexts-3",
        "The base: metadata namespace",
        "`base:` is a wildcard in LIST",
        Any(base_is_a_wildcard_in_a_list)
    ),
    (
        "contexts-4",
        "The base: metadata namespace",
        "A name in `base:` that does not exist is ignored",
        Any(unknown_names_in_base_are_ignored)
    ),
    (
        "contexts-5",
        "NBD_OPT_LIST_META_CONTEXT",
        "Queries in an unknown namespace are ignored",
        Any(unknown_namespaces_are_ignored)
    ),
    (
        "contexts-6",
        "NBD_OPT_LIST_META_CONTEXT",
        "Where no query finds anything the reply is one acknowledgement",
        Any(nothing_found_is_one_acknowledgement)
    ),
    (
        "contexts-7",
        "NBD_OPT_LIST_META_CONTEXT",
        "LIST or SET of which the lengths do not add up is ERR_INVALID",
        Any(queries_that_do_not_add_up_are_invalid)
    ),
    (
        "contexts-8",
        "NBD_OPT_SET_META_CONTEXT",
        "A query that comes twice has one reply, in LIST and in SET",
        Any(a_query_that_comes_twice_has_one_reply)
    ),
    (
        "contexts-9",
        "NBD_OPT_LIST_META_CONTEXT",
        "The ids in the replies to LIST are zero, and LIST selects nothing",
        Any(a_list_has_no_ids_and_selects_nothing)
    ),
    (
        "contexts-10",
        "Metadata querying; Conventions",
        "Names of contexts are a namespace, a colon and a name, in UTF-8 without NUL, of at most \
         4096 bytes",
        Any(names_are_well_formed)
    ),
    (
        "contexts-11",
        "NBD_OPT_LIST_META_CONTEXT",
        "LIST or SET for an export that does not exist fails",
        Any(contexts_of_nothing_are_refused)
    ),
    (
        "contexts-12",
        "NBD_OPT_LIST_META_CONTEXT",
        "Too many queries are served or refused, and the haggling goes on",
        Any(too_many_queries_end_nothing)
    ),
    (
        "contexts-13",
        "Metadata querying; QEMU's nbd.rst",
        "`qemu:` and `qemu:dirty-bitmap:` are wildcards in LIST, and select nothing in SET",
        Ours(the_wildcards_of_qemu_list_and_select_nothing)
    ),
    (
        "contexts-14",
        "Conventions",
        "A query with NUL, of bad UTF-8 or of more than 4096 bytes is refused or ignored, and not \
         echoed",
        Any(a_query_that_is_no_string_finds_nothing)
    ),
    (
        "contexts-15",
        "QEMU's nbd.rst",
        "`qemu:allocation-depth` is 1 throughout, as of any raw image; \
         `qemu:dirty-bitmap:NAME` is 1 where it is dirty and else 0",
        Ours(the_contexts_of_qemu_mean_what_they_do_there)
    ),
    (
        "contexts-16",
        "Conventions; NBD_REP_META_CONTEXT",
        "A name in any UTF-8 is listed, selected and echoed byte for byte",
        Ours(any_utf8_comes_back_as_it_was)
    ),
];

fn a_list_without_queries_names_them_all(peer: Peer) {
    let server = peer.serve();
    let mut nbd = server.structured();
    let names = list(&mut nbd, &[]);
    assert!(names.iter().any(|name| name == BASE));
    for name in names {
        assert_eq!(set(&mut nbd, &[&name]), [name]);
    }
}

fn a_list_with_queries_names_what_matches(peer: Peer) {
    let server = peer.serve();
    let mut nbd = server.structured();
    assert_eq!(list(&mut nbd, &[BASE]), [BASE]);
    assert_eq!(list(&mut nbd, &[BASE, b"other:thing"]), [BASE]);
    assert_eq!(list(&mut nbd, &[b"base:alloc"]), [[0; 0]; 0]);
    assert_eq!(list(&mut nbd, &[b"base:allocation:"]), [[0; 0]; 0]);
}

fn base_is_a_wildcard_in_a_list(peer: Peer) {
    let server = peer.serve();
    assert_eq!(list(&mut server.structured(), &[b"base:"]), [BASE]);
}

fn unknown_names_in_base_are_ignored(peer: Peer) {
    let server = peer.serve();
    let mut nbd = server.structured();
    assert_eq!(list(&mut nbd, &[b"base:nothing", BASE]), [BASE]);
    assert_eq!(set(&mut nbd, &[b"base:nothing", BASE]), [BASE]);
    assert_eq!(selected(&mut nbd), 1);
}

fn unknown_namespaces_are_ignored(peer: Peer) {
    let server = peer.serve();
    let mut nbd = server.structured();
    let unknown: [&[u8]; 4] = [b"x-other:thing", b"x-other:", b"BASE:allocation", BASE];
    assert_eq!(list(&mut nbd, &unknown), [BASE]);
    assert_eq!(set(&mut nbd, &unknown), [BASE]);
}

fn nothing_found_is_one_acknowledgement(peer: Peer) {
    let server = peer.serve();
    let mut nbd = server.structured();
    let data = context_data(EXPORT.as_bytes(), &[b"x-other:thing"]);
    for option in [option::LIST_META_CONTEXT, option::SET_META_CONTEXT] {
        let replies = ask(&mut nbd, option, &data);
        let kinds: Vec<_> = replies.iter().map(|reply| reply.kind).collect();
        assert_eq!(kinds, [rep::ACK]);
    }
    assert_eq!(selected(&mut nbd), 0);
}

fn queries_that_do_not_add_up_are_invalid(peer: Peer) {
    let server = peer.serve();
    let mut nbd = server.structured();
    let mut trailing = context_data(b"vda", &[BASE]);
    trailing.push(0);
    let cases: [&[u8]; 8] = [
        b"",
        b"\0\0\0\x09v\0\0\0\0",
        b"\0\0\0\x03vda",
        b"\0\0\0\x03vda\0\0\0",
        b"\0\0\0\x03vda\0\0\0\x01",
        b"\0\0\0\x03vda\0\0\0\x01\0\0\0\x09base:",
        b"\0\0\0\x03vda\0\0\0\x01\xff\xff\xff\xffbase:",
        &trailing,
    ];
    for option in [option::LIST_META_CONTEXT, option::SET_META_CONTEXT] {
        for data in cases {
            let kind = verdict(&mut nbd, option, data);
            assert_eq!(
                kind,
                rep::ERR_INVALID,
                "option {option}, {data:?}: {kind:#x}"
            );
        }
    }
    haggles_on(&mut nbd);
}

fn a_query_that_comes_twice_has_one_reply(peer: Peer) {
    let server = peer.serve();
    let mut nbd = server.structured();
    assert_eq!(list(&mut nbd, &[BASE, b"base:", BASE]), [BASE], "in LIST");
    assert_eq!(set(&mut nbd, &[BASE, BASE]), [BASE], "in SET");
    assert_eq!(selected(&mut nbd), 1);
}

fn a_list_has_no_ids_and_selects_nothing(peer: Peer) {
    let server = peer.serve();
    let mut nbd = server.structured();
    let data = context_data(EXPORT.as_bytes(), &[]);
    let found = named(&ask(&mut nbd, option::LIST_META_CONTEXT, &data));
    assert!(found.iter().all(|(id, _)| *id == 0), "{found:?}");
    assert_eq!(selected(&mut nbd), 0);
}

fn names_are_well_formed(peer: Peer) {
    let server = peer.serve();
    for name in list(&mut server.structured(), &[]) {
        assert!(name.len() <= 4096 && !name.contains(&0), "{name:?}");
        let name = String::from_utf8(name).expect("UTF-8");
        let (namespace, leaf) = name.split_once(':').expect("a colon");
        assert!(!namespace.is_empty() && !leaf.is_empty(), "{name}");
        assert!(!namespace.contains(char::is_whitespace), "{name}");
    }
}

fn contexts_of_nothing_are_refused(peer: Peer) {
    let server = peer.serve();
    let mut nbd = server.structured();
    let data = context_data(b"nothing", &[BASE]);
    for option in [option::LIST_META_CONTEXT, option::SET_META_CONTEXT] {
        let kind = verdict(&mut nbd, option, &data);
        assert!(is_error(kind), "option {option}: {kind:#x}");
    }
    haggles_on(&mut nbd);
}

fn too_many_queries_end_nothing(peer: Peer) {
    let server = peer.serve();
    let mut nbd = server.structured();
    let queries: Vec<_> = (0..2000).map(|each| format!("x-a:{each}")).collect();
    let queries: Vec<&[u8]> = queries.iter().map(String::as_bytes).collect();
    let data = context_data(EXPORT.as_bytes(), &queries);
    for option in [option::LIST_META_CONTEXT, option::SET_META_CONTEXT] {
        let replies = ask(&mut nbd, option, &data);
        assert_eq!(replies.len(), 1, "nothing is found");
    }
    haggles_on(&mut nbd);
}

fn a_query_that_is_no_string_finds_nothing(peer: Peer) {
    let server = peer.serve();
    let mut nbd = server.structured();
    let long = [b"base:", &[b'x'; 4096][..]].concat();
    for query in [&b"base:allocation\0"[..], b"base:\xff", b"\0", &long] {
        let data = context_data(EXPORT.as_bytes(), &[query]);
        for option in [option::LIST_META_CONTEXT, option::SET_META_CONTEXT] {
            let replies = ask(&mut nbd, option, &data);
            assert_eq!(replies.len(), 1, "option {option}: something is found");
            let text = &replies[0].data;
            assert!(text.len() <= 4096 && !text.contains(&0), "{text:?}");
            str::from_utf8(text).expect("UTF-8");
        }
    }
    haggles_on(&mut nbd);
}

fn the_wildcards_of_qemu_list_and_select_nothing() {
    let server = server_with_backup();
    let mut nbd = RawNbd::connect(&server.frozen());
    nbd.structured_replies();
    let (depth, bitmap) = ("qemu:allocation-depth", "qemu:dirty-bitmap:cp1");
    for export in ["vda@b1", "vda", ""] {
        let mut listed = |query: &str| nbd.list_contexts(export, &[query]).unwrap();
        assert_eq!(listed("qemu:"), [depth, bitmap]);
        assert_eq!(listed("qemu:dirty-bitmap:"), [bitmap]);
        assert_eq!(listed("qemu:dirty"), [""; 0]);
        assert_eq!(listed("qemu:allocation-depth:"), [""; 0]);
        let wildcards = ["qemu:", "qemu:dirty-bitmap:", "base:"];
        let chosen = nbd.set_contexts(export, &wildcards).unwrap();
        assert_eq!(chosen, [""; 0]);
        let unknown = ["qemu:dirty-bitmap:cp9", "qemu:nothing", bitmap];
        assert_eq!(nbd.set_contexts(export, &unknown).unwrap(), [bitmap]);
    }
}

fn the_contexts_of_qemu_mean_what_they_do_there() {
    let server = server_with_backup();
    let (depth, bitmap) = ("qemu:allocation-depth", "qemu:dirty-bitmap:cp1");
    let mut nbd = server.open_frozen("vda@b1", &[depth, bitmap]);
    assert_eq!(nbd.map(depth), [(0, SIZE, 1)]);
    let dirty = (3 * CHUNK, CHUNK, 1);
    let rest = (4 * CHUNK, SIZE - 4 * CHUNK, 0);
    assert_eq!(nbd.map(bitmap), [(0, 3 * CHUNK, 0), dirty, rest]);
}

fn any_utf8_comes_back_as_it_was() {
    let server = Server::with_disk(SIZE);
    // In the order in which they are listed.
    let names = [" ", "e\u{301}", "t\u{e4}glich", "\u{2603} at night: 1/2"];
    let mut begin = Vec::new();
    for name in names {
        server.cli(&["bitmap", "add", "vda", name]).ok();
        begin.extend(["--bitmap", name]);
    }
    server.begin("b1", &begin);
    let contexts = names.map(|name| format!("qemu:dirty-bitmap:{name}"));
    let mut nbd = RawNbd::connect(&server.frozen());
    nbd.structured_replies();
    let listed = nbd.list_contexts("vda@b1", &["qemu:dirty-bitmap:"]);
    assert_eq!(listed.unwrap(), contexts);
    for context in &contexts {
        let chosen = nbd.set_contexts("vda@b1", &[context]).unwrap();
        assert_eq!(chosen, std::slice::from_ref(context));
    }
    // The same letters in other bytes are another name.
    let other = "qemu:dirty-bitmap:\u{e9}";
    assert_eq!(nbd.set_contexts("vda@b1", &[other]).unwrap(), [""; 0]);
}
