//! Hooks and an agent around an instant, when all goes well; and around one that does not come.

use serde_json::Value;

use crate::scene::{FREEZE, Scene, THAW, good, path_text};

#[test]
fn hook_and_agent_freeze_before_the_instant_and_thaw_after_it_in_the_opposite_order() {
    let scene = Scene::new();
    let agent = scene.agent(good());
    let words = "$STILLPOINT_HOOK $STILLPOINT_COMMAND: $STILLPOINT_DISKS, $STILLPOINT_BACKUP, \
                 $STILLPOINT_CHECKPOINT, $STILLPOINT_INSTANT";
    let (freeze, thaw) = (scene.says("", words), scene.says("", words));
    let hooks = [
        ("freeze-hook", &freeze[..]),
        ("thaw-hook", &thaw),
        ("guest-agent", path_text(&agent)),
    ];
    let begin = ["backup", "begin", "--checkpoint=cp1", "--json"];
    let backup = scene.run(&begin, &hooks).json();
    assert_eq!(
        scene.log(),
        [
            "freeze backup begin: vda vdb, , cp1, ",
            "guest-fsfreeze-freeze []",
            "guest-fsfreeze-thaw [\"b1\"]",
            "thaw backup begin: vda vdb, b1, cp1, taken",
        ]
    );
    let held = &backup["hooks"];
    assert!(held["held_us"].as_u64().unwrap() > 0, "{backup}");
    assert_eq!(held["filesystems"], 2, "{backup}");
    assert_eq!(held["error"], Value::Null, "{backup}");
    assert_eq!(backup["id"], "b1");
    assert_eq!(backup["disks"].as_array().unwrap().len(), 2);
}

#[test]
fn a_checkpoint_is_held_for_too_and_people_are_told_for_how_long() {
    let scene = Scene::new();
    let agent = scene.agent(good());
    let thaw = scene.says(
        "",
        "$STILLPOINT_CHECKPOINT of $STILLPOINT_DISKS in $STILLPOINT_RUN_DIR",
    );
    let hooks = [("thaw-hook", &thaw[..]), ("guest-agent", path_text(&agent))];
    let create = ["checkpoint", "create", "cp7", "--disk=vdb"];
    let created = scene.run(&create, &hooks);
    assert!(created.ok().contains("guest held for "), "{created}");
    assert!(
        created.ok().contains(", 2 file systems frozen"),
        "{created}"
    );
    let run_dir = scene.server.control();
    let run_dir = run_dir.parent().unwrap().display();
    assert_eq!(scene.log()[2], format!("cp7 of vdb in {run_dir}"));
    assert_eq!(agent.carried_out(), [FREEZE, THAW]);
}

#[test]
fn without_hooks_nothing_is_said_of_them() {
    let scene = Scene::new();
    let begun = scene.server.begin("b1", &[]);
    assert_eq!(begun.get("hooks"), None);
    let created = scene.run(&["checkpoint", "create", "cp1"], &[]);
    assert!(!created.ok().contains("held"), "{created}");
}

#[test]
fn what_hooks_print_is_not_taken_for_the_answer() {
    let scene = Scene::new();
    let hooks = [("freeze-hook", "echo {"), ("thaw-hook", "echo }")];
    let begun = scene.run(&["backup", "begin", "--json"], &hooks);
    assert_eq!(begun.json()["hooks"]["filesystems"], Value::Null);
    assert_eq!(begun.stderr, "{\n}\n");
}

#[test]
fn a_begin_that_is_refused_is_followed_by_the_thaw() {
    let scene = Scene::new();
    let agent = scene.agent(good());
    let thaw = scene.says("", "thaw $STILLPOINT_INSTANT");
    let hooks = [("thaw-hook", &thaw[..]), ("guest-agent", path_text(&agent))];
    let refused = scene.run(&["backup", "begin", "--since=nothing"], &hooks);
    assert!(refused.error(1).contains("'nothing'"), "{refused}");
    assert_eq!(agent.carried_out(), [FREEZE, THAW]);
    assert_eq!(scene.log()[2], "thaw failed");
}

#[test]
fn a_server_that_is_not_there_costs_no_freeze_and_one_that_goes_is_followed_by_the_thaw() {
    let mut scene = Scene::new();
    let agent = scene.deaf_agent(good());
    let thaw = scene.says("", "thaw $STILLPOINT_INSTANT");
    let freeze = format!("kill -9 {}", scene.server.pid());
    let hooks = [
        ("freeze-hook", &freeze[..]),
        ("thaw-hook", &thaw),
        ("guest-agent", path_text(&agent)),
    ];
    let failed = scene.run(&["backup", "begin"], &hooks);
    assert!(failed.error(1).contains("no server answers"), "{failed}");
    assert_eq!(agent.carried_out(), [FREEZE, THAW]);
    assert_eq!(scene.log()[2], "thaw failed");
    scene.server.wait();

    let failed = scene.run(&["backup", "begin"], &hooks);
    assert!(failed.error(1).contains("no server answers"), "{failed}");
    assert!(agent.carried_out().is_empty());
    assert_eq!(scene.log().len(), 3);
}
