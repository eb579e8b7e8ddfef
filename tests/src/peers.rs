//! Other people's servers, each on a socket of its own.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Command;

use tempfile::TempDir;

use crate::process::{EndedOnDrop, KilledOnDrop};
use crate::tools::{path, tool};

/// A server of somebody else's; it ends when this is dropped.
#[derive(Debug)]
pub struct OtherServer {
    // Ended before its directory goes.
    _process: Process,
    directory: TempDir,
}

#[derive(Debug)]
#[expect(dead_code, reason = "held, so that it ends with what holds it")]
enum Process {
    Child(KilledOnDrop),
    Daemon(EndedOnDrop),
}

impl OtherServer {
    /// Starts `nbdkit`, and returns when it listens.
    #[track_caller]
    pub fn nbdkit(args: &[&str]) -> Self {
        let directory = crate::server::temporary_directory();
        let (socket, ready) = (
            directory.path().join("socket"),
            directory.path().join("ready"),
        );
        // nbdkit writes its process id once it listens: to a pipe here, which is how we wait for it.
        tool("mkfifo", &[path(&ready)]).ok();
        let mut command = Command::new("nbdkit");
        command
            .args([
                "--foreground",
                "--unix",
                path(&socket),
                "--pidfile",
                path(&ready),
            ])
            .args(args);
        let mut nbdkit = KilledOnDrop::spawn(&mut command);
        // Opened for both, it does not wait for the writer; the wait is the one below.
        let pipe = File::options()
            .read(true)
            .write(true)
            .open(&ready)
            .expect("our own pipe");
        nbdkit.wait_until_readable(&pipe);
        Self {
            _process: Process::Child(nbdkit),
            directory,
        }
    }

    /// Starts `qemu-nbd`, and returns when it listens.
    #[track_caller]
    pub fn qemu_nbd(args: &[&str]) -> Self {
        let directory = crate::server::temporary_directory();
        let (socket, pid) = (
            directory.path().join("socket"),
            directory.path().join("pid"),
        );
        let options = [
            "--fork",
            "--persistent",
            "--socket",
            path(&socket),
            "--pid-file",
            path(&pid),
        ];
        // It forks once it listens.
        tool("qemu-nbd", &[&options, args].concat()).ok();
        let pid = fs::read_to_string(&pid).expect("a process id");
        let daemon = EndedOnDrop(pid.trim().parse().expect("a process id"));
        Self {
            _process: Process::Daemon(daemon),
            directory,
        }
    }

    /// Where it serves.
    pub fn socket(&self) -> PathBuf {
        self.directory.path().join("socket")
    }
}

/// Runs something while `nbdkit` serves on a socket of its own.
#[track_caller]
pub fn with_nbdkit<T>(args: &[&str], then: impl FnOnce(&Path) -> T) -> T {
    let nbdkit = OtherServer::nbdkit(args);
    then(&nbdkit.socket())
}

/// Runs something while `qemu-nbd` serves on a socket of its own.
#[track_caller]
pub fn with_qemu_nbd<T>(args: &[&str], then: impl FnOnce(&Path) -> T) -> T {
    let qemu_nbd = OtherServer::qemu_nbd(args);
    then(&qemu_nbd.socket())
}
