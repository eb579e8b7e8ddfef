//! Memory for requests and replies that several clients want at once: who waits for it, and who does
//! not any more.

use std::time::{Duration, Instant};

use rustix::net::sockopt::set_socket_send_buffer_size;
use rustix::process::Signal;
use stillpoint_tests::process::PATIENCE;
use stillpoint_tests::raw_nbd::{command, errno};
use stillpoint_tests::rude::{Address, Heard, Rude, private_memory, request};
use stillpoint_tests::server::temporary_directory;
use stillpoint_tests::tools::{proc_number, sparse_file};
use stillpoint_tests::{MIB, NbdBase, RawNbd, Server};

/// Two hold nearly all that clients share, what one may read at once, and take none of it; a third
/// waits for the rest.
fn with_hogs(args: &[&str], name: &str) -> (Server, [Rude; 3]) {
    let builder = Server::builder().disk("vda", SIZE);
    let builder = builder.arg("--connection-limit=64");
    let builder = builder.arg("--buffer-limit=224M");
    let server = args.iter().fold(builder, |builder, arg| builder.arg(arg));
    let server = server.start();
    server.begin("b1", &[]);
    let address = address(&server, name);
    let hogs = [true, true, false].map(|has_some| {
        let mut hog = Rude::open(&address, name, &[]);
        hog.say(&request(command::READ, 1, 0, LONGEST));
        assert!(!has_some || matches!(hog.hear(16, PATIENCE), Heard::Bytes(_)));
        hog
    });
    (server, hogs)
}

fn address(server: &Server, name: &str) -> Address {
    Address::unix(&match name {
        "vda" => server.live(),
        _ => server.frozen(),
    })
}

#[test]
fn who_hangs_up_while_it_waits_for_memory_is_noticed_at_once() {
    let (server, hogs) = with_hogs(&[], "vda");
    let mut waits = Rude::open(&address(&server, "vda"), "vda", &[]);
    waits.say(&request(command::READ, 1, 0, LONGEST).repeat(3));
    drop(waits);
    server.wait_for_log("disconnected", 1);
    let log = server.stderr();
    assert!(!log.contains("takes no replies"), "it had its turn: {log}");
    drop(hogs);
}

#[test]
fn what_was_written_before_a_client_hung_up_is_written_when_there_is_memory() {
    let (server, hogs) = with_hogs(&[], "vda");
    let mut guest = server.open_live("vda");
    let mut waits = Rude::open(&address(&server, "vda"), "vda", &[]);
    // More than a client has of its own, and less than the socket takes.
    let payload = vec![7; 264 << 10];
    set_socket_send_buffer_size(&waits, 1 << 20).unwrap();
    let write = request(command::WRITE, 1, 0, payload.len() as u32);
    waits.say(&[&write[..], &payload].concat());
    waits.say(&request(command::DISC, 2, 0, 0));
    drop(waits);
    drop(hogs);
    let begun = Instant::now();
    let last = payload.len() as u64 - 512;
    while guest.read(last, 512) != Ok(vec![7; 512]) {
        assert!(begun.elapsed() < PATIENCE, "it is never written");
    }
}

#[test]
fn who_waits_for_memory_is_not_idle() {
    let (server, hogs) = with_hogs(&["--idle-timeout=1s"], "vda@b1");
    let mut waits = RawNbd::open(&server.frozen(), "vda@b1", &[]);
    waits.read(0, LONGEST).unwrap();
    server.wait_for_log("takes no replies", 1);
    drop(hogs);
}

#[test]
fn who_has_gone_holds_no_replies_while_its_request_hangs() {
    let directory = temporary_directory();
    let image = directory.path().join("image");
    sparse_file(&image, SIZE);
    let base = NbdBase::file(&image);
    let builder = Server::builder().disk("vdb", SIZE);
    let state = builder.path("state-of-vda");
    let vda = format!("vda={},state={}", base.uri(), state.display());
    let builder = builder.disk_as(&format!("{vda},reconnect=10m"));
    let builder = builder.arg("--connection-limit=64");
    let server = builder.arg("--buffer-limit=224M").start();
    let live = Address::unix(&server.live());
    let mut hog = Rude::open(&live, "vdb", &[]);
    hog.say(&request(command::READ, 1, 0, LONGEST));
    assert!(matches!(hog.hear(16, PATIENCE), Heard::Bytes(_)));
    // One request of each hangs. Of what is refused beside it the answers are not taken.
    let mut gone = [(); 4].map(|()| Rude::open(&live, "vda", &["base:allocation"]));
    base.signal(Signal::STOP);
    let refused = request(command::READ, 2, SIZE, 512).repeat(200_000);
    for client in &mut gone {
        client.say(&request(command::READ, 1, 0, 512));
        let said = client.push(&refused, Duration::from_millis(300));
        assert!(said < refused.len(), "its replies need no memory");
    }
    drop(gone);
    // All that there is besides what the first holds.
    let mut other = RawNbd::open(&server.live(), "vdb", &[]);
    other.read(0, LONGEST).unwrap();
    let log = server.stderr();
    assert!(
        !log.contains("takes no replies"),
        "who is there made way: {log}"
    );
    drop(hog);
    base.signal(Signal::CONT);
}

#[test]
fn a_payload_that_was_refused_is_not_kept() {
    let server = Server::with_disk(SIZE);
    let payload = vec![7; LONGEST as usize];
    let before = private_memory(server.pid());
    let clients = [(); 8].map(|()| {
        let mut client = server.open_live("vda");
        assert_eq!(client.write(SIZE, &payload), Err(errno::ENOSPC));
        client
    });
    let grown = private_memory(server.pid()).saturating_sub(before);
    assert!(grown < 64 * MIB, "{grown} bytes");
    drop(clients);
}

#[test]
fn short_payloads_that_wait_do_not_keep_what_came_with_them() {
    let directory = temporary_directory();
    let image = directory.path().join("image");
    sparse_file(&image, SIZE);
    let base = NbdBase::file(&image);
    let builder = Server::builder();
    let state = builder.path("state");
    let disk = format!("vda={},state={},reconnect=10m", base.uri(), state.display());
    let server = builder.disk_as(&disk).start();
    let mut clients = [(); 4].map(|()| Rude::open(&Address::unix(&server.live()), "vda", &[]));
    base.signal(Signal::STOP);
    let before = private_memory(server.pid());
    let short = [&request(command::WRITE, 1, 0, 512)[..], &[7; 512]].concat();
    let refused = request(command::WRITE, 2, SIZE, 300_000);
    let refused = [&refused[..], &vec![7; 300_000]].concat();
    for client in &mut clients {
        for _ in 0..200 {
            client.say(&short);
            client.say(&refused);
            assert!(matches!(client.hear(16, PATIENCE), Heard::Bytes(_)));
        }
    }
    let grown = private_memory(server.pid()).saturating_sub(before);
    assert!(grown < 32 * MIB, "{grown} bytes");
    base.signal(Signal::CONT);
}

#[test]
fn requests_that_wait_do_not_keep_the_replies_before_them() {
    let server = Server::with_disk(SIZE);
    server.open_live("vda").write(0, &[1; 4096]).unwrap();
    let live = Address::unix(&server.live());
    let mut client = Rude::open(&live, "vda", &["base:allocation"]);
    let peak = || proc_number(server.pid(), "status", "VmHWM") << 10;
    let before = peak();
    let reads = request(command::READ, 1, 0, 4096).repeat(240);
    let questions = request(command::BLOCK_STATUS, 2, 0, 4096).repeat(250);
    client.say(&[reads, questions].concat());
    let replies = 240 * (28 + 4096) + 250 * 32;
    assert!(matches!(client.hear(replies, PATIENCE), Heard::Bytes(_)));
    let grown = peak() - before;
    assert!(grown < 32 * MIB, "{grown} bytes");
}

const SIZE: u64 = 64 * MIB;

/// What one may ask for at once.
const LONGEST: u32 = 32 * MIB as u32;
