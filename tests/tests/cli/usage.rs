//! What is typed: help, options, and where the server is.

use std::process::Command;

use stillpoint_tests::process::run;
use stillpoint_tests::tools::path;
use stillpoint_tests::{MIB, Server, server};

use crate::stillpoint;

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
fn a_usage_error_says_what_is_wrong_and_whose_help_tells_more() {
    for (args, wrong, help) in [
        (&[][..], "a command is missing", "stillpoint --help"),
        (
            &["--run-dir", "x"],
            "a command is missing",
            "stillpoint --help",
        ),
        (
            &["checkpoint"],
            "a command is missing",
            "stillpoint checkpoint --help",
        ),
        (
            &["--run-dir", "backup", "serve", "--no-such-option"],
            "'--no-such-option'",
            "stillpoint serve --help",
        ),
        (
            &["backup", "begin", "--expires", "11y"],
            "a whole number of ms, s, m, h or d",
            "stillpoint backup begin --help",
        ),
        (
            &["prune", "x", "--keep-last", "-1"],
            "not a whole number",
            "stillpoint prune --help",
        ),
        (
            &["serve", "--disk", "last=x"],
            ">': the name 'last' is a reserved word",
            "stillpoint serve --help",
        ),
    ] {
        let output = stillpoint(args);
        assert!(output.error(2).contains(wrong), "{output}");
        let hint = format!("hint: see: {help}\n");
        assert!(output.stderr.ends_with(&hint), "{output}");
    }
}

#[test]
fn the_help_of_serve_has_all_keys_of_a_disk() {
    let output = stillpoint(&["serve", "--help"]);
    let help = output.ok();
    for key in [
        "format=",
        "granularity=",
        "state=",
        "durability=",
        "cache=",
        "read-only",
        "reconnect=",
        "tls-creds=",
    ] {
        assert!(help.contains(key), "no {key}\n{output}");
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
