//! In which order a pull tells the kernel things, as `strace` sees it: what a rename brings into view is
//! durable before, and the rename before the server is told.

use std::fs;
use std::process::Command;

use stillpoint_tests::process::run;
use stillpoint_tests::tools::path;
use stillpoint_tests::{Guest, MIB, Server, server};

#[test]
fn a_point_is_durable_before_it_is_seen_and_seen_before_the_server_hears_of_it() {
    let server = Server::builder().disk("vda", 4 * MIB).start();
    let mut guest = Guest::new(&server, "vda");
    let mut rng = stillpoint_tests::seeds::rng(1);
    (0..20).for_each(|_| guest.do_something(&mut rng));
    let (folder, trace) = (server.path("backups"), server.path("trace"));
    let mut command = Command::new("strace");
    let calls = "trace=fsync,rename,renameat2,write,sendto";
    command.args(["-f", "-y", "-s", "200", "-o", path(&trace), "-e", calls]);
    command
        .arg(server::binary())
        .args(["pull", "--to", path(&folder), "--run-dir"]);
    let run_dir = server.control();
    command.arg(run_dir.parent().expect("it is in a folder"));
    run(&mut command).ok();

    let trace = fs::read_to_string(trace).unwrap();
    let here = path(&folder);
    let mut lines = trace.lines();
    // One after the other; what another thread does in between may split a call, and its beginning counts.
    for (calls, what) in [
        (&["fsync("][..], format!("{here}/1.partial/vda.qcow2>")),
        (&["fsync("], format!("{here}/1.partial/manifest.new>")),
        (&["rename("], format!("{here}/1.partial/manifest.json\"")),
        (&["fsync("], format!("{here}/1.partial>")),
        (&["renameat2("], format!("{here}/1\"")),
        (&["fsync("], format!("{here}>")),
        (&["write(", "sendto("], "backup-commit".to_owned()),
    ] {
        let is_it =
            |line: &str| calls.iter().any(|call| line.contains(call)) && line.contains(&what);
        assert!(
            lines.any(is_it),
            "{calls:?} of {what} comes too late or never in\n{trace}"
        );
    }
}
