//! What is asked for in vain.

use serde_json::Value;
use stillpoint_tests::server::names;
use stillpoint_tests::{MIB, Server};

use crate::BAD_NAMES;

#[test]
fn what_does_not_exist_is_named() {
    let server = Server::with_disk(MIB);
    for (args, name) in [
        (&["checkpoint", "show", "cp9"][..], "cp9"),
        (&["checkpoint", "delete", "cp9"], "cp9"),
        (&["checkpoint", "create", "cp1", "--disk", "vdz"], "vdz"),
        (&["backup", "begin", "--disk", "vdz"], "vdz"),
        (&["backup", "begin", "--since", "cp9"], "cp9"),
        (&["backup", "show", "b9"], "b9"),
        (&["backup", "commit", "b9"], "b9"),
        (&["backup", "abort", "b9"], "b9"),
    ] {
        let output = server.cli(args);
        assert!(output.error(1).contains(name), "{output}");
        assert_eq!(output.stdout, "", "{output}");
    }
    assert_eq!(
        names(&server.cli_json(&["backup", "list"]), "backups", "id"),
        [""; 0]
    );
}

#[test]
fn with_json_an_error_is_a_document_on_stdout() {
    let server = Server::with_disk(MIB);
    for (args, code) in [
        (
            &["checkpoint", "show", "cp9", "--json"][..],
            "unknown-checkpoint",
        ),
        (
            &["backup", "begin", "--since", "cp9", "--json"],
            "unknown-checkpoint",
        ),
        (&["backup", "show", "b9", "--json"], "unknown-backup"),
        (
            &["checkpoint", "create", "cp1", "--disk", "vdz", "--json"],
            "unknown-disk",
        ),
    ] {
        let output = server.cli(args);
        output.exits(1);
        let error: Value = serde_json::from_str(&output.stdout)
            .unwrap_or_else(|error| panic!("{error}\n{output}"));
        assert_eq!(error["error"]["code"], code, "{output}");
        assert!(error["error"]["message"].is_string(), "{output}");
    }
}

#[test]
fn invalid_names_are_refused() {
    let server = Server::with_disk(MIB);
    let long = "x".repeat(65);
    for name in BAD_NAMES
        .into_iter()
        .filter(|name| *name != "-a")
        .chain([&long[..]])
    {
        server.cli(&["checkpoint", "create", name]).refused(name);
        server.cli(&["backup", "begin", "--id", name]).refused(name);
        server
            .cli(&["backup", "begin", "--checkpoint", name])
            .refused(name);
    }
    server
        .cli(&["checkpoint", "create", "backup-vda"])
        .refused("backup-vda");
    server.checkpoint(&"x".repeat(64));
    server.is_well();
}
