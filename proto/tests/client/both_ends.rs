//! The crate's client and the crate's server agree, wherever the bytes between them are cut.

use bytes::{Bytes, BytesMut};

use crate::proto::client::{
    Answer, Completion, Handshake, Outcome, Question, Session as ClientSession, into_bytes,
};
use crate::proto::{
    BlockSize, Catalog, Command, ContextId, Denied, Errno, ExportInfo, Extents, GREETING, Headers,
    Incoming, Listed, Negotiation, Origin, Replies, Session, Step, TransmissionFlags,
};

struct Shelf;

impl Catalog for Shelf {
    type Export = ();
    type Context = &'static str;

    fn list(&self) -> Vec<Listed> {
        vec![Listed {
            name: "vda".into(),
            description: Some("a disk".into()),
        }]
    }

    fn open(&self, name: &str) -> Result<((), ExportInfo), Denied> {
        if name != "vda" {
            return Err(Denied::Unknown);
        }
        let info = ExportInfo {
            name: "vda".into(),
            description: Some("a disk".into()),
            size: 1 << 40,
            flags: TransmissionFlags::SEND_DF
                | TransmissionFlags::SEND_FLUSH
                | TransmissionFlags::SEND_FUA,
            block_size: BlockSize::new(512, 4096, 1 << 20).unwrap(),
        };
        Ok(((), info))
    }

    fn listed_contexts(&self, (): &()) -> Vec<String> {
        vec!["base:allocation".into(), "qemu:dirty-bitmap:cp1".into()]
    }

    fn find_context(&self, (): &(), name: &str) -> Option<&'static str> {
        ["base:allocation", "qemu:dirty-bitmap:cp1"]
            .into_iter()
            .find(|known| *known == name)
    }
}

#[test]
fn every_question_is_answered_wherever_the_bytes_are_cut() {
    for headers in [Headers::Structured, Headers::Extended] {
        check(headers);
    }
}

fn check(headers: Headers) {
    let (whole, length) = talk(headers, usize::MAX);
    assert_eq!(
        whole[..8],
        [
            "greeting, options: true",
            "Exports([Listed { name: \"vda\", description: Some(\"a disk\") }])",
            &format!("Agreed({headers:?})")[..],
            "Contexts([\"base:allocation\", \"qemu:dirty-bitmap:cp1\"])",
            "Contexts([\"qemu:dirty-bitmap:cp1\"])",
            "Info(1099511627776)",
            "Declined(Unknown)",
            "entered [(ContextId(1), \"qemu:dirty-bitmap:cp1\")]",
        ]
    );
    assert_eq!(
        whole[8..],
        [
            "1: Ok(Done)",
            "2: hello and a hole of 507",
            "3: 1024 bytes, 1 extents",
            "4: bad sector at 1024",
        ]
    );
    for cut in 0..length {
        assert_eq!(talk(headers, cut).0, whole, "{headers:?}, cut at {cut}");
    }
}

/// All that is said, with the server's stream cut at one place; and the length of that stream.
fn talk(headers: Headers, cut: usize) -> (Vec<String>, usize) {
    let mut ends = Ends {
        handshake: Handshake::new(),
        negotiation: Negotiation::new(Shelf),
        to_client: Pipe::cut_at(cut),
        to_server: BytesMut::new(),
        entered: None,
    };
    ends.to_client.send(GREETING);
    let mut said = vec![ends.answer()];
    for question in [
        Question::List,
        Question::Agree(headers),
        contexts(&[]),
        contexts(&["qemu:"]),
        Question::Info {
            export: "vda".into(),
        },
        enter("vdb"),
        enter("vda"),
    ] {
        ends.handshake.ask(question, &mut ends.to_server).unwrap();
        said.push(ends.answer());
    }
    let (session, served) = ends.entered.take().expect("both have entered");
    said.extend(transmit(session, &served, &mut ends));
    (said, ends.to_client.sent)
}

struct Ends {
    handshake: Handshake,
    negotiation: Negotiation<Shelf>,
    to_client: Pipe,
    to_server: BytesMut,
    entered: Option<(ClientSession, Session<Shelf>)>,
}

impl Ends {
    /// Lets both ends work until there is an answer.
    fn answer(&mut self) -> String {
        let mut served = None;
        loop {
            let mut output = BytesMut::new();
            match self.negotiation.advance(&mut self.to_server, &mut output) {
                Ok(Step::NeedMore | Step::WriteFirst) => {}
                Ok(Step::Ready(session)) => served = Some(session),
                Ok(Step::Hangup(_)) if served.is_some() => {}
                Ok(Step::Abort | Step::Hangup(_)) => panic!("the server hangs up"),
                Ok(Step::StartTls) => panic!("nobody asked for TLS"),
                Err(violation) => panic!("{violation}"),
            }
            self.to_client.send(&output);
            let input = self.to_client.arrive();
            let answer = self.handshake.advance(input, &mut self.to_server).unwrap();
            return match answer {
                None => continue,
                Some(Answer::Greeting { knows_options }) => {
                    format!("greeting, options: {knows_options}")
                }
                Some(Answer::Info(info)) => format!("Info({})", info.size),
                Some(Answer::Declined(declined)) => format!("Declined({:?})", declined.reason),
                Some(Answer::Entered(session)) => {
                    let said = format!("entered {:?}", session.contexts());
                    self.entered = Some((*session, served.expect("it let us in")));
                    said
                }
                Some(other) => format!("{other:?}"),
            };
        }
    }
}

/// Four requests, answered as a server would.
fn transmit(mut client: ClientSession, server: &Session<Shelf>, ends: &mut Ends) -> Vec<String> {
    let commands = [
        Command::Write {
            range: 0..512,
            data: Bytes::from(vec![7; 512]),
            fua: true,
        },
        Command::Read {
            range: 512..1024,
            do_not_fragment: false,
        },
        Command::BlockStatus {
            range: 0..1024,
            contexts: vec![ContextId(1)],
            one: false,
        },
        Command::Read {
            range: 1024..1536,
            do_not_fragment: true,
        },
    ];
    for command in commands {
        let submitted = client.submit(command, &mut ends.to_server).unwrap();
        ends.to_server.extend_from_slice(&submitted.payload);
    }
    client.disconnect(&mut ends.to_server);

    let (mut decoder, admission) = (server.requests(), server.admission());
    let mut output = BytesMut::new();
    loop {
        match decoder.decode(&mut ends.to_server).unwrap() {
            Some(Incoming::Disconnect) => break,
            Some(Incoming::Request(request)) => {
                let origin = request.origin();
                let command = admission.admit(request).unwrap();
                perform(server.replies(), command, origin, &mut output);
            }
            None => panic!("nobody said goodbye"),
        }
    }
    ends.to_client.send(&output);
    let mut said = Vec::new();
    while said.len() < 4 {
        match client.receive(ends.to_client.arrive()).unwrap() {
            Some(completion) => said.push(describe(completion)),
            None => assert!(ends.to_client.holds_back(), "nothing more comes"),
        }
    }
    said
}

fn perform(replies: Replies, command: Command, origin: Origin, output: &mut BytesMut) {
    match command {
        Command::Read { range, .. } if range.start == 512 => {
            replies.begin_data(output, origin, 512, 5, false);
            output.extend_from_slice(b"hello");
            replies.hole(output, origin, 517, 507, true);
        }
        Command::Read { .. } => replies.error_at(output, origin, 1024, Errno::Io, "bad sector"),
        Command::BlockStatus { range, .. } => {
            let mut extents = Extents::new(range.end, 1);
            extents.push(range.end, 1);
            let mut contexts: Vec<_> = [(ContextId(1), extents)].into();
            replies.block_status(output, origin, &mut contexts);
        }
        _ => replies.ok(output, origin),
    }
}

fn describe(completion: Completion) -> String {
    let cookie = completion.cookie.0;
    match completion.result {
        Ok(Outcome::Data(pieces)) => {
            let bytes = into_bytes(pieces);
            let zeroes = bytes[5..].iter().take_while(|byte| **byte == 0);
            let holes = zeroes.count();
            format!(
                "{cookie}: {} and a hole of {holes}",
                std::str::from_utf8(&bytes[..5]).unwrap()
            )
        }
        Ok(Outcome::BlockStatus(status)) => format!(
            "{cookie}: {} bytes, {} extents",
            status.range.end,
            status.contexts[0].1.len()
        ),
        Err(failure) => format!("{cookie}: {} at {}", failure.text, failure.offset.unwrap()),
        done @ Ok(Outcome::Done) => format!("{cookie}: {done:?}"),
    }
}

/// Bytes on their way, of which all from one place on arrive later.
struct Pipe {
    arrived: BytesMut,
    held_back: BytesMut,
    sent: usize,
    cut: usize,
}

impl Pipe {
    fn cut_at(cut: usize) -> Self {
        Self {
            arrived: BytesMut::new(),
            held_back: BytesMut::new(),
            sent: 0,
            cut,
        }
    }

    fn send(&mut self, bytes: &[u8]) {
        let at_once = self.cut.saturating_sub(self.sent).min(bytes.len());
        let at_once = if self.sent > self.cut {
            bytes.len()
        } else {
            at_once
        };
        self.arrived.extend_from_slice(&bytes[..at_once]);
        self.held_back.extend_from_slice(&bytes[at_once..]);
        self.sent += bytes.len();
    }

    /// What has arrived; what was held back arrives the time after.
    fn arrive(&mut self) -> &mut BytesMut {
        if self.arrived.is_empty() || !self.first_time() {
            let late = self.held_back.split();
            self.arrived.extend_from_slice(&late);
        }
        &mut self.arrived
    }

    fn first_time(&mut self) -> bool {
        // What lies before the cut has been seen once when the cut is behind it.
        let first = self.cut != usize::MAX && !self.held_back.is_empty();
        self.cut = usize::MAX;
        first
    }

    fn holds_back(&self) -> bool {
        !self.held_back.is_empty()
    }
}

fn contexts(queries: &[&str]) -> Question {
    Question::ListContexts {
        export: "vda".into(),
        queries: queries.iter().map(|query| (*query).to_owned()).collect(),
    }
}

fn enter(export: &str) -> Question {
    Question::Enter {
        export: export.into(),
        contexts: vec!["qemu:dirty-bitmap:cp1".into()],
    }
}
