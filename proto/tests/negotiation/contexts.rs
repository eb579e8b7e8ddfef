//! Choosing metadata contexts.

use crate::proto::{ContextId, OPTION_DATA_MAX, QUERIES_MAX};
use crate::talk::{Talk, contexts, info, kinds, named};
use crate::wire::*;

#[test]
fn contexts_need_structured_replies() {
    let mut talk = Talk::new(3);
    for option in [LIST_META_CONTEXT, SET_META_CONTEXT] {
        let answers = talk.ask(option, &contexts("vda", &["base:allocation"]));
        assert_eq!(kinds(&answers), [ERR_INVALID]);
    }
}

#[test]
fn listing_contexts_knows_wildcards_and_full_names() {
    let mut talk = Talk::structured();
    for (queries, found) in [
        (&[][..], &["base:allocation", "qemu:dirty-bitmap:cp1"][..]),
        (&["base:"], &["base:allocation"]),
        (
            &["qemu:", "qemu:dirty-bitmap:", "qemu:dirty-bitmap:cp1"],
            &["qemu:dirty-bitmap:cp1"],
        ),
        (&["qemu:dirty-bitmap:old"], &["qemu:dirty-bitmap:old"]),
        (&["other:", "base", "base:alloc", ""], &[]),
    ] {
        let answers = talk.ask(LIST_META_CONTEXT, &contexts("vda", queries));
        let names: Vec<_> = named(&answers).into_iter().map(|(_, name)| name).collect();
        assert_eq!(names, found, "{queries:?}");
    }
    assert_eq!(
        kinds(&talk.ask(LIST_META_CONTEXT, &contexts("no", &[]))),
        [ERR_UNKNOWN]
    );
}

#[test]
fn setting_contexts_takes_full_names_only_and_each_once() {
    let mut talk = Talk::structured();
    let queries = [
        "base:",
        "qemu:dirty-bitmap:old",
        "qemu:",
        "base:allocation",
        "qemu:dirty-bitmap:old",
        "other:thing",
        "qemu:dirty-bitmap:",
    ];
    let answers = talk.ask(SET_META_CONTEXT, &contexts("vda", &queries));
    assert_eq!(
        named(&answers),
        [
            (1, "qemu:dirty-bitmap:old".to_owned()),
            (2, "base:allocation".to_owned())
        ]
    );
    let session = talk.go("vda");
    assert_eq!(
        session.contexts,
        [
            (ContextId(1), "qemu:dirty-bitmap:old"),
            (ContextId(2), "base:allocation")
        ]
    );
}

#[test]
fn a_choice_lasts_until_another_is_attempted() {
    let base = contexts("vda", &["base:allocation"]);
    let too_many = contexts("vda", &vec!["base:allocation"; QUERIES_MAX as usize + 1]);
    let oversized = vec![0; OPTION_DATA_MAX as usize + 1];
    let cases: [(u32, &[u8], usize); 7] = [
        (INFO, &info("no", &[]), 1),
        (GO, &info("no", &[]), 1),
        (LIST_META_CONTEXT, &contexts("no", &[]), 1),
        (SET_META_CONTEXT, &contexts("no", &["base:allocation"]), 0),
        (SET_META_CONTEXT, &contexts("vda", &[]), 0),
        (SET_META_CONTEXT, &too_many, 0),
        (SET_META_CONTEXT, &oversized, 0),
    ];
    for (option, data, left) in cases {
        let mut talk = Talk::structured();
        talk.ask(SET_META_CONTEXT, &base);
        talk.ask(option, data);
        assert_eq!(talk.go("vda").contexts.len(), left, "after option {option}");
    }
}

#[test]
fn contexts_chosen_for_another_name_do_not_count() {
    let mut talk = Talk::structured();
    talk.ask(SET_META_CONTEXT, &contexts("", &["base:allocation"]));
    assert!(talk.go("vda").contexts.is_empty());
}

#[test]
fn an_export_is_not_entered_when_a_chosen_context_has_gone() {
    let mut talk = Talk::structured();
    talk.ask(
        SET_META_CONTEXT,
        &contexts("vda", &["qemu:dirty-bitmap:old"]),
    );
    talk.old_is_gone.set(true);
    assert_eq!(kinds(&talk.ask(GO, &info("vda", &[]))), [ERR_INVALID]);
    talk.ask(SET_META_CONTEXT, &contexts("vda", &[]));
    talk.go("vda");
}
