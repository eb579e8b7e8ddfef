//! Stock tools pull a frozen export whole, and what has changed of it.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

use rand::{Rng as _, RngCore as _};
use stillpoint_tests::seeds::{Rng, rng, seeds};
use stillpoint_tests::tools::{
    convert_to_raw, nbdcopy, nbdcopy_sha256, path, sha256, sparse_file, tool, with_nbdkit,
};
use stillpoint_tests::{CHUNK, GIB, Guest, KIB, MIB, RawNbd, Server};

#[test]
fn nbdcopy_qemu_img_and_an_nbdkit_proxy_pull_the_same_bytes() {
    for seed in seeds(&[1, 2]) {
        let mut rng = rng(seed);
        let server = Server::with_disk(24 * MIB + 512);
        let mut guest = Guest::new(&server, "vda");
        (0..100).for_each(|_| guest.do_something(&mut rng));
        server.begin("b1", &[]);
        let expected = sha256(&guest.disk);
        // What they read is half in scratch by then.
        (0..50).for_each(|_| guest.do_something(&mut rng));

        let uri = server.frozen_uri("vda@b1");
        assert_eq!(
            nbdcopy_sha256(&uri, server.directory()),
            expected,
            "seed {seed}: nbdcopy"
        );

        let copy = server.path("copy.raw");
        tool(
            "qemu-img",
            &["convert", "-f", "raw", "-O", "raw", &uri, path(&copy)],
        )
        .ok();
        let found = stillpoint_tests::tools::sha256_of_file(&copy);
        assert_eq!(found, expected, "seed {seed}: qemu-img convert");

        with_nbdkit(&["--readonly", "nbd", &format!("uri={uri}")], |socket| {
            let uri = stillpoint_tests::server::uri(socket, "");
            let found = nbdcopy_sha256(&uri, server.directory());
            assert_eq!(found, expected, "seed {seed}: nbdkit nbd");
        });
    }
}

#[test]
fn a_full_and_its_incremental_equal_the_instant_and_only_changes_are_read() {
    const SIZE: u64 = 4 * GIB;
    for seed in seeds(&[1]) {
        let mut rng = rng(seed);
        let server = Server::with_disk(SIZE);
        let mut guest = BigGuest::new(&server, SIZE);
        for _ in 0..100 {
            guest.write_somewhere(&mut rng);
        }
        server.begin("b0", &["--checkpoint", "cp1"]);
        let full = server.path("full.qcow2");
        let uri = server.frozen_uri("vda@b0");
        tool(
            "qemu-img",
            &["convert", "-f", "raw", "-O", "qcow2", &uri, path(&full)],
        )
        .ok();
        server.commit("b0");
        identical(&full, &guest.copy_path);

        for _ in 0..60 {
            guest.write_somewhere(&mut rng);
        }
        guest.zeroes(SIZE / 2, 8 * MIB);
        let begun = server.begin("b1", &["--since", "cp1", "--checkpoint", "cp2"]);
        let disk = &begun["disks"][0];
        let changed = disk["changed_bytes"].as_u64().expect("a number");
        assert!(
            (CHUNK..SIZE / 10).contains(&changed),
            "seed {seed}: {begun}"
        );
        let export = disk["difference"]["export"].as_str().expect("a difference");
        assert_eq!(export, "vda@cp1..b1");
        let then = server.path("then.raw");
        tool(
            "cp",
            &["--sparse=always", path(&guest.copy_path), path(&then)],
        )
        .ok();
        for _ in 0..60 {
            guest.write_somewhere(&mut rng);
        }

        let incremental = server.path("inc.qcow2");
        let uri = server.frozen_uri(export);
        let to = ["-O", "qcow2", "-B", path(&full), "-F", "qcow2", "-f", "raw"];
        tool(
            "qemu-img",
            &[&["convert"], &to[..], &[&uri, path(&incremental)]].concat(),
        )
        .ok();
        let read = server.bytes_read("b1", "vda", export);
        assert!(
            read <= changed + MIB,
            "seed {seed}: {read} bytes read for {changed} changed"
        );
        server.commit("b1");
        identical(&incremental, &then);
    }
}

#[test]
fn three_incrementals_in_a_row_rebuild_each_instant() {
    for seed in seeds(&[1]) {
        let mut rng = rng(seed);
        let server = Server::with_disk(16 * MIB + 512);
        let mut guest = Guest::new(&server, "vda");
        (0..30).for_each(|_| guest.do_something(&mut rng));
        let mut base: Option<(String, std::path::PathBuf)> = None;
        for point in 0..4 {
            let (id, checkpoint) = (format!("b{point}"), format!("cp{point}"));
            let image = server.path(&format!("{id}.qcow2"));
            let mut convert = vec!["convert", "-f", "raw", "-O", "qcow2"];
            let export = if let Some((since, below)) = &base {
                server.begin(&id, &["--since", since, "--checkpoint", &checkpoint]);
                convert.extend(["-B", path(below), "-F", "qcow2"]);
                format!("vda@{since}..{id}")
            } else {
                server.begin(&id, &["--checkpoint", &checkpoint]);
                format!("vda@{id}")
            };
            let expected = sha256(&guest.disk);
            (0..20).for_each(|_| guest.do_something(&mut rng));
            let uri = server.frozen_uri(&export);
            convert.extend([&uri[..], path(&image)]);
            tool("qemu-img", &convert).ok();
            server.commit(&id);
            let flat = server.path("flat.raw");
            convert_to_raw(&image, &flat);
            let found = stillpoint_tests::tools::sha256_of_file(&flat);
            assert_eq!(found, expected, "seed {seed}: point {point}");
            base = Some((checkpoint, image));
        }
    }
}

#[test]
fn a_pull_counts_the_bytes_it_reads_per_export() {
    let server = Server::with_disk(MIB);
    Guest::new(&server, "vda").write(0, &vec![1; MIB as usize]);
    server.begin("b1", &[]);
    assert_eq!(server.bytes_read("b1", "vda", "vda@b1"), 0);
    nbdcopy(&server.frozen_uri("vda@b1"), &server.path("copy"));
    assert_eq!(server.bytes_read("b1", "vda", "vda@b1"), MIB);
}

/// A guest whose copy is a sparse file, because the disk would not fit into memory.
struct BigGuest {
    nbd: RawNbd,
    copy: File,
    copy_path: std::path::PathBuf,
    size: u64,
}

impl BigGuest {
    fn new(server: &Server, size: u64) -> Self {
        let copy_path = server.path("copy.raw");
        sparse_file(&copy_path, size);
        let copy = File::options()
            .write(true)
            .open(&copy_path)
            .expect("our own file");
        Self {
            nbd: server.open_live("vda"),
            copy,
            copy_path,
            size,
        }
    }

    fn write_somewhere(&mut self, rng: &mut Rng) {
        let mut bytes = vec![0; rng.random_range(1..=128 * KIB) as usize];
        rng.fill_bytes(&mut bytes);
        let offset = rng.random_range(0..=self.size - bytes.len() as u64);
        self.nbd.write(offset, &bytes).expect("the guest can write");
        self.copy
            .write_all_at(&bytes, offset)
            .expect("the copy can be written");
    }

    fn zeroes(&mut self, offset: u64, length: u64) {
        self.nbd
            .zeroes(offset, length as u32, 0)
            .expect("the guest can write zeroes");
        self.copy
            .write_all_at(&vec![0; length as usize], offset)
            .expect("it can be written");
    }
}

#[track_caller]
fn identical(image: &Path, raw: &Path) {
    tool(
        "qemu-img",
        &[
            "compare",
            "-f",
            "qcow2",
            "-F",
            "raw",
            path(image),
            path(raw),
        ],
    )
    .ok();
}

#[test]
fn what_is_read_through_each_difference_is_counted_for_it_alone() {
    let server = Server::with_disk(4 * MIB);
    server.checkpoint("cp1");
    server.checkpoint("cp2");
    server.begin("b1", &[]);
    let mut first = server.open_frozen("vda@cp1..b1", &[]);
    let mut second = server.open_frozen("vda@cp2..b1", &[]);
    first.read(0, 4096).unwrap();
    second.read(0, 512).unwrap();
    assert_eq!(server.bytes_read("b1", "vda", "vda@cp1..b1"), 4096);
    assert_eq!(server.bytes_read("b1", "vda", "vda@cp2..b1"), 512);
    assert_eq!(server.bytes_read("b1", "vda", "vda@b1"), 0);
}
