//! The control socket, byte by byte and with QEMU's own clients.

use std::process::Command;

use serde_json::{Value, json};
use stillpoint_tests::process::run;
use stillpoint_tests::server::names;
use stillpoint_tests::tools::{in_venv, path, python};
use stillpoint_tests::{MIB, Qmp, Server};

fn server() -> Server {
    Server::with_disk(MIB)
}

#[track_caller]
fn error(message: &Value) -> &str {
    let error = &message["error"];
    assert!(["GenericError", "CommandNotFound"].contains(&error["class"].as_str().unwrap()));
    error["desc"].as_str().expect("an error has a text")
}

#[test]
fn the_greeting_names_the_version_and_the_package() {
    let server = server();
    let qmp = Qmp::connect_silently(&server.control());
    let hello = &qmp.greeting()["QMP"];
    assert_eq!(hello["version"]["package"], "stillpoint");
    for part in ["major", "minor", "micro"] {
        assert!(hello["version"]["qemu"][part].is_u64(), "{hello}");
    }
    assert_eq!(hello["capabilities"], json!([]));
}

#[test]
fn commands_are_refused_until_the_capabilities_are_negotiated() {
    let server = server();
    let mut qmp = Qmp::connect_silently(&server.control());
    let refused = qmp.try_execute("query-status", &json!({})).unwrap_err();
    assert!(refused.contains("qmp_capabilities"), "{refused}");
    assert_eq!(qmp.execute("qmp_capabilities", &json!({})), json!({}));
    qmp.execute("query-status", &json!({}));
}

#[test]
fn several_objects_in_one_segment_without_newlines_are_answered_in_order() {
    let server = server();
    let mut qmp = server.qmp();
    let one = |id: usize| json!({"execute": "query-version", "id": id}).to_string();
    let all: String = (0..50).map(one).collect();
    qmp.send(all.as_bytes());
    for id in 0..50 {
        let reply = qmp.reply();
        assert_eq!(reply["id"], id);
        assert!(reply["return"].is_object(), "{reply}");
    }
}

#[test]
fn white_space_between_objects_is_nothing() {
    let server = server();
    let mut qmp = server.qmp();
    qmp.send(b"\r\n\n \t{\"execute\"\n: \"query-version\" ,\r\n\"id\":1}\n\n  ");
    assert_eq!(qmp.reply()["id"], 1);
    qmp.send(b"{\"execute\":\"query-version\",\"id\":2}");
    assert_eq!(qmp.reply()["id"], 2);
}

#[test]
fn an_object_may_be_split_at_every_byte() {
    let server = server();
    let mut qmp = server.qmp();
    let text = r#"{"execute":"query-checkpoints","arguments":{},"id":"}{\"\\ ä"}"#.as_bytes();
    for split in 1..text.len() {
        qmp.send(&text[..split]);
        qmp.send(&text[split..]);
        let reply = qmp.reply();
        assert_eq!(reply["id"], "}{\"\\ ä", "split at {split}: {reply}");
        assert!(reply.get("return").is_some(), "split at {split}: {reply}");
    }
    for byte in text {
        qmp.send(&[*byte]);
    }
    assert_eq!(qmp.reply()["id"], "}{\"\\ ä");
}

#[test]
fn an_id_of_any_type_is_echoed_and_none_is_made_up() {
    let server = server();
    let mut qmp = server.qmp();
    for id in [
        json!("x"),
        json!(7),
        json!({"a": [1, null]}),
        json!(null),
        json!(1.5),
    ] {
        for execute in ["query-version", "no-such-command"] {
            qmp.send(json!({"execute": execute, "id": id}).to_string().as_bytes());
            let reply = qmp.reply();
            assert_eq!(reply.get("id"), Some(&id), "{reply}");
        }
    }
    qmp.send(br#"{"execute":"query-version"}"#);
    assert_eq!(qmp.reply().get("id"), None);
}

#[test]
fn what_is_no_known_command_is_an_error_and_the_connection_goes_on() {
    let server = server();
    let mut qmp = server.qmp();
    for request in [
        json!({"execute": "no-such-command"}),
        json!({"execute": 7}),
        json!({"arguments": {}}),
        json!({}),
        json!({"execute": "backup-commit"}),
        json!({"execute": "backup-commit", "arguments": {"id": 7}}),
        json!({"execute": "backup-commit", "arguments": {"id": "b9"}}),
        json!({"execute": "backup-begin", "arguments": {"no-such-argument": 1}}),
        json!({"execute": "backup-begin", "arguments": []}),
        json!({"execute": "query-version", "surplus": 1}),
    ] {
        qmp.send(request.to_string().as_bytes());
        let reply = qmp.reply();
        assert!(!error(&reply).is_empty(), "{request}: {reply}");
    }
    let refused = qmp.try_execute("no-such-command", &json!({})).unwrap_err();
    assert!(refused.contains("no-such-command"), "{refused}");
    assert_eq!(qmp.execute("query-backups", &json!({})), json!([]));
}

#[test]
fn bad_json_is_an_error_and_ends_nothing_else() {
    let server = server();
    for garbage in [
        &b"{\"execute\": nope}\n"[..],
        b"]\n",
        b"hello\n",
        b"{\"a\":\xff\xfe}\n",
    ] {
        let mut qmp = server.qmp();
        qmp.send(garbage);
        assert!(!error(&qmp.receive().expect("an error first")).is_empty());
        // It may hang up or go on, but if it goes on it answers.
        if qmp
            .try_send(b"\n{\"execute\":\"query-version\",\"id\":1}")
            .is_ok()
        {
            while let Some(message) = qmp.receive().filter(|message| message["id"] != 1) {
                error(&message);
            }
        }
    }
    server.is_well();
}

#[test]
fn an_object_larger_than_a_mib_ends_the_connection() {
    let server = server();
    let mut qmp = server.qmp();
    let fits = json!({"execute": "query-version", "id": "x".repeat(MIB as usize - 100)});
    qmp.send(fits.to_string().as_bytes());
    assert!(qmp.reply()["return"].is_object());

    let chunk = [b'x'; 4096];
    // How much of it the server takes in before it hangs up is its own affair.
    let _ = qmp
        .try_send(br#"{"execute":"query-version","id":""#)
        .and_then(|()| {
            (0..(2 * MIB as usize / chunk.len())).try_for_each(|_| qmp.try_send(&chunk))
        });
    assert!(qmp.hangs_up());
    server.is_well();
}

#[test]
fn nesting_without_end_does_no_harm() {
    let server = server();
    for opening in ["[", "{\"a\":"] {
        // It may be refused at any depth, with a word or without; so much that no stack would bear
        // it, and so little that the words about it fit into the socket.
        let _ = server.qmp().try_send(opening.repeat(20_000).as_bytes());
    }
    server.is_well();
}

#[test]
fn every_command_of_the_contract_is_listed() {
    let server = server();
    let listed = names(
        &server.qmp().execute("query-commands", &json!({})),
        "commands",
        "name",
    );
    for command in [
        "qmp_capabilities",
        "query-version",
        "query-commands",
        "query-status",
        "query-disks",
        "query-checkpoints",
        "query-backups",
        "checkpoint-create",
        "checkpoint-delete",
        "backup-begin",
        "backup-commit",
        "backup-abort",
        "quit",
    ] {
        assert!(
            listed.contains(&command.to_owned()),
            "{command} is not in {listed:?}"
        );
    }
}

#[test]
fn events_tell_every_connection_of_begin_and_end() {
    let server = server();
    let (mut one, mut other) = (server.qmp(), server.qmp());
    one.execute("backup-begin", &json!({"id": "b1"}));
    one.execute("backup-abort", &json!({"id": "b1"}));
    one.execute("backup-begin", &json!({"id": "b2"}));
    one.execute("backup-commit", &json!({"id": "b2"}));
    for qmp in [&mut one, &mut other] {
        for id in ["b1", "b2"] {
            let begun = qmp.event("BACKUP_BEGUN");
            assert_eq!(begun["data"]["id"], id, "{begun}");
            assert!(begun["timestamp"]["seconds"].is_u64(), "{begun}");
            assert!(begun["timestamp"]["microseconds"].is_u64(), "{begun}");
            let ended = qmp.event("BACKUP_ENDED");
            assert_eq!(ended["data"]["id"], id, "{ended}");
            assert!(ended["data"]["outcome"].is_string(), "{ended}");
        }
    }
}

#[test]
fn a_connection_that_reads_nothing_holds_nobody_up() {
    let server = server();
    let mut deaf = server.qmp();
    let asked = json!({"execute": "query-commands"}).to_string().repeat(200);
    let _ = deaf.try_send(asked.as_bytes());
    let mut qmp = server.qmp();
    for round in 0..50 {
        qmp.execute("backup-begin", &json!({"id": format!("b{round}")}));
        qmp.execute("backup-abort", &json!({"id": format!("b{round}")}));
    }
}

#[test]
fn the_command_line_shows_what_the_socket_returns() {
    let server = server();
    server.checkpoint("cp1");
    server.begin("b1", &["--since", "cp1"]);
    let mut qmp = server.qmp();
    let returned = qmp.execute("query-checkpoints", &json!({}));
    assert_eq!(server.cli_json(&["checkpoint", "list"]), returned);
    let raw = r#"{"execute":"query-checkpoints"}"#;
    let printed = server.cli(&["qmp", raw]).json();
    assert_eq!(printed.get("return").unwrap_or(&printed), &returned);
}

#[test]
fn quit_stops_the_server_as_a_signal_does() {
    let mut server = server();
    server.qmp().execute("quit", &json!({}));
    assert!(server.wait().success(), "{}", server.stderr());
}

#[test]
fn qemus_own_library_is_a_client() {
    let server = server();
    let seen = python("qmp_client.py", &[path(&server.control()), "b1"]).json();
    assert_eq!(seen["greeting"]["version"]["package"], "stillpoint");
    assert_eq!(seen["version"]["package"], "stillpoint");
    assert_eq!(seen["begun"]["id"], "b1");
    assert_eq!(seen["all_equal"], true);
    assert_eq!(names(&seen["backups"], "backups", "id"), ["b1"]);
    assert!(seen["error"]["desc"].is_string(), "{seen}");
    assert_eq!(
        names(&seen["events"], "events", "event"),
        ["BACKUP_BEGUN", "BACKUP_ENDED"]
    );
}

#[test]
fn qmp_shell_is_a_client() {
    let server = server();
    let script = format!(
        "printf '%s\\n' 'query-version' 'backup-begin id=b1' 'query-backups' 'no-such-command' \
         'backup-abort id=b1' | '{}' '{}'",
        path(&in_venv("qmp-shell")),
        path(&server.control())
    );
    let output = run(Command::new("sh")
        .arg("-c")
        .arg(script)
        .env("HOME", server.directory()));
    let printed = output.ok();
    assert_eq!(printed.matches("\"return\"").count(), 4, "{output}");
    assert_eq!(printed.matches("\"error\"").count(), 1, "{output}");
    assert!(printed.contains("vda@b1"), "{output}");
}
