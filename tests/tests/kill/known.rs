//! What the controller was told: each command has an answer, or one that was lost.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};

use rand::{Rng as _, seq::IteratorRandom as _};
use stillpoint_tests::seeds::Rng;
use stillpoint_tests::shadow::Instant;
use stillpoint_tests::{Extent, Server};

/// What the controller was told.
#[derive(Default)]
pub(crate) struct Known {
    pub(crate) checkpoints: BTreeMap<String, Told>,
    pub(crate) backups: BTreeMap<String, Backup>,
    used: u64,
}

/// A checkpoint, and whether it must be there.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Told {
    pub(crate) taken: Instant,
    pub(crate) there: Sure,
}

#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Sure {
    Yes,
    No,
    /// The answer was lost.
    Unknown,
}

#[derive(Clone, Debug)]
pub(crate) struct Backup {
    pub(crate) taken: Instant,
    pub(crate) since: Option<String>,
    pub(crate) checkpoint: String,
    pub(crate) open: Sure,
    pub(crate) committed: Sure,
    /// What its exports served when it was looked at first.
    pub(crate) seen: BTreeMap<&'static str, Seen>,
}

#[derive(Clone, Debug, Eq, PartialEq)]
pub(crate) struct Seen {
    pub(crate) sha256: String,
    pub(crate) allocation: Vec<Extent>,
    pub(crate) dirty: Option<Vec<Extent>>,
}

/// One command, drawn.
pub(crate) fn control(server: &Server, known: &mut Known, clock: &AtomicU64, rng: &mut Rng) {
    let open: Vec<String> = known
        .backups
        .iter()
        .filter(|(_, backup)| backup.open == Sure::Yes)
        .map(|(id, _)| id.clone())
        .collect();
    match rng.random_range(0..10) {
        0..3 => checkpoint(server, known, clock),
        3 if known.checkpoints.len() > 4 => delete(server, known, rng),
        4..7 if open.len() < 3 => {
            begin(server, known, clock, rng);
        }
        what => {
            if let Some(id) = open.iter().choose(rng) {
                end(server, known, id, what % 2 == 0);
            }
        }
    }
}

fn checkpoint(server: &Server, known: &mut Known, clock: &AtomicU64) {
    known.used += 1;
    let name = format!("cp{}", known.used);
    let before = tick(clock);
    let there = asked(server, &["checkpoint", "create", &name]);
    let taken = (before, instant_end(clock, there));
    known.checkpoints.insert(name, Told { taken, there });
}

fn delete(server: &Server, known: &mut Known, rng: &mut Rng) {
    let in_use = |name: &str| {
        let uses = |b: &Backup| b.open != Sure::No && b.since.as_deref() == Some(name);
        known.backups.values().any(uses)
    };
    let names = known.checkpoints.keys().filter(|name| !in_use(name));
    let Some(name) = names.choose(rng).cloned() else {
        return;
    };
    let told = known.checkpoints.get_mut(&name).expect("one of them");
    told.there = match asked(server, &["checkpoint", "delete", &name]) {
        Sure::Yes => Sure::No,
        other => other,
    };
    if told.there == Sure::No {
        known.checkpoints.remove(&name);
    }
}

/// Says whether there was an answer.
pub(crate) fn begin(server: &Server, known: &mut Known, clock: &AtomicU64, rng: &mut Rng) -> bool {
    known.used += 1;
    let (id, checkpoint) = (format!("n{}", known.used), format!("n{}-cp", known.used));
    let sure = |told: &&Told| told.there == Sure::Yes;
    let bases = known.checkpoints.iter().filter(|(_, told)| sure(told));
    let since = bases.map(|(name, _)| name.clone()).choose(rng);
    let mut args = vec!["backup", "begin", "--id", &id, "--checkpoint", &checkpoint];
    if let Some(since) = &since {
        args.extend(["--since", since]);
    }
    let before = tick(clock);
    let open = asked(server, &args);
    let taken = (before, instant_end(clock, open));
    let backup = Backup {
        taken,
        since: since.clone(),
        checkpoint: checkpoint.clone(),
        open,
        committed: if open == Sure::Yes {
            Sure::No
        } else {
            Sure::Unknown
        },
        seen: BTreeMap::new(),
    };
    known.backups.insert(id, backup);
    open == Sure::Yes
}

fn end(server: &Server, known: &mut Known, id: &str, commit: bool) {
    let verb = if commit { "commit" } else { "abort" };
    let answer = asked(server, &["backup", verb, id]);
    let backup = known.backups.get_mut(id).expect("an open one");
    let told = Told {
        taken: backup.taken,
        there: Sure::Yes,
    };
    match (answer, commit) {
        (Sure::Yes, true) => {
            (backup.open, backup.committed) = (Sure::No, Sure::Yes);
            known.checkpoints.insert(backup.checkpoint.clone(), told);
        }
        (Sure::Yes, false) => (backup.open, backup.committed) = (Sure::No, Sure::No),
        (_, true) => (backup.open, backup.committed) = (Sure::Unknown, Sure::Unknown),
        (_, false) => backup.open = Sure::Unknown,
    }
}

/// Whether it was done; unknown if the server was killed meanwhile.
fn asked(server: &Server, args: &[&str]) -> Sure {
    let output = server.cli(args);
    if output.code() == 0 {
        return Sure::Yes;
    }
    let gone = [
        "no server",
        "hung up",
        "ended",
        "closed",
        "stopping",
        "reset",
        "Connection",
    ];
    assert!(
        gone.iter().any(|text| output.stderr.contains(text)),
        "neither done nor killed: {output}"
    );
    Sure::Unknown
}

/// An instant whose answer was lost was taken before the kill, whenever that is.
fn instant_end(clock: &AtomicU64, answer: Sure) -> u64 {
    match answer {
        Sure::Yes => tick(clock),
        _ => u64::MAX,
    }
}

pub(crate) fn tick(clock: &AtomicU64) -> u64 {
    clock.fetch_add(1, Ordering::SeqCst)
}
