//! What a server tells about an export before it is entered, put together and checked.

use bytes::Buf;

use super::answer::{RawAnswer, description, name};
use super::violation::ServerViolation;
use crate::export::{BlockSize, ExportInfo, TransmissionFlags as Flags};
use crate::headers::Headers;
use crate::wire::info;

/// What has been told about one export so far.
#[derive(Debug, Default)]
pub(crate) struct Description {
    export: Option<(u64, Flags)>,
    name: Option<String>,
    text: Option<String>,
    block_size: Option<BlockSize>,
}

impl Description {
    /// Takes in one more thing that was told. What is not understood is passed over, as the
    /// protocol demands.
    pub(crate) fn add(&mut self, raw: &RawAnswer) -> Result<(), ServerViolation> {
        let mut data = raw.data.clone();
        let item = data.try_get_u16().map_err(|_| raw.wrong_length())?;
        match item {
            info::EXPORT if data.len() == 10 => {
                let size = data.get_u64();
                let flags = Flags::from_bits(data.get_u16());
                once(&mut self.export, (checked_size(size)?, flags), item)
            }
            info::NAME => once(&mut self.name, name(&data)?, item),
            info::DESCRIPTION => match description(&data) {
                Some(text) => once(&mut self.text, text, item),
                None => Ok(()),
            },
            info::BLOCK_SIZE if data.len() == 12 => {
                let (minimum, preferred, maximum) =
                    (data.get_u32(), data.get_u32(), data.get_u32());
                let wrong = ServerViolation::BlockSize {
                    minimum,
                    preferred,
                    maximum,
                };
                let sizes = BlockSize::new(minimum, preferred, maximum).ok_or(wrong)?;
                once(&mut self.block_size, sizes, item)
            }
            info::EXPORT | info::BLOCK_SIZE => Err(raw.wrong_length()),
            _ => Ok(()),
        }
    }

    /// All of it, for an export that was asked for as `asked`.
    pub(crate) fn finish(
        self,
        asked: &str,
        headers: Headers,
        contexts: usize,
    ) -> Result<ExportInfo, ServerViolation> {
        let (size, flags) = self.export.ok_or(ServerViolation::NoExport)?;
        Ok(ExportInfo {
            name: self.name.unwrap_or_else(|| asked.to_owned()),
            description: self.text,
            size,
            flags: believed(flags, headers, contexts),
            block_size: self.block_size.unwrap_or_default(),
        })
    }
}

/// What is known of an export that was entered the old way.
pub(crate) fn undescribed(
    asked: &str,
    (size, flags): (u64, u16),
    headers: Headers,
    contexts: usize,
) -> Result<ExportInfo, ServerViolation> {
    Ok(ExportInfo {
        name: asked.to_owned(),
        description: None,
        size: checked_size(size)?,
        flags: believed(Flags::from_bits(flags), headers, contexts),
        block_size: BlockSize::default(),
    })
}

/// Said again it must be the same.
fn once<T: PartialEq>(known: &mut Option<T>, told: T, item: u16) -> Result<(), ServerViolation> {
    match known {
        Some(known) if *known != told => Err(ServerViolation::Contradiction(item)),
        _ => {
            *known = Some(told);
            Ok(())
        }
    }
}

/// Offsets in files and in most programs are signed.
fn checked_size(size: u64) -> Result<u64, ServerViolation> {
    if i64::try_from(size).is_ok() {
        Ok(size)
    } else {
        Err(ServerViolation::ExportSize(size))
    }
}

/// A feature that contradicts another, or that was not negotiated, is one that will not be used.
/// Without the flag that says that there are flags there is nothing but the warning not to write.
fn believed(flags: Flags, headers: Headers, contexts: usize) -> Flags {
    let flags = if flags.contains(Flags::HAS_FLAGS) {
        flags
    } else if flags.contains(Flags::READ_ONLY) {
        Flags::READ_ONLY
    } else {
        Flags::default()
    };
    flags.offered(headers, contexts)
}
