//! Writers and someone who closes the gate, in every order in which they can see each other.
//!
//! A relaxed atomic stands for the disk. Nobody may change it while the gate is closed and empty, and
//! whoever changes it later knows of what was put in place meanwhile. That nobody waits for ever is
//! seen by the checker too.

use std::sync::Arc;

use loom::future::block_on;
use loom::sync::atomic::{AtomicU64, Ordering::Relaxed};
use loom::thread;

use super::*;

const BEFORE: u64 = 1;
const AFTER: u64 = 2;

struct Scene {
    gate: Gate<u64>,
    /// For each writer, in which period it wrote.
    disk: [AtomicU64; 2],
}

impl Scene {
    fn new() -> Arc<Self> {
        Arc::new(Self {
            gate: Gate::new(BEFORE),
            disk: [AtomicU64::new(0), AtomicU64::new(0)],
        })
    }

    fn write(self: &Arc<Self>, writer: usize) -> thread::JoinHandle<()> {
        let scene = Arc::clone(self);
        thread::spawn(move || {
            let pass = block_on(scene.gate.enter());
            scene.disk[writer].store(*pass, Relaxed);
        })
    }

    fn disk(&self) -> [u64; 2] {
        [0, 1].map(|writer| self.disk[writer].load(Relaxed))
    }
}

fn check(writers: usize, preemptions: usize) {
    let mut builder = loom::model::Builder::new();
    builder.preemption_bound = Some(preemptions);
    builder.check(move || {
        let scene = Scene::new();
        let writing: Vec<_> = (0..writers).map(|writer| scene.write(writer)).collect();

        let closed = scene.gate.close();
        block_on(closed.emptied());
        let then = scene.disk();
        assert!(!then.contains(&AFTER));
        closed.set(Arc::new(AFTER));
        drop(closed);

        for writer in writing {
            writer.join().unwrap();
        }
        for (writer, (then, now)) in then.into_iter().zip(scene.disk()).enumerate() {
            let late = then == 0 && writer < writers;
            assert_eq!(now, if late { AFTER } else { then }, "writer {writer}");
        }
    });
}

#[test]
fn loom_nothing_changes_at_the_instant() {
    check(1, 4);
}

#[test]
fn loom_nothing_changes_at_the_instant_of_two_writers() {
    check(2, 2);
}
