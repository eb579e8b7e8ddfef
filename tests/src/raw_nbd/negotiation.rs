//! Options, and what comes of them.

use std::io;

use super::RawNbd;
use super::constants::{info, option, rep};
use super::transmission::{u16_at, u32_at, u64_at};

const OPTION_MAGIC: &[u8; 8] = b"IHAVEOPT";
const OPTION_REPLY_MAGIC: u64 = 0x0003_e889_0455_65a9;

/// A reply to an option.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct OptionReply {
    /// The option it answers.
    pub option: u32,
    /// One of [`rep`].
    pub kind: u32,
    /// The rest.
    pub data: Vec<u8>,
}

/// What a server told about an export.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct Export {
    /// Its size in bytes.
    pub size: u64,
    /// Its transmission flags, of [`can`](super::can).
    pub flags: u16,
    /// Its minimum, preferred and maximum block size, if it told them.
    pub block_sizes: Option<[u32; 3]>,
    /// Its description, if it told one.
    pub description: Option<String>,
}

impl RawNbd {
    /// Sends an option.
    pub fn send_option(&mut self, option: u32, data: &[u8]) {
        let mut message = OPTION_MAGIC.to_vec();
        message.extend(option.to_be_bytes());
        message.extend((data.len() as u32).to_be_bytes());
        message.extend(data);
        self.send_raw(&message).expect("the server reads options");
    }

    /// Receives one reply to an option.
    pub fn option_reply(&mut self) -> io::Result<OptionReply> {
        let magic = self.receiver.u64()?;
        assert_eq!(magic, OPTION_REPLY_MAGIC, "expected a reply to an option");
        let (option, kind) = (self.receiver.u32()?, self.receiver.u32()?);
        let length = self.receiver.u32()?;
        Ok(OptionReply {
            option,
            kind,
            data: self.receiver.bytes(length as usize)?,
        })
    }

    /// Sends an option and receives its replies up to the acknowledgement, or the error.
    pub fn option(&mut self, option: u32, data: &[u8]) -> Result<Vec<OptionReply>, u32> {
        self.send_option(option, data);
        let mut replies = Vec::new();
        loop {
            let reply = self.option_reply().expect("a reply to the option");
            assert_eq!(reply.option, option, "a reply to another option");
            match reply.kind {
                rep::ACK => return Ok(replies),
                kind if kind & 1 << 31 != 0 => return Err(kind),
                _ => replies.push(reply),
            }
        }
    }

    /// Asks for structured replies.
    pub fn structured_replies(&mut self) {
        self.option(option::STRUCTURED_REPLY, &[])
            .expect("structured replies are acknowledged");
        self.receiver.structured = true;
    }

    /// The exports that the server lists, with their descriptions.
    pub fn list(&mut self) -> Result<Vec<(String, String)>, u32> {
        let replies = self.option(option::LIST, &[])?;
        Ok(replies
            .iter()
            .map(|reply| {
                assert_eq!(reply.kind, rep::SERVER);
                let (name, text) = reply.data[4..].split_at(u32_at(&reply.data, 0) as usize);
                (text_of(name), text_of(text))
            })
            .collect())
    }

    /// The contexts of an export that match these queries.
    pub fn list_contexts(&mut self, name: &str, queries: &[&str]) -> Result<Vec<String>, u32> {
        let replies = self.option(option::LIST_META_CONTEXT, &context_queries(name, queries))?;
        Ok(contexts_of(&replies).map(|(_, context)| context).collect())
    }

    /// Selects the contexts of an export that match these queries, and returns them.
    pub fn set_contexts(&mut self, name: &str, queries: &[&str]) -> Result<Vec<String>, u32> {
        let replies = self.option(option::SET_META_CONTEXT, &context_queries(name, queries))?;
        self.contexts = contexts_of(&replies)
            .map(|(id, context)| (context, id))
            .collect();
        Ok(contexts_of(&replies).map(|(_, context)| context).collect())
    }

    /// Asks about an export and stays in the handshake.
    pub fn info(&mut self, name: &str) -> Result<Export, u32> {
        let replies = self.option(option::INFO, &info_request(name))?;
        Ok(export_of(&replies))
    }

    /// Opens an export; requests may follow.
    pub fn go(&mut self, name: &str) -> Result<Export, u32> {
        let replies = self.option(option::GO, &info_request(name))?;
        self.export = export_of(&replies);
        Ok(self.export.clone())
    }

    /// Opens an export in the old way, which has no way to refuse but hanging up.
    pub fn export_name(&mut self, name: &str) -> io::Result<Export> {
        self.send_option(option::EXPORT_NAME, name.as_bytes());
        let (size, flags) = (self.receiver.u64()?, self.receiver.u16()?);
        self.export = Export {
            size,
            flags,
            ..Export::default()
        };
        Ok(self.export.clone())
    }
}

fn info_request(name: &str) -> Vec<u8> {
    let mut data = sized(name);
    let wanted = [info::NAME, info::DESCRIPTION, info::BLOCK_SIZE];
    data.extend((wanted.len() as u16).to_be_bytes());
    data.extend(wanted.iter().flat_map(|kind| kind.to_be_bytes()));
    data
}

fn context_queries(name: &str, queries: &[&str]) -> Vec<u8> {
    let mut data = sized(name);
    data.extend((queries.len() as u32).to_be_bytes());
    data.extend(queries.iter().flat_map(|query| sized(query)));
    data
}

fn sized(text: &str) -> Vec<u8> {
    let mut data = (text.len() as u32).to_be_bytes().to_vec();
    data.extend(text.as_bytes());
    data
}

fn export_of(replies: &[OptionReply]) -> Export {
    let mut export = Export::default();
    let mut described = false;
    for data in replies
        .iter()
        .filter(|reply| reply.kind == rep::INFO)
        .map(|reply| &reply.data)
    {
        match u16_at(data, 0) {
            info::EXPORT => {
                described = true;
                export.size = u64_at(data, 2);
                export.flags = u16_at(data, 10);
            }
            info::DESCRIPTION => export.description = Some(text_of(&data[2..])),
            info::BLOCK_SIZE => {
                export.block_sizes = Some([2, 6, 10].map(|start| u32_at(data, start)));
            }
            _ => {}
        }
    }
    assert!(described, "the size and flags of an export are always told");
    export
}

fn contexts_of(replies: &[OptionReply]) -> impl Iterator<Item = (u32, String)> {
    replies
        .iter()
        .filter(|reply| reply.kind == rep::META_CONTEXT)
        .map(|reply| (u32_at(&reply.data, 0), text_of(&reply.data[4..])))
}

fn text_of(bytes: &[u8]) -> String {
    String::from_utf8(bytes.to_vec()).expect("UTF-8")
}
