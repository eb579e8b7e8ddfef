//! qcow2 files that are written once, in the eyes of `qemu-img`.
//!
//! What is to be in them is drawn; a plain copy of the disk is what they are compared with.

use std::fs::{self, File};
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::Path;

use block::qcow2::Layout;
use rand::seq::SliceRandom;
use rand::{Rng as _, RngCore as _};
use serde_json::Value;
use stillpoint_tests::seeds::{Rng, number, rng, seeds};
use stillpoint_tests::server::temporary_directory;
use stillpoint_tests::tools::{path, sparse_file, tool};
use stillpoint_tests::{GIB, KIB, MIB};

const CLUSTERS: [u64; 5] = [4 * KIB, 8 * KIB, 16 * KIB, 32 * KIB, 64 * KIB];

#[test]
fn any_runs_are_what_qemu_img_reads_with_and_without_a_backing_file() {
    let rounds = number("STILLPOINT_QCOW2_ROUNDS", 12);
    for seed in seeds(&(1..=rounds).collect::<Vec<_>>()) {
        let mut rng = rng(seed);
        let directory = temporary_directory();
        let at = |name: &str| directory.path().join(name);

        let size = rng.random_range(1..64 * MIB / 512) * 512;
        let cluster = CLUSTERS[rng.random_range(0..5)];
        let full = Drawn::new(&mut rng, size, cluster);
        let layout = Layout::new(size, cluster, &full.data, &[]).unwrap();
        let mut disk = vec![0; size as usize];
        full.write(&mut rng, &layout, &at("full.qcow2"), &mut disk);
        compare(seed, &layout, &at("full.qcow2"), &disk);

        // The disk may have grown, and the clusters be others.
        let size = size + rng.random_range(0..4) * rng.random_range(0..MIB / 512) * 512;
        let cluster = CLUSTERS[rng.random_range(0..5)];
        let incremental = Drawn::new(&mut rng, size, cluster);
        let layout = Layout::new(size, cluster, &incremental.data, &incremental.zero).unwrap();
        let layout = layout.with_backing("full.qcow2").unwrap();
        disk.resize(size as usize, 0);
        for run in &incremental.zero {
            disk[run.start as usize..run.end as usize].fill(0);
        }
        incremental.write(&mut rng, &layout, &at("incremental.qcow2"), &mut disk);
        compare(seed, &layout, &at("incremental.qcow2"), &disk);
        check_map(seed, &at("incremental.qcow2"), &incremental);
    }
}

#[test]
fn disks_of_many_tebibytes_are_sparse_and_sound() {
    for (tebibytes, cluster) in [(1, 4 * KIB), (8, 4 * KIB), (16, 64 * KIB), (64, 64 * KIB)] {
        let size = (tebibytes << 40) - 512;
        let directory = temporary_directory();
        let file = directory.path().join("large.qcow2");
        // The first cluster, the last one, of which there is a part, and some around each TiB.
        let mut data = vec![0..cluster];
        for at in 1..tebibytes {
            data.push((at << 40) - cluster..(at << 40) + cluster);
        }
        data.push(size / cluster * cluster..size);
        let zero = [GIB..3 * GIB];
        let layout = Layout::new(size, cluster, &data, &zero).unwrap();
        sparse_file(&file, 0);
        let image = File::options().write(true).open(&file).unwrap();
        layout.write_metadata(&image).unwrap();
        for run in &data {
            let bytes = vec![7; (run.end - run.start) as usize];
            let host = layout.host_offset(run.start).unwrap();
            image.write_all_at(&bytes, host).unwrap();
        }
        tool("qemu-img", &["check", path(&file)]).ok();
        let map = map(&file);
        let with_data = map.iter().filter(|e| e["data"] == true);
        let found: Vec<_> = with_data.map(range).collect();
        assert_eq!(found, data, "{tebibytes} TiB, clusters of {cluster}");
        for run in [&data[0], data.last().unwrap()] {
            let length = run.end - run.start;
            let read = format!("read -P 7 {} {length}", run.start);
            tool("qemu-io", &["-r", "-f", "qcow2", "-c", &read, path(&file)]).ok();
        }
        let blocks = std::os::unix::fs::MetadataExt::blocks(&fs::metadata(&file).unwrap());
        assert!(
            blocks * 512 < 64 * MIB,
            "{tebibytes} TiB take {blocks} sectors"
        );
    }
}

/// Whole clusters of a disk that have data, or read as zeroes.
struct Drawn {
    data: Vec<Range<u64>>,
    zero: Vec<Range<u64>>,
}

impl Drawn {
    fn new(rng: &mut Rng, size: u64, cluster: u64) -> Self {
        let (mut data, mut zero) = (Vec::new(), Vec::new());
        let mut at = 0;
        let longest = 1 << rng.random_range(0..10);
        while at < size {
            let end = (at + rng.random_range(1..=longest) * cluster).min(size);
            match rng.random_range(0..3) {
                0 => data.push(at..end),
                1 => zero.push(at..end),
                _ => {}
            }
            at = end;
        }
        Self { data, zero }
    }

    /// Writes the file, its data in any order, and into the copy of the disk what it then holds.
    fn write(&self, rng: &mut Rng, layout: &Layout, file: &Path, disk: &mut [u8]) {
        sparse_file(file, 0);
        let file = File::options().write(true).open(file).unwrap();
        layout.write_metadata(&file).unwrap();
        assert_eq!(file.metadata().unwrap().len(), layout.file_size());
        let mut runs = self.data.clone();
        runs.shuffle(rng);
        for run in runs {
            let bytes = &mut disk[run.start as usize..run.end as usize];
            rng.fill_bytes(bytes);
            let host = layout.host_offset(run.start).unwrap();
            file.write_all_at(bytes, host).unwrap();
        }
    }
}

#[track_caller]
fn compare(seed: u64, layout: &Layout, file: &Path, disk: &[u8]) {
    let raw = file.with_extension("raw");
    fs::write(&raw, disk).unwrap();
    let check = tool("qemu-img", &["check", "--output=json", path(file)]).json();
    for count in ["corruptions", "leaks", "check-errors"] {
        assert!(
            matches!(check.get(count), None | Some(Value::Null)) || check[count] == 0,
            "seed {seed}: {check}"
        );
    }
    assert_eq!(check["image-end-offset"], layout.file_size(), "seed {seed}");
    let same = tool(
        "qemu-img",
        &[
            "compare",
            "-s",
            "-f",
            "raw",
            "-F",
            "qcow2",
            path(&raw),
            path(file),
        ],
    );
    // Strictly, a cluster that is allocated is not one that is not; the contents count.
    assert!(
        same.stdout.contains("Images are identical") || compare_contents(&raw, file),
        "seed {seed}: {same}"
    );
    let converted = file.with_extension("converted");
    tool(
        "qemu-img",
        &["convert", "-O", "raw", path(file), path(&converted)],
    )
    .ok();
    assert!(fs::read(&converted).unwrap() == disk, "seed {seed}");
}

fn compare_contents(raw: &Path, file: &Path) -> bool {
    let args = ["compare", "-f", "raw", "-F", "qcow2", path(raw), path(file)];
    tool("qemu-img", &args).code() == 0
}

/// What the top file has is at depth 0, and zeroes are told from data.
#[track_caller]
fn check_map(seed: u64, file: &Path, drawn: &Drawn) {
    let ours = |is_data: bool| {
        let map = map(file);
        let here = map
            .iter()
            .filter(|e| e["depth"] == 0 && e["present"] == true);
        let found: Vec<_> = here
            .filter(|e| (e["data"] == true) == is_data)
            .map(|e| (range(e).start, range(e).end - range(e).start, 0))
            .collect();
        stillpoint_tests::tools::merged(found)
    };
    let expected = |runs: &[Range<u64>]| {
        let runs = runs.iter().map(|run| (run.start, run.end - run.start, 0));
        stillpoint_tests::tools::merged(runs)
    };
    assert_eq!(ours(true), expected(&drawn.data), "seed {seed}: data");
    assert_eq!(ours(false), expected(&drawn.zero), "seed {seed}: zeroes");
}

fn map(file: &Path) -> Vec<Value> {
    let map = tool("qemu-img", &["map", "--output=json", path(file)]).json();
    map.as_array().expect("a list").clone()
}

fn range(extent: &Value) -> Range<u64> {
    let number = |key: &str| extent[key].as_u64().expect("a number");
    number("start")..number("start") + number("length")
}
