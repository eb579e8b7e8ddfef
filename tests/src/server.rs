//! The server under test, as a process with a directory of its own.

mod builder;

use std::env;
use std::fs::{self, File};
use std::os::fd::AsFd;
use std::os::unix::net::UnixDatagram;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus};
use std::time::{Duration, Instant};

use rustix::process::Signal;
use serde_json::Value;
use tempfile::TempDir;

pub use builder::Builder;

use crate::control::Qmp;
use crate::process::{self, Output, PATIENCE, Woken, run};
use crate::raw_nbd::RawNbd;

/// A server that runs; it is killed if the test ends without stopping it.
#[derive(Debug)]
pub struct Server {
    builder: Builder,
    child: Option<Child>,
}

impl Server {
    #[track_caller]
    fn started(builder: Builder) -> Self {
        let mut server = Self {
            builder,
            child: None,
        };
        server.start();
        server
    }

    /// A server to be, with an empty directory and no disks.
    pub fn builder() -> Builder {
        Builder::new()
    }

    /// A server with one empty disk, `vda`, of this size.
    #[track_caller]
    pub fn with_disk(size: u64) -> Self {
        Self::builder().disk("vda", size).start()
    }

    /// Starts the server again after a stop or a kill.
    #[track_caller]
    pub fn start(&mut self) {
        self.try_start().unwrap_or_else(|why| panic!("{why}"));
    }

    /// Starts the server again, or returns why it did not.
    #[track_caller]
    pub fn try_start(&mut self) -> Result<(), String> {
        assert!(self.child.is_none(), "the server runs already");
        let notify = self.path("notify");
        // Left from an earlier start.
        let _ = fs::remove_file(&notify);
        let socket = UnixDatagram::bind(&notify).expect("a socket in our own directory");
        let mut command = self.builder.command();
        command.env("NOTIFY_SOCKET", &notify);
        command.stdout(File::create(self.path("stdout")).expect("a file of our own"));
        command.stderr(File::create(self.path("stderr")).expect("a file of our own"));
        let line = process::line(&command);
        let child = command
            .spawn()
            .unwrap_or_else(|error| panic!("{line}: {error}"));
        let child = self.child.insert(child);
        loop {
            match process::readable_or_ended(Some(socket.as_fd()), child, PATIENCE) {
                Woken::Readable => {}
                other => {
                    let log = read(&self.path("stderr"));
                    self.child
                        .take()
                        .map(|mut child| (child.kill(), child.wait()));
                    return Err(format!("{other:?} before READY=1: {line}\n{log}"));
                }
            }
            let mut message = [0; 4096];
            let length = socket.recv(&mut message).expect("a datagram");
            if message[..length]
                .split(|byte| *byte == b'\n')
                .any(|line| line == b"READY=1")
            {
                return Ok(());
            }
        }
    }

    /// The command that starts the server.
    pub fn command(&self) -> Command {
        self.builder.command()
    }

    /// Starts a server that is expected to fail at it.
    pub fn start_and_fail(&self) -> Output {
        assert!(self.child.is_none(), "the server runs already");
        self.builder.start_and_fail()
    }

    /// Asks the server to stop, and sees that it exits 0.
    #[track_caller]
    pub fn stop(&mut self) {
        self.signal(Signal::TERM);
        let status = self.wait();
        assert!(
            status.success(),
            "{status} after SIGTERM\n{}",
            self.stderr()
        );
    }

    /// Kills the server.
    #[track_caller]
    pub fn kill(&mut self) {
        self.signal(Signal::KILL);
        self.wait();
    }

    /// Starts the server and kills it after so long, whether or not it is ready by then.
    #[track_caller]
    pub fn start_and_kill(&mut self, after: Duration) {
        assert!(self.child.is_none(), "the server runs already");
        let mut command = self.builder.command();
        command.stdout(File::create(self.path("stdout")).expect("a file of our own"));
        command.stderr(File::create(self.path("stderr")).expect("a file of our own"));
        let child = command.spawn().expect("the server's binary");
        self.child = Some(child);
        assert!(
            !self.ends_within(after),
            "the server ended by itself\n{}",
            self.stderr()
        );
        self.kill();
    }

    /// Whether the server ends within this time.
    pub fn ends_within(&self, time: Duration) -> bool {
        let child = self.child.as_ref().expect("the server runs");
        process::readable_or_ended(None, child, time) == Woken::Ended
    }

    /// Sends the server a signal.
    #[track_caller]
    pub fn signal(&self, signal: Signal) {
        process::signal(self.child.as_ref().expect("the server runs"), signal);
    }

    /// Waits until the server has ended.
    #[track_caller]
    pub fn wait(&mut self) -> ExitStatus {
        let child = self.child.as_mut().expect("the server runs");
        let status = process::wait(child);
        let status = status.unwrap_or_else(|| panic!("the server goes on\n{}", self.stderr()));
        self.child = None;
        status
    }

    /// Sees that the server still runs and answers.
    #[track_caller]
    pub fn is_well(&self) {
        let output = self.cli(&["status", "--json"]);
        assert_eq!(
            output.code(),
            0,
            "the server is not well\n{output}\n{}",
            self.stderr()
        );
    }

    /// The process id of the server.
    pub fn pid(&self) -> u32 {
        self.child.as_ref().expect("the server runs").id()
    }

    /// What the server printed.
    pub fn stdout(&self) -> String {
        read(&self.path("stdout"))
    }

    /// What the server logged.
    pub fn stderr(&self) -> String {
        read(&self.path("stderr"))
    }

    /// Returns when this text is in the log so many times.
    #[track_caller]
    pub fn wait_for_log(&self, text: &str, times: usize) {
        let begun = Instant::now();
        while self.stderr().matches(text).count() < times {
            assert!(
                begun.elapsed() < PATIENCE,
                "{text:?} is not in the log {times} times\n{}",
                self.stderr()
            );
            std::thread::yield_now();
        }
    }

    /// The first TCP port among the URIs that the server printed for a role, `live` or `backups`.
    #[track_caller]
    pub fn port(&self, role: &str) -> u16 {
        let told = self.stdout();
        let uris = told
            .lines()
            .filter_map(|line| line.trim().strip_prefix(role));
        let mut ports = uris.filter_map(|uri| {
            let place = uri.trim().split_once("://")?.1.split_once('/')?.0;
            place.rsplit_once(':')?.1.parse().ok()
        });
        ports.next().unwrap_or_else(|| panic!("no port in {told}"))
    }

    /// A path in the directory of this server.
    pub fn path(&self, name: &str) -> PathBuf {
        self.builder.path(name)
    }

    /// The directory of this server.
    pub fn directory(&self) -> &Path {
        self.builder.directory.path()
    }

    /// The image of a disk made with [`Builder::disk`].
    pub fn image(&self, disk: &str) -> PathBuf {
        self.path(&format!("{disk}.raw"))
    }

    /// What the image of a disk holds, as others on this machine see it now.
    pub fn image_bytes(&self, disk: &str) -> Vec<u8> {
        let below = self.builder.below.iter().find(|below| below.0 == disk);
        let device = below.and_then(|(_, below)| below.device());
        let path = device.map_or_else(|| self.image(disk), Path::to_owned);
        fs::read(path).expect("an image")
    }

    /// The socket of the live exports.
    pub fn live(&self) -> PathBuf {
        self.builder.run_directory.join("live.sock")
    }

    /// The socket of the frozen exports.
    pub fn frozen(&self) -> PathBuf {
        self.builder.run_directory.join("backup.sock")
    }

    /// The control socket.
    pub fn control(&self) -> PathBuf {
        self.builder.run_directory.join("control.sock")
    }

    /// The URI of a live export.
    pub fn live_uri(&self, export: &str) -> String {
        uri(&self.live(), export)
    }

    /// The URI of a frozen export.
    pub fn frozen_uri(&self, export: &str) -> String {
        uri(&self.frozen(), export)
    }

    /// A connection to a live export.
    #[track_caller]
    pub fn open_live(&self, export: &str) -> RawNbd {
        RawNbd::open(&self.live(), export, &["base:allocation"])
    }

    /// A connection to a frozen export with these contexts.
    #[track_caller]
    pub fn open_frozen(&self, export: &str, contexts: &[&str]) -> RawNbd {
        RawNbd::open(&self.frozen(), export, contexts)
    }

    /// A connection to the control socket, past its greeting.
    #[track_caller]
    pub fn qmp(&self) -> Qmp {
        Qmp::connect(&self.control())
    }

    /// A client command for this server.
    pub fn cli_command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(&self.builder.binary);
        command
            .arg("--run-dir")
            .arg(&self.builder.run_directory)
            .args(args);
        command
    }

    /// Runs a client command.
    pub fn cli(&self, args: &[&str]) -> Output {
        run(&mut self.cli_command(args))
    }

    /// Runs a client command that succeeds, and returns its JSON.
    #[track_caller]
    pub fn cli_json(&self, args: &[&str]) -> Value {
        run(self.cli_command(args).arg("--json")).json()
    }

    /// Runs `backup begin` and returns its JSON.
    #[track_caller]
    pub fn begin(&self, id: &str, args: &[&str]) -> Value {
        let args = [&["backup", "begin", "--id", id][..], args].concat();
        self.cli_json(&args)
    }

    /// Creates a checkpoint.
    #[track_caller]
    pub fn checkpoint(&self, name: &str) {
        self.cli(&["checkpoint", "create", name]).ok();
    }

    /// Commits a backup.
    #[track_caller]
    pub fn commit(&self, id: &str) {
        self.cli(&["backup", "commit", id]).ok();
    }

    /// Aborts a backup.
    #[track_caller]
    pub fn abort(&self, id: &str) {
        self.cli(&["backup", "abort", id]).ok();
    }

    /// What `checkpoint list` says about a checkpoint on a disk.
    #[track_caller]
    pub fn dirty_bytes(&self, checkpoint: &str, disk: &str) -> u64 {
        let list = self.cli_json(&["checkpoint", "list"]);
        let found = named(&list, "checkpoints", "name", checkpoint)
            .unwrap_or_else(|| panic!("no checkpoint {checkpoint} in {list}"));
        let on_disk = named(&found, "disks", "disk", disk)
            .unwrap_or_else(|| panic!("checkpoint {checkpoint} is not on {disk}: {found}"));
        on_disk["dirty_bytes"]
            .as_u64()
            .unwrap_or_else(|| panic!("no dirty_bytes in {on_disk}"))
    }

    /// What `backup show` says about a backup.
    #[track_caller]
    pub fn backup(&self, id: &str) -> Value {
        let shown = self.cli_json(&["backup", "show", id]);
        named(&shown, "backups", "id", id).unwrap_or_else(|| panic!("no backup {id} in {shown}"))
    }

    /// The bytes that clients have read from a frozen export.
    #[track_caller]
    pub fn bytes_read(&self, id: &str, disk: &str, export: &str) -> u64 {
        let backup = self.backup(id);
        let on_disk = named(&backup, "disks", "disk", disk)
            .unwrap_or_else(|| panic!("backup {id} is not on {disk}: {backup}"));
        let export = named(&on_disk, "exports", "export", export)
            .unwrap_or_else(|| panic!("no export {export} in {on_disk}"));
        export["bytes_read"]
            .as_u64()
            .unwrap_or_else(|| panic!("no bytes_read in {export}"))
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        if let Some(mut child) = self.child.take() {
            // It may have ended by itself, which is as good here.
            let _ = child.kill();
            let _ = child.wait();
            if std::thread::panicking() {
                eprintln!("--- stderr of the server\n{}\n---", self.stderr());
            }
        }
    }
}

/// The member of a list, or of the list under a key, or the object itself, that has this name.
pub fn named(value: &Value, list: &str, key: &str, name: &str) -> Option<Value> {
    let members = value.as_array().or_else(|| value[list].as_array()).cloned();
    let members = members.unwrap_or_else(|| vec![value.clone()]);
    members.into_iter().find(|member| member[key] == name)
}

/// The names in a list, or in the list under a key.
pub fn names(value: &Value, list: &str, key: &str) -> Vec<String> {
    let members = value.as_array().or_else(|| value[list].as_array());
    let members = members.unwrap_or_else(|| panic!("no list of {list} in {value}"));
    members
        .iter()
        .map(|member| member[key].as_str().expect("a name").to_owned())
        .collect()
}

/// The URI of an export on a Unix socket.
pub fn uri(socket: &Path, export: &str) -> String {
    format!("nbd+unix:///{export}?socket={}", socket.display())
}

/// A directory that goes away with the test: on a real disk, where sockets have room for a name.
pub fn temporary_directory() -> TempDir {
    let parent = env::var_os("STILLPOINT_TEST_DIR").map_or("/var/tmp".into(), PathBuf::from);
    tempfile::Builder::new()
        .prefix("stillpoint-")
        .tempdir_in(parent)
        .expect("a new directory")
}

/// The server as it is shipped.
#[track_caller]
pub fn binary() -> PathBuf {
    let otherwise = build_directory().join("stillpoint");
    existing("STILLPOINT_BIN", otherwise, "cargo build -p stillpoint")
}

/// The server with the hooks for tests.
#[track_caller]
pub fn binary_with_test_hooks() -> PathBuf {
    let target = build_directory()
        .parent()
        .expect("a profile of a target")
        .join("test-hooks");
    let build = format!(
        "cargo build -p stillpoint --features test-hooks --target-dir {}",
        target.display()
    );
    existing(
        "STILLPOINT_BIN_TEST_HOOKS",
        target.join("debug/stillpoint"),
        &build,
    )
}

/// An example of `proto/`, built like these tests.
#[track_caller]
pub fn example(name: &str) -> PathBuf {
    let path = build_directory().join("examples").join(name);
    assert!(
        path.exists(),
        "{} is missing: run cargo build -p stillpoint-proto --features client --examples",
        path.display()
    );
    path
}

#[track_caller]
fn existing(variable: &str, otherwise: PathBuf, build: &str) -> PathBuf {
    let path = env::var_os(variable).map_or(otherwise, PathBuf::from);
    assert!(
        path.exists(),
        "{} is missing: run {build}, or scripts/test",
        path.display()
    );
    path
}

/// Where cargo puts binaries of the profile that this test was built with.
fn build_directory() -> PathBuf {
    let test = env::current_exe().expect("the path of this test");
    test.ancestors()
        .nth(2)
        .expect("tests are in deps/ of it")
        .to_path_buf()
}

fn read(path: &Path) -> String {
    fs::read(path)
        .map(|text| String::from_utf8_lossy(&text).into_owned())
        .unwrap_or_default()
}
