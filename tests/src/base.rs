//! Images that are not files of ours: block devices, and what another NBD server has.

use std::fs::{self, File};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Command;

use rustix::process::Signal;
use tempfile::TempDir;

use crate::loop_device::LoopDevice;
use crate::process::{self, KilledOnDrop};
use crate::tools::{path, tool};

/// An NBD server on a socket of its own, which can be killed and started again.
#[derive(Debug)]
pub struct NbdBase {
    process: Option<KilledOnDrop>,
    program: Program,
    args: Vec<String>,
    directory: TempDir,
}

#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Program {
    Nbdkit,
    QemuNbd,
}

impl NbdBase {
    /// `nbdkit` with these arguments.
    #[track_caller]
    pub fn nbdkit(args: &[&str]) -> Self {
        Self::new(Program::Nbdkit, args)
    }

    /// `qemu-nbd` with these arguments.
    #[track_caller]
    pub fn qemu_nbd(args: &[&str]) -> Self {
        Self::new(Program::QemuNbd, args)
    }

    /// `nbdkit` on this file.
    #[track_caller]
    pub fn file(file: &Path) -> Self {
        Self::nbdkit(&["file", path(file)])
    }

    /// `nbdkit` on this file, for clients that go with requests under way: it performs what it was sent before it
    /// finds that nobody is there any more. With several threads for a connection, the one that finds that has the
    /// others refuse what they have just read, and before 1.34 it ends itself if one of them has an answer then.
    #[track_caller]
    pub fn one_after_the_other(file: &Path) -> Self {
        Self::nbdkit(&["--threads=1", "file", path(file)])
    }

    #[track_caller]
    fn new(program: Program, args: &[&str]) -> Self {
        let mut base = Self {
            process: None,
            program,
            args: args.iter().map(|&arg| arg.to_owned()).collect(),
            directory: crate::server::temporary_directory(),
        };
        base.start();
        base
    }

    /// Starts it, with other arguments if there are any, and returns when it listens.
    #[track_caller]
    pub fn start_with(&mut self, args: &[&str]) {
        self.args = args.iter().map(|&arg| arg.to_owned()).collect();
        self.start();
    }

    /// Starts it again, and returns when it listens.
    #[track_caller]
    pub fn start(&mut self) {
        assert!(self.process.is_none(), "the base runs already");
        let socket = self.socket();
        let _ = fs::remove_file(&socket);
        self.process = Some(match self.program {
            Program::Nbdkit => self.start_nbdkit(&socket),
            Program::QemuNbd => self.start_qemu_nbd(&socket),
        });
    }

    #[track_caller]
    fn start_nbdkit(&self, socket: &Path) -> KilledOnDrop {
        let ready = self.directory.path().join("ready");
        let _ = fs::remove_file(&ready);
        // Its process id is written there once it listens, which is how we wait for it.
        tool("mkfifo", &[path(&ready)]).ok();
        let mut command = Command::new("nbdkit");
        command
            .args(["--foreground", "--unix", path(socket)])
            .args(["--pidfile", path(&ready)])
            .args(&self.args);
        let mut child = KilledOnDrop::spawn(&mut command);
        // Opened for both, it does not wait for the writer; the wait is the one below.
        let mut options = File::options();
        let pipe = options.read(true).write(true).open(&ready);
        child.wait_until_readable(&pipe.expect("our own pipe"));
        child
    }

    /// It takes no pipe for its process id, so that it is asked itself.
    #[track_caller]
    fn start_qemu_nbd(&self, socket: &Path) -> KilledOnDrop {
        let mut command = Command::new("qemu-nbd");
        command
            .args(["--persistent", "--shared=8", "-k", path(socket)])
            .args(&self.args);
        let mut child = KilledOnDrop::spawn(&mut command);
        while UnixStream::connect(socket).is_err() {
            let ended = child.child.try_wait().expect("it is our child");
            assert!(ended.is_none(), "qemu-nbd ended before it was ready");
            std::thread::yield_now();
        }
        child
    }

    /// Kills it, and returns when it is gone.
    #[track_caller]
    pub fn kill(&mut self) {
        let mut process = self.process.take().expect("the base runs");
        process::signal(&process.child, Signal::KILL);
        process::wait(&mut process.child).expect("a killed process ends");
    }

    /// Stops it where it is, or lets it go on.
    #[track_caller]
    pub fn signal(&self, signal: Signal) {
        process::signal(&self.process.as_ref().expect("the base runs").child, signal);
    }

    /// Where it serves.
    pub fn socket(&self) -> PathBuf {
        self.directory.path().join("socket")
    }

    /// What `--disk` takes.
    pub fn uri(&self) -> String {
        crate::server::uri(&self.socket(), "")
    }
}

/// What lies below a disk of a test that does not care.
#[derive(Debug)]
pub(crate) enum Below {
    Nbd(#[expect(dead_code, reason = "held, so that it ends with what holds it")] NbdBase),
    Loop(LoopDevice),
}

impl Below {
    /// Where the bytes of a device are seen as they are: not in the file, before a sync.
    pub(crate) fn device(&self) -> Option<&Path> {
        match self {
            Self::Nbd(_) => None,
            Self::Loop(device) => Some(device.path()),
        }
    }
}

/// The value of `--disk` for the image at `image`, on what `STILLPOINT_TEST_BASE` asks for: `raw`,
/// `block` or `nbd`.
pub(crate) fn disk_on(name: &str, image: &Path, options: &str) -> (String, Option<Below>) {
    // Where that of a file is.
    let state = || format!("{}.stillpoint", image.display());
    match std::env::var("STILLPOINT_TEST_BASE").as_deref() {
        Err(_) | Ok("" | "raw") => (format!("{name}={}{options}", image.display()), None),
        Ok("block") => {
            let device = LoopDevice::new(image);
            let disk = format!("{name}={},state={}{options}", path(device.path()), state());
            (disk, Some(Below::Loop(device)))
        }
        Ok("nbd") => {
            let base = NbdBase::one_after_the_other(image);
            let disk = format!("{name}={},state={}{options}", base.uri(), state());
            (disk, Some(Below::Nbd(base)))
        }
        Ok(other) => panic!("STILLPOINT_TEST_BASE is raw, block or nbd, not {other}"),
    }
}

/// Whether what lies below disks knows holes: a block device is data throughout.
pub fn knows_holes() -> bool {
    std::env::var("STILLPOINT_TEST_BASE").map_or(true, |base| base != "block")
}

/// Whether disks lie on another NBD server, of which less is known after a kill.
pub fn is_elsewhere() -> bool {
    std::env::var("STILLPOINT_TEST_BASE").is_ok_and(|base| base == "nbd")
}
