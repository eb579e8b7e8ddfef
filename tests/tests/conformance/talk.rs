//! What rows say to a server, beyond what a polite client does.

use stillpoint_tests::raw_nbd::{OptionReply, command, errno, option, rep};
use stillpoint_tests::{CHUNK, MIB, RawNbd, Server};

use crate::peer::{EXPORT, SIZE};

/// A string with its length before it.
pub(crate) fn sized(text: &[u8]) -> Vec<u8> {
    [&(text.len() as u32).to_be_bytes(), text].concat()
}

/// The data of INFO and GO.
pub(crate) fn info_data(name: &[u8], items: &[u16]) -> Vec<u8> {
    let mut data = sized(name);
    data.extend((items.len() as u16).to_be_bytes());
    data.extend(items.iter().flat_map(|item| item.to_be_bytes()));
    data
}

/// The data of `LIST_META_CONTEXT` and `SET_META_CONTEXT`.
pub(crate) fn context_data(name: &[u8], queries: &[&[u8]]) -> Vec<u8> {
    let mut data = sized(name);
    data.extend((queries.len() as u32).to_be_bytes());
    data.extend(queries.iter().flat_map(|query| sized(query)));
    data
}

/// Sends an option and receives all of its replies, the last included.
#[track_caller]
pub(crate) fn ask(nbd: &mut RawNbd, option: u32, data: &[u8]) -> Vec<OptionReply> {
    nbd.send_option(option, data);
    let mut replies = Vec::new();
    loop {
        let reply = nbd.option_reply().expect("a reply to the option");
        assert_eq!(reply.option, option, "a reply to another option");
        let last = reply.kind == rep::ACK || is_error(reply.kind);
        replies.push(reply);
        if last {
            return replies;
        }
    }
}

/// Sends an option, and returns the type of its last reply.
#[track_caller]
pub(crate) fn verdict(nbd: &mut RawNbd, option: u32, data: &[u8]) -> u32 {
    ask(nbd, option, data).last().expect("there is one").kind
}

/// Whether a reply to an option says that it failed.
pub(crate) fn is_error(kind: u32) -> bool {
    kind & 1 << 31 != 0
}

/// The handshake goes on: the export can still be entered, and read.
#[track_caller]
pub(crate) fn haggles_on(nbd: &mut RawNbd) {
    nbd.go("vda").expect("the handshake goes on");
    in_step(nbd);
}

/// The connection is still in step: it answers, and answers to the point.
#[track_caller]
pub(crate) fn in_step(nbd: &mut RawNbd) {
    let end = nbd.export().size;
    let error = nbd.call((command::READ, 0), end - 512, 512, &[]).error;
    assert!(
        [0, errno::EIO].contains(&error),
        "the connection is out of step: error {error}"
    );
}

/// A request as it stands on the wire.
pub(crate) fn request(
    (command, flags): (u16, u16),
    cookie: u64,
    (offset, length): (u64, u32),
    payload: &[u8],
) -> Vec<u8> {
    let mut bytes = 0x2560_9513u32.to_be_bytes().to_vec();
    bytes.extend(flags.to_be_bytes());
    bytes.extend(command.to_be_bytes());
    bytes.extend(cookie.to_be_bytes());
    bytes.extend(offset.to_be_bytes());
    bytes.extend(length.to_be_bytes());
    bytes.extend(payload);
    bytes
}

/// The context that every server has.
pub(crate) const BASE: &[u8] = b"base:allocation";

/// The ids and names in the replies, the last left out.
#[track_caller]
pub(crate) fn named(replies: &[OptionReply]) -> Vec<(u32, Vec<u8>)> {
    let (last, before) = replies.split_last().expect("there is one");
    assert_eq!(last.kind, rep::ACK, "{:#x}", last.kind);
    let each = before.iter().map(|reply| {
        assert_eq!(reply.kind, rep::META_CONTEXT);
        let (id, name) = reply.data.split_at(4);
        (u32::from_be_bytes(id.try_into().unwrap()), name.to_vec())
    });
    each.collect()
}

/// The contexts that LIST finds.
#[track_caller]
pub(crate) fn list(nbd: &mut RawNbd, queries: &[&[u8]]) -> Vec<Vec<u8>> {
    let data = context_data(EXPORT.as_bytes(), queries);
    let found = named(&ask(nbd, option::LIST_META_CONTEXT, &data));
    found.into_iter().map(|(_, name)| name).collect()
}

/// The contexts that SET selects.
#[track_caller]
pub(crate) fn set(nbd: &mut RawNbd, queries: &[&[u8]]) -> Vec<Vec<u8>> {
    let data = context_data(EXPORT.as_bytes(), queries);
    let found = named(&ask(nbd, option::SET_META_CONTEXT, &data));
    found.into_iter().map(|(_, name)| name).collect()
}

/// How many contexts a block status in this session is about.
#[track_caller]
pub(crate) fn selected(nbd: &mut RawNbd) -> usize {
    nbd.go(EXPORT).expect("the export");
    let answer = nbd.call((command::BLOCK_STATUS, 0), 0, 4096, &[]);
    match answer.error {
        0 => answer.extents().unwrap().len(),
        error => {
            assert_eq!(error, errno::EINVAL);
            0
        }
    }
}

/// A server with data on `vda`, a checkpoint `cp1`, a change since, and a backup `b1`.
pub(crate) fn server_with_backup() -> Server {
    let server = Server::with_disk(SIZE);
    let mut nbd = server.open_live("vda");
    nbd.write(0, &vec![1; MIB as usize]).unwrap();
    server.checkpoint("cp1");
    nbd.write(3 * CHUNK, &[2; 4096]).unwrap();
    server.begin("b1", &["--since", "cp1"]);
    server
}
