//! Both ends of a negotiation: a catalog, and a client that can be told what to ask.

use std::cell::Cell;
use std::rc::Rc;

use bytes::{Buf, BufMut, BytesMut};

use crate::proto::{
    BlockSize, Catalog, Denied, ExportInfo, Listed, Negotiation, Session, Step, TlsMode,
    TransmissionFlags, Violation,
};
use crate::wire::*;

/// One export under two names, and some that are not to be had.
pub(crate) struct Shelf {
    old_is_gone: Rc<Cell<bool>>,
}

impl Catalog for Shelf {
    type Export = &'static str;
    type Context = &'static str;

    fn list(&self) -> Vec<Listed> {
        vec![Listed {
            name: "vda".into(),
            description: Some("a disk".into()),
        }]
    }

    fn open(&self, name: &str) -> Result<(Self::Export, ExportInfo), Denied> {
        match name {
            "vda" | "" => Ok((
                "vda",
                ExportInfo {
                    name: "vda".into(),
                    description: Some("a disk".into()),
                    size: 1 << 20,
                    flags: TransmissionFlags::SEND_DF | TransmissionFlags::BLOCK_STATUS_PAYLOAD,
                    block_size: BlockSize::default(),
                },
            )),
            "mine" => Err(Denied::Policy("not yours".into())),
            "late" => Err(Denied::Shutdown),
            _ => Err(Denied::Unknown),
        }
    }

    fn listed_contexts(&self, _export: &Self::Export) -> Vec<String> {
        vec!["base:allocation".into(), "qemu:dirty-bitmap:cp1".into()]
    }

    fn find_context(&self, _export: &Self::Export, name: &str) -> Option<Self::Context> {
        if name == "qemu:dirty-bitmap:old" && self.old_is_gone.get() {
            return None;
        }
        [
            "base:allocation",
            "qemu:dirty-bitmap:cp1",
            "qemu:dirty-bitmap:old",
        ]
        .into_iter()
        .find(|known| *known == name)
    }
}

pub(crate) struct Talk {
    negotiation: Negotiation<Shelf>,
    pub(crate) old_is_gone: Rc<Cell<bool>>,
    pub(crate) input: BytesMut,
    pub(crate) output: BytesMut,
}

impl Talk {
    pub(crate) fn empty() -> Self {
        Self::with_tls(TlsMode::Off)
    }

    pub(crate) fn with_tls(mode: TlsMode) -> Self {
        let old_is_gone = Rc::new(Cell::new(false));
        let shelf = Shelf {
            old_is_gone: Rc::clone(&old_is_gone),
        };
        let negotiation = Negotiation::with_tls(shelf, mode);
        Self {
            negotiation,
            old_is_gone,
            input: BytesMut::new(),
            output: BytesMut::new(),
        }
    }

    pub(crate) fn new(client_flags: u32) -> Self {
        let mut talk = Self::empty();
        talk.input.put_u32(client_flags);
        talk
    }

    pub(crate) fn structured() -> Self {
        let mut talk = Self::new(3);
        talk.ask(STRUCTURED_REPLY, b"");
        talk
    }

    pub(crate) fn extended() -> Self {
        let mut talk = Self::new(3);
        talk.ask(EXTENDED_HEADERS, b"");
        talk
    }

    pub(crate) fn advance(&mut self) -> Result<Step<Shelf>, Violation> {
        self.negotiation.advance(&mut self.input, &mut self.output)
    }

    pub(crate) fn shut_down(&mut self) {
        self.negotiation.shut_down();
    }

    pub(crate) fn ask(&mut self, option: u32, data: &[u8]) -> Vec<(u32, Vec<u8>)> {
        self.input
            .put_slice(&option_header(option, data.len() as u32));
        self.input.put_slice(data);
        assert!(
            matches!(self.advance(), Ok(Step::NeedMore)),
            "option {option}"
        );
        self.answers()
    }

    pub(crate) fn go(&mut self, name: &str) -> Session<Shelf> {
        let data = info(name, &[]);
        self.input.put_slice(&option_header(GO, data.len() as u32));
        self.input.put_slice(&data);
        let Ok(Step::Ready(session)) = self.advance() else {
            panic!("cannot enter {name:?}")
        };
        assert_eq!(kinds(&self.answers()), [REP_INFO, REP_INFO, ACK]);
        session
    }

    pub(crate) fn answers(&mut self) -> Vec<(u32, Vec<u8>)> {
        let mut answers = Vec::new();
        while self.output.has_remaining() {
            assert_eq!(self.output.get_u64(), 0x0003_e889_0455_65a9);
            let _option = self.output.get_u32();
            let kind = self.output.get_u32();
            let length = self.output.get_u32() as usize;
            answers.push((kind, self.output.split_to(length).to_vec()));
        }
        answers
    }
}

pub(crate) fn kinds(answers: &[(u32, Vec<u8>)]) -> Vec<u32> {
    answers.iter().map(|(kind, _)| *kind).collect()
}

pub(crate) fn named(answers: &[(u32, Vec<u8>)]) -> Vec<(u32, String)> {
    let (end, contexts) = answers.split_last().unwrap();
    assert_eq!(end, &(ACK, vec![]));
    contexts
        .iter()
        .map(|(kind, data)| {
            assert_eq!(*kind, META_CONTEXT);
            (
                (&data[..]).get_u32(),
                String::from_utf8(data[4..].to_vec()).unwrap(),
            )
        })
        .collect()
}

pub(crate) fn option_header(option: u32, length: u32) -> Vec<u8> {
    [
        &b"IHAVEOPT"[..],
        &option.to_be_bytes(),
        &length.to_be_bytes(),
    ]
    .concat()
}

pub(crate) fn counted(text: &str) -> Vec<u8> {
    [&(text.len() as u32).to_be_bytes()[..], text.as_bytes()].concat()
}

pub(crate) fn info(name: &str, items: &[u16]) -> Vec<u8> {
    let mut data = counted(name);
    data.put_u16(items.len() as u16);
    for item in items {
        data.put_u16(*item);
    }
    data
}

pub(crate) fn contexts(name: &str, queries: &[&str]) -> Vec<u8> {
    let mut data = counted(name);
    data.put_u32(queries.len() as u32);
    for query in queries {
        data.extend(counted(query));
    }
    data
}
