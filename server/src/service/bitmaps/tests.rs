//! Commands in an order that is drawn, on real files and through restarts, against the simplest
//! model: sets of chunks.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use bitmap::{Granularity, Run};
use block::Engine;
use bytes::Bytes;
use rand::seq::IndexedRandom as _;
use rand::{Rng as _, SeedableRng as _};
use rand_chacha::ChaCha8Rng as Rng;
use time::OffsetDateTime;
use tokio::task::LocalSet;

use super::{Action, Addition, Source};
use crate::disk::{Durability, OnTrackingError};
use crate::names::Name;
use crate::served::{Cache, DiskSpec, ServedDisk};
use crate::service::{BeginRequest, Reserve, ScratchOptions, Service};

const CHUNK: u64 = 4096;
/// Not a whole number of the coarsest blocks.
const CHUNKS: u64 = 45;
const LIVES: usize = 4;
const STEPS: usize = 24;
const SEEDS: u64 = 12;

type Chunks = BTreeSet<u64>;

#[derive(Clone, Debug, Default)]
struct Model {
    bitmaps: BTreeMap<String, Expected>,
    checkpoints: BTreeMap<String, Chunks>,
    /// Of the open backup: what its bitmaps had at its instant.
    frozen: Option<(Name, BTreeMap<String, Chunks>)>,
}

#[derive(Clone, Debug, Default)]
struct Expected {
    dirty: Chunks,
    chunks_per_block: u64,
    records: bool,
    persistent: bool,
}

impl Expected {
    fn write(&mut self, chunk: u64) {
        let first = chunk / self.chunks_per_block * self.chunks_per_block;
        let last = (first + self.chunks_per_block).min(CHUNKS);
        self.dirty.extend(first..last);
    }
}

impl Model {
    fn write(&mut self, chunk: u64) {
        let recording = self.bitmaps.values_mut().filter(|bitmap| bitmap.records);
        recording.for_each(|bitmap| bitmap.write(chunk));
        for changed in self.checkpoints.values_mut() {
            changed.insert(chunk);
        }
    }

    fn is_busy(&self, name: &str) -> bool {
        let frozen = self.frozen.as_ref();
        frozen.is_some_and(|(_, bitmaps)| bitmaps.contains_key(name))
    }

    /// Whether the action is allowed; then it is done.
    fn perform(&mut self, action: &Action) -> bool {
        let name = match action {
            Action::Add(addition) => {
                if self.bitmaps.contains_key(&addition.name) {
                    return false;
                }
                let granularity = addition.granularity.expect("always drawn");
                let bitmap = Expected {
                    chunks_per_block: granularity / CHUNK,
                    records: !addition.disabled,
                    persistent: addition.persistent,
                    ..Expected::default()
                };
                self.bitmaps.insert(addition.name.clone(), bitmap);
                return true;
            }
            Action::Merge { target, .. } => target,
            Action::Remove { name, .. }
            | Action::Clear { name, .. }
            | Action::Enable { name, .. }
            | Action::Disable { name, .. }
            | Action::Populate { name, .. } => name,
            Action::Abort => return false,
        };
        if self.is_busy(name) || !self.bitmaps.contains_key(name) {
            return false;
        }
        let mut merged = Chunks::new();
        if let Action::Merge { sources, .. } = action {
            for Source { name, .. } in sources {
                let source = self.bitmaps.get(name).filter(|_| !self.is_busy(name));
                let Some(source) = source else {
                    return false;
                };
                merged.extend(&source.dirty);
            }
        }
        let Some(bitmap) = self.bitmaps.get_mut(name) else {
            return false;
        };
        match action {
            Action::Remove { .. } => {
                self.bitmaps.remove(name);
            }
            Action::Clear { .. } => bitmap.dirty.clear(),
            Action::Enable { .. } => bitmap.records = true,
            Action::Disable { .. } => bitmap.records = false,
            _ => merged.into_iter().for_each(|chunk| bitmap.write(chunk)),
        }
        true
    }
}

fn drawn_action(rng: &mut Rng) -> Action {
    let node = "vda".to_owned();
    let name = |rng: &mut Rng| (*["a", "b", "c", "d"].choose(rng).unwrap()).to_owned();
    let drawn = name(rng);
    match rng.random_range(0..12) {
        0..4 => Action::Add(Addition {
            node,
            name: drawn,
            granularity: [1, 2, 16].choose(rng).map(|chunks| chunks * CHUNK),
            persistent: rng.random_bool(0.7),
            disabled: rng.random_bool(0.3),
        }),
        4 => Action::Remove { node, name: drawn },
        5 | 6 => Action::Clear { node, name: drawn },
        7 => Action::Enable { node, name: drawn },
        8 | 9 => Action::Disable { node, name: drawn },
        _ => Action::Merge {
            node,
            target: drawn,
            sources: (0..rng.random_range(1..3))
                .map(|_| Source {
                    node: None,
                    name: name(rng),
                })
                .collect(),
        },
    }
}

/// A server of one disk, from start to stop or kill.
struct Life<'a> {
    service: Arc<Service>,
    disk: Arc<ServedDisk>,
    model: &'a mut Model,
    rng: &'a mut Rng,
    seed: u64,
}

impl<'a> Life<'a> {
    async fn begin(image: &Path, model: &'a mut Model, rng: &'a mut Rng, seed: u64) -> Self {
        let name = Name::parse("vda").unwrap();
        let spec = DiskSpec {
            name: name.clone(),
            path: image.to_path_buf(),
            remote: None,
            format: None,
            allow_backing: Vec::new(),
            granularity: Some(Granularity::new(CHUNK).unwrap()),
            state: None,
            read_only: false,
            durability: Durability::default(),
            cache: Cache::default(),
        };
        let disk = ServedDisk::open(
            &spec,
            None,
            (OnTrackingError::default(), Engine::Threads),
            None,
        )
        .await
        .unwrap();
        let clock = OffsetDateTime::now_utc;
        // How full the machine's disk is decides nothing here.
        let scratch = ScratchOptions {
            reserve: Reserve::Bytes(0),
            ..ScratchOptions::default()
        };
        let service = Service::new(vec![disk], Duration::from_secs(1), clock, scratch).unwrap();
        service.settle().await.unwrap();
        let disk = Arc::clone(&service.disks()[&name]);
        Self {
            service,
            disk,
            model,
            rng,
            seed,
        }
    }

    async fn step(&mut self) {
        match self.rng.random_range(0..20) {
            0..8 => self.write().await,
            8 => self.checkpoint().await,
            9 | 10 => self.backup().await,
            11..14 => {
                let count = self.rng.random_range(2..5);
                let actions = (0..count).map(|_| drawn_action(self.rng)).collect();
                self.perform(actions).await;
            }
            _ => {
                let action = drawn_action(self.rng);
                self.perform(vec![action]).await;
            }
        }
    }

    async fn write(&mut self) {
        let chunk = self.rng.random_range(0..CHUNKS);
        let data = Bytes::from_static(&[7; 512]);
        self.disk.disk.write(chunk * CHUNK, data).await.unwrap();
        self.model.write(chunk);
    }

    async fn perform(&mut self, actions: Vec<Action>) {
        // The model has no notion of a bitmap that is leaving, whose name is still taken.
        let removed: Vec<String> = actions
            .iter()
            .filter_map(|action| match action {
                Action::Remove { name, .. } => Some(name.clone()),
                _ => None,
            })
            .collect();
        if actions.len() > 1 && !removed.is_empty() {
            return;
        }
        let mut after = self.model.clone();
        let is_allowed = actions.iter().all(|action| after.perform(action));
        let outcome = self.service.change_bitmaps(actions.clone()).await;
        let seed = self.seed;
        assert_eq!(
            outcome.is_ok(),
            is_allowed,
            "seed {seed}: {actions:?}: {outcome:?}"
        );
        if is_allowed {
            *self.model = after;
        }
    }

    /// Bitmaps and checkpoints of one name are nothing to each other.
    async fn checkpoint(&mut self) {
        let text = *["a", "x"].choose(self.rng).unwrap();
        let name = Name::parse(text).unwrap();
        if self.model.checkpoints.remove(text).is_some() {
            self.service
                .delete_checkpoint(&name, None, true)
                .await
                .unwrap();
        } else {
            self.service.create_checkpoint(name, None).await.unwrap();
            self.model
                .checkpoints
                .insert(text.to_owned(), Chunks::new());
        }
    }

    async fn backup(&mut self) {
        if let Some((id, _)) = self.model.frozen.take() {
            self.service.abort_backup(&id).await.unwrap();
            return;
        }
        let names = self.model.bitmaps.keys();
        let names = names.filter(|name| !self.model.checkpoints.contains_key(*name));
        let names: Vec<String> = names.cloned().collect();
        let request = BeginRequest {
            bitmaps: Some(names.clone()),
            ..BeginRequest::default()
        };
        let begun = self.service.begin_backup(request).await.unwrap();
        let dirty = |name: String| {
            let dirty = self.model.bitmaps[&name].dirty.clone();
            (name, dirty)
        };
        let frozen = names.into_iter().map(dirty).collect();
        self.model.frozen = Some((begun.id.clone(), frozen));
    }

    fn check(&self, when: &str) {
        let map = self.disk.disk.map();
        let book = self.service.book();
        let found = book.bitmaps.of("vda");
        let dirty = |bitmap: &super::Bitmap| {
            let dirty = bitmap.dirty(&self.disk).unwrap();
            let records = dirty.since.is_some();
            let chunks = chunks(dirty.runs(map, 0..CHUNKS * CHUNK));
            (bitmap.name.clone(), (chunks, records))
        };
        let found: BTreeMap<_, _> = found.iter().map(dirty).collect();
        let expected = self.model.bitmaps.iter();
        let expected: BTreeMap<_, _> = expected
            .map(|(name, e)| (name.clone(), (e.dirty.clone(), e.records)))
            .collect();
        assert_eq!(found, expected, "seed {}, {when}", self.seed);
        for (name, changed) in &self.model.checkpoints {
            let era = book.checkpoint(name).unwrap().eras[&self.disk.name];
            let found = chunks(map.changes(0..CHUNKS * CHUNK, era));
            assert_eq!(
                found, *changed,
                "seed {}, checkpoint {name}, {when}",
                self.seed
            );
        }
        let Some((id, frozen)) = &self.model.frozen else {
            return;
        };
        let part = &book.backup(id.as_str()).unwrap().disks[&self.disk.name];
        let dirty = |bitmap: &super::FrozenBitmap| {
            let runs = part
                .frozen
                .dirty(0..CHUNKS * CHUNK, &bitmap.dirty, usize::MAX);
            (bitmap.name.clone(), chunks(runs.unwrap().into_iter()))
        };
        let found: BTreeMap<_, _> = part.bitmaps.iter().map(dirty).collect();
        assert_eq!(found, *frozen, "seed {}, frozen, {when}", self.seed);
    }
}

fn chunks(runs: impl Iterator<Item = Run>) -> Chunks {
    let dirty = runs.filter(|run| run.dirty);
    dirty
        .flat_map(|run| run.range.start / CHUNK..run.range.end.div_ceil(CHUNK))
        .collect()
}

#[test]
fn whatever_is_done_in_whatever_order_bitmaps_are_what_the_model_says() {
    for seed in 0..SEEDS {
        let directory = tempfile::tempdir().unwrap();
        let image = directory.path().join("vda.raw");
        let file = std::fs::File::create(&image).unwrap();
        file.set_len(CHUNKS * CHUNK).unwrap();
        let mut rng = Rng::seed_from_u64(seed);
        let mut model = Model::default();
        for life in 0..LIVES {
            // With its executor everything of a server goes, as with a kill.
            let runtime = tokio::runtime::Builder::new_current_thread()
                .enable_all()
                .build()
                .unwrap();
            LocalSet::new().block_on(&runtime, async {
                model.bitmaps.retain(|_, bitmap| bitmap.persistent);
                let mut server = Life::begin(&image, &mut model, &mut rng, seed).await;
                server.check(&format!("at start {life}"));
                for step in 0..STEPS {
                    server.step().await;
                    server.check(&format!("life {life}, step {step}"));
                }
                if server.rng.random_bool(0.5) {
                    server.disk.close().await.unwrap();
                }
            });
        }
    }
}
