//! Any bytes from a client that is choosing an export: where the stream is cut makes no difference.
#![no_main]

use bytes::BytesMut;
use libfuzzer_sys::fuzz_target;
use proto::{
    BlockSize, Catalog, Denied, ExportInfo, Listed, Negotiation, Step, TlsMode, TransmissionFlags,
    Violation,
};

struct Shelf;

impl Catalog for Shelf {
    type Export = ();
    type Context = ();

    fn list(&self) -> Vec<Listed> {
        let name = "vda".to_owned();
        vec![Listed {
            name,
            description: Some("a disk".to_owned()),
        }]
    }

    fn open(&self, name: &str) -> Result<((), ExportInfo), Denied> {
        match name {
            "" | "vda" => Ok((
                (),
                ExportInfo {
                    name: "vda".to_owned(),
                    description: None,
                    size: 1 << 20,
                    flags: TransmissionFlags::SEND_DF | TransmissionFlags::BLOCK_STATUS_PAYLOAD,
                    block_size: BlockSize::default(),
                },
            )),
            "mine" => Err(Denied::Policy("not yours".to_owned())),
            _ => Err(Denied::Unknown),
        }
    }

    fn listed_contexts(&self, (): &()) -> Vec<String> {
        vec![
            "base:allocation".to_owned(),
            "qemu:dirty-bitmap:cp1".to_owned(),
        ]
    }

    fn find_context(&self, (): &(), name: &str) -> Option<()> {
        ["base:allocation", "qemu:dirty-bitmap:cp1"]
            .contains(&name)
            .then_some(())
    }
}

fuzz_target!(|data: &[u8]| {
    for mode in [TlsMode::Off, TlsMode::On, TlsMode::Require] {
        let at_once = talk(mode, data.chunks(data.len().max(1)));
        let bytewise = talk(mode, data.chunks(1));
        assert_eq!(at_once, bytewise);
    }
});

/// All that is answered, how it ends, and how much is left for whoever comes after it.
fn talk<'a>(mode: TlsMode, pieces: impl Iterator<Item = &'a [u8]>) -> (Vec<u8>, String, usize) {
    let mut negotiation = Negotiation::with_tls(Shelf, mode);
    let (mut input, mut answers) = (BytesMut::new(), Vec::new());
    let mut end: Option<String> = None;
    for piece in pieces {
        input.extend_from_slice(piece);
        while end.is_none() {
            let mut output = BytesMut::new();
            let step = negotiation.advance(&mut input, &mut output);
            answers.extend_from_slice(&output);
            end = match step {
                // Where there is more input it is a violation: then TLS is not acknowledged, and nothing
                // after it is read either.
                Ok(Step::StartTls) => {
                    answers.truncate(answers.len() - ACKNOWLEDGEMENT);
                    return (answers, "TLS".to_owned(), 0);
                }
                Err(Violation::PlainText(_)) => return (answers, "TLS".to_owned(), 0),
                Ok(Step::NeedMore) => break,
                Ok(Step::WriteFirst) => None,
                Ok(Step::Ready(session)) => Some(format!("ready, {:?}", session.headers)),
                Ok(Step::Abort) => Some("abort".to_owned()),
                Ok(Step::Hangup(why)) => Some(format!("hangup: {why}")),
                Err(violation) => Some(violation.to_string()),
            };
        }
    }
    let left = if end.is_some() { input.len() } else { 0 };
    (answers, end.unwrap_or_default(), left)
}

/// An answer without data.
const ACKNOWLEDGEMENT: usize = 20;
