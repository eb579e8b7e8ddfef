//! Thaws that fail, or come too early: the instant stands, and the command says what is wrong.

use serde_json::Value;
use stillpoint_tests::guest_agent::{Manner, Manners};

use crate::scene::{FREEZE, Scene, THAW, good, path_text};

#[test]
fn a_guest_is_not_held_for_longer_than_was_said_and_the_instant_says_so() {
    let scene = Scene::new();
    let pid = scene.server.pid();
    let freeze = format!("kill -STOP {pid}");
    let thaw = scene.says(&format!("kill -CONT {pid}"), "thaw $STILLPOINT_INSTANT");
    let hooks = [
        ("freeze-hook", &freeze[..]),
        ("thaw-hook", &thaw),
        ("hook-timeout", "1s"),
    ];
    let begun = scene.run(&["backup", "begin", "--json"], &hooks);
    begun.exits(1);
    assert!(
        begun
            .stderr
            .contains("error: thaw: the instant took longer"),
        "{begun}"
    );
    let backup: Value = serde_json::from_str(&begun.stdout).unwrap();
    assert_eq!(backup["hooks"]["error"]["code"], "thawed-early", "{backup}");
    assert_eq!(scene.log(), ["thaw unknown"]);
    assert_eq!(scene.open_backups(), ["b1"]);
}

#[test]
fn a_thaw_is_asked_for_until_it_is_done() {
    let scene = Scene::new();
    let agent = scene.agent(Manners {
        thaws: vec![
            Manner::Refused("not now"),
            Manner::HangsUp,
            Manner::Refused("not yet"),
        ],
        ..good()
    });
    let hooks = [("guest-agent", path_text(&agent))];
    let begun = scene.run(&["backup", "begin", "--json"], &hooks).json();
    assert_eq!(begun["hooks"]["error"], Value::Null, "{begun}");
    assert_eq!(agent.carried_out(), [FREEZE, THAW]);
}

/// Begins a backup of a guest that such an agent thaws: it stands, and the command says what is wrong.
#[track_caller]
fn stands(thaws: Vec<Manner>, code: &str, saying: &str) {
    let scene = Scene::new();
    let agent = scene.agent(Manners { thaws, ..good() });
    let thaw = scene.says("", "thaw $STILLPOINT_INSTANT");
    let hooks = [
        ("guest-agent", path_text(&agent)),
        ("thaw-hook", &thaw),
        // All of the instant is to be had within it, syncs too, also on a busy machine.
        ("hook-timeout", "5s"),
    ];
    let begun = scene.run(&["backup", "begin", "--json"], &hooks);
    begun.exits(1);
    assert!(
        begun.stderr.starts_with("stillpoint: error: thaw: "),
        "{begun}"
    );
    assert!(begun.stderr.contains(saying), "{begun}");
    let backup: Value = serde_json::from_str(&begun.stdout).unwrap();
    assert_eq!(backup["hooks"]["error"]["code"], code, "{backup}");
    assert_eq!(backup["id"], "b1", "{backup}");
    assert_eq!(scene.log().last().unwrap(), "thaw taken");
    assert_eq!(scene.open_backups(), ["b1"]);
}

#[test]
fn a_thaw_that_fails_is_said_loudly_and_the_instant_stands() {
    let words = "may still be frozen";
    stands(vec![Manner::Silent], "thaw-failed", words);
    stands(vec![Manner::Refused("never"); 1000], "thaw-failed", words);
}

#[test]
fn a_guest_that_was_not_held_until_the_thaw_is_told_of() {
    stands(
        vec![Manner::Says(1)],
        "thawed-early",
        "of 2 file systems it still had 1 to thaw",
    );
    let vss = "fsfreeze is limited up to 10 seconds";
    stands(vec![Manner::ThawedAlone(vss)], "thawed-early", vss);
}

#[test]
fn a_thaw_hook_that_fails_is_said_loudly_and_the_instant_stands() {
    let scene = Scene::new();
    let hooks = [("thaw-hook", "exit 9")];
    let created = scene.run(&["checkpoint", "create", "cp1"], &hooks);
    created.exits(1);
    assert!(
        created
            .stderr
            .contains("error: thaw: the thaw hook failed with exit code 9"),
        "{created}"
    );
    assert!(
        created.stdout.contains("checkpoint cp1 of vda, vdb"),
        "{created}"
    );
    scene.server.cli(&["checkpoint", "show", "cp1"]).ok();
    // What is refused says why it was; that the thaw failed besides is said too.
    let refused = scene.run(&["checkpoint", "create", "cp1"], &hooks);
    refused.exits(1);
    assert!(refused.stderr.contains("error: thaw: "), "{refused}");
    assert!(
        refused.stderr.contains("error: checkpoint create: "),
        "{refused}"
    );
}
