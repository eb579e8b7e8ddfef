//! A server, or the command without one, is killed at each of its system calls. The next start has
//! the old size or the new one, and goes on with the chain.

use std::fs::{self, File};
use std::os::unix::process::ExitStatusExt;
use std::time::Duration;

use serde_json::json;
use stillpoint_tests::killer::{Killer, execute_and_die, killing};
use stillpoint_tests::process::{KilledOnDrop, run, wait, wait_at_most};
use stillpoint_tests::state::{Begun, begin_since, directory, pretend_power_cut};
use stillpoint_tests::tools::path;
use stillpoint_tests::{Extent, Server};

use super::{
    AFTER, BEFORE, WRITTEN, changed_since, grown_map, map_before, prepared, resize, size_of,
};

/// All that a resize does something with.
const CALLS: [&str; 5] = ["fsync", "fdatasync", "pwrite64", "ftruncate", "fallocate"];

/// Has the disk grow in a server that is killed at the `n`th of its `calls`, or else afterwards;
/// whether it answered.
fn resize_and_die(server: &mut Server, calls: &str, n: usize) -> bool {
    let arguments = json!({"disk": "vda", "size": AFTER});
    let command = json!({"execute": "disk-resize", "arguments": arguments});
    execute_and_die(server, &command, calls, n)
}

#[test]
fn a_server_that_is_killed_at_any_call_goes_on_with_either_size() {
    let mut ends = Ends::default();
    for calls in CALLS {
        for n in 1.. {
            let how = format!("{calls} {n}");
            let mut server = prepared();
            server.begin("b1", &["--since", "cp1"]);
            let then = server.open_live("vda").read_all();
            let answered = resize_and_die(&mut server, calls, n);
            server.start();
            check(&server, answered, &how, &mut ends);
            let mut frozen = server.open_frozen("vda@b1", &[]);
            assert_eq!(frozen.export().size, BEFORE, "{how}");
            assert!(frozen.read_all() == then, "{how}");
            finish(&mut server, &how);
            if answered {
                break;
            }
        }
    }
    ends.were_both();
}

#[test]
fn a_power_cut_at_any_call_loses_no_change() {
    let mut ends = Ends::default();
    for calls in CALLS {
        for n in 1.. {
            let how = format!("{calls} {n}");
            let mut server = prepared();
            let answered = resize_and_die(&mut server, calls, n);
            pretend_power_cut(&directory(&server, "vda"));
            server.start();
            let size = size_of(&server);
            ends.count(size, answered, &how);
            let needed = if size == AFTER {
                grown_map(&[WRITTEN])
            } else {
                map_before(&[WRITTEN])
            };
            match begin_since(&server, "i1", "vda", "cp1") {
                Begun::Incremental { map, .. } => assert!(covers(&map, &needed), "{how}: {map:?}"),
                Begun::Full { reason } => panic!("{how}: full: {reason}"),
            }
            resize(&server, AFTER);
            match begin_since(&server, "i2", "vda", "cp1") {
                Begun::Incremental { map, .. } => {
                    assert!(covers(&map, &grown_map(&[WRITTEN])), "{how}: {map:?}");
                }
                Begun::Full { reason } => panic!("{how}: full: {reason}"),
            }
            if answered {
                break;
            }
        }
    }
    ends.were_both();
}

#[test]
fn the_command_without_a_server_is_killed_at_any_call_and_the_next_start_goes_on() {
    let mut ends = Ends::default();
    for calls in CALLS {
        for n in 1.. {
            let how = format!("{calls} {n}, without a server");
            let mut server = prepared();
            server.stop();
            let disk = format!("vda={}", path(&server.image("vda")));
            let size = AFTER.to_string();
            let command = server.cli_command(&["disk", "resize", "--disk", &disk, "vda", &size]);
            let output = run(killing(calls, n)
                .arg(command.get_program())
                .args(command.get_args()));
            let answered = output.status.success();
            // strace ends as what it ran has ended.
            assert!(answered || output.status.signal() == Some(9), "{output}");
            // Half of the time the same again, and else a server, ends it.
            if n % 2 == 0 {
                run(&mut server.cli_command(&["disk", "resize", "--disk", &disk, "vda", &size]))
                    .ok();
            }
            server.start();
            check(&server, answered || n % 2 == 0, &how, &mut ends);
            finish(&mut server, &how);
            if answered {
                break;
            }
        }
    }
    ends.were_both();
}

#[test]
fn a_start_that_ends_a_resize_is_killed_at_any_call_and_the_next_one_ends_it() {
    let mut interrupted = 0;
    for calls in ["fdatasync", "pwrite64"] {
        for n in 1.. {
            let how = format!("start, {calls} {n}");
            let mut server = enlarged_and_killed();
            let started = start_and_kill_at(&server, calls, n);
            interrupted += u32::from(!started);
            server.start();
            assert_eq!(size_of(&server), AFTER, "{how}");
            let found = changed_since(&server, "i1", "cp1", &how);
            assert_eq!(found, grown_map(&[WRITTEN]), "{how}");
            if started {
                break;
            }
        }
    }
    assert!(interrupted > 10, "{interrupted}");
}

/// A server that was killed when the image had its new size, and nothing was marked.
fn enlarged_and_killed() -> Server {
    // Which of them it is depends on which thread makes the call.
    for attempt in 0..40 {
        let mut server = prepared();
        let answered = {
            let mut qmp = server.qmp();
            let _killer = Killer::of(&server, "fdatasync", 1 + attempt % 6);
            let arguments = json!({"disk": "vda", "size": AFTER});
            let command = json!({"execute": "disk-resize", "arguments": arguments});
            qmp.try_send(command.to_string().as_bytes()).unwrap();
            qmp.receive().is_some()
        };
        if answered {
            continue;
        }
        server.wait();
        if fs::metadata(server.image("vda")).unwrap().len() == AFTER {
            return server;
        }
    }
    panic!("one of these comes after the image is enlarged");
}

/// Starts a server that is killed at the `n`th of these calls, or asked to stop when it serves before
/// that, which is what is returned.
fn start_and_kill_at(server: &Server, calls: &str, n: usize) -> bool {
    let serve = server.command();
    let mut strace = killing(calls, n);
    strace.arg(serve.get_program()).args(serve.get_args());
    let log = File::create(server.path("killed")).unwrap();
    let mut strace = KilledOnDrop::spawn(strace.stdout(log.try_clone().unwrap()).stderr(log));
    loop {
        if wait_at_most(&mut strace.child, Duration::from_millis(20)).is_some() {
            return false;
        }
        if server.cli(&["status"]).status.success() {
            // Where this is too late, the stop is what is killed.
            server.cli(&["qmp", r#"{"execute":"quit"}"#]);
            assert!(wait(&mut strace.child).is_some(), "it goes on");
            return true;
        }
    }
}

/// How often which size was found.
#[derive(Debug, Default)]
struct Ends {
    before: u32,
    after: u32,
}

impl Ends {
    #[track_caller]
    fn count(&mut self, size: u64, answered: bool, how: &str) {
        match size {
            BEFORE if !answered => self.before += 1,
            AFTER => self.after += 1,
            _ => panic!("{how}, answered {answered}: {size} bytes"),
        }
    }

    #[track_caller]
    fn were_both(&self) {
        assert!(self.before >= 3 && self.after >= 5, "{self:?}");
    }
}

/// What is found is exact, whichever size it is.
#[track_caller]
fn check(server: &Server, answered: bool, how: &str, ends: &mut Ends) {
    let size = size_of(server);
    ends.count(size, answered, how);
    let length = fs::metadata(server.image("vda")).unwrap().len();
    assert_eq!(length, size, "{how}");
    let expected = if size == AFTER {
        grown_map(&[WRITTEN])
    } else {
        map_before(&[WRITTEN])
    };
    assert_eq!(changed_since(server, "i1", "cp1", how), expected, "{how}");
}

/// It can be resized as if nothing had happened, and stays so.
#[track_caller]
fn finish(server: &mut Server, how: &str) {
    resize(server, AFTER);
    server
        .open_live("vda")
        .write(AFTER - 512, &[5; 512])
        .unwrap();
    let found = changed_since(server, "i2", "cp1", how);
    assert_eq!(found, grown_map(&[WRITTEN]), "{how}");
    server.stop();
    server.start();
    let found = changed_since(server, "i3", "cp1", how);
    assert_eq!(found, grown_map(&[WRITTEN]), "{how}");
}

/// Whether all that is dirty in `needed` is dirty in `map`.
fn covers(map: &[Extent], needed: &[Extent]) -> bool {
    let dirty = |map: &[Extent]| -> Vec<Extent> {
        map.iter().copied().filter(|extent| extent.2 == 1).collect()
    };
    dirty(needed).iter().all(|need| {
        dirty(map)
            .iter()
            .any(|found| found.0 <= need.0 && need.0 + need.1 <= found.0 + found.1)
    })
}
