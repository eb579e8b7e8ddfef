//! Whoever is killed or interrupted around an instant, the guest goes on.

use rustix::process::{Pid, Signal, kill_process_group};
use stillpoint_tests::guest_agent::{Manner, Manners};

use crate::scene::{FREEZE, Scene, THAW, good, path_text, wait_for_the_last};

/// Kills or interrupts the command while the server does not answer, and sees that the guest goes on.
fn ends_while_the_guest_is_held(signal: Signal) {
    let scene = Scene::new();
    let agent = scene.deaf_agent(good());
    let thaw = scene.says("", "thaw $STILLPOINT_INSTANT");
    let freeze = format!("kill -STOP {}", scene.server.pid());
    let hooks = [
        ("freeze-hook", &freeze[..]),
        ("thaw-hook", &thaw),
        ("guest-agent", path_text(&agent)),
        ("hook-timeout", "1h"),
    ];
    let mut client = scene.start(&["backup", "begin"], &hooks);
    agent.wait_for(FREEZE);
    // To all that a terminal would tell.
    kill_process_group(Pid::from_child(&client.child), signal).unwrap();
    assert!(!client.child.wait().unwrap().success());
    agent.wait_for(THAW);
    let text = wait_for_the_last(&mut client);
    // Failed, where the agent's answer had not reached the guardian: then nothing was asked of the server.
    let thaw = &scene.log()[2];
    assert!(
        ["thaw unknown", "thaw failed"].contains(&thaw.as_str()),
        "{thaw}: {text}"
    );
    scene.server.signal(Signal::CONT);
}

#[test]
fn a_command_that_is_killed_while_the_guest_is_held_leaves_it_thawed() {
    ends_while_the_guest_is_held(Signal::KILL);
}

#[test]
fn a_command_that_is_interrupted_at_its_terminal_leaves_the_guest_thawed() {
    ends_while_the_guest_is_held(Signal::INT);
}

#[test]
fn a_command_that_is_killed_in_its_freeze_hook_leaves_the_guest_thawed() {
    let scene = Scene::new();
    let thaw = scene.says("", "thaw $STILLPOINT_INSTANT");
    // The hook kills the command, which is the parent of the guardian, and never ends by itself.
    let freeze = "kill -9 $(sed 's/.*) . //' /proc/$PPID/stat | cut -d' ' -f1); sleep 1000";
    let hooks = [
        ("freeze-hook", freeze),
        ("thaw-hook", &thaw),
        ("hook-timeout", "1h"),
    ];
    let mut client = scene.start(&["backup", "begin"], &hooks);
    let text = wait_for_the_last(&mut client);
    assert!(!client.child.wait().unwrap().success());
    assert_eq!(scene.log(), ["thaw failed"], "{text}");
    assert!(scene.open_backups().is_empty());
}

#[test]
fn a_command_that_is_killed_while_the_agent_freezes_leaves_the_guest_thawed() {
    let scene = Scene::new();
    let agent = scene.deaf_agent(Manners {
        // Carried out only when the thaw comes.
        freeze: Manner::Late,
        ..good()
    });
    let hooks = [("guest-agent", path_text(&agent)), ("hook-timeout", "1h")];
    let mut client = scene.start(&["backup", "begin"], &hooks);
    agent.wait_for("guest-fsfreeze-freeze asked");
    client.child.kill().unwrap();
    client.child.wait().unwrap();
    wait_for_the_last(&mut client);
    assert_eq!(agent.carried_out(), [FREEZE, THAW]);
    assert!(scene.open_backups().is_empty());
}

#[test]
fn a_guardian_that_is_told_to_end_goes_on_until_the_guest_is_thawed() {
    let scene = Scene::new();
    let signals = "kill -TERM $PPID; kill -INT $PPID; kill -HUP $PPID; kill -QUIT $PPID";
    let freeze = scene.says(signals, "freeze");
    let thaw = scene.says(signals, "thaw $STILLPOINT_INSTANT");
    let hooks = [("freeze-hook", &freeze[..]), ("thaw-hook", &thaw)];
    scene.run(&["backup", "begin"], &hooks).ok();
    assert_eq!(scene.log(), ["freeze", "thaw taken"]);
}

#[test]
fn what_a_guardian_that_was_killed_left_undone_is_done_by_the_command() {
    let scene = Scene::new();
    let agent = scene.agent(good());
    let once = scene.server.path("once");
    let kill = format!("mkdir '{}' 2>&- && kill -9 $PPID", once.display());
    let thaw = scene.says(&kill, "thaw $STILLPOINT_INSTANT $STILLPOINT_BACKUP");
    let hooks = [("thaw-hook", &thaw[..]), ("guest-agent", path_text(&agent))];
    let begun = scene.run(&["backup", "begin", "--json"], &hooks);
    // The first of these was said by a hook that nobody waited for any more.
    assert_eq!(scene.log().last().unwrap(), "thaw taken b1", "{begun}");
    assert_eq!(agent.carried_out(), [FREEZE, THAW, THAW]);
    assert_eq!(scene.open_backups(), ["b1"]);

    let freeze = scene.says("", "freeze");
    let freeze = format!("{freeze}; kill -9 $PPID");
    let thaw = scene.says("", "thaw $STILLPOINT_INSTANT");
    let hooks = [("freeze-hook", &freeze[..]), ("thaw-hook", &thaw)];
    let failed = scene.run(&["backup", "begin"], &hooks);
    assert!(
        failed
            .error(1)
            .contains("the process that is to thaw the guest"),
        "{failed}"
    );
    assert_eq!(scene.log().last().unwrap(), "thaw failed");
    assert_eq!(scene.open_backups(), ["b1"]);
}
