//! Writers and someone who retires regions, in every order in which they can see each other.
//!
//! Relaxed atomics stand for the image and the map: a sync makes durable what whoever asks for it
//! can see of them, and no more.

use std::sync::Arc;

use loom::sync::atomic::{AtomicU64, Ordering::Relaxed};
use loom::thread;

use super::*;
use crate::MemoryPages;

/// A region that is active, and what was last written in it.
struct Scene {
    regions: Regions<MemoryPages>,
    region: Region,
    written: AtomicU64,
}

impl Scene {
    fn new() -> Arc<Self> {
        let table = PageTable::create(1, MemoryPages::default()).unwrap();
        let regions = Regions::new(1, Granularity::DEFAULT, table);
        let region = regions.of(&(0..1)).next().unwrap();
        let scene = Self {
            regions,
            region,
            written: AtomicU64::new(0),
        };
        scene.enter();
        scene.regions.leave(region);
        Arc::new(scene)
    }

    fn enter(&self) {
        if !self.regions.enter(self.region) {
            self.regions.activate(self.region, |_| Ok(())).unwrap();
            // A sync of the table would be here.
            self.regions.activated(self.region);
        }
    }

    fn write(&self, value: u64) {
        self.enter();
        self.written.store(value, Relaxed);
        self.regions.leave(self.region);
    }

    /// What is durable after it.
    fn retire(&self) -> u64 {
        let retiring = self.regions.begin_retiring(usize::MAX);
        let durable = self.written.load(Relaxed);
        for region in retiring {
            self.regions.retire(region, || 0).unwrap();
        }
        durable
    }

    fn is_active(&self) -> bool {
        self.regions.table().record(0).is_active(self.region)
    }
}

fn check(model: impl Fn() + Send + Sync + 'static) {
    let mut builder = loom::model::Builder::new();
    builder.preemption_bound = Some(3);
    builder.check(model);
}

#[test]
fn loom_what_was_written_is_durable_or_its_region_is_active() {
    check(|| {
        let scene = Scene::new();
        let writer = {
            let scene = Arc::clone(&scene);
            thread::spawn(move || scene.write(1))
        };
        let durable = scene.retire();
        writer.join().unwrap();
        assert!(durable == 1 || scene.is_active());
    });
}

#[test]
fn loom_a_region_is_active_while_anyone_who_was_let_in_is_inside() {
    check(|| {
        let scene = Scene::new();
        let writers = [1, 2].map(|_| {
            let scene = Arc::clone(&scene);
            thread::spawn(move || {
                scene.enter();
                assert!(scene.is_active());
                scene.regions.leave(scene.region);
            })
        });
        scene.retire();
        for writer in writers {
            writer.join().unwrap();
        }
    });
}
