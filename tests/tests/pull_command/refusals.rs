//! Folders that cannot be pulled into: clear errors, and nothing begun.

use std::fs;

use serde_json::json;
use stillpoint_tests::tools::{path, tool};
use stillpoint_tests::{MIB, Mount, Server};

use crate::folder::Folder;

#[track_caller]
fn nothing_was_begun(server: &Server) {
    assert_eq!(server.cli_json(&["backup", "list"]), json!([]));
    assert_eq!(server.cli_json(&["checkpoint", "list"]), json!([]));
}

#[test]
fn a_folder_of_another_disk_is_refused_by_its_uuid() {
    let server = Server::with_disk(MIB);
    let folder = Folder::new();
    folder.pull(&server, &[]).result(0);
    let other = Server::with_disk(MIB);
    folder.fails(&other, &[], 1, "another disk called vda");
    nothing_was_begun(&other);
    folder.pull(&server, &[]).result(0);
}

#[test]
fn a_folder_with_something_else_in_it_is_refused() {
    let server = Server::with_disk(MIB);
    let folder = Folder::new();
    fs::create_dir(folder.path()).expect("a folder");
    fs::write(folder.path().join("letters.txt"), "dear").expect("a file");
    folder.fails(&server, &[], 1, "not empty");
    nothing_was_begun(&server);
    assert_eq!(fs::read_dir(folder.path()).expect("a folder").count(), 1);
}

#[test]
fn a_folder_that_cannot_be_written_is_refused() {
    let server = Server::with_disk(MIB);
    let mount = Mount::tmpfs(MIB);
    tool("mount", &["-o", "remount,ro", path(mount.path())]).ok();
    let folder = Folder::at(&mount.path().join("backups"));
    folder.fails(&server, &[], 1, "cannot write");
    let file = Folder::new();
    fs::write(file.path(), "a file").expect("a file");
    file.fails(&server, &[], 1, path(file.path()));
    nothing_was_begun(&server);
}

#[test]
fn a_disk_that_there_is_not_is_refused() {
    let server = Server::with_disk(MIB);
    let folder = Folder::new();
    folder.fails(&server, &["vdz"], 1, "there is no disk 'vdz'");
    nothing_was_begun(&server);
}

#[test]
fn what_does_not_go_together_is_a_usage_error() {
    let server = Server::with_disk(MIB);
    for args in [
        &["pull"][..],
        &[
            "pull",
            "--to",
            "/x",
            "--uri",
            "nbd://h/",
            "--reconnect",
            "1s",
        ],
        &["pull", "--to", "/x", "--uri", "vda"],
        &["pull", "--to", "/x", "--uri", "nbd://h/", "--consumer", "c"],
        &["pull", "--to", "/x", "--uri", "nbd://h/", "vda", "vdb"],
        &["pull", "--to", "/x", "--uri", "nbd://h/a%20b"],
    ] {
        server.cli(args).exits(2);
    }
}
