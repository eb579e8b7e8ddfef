//! What is done to a guest around an instant, and that it is undone whatever happens.

use std::fs;
use std::io::Read;
use std::path::PathBuf;
use std::process::{Command, Stdio};

use rustix::process::{Pid, Signal, kill_process_group};
use serde_json::{Value, json};
use stillpoint_tests::guest_agent::{Manner, Manners};
use stillpoint_tests::process::{self, KilledOnDrop, Output};
use stillpoint_tests::server::names;
use stillpoint_tests::{GuestAgent, MIB, Qmp, Server};

const FREEZE: &str = "guest-fsfreeze-freeze";
const THAW: &str = "guest-fsfreeze-thaw";

/// A server, and a place where everyone says what they do.
struct Scene {
    server: Server,
    log: PathBuf,
}

impl Scene {
    fn new() -> Self {
        let server = Server::builder().disk("vda", MIB).disk("vdb", MIB).start();
        let log = server.path("log");
        fs::write(&log, "").unwrap();
        Self { server, log }
    }

    /// An agent that tells which backups are open at the moments of its freeze and of its thaw.
    fn agent(&self, manners: Manners) -> GuestAgent {
        let control = self.server.control();
        GuestAgent::start(&self.server.path("agent"), manners, &self.log, move || {
            let open = Qmp::connect(&control).execute("query-backups", &json!({}));
            format!("{:?}", names(&open, "backups", "id"))
        })
    }

    /// An agent that asks nobody, as the server does not answer.
    fn deaf_agent(&self, manners: Manners) -> GuestAgent {
        let path = self.server.path("agent");
        GuestAgent::start(&path, manners, &self.log, String::new)
    }

    /// A hook that says so, with these variables, after it has done something.
    fn says(&self, first: &str, text: &str) -> String {
        format!("{first}\necho \"{text}\" >> '{}'", self.log.display())
    }

    fn log(&self) -> Vec<String> {
        let text = fs::read_to_string(&self.log).unwrap();
        text.lines().map(str::to_owned).collect()
    }

    fn open_backups(&self) -> Vec<String> {
        names(&self.server.cli_json(&["backup", "list"]), "backups", "id")
    }

    fn run(&self, command: &[&str], hooks: &[(&str, &str)]) -> Output {
        process::run(&mut self.command(command, hooks))
    }

    fn command(&self, command: &[&str], hooks: &[(&str, &str)]) -> Command {
        let mut command = self.server.cli_command(command);
        for (option, value) in hooks {
            command.arg(format!("--{option}={value}"));
        }
        command
    }

    /// Starts a command whose end can be seen even if it is killed: what it started has the same
    /// standard error.
    fn start(&self, command: &[&str], hooks: &[(&str, &str)]) -> KilledOnDrop {
        use std::os::unix::process::CommandExt;
        let stillpoint = self.command(command, hooks);
        // Whoever runs the tests in the background may have them ignore what a terminal sends.
        let mut command = Command::new("env");
        command
            .arg("--default-signal=INT")
            .arg(stillpoint.get_program())
            .args(stillpoint.get_args())
            .process_group(0)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped());
        KilledOnDrop::spawn(&mut command)
    }
}

fn good() -> Manners {
    Manners {
        filesystems: 2,
        ..Manners::default()
    }
}

/// Returns when a command and all that it started have ended.
fn wait_for_the_last(client: &mut KilledOnDrop) -> String {
    let mut text = String::new();
    let mut stderr = client.child.stderr.take().expect("it is piped");
    stderr.read_to_string(&mut text).expect("a pipe");
    text
}

fn path_text(agent: &GuestAgent) -> &str {
    agent.path().to_str().expect("a path of the test")
}

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
        ("hook-timeout", "100ms"),
    ];
    let failed = scene.run(&["backup", "begin"], &hooks);
    assert!(
        failed.error(1).contains("took too long and was killed"),
        "{failed}"
    );
    assert_eq!(scene.log(), ["thaw failed"]);
    assert!(scene.open_backups().is_empty());
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
    assert_eq!(scene.log()[2], "thaw unknown", "{text}");
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

/// Begins a backup with such an agent and sees that it is refused, saying this, with nothing begun.
#[track_caller]
fn refuses(manners: Manners, saying: &str) -> Vec<String> {
    let scene = Scene::new();
    let agent = scene.agent(manners);
    let freeze = scene.says("", "freeze");
    let hooks = [
        ("guest-agent", path_text(&agent)),
        ("freeze-hook", &freeze),
        ("hook-timeout", "2s"),
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
    let hooks = [
        ("guest-agent", path_text(&agent)),
        ("hook-timeout", "200ms"),
    ];
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
    assert!(failed.error(1).contains("cannot be reached"), "{failed}");

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
        ("hook-timeout", "500ms"),
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
