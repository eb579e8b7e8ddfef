//! `stillpoint verify --against`: a point, compared with the disk that a server serves.
//!
//! That proves what no hash can: that the map of changes had all of them.

use std::ops::Range;
use std::path::Path;
use std::thread;

use proto::client::Piece;
use serde::Serialize;
use tokio::runtime::Builder;
use tokio::sync::mpsc;
use tokio::task::LocalSet;

use super::Done;
use super::damage::{Event, Finder};
use super::problem::{Problem, error_chain, exit};
use super::units::size;
use crate::archive::{Archive, ArchiveError, read_through};
use crate::copy::{NbdSource, Source, SourceError};
use crate::nbd_uri::NbdUri;
use crate::tls::ClientTls;

/// Which point of which disk, and what it is compared with.
pub(super) struct Comparison<'a> {
    pub(super) archive: &'a Archive,
    pub(super) point: u64,
    pub(super) disk: &'a str,
    pub(super) uri: &'a NbdUri,
    pub(super) tls_creds: Option<&'a Path>,
    /// Whether to say nothing but what is wrong.
    pub(super) is_quiet: bool,
}

/// A stretch of the disk at the point; without bytes it is zeroes.
type Stretch = (Range<u64>, Option<Vec<u8>>);

#[derive(Serialize)]
struct Difference {
    disk: String,
    point: u64,
    offset: u64,
    length: u64,
}

#[derive(Serialize)]
struct Summary<'a> {
    outcome: &'static str,
    point: u64,
    disk: &'a str,
    size: u64,
    different_bytes: u64,
}

impl Comparison<'_> {
    /// Reads both, and tells where they differ.
    pub(super) fn run(&self, finder: &Finder) -> Result<Done, Problem> {
        let runtime = Builder::new_current_thread().enable_all().build();
        let runtime = runtime
            .map_err(|error| Problem::new("no-runtime", format!("cannot begin: {error}")))?;
        let creds = self.tls_creds.or(self.uri.tls_creds.as_deref());
        let tls = creds.map(ClientTls::read).transpose()?;
        finder.begin("compare", Some(self.disk));
        let (give, mut take) = mpsc::channel::<Stretch>(STRETCHES);
        thread::scope(|scope| {
            let reader = move || {
                // When nobody takes any more, there is a reason already.
                let mut give = |range, bytes| {
                    give.blocking_send((range, bytes))
                        .map_err(|_| ArchiveError::Stopped)
                };
                read_through(self.archive, self.point, self.disk, finder, &mut give)
            };
            let thread = thread::Builder::new().name("reader".to_owned());
            let reader = thread.spawn_scoped(scope, reader);
            let reader = reader.map_err(ArchiveError::NoThread)?;
            let comparing = self.compare(tls.as_ref(), &mut take, finder);
            let compared = LocalSet::new().block_on(&runtime, comparing);
            drop(take);
            let read = reader.join().expect("reading does not panic");
            match (compared, read) {
                // What the folder says about its own damage comes first.
                (_, Err(error)) if !matches!(error, ArchiveError::Stopped) => Err(error.into()),
                (Err(problem), _) => Err(problem),
                (Ok((size, different)), _) => self.conclude(size, different, finder),
            }
        })
    }

    /// The size of the disk, and how many bytes of it are different.
    async fn compare(
        &self,
        tls: Option<&ClientTls>,
        take: &mut mpsc::Receiver<Stretch>,
        finder: &Finder,
    ) -> Result<(u64, u64), Problem> {
        let source = NbdSource::open(self.uri, tls, None).await;
        let source = source.map_err(|error| source_problem(&error))?;
        let point = self.archive.point(self.point);
        let entry = point.and_then(|point| point.disk(self.disk));
        let expected = entry.map_or(0, |entry| entry.size);
        if source.size() != expected {
            let message = format!(
                "{} of point {} has {expected} bytes, and the export has {}",
                self.disk,
                self.point,
                source.size()
            );
            return Err(Problem::new("verification-failed", message));
        }
        let (mut different, mut told) = (0, 0);
        while let Some((range, bytes)) = take.recv().await {
            for start in (range.start..range.end).step_by(READ as usize) {
                let part = start..(start + READ).min(range.end);
                let ours = bytes.as_ref().map(|bytes| {
                    &bytes[(part.start - range.start) as usize..(part.end - range.start) as usize]
                });
                let found = source.read(std::slice::from_ref(&part)).await;
                let found = found.map_err(|error| source_problem(&error))?;
                for run in differences(part.start, ours, &found) {
                    different += run.end - run.start;
                    told += 1;
                    if told <= TOLD_MAX {
                        self.tell(&run, finder);
                    }
                }
            }
        }
        source.close().await;
        Ok((expected, different))
    }

    fn tell(&self, run: &Range<u64>, finder: &Finder) {
        let (from, to) = (run.start, run.end);
        let event = Event {
            event: "difference",
            what: Difference {
                disk: self.disk.to_owned(),
                point: self.point,
                offset: from,
                length: to - from,
            },
        };
        let words = format!("different: bytes {from} to {to} of {}", self.disk);
        finder.tell(&event, &words);
    }

    fn conclude(&self, length: u64, different: u64, finder: &Finder) -> Result<Done, Problem> {
        let (point, disk) = (self.point, self.disk);
        let is_same = different == 0;
        let exit = if is_same { 0 } else { exit::DAMAGED };
        if finder.is_json() {
            let text = Event::result(Summary {
                outcome: if is_same { "identical" } else { "different" },
                point,
                disk,
                size: length,
                different_bytes: different,
            });
            return Ok(Done { text, exit });
        }
        if !is_same {
            let message = format!("{} of {disk} are not what is served", size(different));
            let hint = "is it the export of the instant of that point?";
            return Err(Problem::new("verification-failed", message).hint(hint));
        }
        let text = if self.is_quiet {
            String::new()
        } else {
            format!("identical: {disk} of point {point}, {}\n", size(length))
        };
        Ok(Done { text, exit })
    }
}

/// Where what is served is not what we have, which is zeroes if it is nothing; by blocks.
fn differences(start: u64, ours: Option<&[u8]>, pieces: &[Piece]) -> Vec<Range<u64>> {
    let mut runs: Vec<Range<u64>> = Vec::new();
    for piece in pieces {
        let Range { start: offset, end } = piece.range();
        let length = end - offset;
        let served = match piece {
            Piece::Data { data, .. } => Some(&data[..]),
            Piece::Hole { .. } => None,
        };
        let at = (offset - start) as usize;
        let ours = ours.map(|bytes| &bytes[at..at + length as usize]);
        for block in (0..length).step_by(BLOCK) {
            let within = block as usize..(block as usize + BLOCK).min(length as usize);
            let ours = ours.map(|bytes| &bytes[within.clone()]);
            let is_same = match (ours, served) {
                (Some(ours), Some(served)) => *ours == served[within.clone()],
                (Some(only), None) => block::is_zero(only),
                (None, Some(served)) => block::is_zero(&served[within.clone()]),
                (None, None) => true,
            };
            let (from, to) = (offset + within.start as u64, offset + within.end as u64);
            match runs.last_mut() {
                _ if is_same => {}
                Some(last) if last.end == from => last.end = to,
                _ => runs.push(from..to),
            }
        }
    }
    runs
}

fn source_problem(error: &SourceError) -> Problem {
    match error {
        SourceError::Unusable(failure) => failure.clone().into(),
        error => Problem::new("nbd", error_chain(error)),
    }
}

/// What waits to be compared, 16 MiB each.
const STRETCHES: usize = 2;

/// What is read at once; longer requests are cut up anyway.
const READ: u64 = 16 << 20;

/// How fine differences are told.
const BLOCK: usize = 512;

/// More than anybody reads.
const TOLD_MAX: u64 = 1000;
