//! What a client asks before it enters an export, from values to bytes.

use bytes::{BufMut, BytesMut};

use crate::string::STRING_MAX;
use crate::wire::{OPTION_MAGIC, info};

/// Asks without any data.
pub(crate) fn put_bare(output: &mut BytesMut, option: u32) {
    put_header(output, option, 0);
}

/// Asks about an export, for all that can be told, or enters it.
pub(crate) fn put_export(output: &mut BytesMut, option: u32, export: &str) {
    put_header(output, option, 4 + export.len() + 2 + 2 * INFO_ITEMS.len());
    put_string(output, export);
    output.put_u16(INFO_ITEMS.len() as u16);
    for item in INFO_ITEMS {
        output.put_u16(item);
    }
}

/// Enters an export the old way.
pub(crate) fn put_export_name(output: &mut BytesMut, option: u32, export: &str) {
    put_header(output, option, export.len());
    output.put_slice(export.as_bytes());
}

/// Lists or selects contexts of an export.
pub(crate) fn put_contexts(output: &mut BytesMut, option: u32, export: &str, queries: &[String]) {
    let queries_length: usize = queries.iter().map(|query| 4 + query.len()).sum();
    put_header(output, option, 4 + export.len() + 4 + queries_length);
    put_string(output, export);
    output.put_u32(queries.len() as u32);
    for query in queries {
        put_string(output, query);
    }
}

/// Whether this may be sent as a string.
pub(crate) fn is_string(text: &str) -> bool {
    text.len() <= STRING_MAX && !text.contains('\0')
}

fn put_header(output: &mut BytesMut, option: u32, length: usize) {
    output.put_u64(OPTION_MAGIC);
    output.put_u32(option);
    output.put_u32(u32::try_from(length).expect("strings and their number are limited"));
}

fn put_string(output: &mut BytesMut, text: &str) {
    output.put_u32(text.len() as u32);
    output.put_slice(text.as_bytes());
}

/// Asking for the block size is a promise to heed it.
const INFO_ITEMS: [u16; 3] = [info::NAME, info::DESCRIPTION, info::BLOCK_SIZE];
