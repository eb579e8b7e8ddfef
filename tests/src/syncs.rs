//! Which files a server syncs, as the kernel sees it.

use std::fs;
use std::io::{BufRead as _, BufReader};
use std::path::{Path, PathBuf};
use std::process::{ChildStderr, Command, Stdio};
use std::time::Instant;

use crate::Server;
use crate::process::{KilledOnDrop, PATIENCE};
use crate::tools::path;

/// The syncs of a server since this began to watch it.
#[derive(Debug)]
pub struct Syncs {
    log: PathBuf,
    _strace: KilledOnDrop,
    /// It goes on telling of new threads, and must be able to.
    _told: BufReader<ChildStderr>,
}

impl Syncs {
    /// Watches a server.
    #[track_caller]
    pub fn of(server: &Server) -> Self {
        let log = server.path("syncs");
        let mut strace = Command::new("strace");
        strace.args(["-f", "-y", "-e", "trace=fdatasync,fsync", "-o", path(&log)]);
        strace.arg(format!("--attach={}", server.pid()));
        let mut strace = KilledOnDrop::spawn(strace.stderr(Stdio::piped()));
        let told = strace.child.stderr.take().expect("it was asked for");
        strace.wait_until_readable(&told);
        // It says so when it has attached to all threads.
        let mut told = BufReader::new(told);
        let mut attached = String::new();
        told.read_line(&mut attached).expect("a line");
        assert!(attached.contains("attached"), "{attached}");
        Self {
            log,
            _strace: strace,
            _told: told,
        }
    }

    /// Returns when `file` has been synced so often, of which `strace` tells a moment later.
    #[track_caller]
    pub fn shows(&self, file: &Path, count: usize, why: &str) {
        self.reaches(file, count, why);
        assert_eq!(self.count(file), count, "{why}");
    }

    /// The same, whoever else may have synced it besides.
    #[track_caller]
    pub fn reaches(&self, file: &Path, count: usize, why: &str) {
        let begun = Instant::now();
        while self.count(file) < count {
            assert!(begun.elapsed() < PATIENCE, "no sync after {why}");
            std::thread::yield_now();
        }
    }

    fn count(&self, file: &Path) -> usize {
        let log = fs::read_to_string(&self.log).expect("its log");
        let file = format!("<{}>", path(file));
        let syncs = log.lines().filter(|line| line.contains(&file));
        syncs.filter(|line| line.ends_with("= 0")).count()
    }
}
