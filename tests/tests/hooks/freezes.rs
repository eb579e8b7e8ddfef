//! Freezes that fail: nothing is begun, and what was half done is undone.

use serde_json::Value;
use stillpoint_tests::guest_agent::{Manner, Manners};

use crate::scene::{FREEZE, Scene, THAW, good, path_text};

#[test]
fn a_freeze_hook_that_fails_begins_nothing_and_is_undone() {
    let scene = Scene::new();
    let agent = scene.agent(good());
    let thaw = scene.says("", "thaw $STILLPOINT_INSTANT");
    let hooks = [
        ("freeze-hook", "exit 7"),
        ("thaw-hook", &thaw),
        ("guest-agent", path_text(&agent)),
    ];
    let failed = scene.run(&["backup", "begin"], &hooks);
    let error = failed.error(1);
    assert_eq!(
        error,
        "backup begin: the freeze hook failed with exit code 7"
    );
    assert!(
        failed.stderr.contains("hint: nothing was begun"),
        "{failed}"
    );
    assert_eq!(scene.log(), ["thaw failed"]);
    assert!(scene.open_backups().is_empty());
    let failed = scene.run(&["backup", "begin", "--json"], &hooks).stdout;
    let failed: Value = serde_json::from_str(&failed).unwrap();
    assert_eq!(failed["error"]["code"], "freeze-failed");
}

#[test]
fn a_freeze_hook_that_takes_too_long_is_killed_with_all_that_it_started_and_undone() {
    let scene = Scene::new();
    let thaw = scene.says("", "thaw $STILLPOINT_INSTANT");
    // A process of its own, which a kill of the shell alone would leave: it would keep the pipe open
    // that this test reads to its end.
    let hooks = [
        ("freeze-hook", "sleep 1000 & wait"),
        ("thaw-hook", &thaw),
        // As long as the thaw hook may take on a busy machine.
        ("hook-timeout", "3s"),
    ];
    let failed = scene.run(&["backup", "begin"], &hooks);
    assert!(
        failed.error(1).contains("took too long and was killed"),
        "{failed}"
    );
    assert_eq!(scene.log(), ["thaw failed"]);
    assert!(scene.open_backups().is_empty());
}

/// Begins a backup with such an agent and sees that it is refused, saying this, with nothing begun.
#[track_caller]
fn refuses(manners: Manners, saying: &str) -> Vec<String> {
    let scene = Scene::new();
    let agent = scene.agent(manners);
    let freeze = scene.says("", "freeze");
    let hooks = [
        ("guest-agent", path_text(&agent)),
        ("freeze-hook", &freeze),
        ("hook-timeout", "3s"),
    ];
    let failed = scene.run(&["backup", "begin"], &hooks);
    assert!(failed.error(1).contains(saying), "{failed}");
    assert!(failed.stderr.contains("\nhint: "), "{failed}");
    assert!(scene.open_backups().is_empty());
    scene
        .log()
        .iter()
        .filter_map(|line| line.split_whitespace().next())
        .map(str::to_owned)
        .collect()
}

#[test]
fn an_agent_that_cannot_freeze_begins_nothing_and_leaves_nothing_frozen() {
    let refused = Manners {
        freeze: Manner::Refused("the device is busy"),
        ..good()
    };
    let log = refuses(refused, "refuses guest-fsfreeze-freeze: the device is busy");
    assert_eq!(log, ["freeze", THAW]);

    let late = Manners {
        freeze: Manner::Late,
        ..good()
    };
    assert_eq!(
        refuses(late, "did not answer in time"),
        ["freeze", FREEZE, THAW]
    );

    let gone = Manners {
        freeze: Manner::HangsUp,
        ..good()
    };
    assert_eq!(refuses(gone, "hung up"), ["freeze", FREEZE, THAW]);

    let nothing = Manners::default();
    assert_eq!(
        refuses(nothing, "froze no file system at all"),
        ["freeze", FREEZE, THAW]
    );
}

#[test]
fn what_somebody_else_froze_is_neither_frozen_nor_thawed() {
    let frozen = Manners {
        is_frozen: true,
        ..good()
    };
    let log = refuses(frozen, "says that file systems are frozen already");
    assert!(log.is_empty(), "{log:?}");
}

#[test]
fn a_freeze_that_nobody_could_undo_says_so() {
    let scene = Scene::new();
    let agent = scene.agent(Manners {
        freeze: Manner::Silent,
        ..good()
    });
    let hooks = [("guest-agent", path_text(&agent)), ("hook-timeout", "3s")];
    let failed = scene.run(&["backup", "begin"], &hooks);
    let error = failed.error(1);
    assert!(
        error.contains("the file systems of the guest may still be frozen"),
        "{failed}"
    );
    assert!(failed.stderr.contains("hint: thaw them"), "{failed}");
}

#[test]
fn an_agent_that_is_not_there_or_does_not_answer_costs_nobody_a_freeze() {
    let scene = Scene::new();
    let freeze = scene.says("", "freeze");
    let path = scene.server.path("agent");
    let hooks = [
        ("guest-agent", path.to_str().unwrap()),
        ("freeze-hook", &freeze),
        ("hook-timeout", "100ms"),
    ];
    let failed = scene.run(&["backup", "begin"], &hooks);
    let why = "cannot be reached: No such file or directory (os error 2)";
    assert!(failed.error(1).contains(why), "{failed}");

    // Somebody has it, and takes no second client.
    let _somebody = std::os::unix::net::UnixListener::bind(&path).unwrap();
    let failed = scene.run(&["backup", "begin"], &hooks);
    assert!(
        failed.error(1).contains("did not answer in time"),
        "{failed}"
    );
    assert!(failed.stderr.contains("virsh domfsfreeze"), "{failed}");
    assert!(scene.log().is_empty());
    assert!(scene.open_backups().is_empty());
}

#[test]
fn what_an_agent_said_to_somebody_else_is_not_taken_for_an_answer() {
    for dribbles in [false, true] {
        let scene = Scene::new();
        let mut stale =
            b"{\"return\": \"frozen\"}\n{\"return\": 1}\n\xff{\"return\": 77}\n".to_vec();
        stale.extend(b"\xff\xff{\"error\": {}}\n{\"return\": [\"half of someth");
        let agent = scene.agent(Manners {
            stale,
            dribbles,
            ..good()
        });
        let hooks = [("guest-agent", path_text(&agent))];
        let begun = scene.run(&["backup", "begin", "--json"], &hooks).json();
        assert_eq!(begun["hooks"]["filesystems"], 2, "{begun}");
        assert_eq!(agent.carried_out(), [FREEZE, THAW]);
    }
}
