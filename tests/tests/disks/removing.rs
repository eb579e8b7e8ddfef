//! What is removed is whole, and somebody else's from then on.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use rustix::process::Signal;
use serde_json::json;
use stillpoint_tests::killer::Killer;
use stillpoint_tests::raw_nbd::{command, errno};
use stillpoint_tests::shadow::{Change, Event, SECTOR};
use stillpoint_tests::tools::{path, tool};
use stillpoint_tests::{CHUNK, Guest, NbdBase, RawNbd, Server, Shadow};

use super::{SIZE, add, builder, changed, disks, listed, map_of, remove, spec};

#[test]
fn a_disk_that_was_removed_is_anybodys_and_its_chain_goes_on() {
    let server = builder().start();
    let mut qmp = server.qmp();
    add(&server, "vdb");
    let mut guest = Guest::new(&server, "vdb");
    server.checkpoint("cp1");
    guest.write(2 * CHUNK, &[1; 4096]);
    let bytes = guest.disk.clone();
    drop(guest);
    remove(&server, "vdb");
    assert_eq!(qmp.event("DISK_REMOVED")["data"], json!({"disk": "vdb"}));
    assert_eq!(
        (disks(&server), listed(&server)),
        (vec!["vda".into()], vec!["vda".into()])
    );
    assert_eq!(std::fs::read(server.image("vdb")).unwrap(), bytes);

    // Whoever writes it may: no lock is left.
    let image = path(&server.image("vdb")).to_owned();
    tool("qemu-img", &["info", "-f", "raw", &image]).ok();
    let mut other = Server::builder().disk_as(&spec(&server, "vdb")).start();
    assert_eq!(changed(&other, "i1", "vdb", "cp1"), map_of(&[2]));
    other.open_live("vdb").write(4 * CHUNK, &[2; 512]).unwrap();
    let refused = server.cli(&["disk", "add", &spec(&server, "vdb")]);
    assert!(
        refused.error(1).contains(&format!("pid {}", other.pid())),
        "{refused}"
    );
    other.stop();
    add(&server, "vdb");
    assert_eq!(changed(&server, "i2", "vdb", "cp1"), map_of(&[2, 4]));
    let stderr = server.stderr();
    assert!(
        !stderr.contains("damaged") && !stderr.contains("begun anew"),
        "{stderr}"
    );
}

#[test]
fn who_has_the_disk_is_named_and_disconnected_only_by_force() {
    let server = builder().start();
    add(&server, "vdb");
    let mut clients = [server.open_live("vdb"), server.open_live("vdb")];
    let mut other = server.open_live("vda");
    let refused = server.cli(&["disk", "remove", "vdb"]);
    let who = format!(
        "in use by 2 clients: uid 0, pid {0}; uid 0, pid {0}",
        std::process::id()
    );
    assert!(refused.error(1).contains(&who), "{refused}");
    assert!(refused.stderr.contains("--force"), "{refused}");
    for client in &mut clients {
        client.write(0, &[1; 512]).unwrap();
    }

    let begun = Instant::now();
    server.cli(&["disk", "remove", "vdb", "--force"]).ok();
    for client in &mut clients {
        assert!(client.is_closed());
    }
    // As soon as all is durable; their patience is not waited for.
    assert!(
        begun.elapsed() < Duration::from_secs(20),
        "{:?}",
        begun.elapsed()
    );
    other.write(0, &[2; 512]).unwrap();
    server.is_well();
}

#[test]
fn what_was_acknowledged_before_a_removal_by_force_is_in_the_image() {
    let server = builder().start();
    let mut qmp = server.qmp();
    let mut sent_away = 0;
    for round in 0..4_u64 {
        add(&server, "vdb");
        let checkpoint = format!("cp{round}");
        server.checkpoint(&checkpoint);
        let before = std::fs::read(server.image("vdb")).unwrap();
        let done = AtomicU64::new(0);
        let (events, ends) = std::thread::scope(|scope| {
            let writers: Vec<_> = (0..WRITERS)
                .map(|writer| {
                    let (live, done) = (server.open_live("vdb"), &done);
                    scope.spawn(move || write_until_sent_away(live, writer, round, done))
                })
                .collect();
            while done.load(Ordering::Relaxed) < 200 {
                std::thread::yield_now();
            }
            qmp.execute("disk-remove", &json!({"disk": "vdb", "force": true}));
            let all = writers.into_iter().map(|writer| writer.join().unwrap());
            all.unzip::<_, _, Vec<_>, Vec<_>>()
        });
        assert!(
            ends.iter().all(|end| [errno::ESHUTDOWN, 0].contains(end)),
            "{ends:?}"
        );
        let mut shadow = Shadow::new(SIZE, CHUNK);
        let events: Vec<Event> = events.into_iter().flatten().collect();
        sent_away += u32::from((events.len() as u64) < MOST * WRITERS);
        assert!(events.iter().filter(|event| event.acknowledged).count() > 100);
        let bytes = std::fs::read(server.image("vdb")).unwrap();
        check_written(&bytes, &before, &events, round);
        shadow.add(events);
        add(&server, "vdb");
        let map = changed(&server, &format!("i{round}"), "vdb", &checkpoint);
        shadow.check_map(
            &map,
            ((0, 0), (u64::MAX, u64::MAX)),
            &format!("round {round}"),
        );
        remove(&server, "vdb");
    }
    assert!(sent_away > 0, "all had written before");
}

const WRITERS: u64 = 3;

/// How many places each of them has.
const MOST: u64 = SIZE / SECTOR / WRITERS;

/// Each place is written once: it holds that if it was acknowledged, and else that or what was there.
#[track_caller]
fn check_written(bytes: &[u8], before: &[u8], events: &[Event], round: u64) {
    for event in events {
        let Change::Fill(stamp) = event.change else {
            panic!("nothing else is done here");
        };
        let range = event.offset as usize..(event.offset + event.length) as usize;
        let expected = stamp.to_le_bytes().repeat(event.length as usize / 8);
        let found = &bytes[range.clone()];
        let is_old = !event.acknowledged && found == &before[range];
        assert!(found == expected || is_old, "round {round}, {event:?}");
    }
}

/// Writes with many requests in flight until the server answers no more; also says with which error
/// it began to refuse, if with any.
fn write_until_sent_away(
    live: RawNbd,
    writer: u64,
    round: u64,
    done: &AtomicU64,
) -> (Vec<Event>, u32) {
    let (mut sender, mut receiver) = live.split();
    let place = |number: u64| (number * WRITERS + writer) * SECTOR;
    let (mut events, mut end) = (Vec::new(), 0);
    let mut sent = 0;
    loop {
        while sent < MOST && sent < events.len() as u64 + 16 && end == 0 {
            let stamp = round << 32 | place(sent) | 1;
            let bytes = stamp.to_le_bytes().repeat(SECTOR as usize / 8);
            let request = (command::WRITE, 0);
            if sender
                .request(request, sent, place(sent), SECTOR as u32, &bytes)
                .is_err()
            {
                break;
            }
            sent += 1;
        }
        let Ok(answer) = receiver.answer() else {
            break;
        };
        if answer.error != 0 {
            end = answer.error;
        }
        events.push((answer.cookie, answer.error == 0));
        done.fetch_add(1, Ordering::Relaxed);
        if events.len() as u64 == MOST {
            break;
        }
    }
    let event = |number: u64| {
        let acknowledged = events.contains(&(number, true));
        Event {
            offset: place(number),
            length: SECTOR,
            change: Change::Fill(round << 32 | place(number) | 1),
            issued: 1,
            ended: 2,
            acknowledged,
        }
    };
    ((0..sent).map(event).collect(), end)
}

#[test]
fn a_write_under_way_ends_before_the_end_of_its_disk_is_recorded() {
    let server = builder().start();
    add(&server, "vdb");
    server.checkpoint("cp1");
    let (mut sender, mut receiver) = server.open_live("vdb").split();
    {
        let _slow = Killer::slowing(&server, "pwrite64", &server.image("vdb"), 2_000_000);
        let mut qmp = server.qmp();
        let request = (command::WRITE, 0);
        sender
            .request(request, 1, 6 * CHUNK, 4096, &[6; 4096])
            .unwrap();
        // The map has it, so it is under way.
        while server.dirty_bytes("cp1", "vdb") == 0 {}
        qmp.execute("disk-remove", &json!({"disk": "vdb", "force": true}));
        let bytes = std::fs::read(server.image("vdb")).unwrap();
        assert_eq!(bytes[6 * CHUNK as usize..][..4096], [6; 4096]);
        // Who asked hears that it is done, before the connection ends.
        assert_eq!(receiver.answer().unwrap().done(), Ok(()));
    }
    add(&server, "vdb");
    assert_eq!(changed(&server, "i1", "vdb", "cp1"), map_of(&[6]));
}

#[test]
fn a_disk_in_an_open_backup_stays_and_the_backup_is_named() {
    let server = builder().start();
    add(&server, "vdb");
    server.begin("b1", &["--disk", "vdb"]);
    server.begin("b2", &[]);
    for force in [
        &["disk", "remove", "vdb"][..],
        &["disk", "remove", "vdb", "--force"],
    ] {
        let refused = server.cli(force);
        assert!(
            refused.error(1).contains("open backup: 'b1', 'b2'"),
            "{refused}"
        );
        assert!(refused.stderr.contains("commit or abort"), "{refused}");
    }
    server.abort("b1");
    let refused = server.cli(&["disk", "remove", "vdb"]);
    assert!(refused.error(1).contains("open backup: 'b2'"), "{refused}");
    server.commit("b2");
    remove(&server, "vdb");
}

#[test]
fn who_still_has_an_export_of_an_ended_backup_is_not_in_the_way() {
    let server = builder().start();
    add(&server, "vdb");
    server.begin("b1", &[]);
    let mut frozen = server.open_frozen("vdb@b1", &[]);
    let mut other = server.open_frozen("vda@b1", &[]);
    frozen.read(0, 4096).unwrap();
    server.commit("b1");
    remove(&server, "vdb");
    assert!(frozen.is_closed());
    assert_eq!(other.read(0, 512), Err(errno::ESHUTDOWN));
    add(&server, "vdb");
}

#[test]
fn a_disk_that_is_being_made_larger_stays() {
    let server = builder().start();
    let base = NbdBase::file(&server.image("vdb"));
    let state = server.path("state");
    let disk = format!("vdb={},state={},reconnect=30s", base.uri(), path(&state));
    server.cli(&["disk", "add", &disk]).ok();
    base.signal(Signal::STOP);
    let mut qmp = server.qmp();
    let resize = json!({"execute": "disk-resize", "arguments": {"disk": "vdb", "size": 2 * SIZE}});
    qmp.try_send(resize.to_string().as_bytes()).unwrap();
    let refused = server.cli(&["disk", "remove", "vdb", "--force"]);
    assert!(refused.error(1).contains("larger"), "{refused}");
    assert!(refused.stderr.contains("wait"), "{refused}");
    base.signal(Signal::CONT);
    let resized = qmp.reply();
    assert!(resized.get("error").is_some(), "{resized}");
    remove(&server, "vdb");
}

#[test]
fn a_disk_that_a_job_copies_stays() {
    let server = builder().start();
    let base = NbdBase::file(&server.image("vdb"));
    let state = server.path("state");
    server
        .cli(&[
            "disk",
            "add",
            &format!("vdb={},state={}", base.uri(), path(&state)),
        ])
        .ok();
    server.open_live("vdb").write(0, &[1; 4096]).unwrap();
    server.begin("p1", &["--disk", "vdb"]);
    base.signal(Signal::STOP);
    let mut qmp = server.qmp();
    let to = server.path("pushed");
    qmp.execute("push", &json!({"id": "p1", "to": path(&to)}));
    let refused = server.cli(&["disk", "remove", "vdb", "--force"]);
    assert!(refused.error(1).contains("copied by job 'p1'"), "{refused}");
    base.signal(Signal::CONT);
    while qmp.execute("query-jobs", &json!({}))[0]["status"] != "concluded" {
        std::thread::yield_now();
    }
    remove(&server, "vdb");
}
