//! Dirty bitmaps over QMP: ours, and QEMU's.

use serde_json::{Value, json};

use crate::raw_nbd::RawNbd;
use crate::{Extent, Qmp, Server};

/// The dirty bitmaps of a node, as `query-named-block-nodes` has them: the newest first.
#[track_caller]
pub fn bitmaps(qmp: &mut Qmp, node: &str) -> Vec<Value> {
    let nodes = qmp.execute("query-named-block-nodes", &json!({"flat": true}));
    let nodes = nodes.as_array().expect("a list of nodes");
    let node = nodes
        .iter()
        .find(|found| found["node-name"] == node)
        .unwrap_or_else(|| panic!("no node {node}"));
    node["dirty-bitmaps"]
        .as_array()
        .cloned()
        .unwrap_or_default()
}

/// One of them.
#[track_caller]
pub fn bitmap(qmp: &mut Qmp, node: &str, name: &str) -> Value {
    let all = bitmaps(qmp, node);
    let found = all.iter().find(|bitmap| bitmap["name"] == name);
    found
        .unwrap_or_else(|| panic!("no bitmap {name} in {all:?}"))
        .clone()
}

/// Executes `block-dirty-bitmap-VERB` on a bitmap.
pub fn change(qmp: &mut Qmp, verb: &str, node: &str, name: &str) -> Result<Value, String> {
    let command = format!("block-dirty-bitmap-{verb}");
    qmp.try_execute(&command, &json!({"node": node, "name": name}))
}

/// An action of a transaction.
pub fn action(verb: &str, data: &Value) -> Value {
    json!({"type": format!("block-dirty-bitmap-{verb}"), "data": data})
}

/// What is dirty in one of our bitmaps now: a backup is begun, looked at, and aborted.
#[track_caller]
pub fn map_now(server: &Server, disk: &str, name: &str) -> Vec<Extent> {
    let mut qmp = server.qmp();
    let begun = qmp.execute("backup-begin", &json!({"disks": [disk], "bitmaps": [name]}));
    let id = begun["id"].as_str().expect("an id");
    let map = frozen_map(server, disk, id, name);
    qmp.execute("backup-abort", &json!({"id": id}));
    map
}

/// What is dirty in a bitmap that an open backup serves.
#[track_caller]
pub fn frozen_map(server: &Server, disk: &str, id: &str, name: &str) -> Vec<Extent> {
    let context = format!("qemu:dirty-bitmap:{name}");
    let export = format!("{disk}@{id}");
    RawNbd::open(&server.frozen(), &export, &[&context]).map(&context)
}
