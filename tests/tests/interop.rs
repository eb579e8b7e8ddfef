//! Other people's clients, each with a small disk: what it writes it reads, and what was frozen stays.

use std::fs;
use std::io::{Read as _, Seek as _, SeekFrom, Write as _};
use std::os::unix::net::UnixStream;
use std::process::Command;

use serde_json::Value;
use stillpoint_tests::peers::OtherServer;
use stillpoint_tests::process::{Output, run};
use stillpoint_tests::server::uri;
use stillpoint_tests::tools::{path, repository, tool};
use stillpoint_tests::{CHUNK, MIB, Server};

const SIZE: u64 = 4 * MIB;

/// A server whose disk is all ones, frozen, and since then has a chunk of twos.
fn server() -> Server {
    let server = Server::with_disk(SIZE);
    let mut guest = server.open_live("vda");
    guest.write(0, &vec![1; SIZE as usize]).unwrap();
    server.checkpoint("cp1");
    guest.write(CHUNK, &vec![2; CHUNK as usize]).unwrap();
    server.begin("b1", &["--since", "cp1"]);
    guest.write(0, &vec![3; CHUNK as usize]).unwrap();
    server
}

/// The bytes of the instant of `b1`.
fn then() -> Vec<u8> {
    let mut then = vec![1; SIZE as usize];
    then[CHUNK as usize..2 * CHUNK as usize].fill(2);
    then
}

#[track_caller]
fn live_is(server: &Server, offset: u64, byte: u8, length: u32) {
    let found = server.open_live("vda").read(offset, length).unwrap();
    assert!(
        found == vec![byte; length as usize],
        "{offset}+{length} is not {byte}"
    );
}

#[test]
fn libnbd_in_python_writes_reads_and_asks() {
    let server = server();
    let script = repository().join("tests/python/libnbd_client.py");
    let mut python = Command::new("/usr/bin/python3");
    python.arg(script);
    python.args([server.live_uri("vda"), server.frozen_uri("vda@b1")]);
    let seen = run(&mut python).json();
    assert_eq!(seen["live"]["size"], SIZE);
    assert_eq!(seen["live"]["structured"], true);
    assert_eq!(seen["live"]["read"], "0909090900000000", "{seen}");
    assert_eq!(seen["frozen"]["read_only"], true);
    assert_eq!(seen["frozen"]["read"], "0101", "{seen}");
    let dirty = serde_json::json!([[CHUNK, 0], [CHUNK, 1], [SIZE - 2 * CHUNK, 0]]);
    assert_eq!(seen["frozen"]["dirty"], dirty, "{seen}");
    assert_eq!(seen["frozen"]["write_fails"], "EPERM", "{seen}");
}

/// The shell as its launcher would start it, with Debian's own Python, which need not be the first on `PATH`.
fn nbdsh(uri: &str, script: &str) -> Output {
    let shell = ["-c", "import nbdsh; nbdsh.shell()", "-u", uri, "-c", script];
    tool("/usr/bin/python3", &shell)
}

#[test]
fn nbdsh_writes_and_reads() {
    let server = server();
    let live = server.live_uri("vda");
    let script = "h.pwrite(b'still' * 100, 12345)\nh.flush()\n\
                  assert h.pread(500, 12345) == b'still' * 100\nprint(h.get_size())";
    let seen = nbdsh(&live, script);
    assert_eq!(seen.ok().trim(), SIZE.to_string());
    let frozen = server.frozen_uri("vda@b1");
    let script = "print(h.is_read_only(), h.pread(4, 65535).hex())";
    let seen = nbdsh(&frozen, script);
    assert_eq!(seen.ok().trim(), "True 01020202");
}

#[test]
fn qemu_io_writes_and_verifies() {
    let server = server();
    let commands = [
        "write -P 9 1M 128k",
        "read -P 9 1M 128k",
        "write -z 1M 64k",
        "read -P 0 1M 64k",
        "discard 3M 64k",
        "flush",
        "read -P 3 0 64k",
    ];
    let mut args = vec!["-f", "raw"];
    args.extend(commands.iter().flat_map(|command| ["-c", command]));
    let live = server.live_uri("vda");
    args.push(&live);
    let seen = tool("qemu-io", &args);
    assert!(!seen.ok().contains("verification failed"), "{seen}");
    live_is(&server, MIB + CHUNK, 9, CHUNK as u32);
    let frozen = server.frozen_uri("vda@b1");
    let reads = [
        "-r",
        "-f",
        "raw",
        "-c",
        "read -P 1 0 64k",
        "-c",
        "read -P 2 64k 64k",
    ];
    let seen = tool("qemu-io", &[&reads[..], &[&frozen]].concat());
    assert!(!seen.ok().contains("verification failed"), "{seen}");
}

#[test]
fn qemu_img_copies_both_ways() {
    let server = server();
    let (image, copy) = (server.path("new.raw"), server.path("copy.raw"));
    fs::write(&image, vec![8; SIZE as usize]).unwrap();
    let live = server.live_uri("vda");
    let raw = ["convert", "-f", "raw", "-O", "raw"];
    tool(
        "qemu-img",
        &[&raw[..], &["-n", path(&image), &live]].concat(),
    )
    .ok();
    live_is(&server, 0, 8, SIZE as u32);
    let frozen = server.frozen_uri("vda@b1");
    tool("qemu-img", &[&raw[..], &[&frozen, path(&copy)]].concat()).ok();
    assert!(fs::read(&copy).unwrap() == then());
    let same = ["compare", "-f", "raw", "-F", "raw"];
    tool("qemu-img", &[&same[..], &[&frozen, path(&copy)]].concat()).ok();
}

#[test]
fn nbdcopy_copies_both_ways() {
    let server = server();
    let (image, copy) = (server.path("new.raw"), server.path("copy.raw"));
    fs::write(&image, vec![8; SIZE as usize]).unwrap();
    tool(
        "nbdcopy",
        &["--flush", path(&image), &server.live_uri("vda")],
    )
    .ok();
    live_is(&server, 0, 8, SIZE as u32);
    tool("nbdcopy", &[&server.frozen_uri("vda@b1"), path(&copy)]).ok();
    assert!(fs::read(&copy).unwrap() == then());
    // From one export to another, with nothing in between.
    tool(
        "nbdcopy",
        &[&server.frozen_uri("vda@b1"), &server.live_uri("vda")],
    )
    .ok();
    assert!(server.open_live("vda").read_all() == then());
}

#[test]
fn nbdkit_as_a_proxy_passes_writes_and_reads_on() {
    let server = server();
    let live = format!("uri={}", server.live_uri("vda"));
    let proxy = OtherServer::nbdkit(&["nbd", &live]);
    let args = [
        "-f",
        "raw",
        "-c",
        "write -P 9 1M 64k",
        "-c",
        "read -P 9 1M 64k",
    ];
    let to = uri(&proxy.socket(), "");
    let seen = tool("qemu-io", &[&args[..], &["-c", "flush", &to]].concat());
    assert!(!seen.ok().contains("verification failed"), "{seen}");
    drop(proxy);
    live_is(&server, MIB, 9, CHUNK as u32);

    let frozen = format!("uri={}", server.frozen_uri("vda@b1"));
    let proxy = OtherServer::nbdkit(&["--readonly", "nbd", &frozen]);
    let copy = server.path("copy.raw");
    tool("nbdcopy", &[&uri(&proxy.socket(), ""), path(&copy)]).ok();
    assert!(fs::read(&copy).unwrap() == then());
}

#[test]
fn fio_writes_and_verifies() {
    let server = server();
    let live = format!("--uri={}", server.live_uri("vda"));
    let job = [
        "--name=job",
        "--ioengine=nbd",
        "--rw=randrw",
        "--bs=4k",
        "--size=4M",
        "--iodepth=8",
        "--verify=crc32c",
        "--verify_fatal=1",
        "--verify_state_save=0",
        "--randseed=1",
        "--output-format=json",
    ];
    let seen = tool("fio", &[&job[..], &[&live]].concat());
    // A line of the engine comes before it.
    let (_, report) = seen.ok().split_once('\n').expect("a report");
    let report: Value = serde_json::from_str(report).expect("a report");
    let job = &report["jobs"][0];
    assert_eq!(job["error"], 0, "{seen}");
    assert!(job["write"]["total_ios"].as_u64() > Some(100), "{seen}");
    let frozen = format!("--uri={}", server.frozen_uri("vda@b1"));
    let read = [
        "--name=job",
        "--ioengine=nbd",
        "--rw=read",
        "--bs=64k",
        "--size=4M",
    ];
    tool("fio", &[&read[..], &[&frozen]].concat()).ok();
    assert_eq!(server.bytes_read("b1", "vda", "vda@b1"), SIZE);
}

#[test]
fn a_client_from_the_registry_reads_and_writes() {
    let server = server();
    let mut stream = UnixStream::connect(server.live()).unwrap();
    let export = nbd::client::handshake(&mut stream, b"vda").unwrap();
    assert_eq!(export.size, SIZE);
    assert!(!export.readonly && export.send_flush && export.send_trim);
    let mut disk = nbd::client::NbdClient::new(&mut stream, &export);
    disk.seek(SeekFrom::Start(12_345)).unwrap();
    disk.write_all(b"still").unwrap();
    disk.flush().unwrap();
    disk.seek(SeekFrom::Start(12_344)).unwrap();
    let mut found = [1; 7];
    disk.read_exact(&mut found).unwrap();
    assert_eq!(&found, b"\x03still\x03");
}

#[test]
fn a_client_from_the_registry_reads_a_backup_and_cannot_write_it() {
    let server = server();
    let mut stream = UnixStream::connect(server.frozen()).unwrap();
    let export = nbd::client::handshake(&mut stream, b"vda@b1").unwrap();
    assert!(export.readonly);
    let mut disk = nbd::client::NbdClient::new(&mut stream, &export);
    let error = disk.write(b"x").unwrap_err();
    assert_eq!(error.kind(), std::io::ErrorKind::PermissionDenied);
    let mut found = [0; 4];
    disk.read_exact(&mut found).unwrap();
    assert_eq!(found, [1; 4]);
}
