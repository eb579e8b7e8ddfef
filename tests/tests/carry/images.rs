//! Images and bitmaps of QEMU's, and what QEMU says of them.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use stillpoint_tests::guest::dirty_map;
use stillpoint_tests::server::uri;
use stillpoint_tests::tools::{convert_to_raw, merged, nbdinfo_map, path, tool, with_qemu_nbd};
use stillpoint_tests::{CHUNK, Extent, MIB, Server};

pub(crate) const SIZE: u64 = 8 * MIB;

/// Makes an image with these options, as after `-o`.
#[track_caller]
pub(crate) fn create(image: &Path, options: &str, size: u64) {
    let size = size.to_string();
    let mut args = vec!["create", "-q", "-f", "qcow2"];
    if !options.is_empty() {
        args.extend(["-o", options]);
    }
    args.extend([path(image), &size]);
    tool("qemu-img", &args).ok();
}

/// Has `qemu-img bitmap` do something to an image: options, and the bitmap last.
#[track_caller]
pub(crate) fn bitmap(image: &Path, args: &[&str]) {
    let (options, name) = args.split_at(args.len() - 1);
    let args = [&["bitmap"], options, &[path(image)], name].concat();
    tool("qemu-img", &args).ok();
}

/// Writes 4 KiB into each of these chunks.
#[track_caller]
pub(crate) fn write_chunks(image: &Path, chunks: &[u64]) {
    let commands: Vec<_> = chunks
        .iter()
        .map(|chunk| format!("write -P {} {} 4k", chunk % 250 + 1, chunk * CHUNK))
        .collect();
    let mut args = vec!["-f", "qcow2"];
    for command in &commands {
        args.extend(["-c", command]);
    }
    args.push(path(image));
    let output = tool("qemu-io", &args);
    assert!(!output.ok().contains("failed"), "{output}");
}

/// What `qemu-nbd` says is dirty.
#[track_caller]
pub(crate) fn as_qemu_says(image: &Path, bitmap: &str) -> Vec<Extent> {
    with_qemu_nbd(
        &["-r", "-f", "qcow2", "-B", bitmap, path(image)],
        |socket| {
            merged(nbdinfo_map(
                &uri(socket, ""),
                &format!("qemu:dirty-bitmap:{bitmap}"),
            ))
        },
    )
}

/// An image has no error and no leak.
#[track_caller]
pub(crate) fn check(image: &Path, how: &str) {
    let output = tool("qemu-img", &["check", "-f", "qcow2", path(image)]);
    assert_eq!(output.code(), 0, "{how}\n{output}");
}

/// Changes bytes of a file.
#[track_caller]
pub(crate) fn poke(file: &Path, at: u64, bytes: &[u8]) {
    let file = File::options().write(true).open(file).unwrap();
    file.write_all_at(bytes, at).unwrap();
}

/// The chunks in which anything is dirty.
pub(crate) fn chunks(map: &[Extent]) -> BTreeSet<u64> {
    let dirty = map.iter().filter(|extent| extent.2 == 1);
    dirty
        .flat_map(|(start, length, _)| start / CHUNK..(start + length).div_ceil(CHUNK))
        .collect()
}

/// The map of a disk of [`SIZE`] where these chunks are dirty.
pub(crate) fn map_of(chunks: &[u64]) -> Vec<Extent> {
    dirty_map(&chunks.iter().copied().collect(), SIZE)
}

/// What has changed since a checkpoint: a backup is begun, looked at by `nbdinfo`, and aborted.
#[track_caller]
pub(crate) fn since(server: &Server, checkpoint: &str) -> Vec<Extent> {
    served(server, checkpoint, "--since")
}

/// What is dirty in a bitmap, likewise.
#[track_caller]
pub(crate) fn dirty_in(server: &Server, bitmap: &str) -> Vec<Extent> {
    served(server, bitmap, "--bitmap")
}

#[track_caller]
fn served(server: &Server, name: &str, option: &str) -> Vec<Extent> {
    let begun = server.cli_json(&["backup", "begin", "--disk", "vda", option, name]);
    let id = begun["id"].as_str().unwrap();
    let uri = server.frozen_uri(&format!("vda@{id}"));
    let map = nbdinfo_map(&uri, &format!("qemu:dirty-bitmap:{name}"));
    server.abort(id);
    merged(map)
}

/// A server of a copy of an image, as `vda`.
#[track_caller]
pub(crate) fn serving_copy(image: &Path) -> Server {
    let builder = Server::builder();
    let raw = builder.path("vda.raw");
    convert_to_raw(image, &raw);
    builder.disk_at("vda", &raw).start()
}

/// A folder with an image, in which `cp0` has `dirty` chunks.
pub(crate) fn image_with_bitmap(dirty: &[u64]) -> (tempfile::TempDir, PathBuf) {
    let dir = stillpoint_tests::server::temporary_directory();
    let image = dir.path().join("vm.qcow2");
    create(&image, "", SIZE);
    write_chunks(&image, &[0, 7, 9]);
    bitmap(&image, &["--add", "cp0"]);
    write_chunks(&image, dirty);
    (dir, image)
}

pub(crate) fn bytes_of(file: &Path) -> Vec<u8> {
    fs::read(file).unwrap()
}

/// Begins a backup since "cp1", which comes out full.
#[track_caller]
pub(crate) fn is_known_to_have_changed(server: &Server) {
    let begun = server.cli(&["backup", "begin", "--since", "cp1", "--json"]);
    begun.exits(3);
    assert!(
        begun.stdout.contains("changed while the server was down"),
        "{begun}"
    );
}
