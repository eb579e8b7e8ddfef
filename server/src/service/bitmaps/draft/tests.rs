use super::*;

const CHUNK: u64 = 65_536;

fn name(text: &str) -> Name {
    Name::parse(text).unwrap()
}

fn bitmap(text: &str, since: Option<u32>) -> Bitmap {
    let granularity = BitGranularity::new(CHUNK).unwrap();
    Bitmap {
        name: text.to_owned(),
        uuid: Uuid::new_v4(),
        granularity,
        persistent: true,
        revision: 3,
        era: Era::from_number(4),
        in_image: None,
        dirty: Ok(DirtySet {
            bits: Arc::new(Bits::new(granularity)),
            since: since.map(Era::from_number),
        }),
    }
}

/// Disk vda with `on`, which records, `off`, which does not, `busy` and `bad`.
fn draft() -> Draft {
    let all = [
        (bitmap("on", Some(4)), true),
        (bitmap("off", None), true),
        (bitmap("busy", Some(4)), true),
        (bitmap("bad", None), false),
    ];
    let busy = BTreeSet::from([all[2].0.uuid]);
    let bitmaps = all.iter().map(|(bitmap, is_good)| (bitmap, *is_good));
    let disk = DiskDraft::new(8 * CHUNK, CHUNK, bitmaps, &busy);
    Draft::new(BTreeMap::from([(name("vda"), disk)]))
}

fn named(text: &str) -> (String, String) {
    ("vda".to_owned(), text.to_owned())
}

fn clear(text: &str) -> Action {
    let (node, name) = named(text);
    Action::Clear { node, name }
}

fn enable(text: &str) -> Action {
    let (node, name) = named(text);
    Action::Enable { node, name }
}

fn disable(text: &str) -> Action {
    let (node, name) = named(text);
    Action::Disable { node, name }
}

fn remove(text: &str) -> Action {
    let (node, name) = named(text);
    Action::Remove { node, name }
}

fn merge(text: &str, sources: &[&str]) -> Action {
    let (node, target) = named(text);
    let source = |name: &&str| Source {
        node: None,
        name: (*name).to_owned(),
    };
    Action::Merge {
        node,
        target,
        sources: sources.iter().map(source).collect(),
    }
}

/// What becomes of one bitmap: what is recorded, how many parts are eras, and what happens to it.
fn after(actions: &[Action], text: &str) -> (Recording, usize, Fate) {
    let mut draft = draft();
    for action in actions {
        draft.perform(action.clone()).unwrap();
    }
    let disk = &draft.into_disks()[&name("vda")];
    let found = &disk.bitmaps[disk.find(text).unwrap()];
    let eras = found
        .parts
        .iter()
        .filter(|part| matches!(part, Part::Changed(..)));
    (found.recording, eras.count(), found.fate)
}

fn refusal(actions: &[Action]) -> String {
    let mut draft = draft();
    let (last, before) = actions.split_last().unwrap();
    for action in before {
        draft.perform(action.clone()).unwrap();
    }
    draft.perform(last.clone()).unwrap_err().message
}

#[test]
fn what_records_no_more_keeps_what_it_recorded_and_what_begins_again_begins_now() {
    let since = Recording::Since(Era::from_number(4));
    assert_eq!(after(&[], "on"), (since, 0, Fate::Stays));
    assert_eq!(
        after(&[disable("on")], "on"),
        (Recording::Off, 1, Fate::Changes)
    );
    let again = [disable("on"), enable("on")];
    assert_eq!(after(&again, "on"), (Recording::FromNow, 1, Fate::Changes));
    // Enabled already, it goes on from where it was.
    assert_eq!(after(&[enable("on")], "on"), (since, 0, Fate::Changes));
    let off = [enable("off"), disable("off")];
    assert_eq!(after(&off, "off"), (Recording::Off, 0, Fate::Changes));
    let cleared = [disable("on"), clear("on")];
    assert_eq!(after(&cleared, "on"), (Recording::Off, 0, Fate::Changes));
    assert_eq!(
        after(&[clear("on")], "on"),
        (Recording::FromNow, 0, Fate::Changes)
    );
}

#[test]
fn a_merge_takes_what_its_source_has_at_that_point_of_the_transaction() {
    let first = [merge("off", &["on"]), clear("on")];
    assert_eq!(after(&first, "off").1, 1);
    let last = [clear("on"), merge("off", &["on"])];
    assert_eq!(after(&last, "off").1, 0);
    let twice = [disable("on"), merge("off", &["on"])];
    assert_eq!(after(&twice, "off").1, 1);
    assert_eq!(after(&[merge("off", &[])], "off").2, Fate::Stays);
}

#[test]
fn what_is_in_use_is_so_also_by_what_the_transaction_removes() {
    for action in [
        clear("busy"),
        enable("busy"),
        disable("busy"),
        remove("busy"),
    ] {
        assert!(refusal(&[action]).contains("currently in use"));
    }
    for action in [clear("on"), remove("on"), merge("off", &["on"])] {
        assert!(refusal(&[remove("on"), action]).contains("currently in use"));
    }
    let again = Action::Add(Addition {
        node: "vda".to_owned(),
        name: "on".to_owned(),
        ..Addition::default()
    });
    assert_eq!(refusal(&[remove("on"), again]), "Bitmap already exists: on");
    assert_eq!(after(&[remove("bad")], "bad").2, Fate::Leaves);
    assert!(refusal(&[enable("bad")]).contains("inconsistent"));
}

#[test]
fn of_several_things_wrong_with_a_merge_the_one_is_told_that_qemu_tells() {
    assert!(refusal(&[merge("busy", &["none"])]).contains("not found"));
    assert!(refusal(&[merge("busy", &["bad"])]).contains("'busy'"));
    assert!(refusal(&[merge("none", &["none"])]).contains("not found"));
}
