//! A server, hooks and an agent, and what each says that it did.

use std::fs;
use std::io::Read;
use std::path::PathBuf;
use std::process::{Command, Stdio};

use serde_json::json;
use stillpoint_tests::guest_agent::Manners;
use stillpoint_tests::process::{self, KilledOnDrop, Output};
use stillpoint_tests::server::names;
use stillpoint_tests::{GuestAgent, MIB, Qmp, Server};

pub(crate) const FREEZE: &str = "guest-fsfreeze-freeze";
pub(crate) const THAW: &str = "guest-fsfreeze-thaw";

/// A server, and a place where everyone says what they do.
pub(crate) struct Scene {
    pub(crate) server: Server,
    pub(crate) log: PathBuf,
}

impl Scene {
    pub(crate) fn new() -> Self {
        let server = Server::builder().disk("vda", MIB).disk("vdb", MIB).start();
        let log = server.path("log");
        fs::write(&log, "").unwrap();
        Self { server, log }
    }

    /// An agent that tells which backups are open at the moments of its freeze and of its thaw.
    pub(crate) fn agent(&self, manners: Manners) -> GuestAgent {
        let control = self.server.control();
        GuestAgent::start(&self.server.path("agent"), manners, &self.log, move || {
            let open = Qmp::connect(&control).execute("query-backups", &json!({}));
            format!("{:?}", names(&open, "backups", "id"))
        })
    }

    /// An agent that asks nobody, as the server does not answer.
    pub(crate) fn deaf_agent(&self, manners: Manners) -> GuestAgent {
        let path = self.server.path("agent");
        GuestAgent::start(&path, manners, &self.log, String::new)
    }

    /// A hook that says so, with these variables, after it has done something.
    pub(crate) fn says(&self, first: &str, text: &str) -> String {
        format!("{first}\necho \"{text}\" >> '{}'", self.log.display())
    }

    pub(crate) fn log(&self) -> Vec<String> {
        let text = fs::read_to_string(&self.log).unwrap();
        text.lines().map(str::to_owned).collect()
    }

    pub(crate) fn open_backups(&self) -> Vec<String> {
        names(&self.server.cli_json(&["backup", "list"]), "backups", "id")
    }

    pub(crate) fn run(&self, command: &[&str], hooks: &[(&str, &str)]) -> Output {
        process::run(&mut self.command(command, hooks))
    }

    pub(crate) fn command(&self, command: &[&str], hooks: &[(&str, &str)]) -> Command {
        let mut command = self.server.cli_command(command);
        for (option, value) in hooks {
            command.arg(format!("--{option}={value}"));
        }
        command
    }

    /// Starts a command whose end can be seen even if it is killed: what it started has the same
    /// standard error.
    pub(crate) fn start(&self, command: &[&str], hooks: &[(&str, &str)]) -> KilledOnDrop {
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

pub(crate) fn good() -> Manners {
    Manners {
        filesystems: 2,
        ..Manners::default()
    }
}

/// Returns when a command and all that it started have ended.
pub(crate) fn wait_for_the_last(client: &mut KilledOnDrop) -> String {
    let mut text = String::new();
    let mut stderr = client.child.stderr.take().expect("it is piped");
    stderr.read_to_string(&mut text).expect("a pipe");
    text
}

pub(crate) fn path_text(agent: &GuestAgent) -> &str {
    agent.path().to_str().expect("a path of the test")
}
