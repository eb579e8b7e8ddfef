//! File systems that are full soon, or fail otherwise. They need root, or a `sudo` that asks for nothing.

use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
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
    device: Option<(LoopDevice, TempDir)>,
}

impl Mount {
    /// A file system in memory, of this size.
    #[track_caller]
    pub fn tmpfs(size: u64) -> Self {
        let options = format!("size={size},mode=0777");
        Self::new(&["-t", "tmpfs", "-o", &options, "tmpfs"], None)
    }

    /// A file system in memory that does no direct I/O.
    #[track_caller]
    pub fn ramfs() -> Self {
        Self::new(&["-t", "ramfs", "ramfs"], None)
    }

    /// A file system on a loop device, of this size.
    #[track_caller]
    pub fn ext4(size: u64) -> Self {
        Self::ext4_on_sectors(size, 512)
    }

    /// The same on a device with sectors of this size.
    #[track_caller]
    pub fn ext4_on_sectors(size: u64, sector: u64) -> Self {
        let directory = temporary_directory();
        let image = directory.path().join("ext4");
        sparse_file(&image, size);
        let owner = format!(
            "root_owner={}:{}",
            rustix::process::geteuid(),
            rustix::process::getegid()
        );
        let mut options = vec!["-q", "-E", &owner];
        // Of which a block must be at least one; else the size decides.
        if sector > 1024 {
            options.extend(["-b", "4096"]);
        }
        options.push(path(&image));
        tool("mkfs.ext4", &options).ok();
        let device = LoopDevice::with_sectors(&image, sector);
        let name = path(device.path()).to_owned();
        Self::new(&[&name], Some((device, directory)))
    }

    #[track_caller]
    fn new(source: &[&str], device: Option<(LoopDevice, TempDir)>) -> Self {
        let directory = temporary_directory();
        let output = as_root("mount", &[source, &[path(directory.path())]].concat());
        let hint = "tests of full file systems need root, or `sudo -n mount`";
        assert_eq!(output.code(), 0, "{hint}\n{output}");
        Self { directory, device }
    }

    /// Makes an ext4 find an error in itself, after which it can only be read.
    #[track_caller]
    pub fn fail(&self) {
        let (device, _) = self.device.as_ref().expect("it is on a device");
        let options = "remount,errors=remount-ro";
        as_root("mount", &["-o", options, path(self.directory.path())]).ok();
        let name = device.path().file_name().expect("a device");
        let trigger = format!("/sys/fs/ext4/{}/trigger_fs_error", name.display());
        as_root("sh", &["-c", &format!("echo test > {trigger}")]).ok();
    }

    /// Where it is mounted.
    pub fn path(&self) -> &Path {
        self.directory.path()
    }

    /// Shuts an ext4 down, as a failure of its device would: what it has not written is lost. Then
    /// unmounts it and mounts it again.
    #[track_caller]
    pub fn lose_power(&self) {
        let (device, _) = self.device.as_ref().expect("it is on a device");
        // EXT4_IOC_SHUTDOWN, without flushing the journal.
        let program = "import fcntl, os, struct, sys\n\
                       folder = os.open(sys.argv[1], os.O_RDONLY)\n\
                       fcntl.ioctl(folder, 0x8004587d, struct.pack('I', 2))";
        as_root("/usr/bin/python3", &["-c", program, path(self.path())]).ok();
        as_root("umount", &[path(self.path())]).ok();
        as_root("mount", &[path(device.path()), path(self.path())]).ok();
    }

    /// Unmounts it, which nobody may be in the way of, and mounts it again.
    #[track_caller]
    pub fn again(&self) {
        let (device, _) = self.device.as_ref().expect("it is on a device");
        as_root("umount", &[path(self.path())]).ok();
        as_root("mount", &[path(device.path()), path(self.path())]).ok();
    }

    /// Takes all the space that is left, until what is returned is dropped.
    #[track_caller]
    pub fn fill(&self) -> Filler {
        let filler = Filler(self.path().join("filler"));
        let mut file = File::create(&filler.0).expect("a file there");
        // By ever smaller pieces, to the last block.
        for size in [1 << 20, 4096, 512] {
            while file.write_all(&vec![1; size]).is_ok() {}
        }
        file.sync_all().expect("what was written is there");
        filler
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

/// What fills a file system, removed when dropped.
#[derive(Debug)]
pub struct Filler(PathBuf);

impl Filler {
    /// Gives the space back at once. A program that another test is just starting may have the file open
    /// still, and then its removal would not; nor can a journal use again what it has not written yet.
    fn empty(&self) -> io::Result<()> {
        let file = File::options().write(true).open(&self.0)?;
        file.set_len(0)?;
        file.sync_all()
    }
}

impl Drop for Filler {
    fn drop(&mut self) {
        if let Err(error) = self.empty().and_then(|()| fs::remove_file(&self.0)) {
            eprintln!("{}: {error}", self.0.display());
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_filled_is_free_again_whoever_has_the_file_open() {
        const MIB: u64 = 1 << 20;
        for mount in [Mount::tmpfs(4 * MIB), Mount::ext4(16 * MIB)] {
            let filler = mount.fill();
            let _open = File::open(&filler.0).expect("it is there");
            let write = || {
                let mut file = File::create(mount.path().join("file"))?;
                file.write_all(&vec![1; 2 << 20])?;
                file.sync_all()
            };
            assert!(write().is_err());
            drop(filler);
            write().expect("there is room");
        }
    }
}
