//! Where other people's servers do otherwise than the protocol says, and what they do instead.

use std::collections::BTreeMap;
use std::env;

use stillpoint_tests::tools::tool;

use crate::SECTIONS;
use crate::peer::Peer::{self, Nbdkit, QemuNbd};

use When::{Always, Sometimes};

/// One row that another server does not keep.
pub(crate) struct Deviation {
    pub(crate) peer: Peer,
    /// The row.
    pub(crate) id: &'static str,
    /// What it does instead, for people.
    pub(crate) instead: &'static str,
    /// What the test of the row says then, or a part of it.
    pub(crate) says: &'static str,
    /// Whether it always does.
    pub(crate) when: When,
}

/// When another server does not keep a row.
pub(crate) enum When {
    Always,
    /// It depends on who is quicker.
    Sometimes,
}

/// What is known.
pub(crate) const DEVIATIONS: &[Deviation] = &[
    deviation(
        QemuNbd,
        "handshake-5",
        Always,
        "EXPORT_NAME of `vda` and a NUL is taken for `vda`",
        r#"an answer to "vda\0""#,
    ),
    deviation(
        QemuNbd,
        "options-10",
        Always,
        "a name of bad UTF-8 is echoed in the text of the error",
        "UTF-8: ",
    ),
    deviation(
        QemuNbd,
        "contexts-7",
        Always,
        "data after the last query of LIST and SET are ignored",
        "option 9",
    ),
    deviation(
        QemuNbd,
        "transmission-3",
        Sometimes,
        "what is outstanding at DISC is not answered, if the device is slower than the good-bye",
        "not everything is answered",
    ),
    deviation(
        QemuNbd,
        "transmission-5",
        Always,
        "a write of more than 32 MiB ends the connection",
        "",
    ),
    deviation(
        QemuNbd,
        "replies-11",
        Always,
        "a read of which the storage fails ends the connection, where replies are structured",
        "UnexpectedEof",
    ),
    deviation(
        QemuNbd,
        "errors-1",
        Always,
        "a write past the end is EINVAL",
        "Err(22)",
    ),
    deviation(
        QemuNbd,
        "errors-4",
        Always,
        "a write to a read-only export is EINVAL",
        "Err(22)",
    ),
    deviation(
        QemuNbd,
        "errors-10",
        Always,
        "as in errors-1 and errors-4: the payload is read past, with another error",
        "left: 22",
    ),
    deviation(
        QemuNbd,
        "errors-11",
        Always,
        "as in replies-11: the connection is gone",
        "UnexpectedEof",
    ),
    deviation(
        QemuNbd,
        "errors-13",
        Always,
        "as in replies-11: the connection is gone",
        "UnexpectedEof",
    ),
    deviation(
        Nbdkit,
        "options-10",
        Always,
        "a name of bad UTF-8 is taken by LIST and SET of contexts (1.32), or echoed (1.42)",
        "",
    ),
    deviation(
        Nbdkit,
        "information-15",
        Sometimes,
        "FAST_ZERO where it was not offered ends the whole server: an assertion (1.32)",
        "",
    ),
    deviation(
        Nbdkit,
        "contexts-7",
        Always,
        "data after the last query of LIST and SET are ignored",
        "option 9",
    ),
    deviation(
        Nbdkit,
        "contexts-8",
        Always,
        "a query that comes twice in LIST has two replies",
        "in LIST",
    ),
    deviation(
        Nbdkit,
        "selection-6",
        Always,
        "SET for an export that does not exist succeeds, and selects",
        "it does not fail",
    ),
    deviation(
        Nbdkit,
        "selection-8",
        Always,
        "INFO of another export makes the selection forgotten",
        "after option 6",
    ),
    deviation(
        Nbdkit,
        "contexts-11",
        Always,
        "LIST and SET of contexts succeed for an export that does not exist",
        "option 9",
    ),
    deviation(
        Nbdkit,
        "replies-10",
        Always,
        "errors of anything but reads and block status come as simple replies",
        "a simple reply",
    ),
    deviation(
        Nbdkit,
        "transmission-3",
        Sometimes,
        "what is outstanding at DISC may be answered with ESHUTDOWN",
        "given up",
    ),
];

const fn deviation(
    peer: Peer,
    id: &'static str,
    when: When,
    instead: &'static str,
    says: &'static str,
) -> Deviation {
    Deviation {
        peer,
        id,
        instead,
        says,
        when,
    }
}

#[test]
fn qemu_nbd_deviates_where_the_list_says() {
    deviates_where_the_list_says(QemuNbd);
}

#[test]
fn nbdkit_deviates_where_the_list_says() {
    deviates_where_the_list_says(Nbdkit);
}

fn deviates_where_the_list_says(peer: Peer) {
    let of_peer = DEVIATIONS.iter().filter(|each| each.peer == peer);
    let known: BTreeMap<_, _> = of_peer.map(|each| (each.id, each)).collect();
    // For whoever looks into one of them.
    let only = env::var("STILLPOINT_ROW").ok();
    let rows = SECTIONS.iter().flat_map(|(_, rows)| *rows);
    let mut wrong = Vec::new();
    for row in rows.filter(|row| only.as_ref().is_none_or(|only| row.id == only)) {
        let found = row.check.against(peer);
        let is_right = match (&found, known.get(row.id)) {
            (None, None) => true,
            (None, Some(expected)) => matches!(expected.when, Sometimes),
            (Some(_), None) => false,
            (Some(found), Some(expected)) => found.contains(expected.says),
        };
        if !is_right {
            wrong.push(format!("{}: {found:.300?}", row.id));
        }
    }
    let version = tool(peer.program(), &["--version"]).stdout;
    assert!(wrong.is_empty(), "{version}\n{}", wrong.join("\n"));
}
