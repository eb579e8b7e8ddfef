//! What the server answers to an option, from values to bytes.

use bytes::{BufMut, BytesMut};

use crate::export::{ExportInfo, Listed};
use crate::extents::ContextId;
use crate::option::Declined;
use crate::string::clip;
use crate::wire::{OPTION_REPLY_MAGIC, answer, info};

/// Writes the answers to one option.
pub(crate) struct Answers<'a> {
    option: u32,
    output: &'a mut BytesMut,
}

impl<'a> Answers<'a> {
    pub(crate) fn to(option: u32, output: &'a mut BytesMut) -> Self {
        Self { option, output }
    }

    /// Ends the answers to an option that did what was asked.
    pub(crate) fn acknowledge(&mut self) {
        self.put(answer::ACK, &[]);
    }

    /// Ends the answers to an option that did not.
    pub(crate) fn decline(&mut self, declined: &Declined) {
        self.put(declined.answer, &[clip(&declined.text).as_bytes()]);
    }

    /// Names an export.
    pub(crate) fn server(&mut self, listed: &Listed) {
        let name = clip(&listed.name);
        let length = name.len() as u32;
        let description = clip(listed.description.as_deref().unwrap_or_default());
        self.put(
            answer::SERVER,
            &[
                &length.to_be_bytes(),
                name.as_bytes(),
                description.as_bytes(),
            ],
        );
    }

    /// Describes an export: what everyone must know, then what was asked for.
    pub(crate) fn describe(&mut self, export: &ExportInfo, items: &[u16]) {
        self.info(
            info::EXPORT,
            &[
                &export.size.to_be_bytes(),
                &export.flags.bits().to_be_bytes(),
            ],
        );
        // Sent unasked too: a client that did not think of it may still heed it.
        let block_size = export.block_size;
        self.info(
            info::BLOCK_SIZE,
            &[
                &block_size.minimum().to_be_bytes(),
                &block_size.preferred().to_be_bytes(),
                &block_size.maximum().to_be_bytes(),
            ],
        );
        if items.contains(&info::NAME) {
            self.info(info::NAME, &[clip(&export.name).as_bytes()]);
        }
        match &export.description {
            Some(text) if items.contains(&info::DESCRIPTION) => {
                self.info(info::DESCRIPTION, &[clip(text).as_bytes()]);
            }
            _ => {}
        }
    }

    /// Names a metadata context that could be selected.
    pub(crate) fn listed_context(&mut self, name: &str) {
        self.put(answer::META_CONTEXT, &[&[0; 4], clip(name).as_bytes()]);
    }

    /// Names a metadata context that was selected.
    pub(crate) fn selected_context(&mut self, id: ContextId, name: &str) {
        self.put(
            answer::META_CONTEXT,
            &[&id.0.to_be_bytes(), clip(name).as_bytes()],
        );
    }

    fn info(&mut self, item: u16, parts: &[&[u8]]) {
        let item = item.to_be_bytes();
        let parts: Vec<&[u8]> = [&item[..]]
            .into_iter()
            .chain(parts.iter().copied())
            .collect();
        self.put(answer::INFO, &parts);
    }

    fn put(&mut self, kind: u32, parts: &[&[u8]]) {
        let length: usize = parts.iter().map(|part| part.len()).sum();
        self.output.put_u64(OPTION_REPLY_MAGIC);
        self.output.put_u32(self.option);
        self.output.put_u32(kind);
        self.output.put_u32(length as u32);
        for part in parts {
            self.output.put_slice(part);
        }
    }
}
