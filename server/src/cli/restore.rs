//! `stillpoint restore`: disks as they were at a point.

use std::fmt::Write as _;
use std::fs;
use std::io::{self, Write as _};
use std::ops::Range;
use std::path::{Path, PathBuf};

use clap::{Args, ValueEnum};
use serde::Serialize;

use super::damage::{Event, Finder, damages};
use super::problem::{Problem, exit};
use super::units::size;
use super::{Answers, Done};
use crate::archive::{self, Archive, Existing, OnDamage, Owner, Point, Restoration, Restored};
use crate::control::answers::time_text;

#[derive(Args, Debug)]
pub(super) struct RestoreArgs {
    /// The folder of backups.
    #[arg(value_name = "DIR")]
    folder: PathBuf,
    /// The point: a number, a checkpoint, a time (the last point not after it), or `latest`.
    #[arg(long, value_name = "POINT", default_value = "latest")]
    at: String,
    /// Only this disk.
    #[arg(long, value_name = "DISK")]
    disk: Option<String>,
    /// The file or block device to write; of several disks, the folder to write files to.
    #[arg(long, short, value_name = "PATH")]
    output: PathBuf,
    /// The format of the file.
    #[arg(long, value_enum, default_value_t = Format::Raw)]
    format: Format,
    /// Replace a file that is there, or overwrite a block device.
    #[arg(long)]
    force: bool,
    /// Restore what there is, and zeroes for what is damaged, which is told.
    #[arg(long)]
    keep_going: bool,
    /// Say nothing but what is wrong.
    #[arg(long, short)]
    quiet: bool,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum Format {
    /// The disk as it is, sparse if it is a file.
    Raw,
    /// One qcow2 file that needs no other.
    Qcow2,
}

#[derive(Serialize)]
struct Summary<'a> {
    outcome: &'static str,
    point: u64,
    instant: String,
    damages: u64,
    lost_bytes: u64,
    disks: Vec<RestoredDisk<'a>>,
}

#[derive(Serialize)]
struct RestoredDisk<'a> {
    disk: &'a str,
    output: String,
    size: u64,
    data_bytes: u64,
    /// Offsets and lengths.
    lost: Vec<[u64; 2]>,
}

impl RestoreArgs {
    pub(super) fn run(self, answers: &Answers) -> Result<Done, Problem> {
        let archive = Archive::open(&self.folder)?;
        let point = archive.find(&self.at, self.disk.as_deref())?;
        let disks = self.disks(point)?;
        let finder = Finder::new(answers, self.quiet);
        let mut restored = Vec::new();
        for (disk, output) in &disks {
            let wanted = Restoration {
                disk,
                point: point.number,
                output,
                format: match self.format {
                    Format::Raw => archive::Format::Raw,
                    Format::Qcow2 => archive::Format::Qcow2,
                },
                existing: if self.force {
                    Existing::Replace
                } else {
                    Existing::Keep
                },
                damage: if self.keep_going {
                    OnDamage::KeepGoing
                } else {
                    OnDamage::Refuse
                },
            };
            finder.begin("restore", Some(disk.as_str()));
            let done = archive::restore(&archive, &wanted, &finder);
            restored.push(done.map_err(|error| self.refusal(error))?);
        }
        drop(finder);
        let disks: Vec<_> = disks.iter().zip(&restored).collect();
        tell_owners(&disks);
        let mut done = report(point, &disks, answers)?;
        if self.quiet && !answers.is_json {
            done.text.clear();
        }
        Ok(done)
    }

    /// The disks to restore, and where each goes.
    fn disks(&self, point: &Point) -> Result<Vec<(String, PathBuf)>, Problem> {
        if let Some(disk) = &self.disk {
            return Ok(vec![(disk.clone(), self.output.clone())]);
        }
        if let [disk] = &point.disks[..] {
            return Ok(vec![(disk.name.clone(), self.output.clone())]);
        }
        make_folder(&self.output)?;
        let end = match self.format {
            Format::Raw => "raw",
            Format::Qcow2 => "qcow2",
        };
        let path = |name: &str| self.output.join(format!("{name}.{end}"));
        let disks = point.disks.iter();
        Ok(disks
            .map(|disk| (disk.name.clone(), path(&disk.name)))
            .collect())
    }

    fn refusal(&self, error: archive::ArchiveError) -> Problem {
        let is_damage = error.is_damage();
        let problem = Problem::from(error);
        if is_damage && !self.keep_going {
            return problem.hint("--keep-going restores what there is, and tells what is lost");
        }
        problem
    }
}

/// Says which files belong to others now than those that they replaced. Whoever used them may not get
/// them open any more.
fn tell_owners(disks: &[(&(String, PathBuf), &Restored)]) {
    for ((_, output), restored) in disks {
        if restored.owner == Owner::Changed {
            let output = output.display();
            // Whoever does not listen has the file all the same.
            let _ = writeln!(
                std::io::stderr(),
                "stillpoint: note: '{output}' could not be given the owner and group of the file that it \
                 replaced: chown it"
            );
        }
    }
}

fn report(
    point: &Point,
    disks: &[(&(String, PathBuf), &Restored)],
    answers: &Answers,
) -> Result<Done, Problem> {
    let count: u64 = disks.iter().map(|(_, restored)| restored.damages).sum();
    let lost = disks.iter().flat_map(|(_, restored)| &restored.lost);
    let lost_bytes: u64 = lost.map(length).sum();
    let exit = if count == 0 { 0 } else { exit::DAMAGED };
    if answers.is_json {
        let summary = Summary {
            outcome: if count == 0 { "restored" } else { "damaged" },
            point: point.number,
            instant: time_text(point.instant),
            damages: count,
            lost_bytes,
            disks: disks
                .iter()
                .map(|(what, done)| restored_disk(what, done))
                .collect(),
        };
        let text = Event::result(summary);
        return Ok(Done { text, exit });
    }
    let mut text = String::new();
    for ((disk, output), restored) in disks {
        let instant = time_text(point.instant);
        let _ = writeln!(
            text,
            "{disk} of point {}, {instant}: {}, of which {} are data, in {}",
            point.number,
            size(restored.size),
            size(restored.data_bytes),
            output.display()
        );
        for run in &restored.lost {
            let (from, to) = (run.start, run.end);
            let _ = writeln!(
                text,
                "lost: bytes {from} to {to} of {disk}, {}",
                size(length(run))
            );
        }
    }
    if count == 0 {
        return Ok(Done { text, exit });
    }
    super::print(&text);
    let message = format!("{} met, {} lost", damages(count), size(lost_bytes));
    Err(Problem::new("verification-failed", message))
}

fn restored_disk<'a>(
    (disk, output): &'a (String, PathBuf),
    restored: &Restored,
) -> RestoredDisk<'a> {
    RestoredDisk {
        disk,
        output: output.display().to_string(),
        size: restored.size,
        data_bytes: restored.data_bytes,
        lost: restored
            .lost
            .iter()
            .map(|run| [run.start, length(run)])
            .collect(),
    }
}

fn length(run: &Range<u64>) -> u64 {
    run.end - run.start
}

fn make_folder(path: &Path) -> Result<(), Problem> {
    match fs::create_dir(path) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => {
            let message = format!("cannot make the folder '{}': {error}", path.display());
            Err(Problem::new("not-writable", message))
        }
        _ if path.is_dir() => Ok(()),
        _ => {
            let message = format!("'{}' is no folder", path.display());
            let problem = Problem::new("unusable-output", message);
            Err(problem.hint("there are several disks: give a folder, or --disk"))
        }
    }
}
