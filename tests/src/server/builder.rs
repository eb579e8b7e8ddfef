//! How a server is started.

use std::env;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use tempfile::TempDir;

use super::{Server, binary, binary_with_test_hooks, temporary_directory};
use crate::base::{self, Below};
use crate::process::{self, Output};
use crate::tools;

/// Says how to start a server.
#[derive(Debug)]
pub struct Builder {
    // Ended before its directory goes.
    pub(super) below: Vec<(String, Below)>,
    pub(super) directory: TempDir,
    pub(super) run_directory: PathBuf,
    pub(super) binary: PathBuf,
    pub(super) disks: Vec<String>,
    pub(super) args: Vec<String>,
    pub(super) default_reserve: bool,
    pub(super) env: Vec<(String, String)>,
}

impl Builder {
    pub(super) fn new() -> Self {
        let directory = temporary_directory();
        Self {
            below: Vec::new(),
            run_directory: directory.path().join("run"),
            directory,
            binary: binary(),
            disks: Vec::new(),
            args: Vec::new(),
            default_reserve: false,
            env: Vec::new(),
        }
    }

    /// Adds a disk on a new sparse image of this size.
    #[must_use]
    pub fn disk(self, name: &str, size: u64) -> Self {
        let path = self.path(&format!("{name}.raw"));
        tools::sparse_file(&path, size);
        self.disk_at(name, &path)
    }

    /// Adds a disk on an image that is there.
    #[must_use]
    pub fn disk_at(self, name: &str, path: &Path) -> Self {
        let cache = asked_for("STILLPOINT_TEST_CACHE");
        let cache = cache.map_or_else(String::new, |cache| format!(",cache={cache}"));
        self.disk_with(name, path, &cache)
    }

    /// Adds a disk on an image that is there, with options such as `,granularity=4k`.
    #[must_use]
    pub fn disk_with(mut self, name: &str, path: &Path, options: &str) -> Self {
        let (disk, below) = base::disk_on(name, path, options);
        self.below
            .extend(below.map(|below| (name.to_owned(), below)));
        self.disk_as(&disk)
    }

    /// Adds a disk as `--disk` takes it.
    #[must_use]
    pub fn disk_as(mut self, disk: &str) -> Self {
        self.disks.push(disk.to_owned());
        self
    }

    /// Takes this run directory instead of one of its own.
    #[must_use]
    pub fn run_directory(mut self, path: &Path) -> Self {
        self.run_directory = path.to_path_buf();
        self
    }

    /// Adds an argument of `serve`.
    #[must_use]
    pub fn arg(mut self, arg: &str) -> Self {
        self.args.push(arg.to_owned());
        self
    }

    /// Leaves `--scratch-reserve` at its default.
    ///
    /// A server is otherwise told to reserve nothing: what else lies on the machine's disk is
    /// not to decide whether a test can begin a backup.
    #[must_use]
    pub fn default_reserve(mut self) -> Self {
        self.default_reserve = true;
        self
    }

    /// Sets an environment variable of the server.
    #[must_use]
    pub fn env(mut self, name: &str, value: &str) -> Self {
        self.env.push((name.to_owned(), value.to_owned()));
        self
    }

    /// Takes the binary that has the hooks for tests.
    #[must_use]
    pub fn test_hooks(mut self) -> Self {
        self.binary = binary_with_test_hooks();
        self
    }

    /// A path in the directory of this server.
    pub fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    /// Starts the server and returns when it says that it is ready.
    #[track_caller]
    pub fn start(self) -> Server {
        Server::started(self)
    }

    /// Runs a server that is expected to fail at the start.
    pub fn start_and_fail(&self) -> Output {
        // One that starts after all would go on for ever.
        process::run_at_most(&mut self.command(), Duration::from_secs(20))
    }

    /// The command that starts the server.
    pub fn command(&self) -> Command {
        let mut command = Command::new(&self.binary);
        command
            .arg("serve")
            .arg("--run-dir")
            .arg(&self.run_directory);
        command.args(self.disks.iter().map(|disk| format!("--disk={disk}")));
        command.args(&self.args);
        let is_given = |option| self.args.iter().any(|arg| arg.starts_with(option));
        if !is_given("--scratch-reserve") && !self.default_reserve {
            command.arg("--scratch-reserve=0");
        }
        if let Some(engine) = asked_for("STILLPOINT_TEST_ENGINE")
            && !is_given("--io-engine")
        {
            command.arg(format!("--io-engine={engine}"));
        }
        command.envs(self.env.iter().map(|(name, value)| (name, value)));
        command
    }
}

/// What all servers of a run are to have that a test does not care about.
fn asked_for(variable: &str) -> Option<String> {
    env::var(variable).ok().filter(|value| !value.is_empty())
}
