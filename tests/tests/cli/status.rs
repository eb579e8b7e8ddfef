//! The state of a server.

use std::path::PathBuf;

use stillpoint_tests::tools::path;
use stillpoint_tests::{MIB, Server};

use crate::stillpoint;

#[test]
fn it_tells_the_disks_and_waits_for_the_server() {
    let server = Server::with_disk(MIB);
    assert!(server.cli(&["status"]).ok().contains("vda"));
    assert!(
        server
            .cli_json(&["status", "--wait", "10"])
            .to_string()
            .contains("\"vda\"")
    );

    let nowhere: PathBuf = server.path("nowhere");
    let output = stillpoint(&["status", "--wait", "1", "--run-dir", path(&nowhere)]);
    output.error(1);
}
