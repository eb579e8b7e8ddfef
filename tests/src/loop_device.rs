//! Loop devices. They need root, or a `sudo` that asks for nothing.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Instant;

use crate::mount::as_root;
use crate::process::PATIENCE;
use crate::tools::path;

/// A loop device that is detached when dropped.
#[derive(Debug)]
pub struct LoopDevice {
    device: PathBuf,
}

impl LoopDevice {
    /// Attaches a device to a file.
    #[track_caller]
    pub fn new(file: &Path) -> Self {
        Self::with_sectors(file, 512)
    }

    /// The same, with sectors of this size.
    #[track_caller]
    pub fn with_sectors(file: &Path, bytes: u64) -> Self {
        let sectors = format!("--sector-size={bytes}");
        let output = as_root("losetup", &["--find", "--show", &sectors, path(file)]);
        let hint = "tests of block devices need root, or `sudo -n losetup`";
        assert_eq!(output.code(), 0, "{hint}\n{output}");
        Self {
            device: output.stdout.trim().into(),
        }
    }

    /// Takes over the size that the file has by now.
    #[track_caller]
    pub fn update_size(&self) {
        as_root("losetup", &["--set-capacity", path(&self.device)]).ok();
    }

    /// Returns when the device is in the middle of writes, or of none.
    #[track_caller]
    pub fn wait_until_writing(&self, writing: bool) {
        let name = self.device.file_name().expect("a device");
        let file = format!("/sys/block/{}/inflight", name.display());
        let begun = Instant::now();
        loop {
            // How many reads, and how many writes.
            let told = fs::read_to_string(&file).expect("the device is there");
            let writes: u32 = told.split_whitespace().nth(1).unwrap().parse().unwrap();
            if (writes > 0) == writing {
                return;
            }
            assert!(begun.elapsed() < PATIENCE, "{writes} writes in flight");
            std::thread::yield_now();
        }
    }

    /// The device.
    pub fn path(&self) -> &Path {
        &self.device
    }
}

impl Drop for LoopDevice {
    fn drop(&mut self) {
        let output = as_root("losetup", &["--detach", path(&self.device)]);
        if output.code() != 0 {
            eprintln!("{output}");
        }
    }
}
