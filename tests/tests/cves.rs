//! What has broken other NBD servers, one by one, does nothing to this one.
//!
//! Each test says in a sentence what the flaw was, does what its finder did, and sees that the server
//! goes on for a client that was there before. CVE-2021-3716, in which nbdkit kept what had been agreed
//! in plain text before STARTTLS, is with the other tests of TLS, in `tls/handshake.rs`; flaws of
//! clients are with the client.

use std::fs;
use std::io::Write as _;
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use rustix::process::Signal;
use stillpoint_tests::raw_nbd::{command, option, rep};
use stillpoint_tests::tools::proc_number;
use stillpoint_tests::{GIB, MIB, RawNbd, Server};

/// A server, and somebody who is served by it all the time.
struct Scene {
    server: Server,
    other: RawNbd,
}

impl Scene {
    fn new(size: u64) -> Self {
        let server = Server::with_disk(size);
        let mut other = server.open_live("vda");
        other.write(0, &[7; 4096]).unwrap();
        server.checkpoint("cp1");
        server.begin("b1", &["--since", "cp1"]);
        Self { server, other }
    }

    /// A client that has been greeted.
    fn connect(&self) -> RawNbd {
        RawNbd::connect(&self.server.live())
    }

    #[track_caller]
    fn goes_on(&mut self) {
        assert_eq!(self.other.read(0, 1), Ok(vec![7]));
        assert_eq!(self.server.open_live("vda").read(0, 1), Ok(vec![7]));
        let frozen = self.server.open_frozen("vda@b1", &[]).read(0, 1);
        assert_eq!(frozen, Ok(vec![7]));
        self.server.is_well();
    }
}

/// The data of INFO and GO, with a length of the name that need not be its own.
fn info_data(length: u32, name: &[u8]) -> Vec<u8> {
    [&length.to_be_bytes(), name, &[0, 0]].concat()
}

/// In qemu-nbd a client that sent what was not expected during the negotiation ran into an assertion.
#[test]
fn cve_2017_7539_unexpected_data_during_the_negotiation() {
    let mut scene = Scene::new(MIB);
    for garbage in [&[0; 4096][..], &[255; 4096], b"NBDMAGICIHAVEOPT\0\x03"] {
        let mut stream = UnixStream::connect(scene.server.live()).unwrap();
        // Before and after the flags; the server may be done with us already.
        let _ = stream.write_all(garbage);
        drop(stream);
        let mut nbd = scene.connect();
        let _ = nbd.send_raw(garbage);
        assert!(nbd.is_closed());
    }
    scene.goes_on();
}

/// In qemu-nbd a client that left before the negotiation was over was served by what had not been set up yet.
#[test]
fn cve_2017_9524_a_client_that_leaves_during_the_negotiation() {
    let mut scene = Scene::new(MIB);
    let mut words = b"\0\0\0\x03IHAVEOPT\0\0\0\x08\0\0\0\0IHAVEOPT\0\0\0\x07\0\0\0\x09".to_vec();
    words.extend(info_data(3, b"vda"));
    for length in 0..=words.len() {
        let mut stream = UnixStream::connect(scene.server.live()).unwrap();
        let _ = stream.write_all(&words[..length]);
    }
    scene.goes_on();
}

/// In qemu-nbd the name of an export could be longer than the place for it on the stack.
#[test]
fn cve_2017_15118_the_longest_name_of_an_export() {
    let mut scene = Scene::new(MIB);
    let mut nbd = scene.connect();
    for length in [256, 257, 1024, 4095, 4096] {
        let name = vec![b'x'; length];
        for option in [option::INFO, option::GO] {
            let refused = nbd.option(option, &info_data(length as u32, &name));
            assert_eq!(refused, Err(rep::ERR_UNKNOWN), "{length} bytes");
        }
    }
    let too_long = nbd.option(option::GO, &info_data(4097, &[b'x'; 4097]));
    assert_eq!(too_long, Err(rep::ERR_INVALID));
    nbd.go("vda").unwrap();
    scene.goes_on();
}

/// In qemu-nbd options could announce up to 4 GiB, which were read, one after the other, for as long as the
/// client liked.
#[test]
fn cve_2017_15119_large_options() {
    let mut scene = Scene::new(MIB);
    let memory = |server: &Server| proc_number(server.pid(), "status", "VmRSS");
    let before = memory(&scene.server);
    for option in [option::LIST, option::GO, option::SET_META_CONTEXT, 99] {
        let mut nbd = scene.connect();
        let mut header = b"IHAVEOPT".to_vec();
        header.extend(option.to_be_bytes());
        header.extend((4 * GIB - 1).to_be_bytes()[4..].iter());
        nbd.send_raw(&header).unwrap();
        let reply = nbd.option_reply().expect("an answer");
        assert_eq!(reply.kind, rep::ERR_TOO_BIG, "option {option}");
        assert!(nbd.is_closed(), "option {option}");
    }
    // What is still read past is not kept.
    let mut nbd = scene.connect();
    for _ in 0..4 {
        let declined = nbd.option(option::GO, &vec![0; 30 * MIB as usize]);
        assert!(declined.is_err());
    }
    let grown = memory(&scene.server).saturating_sub(before);
    assert!(grown < 16 << 10, "{grown} KiB more");
    scene.goes_on();
}

/// nbdkit opened its plugin for whoever connected, before a word was said.
#[test]
fn cve_2019_14850_nothing_is_opened_for_who_only_connects() {
    let mut scene = Scene::new(MIB);
    let opened = |server: &Server| {
        let descriptors = fs::read_dir(format!("/proc/{}/fd", server.pid())).expect("it runs");
        let paths = descriptors
            .flatten()
            .filter_map(|each| fs::read_link(each.path()).ok());
        let files = paths.filter(|path| path.starts_with(server.directory()));
        files.count()
    };
    let before = opened(&scene.server);
    let silent: Vec<_> = (0..100).map(|_| scene.connect()).collect();
    scene.goes_on();
    assert_eq!(opened(&scene.server), before);
    drop(silent);
}

/// In nbdkit INFO before GO opened the export twice, and ran into an assertion.
#[test]
fn cve_2019_14851_info_and_then_go() {
    let mut scene = Scene::new(MIB);
    let mut nbd = scene.connect();
    for name in ["vda", "nothing", "", "vda"] {
        let _ = nbd.info(name);
    }
    nbd.structured_replies();
    nbd.set_contexts("vda", &["base:allocation"]).unwrap();
    nbd.info("vda").unwrap();
    nbd.go("vda").unwrap();
    assert_eq!(nbd.read(0, 1), Ok(vec![7]));
    scene.goes_on();
}

/// In qemu-nbd the text of an error with a name of nearly 4096 bytes in it was longer than a string may be, which
/// was asserted.
#[test]
fn cve_2020_10761_a_long_name_in_the_text_of_an_error() {
    let mut scene = Scene::new(MIB);
    let mut nbd = scene.connect();
    nbd.structured_replies();
    for length in 4000..=4096_u32 {
        let name = vec![b'x'; length as usize];
        let mut contexts = [&length.to_be_bytes(), &name[..], &[0, 0, 0, 1]].concat();
        contexts.extend(length.to_be_bytes());
        contexts.extend(&name);
        for (option, data) in [
            (option::INFO, info_data(length, &name)),
            (option::SET_META_CONTEXT, contexts),
        ] {
            nbd.send_option(option, &data);
            let reply = nbd.option_reply().expect("a reply");
            assert_eq!(reply.kind, rep::ERR_UNKNOWN, "{length} bytes");
            assert!(reply.data.len() <= 4096);
        }
    }
    nbd.go("vda").unwrap();
    scene.goes_on();
}

/// In nbd-server a length of 0xffffffff of the name overflowed to a buffer of no length.
#[test]
fn cve_2022_26495_a_name_whose_length_overflows() {
    let mut scene = Scene::new(MIB);
    let mut nbd = scene.connect();
    nbd.structured_replies();
    for length in [u32::MAX, u32::MAX - 1, u32::MAX - 5, 1 << 31, 4] {
        let mut data = info_data(length, b"vda");
        data.extend([0; 2]);
        for option in [
            option::INFO,
            option::GO,
            option::LIST_META_CONTEXT,
            option::SET_META_CONTEXT,
        ] {
            let refused = nbd.option(option, &data);
            assert!(refused.is_err(), "option {option}, length {length:#x}");
        }
    }
    nbd.go("vda").unwrap();
    let mut nbd = scene.connect();
    let header = [&b"IHAVEOPT\0\0\0\x01"[..], &u32::MAX.to_be_bytes()].concat();
    nbd.send_raw(&header).unwrap();
    assert!(nbd.is_closed(), "EXPORT_NAME of 4 GiB");
    scene.goes_on();
}

/// In nbd-server a name in INFO or GO could be longer than the place for it on the stack.
#[test]
fn cve_2022_26496_a_name_longer_than_any() {
    let mut scene = Scene::new(MIB);
    let mut nbd = scene.connect();
    for length in [5000, 65_000, 100_000, 4_000_000_u32] {
        let name = vec![b'x'; length as usize];
        for option in [option::INFO, option::GO] {
            let refused = nbd.option(option, &info_data(length, &name));
            assert!(refused.is_err(), "{length} bytes");
        }
    }
    nbd.go("vda").unwrap();
    scene.goes_on();
}

/// In QEMU clients that went on connecting while the server was stopped were served by what was gone already.
#[test]
fn cve_2024_7409_clients_that_connect_while_the_server_stops() {
    let mut server = Server::with_disk(MIB);
    let live = server.live();
    let stopped = AtomicBool::new(false);
    thread::scope(|scope| {
        for patience in 0..4 {
            let (live, stopped) = (&live, &stopped);
            scope.spawn(move || {
                let words = b"\0\0\0\x03IHAVEOPT\0\0\0\x07\0\0\0\x09\0\0\0\x03vda\0\0";
                let mut kept = Vec::new();
                while !stopped.load(Ordering::Acquire) {
                    if let Ok(mut stream) = UnixStream::connect(live) {
                        let _ = stream.write_all(&words[..words.len() * patience / 3]);
                        kept.push(stream);
                        kept.truncate(32);
                    }
                }
            });
        }
        let mut guest = server.open_live("vda");
        for _ in 0..50 {
            guest.write(0, &[7; 4096]).unwrap();
        }
        server.signal(Signal::TERM);
        let status = server.wait();
        stopped.store(true, Ordering::Release);
        assert!(status.success(), "{status}\n{}", server.stderr());
    });
}

/// In nbdkit a block status of nearly 4 GiB, to which the plugin knew one extent that was longer, ran into an
/// assertion.
#[test]
fn cve_2025_47711_a_block_status_of_an_extent_beyond_4_gib() {
    large_block_status(&[(0, u32::MAX), (1, u32::MAX), (GIB, u32::MAX)]);
}

/// In nbdkit's blocksize filter a block status that was aligned to blocks overflowed 32 bits, and ran into an
/// assertion.
#[test]
fn cve_2025_47712_a_block_status_that_overflows_when_it_is_aligned() {
    large_block_status(&[
        (511, u32::MAX - 510),
        (4095, u32::MAX - 4000),
        (65_537, u32::MAX),
        (12 * GIB - u64::from(u32::MAX), u32::MAX),
    ]);
}

fn large_block_status(requests: &[(u64, u32)]) {
    let mut scene = Scene::new(12 * GIB);
    let contexts = [
        "base:allocation",
        "qemu:allocation-depth",
        "qemu:dirty-bitmap:cp1",
    ];
    let mut frozen = scene.server.open_frozen("vda@b1", &contexts);
    for nbd in [&mut frozen, &mut scene.other] {
        for (offset, length) in requests {
            let answer = nbd.call((command::BLOCK_STATUS, 0), *offset, *length, &[]);
            for extents in answer.extents().expect("a block status").values() {
                let sum: u64 = extents.iter().map(|extent| u64::from(extent.0)).sum();
                assert!(sum > 0 && sum <= u64::from(*length), "{offset}+{length}");
            }
        }
    }
    scene.goes_on();
}
