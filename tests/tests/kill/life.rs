//! A server that is killed again and again.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc;
use std::time::Duration;

use rand::{Rng as _, seq::IteratorRandom as _};
use rustix::process::Signal;
use serde_json::Value;
use stillpoint_tests::raw_nbd::{command, flag};
use stillpoint_tests::seeds::{self, Rng};
use stillpoint_tests::server::names;
use stillpoint_tests::shadow::{Change, Event, SECTOR};
use stillpoint_tests::tools::sha256;
use stillpoint_tests::{CHUNK, KIB, MIB, RawNbd, Server, Shadow};

use crate::known::{Known, Seen, Sure, Told, begin, control, tick};

/// With chunks of 4 KiB a region is 256 KiB, so that regions are retired under way.
const DISKS: [(&str, u64, u64); 2] = [("vda", 32 * MIB, 4 * KIB), ("vdb", 8 * MIB, CHUNK)];
const WRITERS: u64 = 4;
/// Each belongs to one writer.
const UNIT: u64 = 16 * KIB;

/// A server that is killed again and again, and all that its clients know.
pub(crate) struct Life {
    seed: u64,
    rng: Rng,
    server: Server,
    clock: AtomicU64,
    shadows: BTreeMap<&'static str, Shadow>,
    known: Mutex<Known>,
}

impl Life {
    pub(crate) fn new(seed: u64) -> Self {
        let mut builder = Server::builder();
        let mut shadows = BTreeMap::new();
        for (name, size, chunk) in DISKS {
            let image = builder.path(&format!("{name}.raw"));
            stillpoint_tests::tools::sparse_file(&image, size);
            builder = builder.disk_with(name, &image, &format!(",granularity={chunk}"));
            shadows.insert(name, Shadow::new(size, chunk));
        }
        Self {
            seed,
            rng: seeds::rng(seed),
            server: builder.start(),
            clock: AtomicU64::new(1),
            shadows,
            known: Mutex::default(),
        }
    }

    pub(crate) fn round(&mut self, round: u64) {
        let what = format!("seed {}, round {round}", self.seed);
        if self.rng.random_bool(0.7) {
            // One that is open before the load begins, and has been looked at.
            let mut known = self.known.lock().unwrap();
            let done = begin(&self.server, &mut known, &self.clock, &mut self.rng);
            assert!(done, "{what}: nothing was killed yet");
            drop(known);
            self.look_at_backups(&what);
        }
        self.load(&what);
        assert_sane(&self.server, &what);
        for _ in 0..self.rng.random_range(0..3) {
            let after = Duration::from_micros(self.rng.random_range(0..40_000));
            self.server.start_and_kill(after);
            assert_sane(&self.server, &what);
        }
        self.server.start();
        self.resolve(&what);
        self.look_at_backups(&what);
        self.probe(round, &what);
    }

    /// Clients write and the controller takes and ends instants, until the server is killed.
    fn load(&mut self, what: &str) {
        let kill_at = self.rng.random_range(1..1500);
        let gently = self.rng.random_bool(0.3);
        let grace = Duration::from_micros(self.rng.random_range(0..30_000));
        let (done, dead) = (AtomicU64::new(0), AtomicBool::new(false));
        let (now, enough) = mpsc::channel();
        let (server, clock, known) = (&self.server, &self.clock, &self.known);
        let mut rngs: Vec<Rng> = (0..=WRITERS)
            .map(|n| seeds::rng(self.rng.random::<u64>() ^ n))
            .collect();
        let mut rng = rngs.pop().expect("one more than writers");
        let events = std::thread::scope(|scope| {
            let writers: Vec<_> = (0..WRITERS)
                .zip(&mut rngs)
                .map(|(number, rng)| {
                    let (now, done) = (now.clone(), &done);
                    let connections = DISKS.map(|(name, ..)| server.open_live(name));
                    let mut writer = Writer {
                        number,
                        connections,
                        clock,
                    };
                    scope.spawn(move || {
                        writer.run(rng, || {
                            if done.fetch_add(1, Ordering::Relaxed) == kill_at {
                                now.send(()).expect("the test waits for this");
                            }
                        })
                    })
                })
                .collect();
            drop(now);
            let dead = &dead;
            scope.spawn(move || {
                while !dead.load(Ordering::Acquire) {
                    control(server, &mut known.lock().unwrap(), clock, &mut rng);
                }
            });
            let reached = enough.recv();
            if gently {
                server.signal(Signal::TERM);
                server.ends_within(grace);
            }
            server.signal(Signal::KILL);
            dead.store(true, Ordering::Release);
            reached.unwrap_or_else(|_| panic!("{what}: all the writers were hung up on"));
            let ended = |writer: std::thread::ScopedJoinHandle<'_, _>| writer.join().unwrap();
            writers.into_iter().map(ended).collect::<Vec<Vec<_>>>()
        });
        self.server.wait();
        let end = self.tick();
        for (disk, mut event) in events.into_iter().flatten() {
            if !event.acknowledged {
                event.ended = end;
            }
            self.shadows
                .get_mut(disk)
                .expect("one of ours")
                .add([event]);
        }
        let mut known = self.known.lock().unwrap();
        for checkpoint in known.checkpoints.values_mut() {
            checkpoint.taken.1 = checkpoint.taken.1.min(end);
        }
        for backup in known.backups.values_mut() {
            backup.taken.1 = backup.taken.1.min(end);
        }
    }

    fn tick(&self) -> u64 {
        tick(&self.clock)
    }

    /// Compares the new server's lists with what was told by the old one, and believes the new one
    /// where the answer was lost.
    fn resolve(&mut self, what: &str) {
        let mut known = self.known.lock().unwrap();
        let list = self.server.cli_json(&["backup", "list"]);
        let open: BTreeSet<String> = names(&list, "backups", "id").into_iter().collect();
        let is_open = |id: &String| list.to_string().contains(&format!("\"{id}\""));
        let list = self.server.cli_json(&["checkpoint", "list"]);
        let members = list["checkpoints"].as_array().or_else(|| list.as_array());
        let pending = |member: &&Value| member["pending"] == Value::Bool(true);
        let all = members.expect("a list");
        let name = |member: &Value| member["name"].as_str().expect("a name").to_owned();
        let waiting: BTreeSet<String> = all.iter().filter(pending).map(name).collect();
        let there: BTreeSet<String> = all.iter().filter(|m| !pending(m)).map(name).collect();
        // One that was being made or deleted is on all of the disks, or on none.
        let disks_of = |member: &Value| member["disks"].as_array().map_or(0, Vec::len);
        for checkpoint in all {
            assert_eq!(disks_of(checkpoint), DISKS.len(), "{what}: {checkpoint}");
        }

        let Known {
            checkpoints,
            backups,
            ..
        } = &mut *known;
        for (id, backup) in backups.iter_mut() {
            let now = if open.contains(id) {
                Sure::Yes
            } else {
                Sure::No
            };
            assert!(
                backup.open == Sure::Unknown || backup.open == now,
                "{what}: backup {id} was {backup:?}, is open: {}",
                is_open(id)
            );
            backup.open = now;
            let made = there.contains(&backup.checkpoint);
            assert_eq!(
                waiting.contains(&backup.checkpoint),
                now == Sure::Yes,
                "{what}: the checkpoint of {id} is pending while it is open"
            );
            if now == Sure::No && backup.committed == Sure::Unknown {
                backup.committed = if made { Sure::Yes } else { Sure::No };
                if made {
                    let told = Told {
                        taken: backup.taken,
                        there: Sure::Yes,
                    };
                    checkpoints.insert(backup.checkpoint.clone(), told);
                }
            } else if backup.committed != Sure::Yes {
                assert!(!made, "{what}: {id} was not committed: {backup:?}");
            }
        }
        checkpoints.retain(|name, told| {
            let now = there.contains(name);
            let expected = told.there == Sure::Unknown || (told.there == Sure::Yes) == now;
            assert!(
                expected,
                "{what}: checkpoint {name} was {told:?}, is there: {now}"
            );
            told.there = Sure::Yes;
            now
        });
        let known_names: BTreeSet<String> = checkpoints.keys().cloned().collect();
        assert_eq!(there, known_names, "{what}: checkpoints");
        for id in &open {
            assert!(backups.contains_key(id), "{what}: nobody asked for {id}");
        }

        // Ids of backups that have ended are not given out again, and nothing is left of those.
        let ended = backups.iter().filter(|(_, backup)| {
            backup.open == Sure::No && (backup.committed == Sure::Yes || !backup.seen.is_empty())
        });
        if let Some((id, _)) = ended.choose(&mut self.rng) {
            let again = self.server.cli(&["backup", "begin", "--id", id]);
            again.refused("used before");
        }
        for (disk, ..) in DISKS {
            let folder = self.server.path(&format!("{disk}.raw.stillpoint/backups"));
            let left: BTreeSet<String> = fs::read_dir(folder)
                .into_iter()
                .flatten()
                .map(|entry| entry.unwrap().file_name().into_string().unwrap())
                .collect();
            assert_eq!(left, open, "{what}: what is left of backups of {disk}");
        }
    }

    /// Sees that the exports of every open backup serve what they did, and what they must.
    fn look_at_backups(&self, what: &str) {
        let mut known = self.known.lock().unwrap();
        let Known {
            checkpoints,
            backups,
            ..
        } = &mut *known;
        for (id, backup) in backups.iter_mut().filter(|(_, b)| b.open == Sure::Yes) {
            for (disk, shadow) in &self.shadows {
                let what = format!("{what}, {disk}@{id}");
                let dirty = backup
                    .since
                    .as_ref()
                    .map(|since| (since, format!("qemu:dirty-bitmap:{since}")));
                let mut contexts = vec!["base:allocation"];
                contexts.extend(dirty.as_ref().map(|(_, context)| context.as_str()));
                let mut export = self.server.open_frozen(&format!("{disk}@{id}"), &contexts);
                let bytes = export.read_all();
                shadow.check_bytes(&bytes, backup.taken, &what);
                let map = dirty.as_ref().map(|(since, context)| {
                    let map = export.map(context);
                    let base = checkpoints[*since].taken;
                    shadow.check_map(&map, (base, backup.taken), &what);
                    map
                });
                let seen = Seen {
                    sha256: sha256(&bytes),
                    allocation: export.map("base:allocation"),
                    dirty: map,
                };
                let before = backup.seen.entry(disk).or_insert_with(|| seen.clone());
                assert_eq!(*before, seen, "{what}: it serves something else now");
            }
        }
    }

    /// Sees what the disks hold, and what has changed since each checkpoint.
    fn probe(&mut self, round: u64, what: &str) {
        let now = (self.tick(), self.tick());
        let known = self.known.lock().unwrap();
        let id = format!("probe{round}");
        let some = known.checkpoints.keys().choose(&mut self.rng);
        let since = some.map_or(vec![], |name| vec!["--since", name]);
        let begun = self.server.begin(&id, &since);
        for disk in begun["disks"].as_array().expect("its disks") {
            let mode = if since.is_empty() {
                "full"
            } else {
                "incremental"
            };
            assert_eq!(disk["mode"], mode, "{what}: {begun}");
            assert_eq!(disk["uncertain_bytes"], 0, "{what}: {begun}");
        }
        for (disk, shadow) in &self.shadows {
            let live = self.server.open_live(disk).read_all();
            shadow.check_bytes(&live, now, &format!("{what}, {disk}"));
            let bytes = self.server.image_bytes(disk);
            assert!(bytes == live, "{what}: {disk} is not its image");
            let frozen = self.server.open_frozen(&format!("{disk}@{id}"), &[]);
            let frozen = { frozen }.read_all();
            assert!(frozen == live, "{what}: {disk} was not frozen as it is");
            for (name, checkpoint) in &known.checkpoints {
                let context = format!("qemu:dirty-bitmap:{name}");
                let mut export = self
                    .server
                    .open_frozen(&format!("{disk}@{id}"), &[&context]);
                let what = format!("{what}, {disk} since {name}");
                shadow.check_map(&export.map(&context), (checkpoint.taken, now), &what);
            }
        }
        self.server.abort(&id);
    }
}

/// A client that changes what belongs to it, one change at a time.
struct Writer<'a> {
    number: u64,
    connections: [RawNbd; DISKS.len()],
    clock: &'a AtomicU64,
}

impl Writer<'_> {
    /// Goes on until the server is gone, and says what happened.
    fn run(&mut self, rng: &mut Rng, mut done: impl FnMut()) -> Vec<(&'static str, Event)> {
        let mut events = Vec::new();
        loop {
            let which = usize::from(rng.random_bool(0.2));
            let (disk, size, _) = DISKS[which];
            let units = size / UNIT / WRITERS;
            // Half of the time in a few places, so that the same chunk is hit again and again.
            let unit = if rng.random_bool(0.5) {
                rng.random_range(0..units.min(16))
            } else {
                rng.random_range(0..units)
            };
            let start = rng.random_range(0..UNIT / SECTOR);
            let length = rng.random_range(1..=UNIT / SECTOR - start) * SECTOR;
            let offset = (unit * WRITERS + self.number) * UNIT + start * SECTOR;
            let issued = tick(self.clock);
            let (change, asked, payload) = match rng.random_range(0..10) {
                0 => (Change::Trim, (command::TRIM, 0), vec![]),
                1..3 => {
                    let no_hole = if rng.random() { flag::NO_HOLE } else { 0 };
                    (Change::Fill(0), (command::WRITE_ZEROES, no_hole), vec![])
                }
                how => {
                    let fua = if how == 3 { flag::FUA } else { 0 };
                    let stamp = issued.to_le_bytes().repeat(length as usize / 8);
                    (Change::Fill(issued), (command::WRITE, fua), stamp)
                }
            };
            let (sender, receiver) = self.connections[which].halves();
            let sent = sender.request(asked, issued, offset, length as u32, &payload);
            let answer = sent.and_then(|()| receiver.answer());
            let acknowledged = answer.as_ref().is_ok_and(|answer| answer.error == 0);
            let event = Event {
                offset,
                length,
                change,
                issued,
                ended: tick(self.clock),
                acknowledged,
            };
            events.push((disk, event));
            if !acknowledged {
                return events;
            }
            done();
        }
    }
}

#[track_caller]
fn assert_sane(server: &Server, what: &str) {
    let log = server.stderr();
    assert!(!log.contains("panicked"), "{what}: {log}");
}
