//! What is taken away from clients: whatever they are about, they hear of it within a second, and
//! hold nobody up.

use std::time::{Duration, Instant};

use rustix::process::Signal;
use serde_json::json;
use stillpoint_tests::raw_nbd::{chunk, command, errno, option, rep};
use stillpoint_tests::rude::{Address, Heard, Rude, go, option_message, request};
use stillpoint_tests::{Guest, MIB, Qmp, Server};

/// How an export is taken away.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Event {
    Commit,
    Abort,
    Break,
    Stop,
}

/// What a client is about when that happens.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum State {
    /// It has asked once, and has its answer.
    Attached,
    /// It has opened the export, and never asked.
    Idle,
    /// It is in the middle of its answers.
    Reading,
    /// It has not chosen an export yet.
    Handshake,
    /// It has asked for much, and takes nothing.
    Deaf,
}

const STATES: [State; 5] = [
    State::Attached,
    State::Idle,
    State::Reading,
    State::Handshake,
    State::Deaf,
];

#[test]
fn a_commit_is_heard_by_all_within_a_second() {
    all_hear_of(Event::Commit);
}

#[test]
fn an_abort_is_heard_by_all_within_a_second() {
    all_hear_of(Event::Abort);
}

#[test]
fn a_break_is_heard_by_all_within_a_second() {
    all_hear_of(Event::Break);
}

#[test]
fn a_stop_is_heard_by_all_within_a_second() {
    all_hear_of(Event::Stop);
}

#[test]
fn who_goes_on_asking_at_a_stop_still_has_all_its_answers() {
    let mut server = Server::builder()
        .disk("vda", SIZE)
        .arg("--live-listen=tcp:127.0.0.1:0")
        .start();
    let mut other = server.open_live("vda");
    let mut client = Rude::open(&Address::tcp(&server, "live"), "vda", &[]);
    let read = request(command::READ, 1, 0, ANSWER);
    client.say(&read.repeat(ANSWERS));
    let write = request(command::WRITE, 2, MIB, 512);
    client.say(&[&write[..], &[7; 512]].concat());
    // Then those before it have been taken in.
    while other.read(MIB, 1) != Ok(vec![7]) {}
    server.signal(Signal::TERM);
    server.wait_for_log("stopping", 1);
    let mut answers = 0;
    let end = loop {
        match client.hear(16 + ANSWER as usize, A_SECOND) {
            Heard::Bytes(_) => answers += 1,
            end => break end,
        }
        client.push(&read, Duration::ZERO);
    };
    assert!(answers >= ANSWERS, "{answers}");
    // That to the write is among them, and so much shorter.
    assert!(
        matches!(end, Heard::End(rest) if rest.len() == 16),
        "one is cut"
    );
    drop(client);
    assert!(server.wait().success());
}

fn all_hear_of(event: Event) {
    let mut server = Server::builder()
        .disk("vda", SIZE)
        .arg("--backup-scratch-limit=64k")
        .arg("--buffer-limit=1G")
        .arg("--backup-listen=tcp:127.0.0.1:0")
        .start();
    let mut guest = Guest::new(&server, "vda");
    (0..SIZE / MIB).for_each(|mib| guest.write(mib * MIB, &vec![1; MIB as usize]));
    server.begin("b1", &[]);
    let addresses = [
        Address::unix(&server.frozen()),
        Address::tcp(&server, "backups"),
    ];
    let mut clients = Vec::new();
    for address in &addresses {
        for state in STATES {
            clients.push((state, address, in_state(state, address)));
        }
    }

    // So much has been read of what was asked for, and waits for those who asked, that no more is.
    let each = 8 * MIB + 2 * MIB + 512;
    let (mut read, mut unchanged) = (0, 0);
    while read < addresses.len() as u64 * each || unchanged < AT_REST {
        let now = server.bytes_read("b1", "vda", "vda@b1");
        unchanged = if now == read { unchanged + 1 } else { 0 };
        read = now;
    }

    let mut qmp = server.qmp();
    let begun = Instant::now();
    happen(event, &server, &mut guest, &mut qmp);
    let took = begun.elapsed();
    assert!(took < A_SECOND, "{event:?} took {took:?}");
    // Each by itself: who takes nothing while others are heard would be left for it.
    std::thread::scope(|threads| {
        for (state, address, client) in &mut clients {
            let what = format!("{event:?}, {state:?}, {address:?}");
            if *state != State::Deaf {
                threads.spawn(move || hears_of(event, *state, client, begun, &what));
            }
        }
    });
    if event == Event::Stop {
        let left = (begun + A_SECOND).saturating_duration_since(Instant::now());
        assert!(server.ends_within(left), "clients hold up the stop");
        assert!(server.wait().success());
        return;
    }
    // Over TCP, who takes nothing does not even hear the end; so the server is asked.
    let left = || server.stderr().matches("takes no replies").count();
    while left() < addresses.len() {
        assert!(begun.elapsed() < A_SECOND, "{event:?}: {} are left", left());
        std::thread::yield_now();
    }
    guest.write(0, &[3; 4096]);
    if event == Event::Break {
        server.abort("b1");
    }
    server.begin("b2", &[]);
    let mut after = server.open_frozen("vda@b2", &[]);
    assert_eq!(after.read(0, 4096), Ok(vec![3; 4096]));
    server.stop();
}

/// Sees that a client hears what it has to.
fn hears_of(event: Event, state: State, client: &mut Rude, begun: Instant, what: &str) {
    let left = (begun + A_SECOND).saturating_duration_since(Instant::now());
    match (event, state) {
        (Event::Stop, State::Handshake) => {
            hears_why(client, what);
            hears_the_end(client, left, what);
        }
        (Event::Stop, _) => hears_the_end(client, left, what),
        (_, State::Reading) => hears_answers(client, READS, left, what),
        (Event::Commit | Event::Abort, State::Handshake) => {
            client.say(&go("vda@b1"));
            assert_eq!(option_reply(client), rep::ERR_UNKNOWN, "{what}");
        }
        (_, state) => {
            if state == State::Handshake {
                // The broken backup is there until it is aborted, and serves nothing.
                client.say(&go("vda@b1"));
                while option_reply(client) != rep::ACK {}
            }
            client.say(&request(command::READ, 7, 0, 512));
            let expected = match event {
                Event::Break => errno::EIO,
                _ => errno::ESHUTDOWN,
            };
            assert_eq!(simple_error(client), expected, "{what}");
        }
    }
}

fn in_state(state: State, address: &Address) -> Rude {
    match state {
        State::Attached => {
            let mut client = Rude::open(address, "vda@b1", &[]);
            client.say(&request(command::READ, 1, 0, 512));
            assert_eq!(simple_error(&mut client), 0);
            assert!(matches!(client.hear(512, A_SECOND), Heard::Bytes(_)));
            client
        }
        State::Idle => Rude::open(address, "vda@b1", &[]),
        State::Handshake => Rude::greeted(address),
        State::Reading => {
            let mut client = Rude::open(address, "vda@b1", &["base:allocation"]);
            for cookie in 0..READS {
                client.say(&request(command::READ, cookie, 0, 8 * MIB as u32));
            }
            client
        }
        State::Deaf => {
            let mut client = Rude::open(address, "vda@b1", &[]);
            for cookie in 0..DEAF_READS {
                client.say(&request(command::READ, cookie, 0, MIB as u32));
            }
            client
        }
    }
}

fn happen(event: Event, server: &Server, guest: &mut Guest, qmp: &mut Qmp) {
    match event {
        Event::Commit => drop(qmp.execute("backup-commit", &json!({"id": "b1"}))),
        Event::Abort => drop(qmp.execute("backup-abort", &json!({"id": "b1"}))),
        Event::Break => {
            guest.write(0, &vec![2; MIB as usize]);
            qmp.event("BACKUP_BROKEN");
        }
        Event::Stop => {
            server.signal(Signal::TERM);
            server.wait_for_log("stopping", 1);
        }
    }
}

/// It is told why it gets no export any more, and its goodbye is acknowledged.
fn hears_why(client: &mut Rude, what: &str) {
    // The log says it before the workers know.
    let reply = loop {
        client.say(&option_message(option::STRUCTURED_REPLY, &[]));
        match option_reply(client) {
            rep::ACK => {}
            reply => break reply,
        }
    };
    assert_eq!(reply, rep::ERR_SHUTDOWN, "{what}");
    client.say(&go("vda@b1"));
    assert_eq!(option_reply(client), rep::ERR_SHUTDOWN, "{what}");
    client.say(&option_message(option::ABORT, &[]));
    assert_eq!(option_reply(client), rep::ACK, "{what}");
}

/// It hears the end, whatever it was told before.
fn hears_the_end(client: &mut Rude, patience: Duration, what: &str) {
    let heard = client.hear(usize::MAX, patience);
    assert!(matches!(heard, Heard::End(_)), "{what}");
}

/// It hears answers to so many reads, with data or with an error.
fn hears_answers(client: &mut Rude, count: u64, patience: Duration, what: &str) {
    let mut answered = 0;
    while answered < count {
        let Heard::Bytes(head) = client.hear(20, patience) else {
            panic!("{what}: {answered} answers");
        };
        assert_eq!(head[..4], 0x668e_33ef_u32.to_be_bytes(), "{what}");
        answered += u64::from(head[5] & chunk::DONE as u8);
        let length = u32::from_be_bytes(head[16..20].try_into().expect("four bytes"));
        let payload = client.hear(length as usize, patience);
        assert!(matches!(payload, Heard::Bytes(_)), "{what}");
    }
}

/// The kind of the next reply to an option.
fn option_reply(client: &mut Rude) -> u32 {
    let Heard::Bytes(head) = client.hear(20, A_SECOND) else {
        panic!("no reply to an option");
    };
    let word = |at: usize| u32::from_be_bytes(head[at..at + 4].try_into().expect("four bytes"));
    client.hear(word(16) as usize, A_SECOND);
    word(12)
}

/// The error of the next simple reply.
fn simple_error(client: &mut Rude) -> u32 {
    let Heard::Bytes(head) = client.hear(16, A_SECOND) else {
        panic!("no reply");
    };
    u32::from_be_bytes(head[4..8].try_into().expect("four bytes"))
}

const SIZE: u64 = 16 * MIB;

/// What a client in the middle of its answers has asked for.
const READS: u64 = 4;

/// What a client has asked for that takes nothing: more than any socket keeps for it.
const DEAF_READS: u64 = 64;

/// More answers, and longer ones, than the client's own socket keeps for it, but not the server's.
const ANSWERS: usize = 12;
const ANSWER: u32 = 64 << 10;

/// How often a server says the same when it does nothing any more: it takes some milliseconds to ask.
const AT_REST: usize = 40;

/// The promise. A server waits for clients half as long, so that a machine may do other things too.
const A_SECOND: Duration = Duration::from_secs(1);
