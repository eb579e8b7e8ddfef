//! Checkpoints, backups and consumers in an order drawn from a seed, with restarts and kills.
//!
//! The model is the simplest thing that can be right: for each instant, the set of chunks that were
//! written since. What a server says is clean must be; and what it says is dirty must have changed,
//! as nothing here is presumed. In some lives the eras are nearly used up from the beginning:
//! then instants are refused, and nothing else goes wrong.
//!
//! `STILLPOINT_CHAINS` sets how many lives there are; `STILLPOINT_SEED` picks one.

use std::collections::{BTreeMap, BTreeSet};

use rand::{Rng as _, seq::IteratorRandom as _};
use serde_json::{Value, json};
use stillpoint_tests::seeds::{self, Rng};
use stillpoint_tests::server::{Builder, named, names};
use stillpoint_tests::state::{change_sector, directory};
use stillpoint_tests::{CHUNK, Qmp, Server};

const DISKS: [&str; 2] = ["vda", "vdb"];
const CHUNKS: u64 = 24;
const STEPS: u64 = 60;
const CONSUMERS: [&str; 3] = ["nightly", "weekly", "c"];

#[test]
fn what_changed_since_is_what_was_written_since_whatever_the_order() {
    let lives: Vec<u64> = (1..=seeds::number("STILLPOINT_CHAINS", 12)).collect();
    for seed in seeds::seeds(&lives) {
        // Told before, in case that something hangs.
        eprintln!("seed {seed}");
        Life::new(seed).live();
    }
}

/// What was written on each disk since an instant.
type Since = BTreeMap<&'static str, BTreeSet<u64>>;

struct Life {
    what: String,
    rng: Rng,
    server: Server,
    used: u64,
    /// By uuid; those that are bases, and what they are called.
    checkpoints: BTreeMap<String, (String, Since)>,
    /// The checkpoint, by uuid, at which each consumer is on each disk.
    consumers: BTreeMap<&'static str, BTreeMap<&'static str, String>>,
    /// Those that somebody named.
    named: BTreeSet<String>,
    open: BTreeMap<String, Open>,
    ended: BTreeMap<String, &'static str>,
    refused: u64,
}

#[derive(Clone, Debug)]
struct Open {
    consumer: Option<&'static str>,
    checkpoint: Option<(String, String)>,
    /// What has changed since the instant.
    since: Since,
    /// The uuid of the base of each disk that is incremental, and what changed since up to the instant.
    bases: BTreeMap<&'static str, (String, BTreeSet<u64>)>,
}

impl Life {
    fn new(seed: u64) -> Self {
        let mut rng = seeds::rng(seed);
        let mut builder: Builder = Server::builder();
        for disk in DISKS {
            builder = builder.disk(disk, CHUNKS * CHUNK);
        }
        let mut server = builder.start();
        let mut what = format!("seed {seed}");
        if rng.random_bool(0.4) {
            // Before anything is known, as if so many instants had been taken.
            server.stop();
            let left = rng.random_range(4..40);
            for disk in DISKS {
                for sector in 1..=2 {
                    change_sector(&directory(&server, disk), sector, |bytes| {
                        bytes[46..50].copy_from_slice(&(u32::MAX - left).to_le_bytes());
                    });
                }
            }
            what = format!("{what}, {left} eras");
            server.start();
        }
        Self {
            what,
            rng,
            server,
            used: 0,
            checkpoints: BTreeMap::new(),
            consumers: BTreeMap::new(),
            named: BTreeSet::new(),
            open: BTreeMap::new(),
            ended: BTreeMap::new(),
            refused: 0,
        }
    }

    fn live(mut self) {
        let mut qmp = self.server.qmp();
        for step in 0..STEPS {
            let what = self.what.clone();
            self.what = format!("{what}, step {step}");
            match self.rng.random_range(0..20) {
                0..5 => self.write(),
                5..7 => self.create(&mut qmp),
                7 => self.delete(&mut qmp),
                8..12 => self.begin(&mut qmp),
                12..15 => self.end(&mut qmp),
                15 => self.end_again(&mut qmp),
                16 => self.forget(&mut qmp),
                17 => {
                    drop(qmp);
                    if !self.restart() {
                        return;
                    }
                    qmp = self.server.qmp();
                }
                _ => self.check(&mut qmp),
            }
            self.what = what;
        }
        self.check(&mut qmp);
    }

    fn write(&mut self) {
        for _ in 0..self.rng.random_range(1..4) {
            let disk = *DISKS.iter().choose(&mut self.rng).expect("two");
            let chunk = self.rng.random_range(0..CHUNKS);
            let mut live = self.server.open_live(disk);
            live.write(chunk * CHUNK + 512, &[chunk as u8 + 1; 512])
                .unwrap();
            let checkpoints = self.checkpoints.values_mut().map(|(_, since)| since);
            let open = self.open.values_mut().map(|open| &mut open.since);
            for since in checkpoints.chain(open) {
                if let Some(chunks) = since.get_mut(disk) {
                    chunks.insert(chunk);
                }
            }
        }
    }

    fn create(&mut self, qmp: &mut Qmp) {
        let (name, disks) = (self.new_name("cp"), self.some_disks());
        let arguments = json!({"name": name, "disks": disks});
        let Some(made) = self.unless_used_up(qmp.try_execute("checkpoint-create", &arguments))
        else {
            return;
        };
        let since = nothing_on(&disks);
        self.checkpoints
            .insert(text(&made["uuid"]), (name.clone(), since));
        self.named.insert(name);
    }

    /// The uuid of one, its name, and what has changed since.
    fn any_checkpoint(&mut self) -> Option<(String, String, Since)> {
        // The server draws the uuids, and the same seed is to choose the same.
        let by_name: BTreeMap<_, _> = self
            .checkpoints
            .iter()
            .map(|(uuid, (name, since))| (name, (uuid, since)))
            .collect();
        let (name, (uuid, since)) = by_name.into_iter().choose(&mut self.rng)?;
        Some((uuid.clone(), name.clone(), since.clone()))
    }

    fn delete(&mut self, qmp: &mut Qmp) {
        let Some((uuid, name, since)) = self.any_checkpoint() else {
            return;
        };
        let in_use = |open: &Open| open.bases.values().any(|(base, _)| *base == uuid);
        let is_last = self.consumers.values().any(|lasts| {
            let mut lasts = lasts.iter();
            lasts.any(|(disk, last)| *last == uuid && since.contains_key(disk))
        });
        let force = self.rng.random_bool(0.5);
        let arguments = json!({"name": name, "force": force});
        let deleted = qmp.try_execute("checkpoint-delete", &arguments);
        let expected = !self.open.values().any(in_use) && (force || !is_last);
        assert_eq!(
            deleted.is_ok(),
            expected,
            "{}: {name}: {deleted:?}",
            self.what
        );
        if expected {
            self.checkpoints.remove(&uuid);
        }
    }

    fn begin(&mut self, qmp: &mut Qmp) {
        if self.open.len() >= 4 {
            return;
        }
        let (id, disks) = (self.new_name("b"), self.some_disks());
        let mut arguments = json!({"id": id, "disks": disks});
        let consumer = CONSUMERS.iter().choose(&mut self.rng).copied();
        let consumer = consumer.filter(|_| self.rng.random_bool(0.6));
        let base = self.any_checkpoint();
        let base = base.map(|(uuid, name, _)| (uuid, name));
        // What each disk is expected to begin from.
        let mut bases: BTreeMap<&'static str, Option<String>> = BTreeMap::new();
        if let Some(consumer) = consumer {
            arguments["consumer"] = consumer.into();
        }
        match (consumer, base, self.rng.random_range(0..3)) {
            (Some(consumer), _, 0..2) => {
                arguments["since"] = "last".into();
                let lasts = self.consumers.get(consumer);
                for disk in &disks {
                    let last = lasts.and_then(|lasts| lasts.get(disk)).cloned();
                    bases.insert(disk, last.filter(|last| self.knows(last, disk)));
                }
            }
            (_, Some((uuid, name)), 0..2) => {
                arguments["since"] = if self.rng.random() {
                    name
                } else {
                    uuid.clone()
                }
                .into();
                let known: Vec<_> = disks.iter().filter(|d| self.knows(&uuid, d)).collect();
                if known.is_empty() {
                    let refused = qmp.try_execute("backup-begin", &arguments);
                    refused.expect_err(&format!("{}: on none of {disks:?}", self.what));
                    return;
                }
                for disk in &disks {
                    let base = Some(uuid.clone()).filter(|uuid| self.knows(uuid, disk));
                    bases.insert(disk, base);
                }
            }
            _ => {}
        }
        if self.rng.random_bool(0.4) {
            let name = self.new_name("made");
            arguments["checkpoint"] = name.clone().into();
            self.named.insert(name);
        }
        let Some(backup) = self.unless_used_up(qmp.try_execute("backup-begin", &arguments)) else {
            return;
        };
        let again = qmp.execute("backup-begin", &arguments);
        assert_eq!(again["uuid"], backup["uuid"], "{}: {arguments}", self.what);
        let mut open = Open {
            consumer,
            checkpoint: None,
            since: nothing_on(&disks),
            bases: BTreeMap::new(),
        };
        if !backup["checkpoint"].is_null() {
            open.checkpoint = Some((
                text(&backup["checkpoint_uuid"]),
                text(&backup["checkpoint"]),
            ));
        }
        for disk in &disks {
            let part = named(&backup["disks"], "disks", "disk", disk).expect("its disk");
            let base = bases.get(disk).cloned().flatten();
            assert_eq!(
                part["since_uuid"],
                json!(base),
                "{}: {arguments}: {part}",
                self.what
            );
            let mode = if base.is_some() {
                "incremental"
            } else {
                "full"
            };
            assert_eq!(part["mode"], mode, "{}: {arguments}: {part}", self.what);
            let wanted = bases.contains_key(disk);
            let has_reason = wanted && base.is_none();
            assert_eq!(
                part["reason"].is_string(),
                has_reason,
                "{}: {part}",
                self.what
            );
            if let Some(base) = base {
                let chunks = self.checkpoints[&base].1[disk].clone();
                open.bases.insert(disk, (base, chunks));
            }
        }
        self.open.insert(id, open);
    }

    fn end(&mut self, qmp: &mut Qmp) {
        let Some(id) = self.open.keys().choose(&mut self.rng).cloned() else {
            return;
        };
        let end = if self.rng.random_bool(0.6) {
            "commit"
        } else {
            "abort"
        };
        qmp.execute(&format!("backup-{end}"), &json!({"id": id}));
        let open = self.open.remove(&id).expect("it was open");
        self.ended.insert(id, end);
        let Some((uuid, name)) = open.checkpoint.filter(|_| end == "commit") else {
            self.leave_behind();
            return;
        };
        if let Some(consumer) = open.consumer {
            let lasts = self.consumers.entry(consumer).or_default();
            for disk in open.since.keys() {
                lasts.insert(disk, uuid.clone());
            }
        }
        self.checkpoints.insert(uuid, (name, open.since));
        self.leave_behind();
    }

    fn end_again(&mut self, qmp: &mut Qmp) {
        let Some((id, end)) = self.ended.iter().choose(&mut self.rng) else {
            return;
        };
        for other in ["commit", "abort"] {
            let done = qmp.try_execute(&format!("backup-{other}"), &json!({"id": id}));
            assert_eq!(done.is_ok(), other == *end, "{}: {id}: {done:?}", self.what);
        }
        let again = qmp.try_execute("backup-begin", &json!({"id": id}));
        again.expect_err("ids are not used again");
    }

    fn forget(&mut self, qmp: &mut Qmp) {
        let consumer = *CONSUMERS.iter().choose(&mut self.rng).expect("some");
        let forgotten = qmp.try_execute("consumer-forget", &json!({"name": consumer}));
        let was_known = self.consumers.remove(consumer).is_some();
        assert_eq!(forgotten.is_ok(), was_known, "{}: {forgotten:?}", self.what);
        self.leave_behind();
    }

    /// Whether the next server starts.
    fn restart(&mut self) -> bool {
        if self.rng.random() {
            self.server.stop();
        } else {
            self.server.kill();
        }
        // A start needs eras too.
        let Err(why) = self.server.try_start() else {
            return true;
        };
        let used_up = why.contains("all eras are used up") && self.what.contains("eras");
        assert!(used_up, "{}: {why}", self.what);
        false
    }

    /// What was made for a consumer goes when none is there, and no backup begins from it.
    fn leave_behind(&mut self) {
        for (uuid, (name, since)) in &mut self.checkpoints {
            if self.named.contains(name) {
                continue;
            }
            since.retain(|disk, _| {
                let is_last = |lasts: &BTreeMap<_, _>| lasts.get(disk) == Some(uuid);
                let is_base = |open: &Open| open.bases.get(disk).is_some_and(|b| b.0 == *uuid);
                self.consumers.values().any(is_last) || self.open.values().any(is_base)
            });
        }
        self.checkpoints.retain(|_, (_, since)| !since.is_empty());
    }

    /// Compares all that the server says with the model.
    fn check(&mut self, qmp: &mut Qmp) {
        self.check_checkpoints(qmp);
        self.check_consumers(qmp);
        self.check_backups(qmp);
    }

    fn check_checkpoints(&self, qmp: &mut Qmp) {
        let list = qmp.execute("query-checkpoints", &json!({}));
        let mut found = BTreeMap::new();
        for checkpoint in list.as_array().expect("a list") {
            if checkpoint["pending"] == false {
                found.insert(text(&checkpoint["uuid"]), dirty_bytes(checkpoint));
            }
        }
        let bytes = |since: &Since| -> BTreeMap<String, u64> {
            let disks = since.iter();
            disks
                .map(|(disk, chunks)| ((*disk).to_owned(), chunks.len() as u64 * CHUNK))
                .collect()
        };
        let known = self.checkpoints.iter();
        let expected: BTreeMap<_, _> = known
            .map(|(uuid, (_, s))| (uuid.clone(), bytes(s)))
            .collect();
        assert_eq!(found, expected, "{}: {list}", self.what);
    }

    fn check_consumers(&self, qmp: &mut Qmp) {
        let list = qmp.execute("query-consumers", &json!({}));
        let expected = self
            .consumers
            .keys()
            .map(|name| (*name).to_owned())
            .collect::<Vec<_>>();
        assert_eq!(names(&list, "consumers", "name"), expected, "{}", self.what);
        for consumer in list.as_array().expect("a list") {
            for disk in consumer["disks"].as_array().expect("a list") {
                let lasts = &self.consumers[consumer["name"].as_str().expect("a name")];
                let at = &lasts[disk["disk"].as_str().expect("a name")];
                assert_eq!(disk["checkpoint_uuid"], **at, "{}: {consumer}", self.what);
                let is_there = self.knows(at, disk["disk"].as_str().expect("a name"));
                assert_eq!(
                    disk["reason"].is_null(),
                    is_there,
                    "{}: {consumer}",
                    self.what
                );
            }
        }
    }

    fn check_backups(&self, qmp: &mut Qmp) {
        let list = qmp.execute("query-backups", &json!({}));
        let mut open = names(&list, "backups", "id");
        open.sort();
        let expected: Vec<String> = self.open.keys().cloned().collect();
        assert_eq!(open, expected, "{}: {list}", self.what);
        for (id, open) in &self.open {
            for (disk, (base, chunks)) in &open.bases {
                let Some((name, _)) = self.checkpoints.get(base) else {
                    continue;
                };
                let context = format!("qemu:dirty-bitmap:{name}");
                let mut export = self
                    .server
                    .open_frozen(&format!("{disk}@{id}"), &[&context]);
                let map = export.map(&context);
                let dirty = map.into_iter().filter(|extent| extent.2 == 1);
                let dirty: BTreeSet<u64> = dirty
                    .flat_map(|(at, length, _)| at / CHUNK..(at + length) / CHUNK)
                    .collect();
                assert_eq!(dirty, *chunks, "{}: {disk}@{id} since {name}", self.what);
            }
        }
    }

    fn knows(&self, uuid: &str, disk: &str) -> bool {
        let checkpoint = self.checkpoints.get(uuid);
        checkpoint.is_some_and(|(_, since)| since.contains_key(disk))
    }

    /// What an instant came to, unless the eras were used up: then nothing has happened.
    fn unless_used_up(&mut self, result: Result<Value, String>) -> Option<Value> {
        match result {
            Ok(value) => Some(value),
            Err(why) => {
                let used_up = why.contains("all eras are used up") && self.what.contains("eras");
                assert!(used_up, "{}: {why}", self.what);
                self.refused += 1;
                None
            }
        }
    }

    fn some_disks(&mut self) -> Vec<&'static str> {
        match self.rng.random_range(0..6) {
            0 => vec!["vda"],
            1 => vec!["vdb"],
            _ => DISKS.to_vec(),
        }
    }

    fn new_name(&mut self, what: &str) -> String {
        self.used += 1;
        format!("{what}{}", self.used)
    }
}

fn nothing_on(disks: &[&'static str]) -> Since {
    disks.iter().map(|disk| (*disk, BTreeSet::new())).collect()
}

fn dirty_bytes(checkpoint: &Value) -> BTreeMap<String, u64> {
    let disks = checkpoint["disks"].as_array().expect("a list").iter();
    let bytes = disks.map(|disk| {
        (
            text(&disk["disk"]),
            disk["dirty_bytes"].as_u64().expect("bytes"),
        )
    });
    bytes.collect()
}

fn text(value: &Value) -> String {
    value.as_str().expect("a text").to_owned()
}
