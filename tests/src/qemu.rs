//! QEMU's own storage daemon, the other side of comparisons.

use std::path::PathBuf;

use serde_json::json;
use tempfile::TempDir;

use crate::process::EndedOnDrop;
use crate::raw_nbd::RawNbd;
use crate::tools::{path, tool};
use crate::{Extent, Qmp};

/// A `qemu-storage-daemon` with one qcow2 image for each node, so that bitmaps can persist.
#[derive(Debug)]
pub struct QemuDaemon {
    // Ended before its directory goes.
    _daemon: EndedOnDrop,
    directory: TempDir,
}

impl QemuDaemon {
    /// Starts one whose nodes have these sizes; each has a writable export of its name.
    #[track_caller]
    pub fn start(nodes: &[(&str, u64)]) -> Self {
        let directory = crate::server::temporary_directory();
        let at = |name: &str| directory.path().join(name).display().to_string();
        let mut args = vec![
            "--daemonize".to_owned(),
            format!("--pidfile={}", at("pid")),
            format!(
                "--chardev=socket,id=qmp,path={},server=on,wait=off",
                at("qmp")
            ),
            "--monitor=chardev=qmp".to_owned(),
            format!("--nbd-server=addr.type=unix,addr.path={}", at("nbd")),
        ];
        for (node, size) in nodes {
            let image = at(&format!("{node}.qcow2"));
            let size = size.to_string();
            tool("qemu-img", &["create", "-q", "-f", "qcow2", &image, &size]).ok();
            // Without unmap a trim changes nothing, and is in no bitmap.
            args.push(format!(
                "--blockdev=qcow2,node-name={node},discard=unmap,\
                 file.driver=file,file.filename={image}"
            ));
            args.push(format!(
                "--export=nbd,id=live-{node},node-name={node},name={node},writable=on"
            ));
        }
        let args: Vec<&str> = args.iter().map(String::as_str).collect();
        // It returns when everything listens.
        tool("qemu-storage-daemon", &args).ok();
        let pid = std::fs::read_to_string(at("pid")).expect("a process id");
        Self {
            _daemon: EndedOnDrop(pid.trim().parse().expect("a process id")),
            directory,
        }
    }

    /// A connection to its monitor, past the greeting.
    #[track_caller]
    pub fn qmp(&self) -> Qmp {
        Qmp::connect(&self.directory.path().join("qmp"))
    }

    /// Where it serves.
    pub fn nbd(&self) -> PathBuf {
        self.directory.path().join("nbd")
    }

    /// Serves bitmaps of a node on an export of their own while `then` runs, and returns their maps.
    #[track_caller]
    pub fn with_bitmaps(
        &self,
        qmp: &mut Qmp,
        node: &str,
        names: &[String],
        then: impl FnOnce(&mut Qmp),
    ) -> Vec<Vec<Extent>> {
        // One that records is only served where it could be written as well.
        let export = json!({"id": "look", "type": "nbd", "node-name": node, "name": "look",
            "bitmaps": names, "writable": true});
        qmp.execute("block-export-add", &export);
        let maps = maps(path(&self.nbd()), "look", names);
        then(qmp);
        qmp.execute("block-export-del", &json!({"id": "look", "mode": "hard"}));
        qmp.event("BLOCK_EXPORT_DELETED");
        maps
    }
}

/// The maps of dirty bitmaps of an export.
#[track_caller]
pub fn maps(socket: &str, export: &str, names: &[String]) -> Vec<Vec<Extent>> {
    let contexts: Vec<String> = names
        .iter()
        .map(|n| format!("qemu:dirty-bitmap:{n}"))
        .collect();
    let contexts: Vec<&str> = contexts.iter().map(String::as_str).collect();
    let mut nbd = RawNbd::open(socket.as_ref(), export, &contexts);
    contexts.iter().map(|context| nbd.map(context)).collect()
}
