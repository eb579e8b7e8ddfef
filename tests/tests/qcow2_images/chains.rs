//! Images behind images, and what an image may name.

use std::fs;
use std::os::unix::fs::symlink;

use stillpoint_tests::seeds::{number, rng, seeds};
use stillpoint_tests::tools::{path, tool};
use stillpoint_tests::{KIB, MIB};

use crate::images::{Images, history, open, qemu_io, read, refusal, try_open};
use crate::reads::{check, depths};

#[test]
fn a_chain_reads_as_qemu_reads_it_and_is_as_deep() {
    let images = Images::new();
    let rounds: Vec<_> = (1..=number("STILLPOINT_QCOW2_HISTORIES", 3)).collect();
    for seed in seeds(&rounds) {
        let mut rng = rng(seed);
        // Each longer or shorter than what is behind it, and of another kind.
        let raw = images.at("0");
        fs::write(&raw, vec![0x55; 1_000_000]).unwrap();
        fs::File::options()
            .write(true)
            .open(&raw)
            .unwrap()
            .set_len(3_000_001)
            .unwrap();
        qemu_io(&raw, "raw", &history(&mut rng, 2 * MIB, 64 * KIB, false));
        let layers = [
            (
                "1",
                "cluster_size=4k,compat=0.10",
                ["0", "raw"],
                4 * KIB,
                5 * MIB,
            ),
            (
                "2",
                "extended_l2=on",
                ["1", "qcow2"],
                64 * KIB,
                4 * MIB + 512,
            ),
            (
                "3",
                "compression_type=zstd",
                ["2", "qcow2"],
                64 * KIB,
                9 * MIB,
            ),
            ("4", "cluster_size=512", ["3", "qcow2"], 512, 2 * MIB),
            ("5", "", ["4", "qcow2"], 64 * KIB, 6 * MIB),
        ];
        for (name, options, backing, cluster, size) in layers {
            let image = images.create(name, options, &backing, size);
            let mut commands = history(&mut rng, size, cluster, true);
            commands.truncate(18);
            qemu_io(&image, "qcow2", &commands);
            check(&images, &image, seed, &format!("seed {seed}, layer {name}"));
        }
    }
}

#[test]
fn depth_counts_images_from_the_first_and_nowhere_is_zero() {
    let images = Images::new();
    let base = images.create("base", "", &[], MIB);
    qemu_io(&base, "qcow2", &["write 0 128k".to_owned()]);
    let middle = images.create("middle", "", &["base", "qcow2"], 2 * MIB);
    qemu_io(
        &middle,
        "qcow2",
        &["write 64k 128k".to_owned(), "write -z 1M 64k".to_owned()],
    );
    let top = images.create("top", "", &["middle", "qcow2"], 2 * MIB);
    qemu_io(&top, "qcow2", &["write 512k 64k".to_owned()]);
    let kib = |from: u64, to: u64, depth| (from * KIB, (to - from) * KIB, depth);
    let expected = [
        kib(0, 64, 3),
        kib(64, 192, 2),
        kib(192, 512, 0),
        kib(512, 576, 1),
        kib(576, 1024, 0),
        kib(1024, 1088, 2),
        // What is behind a shorter image counts as its zeroes.
        kib(1088, 2048, 3),
    ];
    assert_eq!(depths(&open(&top)), expected);
}

#[test]
fn the_format_of_a_backing_file_is_never_guessed() {
    let images = Images::new();
    images.create("base", "", &[], MIB);
    let image = images.create("image", "", &["base", "qcow2"], MIB);
    // The only extension of a type that begins like this is the format.
    let mut bytes = fs::read(&image).unwrap();
    let magic = 0xe279_2aca_u32.to_be_bytes();
    let at = bytes.windows(4).position(|found| found == magic).unwrap();
    bytes[at + 8..at + 13].copy_from_slice(b"vhdx\0");
    fs::write(&image, &bytes).unwrap();
    assert!(
        refusal(&image).contains("only raw and qcow2"),
        "{}",
        refusal(&image)
    );
    bytes[at] ^= 1;
    fs::write(&image, &bytes).unwrap();
    assert!(refusal(&image).contains("not told"), "{}", refusal(&image));
}

#[test]
fn an_image_behind_itself_is_refused() {
    let images = Images::new();
    images.create("a", "", &[], MIB);
    images.create("b", "", &["a", "qcow2"], MIB);
    let image = images.at("a");
    for behind in ["a", "b"] {
        tool(
            "qemu-img",
            &["rebase", "-u", "-b", behind, "-F", "qcow2", path(&image)],
        )
        .ok();
        assert!(
            refusal(&image).contains("its own backing chain"),
            "{behind}"
        );
    }
}

#[test]
fn a_chain_has_an_end() {
    let images = Images::new();
    images.create("0", "cluster_size=512", &[], 4096);
    for number in 1..=200_u32 {
        // Without `-u` each would be opened with all that is behind it.
        let (image, behind) = (images.at(&number.to_string()), (number - 1).to_string());
        let args = [
            "create",
            "-q",
            "-u",
            "-f",
            "qcow2",
            "-o",
            "cluster_size=512",
            "-F",
            "qcow2",
        ];
        let args = [&args[..], &["-b", &behind, path(&image), "4096"]].concat();
        tool("qemu-img", &args).ok();
    }
    assert_eq!(read(&open(&images.at("199")), 0..4096).unwrap(), [0; 4096]);
    assert!(refusal(&images.at("200")).contains("longer than 200"));
}

#[test]
fn only_files_in_the_folders_that_are_allowed_are_opened() {
    let images = Images::new();
    for folder in ["own", "other"] {
        fs::create_dir(images.at(folder)).unwrap();
    }
    images.create("other/base", "", &[], MIB);
    fs::write(images.at("secret"), [7; 4096]).unwrap();
    symlink("../secret", images.at("own/link")).unwrap();

    let image = images.create("own/image", "", &["../other/base", "qcow2"], MIB);
    assert!(
        refusal(&image).contains("--allow-backing"),
        "{}",
        refusal(&image)
    );
    try_open(&image, &[&images.at("other")]).unwrap();
    // What is named by what is named is held to the same.
    let base = images.at("other/base");
    let rebase = |image, name: &str, format: &str| {
        tool(
            "qemu-img",
            &["rebase", "-u", "-b", name, "-F", format, path(image)],
        )
        .ok();
    };
    rebase(&base, "../secret", "raw");
    let error = try_open(&image, &[&images.at("other")])
        .err()
        .unwrap()
        .to_string();
    assert!(
        error.contains("other/base': '") && error.contains("secret' is outside"),
        "{error}"
    );

    for (name, expected) in [
        ("/etc/shadow", "'/etc/shadow' is outside"),
        ("../secret", "is outside"),
        ("link", "symbolic link"),
        ("nbd://localhost/secret", "no plain path"),
        (
            "json:{\"driver\":\"file\",\"filename\":\"/etc/shadow\"}",
            "no plain path",
        ),
        ("missing", "cannot be opened"),
        (".", "neither a file nor a block device"),
    ] {
        rebase(&image, name, "raw");
        let told = refusal(&image);
        assert!(told.contains(expected), "{name}: {told}");
    }
}

#[test]
fn a_data_file_is_opened_only_where_a_backing_file_would_be() {
    let images = Images::new();
    for folder in ["own", "other"] {
        fs::create_dir(images.at(folder)).unwrap();
    }
    let data = images.at("other/data");
    let options = format!("data_file={}", data.display());
    let image = images.create("own/image", &options, &[], MIB);
    qemu_io(&image, "qcow2", &["write -P 7 0 64k".to_owned()]);
    assert!(
        refusal(&image).contains("is outside"),
        "{}",
        refusal(&image)
    );
    let opened = try_open(&image, &[&images.at("other")]).unwrap();
    assert_eq!(read(&opened, 0..4096).unwrap(), [7; 4096]);
}
