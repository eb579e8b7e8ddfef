//! Dirty bitmaps as QEMU has them: what each command does, what it refuses, and what outlives whom.

#![expect(
    clippy::single_range_in_vec_init,
    reason = "what is dirty is a list of ranges, however short"
)]

mod commands;

mod served;

mod kept;

use serde_json::{Value, json};
use stillpoint_tests::{CHUNK, Extent, Guest, MIB, Qmp};

const SIZE: u64 = 8 * MIB;

/// A map in which only `dirty` chunks are.
fn map(dirty: &[std::ops::Range<u64>]) -> Vec<Extent> {
    let mut map: Vec<Extent> = Vec::new();
    let mut at = 0;
    for chunks in dirty {
        let (start, end) = (chunks.start * CHUNK, (chunks.end * CHUNK).min(SIZE));
        if at < start {
            map.push((at, start - at, 0));
        }
        map.push((start, end - start, 1));
        at = end;
    }
    if at < SIZE {
        map.push((at, SIZE - at, 0));
    }
    map
}

fn write(guest: &mut Guest, chunk: u64) {
    guest.write(chunk * CHUNK + 512, &[7; 512]);
}

#[track_caller]
fn add(qmp: &mut Qmp, node: &str, name: &str, more: &Value) {
    let mut arguments = json!({"node": node, "name": name});
    let members = arguments.as_object_mut().unwrap();
    members.extend(more.as_object().unwrap().clone());
    qmp.execute("block-dirty-bitmap-add", &arguments);
}

#[track_caller]
fn merge(qmp: &mut Qmp, node: &str, target: &str, sources: &Value) {
    let arguments = json!({"node": node, "target": target, "bitmaps": sources});
    qmp.execute("block-dirty-bitmap-merge", &arguments);
}

#[track_caller]
fn refused(qmp: &mut Qmp, command: &str, arguments: &Value, expected: &str) {
    let found = qmp.try_execute(command, arguments);
    assert_eq!(found, Err(expected.to_owned()), "{command} {arguments}");
}
