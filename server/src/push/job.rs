//! What is known of a job while it works, and when it is over.

use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, OnceLock, PoisonError};

use tokio::sync::watch;

use crate::archive::{self, DiskPlan, Draft, Point};
use crate::failure::Failure;
use crate::names::Name;

/// A backup on its way into a folder.
#[derive(Debug)]
pub(crate) struct Job {
    /// The backup's id, and the job's.
    pub(crate) id: Name,
    /// The folder.
    pub(crate) to: PathBuf,
    /// What it is to hold, when that is known.
    planned: OnceLock<Planned>,
    /// Bytes that were read back.
    checked: AtomicU64,
    notes: Mutex<Vec<String>>,
    outcome: OnceLock<Result<Point, Failure>>,
    wish: watch::Sender<Wish>,
}

/// What a job is about to make.
#[derive(Debug)]
pub(crate) struct Planned {
    /// The number of the point.
    pub(crate) point: u64,
    /// Its disks.
    pub(crate) disks: Vec<DiskJob>,
}

/// A job's share of one disk.
#[derive(Debug)]
pub(crate) struct DiskJob {
    /// What it copies.
    pub(crate) plan: DiskPlan,
    /// How many bytes it has to fetch.
    pub(crate) total: u64,
    /// How many of them an earlier job has fetched.
    pub(crate) before: u64,
    done: AtomicU64,
}

/// What somebody wants of a job.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Wish {
    /// That it goes on.
    GoOn,
    /// That it stops, so that another one can go on.
    Leave,
    /// That it fails.
    Cancel,
}

/// Where a job is, in QEMU's words.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum JobStatus {
    /// It copies.
    Running,
    /// It is to end, and has not yet.
    Aborting,
    /// It is over.
    Concluded,
}

impl JobStatus {
    /// The word.
    pub(crate) fn word(self) -> &'static str {
        match self {
            Self::Running => "running",
            Self::Aborting => "aborting",
            Self::Concluded => "concluded",
        }
    }
}

impl Job {
    /// One that has not done anything.
    pub(super) fn new(id: Name, to: PathBuf) -> Self {
        Self {
            id,
            to,
            planned: OnceLock::new(),
            checked: AtomicU64::new(0),
            notes: Mutex::default(),
            outcome: OnceLock::new(),
            wish: watch::channel(Wish::GoOn).0,
        }
    }

    /// Where it is.
    pub(crate) fn status(&self) -> JobStatus {
        match (self.outcome.get(), *self.wish.borrow()) {
            (Some(_), _) => JobStatus::Concluded,
            (None, Wish::GoOn) => JobStatus::Running,
            (None, Wish::Leave | Wish::Cancel) => JobStatus::Aborting,
        }
    }

    /// What it makes, when that is known.
    pub(crate) fn planned(&self) -> Option<&Planned> {
        self.planned.get()
    }

    /// How many bytes were read back.
    pub(crate) fn checked(&self) -> u64 {
        self.checked.load(Ordering::Relaxed)
    }

    /// What somebody should know, and has to do nothing about.
    pub(crate) fn notes(&self) -> Vec<String> {
        self.notes
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }

    /// What has come of it, when it is over.
    pub(crate) fn outcome(&self) -> Option<&Result<Point, Failure>> {
        self.outcome.get()
    }

    pub(crate) fn is_over(&self) -> bool {
        self.outcome.get().is_some()
    }

    pub(super) fn note(&self, text: String) {
        tracing::info!(backup = %self.id, "{text}");
        let mut notes = self.notes.lock().unwrap_or_else(PoisonError::into_inner);
        notes.push(text);
    }

    /// Says what is wanted of it. Nobody takes back that it is to end.
    pub(super) fn wish(&self, wish: Wish) {
        self.wish.send_if_modified(|now| {
            let is_new = *now == Wish::GoOn;
            if is_new {
                *now = wish;
            }
            is_new
        });
    }

    pub(super) fn wished(&self) -> Wish {
        *self.wish.borrow()
    }

    /// Waits until it is to end.
    pub(super) async fn is_to_end(&self) {
        let mut wish = self.wish.subscribe();
        let ended = wish.wait_for(|wish| *wish != Wish::GoOn).await;
        ended.expect("it has the sender");
    }

    pub(super) fn plan(&self, draft: &Draft) {
        let disks = draft.disks().iter().map(|disk| {
            let total = disk.data_bytes();
            let missing: u64 = disk.chunks().map(|chunk| chunk.bytes()).sum();
            let before = total - missing;
            DiskJob {
                plan: disk.plan().clone(),
                total,
                before,
                done: AtomicU64::new(before),
            }
        });
        let planned = Planned {
            point: draft.number(),
            disks: disks.collect(),
        };
        self.planned.set(planned).expect("a job has one plan");
    }

    pub(super) fn conclude(&self, outcome: Result<Point, Failure>) {
        self.outcome.set(outcome).expect("a job is over once");
    }
}

impl DiskJob {
    /// How many bytes have been fetched.
    pub(crate) fn done(&self) -> u64 {
        self.done.load(Ordering::Relaxed)
    }
}

impl crate::copy::Progress for Job {
    fn copied(&self, disk: usize, bytes: u64) {
        if let Some(planned) = self.planned.get() {
            planned.disks[disk].done.fetch_add(bytes, Ordering::Relaxed);
        }
    }
}

impl archive::Progress for Job {
    fn checked(&self, bytes: u64) {
        self.checked.fetch_add(bytes, Ordering::Relaxed);
    }

    fn is_stopped(&self) -> bool {
        self.wished() != Wish::GoOn
    }
}
