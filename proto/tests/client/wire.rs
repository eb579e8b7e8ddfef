//! A server's side by hand, from `proto.md` and not from the crate.

pub(crate) const STRUCTURED_REPLY: u32 = 8;
pub(crate) const ABORT: u32 = 2;
pub(crate) const LIST: u32 = 3;
pub(crate) const STARTTLS: u32 = 5;
pub(crate) const INFO: u32 = 6;
pub(crate) const GO: u32 = 7;
pub(crate) const LIST_META_CONTEXT: u32 = 9;
pub(crate) const SET_META_CONTEXT: u32 = 10;

pub(crate) const EXTENDED_HEADERS: u32 = 11;

pub(crate) const ACK: u32 = 1;
pub(crate) const REP_SERVER: u32 = 2;
pub(crate) const REP_INFO: u32 = 3;
pub(crate) const META_CONTEXT: u32 = 4;
pub(crate) const ERR_UNSUP: u32 = 0x8000_0001;
pub(crate) const ERR_TLS_REQD: u32 = 0x8000_0005;
pub(crate) const ERR_UNKNOWN: u32 = 0x8000_0006;

pub(crate) const HAS_FLAGS: u16 = 1;
pub(crate) const READ_ONLY: u16 = 1 << 1;
pub(crate) const SEND_FLUSH: u16 = 1 << 2;
pub(crate) const SEND_FUA: u16 = 1 << 3;
pub(crate) const SEND_TRIM: u16 = 1 << 5;
pub(crate) const SEND_WRITE_ZEROES: u16 = 1 << 6;
pub(crate) const SEND_DF: u16 = 1 << 7;
pub(crate) const SEND_CACHE: u16 = 1 << 10;
pub(crate) const SEND_FAST_ZERO: u16 = 1 << 11;
pub(crate) const BLOCK_STATUS_PAYLOAD: u16 = 1 << 12;
pub(crate) const EVERYTHING: u16 = HAS_FLAGS
    | SEND_FLUSH
    | SEND_FUA
    | SEND_TRIM
    | SEND_WRITE_ZEROES
    | SEND_DF
    | SEND_CACHE
    | SEND_FAST_ZERO
    | BLOCK_STATUS_PAYLOAD;

pub(crate) const DONE: u16 = 1;
pub(crate) const NONE: u16 = 0;
pub(crate) const OFFSET_DATA: u16 = 1;
pub(crate) const OFFSET_HOLE: u16 = 2;
pub(crate) const BLOCK_STATUS: u16 = 5;
pub(crate) const BLOCK_STATUS_EXT: u16 = 6;
pub(crate) const ERROR: u16 = 0x8001;
pub(crate) const ERROR_OFFSET: u16 = 0x8002;

pub(crate) const FIXED: u16 = 1;
pub(crate) const NO_ZEROES: u16 = 2;

pub(crate) fn greeting(flags: u16) -> Vec<u8> {
    [&b"NBDMAGICIHAVEOPT"[..], &flags.to_be_bytes()].concat()
}

pub(crate) fn answer(option: u32, kind: u32, data: &[u8]) -> Vec<u8> {
    [
        &0x0003_e889_0455_65a9_u64.to_be_bytes()[..],
        &option.to_be_bytes(),
        &kind.to_be_bytes(),
        &(data.len() as u32).to_be_bytes(),
        data,
    ]
    .concat()
}

pub(crate) fn listed(name: &[u8], description: &[u8]) -> Vec<u8> {
    let length = (name.len() as u32).to_be_bytes();
    answer(LIST, REP_SERVER, &[&length[..], name, description].concat())
}

pub(crate) fn context(option: u32, id: u32, name: &str) -> Vec<u8> {
    let data = [&id.to_be_bytes()[..], name.as_bytes()].concat();
    answer(option, META_CONTEXT, &data)
}

pub(crate) fn info(option: u32, item: u16, data: &[u8]) -> Vec<u8> {
    answer(option, REP_INFO, &[&item.to_be_bytes()[..], data].concat())
}

pub(crate) fn info_export(option: u32, size: u64, flags: u16) -> Vec<u8> {
    let data = [&size.to_be_bytes()[..], &flags.to_be_bytes()].concat();
    info(option, 0, &data)
}

pub(crate) fn info_block_size(option: u32, sizes: [u32; 3]) -> Vec<u8> {
    info(option, 3, &sizes.map(u32::to_be_bytes).concat())
}

pub(crate) fn simple(cookie: u64, error: u32, data: &[u8]) -> Vec<u8> {
    [
        &0x6744_6698_u32.to_be_bytes()[..],
        &error.to_be_bytes(),
        &cookie.to_be_bytes(),
        data,
    ]
    .concat()
}

pub(crate) fn chunk(cookie: u64, flags: u16, kind: u16, payload: &[u8]) -> Vec<u8> {
    let mut bytes = chunk_header(cookie, flags, kind, payload.len() as u32);
    bytes.extend(payload);
    bytes
}

pub(crate) fn chunk_header(cookie: u64, flags: u16, kind: u16, length: u32) -> Vec<u8> {
    [
        &0x668e_33ef_u32.to_be_bytes()[..],
        &flags.to_be_bytes(),
        &kind.to_be_bytes(),
        &cookie.to_be_bytes(),
        &length.to_be_bytes(),
    ]
    .concat()
}

/// An extended chunk, which repeats where the request starts.
pub(crate) fn extended(cookie: u64, offset: u64, flags: u16, kind: u16, payload: &[u8]) -> Vec<u8> {
    let mut bytes = extended_header(cookie, offset, flags, kind, payload.len() as u64);
    bytes.extend(payload);
    bytes
}

pub(crate) fn extended_header(
    cookie: u64,
    offset: u64,
    flags: u16,
    kind: u16,
    length: u64,
) -> Vec<u8> {
    [
        &0x6e8a_278c_u32.to_be_bytes()[..],
        &flags.to_be_bytes(),
        &kind.to_be_bytes(),
        &cookie.to_be_bytes(),
        &offset.to_be_bytes(),
        &length.to_be_bytes(),
    ]
    .concat()
}

pub(crate) fn extended_status(
    cookie: u64,
    (offset, flags): (u64, u16),
    context: u32,
    extents: &[(u64, u64)],
) -> Vec<u8> {
    let mut payload = context.to_be_bytes().to_vec();
    payload.extend((extents.len() as u32).to_be_bytes());
    for (length, flags) in extents {
        payload.extend(length.to_be_bytes());
        payload.extend(flags.to_be_bytes());
    }
    extended(cookie, offset, flags, BLOCK_STATUS_EXT, &payload)
}

pub(crate) fn data(cookie: u64, flags: u16, offset: u64, data: &[u8]) -> Vec<u8> {
    let payload = [&offset.to_be_bytes()[..], data].concat();
    chunk(cookie, flags, OFFSET_DATA, &payload)
}

pub(crate) fn hole(cookie: u64, flags: u16, offset: u64, length: u32) -> Vec<u8> {
    let payload = [&offset.to_be_bytes()[..], &length.to_be_bytes()].concat();
    chunk(cookie, flags, OFFSET_HOLE, &payload)
}

pub(crate) fn status(cookie: u64, flags: u16, context: u32, extents: &[(u32, u32)]) -> Vec<u8> {
    let mut payload = context.to_be_bytes().to_vec();
    for (length, flags) in extents {
        payload.extend(length.to_be_bytes());
        payload.extend(flags.to_be_bytes());
    }
    chunk(cookie, flags, BLOCK_STATUS, &payload)
}

pub(crate) fn error(cookie: u64, flags: u16, number: u32, text: &str) -> Vec<u8> {
    chunk(cookie, flags, ERROR, &error_payload(number, text))
}

pub(crate) fn error_at(cookie: u64, flags: u16, number: u32, text: &str, offset: u64) -> Vec<u8> {
    let payload = [&error_payload(number, text)[..], &offset.to_be_bytes()].concat();
    chunk(cookie, flags, ERROR_OFFSET, &payload)
}

fn error_payload(number: u32, text: &str) -> Vec<u8> {
    let length = (text.len() as u16).to_be_bytes();
    [&number.to_be_bytes()[..], &length, text.as_bytes()].concat()
}
