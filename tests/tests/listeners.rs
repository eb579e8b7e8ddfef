//! Where the server listens: sockets that a service manager hands over, TCP, and IPv6; and what
//! other people's clients find there.

use std::fs::File;
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::fd::OwnedFd;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram, UnixListener};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use rustix::process::Signal;
use serde_json::Value;
use stillpoint_tests::process::{self, KilledOnDrop, Output, run, run_at_most};
use stillpoint_tests::server::{self, Builder};
use stillpoint_tests::tools::{path, tool};
use stillpoint_tests::{MIB, RawNbd, Server};

mod handed_over {
    use super::*;

    /// A command that starts the server of a builder with these sockets, as systemd would.
    fn command(builder: &Builder, sockets: Vec<OwnedFd>, names: &str) -> Command {
        command_for("$$", builder, sockets, names)
    }

    /// The same for the process with this id.
    fn command_for(pid: &str, builder: &Builder, sockets: Vec<OwnedFd>, names: &str) -> Command {
        let [out, err] = ["stdout", "stderr"].map(|name| builder.path(name));
        let moves = "exec 3<&0 4<&1 5<&2 0</dev/null";
        let script = format!(
            "{moves} >'{}' 2>'{}'; export LISTEN_PID={pid} LISTEN_FDS={} LISTEN_FDNAMES={names}; \
             exec \"$0\" \"$@\"",
            path(&out),
            path(&err),
            sockets.len()
        );
        let inner = builder.command();
        let mut command = Command::new("sh");
        command.args(["-c", &script]);
        command.arg(inner.get_program()).args(inner.get_args());
        let mut sockets = sockets.into_iter();
        let mut next = || sockets.next().map_or_else(Stdio::null, Stdio::from);
        command.stdin(next()).stdout(next()).stderr(next());
        assert!(sockets.next().is_none(), "three are possible");
        command
    }

    /// Runs a server that is expected to refuse, and returns what it said.
    fn refusal(builder: &Builder, sockets: Vec<OwnedFd>, names: &str) -> String {
        let mut server = KilledOnDrop::spawn(&mut command(builder, sockets, names));
        let status = process::wait(&mut server.child).expect("it ends");
        let told = std::fs::read_to_string(builder.path("stderr")).unwrap();
        assert_eq!(status.code(), Some(1), "{told}");
        told
    }

    fn cli(builder: &Builder, args: &[&str]) -> Output {
        let run_directory = builder.path("run");
        let mut command = Command::new(server::binary());
        run(command.arg("--run-dir").arg(&run_directory).args(args))
    }

    fn unix(path: &Path) -> OwnedFd {
        UnixListener::bind(path)
            .expect("a socket of our own")
            .into()
    }

    fn tcp(place: &str) -> (OwnedFd, u16) {
        let socket = TcpListener::bind(place).expect("a free port");
        let port = socket.local_addr().unwrap().port();
        (socket.into(), port)
    }

    /// Asks the server to stop, and sees that it does in good order.
    fn stop(mut server: KilledOnDrop) {
        process::signal(&server.child, Signal::TERM);
        let status = process::wait(&mut server.child).expect("it ends");
        assert!(status.success(), "{status}");
    }

    #[test]
    fn sockets_are_served_by_their_names_and_left_to_the_manager_at_a_stop() {
        let builder = Server::builder().disk("vda", MIB);
        std::fs::create_dir(builder.path("run")).unwrap();
        let (live, control) = (builder.path("other.sock"), builder.path("run/control.sock"));
        let (frozen, port) = tcp("127.0.0.1:0");
        let sockets = vec![unix(&live), frozen, unix(&control)];
        let server = KilledOnDrop::spawn(&mut command(&builder, sockets, "live:backup:control"));

        // It answers when it can: the sockets are there before it is.
        let mut nbd = RawNbd::open(&live, "vda", &[]);
        nbd.write(0, b"by another way").unwrap();
        let own = builder.path("run/live.sock");
        let found = RawNbd::open(&own, "vda", &[]).read(0, 14);
        assert_eq!(
            found,
            Ok(b"by another way".to_vec()),
            "its own are there too"
        );
        let begun = cli(&builder, &["backup", "begin", "--id=b1", "--json"]).json();
        let uris = begun["disks"][0]["uris"].as_array().expect("a list");
        let uri = format!("nbd://127.0.0.1:{port}/vda@b1");
        assert!(uris.contains(&Value::from(&*uri)), "{uris:?}");
        assert_eq!(tool("nbdinfo", &["--size", &uri]).ok().trim(), "1048576");

        stop(server);
        assert!(
            live.exists() && control.exists(),
            "they are not the server's"
        );
        assert!(!own.exists(), "this was");
    }

    #[test]
    fn a_single_socket_of_another_name_is_live() {
        for names in ["", "stillpoint.socket", "unknown", "live"] {
            let builder = Server::builder().disk("vda", MIB);
            let (socket, port) = tcp("[::1]:0");
            let server = KilledOnDrop::spawn(&mut command(&builder, vec![socket], names));
            let uri = format!("nbd://[::1]:{port}/vda");
            let info = tool("nbdinfo", &[&uri]);
            assert!(info.ok().contains("is_read_only: false"), "{info}");
            stop(server);
        }
    }

    #[test]
    fn a_socket_at_the_place_of_the_servers_own_takes_its_place() {
        let builder = Server::builder().disk("vda", MIB);
        std::fs::create_dir(builder.path("run")).unwrap();
        let live = builder.path("run/live.sock");
        let sockets = vec![unix(&live)];
        let server = KilledOnDrop::spawn(&mut command(&builder, sockets, "live"));
        assert_eq!(RawNbd::open(&live, "vda", &[]).export().size, MIB);
        let status = cli(&builder, &["status", "--json"]).json();
        assert_eq!(status["sockets"]["live"].as_array().map(Vec::len), Some(1));
        stop(server);
        assert!(live.exists());
    }

    #[test]
    fn what_cannot_be_served_is_refused_with_the_reason() {
        let builder = || Server::builder().disk("vda", MIB);
        let any = || tcp("127.0.0.1:0").0;
        let told = refusal(&builder(), vec![any(), any()], "live:what");
        assert!(
            told.contains("'what', has a name that says nothing"),
            "{told}"
        );
        assert!(told.contains("FileDescriptorName="), "{told}");
        let told = refusal(&builder(), vec![any(), any()], "backup");
        assert!(told.contains("''"), "{told}");

        let no_listener: OwnedFd = UnixDatagram::unbound().unwrap().into();
        let file: OwnedFd = File::open("/dev/null").unwrap().into();
        let name = SocketAddr::from_abstract_name(format!("stillpoint-{}", std::process::id()));
        let abstract_socket = UnixListener::bind_addr(&name.unwrap()).unwrap().into();
        for socket in [no_listener, file, abstract_socket] {
            let told = refusal(&builder(), vec![socket], "live");
            assert!(
                told.contains("'live', is no stream socket that listens"),
                "{told}"
            );
        }

        let told = refusal(&builder(), vec![tcp("0.0.0.0:0").0], "live");
        assert!(told.contains("unencrypted"), "{told}");

        let elsewhere = builder();
        let control = unix(&elsewhere.path("control"));
        let told = refusal(&elsewhere, vec![control], "control");
        let own = elsewhere.path("run/control.sock");
        assert!(
            told.contains(&format!("ListenStream={}", path(&own))),
            "{told}"
        );
    }

    #[test]
    fn what_is_meant_for_another_process_is_left_alone() {
        let builder = Server::builder().disk("vda", MIB);
        let (socket, port) = tcp("127.0.0.1:0");
        let mut command = command_for("1", &builder, vec![socket], "live");
        let _server = KilledOnDrop::spawn(&mut command);
        cli(&builder, &["status", "--wait", "20"]).ok();
        let told = std::fs::read_to_string(builder.path("stdout")).unwrap();
        assert!(!told.contains(&port.to_string()), "{told}");
    }
}

mod tcp {
    use super::*;

    #[test]
    fn port_0_prints_what_it_got_and_ipv6_is_served() {
        let server = Server::builder()
            .disk("vda", MIB)
            .arg("--live-listen=tcp:[::1]:0")
            .arg("--backup-listen=tcp:localhost:0")
            .start();
        let uri = format!("nbd://[::1]:{}/vda", server.port("live"));
        assert!(server.stdout().contains(&uri), "{}", server.stdout());
        assert_eq!(tool("nbdinfo", &["--size", &uri]).ok().trim(), "1048576");
        let status = server.cli_json(&["status"]);
        let place = format!("tcp:[::1]:{}", server.port("live"));
        let sockets = status["sockets"]["live"].as_array().expect("a list");
        assert!(sockets.contains(&Value::from(place)), "{status}");

        server.begin("b1", &[]);
        let uri = format!("nbd://localhost:{}/vda@b1", server.port("backups"));
        assert_eq!(tool("nbdinfo", &["--size", &uri]).ok().trim(), "1048576");
    }

    #[test]
    fn a_port_that_is_taken_is_refused_by_its_number() {
        let taken = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = taken.local_addr().unwrap().port();
        let builder = Server::builder().disk("vda", MIB);
        let builder = builder.arg(&format!("--live-listen=tcp:127.0.0.1:{port}"));
        builder.start_and_fail().refused(&port.to_string());
    }

    #[test]
    fn small_answers_are_not_held_back() {
        let server = Server::builder()
            .disk("vda", MIB)
            .arg("--live-listen=tcp:127.0.0.1:0")
            .start();
        let trace = server.path("trace");
        let mut strace = Command::new("strace");
        strace.args(["--follow-forks", "--trace=setsockopt", "--quiet=all"]);
        strace.args(["--output", path(&trace), "--attach"]);
        strace.arg(server.pid().to_string());
        let _strace = KilledOnDrop::spawn(&mut strace);
        // Until the tracer is there connections are not seen; each is a try.
        let port = server.port("live");
        let begun = std::time::Instant::now();
        loop {
            let mut stream = TcpStream::connect(("127.0.0.1", port)).unwrap();
            stream.read_exact(&mut [0; 18]).unwrap();
            stream.write_all(&3u32.to_be_bytes()).unwrap();
            let told = std::fs::read_to_string(&trace).unwrap_or_default();
            if told.contains("TCP_NODELAY, [1]") {
                return;
            }
            assert!(
                begun.elapsed() < process::PATIENCE,
                "no TCP_NODELAY: {told}"
            );
        }
    }
}

mod nbd_client {
    use super::*;

    fn nbd_client(args: &[&str]) -> Output {
        run_at_most(
            Command::new("nbd-client").args(args),
            Duration::from_secs(20),
        )
    }

    #[test]
    fn it_lists_the_exports() {
        let server = Server::builder()
            .disk("vda", MIB)
            .disk("vdb", 2 * MIB)
            .arg("--live-listen=tcp:127.0.0.1:0")
            .start();
        let port = server.port("live").to_string();
        let listed = nbd_client(&["-l", "127.0.0.1", &port]);
        for name in ["vda", "vdb"] {
            let mut lines = listed.stdout.lines();
            assert!(lines.any(|line| line.starts_with(name)), "{listed}");
        }
        server.is_well();
    }

    #[test]
    fn it_negotiates_and_tells_the_size_and_then_wants_its_kernel_module() {
        let server = Server::builder()
            .disk("vda", 3 * MIB)
            .arg("--live-listen=tcp:127.0.0.1:0")
            .start();
        let port = server.port("live").to_string();
        let told = nbd_client(&["-N", "vda", "127.0.0.1", &port, "/dev/null"]);
        assert!(told.to_string().contains("size = 3MB"), "{told}");
        server.is_well();
    }
}
