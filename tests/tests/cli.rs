//! What a person types, and what they are told.

use std::fs;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use serde_json::Value;
use stillpoint_tests::process::{KilledOnDrop, Output, run};
use stillpoint_tests::server::{self, Builder, named, names};
use stillpoint_tests::tools::{
    nbdcopy_sha256, path, sha256_of_file, sparse_file, tool, with_qemu_nbd,
};
use stillpoint_tests::{CHUNK, Guest, MIB, Server};

const BAD_NAMES: [&str; 12] = [
    "", "-a", ".a", "_a", "a/b", "a b", "a..b", "a.", "last", "latest", "auto", "none",
];

fn is_root() -> bool {
    rustix::process::geteuid().is_root()
}

fn stillpoint(args: &[&str]) -> Output {
    run(Command::new(server::binary()).args(args))
}

mod start {
    use super::*;

    #[test]
    fn the_uris_are_printed_to_paste() {
        let server = Server::builder().disk("vda", MIB).disk("vdb", MIB).start();
        let told = server.stdout() + &server.stderr();
        for disk in ["vda", "vdb"] {
            let uri = server.live_uri(disk);
            assert!(told.contains(&uri), "{uri} is not in\n{told}");
        }
    }

    #[test]
    fn a_stop_keeps_the_disk_and_takes_the_sockets_away() {
        let mut server = Server::with_disk(MIB);
        Guest::new(&server, "vda").write(5000, b"kept");
        server.stop();
        assert!(!server.live().exists(), "a clean stop leaves no sockets");
        assert_eq!(&fs::read(server.image("vda")).unwrap()[5000..5004], b"kept");
        server.start();
        assert_eq!(server.open_live("vda").read(5000, 4), Ok(b"kept".to_vec()));
    }

    #[test]
    fn an_image_that_cannot_be_served_is_refused_with_the_reason() {
        let builder = Server::builder();
        let at = |name: &str| builder.path(name);
        fs::write(at("empty"), b"").unwrap();
        sparse_file(&at("odd"), MIB + 1);
        fs::write(at("file"), [0; 4096]).unwrap();
        tool(
            "qemu-img",
            &["create", "-f", "qcow2", path(&at("a.qcow2")), "1M"],
        )
        .ok();
        for (image, reason) in [
            (at("missing"), "No such file"),
            (at("file/below"), "Not a directory"),
            (builder.path(""), "directory"),
            (at("empty"), "size"),
            (at("odd"), "512"),
            (at("a.qcow2"), "qcow2"),
        ] {
            let output = Server::builder().disk_at("vda", &image).start_and_fail();
            let error = output.error(1).to_lowercase();
            assert!(
                error.contains(&reason.to_lowercase()),
                "{reason} is not in\n{output}"
            );
            assert!(
                error.contains(&path(&image).to_lowercase()),
                "no path in\n{output}"
            );
        }
    }

    #[test]
    fn an_image_of_another_format_is_raw_if_one_says_so() {
        let builder = Server::builder();
        let image = builder.path("a.qcow2");
        tool("qemu-img", &["create", "-f", "qcow2", path(&image), "1M"]).ok();
        let size = fs::metadata(&image).unwrap().len().next_multiple_of(512);
        fs::File::options()
            .write(true)
            .open(&image)
            .unwrap()
            .set_len(size)
            .unwrap();
        let server = builder
            .disk_as(&format!("vda={},format=raw", image.display()))
            .start();
        assert_eq!(server.open_live("vda").read(0, 4), Ok(b"QFI\xfb".to_vec()));
    }

    #[test]
    fn an_image_that_may_not_be_read_is_refused() {
        let builder = Server::builder();
        let image = builder.path("vda.raw");
        sparse_file(&image, MIB);
        fs::set_permissions(&image, fs::Permissions::from_mode(0o000)).unwrap();
        let (state, run) = (builder.path("state"), builder.path("run"));
        for directory in [&state, &run] {
            open_to_all(directory);
        }
        let disk = format!("vda={},state={}/vda", image.display(), state.display());
        let output = as_nobody(&builder.disk_as(&disk));
        let error = output.error(1);
        assert!(
            error.contains("Permission denied") && error.contains(path(&image)),
            "{output}"
        );
    }

    #[test]
    fn a_bad_disk_argument_is_refused() {
        for name in BAD_NAMES {
            let builder = Server::builder();
            let image = builder.path("vda.raw");
            sparse_file(&image, MIB);
            builder
                .disk_at(name, &image)
                .start_and_fail()
                .refused("name");
        }
        for (options, saying) in [
            ("granularity=3k", "granularity"),
            ("granularity=2k", "granularity"),
            ("granularity=4M", "granularity"),
            ("granularity=x", "granularity"),
            ("format=qcow9", "format"),
            ("no-such-key=1", "no-such-key"),
        ] {
            let builder = Server::builder();
            let image = builder.path("vda.raw");
            sparse_file(&image, MIB);
            let disk = format!("vda={},{options}", image.display());
            builder.disk_as(&disk).start_and_fail().refused(saying);
        }
        Server::builder()
            .disk("vda", MIB)
            .disk("vda", MIB)
            .start_and_fail()
            .refused("vda");
        Server::builder()
            .disk_as("vda")
            .start_and_fail()
            .refused("vda");
        assert_eq!(
            Server::builder().start_and_fail().code(),
            2,
            "no disk at all"
        );
    }

    #[test]
    fn a_comma_in_a_path_is_doubled() {
        let builder = Server::builder();
        let image = builder.path("a,b.raw");
        sparse_file(&image, MIB);
        let doubled = path(&image).replace(',', ",,");
        let server = builder.disk_as(&format!("vda={doubled}")).start();
        assert_eq!(server.open_live("vda").export().size, MIB);
    }

    #[test]
    fn a_socket_that_somebody_answers_on_is_not_taken() {
        for socket in ["live.sock", "backup.sock", "control.sock"] {
            let builder = Server::builder().disk("vda", MIB);
            fs::create_dir(builder.path("run")).unwrap();
            let _listener = UnixListener::bind(builder.path("run").join(socket)).unwrap();
            let output = builder.start_and_fail();
            assert!(output.error(1).contains(socket), "{output}");
            assert!(
                builder.path("run").join(socket).exists(),
                "it is still the other's"
            );
        }
    }

    #[test]
    fn stale_sockets_are_replaced() {
        let builder = Server::builder().disk("vda", MIB);
        fs::create_dir(builder.path("run")).unwrap();
        for socket in ["live.sock", "backup.sock", "control.sock"] {
            drop(UnixListener::bind(builder.path("run").join(socket)).unwrap());
        }
        let mut server = builder.start();
        server.is_well();
        server.kill();
        assert!(server.live().exists(), "a killed server leaves its sockets");
        server.start();
        assert_eq!(server.open_live("vda").export().size, MIB);
    }

    #[test]
    fn a_file_in_the_place_of_a_socket_is_left_alone() {
        let builder = Server::builder().disk("vda", MIB);
        fs::create_dir(builder.path("run")).unwrap();
        fs::write(builder.path("run/live.sock"), b"precious").unwrap();
        let output = builder.start_and_fail();
        assert!(output.error(1).contains("live.sock"), "{output}");
        assert_eq!(
            fs::read(builder.path("run/live.sock")).unwrap(),
            b"precious"
        );
    }

    #[test]
    fn a_run_directory_that_is_too_long_for_sockets_is_refused() {
        let builder = Server::builder().disk("vda", MIB);
        let run_directory = builder.path(&"x".repeat(120));
        let output = builder.run_directory(&run_directory).start_and_fail();
        assert!(output.error(1).contains(".sock"), "{output}");
    }

    #[test]
    fn a_run_directory_that_may_not_be_written_is_refused() {
        let builder = Server::builder();
        let image = builder.path("vda.raw");
        sparse_file(&image, MIB);
        fs::set_permissions(&image, fs::Permissions::from_mode(0o666)).unwrap();
        let (state, locked) = (builder.path("state"), builder.path("locked"));
        open_to_all(&state);
        fs::create_dir(&locked).unwrap();
        fs::set_permissions(&locked, fs::Permissions::from_mode(0o555)).unwrap();
        let disk = format!("vda={},state={}/vda", image.display(), state.display());
        let output = as_nobody(&builder.disk_as(&disk).run_directory(&locked.join("run")));
        assert!(output.error(1).contains("Permission denied"), "{output}");
    }

    #[test]
    fn sockets_have_the_mode_and_the_group_that_were_asked_for() {
        // Any other group is one that only root may give.
        let group = rustix::process::getegid().as_raw() + u32::from(is_root());
        let server = Server::builder()
            .disk("vda", MIB)
            .arg("--socket-mode=0660")
            .arg(&format!("--socket-group={group}"))
            .start();
        for socket in [server.live(), server.frozen(), server.control()] {
            let found = fs::metadata(&socket).unwrap();
            let expected = (0o660, group);
            let found = (found.permissions().mode() & 0o777, found.gid());
            assert_eq!(found, expected, "{}", socket.display());
        }
        for args in [["--socket-mode=0999"], ["--socket-group=no-such-group"]] {
            let builder = Server::builder().disk("vda", MIB).arg(args[0]);
            builder
                .start_and_fail()
                .refused(args[0].split('=').nth(1).unwrap());
        }
    }

    #[test]
    fn a_mask_takes_nothing_from_the_modes_of_sockets_and_their_directory() {
        let builder = Server::builder().disk("vda", MIB).arg("--socket-mode=0660");
        let command = builder.command();
        let mut masked = Command::new("sh");
        masked.args(["-c", "umask 077; exec \"$0\" \"$@\""]);
        masked.arg(command.get_program()).args(command.get_args());
        let _server = KilledOnDrop::spawn(masked.stdout(Stdio::null()));
        let run_directory = builder.path("run");
        let wait = ["status", "--wait", "20", "--run-dir", path(&run_directory)];
        stillpoint(&wait).ok();
        let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
        assert_eq!(mode(&run_directory), 0o755);
        assert_eq!(mode(&run_directory.join("live.sock")), 0o660);
    }

    #[test]
    fn backups_can_be_pulled_over_tcp_and_only_a_word_opens_a_network() {
        let server = Server::builder()
            .disk("vda", MIB)
            .arg("--backup-listen=tcp:127.0.0.1:0")
            .start();
        Guest::new(&server, "vda").write(0, &[7; 4096]);
        let begun = server.begin("b1", &[]);
        let uris = begun["disks"][0]["uris"].as_array().expect("a list");
        let uri = uris.iter().filter_map(Value::as_str);
        let uri = uri
            .into_iter()
            .find(|uri| uri.starts_with("nbd://127.0.0.1:"));
        let uri = uri.unwrap_or_else(|| panic!("no TCP in {begun}"));
        assert!(!uri.contains(":0/"), "the port that it got: {uri}");
        let found = nbdcopy_sha256(uri, server.directory());
        assert_eq!(found, sha256_of_file(&server.image("vda")));

        let open = "--live-listen=tcp:0.0.0.0:0";
        let builder = Server::builder().disk("vda", MIB).arg(open);
        builder.start_and_fail().refused("unencrypted");
        builder.arg("--allow-plaintext").start().is_well();
    }

    #[test]
    fn a_second_server_on_an_image_is_refused_and_told_who_has_it() {
        let server = Server::with_disk(MIB);
        let output = Server::builder()
            .disk_at("vda", &server.image("vda"))
            .start_and_fail();
        output.error(1);
        assert!(
            output.stderr.contains(&server.pid().to_string()),
            "no pid in\n{output}"
        );
        server.is_well();
    }

    #[test]
    fn a_second_server_in_a_run_directory_is_refused() {
        let server = Server::with_disk(MIB);
        let second = Server::builder()
            .disk("vdb", MIB)
            .run_directory(&server.path("run"));
        second.start_and_fail().error(1);
        server.is_well();
        assert_eq!(server.open_live("vda").export().size, MIB);
    }

    #[test]
    fn two_names_for_one_image_are_refused() {
        let builder = Server::builder().disk("vda", MIB);
        let image = builder.path("vda.raw");
        builder.disk_at("vdb", &image).start_and_fail().error(1);
    }

    #[test]
    fn qemu_is_refused_while_we_have_the_image_and_we_while_qemu_has_it() {
        let server = Server::with_disk(MIB);
        let image = server.image("vda");
        for command in [&["-c", "write 0 512"][..], &["-r", "-c", "read 0 512"]] {
            let args = [&["-f", "raw"], command, &[path(&image)]].concat();
            let output = tool("qemu-io", &args);
            assert_ne!(output.code(), 0, "{output}");
            assert!(output.stderr.contains("lock"), "{output}");
        }
        let other = server.path("other.raw");
        sparse_file(&other, MIB);
        with_qemu_nbd(&["-f", "raw", path(&other)], |_| {
            let output = Server::builder().disk_at("vda", &other).start_and_fail();
            assert!(output.error(1).contains("lock") || output.stderr.contains("in use"));
        });
        let mut server = Server::builder().disk_at("vda", &other).start();
        server.stop();
        tool("qemu-io", &["-f", "raw", "-c", "write 0 512", path(&other)]).ok();
    }

    fn open_to_all(directory: &Path) {
        fs::create_dir(directory).unwrap();
        fs::set_permissions(directory, fs::Permissions::from_mode(0o777)).unwrap();
    }

    /// Starts a server that is to fail as a user who may do little.
    fn as_nobody(builder: &Builder) -> Output {
        let command = builder.command();
        if !is_root() {
            return run(&mut { command });
        }
        // The build may be where only its owner can look.
        let directory = builder.path("");
        fs::set_permissions(&directory, fs::Permissions::from_mode(0o755)).unwrap();
        let binary = directory.join("stillpoint");
        fs::copy(command.get_program(), &binary).unwrap();
        let mut limited = Command::new("setpriv");
        limited.args(["--reuid=65534", "--regid=65534", "--clear-groups"]);
        run(limited
            .arg(&binary)
            .args(command.get_args())
            .current_dir("/"))
    }
}

mod usage {
    use super::*;

    #[test]
    fn help_lists_commands_that_exist_and_says_nothing_of_others() {
        check_help(&mut Vec::new());
    }

    /// Asks each command that the help lists for its own help.
    fn check_help(command: &mut Vec<String>) {
        let mut args: Vec<_> = command.iter().map(String::as_str).collect();
        args.push("--help");
        let output = stillpoint(&args);
        let help = output.ok().to_owned();
        assert!(help.to_lowercase().contains("usage"), "{output}");
        for stub in ["not implemented", "not yet", "TODO", "coming"] {
            assert!(!help.contains(stub), "{stub:?} in\n{output}");
        }
        let listed = help
            .lines()
            .skip_while(|line| line.trim() != "Commands:")
            .skip(1);
        let listed = listed.take_while(|line| line.starts_with(' '));
        // What is indented deeper goes on with the description.
        let names = listed.filter_map(|line| line.strip_prefix("  ")?.split(' ').next());
        for name in names.filter(|name| !["", "help"].contains(name)) {
            command.push(name.to_owned());
            check_help(command);
            command.pop();
        }
    }

    #[test]
    fn what_cannot_be_understood_exits_2() {
        for args in [
            &[][..],
            &["no-such-command"],
            &["serve", "--no-such-option"],
            &["checkpoint"],
            &["checkpoint", "create"],
            &["backup", "commit"],
            &["backup", "begin", "--no-such-option"],
        ] {
            let output = stillpoint(args);
            output.exits(2);
            assert!(!output.stderr.is_empty(), "{output}");
        }
    }

    #[test]
    fn the_version_is_told() {
        assert!(stillpoint(&["--version"]).ok().starts_with("stillpoint "));
    }

    #[test]
    fn global_options_are_taken_anywhere_on_the_line() {
        let server = Server::with_disk(MIB);
        let run_directory = server.path("run");
        let run_directory = path(&run_directory);
        for args in [
            ["--json", "--run-dir", run_directory, "checkpoint", "list"],
            ["checkpoint", "--run-dir", run_directory, "list", "--json"],
            ["checkpoint", "list", "--json", "--run-dir", run_directory],
        ] {
            stillpoint(&args).json();
        }
    }

    #[test]
    fn the_run_directory_may_come_from_the_environment() {
        let server = Server::with_disk(MIB);
        let mut command = Command::new(server::binary());
        command
            .args(["status", "--json"])
            .env("STILLPOINT_RUN_DIR", server.path("run"));
        run(&mut command).json();
    }

    #[test]
    fn without_a_server_a_command_says_where_it_looked() {
        let builder = Server::builder();
        let nowhere = builder.path("nowhere");
        let output = stillpoint(&["status", "--run-dir", path(&nowhere)]);
        output.error(1);
        assert!(output.stderr.contains(path(&nowhere)), "{output}");
    }
}

mod errors {
    use super::*;

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
}

mod checkpoints {
    use super::*;

    #[test]
    fn they_are_created_listed_shown_and_deleted() {
        let server = Server::builder().disk("vda", MIB).disk("vdb", MIB).start();
        server.checkpoint("cp1");
        let mut guest = Guest::new(&server, "vdb");
        guest.write(100, &[1]);
        server
            .cli(&["checkpoint", "create", "cp2", "--disk", "vda"])
            .ok();
        let list = server.cli_json(&["checkpoint", "list"]);
        assert_eq!(names(&list, "checkpoints", "name"), ["cp1", "cp2"]);
        assert_eq!(server.dirty_bytes("cp1", "vda"), 0);
        assert_eq!(server.dirty_bytes("cp1", "vdb"), CHUNK);
        let cp2 = named(&list, "checkpoints", "name", "cp2").unwrap();
        assert_eq!(names(&cp2, "disks", "disk"), ["vda"]);
        assert!(cp2["uuid"].is_string(), "{cp2}");
        let shown = server.cli_json(&["checkpoint", "show", "cp2"]);
        assert_eq!(
            named(&shown, "checkpoints", "name", "cp2").unwrap()["uuid"],
            cp2["uuid"]
        );

        let again = server.cli(&["checkpoint", "create", "cp1"]);
        assert!(again.error(1).contains("cp1"), "{again}");
        server.cli(&["checkpoint", "delete", "cp1"]).ok();
        server.cli(&["checkpoint", "delete", "cp1"]).error(1);
        server.checkpoint("cp1");
        assert_eq!(
            server.dirty_bytes("cp1", "vdb"),
            0,
            "another one of the same name"
        );
        for text in ["cp1", "cp2"] {
            assert!(server.cli(&["checkpoint", "list"]).ok().contains(text));
        }
    }

    #[test]
    fn deleting_one_forgets_nothing_of_the_others() {
        let server = Server::with_disk(MIB);
        let mut guest = Guest::new(&server, "vda");
        for (name, chunk) in [("cp1", 1), ("cp2", 2), ("cp3", 3)] {
            server.checkpoint(name);
            guest.write(chunk * CHUNK, &[1]);
        }
        server.cli(&["checkpoint", "delete", "cp2"]).ok();
        assert_eq!(server.dirty_bytes("cp1", "vda"), 3 * CHUNK);
        assert_eq!(server.dirty_bytes("cp3", "vda"), CHUNK);
    }

    #[test]
    fn a_uuid_is_as_good_as_a_name() {
        let server = Server::with_disk(MIB);
        server.checkpoint("cp1");
        let list = server.cli_json(&["checkpoint", "list"]);
        let cp1 = named(&list, "checkpoints", "name", "cp1").unwrap();
        let begun = server.begin("b1", &["--since", cp1["uuid"].as_str().unwrap()]);
        assert_eq!(begun["since"], "cp1");
        assert_eq!(begun["since_uuid"], cp1["uuid"]);
        assert_eq!(begun["disks"][0]["mode"], "incremental");
    }

    #[test]
    fn a_name_that_looks_like_a_uuid_is_a_name() {
        let server = Server::with_disk(MIB);
        let name = "0123456789abcdef0123456789abcdef";
        server.checkpoint(name);
        let begun = server.begin("b1", &["--since", name]);
        assert_eq!(begun["disks"][0]["mode"], "incremental", "{begun}");
        let other = name.replace('0', "1");
        let output = server.cli(&["backup", "begin", "--since", &other, "--json"]);
        output.exits(3);
        assert!(output.stdout.contains(r#""mode":"full""#), "{output}");
    }

    #[test]
    fn one_that_a_backup_uses_stays_and_the_error_names_the_backup() {
        let server = Server::with_disk(MIB);
        server.checkpoint("cp1");
        server.begin("b1", &["--since", "cp1"]);
        let output = server.cli(&["checkpoint", "delete", "cp1"]);
        assert!(output.error(1).contains("b1"), "{output}");
        server.abort("b1");
        server.cli(&["checkpoint", "delete", "cp1"]).ok();
    }
}

mod backups {
    use super::*;

    #[test]
    fn begin_tells_what_the_contract_says() {
        let server = Server::with_disk(MIB);
        server.checkpoint("cp1");
        Guest::new(&server, "vda").write(3 * CHUNK - 1, &[1; 2]);
        let begun = server.begin("b1", &["--since", "cp1", "--checkpoint", "cp2"]);
        for (key, expected) in [
            ("id", "b1"),
            ("state", "open"),
            ("since", "cp1"),
            ("checkpoint", "cp2"),
        ] {
            assert_eq!(begun[key], expected, "{key} in {begun}");
        }
        for key in ["uuid", "frozen_at", "since_uuid", "checkpoint_uuid"] {
            assert!(begun[key].is_string(), "{key} in {begun}");
        }
        assert_eq!(begun["consumer"], Value::Null);
        let frozen_at = begun["frozen_at"].as_str().unwrap();
        assert!(
            frozen_at.contains('T') && frozen_at.ends_with('Z'),
            "{frozen_at}"
        );
        let disk = &begun["disks"][0];
        assert_eq!(disk["disk"], "vda");
        assert_eq!(disk["size"], MIB);
        assert_eq!(disk["mode"], "incremental");
        assert_eq!(disk["reason"], Value::Null);
        assert_eq!(disk["changed_bytes"], 2 * CHUNK);
        assert_eq!(disk["uncertain_bytes"], 0);
        assert_eq!(disk["export"], "vda@b1");
        assert_eq!(disk["uris"][0], server.frozen_uri("vda@b1"));
        let contexts = [
            "base:allocation",
            "qemu:allocation-depth",
            "qemu:dirty-bitmap:cp1",
        ];
        assert_eq!(disk["contexts"], serde_json::json!(contexts));
        assert_eq!(disk["difference"]["export"], "vda@cp1..b1");
        assert_eq!(
            disk["difference"]["uris"][0],
            server.frozen_uri("vda@cp1..b1")
        );
        assert!(disk["disk_uuid"].is_string(), "{begun}");
    }

    #[test]
    fn begin_without_json_prints_what_to_paste() {
        let server = Server::with_disk(MIB);
        let output = server.cli(&["backup", "begin", "--id", "b1"]);
        assert!(
            output.ok().contains(&server.frozen_uri("vda@b1")),
            "{output}"
        );
    }

    #[test]
    fn without_an_id_one_is_made_up() {
        let server = Server::with_disk(MIB);
        let begun = server.cli_json(&["backup", "begin"]);
        let id = begun["id"].as_str().unwrap();
        assert_eq!(server.backup(id)["uuid"], begun["uuid"]);
        server.abort(id);
    }

    #[test]
    fn a_full_backup_has_no_difference_and_says_its_size() {
        let server = Server::with_disk(MIB);
        let begun = server.begin("b1", &[]);
        let disk = &begun["disks"][0];
        assert_eq!(begun["since"], Value::Null);
        assert_eq!(disk["mode"], "full");
        assert_eq!(disk["changed_bytes"], MIB);
        assert_eq!(disk["difference"], Value::Null);
    }

    #[test]
    fn begin_again_with_the_same_id_is_the_same_backup() {
        let server = Server::with_disk(MIB);
        server.checkpoint("cp1");
        let args = ["--since", "cp1", "--checkpoint", "cp2"];
        let first = server.begin("b1", &args);
        Guest::new(&server, "vda").write(0, &[1]);
        let again = server.begin("b1", &args);
        for key in ["uuid", "frozen_at", "checkpoint_uuid"] {
            assert_eq!(first[key], again[key], "{key}");
        }
        assert_eq!(
            first["disks"][0]["changed_bytes"],
            again["disks"][0]["changed_bytes"]
        );
        let other = server.cli(&["backup", "begin", "--id", "b1", "--since", "cp1"]);
        assert!(other.error(1).contains("b1"), "{other}");
        server.abort("b1");
        let ended = server.cli(&["backup", "begin", "--id", "b1", "--since", "cp1"]);
        assert!(
            ended.error(1).contains("b1"),
            "ids are never reused\n{ended}"
        );
    }

    #[test]
    fn an_end_may_be_repeated_but_not_changed() {
        let server = Server::with_disk(MIB);
        server.begin("b1", &["--checkpoint", "cp1"]);
        server.commit("b1");
        server.commit("b1");
        server.cli(&["backup", "abort", "b1"]).error(1);
        server.begin("b2", &["--checkpoint", "cp2"]);
        server.abort("b2");
        server.abort("b2");
        server.cli(&["backup", "commit", "b2"]).error(1);
        let list = server.cli_json(&["checkpoint", "list"]);
        assert_eq!(names(&list, "checkpoints", "name"), ["cp1"]);
    }

    #[test]
    fn a_pending_checkpoint_is_taken_but_no_base_before_commit() {
        let server = Server::with_disk(MIB);
        server.begin("b1", &["--checkpoint", "cp1"]);
        server.cli(&["checkpoint", "create", "cp1"]).error(1);
        server.cli(&["backup", "begin", "--since", "cp1"]).error(1);
        Guest::new(&server, "vda").write(CHUNK, &[1]);
        server.commit("b1");
        assert_eq!(
            server.dirty_bytes("cp1", "vda"),
            CHUNK,
            "changed since the freeze"
        );
        let begun = server.begin("b2", &["--since", "cp1"]);
        assert_eq!(begun["disks"][0]["changed_bytes"], CHUNK);
        server.abort("b2");
    }

    #[test]
    fn an_abort_forgets_nothing() {
        let server = Server::with_disk(MIB);
        let mut guest = Guest::new(&server, "vda");
        server.checkpoint("cp1");
        guest.write(CHUNK, &[1]);
        server.begin("b1", &["--since", "cp1", "--checkpoint", "cp2"]);
        guest.write(5 * CHUNK, &[1]);
        server.abort("b1");
        assert_eq!(server.dirty_bytes("cp1", "vda"), 2 * CHUNK);
        server.checkpoint("cp2");
    }

    #[test]
    fn a_disk_that_the_checkpoint_lacks_is_full_alone_and_the_exit_code_is_3() {
        let server = Server::builder()
            .disk("vda", MIB)
            .disk("vdb", 2 * MIB)
            .start();
        server
            .cli(&["checkpoint", "create", "cp1", "--disk", "vda"])
            .ok();
        let output = server.cli(&["backup", "begin", "--id", "b1", "--since", "cp1", "--json"]);
        output.exits(3);
        let begun: Value = serde_json::from_str(&output.stdout).expect("the backup");
        let vda = named(&begun, "disks", "disk", "vda").unwrap();
        assert_eq!(
            (&vda["mode"], &vda["reason"]),
            (&"incremental".into(), &Value::Null)
        );
        let vdb = named(&begun, "disks", "disk", "vdb").unwrap();
        assert_eq!(vdb["mode"], "full", "{begun}");
        assert!(vdb["reason"].is_string(), "{begun}");
        assert_eq!(vdb["changed_bytes"], 2 * MIB);
        assert_eq!(vdb["difference"], Value::Null);
        assert!(
            !vdb["contexts"].to_string().contains("dirty-bitmap"),
            "{begun}"
        );

        let only = [
            "backup", "begin", "--id", "b2", "--since", "cp1", "--disk", "vda",
        ];
        server.cli(&only).exits(0);
    }

    #[test]
    fn only_the_disks_named_are_frozen() {
        let server = Server::builder().disk("vda", MIB).disk("vdb", MIB).start();
        let begun = server.begin("b1", &["--disk", "vdb"]);
        assert_eq!(names(&begun, "disks", "disk"), ["vdb"]);
        let refused = stillpoint_tests::RawNbd::try_open(&server.frozen(), "vda@b1", &[]);
        assert!(refused.is_err());
    }

    #[test]
    fn open_backups_are_listed_and_end_on_their_own() {
        let server = Server::with_disk(MIB);
        for id in ["b1", "b2", "b3"] {
            server.begin(id, &[]);
        }
        let open = || {
            let list = server.cli_json(&["backup", "list"]);
            let open = list
                .as_array()
                .or_else(|| list["backups"].as_array())
                .unwrap()
                .clone();
            let open = open.into_iter().filter(|backup| backup["state"] == "open");
            open.map(|backup| backup["id"].as_str().unwrap().to_owned())
                .collect::<Vec<_>>()
        };
        assert_eq!(open(), ["b1", "b2", "b3"]);
        server.commit("b2");
        assert_eq!(open(), ["b1", "b3"]);
        assert!(server.cli(&["backup", "list"]).ok().contains("b3"));
        assert!(server.cli(&["backup", "show", "b3"]).ok().contains("b3"));
        server.abort("b1");
        server.abort("b3");
        assert_eq!(open(), [""; 0]);
    }

    #[test]
    fn scratch_is_sparse_and_goes_with_the_backup() {
        let server = Server::with_disk(64 * MIB);
        let mut guest = Guest::new(&server, "vda");
        guest.write(0, &vec![1; 8 * MIB as usize]);
        let state = server.path("vda.raw.stillpoint");
        let used = || disk_usage(&state);
        server.begin("b1", &[]);
        let before = used();
        guest.write(0, &vec![2; 4 * MIB as usize]);
        let during = used() - before;
        assert!(
            (4 * MIB..5 * MIB).contains(&during),
            "{during} bytes for 4 MiB of old bytes"
        );
        server.abort("b1");
        assert!(
            used() < before + MIB / 2,
            "{} bytes after, {before} before",
            used()
        );
    }

    fn disk_usage(directory: &Path) -> u64 {
        let output = tool("du", &["-s", "--block-size=1", path(directory)]);
        output
            .ok()
            .split_whitespace()
            .next()
            .unwrap()
            .parse()
            .unwrap()
    }
}

mod status {
    use super::*;

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
}
