//! File systems that are full soon. They need root, or a `sudo` that asks for nothing.

use std::path::Path;
use std::process::Command;

use tempfile::TempDir;

use crate::LoopDevice;
use crate::process::{Output, run};
use crate::server::temporary_directory;
use crate::tools::{path, sparse_file, tool};

/// A file system of its own, unmounted when dropped.
#[derive(Debug)]
pub struct Mount {
    directory: TempDir,
    /// What it is on, if it is on something.
    _device: Option<(LoopDevice, TempDir)>,
}

impl Mount {
    /// A file system in memory, of this size.
    #[track_caller]
    pub fn tmpfs(size: u64) -> Self {
        let options = format!("size={size},mode=0777");
        Self::new(&["-t", "tmpfs", "-o", &options, "tmpfs"], None)
    }

    /// A file system on a loop device, of this size.
    #[track_caller]
    pub fn ext4(size: u64) -> Self {
        let directory = temporary_directory();
        let image = directory.path().join("ext4");
        sparse_file(&image, size);
        let owner = format!(
            "root_owner={}:{}",
            rustix::process::geteuid(),
            rustix::process::getegid()
        );
        tool("mkfs.ext4", &["-q", "-E", &owner, path(&image)]).ok();
        let device = LoopDevice::new(&image);
        let name = path(device.path()).to_owned();
        Self::new(&[&name], Some((device, directory)))
    }

    #[track_caller]
    fn new(source: &[&str], device: Option<(LoopDevice, TempDir)>) -> Self {
        let directory = temporary_directory();
        let output = as_root("mount", &[source, &[path(directory.path())]].concat());
        let hint = "tests of full file systems need root, or `sudo -n mount`";
        assert_eq!(output.code(), 0, "{hint}\n{output}");
        Self {
            directory,
            _device: device,
        }
    }

    /// Where it is mounted.
    pub fn path(&self) -> &Path {
        self.directory.path()
    }

    /// Lets everyone who changes something there wait, until what is returned is dropped.
    #[track_caller]
    pub fn freeze(&self) -> Frozen<'_> {
        as_root("fsfreeze", &["--freeze", path(self.path())]).ok();
        Frozen(self)
    }
}

/// A file system on which nothing changes, thawed when dropped.
#[derive(Debug)]
pub struct Frozen<'a>(&'a Mount);

impl Drop for Frozen<'_> {
    fn drop(&mut self) {
        let output = as_root("fsfreeze", &["--unfreeze", path(self.0.path())]);
        if output.code() != 0 {
            eprintln!("{output}");
        }
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        let output = as_root("umount", &[path(self.directory.path())]);
        if output.code() != 0 {
            eprintln!("{output}");
        }
    }
}

/// Runs a tool that only root may.
pub(crate) fn as_root(name: &str, args: &[&str]) -> Output {
    if rustix::process::geteuid().is_root() {
        run(Command::new(name).args(args))
    } else {
        run(Command::new("sudo").args(["-n", name]).args(args))
    }
}
