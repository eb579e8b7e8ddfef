//! Histories drawn from a seed: a pull after each step, and every point restored at the end.
//!
//! `STILLPOINT_PULL_HISTORIES` says how many.

use rand::Rng as _;
use stillpoint_tests::seeds::{Rng, number, rng, seeds};
use stillpoint_tests::{Guest, KIB, MIB, Server, tools};

use crate::folder::Folder;

#[test]
fn every_point_of_a_random_history_is_its_instant() {
    let histories: Vec<u64> = (1..=number("STILLPOINT_PULL_HISTORIES", 3)).collect();
    for seed in seeds(&histories) {
        history(seed);
    }
}

fn history(seed: u64) {
    let what = format!("seed {seed}");
    let mut rng = rng(seed);
    let mut world = World::new(&mut rng);
    let folder = Folder::new();
    let mut expected: Vec<(u64, &str, Vec<u8>)> = Vec::new();

    for step in 0..6 {
        let what = format!("{what}, step {step}");
        world.go_on(&mut rng);
        let World { server, guests, .. } = &world;
        let is_full = rng.random_bool(0.1);
        let wanted = some_disks(&mut rng);
        let args = [wanted, if is_full { &["--full"] } else { &[] }].concat();
        let pulled = folder.pull(server, &args);
        let result = pulled.result(0);
        let point = result["point"].as_u64().expect("a number");
        for (name, guest) in guests {
            if !wanted.is_empty() && !wanted.contains(name) {
                continue;
            }
            let disk = pulled.disk(0, name);
            let is_there = expected.iter().any(|(_, there, _)| there == name);
            let mode = if is_there && !is_full {
                "incremental"
            } else {
                "full"
            };
            assert_eq!(disk["mode"], mode, "{what}: {disk}");
            expected.push((point, name, guest.disk.clone()));
        }
    }
    let server = &world.server;
    for (point, disk, bytes) in &expected {
        folder.holds(*point, disk, bytes, &what);
        let ours = folder.restored_by_us(server, *point, disk);
        assert!(
            ours == *bytes,
            "{what}: {disk} in point {point}, by stillpoint restore"
        );
    }
    server.cli(&["verify", tools::path(folder.path())]).ok();
    let list = server.cli_json(&["backup", "list"]);
    assert_eq!(list, serde_json::json!([]), "{what}: backups are left open");
}

/// A server with two disks, and what was written to them: by a guest, over stops and kills.
pub(crate) struct World {
    pub(crate) server: Server,
    pub(crate) guests: [(&'static str, Guest); 2],
    _images: tempfile::TempDir,
}

impl World {
    /// Disks of granularities that are drawn.
    pub(crate) fn new(rng: &mut Rng) -> Self {
        let images = stillpoint_tests::server::temporary_directory();
        let mut builder = Server::builder();
        let sizes = [("vda", 5 * MIB + 512), ("vdb", 3 * MIB)];
        for (name, size) in sizes {
            let image = images.path().join(format!("{name}.raw"));
            tools::sparse_file(&image, size);
            let granularity = [4 * KIB, 16 * KIB, 64 * KIB, 256 * KIB][rng.random_range(0..4)];
            builder = builder.disk_as(&format!(
                "{name}={},granularity={granularity}",
                image.display()
            ));
        }
        let server = builder.start();
        let guests = sizes.map(|(name, _)| (name, Guest::new(&server, name)));
        Self {
            server,
            guests,
            _images: images,
        }
    }

    /// The guests write, or not; sometimes the server ends and is started again.
    pub(crate) fn go_on(&mut self, rng: &mut Rng) {
        for (_, guest) in &mut self.guests {
            for _ in 0..rng.random_range(0..12_u32) {
                guest.do_something(rng);
            }
        }
        if rng.random_bool(0.2) {
            if rng.random_bool(0.5) {
                self.server.stop();
            } else {
                self.server.kill();
            }
            self.server.start();
            for (name, guest) in &mut self.guests {
                guest.reconnect(&self.server, name);
            }
        }
    }
}

/// Which disks are asked for, as arguments; mostly none, which means all.
pub(crate) fn some_disks(rng: &mut Rng) -> &'static [&'static str] {
    [&[][..], &["vda"], &["vdb"]][rng.random_range(0..6_usize).saturating_sub(3)]
}
