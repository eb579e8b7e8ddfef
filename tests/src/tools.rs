//! Other people's tools, and what they print.

use std::fs::{self, File};
use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::Value;
use sha2::{Digest, Sha256};

use crate::Extent;
pub use crate::peers::{with_nbdkit, with_qemu_nbd};
use crate::process::{Output, run};

/// Runs a tool with these arguments.
pub fn tool(name: &str, args: &[&str]) -> Output {
    run(Command::new(name).args(args))
}

/// The map of an export in one context, as `nbdinfo` has it.
#[track_caller]
pub fn nbdinfo_map(uri: &str, context: &str) -> Vec<Extent> {
    let map = tool("nbdinfo", &["--json", &format!("--map={context}"), uri]).json();
    let extents = map.as_array().expect("a list of extents").iter();
    extents
        .map(|e| {
            (
                number(e, "offset"),
                number(e, "length"),
                number(e, "type") as u32,
            )
        })
        .collect()
}

/// A dirty bitmap as `qemu-img map` has it with `x-dirty-bitmap`: dirty is what is not data.
#[track_caller]
pub fn qemu_img_dirty_map(socket: &Path, export: &str, context: &str) -> Vec<Extent> {
    let options = format!(
        "driver=nbd,server.type=unix,server.path={},export={},x-dirty-bitmap={}",
        comma_doubled(&socket.display().to_string()),
        comma_doubled(export),
        comma_doubled(context)
    );
    let map = tool(
        "qemu-img",
        &["map", "--output=json", "--image-opts", &options],
    )
    .json();
    let extents = map.as_array().expect("a list of extents").iter();
    merged(extents.map(|e| {
        let data = e["data"].as_bool().expect("data is a bool");
        (number(e, "start"), number(e, "length"), u32::from(!data))
    }))
}

/// Neighbours with the same flags as one.
pub fn merged(extents: impl IntoIterator<Item = Extent>) -> Vec<Extent> {
    let mut merged: Vec<Extent> = Vec::new();
    for extent in extents {
        match merged.last_mut() {
            Some(last) if last.2 == extent.2 && last.0 + last.1 == extent.0 => last.1 += extent.1,
            _ => merged.push(extent),
        }
    }
    merged
}

/// Copies an export into a file with `nbdcopy`.
#[track_caller]
pub fn nbdcopy(uri: &str, to: &Path) {
    tool("nbdcopy", &[uri, path(to)]).ok();
}

/// The SHA-256 of what `nbdcopy` copies.
#[track_caller]
pub fn nbdcopy_sha256(uri: &str, directory: &Path) -> String {
    let file = tempfile::Builder::new()
        .tempfile_in(directory)
        .expect("a file to copy into");
    nbdcopy(uri, file.path());
    sha256_of_file(file.path())
}

/// Makes a raw image of a qcow2 image and all that is behind it, with `qemu-img`.
#[track_caller]
pub fn convert_to_raw(image: &Path, raw: &Path) {
    let formats = ["convert", "-f", "qcow2", "-O", "raw"];
    tool(
        "qemu-img",
        &[&formats[..], &[path(image), path(raw)]].concat(),
    )
    .ok();
}

/// Has a QEMU write to an image and die, so that it is never closed.
#[track_caller]
pub fn abandon(image: &Path) {
    let crash = [
        "-f",
        "qcow2",
        "-c",
        "write 0 64k",
        "-c",
        "abort",
        path(image),
    ];
    let output = tool("qemu-io", &crash);
    assert_ne!(output.code(), 0, "{output}");
}

/// The SHA-256 of a file, in hexadecimal.
pub fn sha256_of_file(path: &Path) -> String {
    let mut file = File::open(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    let (mut hasher, mut buffer) = (Sha256::new(), vec![0; 1 << 20]);
    loop {
        match file.read(&mut buffer).expect("a readable file") {
            0 => return hex(&hasher.finalize()),
            length => hasher.update(&buffer[..length]),
        }
    }
}

/// The SHA-256 of bytes, in hexadecimal.
pub fn sha256(bytes: &[u8]) -> String {
    hex(&Sha256::digest(bytes))
}

/// The repository.
pub fn repository() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .parent()
        .expect("tests/ is in it")
        .to_path_buf()
}

/// A program in the Python environment that `scripts/setup` makes.
#[track_caller]
pub fn in_venv(program: &str) -> PathBuf {
    let path = repository().join(".venv/bin").join(program);
    assert!(
        path.exists(),
        "{} is missing: run scripts/setup",
        path.display()
    );
    path
}

/// Runs one of our Python scripts in that environment.
pub fn python(script: &str, args: &[&str]) -> Output {
    let script = repository().join("tests/python").join(script);
    run(Command::new(in_venv("python")).arg(script).args(args))
}

/// A path as text, as command lines have it.
pub fn path(path: &Path) -> &str {
    path.to_str().expect("our paths are UTF-8")
}

/// A sparse file of this size.
pub fn sparse_file(path: &Path, size: u64) {
    File::create(path)
        .and_then(|file| file.set_len(size))
        .expect("a new sparse file");
}

/// A number in what a process tells about itself in `/proc/PID/FILE`, as `key: number`.
#[track_caller]
pub fn proc_number(pid: u32, file: &str, key: &str) -> u64 {
    let text = fs::read_to_string(format!("/proc/{pid}/{file}")).expect("a live process");
    let line = text
        .lines()
        .find_map(|line| line.strip_prefix(key)?.strip_prefix(':'));
    let line = line.unwrap_or_else(|| panic!("no {key} in {text}"));
    line.split_whitespace()
        .next()
        .expect("a value")
        .parse()
        .expect("a number")
}

fn number(value: &Value, key: &str) -> u64 {
    value[key]
        .as_u64()
        .unwrap_or_else(|| panic!("no number {key} in {value}"))
}

fn comma_doubled(text: &str) -> String {
    text.replace(',', ",,")
}

fn hex(bytes: &[u8]) -> String {
    bytes
        .iter()
        .fold(String::new(), |text, byte| text + &format!("{byte:02x}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_tools_agree_on_a_dirty_bitmap_of_qemu() {
        let directory = crate::server::temporary_directory();
        let image = directory.path().join("a.qcow2");
        tool("qemu-img", &["create", "-f", "qcow2", path(&image), "1M"]).ok();
        tool(
            "qemu-img",
            &["bitmap", "--add", "-g", "64k", path(&image), "cp1"],
        )
        .ok();
        tool(
            "qemu-io",
            &["-f", "qcow2", "-c", "write 100k 1k", path(&image)],
        )
        .ok();
        let args = [
            "-r",
            "-x",
            "vda@b1",
            "-f",
            "qcow2",
            "-B",
            "cp1",
            path(&image),
        ];
        with_qemu_nbd(&args, |socket| {
            let expected = [(0, 65536, 0), (65536, 65536, 1), (131_072, 917_504, 0)];
            let uri = format!("nbd+unix:///vda@b1?socket={}", path(socket));
            assert_eq!(nbdinfo_map(&uri, "qemu:dirty-bitmap:cp1"), expected);
            let map = qemu_img_dirty_map(socket, "vda@b1", "qemu:dirty-bitmap:cp1");
            assert_eq!(map, expected);
            let mut nbd = crate::RawNbd::open(socket, "vda@b1", &["qemu:dirty-bitmap:cp1"]);
            assert_eq!(nbd.map("qemu:dirty-bitmap:cp1"), expected);
        });
    }
}
