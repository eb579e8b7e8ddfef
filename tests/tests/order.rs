//! In which order the server tells the kernel things, as `strace` sees it.

use std::fs;
use std::io::{BufRead as _, BufReader};
use std::process::{Command, Stdio};

use rustix::process::Signal;
use serde_json::json;
use stillpoint_tests::process::{self, KilledOnDrop};
use stillpoint_tests::raw_nbd::flag;
use stillpoint_tests::tools::path;
use stillpoint_tests::{CHUNK, GIB, Guest, MIB, Server};

#[test]
fn a_new_region_is_recorded_durably_before_its_first_write_and_never_again_while_it_is_active() {
    let server = with_disk(64 * MIB);
    let mut guest = Guest::new(&server, "vda");
    let calls = traced(&server, || {
        for region in [3, 9] {
            for n in 0..=1000 {
                let offset = region * REGION + n * 4096;
                guest.write(offset, &[n as u8 | 1; 4096]);
            }
        }
    });

    for region in [3, 9] {
        let first = format!(", 4096, {})", region * REGION);
        let is_first = |call: &Call| call.is("pwrite64", "vda.raw>") && call.text.contains(&first);
        let write = calls.iter().find(|call| is_first(call)).expect(&first);
        let before = |call: &&Call| call.ended < write.begun;
        let stored = calls
            .iter()
            .filter(before)
            .rfind(|call| call.is("pwrite64", "/pages>"))
            .expect("the region is recorded before it is written");
        let synced = calls
            .iter()
            .filter(before)
            .rfind(|call| call.is("fdatasync", "/pages>"))
            .expect("a sync before the write");
        assert!(synced.begun > stored.ended, "{synced:?} {stored:?}");
        assert!(synced.text.ends_with("= 0"), "{synced:?}");
        let mark = calls
            .iter()
            .find(|call| call.is("pwrite64", "/eras>") && call.begun > synced.ended)
            .expect("a mark");
        assert!(mark.ended < write.begun, "{mark:?} {write:?}");
    }
    let writes = calls.iter().filter(|c| c.is("pwrite64", "vda.raw>"));
    assert_eq!(writes.count(), 2 * 1001);
    let syncs = calls.iter().filter(|c| c.is("fdatasync", "/pages>"));
    assert_eq!(syncs.count(), 2, "one for each region");
}

#[test]
fn the_bits_of_a_dirty_bitmap_are_durable_before_the_record_that_counts_on_them() {
    let server = with_disk(64 * MIB);
    let mut qmp = server.qmp();
    let bitmap = json!({"node": "vda", "name": "b"});
    let persistent = json!({"node": "vda", "name": "b", "persistent": true});
    qmp.execute("block-dirty-bitmap-add", &persistent);
    Guest::new(&server, "vda").write(0, &[1; 4096]);
    // What changed since an era is bits from now on.
    let calls = traced(&server, || {
        qmp.execute("block-dirty-bitmap-disable", &bitmap);
    });

    let first = |name: &str, file: &str, from: usize| {
        let found = calls
            .iter()
            .find(|call| call.begun >= from && call.is(name, file));
        found.unwrap_or_else(|| panic!("no {name} of {file} from {from} on: {calls:#?}"))
    };
    let written = first("write", "/bitmaps/", 0);
    let synced = first("fsync", "/bitmaps/", written.ended + 1);
    let named = first("fsync", "/bitmaps>", synced.ended + 1);
    let record = calls.iter().find(|call| call.is("pwrite64", "/journal"));
    let record = record.expect("it is recorded");
    assert!(record.begun > named.ended, "{record:?} {named:?}");
    let decided = first("fdatasync", "/journal", record.ended + 1);
    for sync in [synced, named, decided] {
        assert!(sync.text.ends_with("= 0"), "{sync:?}");
    }
}

#[test]
fn who_wants_one_extent_of_a_difference_has_the_file_system_asked_for_no_more() {
    let server = with_disk(GIB);
    server.checkpoint("cp1");
    let mut guest = Guest::new(&server, "vda");
    for chunk in 1..=200 {
        guest.write(3 * chunk * CHUNK, &[1; 4096]);
    }
    server.begin("b1", &["--since", "cp1"]);
    let export = "vda@cp1..b1";
    let mut nbd = server.open_frozen(export, &["base:allocation"]);
    let length = GIB as u32 - 512;
    for (flags, extents, most) in [(flag::REQ_ONE, 1, 2), (0, 400, 1000)] {
        let calls = traced(&server, || {
            // The first is clean, and the second is not.
            let status = nbd.block_status(0, length, flags).expect("block status");
            let told = status.values().next().expect("a context");
            assert!(told.len() >= extents, "{}", told.len());
        });
        let asked = calls.iter().filter(|call| call.is("ioctl", "FIEMAP"));
        let asked = asked.count();
        assert!((1..=most).contains(&asked), "{asked} times, {flags:#x}");
    }
}

/// What a ring is asked `strace` would not see: by default the writes after a slow one.
fn with_disk(size: u64) -> Server {
    let builder = Server::builder().disk("vda", size);
    builder.arg("--io-engine=threads").start()
}

/// A system call, and between which lines of the trace it was.
#[derive(Debug)]
struct Call {
    begun: usize,
    ended: usize,
    text: String,
}

impl Call {
    fn is(&self, name: &str, file: &str) -> bool {
        self.text.starts_with(name) && self.text.contains(file)
    }
}

/// What the server asks of the kernel about files while `then` runs.
fn traced(server: &Server, then: impl FnOnce()) -> Vec<Call> {
    let trace = server.path("trace");
    let mut command = Command::new("strace");
    command
        .args(["-f", "-y", "-s", "0", "-o", path(&trace)])
        .args([
            "-e",
            "trace=write,pwrite64,pwritev,pwritev2,fdatasync,fsync,fallocate,ioctl",
        ])
        .args(["-p", &server.pid().to_string()])
        .stderr(Stdio::piped());
    let mut strace = KilledOnDrop::spawn(&mut command);
    let mut said = BufReader::new(strace.child.stderr.take().expect("piped"));
    let mut line = String::new();
    while !line.contains("attached") {
        line.clear();
        let length = said.read_line(&mut line).expect("what strace says");
        assert!(length > 0, "strace ended");
    }
    then();
    process::signal(&strace.child, Signal::INT);
    process::wait(&mut strace.child).expect("strace ends");
    parse(&fs::read_to_string(trace).expect("a trace"))
}

/// Calls of different threads overlap: one that is interrupted by another's is two lines.
fn parse(trace: &str) -> Vec<Call> {
    let mut calls = Vec::new();
    let mut open: Vec<(&str, usize, &str)> = Vec::new();
    for (number, line) in trace.lines().enumerate() {
        let (thread, what) = line.split_once(' ').expect("a thread and a call");
        let what = what.trim_start();
        if let Some(head) = what.strip_suffix("<unfinished ...>") {
            // With the space where it was interrupted, it would be another text than one that was not.
            open.push((thread, number, head.trim_end()));
        } else if what.starts_with("<... ") {
            let found = open.iter().position(|(of, ..)| *of == thread);
            // One that began before we looked.
            let Some(found) = found else { continue };
            let (_, begun, head) = open.swap_remove(found);
            let end = what.split_once('>').expect("the end of a call").1;
            let (ended, text) = (number, format!("{head}{end}"));
            calls.push(Call { begun, ended, text });
        } else {
            let (begun, ended, text) = (number, number, what.to_owned());
            calls.push(Call { begun, ended, text });
        }
    }
    calls
}

/// With chunks of 64 KiB.
const REGION: u64 = 4 * MIB;
