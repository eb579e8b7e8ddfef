//! Making images with QEMU's tools, changing their bytes, and reading them with ours.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use block::qcow2::{OpenError, Qcow2Image};
use block::{Engine, Storage};
use rand::Rng as _;
use stillpoint_tests::seeds::Rng;
use stillpoint_tests::tools::{path, tool};
use tempfile::TempDir;
use tokio::runtime::Builder;

/// A folder with images.
pub(crate) struct Images(pub(crate) TempDir);

impl Images {
    pub(crate) fn new() -> Self {
        Self(stillpoint_tests::server::temporary_directory())
    }

    pub(crate) fn at(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    /// Makes an image of `size` with these options, as after `-o`; perhaps on another.
    #[track_caller]
    pub(crate) fn create(&self, name: &str, options: &str, backing: &[&str], size: u64) -> PathBuf {
        let (image, size) = (self.at(name), size.to_string());
        let mut args = vec!["create", "-q", "-f", "qcow2"];
        if !options.is_empty() {
            args.extend(["-o", options]);
        }
        if let [file, format] = backing {
            args.extend(["-b", file, "-F", format]);
        }
        args.extend([path(&image), &size]);
        tool("qemu-img", &args).ok();
        image
    }

    /// What `qemu-img convert` says is in an image.
    #[track_caller]
    pub(crate) fn converted(&self, image: &Path, format: &str) -> Vec<u8> {
        let raw = self.at("converted");
        tool(
            "qemu-img",
            &[
                "convert",
                "-f",
                format,
                "-O",
                "raw",
                path(image),
                path(&raw),
            ],
        )
        .ok();
        fs::read(raw).expect("what was converted")
    }
}

/// Runs commands of `qemu-io` on an image.
#[track_caller]
pub(crate) fn qemu_io(image: &Path, format: &str, commands: &[String]) {
    let mut args = vec!["-f", format];
    for command in commands {
        args.extend(["-c", command]);
    }
    args.push(path(image));
    let output = tool("qemu-io", &args);
    let complaints = ["error", "failed"];
    assert!(
        !complaints.iter().any(|word| output.ok().contains(word)),
        "{output}"
    );
}

/// Commands for a guest that does as it likes with the first `size` bytes of a disk.
pub(crate) fn history(rng: &mut Rng, size: u64, cluster: u64, compressed: bool) -> Vec<String> {
    // QEMU compresses only into clusters that are not there yet: so that comes first.
    let some: BTreeSet<u64> = (0..6)
        .map(|_| rng.random_range(0..size / cluster))
        .collect();
    let some = some
        .into_iter()
        .filter(|_| compressed)
        .map(|at| at * cluster);
    let packed = some.map(|offset| format!("write -c -P {} {offset} {cluster}", 1 + offset % 255));
    let mut commands: Vec<_> = packed.collect();
    commands.extend((0..24).map(|_| {
        let longest = (4 * cluster).min(size / 2);
        let length = rng.random_range(1..=longest / 512) * 512;
        let offset = rng.random_range(0..=(size - length) / 512) * 512;
        match rng.random_range(0..8) {
            0..4 => {
                let pattern = rng.random_range(1..256);
                format!("write -P {pattern} {offset} {length}")
            }
            4 => format!("write -z {offset} {length}"),
            5 => format!("write -z -u {offset} {length}"),
            6 => format!("discard {offset} {length}"),
            _ => format!("write -P {} {offset} 512", rng.random_range(1..256)),
        }
    }));
    commands
}

/// What becomes of a future of ours.
pub(crate) fn block_on<T>(future: impl Future<Output = T>) -> T {
    let runtime = Builder::new_current_thread().build().expect("a runtime");
    runtime.block_on(future)
}

pub(crate) fn try_open(image: &Path, allowed: &[&Path]) -> Result<Qcow2Image, OpenError> {
    let file = File::open(image).expect("an image");
    let allowed: Vec<_> = allowed.iter().map(|&path| path.to_owned()).collect();
    block_on(Qcow2Image::open(file, image, &allowed, Engine::Threads))
}

#[track_caller]
pub(crate) fn open(image: &Path) -> Qcow2Image {
    try_open(image, &[]).unwrap_or_else(|error| panic!("{error}"))
}

/// Why an image cannot be opened.
#[track_caller]
pub(crate) fn refusal(image: &Path) -> String {
    match try_open(image, &[]) {
        Ok(_) => panic!("{} was opened", image.display()),
        Err(error) => error.to_string(),
    }
}

pub(crate) fn read(image: &Qcow2Image, range: Range<u64>) -> std::io::Result<Vec<u8>> {
    let mut buffer = vec![0xee; (range.end - range.start) as usize];
    block_on(image.read(range.start, &mut buffer))?;
    Ok(buffer)
}

/// Puts these bytes into an image.
pub(crate) fn poke(image: &Path, offset: u64, bytes: &[u8]) {
    let file = File::options().write(true).open(image).expect("an image");
    file.write_all_at(bytes, offset).expect("written bytes");
}

/// A number in an image.
pub(crate) fn peek(image: &Path, offset: u64) -> u64 {
    let file = File::open(image).expect("an image");
    let mut bytes = [0; 8];
    file.read_exact_at(&mut bytes, offset).expect("eight bytes");
    u64::from_be_bytes(bytes)
}
