//! What happens at each limit of docs/limits.md: a refusal that says why, and others are served.

use std::fs::{self, File};
use std::path::Path;
use std::time::{Duration, Instant};

use rustix::fs::{Advice, fadvise};
use rustix::process::{Resource, getpriority_process, getrlimit, setrlimit};
use serde_json::json;
use stillpoint_tests::process::PATIENCE;
use stillpoint_tests::raw_nbd::{command, option, rep};
use stillpoint_tests::rude::{
    Address, Heard, Rude, option_message, private_memory, request, sized,
};
use stillpoint_tests::{MIB, Qmp, RawNbd, Server};

/// A server with a backup of its disk, and these arguments.
fn server(args: &[&str]) -> Server {
    let builder = Server::builder().disk("vda", SIZE);
    let builder = builder.arg("--live-listen=tcp:127.0.0.1:0");
    let server = args.iter().fold(builder, |builder, arg| builder.arg(arg));
    let server = server.start();
    server.begin("b1", &[]);
    server
}

#[test]
fn one_client_too_many_is_told_so_and_may_ask_again() {
    for (args, reason) in [
        (&["--peer-limit=2"][..], "2 clients of uid "),
        (&["--connection-limit=2"], "2 clients are served already"),
    ] {
        let mut server = server(args);
        let mut open: Vec<_> = (0..2).map(|_| server.open_live("vda")).collect();
        let mut third = RawNbd::connect(&server.live());
        third.send_option(option::GO, &[sized("vda"), vec![0, 0]].concat());
        let refused = third.option_reply().expect("a reply");
        assert_eq!(refused.kind, rep::ERR_POLICY, "{args:?}");
        let text = String::from_utf8(refused.data).expect("a text");
        assert!(text.contains(reason), "{args:?}: {text}");

        // Who is there is served, whoever asks for something else too, and in the end the third.
        open[0].write(0, &[1; 512]).unwrap();
        server.open_frozen("vda@b1", &[]).read(0, 512).unwrap();
        if args[0].contains("peer") {
            Rude::open(&Address::tcp(&server, "live"), "vda", &[]);
        }
        drop(open.pop());
        // None of those that left before was one of its role on this socket.
        server.wait_for_log(
            &format!("disconnected peer={} role=Live", this_process()),
            1,
        );
        third.go("vda").expect("a place has become free");
        assert_eq!(third.read(0, 512), Ok(vec![1; 512]));
        drop((open, third));
        server.stop();
    }
}

#[test]
fn who_takes_too_long_to_choose_an_export_is_left() {
    let server = server(&["--handshake-timeout=3s"]);
    let mut guest = server.open_live("vda");
    let to = Address::unix(&server.frozen());
    let mut silent = [Rude::connect(&to), Rude::greeted(&to)];
    for client in &mut silent {
        assert!(matches!(client.hear(1000, PATIENCE), Heard::End(_)));
    }
    says(&server, "no export was chosen within 3s");
    guest.write(0, &[1; 512]).unwrap();
}

#[test]
fn who_is_idle_is_left_if_that_was_asked_for_and_never_a_guest() {
    let server = server(&["--idle-timeout=500ms"]);
    let mut guest = server.open_live("vda");
    let mut idle = Rude::open(&Address::unix(&server.frozen()), "vda@b1", &[]);
    assert_eq!(idle.hear(1, PATIENCE), Heard::End(vec![]));
    says(&server, "the client has done nothing for");
    guest.write(0, &[1; 512]).unwrap();
}

#[test]
fn who_stops_in_the_middle_is_left_after_its_time() {
    let server = server(&["--stall-timeout=1s"]);
    let mut guest = server.open_live("vda");
    let live = Address::unix(&server.live());
    let mut header = Rude::open(&live, "vda", &[]);
    header.say(&request(command::READ, 1, 0, 512)[..27]);
    let mut payload = Rude::open(&live, "vda", &[]);
    payload.say(&request(command::WRITE, 1, 0, MIB as u32));
    let mut deaf = Rude::open(&live, "vda", &[]);
    for _ in 0..16 {
        deaf.say(&request(command::READ, 1, 0, MIB as u32));
    }
    for client in [&mut header, &mut payload] {
        assert_eq!(client.hear(1, PATIENCE), Heard::End(vec![]));
    }
    says(&server, "the client leaves a request unfinished");
    says(&server, "the client takes no replies");
    // The guest did nothing all the time.
    guest.write(0, &[1; 512]).unwrap();
    assert_eq!(guest.read(0, 512), Ok(vec![1; 512]));
}

#[test]
fn who_takes_nothing_does_not_keep_what_others_need() {
    hogs_make_way(|_| {});
}

/// What another thread has read is held like what the page cache had.
#[test]
fn nor_does_it_if_the_device_had_to_be_waited_for() {
    hogs_make_way(|image| {
        let image = File::open(image).expect("the image");
        fadvise(&image, 0, None, Advice::DontNeed).expect("advice is taken");
    });
}

/// Two clients that take no replies hold all that is shared; something is done with the image before
/// each asks.
fn hogs_make_way(before_each: fn(&Path)) {
    let server = server(&["--connection-limit=64", "--buffer-limit=224M"]);
    let live = Address::unix(&server.live());
    let mut guest = server.open_live("vda");
    guest.write(0, &vec![1; 32 * MIB as usize]).unwrap();
    guest.flush().unwrap();
    let ask = request(command::READ, 1, 0, 32 * MIB as u32);
    let hogs = [(); 2].map(|()| {
        let mut hog = Rude::open(&live, "vda", &[]);
        before_each(&server.image("vda"));
        hog.say(&ask);
        assert!(matches!(hog.hear(1, PATIENCE), Heard::Bytes(_)));
        hog
    });
    // As much as each of them, and more than this one has of its own.
    guest.read(0, 32 * MIB as u32).unwrap();
    let log = server.stderr();
    let waited = log.split("the client takes no replies, for ").nth(1);
    let seconds: f64 = waited
        .and_then(|told| told.split_once("s now")?.0.parse().ok())
        .unwrap_or_else(|| panic!("who asks later had to wait for nobody:\n{log}"));
    // Whoever is in nobody's way has five minutes.
    assert!((5.0..60.0).contains(&seconds), "{seconds} s:\n{log}");
    drop(hogs);
}

#[test]
fn however_much_block_status_is_asked_for_the_threads_for_waiting_are_there_for_others() {
    let server = server(&[]);
    let mut guest = server.open_live("vda");
    for chunk in 0..SIZE / MIB {
        guest.write(chunk * MIB, &[1; 4096]).unwrap();
    }
    for (path, name) in [(server.live(), "vda"), (server.frozen(), "vda@b1")] {
        let mut clients: Vec<_> = (0..8)
            .map(|_| Rude::open(&Address::unix(&path), name, &["base:allocation"]))
            .collect();
        for client in &mut clients {
            client.say(&request(command::BLOCK_STATUS, 1, 0, SIZE as u32).repeat(100));
        }
        // A thread that has nothing to do any more waits some seconds for something.
        for client in &mut clients {
            assert!(matches!(client.hear(100 * 32, PATIENCE), Heard::Bytes(_)));
        }
    }
    let threads = threads(&server);
    let is_worker = |name: &str| name.starts_with("live-") || name.starts_with("backup-");
    let waiting = threads.iter().filter(|thread| !is_worker(&thread.name));
    // A pool that is asked for all that it has makes 32, and there are two at least of each role. What
    // is at work is two of each; now and then another is made before one of them is idle.
    assert!(waiting.count() < 64, "{threads:?}");
}

#[test]
fn backups_leave_the_processor_to_guests() {
    let server = server(&[]);
    let threads = threads(&server);
    let nice = |role: &str| -> Vec<_> {
        let of_role = threads
            .iter()
            .filter(|thread| thread.name.starts_with(role));
        of_role.map(|thread| thread.nice).collect()
    };
    let (live, backup) = (nice("live-"), nice("backup-"));
    assert!(
        !live.is_empty() && live.len() == backup.len(),
        "{threads:?}"
    );
    let own = getpriority_process(None).unwrap();
    assert!(live.iter().all(|nice| *nice == own), "{threads:?}");
    let less = (own + 5).min(19);
    assert!(backup.iter().all(|nice| *nice == less), "{threads:?}");
}

/// A thread of a server.
#[derive(Debug)]
struct Thread {
    name: String,
    nice: i32,
}

fn threads(server: &Server) -> Vec<Thread> {
    let tasks = fs::read_dir(format!("/proc/{}/task", server.pid())).unwrap();
    let stats = tasks.filter_map(|task| fs::read_to_string(task.ok()?.path().join("stat")).ok());
    stats
        .map(|stat| {
            let (head, rest) = stat.rsplit_once(") ").expect("a name");
            let (_, name) = head.split_once('(').expect("a name");
            // Of proc_pid_stat(5) the 19th; the name was the second.
            let nice = rest.split(' ').nth(16).expect("a nice value");
            Thread {
                name: name.to_owned(),
                nice: nice.parse().expect("a number"),
            }
        })
        .collect()
}

#[test]
fn a_control_client_that_takes_no_replies_makes_the_server_remember_one() {
    let mut server = server(&[]);
    let mut qmp = server.qmp();
    for number in 0..CHECKPOINTS {
        qmp.execute("checkpoint-create", &json!({"name": format!("cp{number}")}));
    }
    let reply = qmp
        .execute("query-checkpoints", &json!({}))
        .to_string()
        .len() as u64;
    let before = private_memory(server.pid());
    let ask = json!({"execute": "query-checkpoints"})
        .to_string()
        .repeat(200);
    let mut deaf: Vec<_> = (0..16).map(|_| Qmp::connect(&server.control())).collect();
    for client in &mut deaf {
        client.send(ask.as_bytes());
    }
    // Whoever asks after them is answered, so they have been read.
    for _ in 0..100 {
        qmp.execute("query-checkpoints", &json!({}));
        let grown = private_memory(server.pid()).saturating_sub(before);
        let most = 16 * 4 * reply + 8 * MIB;
        assert!(grown < most, "{grown} bytes for replies of {reply}");
    }
    // Nor do they hold up the stop.
    let begun = Instant::now();
    server.stop();
    assert!(
        begun.elapsed() < Duration::from_secs(3),
        "{:?}",
        begun.elapsed()
    );
}

#[test]
fn nothing_on_the_backup_socket_tells_a_live_disk_from_none() {
    let server = Server::builder().disk("vda", MIB).disk("vdb", MIB).start();
    server.begin("b1", &["--disk", "vdb"]);
    server.checkpoint("cp1");
    for (live, none) in [
        ("vda", "xyz"),
        ("vda@b1", "xyz@b1"),
        ("vda@cp1..b1", "xyz@cp1..b1"),
    ] {
        for option in [
            option::INFO,
            option::GO,
            option::LIST_META_CONTEXT,
            option::SET_META_CONTEXT,
        ] {
            let [live, none] = [live, none].map(|name| all_that_is_said(&server, option, name));
            assert!(live == none, "option {option}: {live:?}, {none:?}");
            assert!(!live.is_empty());
        }
        let [live, none] = [live, none].map(|name| {
            let mut client = Rude::greeted(&Address::unix(&server.frozen()));
            client.say(&option_message(option::EXPORT_NAME, name.as_bytes()));
            client.hear(1000, PATIENCE)
        });
        assert_eq!((live, none), (Heard::End(vec![]), Heard::End(vec![])));
    }
    let listed = RawNbd::connect(&server.frozen()).list().unwrap();
    assert!(
        listed.iter().all(|(name, _)| !name.starts_with("vda")),
        "{listed:?}"
    );
}

/// Everything that the backup socket answers to an option about `name`.
fn all_that_is_said(server: &Server, option: u32, name: &str) -> Vec<u8> {
    let mut client = Rude::greeted(&Address::unix(&server.frozen()));
    let data = match option {
        option::INFO | option::GO => [sized(name), vec![0, 0]].concat(),
        _ => [sized(name), vec![0, 0, 0, 1], sized("base:allocation")].concat(),
    };
    client.say(&option_message(option::STRUCTURED_REPLY, &[]));
    client.say(&option_message(option, &data));
    client.say(&option_message(option::ABORT, &[]));
    match client.hear(usize::MAX, PATIENCE) {
        Heard::End(heard) => heard,
        other => panic!("no end after a good-bye: {other:?}"),
    }
}

#[test]
fn the_log_tells_who_comes_who_is_refused_and_who_goes() {
    let server = server(&[]);
    let mut guest = server.open_live("vda");
    guest.read(0, 512).unwrap();
    let who = this_process();
    says(
        &server,
        &format!("connected peer={who} role=Live export=\"vda\""),
    );
    assert!(RawNbd::try_open(&server.frozen(), "vda", &[]).is_ok());
    assert!(RawNbd::try_open(&server.frozen(), "nothing", &[]).is_err());
    says(
        &server,
        &format!("refused an export peer={who} role=Backup reason=no such export"),
    );
    guest.disconnect();
    says(&server, &format!("disconnected peer={who} role=Live"));
    drop(Rude::open(&Address::tcp(&server, "live"), "vda", &[]));
    says(&server, "connected peer=127.0.0.1:");
    says(&server, "disconnected peer=127.0.0.1:");
}

#[test]
fn limits_that_cannot_be_kept_are_refused_at_the_start() {
    let builder = Server::builder().disk("vda", MIB).arg("--buffer-limit=64M");
    let refused = builder.start_and_fail();
    refused.error(1);
    assert!(refused.stderr.contains("at least 436207616"), "{refused}");
    Server::builder()
        .arg("--peer-limit=0")
        .disk("vda", MIB)
        .start_and_fail()
        .exits(2);
}

#[test]
fn a_server_takes_as_many_descriptors_as_it_may() {
    // As it is for most services; for this process and those that it starts.
    let mut limit = getrlimit(Resource::Nofile);
    limit.current = limit.maximum.map(|most| most.min(512));
    setrlimit(Resource::Nofile, limit).expect("less than before");
    let server = Server::with_disk(MIB);
    let limits = std::fs::read_to_string(format!("/proc/{}/limits", server.pid()));
    let limits = limits.expect("a live process");
    let line = limits
        .lines()
        .find(|line| line.starts_with("Max open files"));
    let words: Vec<_> = line.expect("a limit").split_whitespace().collect();
    assert_eq!(words[3], words[4], "{words:?}");
    assert_ne!(words[3], "512");
}

/// As the log calls it.
fn this_process() -> String {
    let uid = rustix::process::getuid().as_raw();
    format!("uid {uid}, pid {}", std::process::id())
}

/// Waits until the server's log says this.
#[track_caller]
fn says(server: &Server, text: &str) {
    let begun = Instant::now();
    while !server.stderr().contains(text) {
        assert!(
            begun.elapsed() < PATIENCE,
            "nothing about {text:?}\n{}",
            server.stderr()
        );
        std::thread::yield_now();
    }
}

const SIZE: u64 = 64 * MIB;

/// Enough for replies of many KiB.
const CHECKPOINTS: usize = 300;
