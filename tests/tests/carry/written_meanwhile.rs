//! A state is about an image as it was looked at, and as it will be after a power cut.

use std::fs;
use std::path::Path;
use std::process::Command;

use stillpoint_tests::process::run;
use stillpoint_tests::state::directory;
use stillpoint_tests::tools::{path, tool};
use stillpoint_tests::{Output, Server};

use crate::images::SIZE;
use crate::moved::{export, moved, spec};

/// A stopped server with a checkpoint, and its state in a file.
fn prepared() -> (Server, std::path::PathBuf) {
    let mut server = Server::with_disk(SIZE);
    server.checkpoint("cp1");
    server.open_live("vda").write(0, &[1; 512]).unwrap();
    server.stop();
    let state = export(&server);
    (server, state)
}

/// Runs a command under a `strace` with these arguments.
fn traced(command: &Command, args: &[&str]) -> Output {
    let mut strace = Command::new("strace");
    strace.args(args).arg(command.get_program());
    run(strace.args(command.get_args()))
}

#[test]
fn all_of_an_image_is_durable_before_a_state_of_it_is_taken_in() {
    let (server, state) = prepared();
    let raw = server.image("vda");
    let (backing, qcow2) = (server.path("base.raw"), server.path("vm.qcow2"));
    fs::copy(&raw, &backing).unwrap();
    let create = ["create", "-q", "-f", "qcow2", "-F", "raw", "-b"];
    tool(
        "qemu-img",
        &[&create[..], &[path(&backing), path(&qcow2)]].concat(),
    )
    .ok();
    let as_qcow2 = format!("vda={},format=qcow2,read-only", path(&qcow2));
    for (disk, files) in [
        (spec(&server), vec![&raw]),
        (as_qcow2, vec![&backing, &qcow2]),
    ] {
        for more in [&[][..], &["--no-image-hash"]] {
            let import = ["state", "import", path(&state), "--force", "--disk", &disk];
            let import = server.cli_command(&[&import[..], more].concat());
            let trace = server.path("trace");
            let calls = "trace=fsync,fdatasync,rename,renameat,renameat2";
            traced(&import, &["-f", "-y", "-o", path(&trace), "-e", calls]).ok();
            let trace = fs::read_to_string(trace).unwrap();
            let counts = trace.find("/arriving\"").expect("it is renamed");
            for file in &files {
                let named = format!("<{}>", path(file));
                let is_sync = |line: &str| line.contains("sync(") && line.contains(&named);
                let before = trace[..counts].lines().any(is_sync);
                assert!(before, "{more:?}: {} in\n{trace}", file.display());
            }
        }
    }
}

#[test]
fn an_image_that_cannot_be_made_durable_gets_no_state() {
    let (server, state) = prepared();
    let next = moved(&server, &state);
    fs::remove_dir_all(directory(&next, "vda")).unwrap();
    let (image, disk) = (next.image("vda"), spec(&next));
    let args = ["state", "import", path(&state), "--disk", &disk, "--json"];
    let import = next.cli_command(&args);
    let fails = "inject=fsync,fdatasync:error=EIO";
    let strace = ["-f", "-o", "/dev/null", "-P", path(&image)];
    let output = traced(&import, &[&strace[..], &["-e", fails]].concat());
    output.fails_with("not-durable", "made durable");
    assert!(!has_state(&next));
    run(&mut { import }).ok();
}

fn has_state(server: &Server) -> bool {
    let folder = directory(server, "vda");
    ["header", "arrived", "arriving"]
        .map(Path::new)
        .iter()
        .any(|name| folder.join(name).exists())
}
