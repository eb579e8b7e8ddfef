//! Every kind of image that `qemu-img` makes, read as `qemu-img` reads it.

use std::path::Path;

use block::Storage;
use block::qcow2::Qcow2Image;
use rand::Rng as _;
use serde_json::Value;
use stillpoint_tests::seeds::{number, rng, seeds};
use stillpoint_tests::tools::{merged, nbdinfo_map, path, sha256, tool, with_qemu_nbd};
use stillpoint_tests::{Extent, KIB, MIB};

use crate::images::{Images, block_on, history, open, poke, qemu_io, read};

/// Options of `qemu-img create`, the size of a cluster, and that of the disk.
const VARIANTS: [(&str, u64, u64); 16] = [
    ("compat=0.10", 64 * KIB, 9 * MIB + 512),
    ("compat=0.10,cluster_size=512", 512, 3 * MIB + 512),
    ("compat=0.10,cluster_size=2M", 2 * MIB, 33 * MIB),
    ("compat=1.1", 64 * KIB, 9 * MIB + 512),
    ("compat=1.1,cluster_size=512", 512, 3 * MIB),
    (
        "compat=1.1,cluster_size=4k,lazy_refcounts=on",
        4 * KIB,
        5 * MIB,
    ),
    ("compat=1.1,cluster_size=2M", 2 * MIB, 33 * MIB + 512),
    ("compression_type=zstd", 64 * KIB, 9 * MIB),
    ("compression_type=zstd,cluster_size=2M", 2 * MIB, 33 * MIB),
    ("compression_type=zstd,cluster_size=4k", 4 * KIB, 5 * MIB),
    ("extended_l2=on,cluster_size=16k", 16 * KIB, 9 * MIB + 512),
    ("extended_l2=on", 64 * KIB, 19 * MIB),
    (
        "extended_l2=on,cluster_size=2M,compression_type=zstd",
        2 * MIB,
        65 * MIB,
    ),
    ("preallocation=metadata", 64 * KIB, 9 * MIB),
    ("preallocation=falloc,cluster_size=4k", 4 * KIB, 3 * MIB),
    ("refcount_bits=64,preallocation=full", 64 * KIB, 3 * MIB),
];

#[test]
fn every_kind_of_image_reads_as_qemu_reads_it() {
    let images = Images::new();
    for seed in seeds(&(1..=number("STILLPOINT_QCOW2_HISTORIES", 2)).collect::<Vec<_>>()) {
        for (options, cluster, size) in VARIANTS {
            let what = format!("seed {seed}, {options}");
            let image = images.create("image", options, &[], size);
            let mut rng = rng(seed);
            // Where everything is there already, nothing can be compressed.
            let commands = history(&mut rng, size, cluster, !options.contains("preallocation"));
            qemu_io(&image, "qcow2", &commands);
            check(&images, &image, seed, &what);
        }
    }
}

#[test]
fn data_in_another_file_is_found_there() {
    let images = Images::new();
    for seed in seeds(&[1, 2, 3]) {
        for options in ["data_file_raw=off", "data_file_raw=on", "extended_l2=on"] {
            let (data, size) = (images.at("data"), 5 * MIB);
            let _ = std::fs::remove_file(&data);
            // The name in the image is as it is given here.
            let options = format!("data_file={},{options}", data.display());
            let image = images.create("image", &options, &[], size);
            qemu_io(
                &image,
                "qcow2",
                &history(&mut rng(seed), size, 64 * KIB, false),
            );
            check(&images, &image, seed, &format!("seed {seed}, {options}"));
        }
    }
}

#[test]
fn what_an_image_was_before_a_snapshot_of_its_own_is_of_no_concern() {
    let images = Images::new();
    let image = images.create("image", "", &[], 5 * MIB);
    for seed in 1..4 {
        qemu_io(
            &image,
            "qcow2",
            &history(&mut rng(seed), 5 * MIB, 64 * KIB, seed == 1),
        );
        tool(
            "qemu-img",
            &["snapshot", "-c", &seed.to_string(), path(&image)],
        )
        .ok();
    }
    qemu_io(
        &image,
        "qcow2",
        &history(&mut rng(4), 5 * MIB, 64 * KIB, false),
    );
    check(&images, &image, 4, "with snapshots");
}

#[test]
fn compressed_images_of_real_data_read_as_qemu_reads_them() {
    let images = Images::new();
    let raw = images.at("raw");
    // Text compresses, noise does not, and zeroes are left out.
    let mut data = Vec::new();
    let mut rng = rng(9);
    while data.len() < 6 << 20 {
        let length = rng.random_range(1..200_000);
        match rng.random_range(0..3) {
            0 => data.extend((0..length).map(|_| rng.random::<u8>())),
            1 => data.extend((0..length).map(|at: usize| (at % 251) as u8 & rng.random::<u8>())),
            _ => data.resize(data.len() + length, 0),
        }
    }
    data.truncate(6 << 20);
    std::fs::write(&raw, data).unwrap();
    for kind in ["zlib", "zstd"] {
        for cluster in ["512", "4k", "64k", "2M"] {
            let image = images.at("image");
            let options = format!("compression_type={kind},cluster_size={cluster}");
            let args = ["convert", "-c", "-f", "raw", "-O", "qcow2", "-o", &options];
            let args = [&args[..], &[path(&raw), path(&image)]].concat();
            tool("qemu-img", &args).ok();
            check(&images, &image, 9, &options);
        }
    }
}

#[test]
fn an_image_that_was_cut_off_is_an_error_and_not_zeroes() {
    let images = Images::new();
    let image = images.create("image", "", &[], 4 * MIB);
    qemu_io(&image, "qcow2", &["write -P 7 0 4M".to_owned()]);
    let whole = std::fs::metadata(&image).unwrap().len();
    let file = std::fs::File::options().write(true).open(&image).unwrap();
    file.set_len(whole - MIB).unwrap();
    let image = open(&image);
    assert!(read(&image, 0..MIB).unwrap().iter().all(|&byte| byte == 7));
    let error = read(&image, 4 * MIB - 4096..4 * MIB).unwrap_err();
    assert!(error.to_string().contains("cut off"), "{error}");
}

#[test]
fn what_tables_say_that_cannot_be_is_an_error_there_and_nowhere_else() {
    let images = Images::new();
    let size = 4 * MIB;
    for (options, entry, expected) in [
        ("", 0x8000_0000_0005_0200_u64, "at no cluster"),
        ("", 0x8000_7fff_ffff_0000, "cut off"),
        ("", 0x4000_0000_0005_0000 | 0xff << 54, "compressed"),
        ("compat=0.10", 0x8000_0000_0005_0001, "version 2"),
        ("extended_l2=on", 0, "two things"),
    ] {
        let image = images.create("image", options, &[], size);
        qemu_io(&image, "qcow2", &["write -P 7 0 4M".to_owned()]);
        let table = crate::images::peek(&image, crate::images::peek(&image, 40));
        let table = table & 0x00ff_ffff_ffff_fe00;
        let step = if options == "extended_l2=on" { 16 } else { 8 };
        poke(&image, table + step * 3, &entry.to_be_bytes());
        let image = open(&image);
        let error = read(&image, 3 * 65_536..4 * 65_536).expect_err(expected);
        assert!(error.to_string().contains(expected), "{options}: {error}");
        for fine in [0..3 * 65_536, 4 * 65_536..size] {
            let read = read(&image, fine).unwrap();
            assert!(read.iter().all(|&byte| byte == 7), "{options}");
        }
    }
}

/// Bytes, holes and depths are QEMU's.
#[track_caller]
pub(crate) fn check(images: &Images, image: &Path, seed: u64, what: &str) {
    let before = sha256(&std::fs::read(image).unwrap());
    let expected = images.converted(image, "qcow2");
    let ours = open(image);
    check_bytes(&ours, &expected, seed, what);
    check_maps(&ours, image, what);
    assert_eq!(sha256(&std::fs::read(image).unwrap()), before, "{what}");
}

#[track_caller]
fn check_bytes(ours: &Qcow2Image, expected: &[u8], seed: u64, what: &str) {
    let size = expected.len() as u64;
    assert_eq!(ours.size(), size, "{what}");
    let whole = read(ours, 0..size).unwrap_or_else(|e| panic!("{what}: {e}"));
    if let Some(at) = (0..expected.len()).find(|&at| whole[at] != expected[at]) {
        panic!(
            "{what}: byte {at} is {} and not {}",
            whole[at], expected[at]
        );
    }
    let mut rng = rng(seed);
    for _ in 0..100 {
        let start = rng.random_range(0..size);
        let end = rng.random_range(start..=size.min(start + 200_000));
        let found = read(ours, start..end).unwrap();
        assert!(
            found == expected[start as usize..end as usize],
            "{what}: {start}..{end}"
        );
    }
}

#[track_caller]
fn check_maps(ours: &Qcow2Image, image: &Path, what: &str) {
    let map = tool(
        "qemu-img",
        &["map", "-f", "qcow2", "--output=json", path(image)],
    )
    .json();
    let number = |value: &Value| value.as_u64().expect("a number");
    let entries = map.as_array().expect("a list").iter();
    let zeroes = entries.map(|e| {
        let is_zero = u32::from(e["zero"] == true);
        (number(&e["start"]), number(&e["length"]), is_zero)
    });
    assert_eq!(holes(ours), merged(zeroes), "{what}: holes");
    // What is behind the end of a shorter image has no depth for `qemu-img`, and one for clients.
    let expected = with_qemu_nbd(&["-r", "-A", "-f", "qcow2", path(image)], |socket| {
        let uri = format!("nbd+unix:///?socket={}", socket.display());
        merged(nbdinfo_map(&uri, "qemu:allocation-depth"))
    });
    assert_eq!(depths(ours), expected, "{what}: depths");
}

pub(crate) fn holes(ours: &Qcow2Image) -> Vec<Extent> {
    let mut found = Vec::new();
    let mut at = 0;
    while at < ours.size() {
        for extent in block_on(ours.extents(at..ours.size())).unwrap() {
            assert_eq!(extent.range.start, at);
            at = extent.range.end;
            found.push((
                extent.range.start,
                at - extent.range.start,
                extent.hole.into(),
            ));
        }
    }
    merged(found)
}

pub(crate) fn depths(ours: &Qcow2Image) -> Vec<Extent> {
    let mut found = Vec::new();
    let mut at = 0;
    while at < ours.size() {
        for part in block_on(ours.depths(at..ours.size(), 7)).unwrap() {
            assert_eq!(part.range.start, at);
            at = part.range.end;
            found.push((part.range.start, at - part.range.start, part.depth));
        }
    }
    merged(found)
}
