//! A folder that is pulled into, and what others make of it.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::Value;
use stillpoint_tests::Server;
use stillpoint_tests::killer::killing;
use stillpoint_tests::process::{Output, run};
use stillpoint_tests::server::temporary_directory;
use stillpoint_tests::tools::{convert_to_raw, path, tool};
use tempfile::TempDir;

/// A folder of backups, of a test's own.
pub(crate) struct Folder {
    directory: TempDir,
    path: PathBuf,
}

/// What a pull said in JSON lines.
#[derive(Debug)]
pub(crate) struct Pulled {
    /// All of it.
    pub(crate) output: Output,
    /// The objects in order.
    pub(crate) lines: Vec<Value>,
}

impl Folder {
    /// One that is not there yet.
    pub(crate) fn new() -> Self {
        let directory = temporary_directory();
        let path = directory.path().join("backups");
        Self { directory, path }
    }

    /// One at a place of the caller's.
    pub(crate) fn at(path: &Path) -> Self {
        Self {
            directory: temporary_directory(),
            path: path.to_owned(),
        }
    }

    /// Where it is.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// A pull into it.
    pub(crate) fn command(&self, server: &Server, args: &[&str]) -> Command {
        let args = [&["pull", "--to", path(&self.path), "--json"], args].concat();
        server.cli_command(&args)
    }

    /// Pulls, whatever comes of it.
    pub(crate) fn pull(&self, server: &Server, args: &[&str]) -> Pulled {
        Pulled::from(run(&mut self.command(server, args)))
    }

    /// Pulls, and is killed when all is copied and verified and nothing published.
    #[track_caller]
    pub(crate) fn pull_up_to_publishing(&self, server: &Server) {
        self.pull_killed_at(server, "renameat2", 1);
    }

    /// Pulls, and is killed at the `n`th of these system calls.
    #[track_caller]
    pub(crate) fn pull_killed_at(&self, server: &Server, calls: &str, n: usize) {
        self.pull_with_killed_at(server, &[], calls, n);
    }

    /// The same, with arguments.
    #[track_caller]
    pub(crate) fn pull_with_killed_at(
        &self,
        server: &Server,
        args: &[&str],
        calls: &str,
        n: usize,
    ) {
        let pull = self.command(server, args);
        let mut killed = killing(calls, n);
        killed.arg(pull.get_program()).args(pull.get_args());
        run(&mut killed).exits(137);
    }

    /// Pulls as a person does, and fails.
    #[track_caller]
    pub(crate) fn fails(&self, server: &Server, args: &[&str], code: i32, saying: &str) -> Output {
        let args = [&["pull", "--to", path(&self.path)], args].concat();
        let output = server.cli(&args);
        output.exits(code);
        assert!(
            output.stderr.contains(saying),
            "nothing of {saying:?}\n{output}"
        );
        assert!(
            output.stderr.contains("stillpoint: error: pull: "),
            "{output}"
        );
        output
    }

    /// The numbers of the points in it, ascending.
    pub(crate) fn points(&self) -> Vec<u64> {
        let entries = fs::read_dir(&self.path).expect("a folder");
        let names = entries.map(|entry| entry.expect("an entry").file_name());
        let mut points: Vec<u64> = names
            .filter_map(|name| name.to_str()?.parse().ok())
            .collect();
        points.sort_unstable();
        points
    }

    /// Whether something half done lies in it.
    pub(crate) fn has_draft(&self) -> bool {
        let entries = fs::read_dir(&self.path).expect("a folder");
        let mut names = entries.map(|entry| entry.expect("an entry").file_name());
        names.any(|name| name.to_string_lossy().contains("partial"))
    }

    /// The manifest of a point.
    #[track_caller]
    pub(crate) fn manifest(&self, point: u64) -> Value {
        let path = self.path.join(point.to_string()).join("manifest.json");
        let text = fs::read_to_string(&path).expect("a manifest");
        serde_json::from_str(&text).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
    }

    /// The file of a disk in a point.
    pub(crate) fn file(&self, point: u64, disk: &str) -> PathBuf {
        self.path
            .join(point.to_string())
            .join(format!("{disk}.qcow2"))
    }

    /// What a disk holds in a point, by `qemu-img`, which finds nothing wrong with its file.
    #[track_caller]
    pub(crate) fn restored(&self, point: u64, disk: &str) -> Vec<u8> {
        let file = self.file(point, disk);
        tool("qemu-img", &["check", "-q", "-f", "qcow2", path(&file)]).ok();
        let raw = self.directory.path().join("restored.raw");
        convert_to_raw(&file, &raw);
        fs::read(&raw).expect("what has just been written")
    }

    /// The same by `stillpoint restore`.
    #[track_caller]
    pub(crate) fn restored_by_us(&self, server: &Server, point: u64, disk: &str) -> Vec<u8> {
        let raw = self.directory.path().join("restored-by-us.raw");
        // It writes over nothing.
        let _ = fs::remove_file(&raw);
        let (point, raw_path) = (point.to_string(), path(&raw));
        let args = ["restore", path(&self.path), "--at", &point, "--disk", disk];
        let args = [&args[..], &["--output", raw_path]].concat();
        server.cli(&args).ok();
        fs::read(&raw).expect("what has just been written")
    }

    /// Sees that a disk in a point is these bytes.
    #[track_caller]
    pub(crate) fn holds(&self, point: u64, disk: &str, expected: &[u8], what: &str) {
        let found = self.restored(point, disk);
        assert_eq!(
            found.len(),
            expected.len(),
            "{what}: size of {disk} in point {point}"
        );
        let differs = found
            .iter()
            .zip(expected)
            .position(|(found, expected)| found != expected);
        assert_eq!(
            differs, None,
            "{what}: {disk} in point {point} differs there"
        );
    }
}

impl Pulled {
    /// Of a pull that has ended.
    #[track_caller]
    pub(crate) fn from(output: Output) -> Self {
        let lines = output.stdout.lines().map(|line| {
            serde_json::from_str(line)
                .unwrap_or_else(|error| panic!("{error} in {line:?}\n{output}"))
        });
        Self {
            lines: lines.collect(),
            output,
        }
    }

    /// What came of it, if it ended with this exit code.
    #[track_caller]
    pub(crate) fn result(&self, code: i32) -> &Value {
        self.output.exits(code);
        let last = self
            .lines
            .last()
            .unwrap_or_else(|| panic!("nothing\n{}", self.output));
        assert_eq!(last["event"], "result", "{}", self.output);
        last
    }

    /// The same, if it succeeded, of one disk.
    #[track_caller]
    pub(crate) fn disk(&self, code: i32, disk: &str) -> Value {
        let disks = &self.result(code)["disks"];
        let found = stillpoint_tests::server::named(disks, "disks", "disk", disk);
        found.unwrap_or_else(|| panic!("no disk {disk}\n{}", self.output))
    }

    /// The code and the words of its error, if it failed with this exit code.
    #[track_caller]
    pub(crate) fn error(&self, code: i32) -> (String, String) {
        self.output.exits(code);
        let last = self
            .lines
            .last()
            .unwrap_or_else(|| panic!("nothing\n{}", self.output));
        let text = |key: &str| last["error"][key].as_str().map(str::to_owned);
        let both = text("code").zip(text("message"));
        both.unwrap_or_else(|| panic!("no error\n{}", self.output))
    }
}
