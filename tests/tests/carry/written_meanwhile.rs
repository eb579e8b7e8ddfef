//! A state is about an image as it was looked at, and as it will be after a power cut.

use std::fs;
use std::path::Path;
use std::process::Command;

use stillpoint_tests::killer::stopped_at;
use stillpoint_tests::process::run;
use stillpoint_tests::state::directory;
use stillpoint_tests::tools::{path, tool};
use stillpoint_tests::{MIB, Output, Server};

use crate::images::{SIZE, is_known_to_have_changed, poke};
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

#[test]
fn an_image_that_is_written_while_its_state_is_unpacked_gets_none() {
    let (server, state) = prepared();
    let next = moved(&server, &state);
    let folder = directory(&next, "vda");
    fs::remove_dir_all(&folder).unwrap();
    let (image, disk) = (next.image("vda"), spec(&next));
    let args = ["state", "import", path(&state), "--disk", &disk, "--json"];
    let import = next.cli_command(&args);
    let arriving = folder.join("arriving");
    let output = stopped_at(&import, "mkdir", &arriving, 1, || poke(&image, MIB, &[9]));
    output.fails_with("image-changed", "changed while it was read");
    assert!(!has_state(&next));
    run(&mut { import }).fails_with("other-image", "BLAKE3");
}

#[test]
fn an_image_that_is_written_when_its_end_is_recorded_does_not_leave_with_that() {
    let (mut server, _) = prepared();
    let (image, file) = (server.image("vda"), server.path("new"));
    let disk = spec(&server);
    let args = [
        "state",
        "export",
        "--disk",
        &disk,
        "--to",
        path(&file),
        "--json",
        "--force",
    ];
    let export = server.cli_command(&args);
    let header = directory(&server, "vda").join("header");
    let trace = server.path("trace");
    let strace = ["-f", "-o", path(&trace), "-P", path(&header)];
    traced(&export, &[&strace[..], &["-e", "trace=pwrite64"]].concat()).ok();
    let trace = fs::read_to_string(trace).unwrap();
    let last = trace
        .lines()
        .filter(|line| line.contains("pwrite64("))
        .count();
    fs::remove_file(&file).unwrap();
    // The image was looked at, and what was found is being stored.
    let output = stopped_at(&export, "pwrite64", &header, last, || {
        poke(&image, MIB, &[9]);
    });
    output.fails_with("image-changed", "changed while it was read");
    assert!(!file.exists());
    // Here it is known what to think of it.
    server.start();
    is_known_to_have_changed(&server);
}

fn has_state(server: &Server) -> bool {
    let folder = directory(server, "vda");
    ["header", "arrived", "arriving"]
        .map(Path::new)
        .iter()
        .any(|name| folder.join(name).exists())
}
