//! A server that starts, or is refused.

use std::fs;
use std::io::IoSlice;
use std::mem::MaybeUninit;
use std::os::fd::AsFd as _;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Instant;

use rustix::fs::{FlockOperation, flock};
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
use serde_json::Value;
use stillpoint_tests::process::{KilledOnDrop, Output, PATIENCE, run};
use stillpoint_tests::server::Builder;
use stillpoint_tests::tools::{
    nbdcopy_sha256, path, sha256_of_file, sparse_file, tool, with_qemu_nbd,
};
use stillpoint_tests::{Guest, MIB, Server};

use crate::{BAD_NAMES, stillpoint};

#[test]
fn the_uris_are_printed_to_paste() {
    let server = Server::builder().disk("vda", MIB).disk("vdb", MIB).start();
    let told = server.stdout() + &server.stderr();
    for disk in ["vda", "vdb"] {
        let uri = server.live_uri(disk);
        assert!(told.contains(&uri), "{uri} is not in\n{told}");
    }
}

#[test]
fn a_stop_keeps_the_disk_and_takes_the_sockets_away() {
    let mut server = Server::with_disk(MIB);
    Guest::new(&server, "vda").write(5000, b"kept");
    server.stop();
    assert!(!server.live().exists(), "a clean stop leaves no sockets");
    assert_eq!(&fs::read(server.image("vda")).unwrap()[5000..5004], b"kept");
    server.start();
    assert_eq!(server.open_live("vda").read(5000, 4), Ok(b"kept".to_vec()));
}

#[test]
fn an_image_that_cannot_be_served_is_refused_with_the_reason() {
    let builder = Server::builder();
    let at = |name: &str| builder.path(name);
    fs::write(at("empty"), b"").unwrap();
    sparse_file(&at("odd"), MIB + 1);
    fs::write(at("file"), [0; 4096]).unwrap();
    tool(
        "qemu-img",
        &["create", "-f", "qcow2", path(&at("a.qcow2")), "1M"],
    )
    .ok();
    for (image, reason) in [
        (at("missing"), "No such file"),
        (at("file/below"), "Not a directory"),
        (builder.path(""), "directory"),
        (at("empty"), "size"),
        (at("odd"), "512"),
        (at("a.qcow2"), "qcow2"),
    ] {
        let output = Server::builder().disk_at("vda", &image).start_and_fail();
        let error = output.error(1).to_lowercase();
        assert!(
            error.contains(&reason.to_lowercase()),
            "{reason} is not in\n{output}"
        );
        assert!(
            error.contains(&path(&image).to_lowercase()),
            "no path in\n{output}"
        );
    }
}

#[test]
fn an_image_of_another_format_is_raw_if_one_says_so() {
    let builder = Server::builder();
    let image = builder.path("a.qcow2");
    tool("qemu-img", &["create", "-f", "qcow2", path(&image), "1M"]).ok();
    let size = fs::metadata(&image).unwrap().len().next_multiple_of(512);
    fs::File::options()
        .write(true)
        .open(&image)
        .unwrap()
        .set_len(size)
        .unwrap();
    let server = builder
        .disk_as(&format!("vda={},format=raw", image.display()))
        .start();
    assert_eq!(server.open_live("vda").read(0, 4), Ok(b"QFI\xfb".to_vec()));
}

#[test]
fn an_image_that_may_not_be_read_is_refused() {
    let builder = Server::builder();
    let image = builder.path("vda.raw");
    sparse_file(&image, MIB);
    fs::set_permissions(&image, fs::Permissions::from_mode(0o000)).unwrap();
    let (state, run) = (builder.path("state"), builder.path("run"));
    for directory in [&state, &run] {
        open_to_all(directory);
    }
    let disk = format!("vda={},state={}/vda", image.display(), state.display());
    let output = as_nobody(&builder.disk_as(&disk));
    let error = output.error(1);
    assert!(
        error.contains("Permission denied") && error.contains(path(&image)),
        "{output}"
    );
}

#[test]
fn a_bad_disk_argument_is_refused() {
    for name in BAD_NAMES {
        let builder = Server::builder();
        let image = builder.path("vda.raw");
        sparse_file(&image, MIB);
        builder
            .disk_at(name, &image)
            .start_and_fail()
            .refused("name");
    }
    for (options, saying) in [
        ("granularity=3k", "granularity"),
        ("granularity=2k", "granularity"),
        ("granularity=4M", "granularity"),
        ("granularity=x", "granularity"),
        ("format=qcow9", "format"),
        ("no-such-key=1", "no-such-key"),
    ] {
        let builder = Server::builder();
        let image = builder.path("vda.raw");
        sparse_file(&image, MIB);
        let disk = format!("vda={},{options}", image.display());
        builder.disk_as(&disk).start_and_fail().refused(saying);
    }
    Server::builder()
        .disk("vda", MIB)
        .disk("vda", MIB)
        .start_and_fail()
        .refused("vda");
    Server::builder()
        .disk_as("vda")
        .start_and_fail()
        .refused("vda");
    assert_eq!(
        Server::builder().start_and_fail().code(),
        2,
        "no disk at all"
    );
}

#[test]
fn a_comma_in_a_path_is_doubled() {
    let builder = Server::builder();
    let image = builder.path("a,b.raw");
    sparse_file(&image, MIB);
    let doubled = path(&image).replace(',', ",,");
    let server = builder.disk_as(&format!("vda={doubled}")).start();
    assert_eq!(server.open_live("vda").export().size, MIB);
}

#[test]
fn a_socket_that_somebody_answers_on_is_not_taken() {
    for socket in ["live.sock", "backup.sock", "control.sock"] {
        let builder = Server::builder().disk("vda", MIB);
        fs::create_dir(builder.path("run")).unwrap();
        let _listener = UnixListener::bind(builder.path("run").join(socket)).unwrap();
        let output = builder.start_and_fail();
        assert!(output.error(1).contains(socket), "{output}");
        assert!(
            builder.path("run").join(socket).exists(),
            "it is still the other's"
        );
    }
}

#[test]
fn stale_sockets_are_replaced() {
    let builder = Server::builder().disk("vda", MIB);
    fs::create_dir(builder.path("run")).unwrap();
    for socket in ["live.sock", "backup.sock", "control.sock"] {
        drop(UnixListener::bind(builder.path("run").join(socket)).unwrap());
    }
    let mut server = builder.start();
    server.is_well();
    server.kill();
    assert!(server.live().exists(), "a killed server leaves its sockets");
    server.start();
    assert_eq!(server.open_live("vda").export().size, MIB);
}

#[test]
fn a_file_in_the_place_of_a_socket_is_left_alone() {
    let builder = Server::builder().disk("vda", MIB);
    fs::create_dir(builder.path("run")).unwrap();
    fs::write(builder.path("run/live.sock"), b"precious").unwrap();
    let output = builder.start_and_fail();
    assert!(output.error(1).contains("live.sock"), "{output}");
    assert_eq!(
        fs::read(builder.path("run/live.sock")).unwrap(),
        b"precious"
    );
}

#[test]
fn a_run_directory_that_is_too_long_for_sockets_is_refused() {
    let builder = Server::builder().disk("vda", MIB);
    let run_directory = builder.path(&"x".repeat(120));
    let output = builder.run_directory(&run_directory).start_and_fail();
    assert!(output.error(1).contains(".sock"), "{output}");
}

#[test]
fn a_run_directory_that_may_not_be_written_is_refused() {
    let builder = Server::builder();
    let image = builder.path("vda.raw");
    sparse_file(&image, MIB);
    fs::set_permissions(&image, fs::Permissions::from_mode(0o666)).unwrap();
    let (state, locked) = (builder.path("state"), builder.path("locked"));
    open_to_all(&state);
    fs::create_dir(&locked).unwrap();
    fs::set_permissions(&locked, fs::Permissions::from_mode(0o555)).unwrap();
    let disk = format!("vda={},state={}/vda", image.display(), state.display());
    let output = as_nobody(&builder.disk_as(&disk).run_directory(&locked.join("run")));
    assert!(output.error(1).contains("Permission denied"), "{output}");
}

#[test]
fn sockets_have_the_mode_and_the_group_that_were_asked_for() {
    // Any other group is one that only root may give.
    let group = rustix::process::getegid().as_raw() + u32::from(is_root());
    let server = Server::builder()
        .disk("vda", MIB)
        .arg("--socket-mode=0660")
        .arg(&format!("--socket-group={group}"))
        .start();
    for socket in [server.live(), server.frozen(), server.control()] {
        let found = fs::metadata(&socket).unwrap();
        let expected = (0o660, group);
        let found = (found.permissions().mode() & 0o777, found.gid());
        assert_eq!(found, expected, "{}", socket.display());
    }
    for args in [["--socket-mode=0999"], ["--socket-group=no-such-group"]] {
        let builder = Server::builder().disk("vda", MIB).arg(args[0]);
        builder
            .start_and_fail()
            .refused(args[0].split('=').nth(1).unwrap());
    }
}

#[test]
fn a_socket_that_its_group_cannot_have_is_told_of_and_not_left_behind() {
    let builder = Server::builder();
    let writable = builder.path("writable");
    open_to_all(&writable);
    let run_directory = writable.join("run");
    let disk = format!("vda={}", path(&writable.join("vda.raw")));
    sparse_file(&writable.join("vda.raw"), MIB);
    fs::set_permissions(writable.join("vda.raw"), fs::Permissions::from_mode(0o666)).unwrap();
    let builder = builder
        .disk_as(&disk)
        .run_directory(&run_directory)
        .arg("--socket-group=root");
    let refused = as_nobody(&builder);
    assert!(
        refused.error(1).contains("to the group 'root'"),
        "{refused}"
    );
    assert!(
        refused.stderr.contains("without --socket-group"),
        "{refused}"
    );
    let is_socket = |name: &str| run_directory.join(name).exists();
    assert!(!is_socket("control.sock"), "{refused}");
}

#[test]
fn a_mask_takes_nothing_from_the_modes_of_sockets_and_their_directory() {
    let builder = Server::builder().disk("vda", MIB).arg("--socket-mode=0660");
    let command = builder.command();
    let mut masked = Command::new("sh");
    masked.args(["-c", "umask 077; exec \"$0\" \"$@\""]);
    masked.arg(command.get_program()).args(command.get_args());
    let _server = KilledOnDrop::spawn(masked.stdout(Stdio::null()));
    let run_directory = builder.path("run");
    let wait = ["status", "--wait", "20", "--run-dir", path(&run_directory)];
    stillpoint(&wait).ok();
    let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
    assert_eq!(mode(&run_directory), 0o755);
    assert_eq!(mode(&run_directory.join("live.sock")), 0o660);
}

#[test]
fn a_socket_that_is_named_from_here_is_told_so_that_it_is_found_from_everywhere() {
    let builder = Server::builder()
        .disk("vda", MIB)
        .arg("--live-listen=unix:extra.sock");
    let mut command = builder.command();
    command.current_dir(builder.path(""));
    let _server = KilledOnDrop::spawn(command.stdout(Stdio::null()));
    let run_directory = builder.path("run");
    let wait = ["--wait", "20", "--run-dir", path(&run_directory), "--json"];
    let status = stillpoint(&[&["status"], &wait[..]].concat());
    let socket = format!("?socket={}\"", path(&builder.path("extra.sock")));
    assert!(status.ok().contains(&socket), "{status}");
}

#[test]
fn backups_can_be_pulled_over_tcp_and_only_a_word_opens_a_network() {
    let server = Server::builder()
        .disk("vda", MIB)
        .arg("--backup-listen=tcp:127.0.0.1:0")
        .start();
    Guest::new(&server, "vda").write(0, &[7; 4096]);
    let begun = server.begin("b1", &[]);
    let uris = begun["disks"][0]["uris"].as_array().expect("a list");
    let uri = uris.iter().filter_map(Value::as_str);
    let uri = uri
        .into_iter()
        .find(|uri| uri.starts_with("nbd://127.0.0.1:"));
    let uri = uri.unwrap_or_else(|| panic!("no TCP in {begun}"));
    assert!(!uri.contains(":0/"), "the port that it got: {uri}");
    let found = nbdcopy_sha256(uri, server.directory());
    assert_eq!(found, sha256_of_file(&server.image("vda")));

    let open = "--live-listen=tcp:0.0.0.0:0";
    let builder = Server::builder().disk("vda", MIB).arg(open);
    builder.start_and_fail().refused("unencrypted");
    builder.arg("--allow-plaintext").start().is_well();
}

#[test]
fn a_second_server_on_an_image_is_refused_and_told_who_has_it() {
    let server = Server::with_disk(MIB);
    let output = Server::builder()
        .disk_at("vda", &server.image("vda"))
        .start_and_fail();
    output.error(1);
    assert!(
        output.stderr.contains(&server.pid().to_string()),
        "no pid in\n{output}"
    );
    server.is_well();
}

#[test]
fn the_last_requests_of_who_had_the_image_are_waited_for() {
    let mut server = Server::with_disk(MIB);
    server.stop();
    // A lock that no process has, like that of one that has ended: what is on its way through a
    // socket is open all the same.
    let (near, far) = UnixStream::pair().unwrap();
    let image = fs::File::open(server.image("vda")).unwrap();
    flock(&image, FlockOperation::LockExclusive).unwrap();
    let mut room = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut ancillary = SendAncillaryBuffer::new(&mut room);
    let images = [image.as_fd()];
    assert!(ancillary.push(SendAncillaryMessage::ScmRights(&images)));
    let text = [IoSlice::new(b"x")];
    sendmsg(&near, &text, &mut ancillary, SendFlags::empty()).unwrap();
    drop(image);
    let log = server.path("stderr");
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let begun = Instant::now();
            while !fs::read_to_string(&log).is_ok_and(|log| log.contains("nobody has it open")) {
                assert!(begun.elapsed() < PATIENCE, "the server does not wait");
                std::thread::yield_now();
            }
            drop((near, far));
        });
        server.start();
    });
}

#[test]
fn a_second_server_in_a_run_directory_is_refused() {
    let server = Server::with_disk(MIB);
    let second = Server::builder()
        .disk("vdb", MIB)
        .run_directory(&server.path("run"));
    second.start_and_fail().error(1);
    server.is_well();
    assert_eq!(server.open_live("vda").export().size, MIB);
}

#[test]
fn two_names_for_one_image_are_refused() {
    let builder = Server::builder().disk("vda", MIB);
    let image = builder.path("vda.raw");
    let refused = builder.disk_at("vdb", &image).start_and_fail();
    let already = format!("cannot use '{}': it is disk 'vda' already", path(&image));
    assert!(refused.error(1).contains(&already), "{refused}");
}

#[test]
fn qemu_is_refused_while_we_have_the_image_and_we_while_qemu_has_it() {
    let server = Server::with_disk(MIB);
    let image = server.image("vda");
    for command in [&["-c", "write 0 512"][..], &["-r", "-c", "read 0 512"]] {
        let args = [&["-f", "raw"], command, &[path(&image)]].concat();
        let output = tool("qemu-io", &args);
        assert_ne!(output.code(), 0, "{output}");
        assert!(output.stderr.contains("lock"), "{output}");
    }
    let other = server.path("other.raw");
    sparse_file(&other, MIB);
    with_qemu_nbd(&["-f", "raw", path(&other)], |_| {
        let output = Server::builder().disk_at("vda", &other).start_and_fail();
        assert!(output.error(1).contains("lock") || output.stderr.contains("in use"));
    });
    let mut server = Server::builder().disk_at("vda", &other).start();
    server.stop();
    tool("qemu-io", &["-f", "raw", "-c", "write 0 512", path(&other)]).ok();
}

fn open_to_all(directory: &Path) {
    fs::create_dir(directory).unwrap();
    fs::set_permissions(directory, fs::Permissions::from_mode(0o777)).unwrap();
}

/// Starts a server that is to fail as a user who may do little.
fn as_nobody(builder: &Builder) -> Output {
    let command = builder.command();
    if !is_root() {
        return run(&mut { command });
    }
    // The build may be where only its owner can look.
    let directory = builder.path("");
    fs::set_permissions(&directory, fs::Permissions::from_mode(0o755)).unwrap();
    let binary = directory.join("stillpoint");
    fs::copy(command.get_program(), &binary).unwrap();
    let mut limited = Command::new("setpriv");
    limited.args(["--reuid=65534", "--regid=65534", "--clear-groups"]);
    run(limited
        .arg(&binary)
        .args(command.get_args())
        .current_dir("/"))
}

fn is_root() -> bool {
    rustix::process::geteuid().is_root()
}
